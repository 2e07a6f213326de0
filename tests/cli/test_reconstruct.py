"""`ema-dist reconstruct` on checkpoints of differing layouts and world sizes, beside sums computed in float64."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_dist import HalfLife, InverseGamma, Power, ShardedEMA, Uniform, checkpoint, posthoc
from ema_dist.checkpoint.combine.reconstruction import (
    Reconstruction,
    choose_snapshots,
    input_nbytes,
    open_snapshots,
    weighted_sum,
    write_reconstruction,
)
from ema_dist.posthoc.fitting import evaluate_coefficients
from ema_dist.posthoc.profiles import profile_of
from tests.checkpoint.test_merging import Counter
from tests.schedules.laws import POWER_OF_TEN_PERCENT
from tests.support.cli_runs import load_exported, run, run_ok, save_with_dcp
from tests.support.layouts import IGNORED_WARNINGS, assert_bitwise_equal, full_weights, make_net, train_step, wrap
from tests.support.reshard_cases import run_in_world

pytestmark = [*IGNORED_WARNINGS]

LAWS = {"narrow": Power(sigma_rel=0.05), "wide": Power(sigma_rel=0.10), "mean": Uniform(), "half": HalfLife(8)}
STEPS, RESHARDED_AT = 48, 25
START = 4
TIME = STEPS - START


def train(root: Path, layout: str, first: int, last: int) -> dict[int, dict[str, Tensor]]:
    """Steps of a run in a layout, which goes on from the newest checkpoint; the full live weights of each."""
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = ShardedEMA(model, decay=LAWS, start=START)
    state = {"model": model, "ema": ema}
    if first > 1:
        checkpoint.load(state, root)
    live = {}
    for step in range(first, last + 1):
        train_step(model, optimizer, step)
        ema.update()
        live[step] = full_weights(model)
        if step % 4 == 0 or step == last:
            checkpoint.save(state, root, step=step, keep=None)
    return live


def brute_force(live: dict[int, dict[str, Tensor]], weights: dict[int, float]) -> dict[str, Tensor]:
    """The weighted sum of live weights over the steps since averaging began."""
    return {name: sum(weight * live[step][name] for step, weight in weights.items()) for name in live[STEPS]}


def power(step: int, gamma: float) -> float:
    return (step / TIME) ** (gamma + 1) - ((step - 1) / TIME) ** (gamma + 1)


TARGETS = {
    "--sigma-rel 0.1": {START + step: power(step, POWER_OF_TEN_PERCENT) for step in range(1, TIME + 1)},
    "--half-life 8": {START: 2 ** (-TIME / 8)}
    | {START + step: 2 ** (-(TIME - step) / 8) - 2 ** (-(TIME - step + 1) / 8) for step in range(1, TIME + 1)},
    "--window 12": dict.fromkeys(range(STEPS - 11, STEPS + 1), 1 / 12),
    "--window 44": dict.fromkeys(range(START + 1, STEPS + 1), 1 / 44),
}


@pytest.mark.world_size(2)
def test_profiles_of_a_resharded_run_are_those_of_its_live_weights(tmp_path: Path) -> None:
    """Two ranks of FSDP2, then one plain; targets that the tracks have exactly, so that only rounding differs."""
    root, live_file = tmp_path / "root", tmp_path / "live.pt"

    def first_part() -> None:
        live = train(root, "fsdp2", 1, RESHARDED_AT)
        if dist.get_rank() == 0:
            torch.save(live, live_file)

    def second_part() -> None:
        torch.save(torch.load(live_file) | train(root, "plain", RESHARDED_AT + 1, STEPS), live_file)

    run_in_world(2, tmp_path, first_part)
    run_in_world(1, tmp_path, second_part)
    if rank() == 0:
        check_targets(root, torch.load(live_file), tmp_path)


def check_targets(root: Path, live: dict[int, dict[str, Tensor]], folder: Path) -> None:
    net = make_net("plain")
    trained = {name for name, parameter in net.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for target, weights in TARGETS.items():
        out = folder / target.replace(" ", "")
        summary = json.loads(run_ok("reconstruct", root, "-o", out, *target.split(), "--json"))
        assert summary["total_variation"] < 1e-6
        assert sum(row["coefficient"] for row in summary["snapshots"]) == pytest.approx(1)
        averages, expected = load_exported(out), brute_force(live, weights)
        net.load_state_dict(averages, strict=True)
        rounding = 2e-6 * summary["amplification"]
        for name in trained:
            torch.testing.assert_close(averages[name].double(), expected[name], rtol=0, atol=rounding)
        nearest = max(summary["snapshots"], key=lambda row: (row["step"], abs(row["coefficient"])))
        run_ok("export", root, folder / f"nearest {target}", "--track", nearest["track"])
        others = load_exported(folder / f"nearest {target}")
        assert_bitwise_equal(*({name: it[name] for name in it.keys() - trained} for it in (averages, others)))


def save_series(root: Path, *, steps: int = 40, every: int = 10, **settings: Any) -> list[Tensor]:  # noqa: ANN401
    """Checkpoints of a run whose weights are random; its values in float64, the starting one first."""
    model = nn.Linear(3, 2, bias=False)
    generator = torch.Generator().manual_seed(0)
    ema = ShardedEMA(model, **settings)
    values = [model.weight.detach().double()]
    for step in range(1, steps + 1):
        model.weight.data = torch.randn(2, 3, generator=generator)
        ema.update()
        values.append(model.weight.detach().double())
        if step % every == 0:
            checkpoint.save({"ema": ema}, root, step=step, keep=None)
    return values


@pytest.mark.world_size(1)
def test_a_window_takes_two_checkpoints_and_says_which(tmp_path: Path) -> None:
    values = save_series(tmp_path / "root", decay={"mean": Uniform(), "other": Power(gamma=3)})
    result = run("reconstruct", tmp_path / "root", "-o", tmp_path / "out", "--window", 20.5, "--at", 30)
    output = result.stdout
    assert re.search(r"step-0000000030 holds no live model", result.stderr)
    assert len(re.findall(r"Uniform\(\)", output)) == 2
    assert re.search(r"actual window +20, from 10 to 30", output)
    assert re.search(r"amplification +2\.00 ", output)
    (average,) = load_exported(tmp_path / "out").values()
    torch.testing.assert_close(average.double(), torch.stack(values[11:31]).mean(0), rtol=0, atol=1e-6)
    record = json.loads((tmp_path / "out" / "reconstruct.json").read_text())
    assert [source["step"] for source in record["sources"]] == [10, 30]
    assert record["tracks"] == ["mean", "mean"]
    refused = run("reconstruct", tmp_path / "root", "-o", tmp_path / "no", "--window", 25, "--at", 30)
    assert refused.exit_code == 1
    assert re.search(r"0\.167.*0\.05.*10, 20, 30, 40", refused.stderr)
    assert not (tmp_path / "no").exists()
    forced = run("reconstruct", tmp_path / "root", "-o", tmp_path / "forced", "--window", 25, "--at", 30, "--force")
    assert forced.exit_code == 0, forced.output


@pytest.mark.world_size(1)
@pytest.mark.parametrize("file_format", ["safetensors", "torch", "dcp"])
def test_other_formats_and_dtypes_hold_the_same(file_format: str, tmp_path: Path) -> None:
    save_series(tmp_path / "root", decay=Power(gamma=5))
    where = ("-o", tmp_path / "out", "--half-life", 6, "--force", "--dtype", "bfloat16", "--format", file_format)
    run_ok("reconstruct", tmp_path / "root", *where)
    run_ok("reconstruct", tmp_path / "root", "-o", tmp_path / "wide", "--half-life", 6, "--force")
    (expected,) = load_exported(tmp_path / "wide").values()
    model = nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    if file_format == "dcp":
        checkpoint.load({"model": model}, tmp_path / "out")
        found = model.weight
    elif file_format == "torch":
        found = torch.load(tmp_path / "out" / "pytorch_model.bin")["weight"]
    else:
        (found,) = load_exported(tmp_path / "out").values()
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.world_size(1)
def test_python_api_matches_cli(tmp_path: Path) -> None:
    save_series(tmp_path / "root", decay=Power(gamma=5))
    fit = checkpoint.reconstruct(tmp_path / "root", tmp_path / "out", Power(gamma=6), tolerance=0.2)
    summary = json.loads(
        run_ok(
            "reconstruct",
            tmp_path / "root",
            "-o",
            tmp_path / "b",
            "--sigma-rel",
            posthoc.sigma_rel(gamma=6),
            "--force",
            "--json",
        )
    )
    assert fit.coefficients == pytest.approx([row["coefficient"] for row in summary["snapshots"]])
    assert_bitwise_equal(load_exported(tmp_path / "out"), load_exported(tmp_path / "b"))
    with pytest.raises(checkpoint.CheckpointError, match=r"tolerance of 0.*`tolerance`"):
        checkpoint.reconstruct(tmp_path / "root", tmp_path / "c", Power(gamma=6), tolerance=0)


WRONG = {
    "no target": ([], 2, "--sigma-rel, --half-life, --window"),
    "two targets": (["--sigma-rel", 0.1, "--window", 3], 2, "--sigma-rel and --window"),
    "a width beyond the range": (["--sigma-rel", 0.4], 2, r"0\.28868"),
    "no average at all": (["--half-life", 0], 1, "HalfLife"),
    "before the snapshots": (["--sigma-rel", 0.1, "--at", 5], 1, r"10 and 40.*\b5\b"),
    "after the snapshots": (["--sigma-rel", 0.1, "--at", 41], 1, r"10 and 40.*\b41\b"),
    "a window beyond the beginning": (["--window", 41], 1, r"\b41\b.*\b40\b"),
    "a profile out of reach": (["--half-life", 1], 1, r"total variation 0\.\d+.*0\.05.*\b20, 30, 40"),
    "another entry": (["--sigma-rel", 0.1, "--entry", "emas"], 1, r"'emas'.*\['ema'\]"),
}


@pytest.mark.world_size(1)
def test_wrong_input_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    save_series(root, decay=Power(gamma=5))
    for options, exit_code, words in WRONG.values():
        result = run("reconstruct", root, "-o", tmp_path / "out", *options)
        assert result.exit_code == exit_code
        assert re.search(words, " ".join(result.stderr.replace("│", " ").split())), result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.world_size(1)
def test_snapshots_that_do_not_fit_are_named(tmp_path: Path) -> None:
    root, target = tmp_path / "root", ("-o", tmp_path / "out", "--sigma-rel", 0.15, "--force")
    save_series(root, steps=10, decay=InverseGamma())
    assert re.search(r"InverseGamma.*no exact profile", fails("reconstruct", root, *target))
    shutil.rmtree(root)
    save_series(root, steps=20, decay=Uniform())
    other = ShardedEMA(nn.Linear(3, 2), decay=Uniform())
    for _ in range(30):
        other.update()
    checkpoint.save({"ema": other}, root, step=30, keep=None)
    assert re.search(r"hold different models.*bias", fails("reconstruct", root, *target))
    shutil.rmtree(root)
    checkpoint.save({"model": nn.Linear(3, 2)}, root, step=1)
    assert re.search(r"averages.*step-0000000001.*none", fails("reconstruct", root, *target))
    (tmp_path / "out").mkdir()
    save_series(root, steps=20, decay=Uniform())
    assert re.search(rf"{tmp_path}/out already exists", fails("reconstruct", root, *target))
    assert [*(tmp_path / "out").iterdir()] == []
    assert re.search(r"absent", fails("reconstruct", tmp_path / "absent", "-o", tmp_path / "new", "--window", 3))


def fails(*arguments: object) -> str:
    """Runs the command, which must exit with 1, and returns its errors."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    return result.stderr


@pytest.mark.world_size(1)
def test_a_damaged_snapshot_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    save_series(tmp_path / "root", steps=20, decay=Uniform())
    data = tmp_path / "root" / "step-0000000010" / "__0_0.distcp"
    flip_a_byte(data)
    error = fails("reconstruct", tmp_path / "root", "-o", tmp_path / "out", "--window", 10)
    assert str(data) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.world_size(2)
def test_ranks_share_the_reading_and_all_fail_on_a_damaged_file(tmp_path: Path) -> None:
    """Two ranks read each byte once between them; a damaged file, which one of them verifies, is an error on both."""
    root, out = tmp_path / "root", tmp_path / "out"
    model = wrap("fsdp2", make_net("fsdp2"))
    ema = ShardedEMA(model, decay=Uniform())
    for step in (1, 2):
        ema.update()
        checkpoint.save({"model": model, "ema": ema}, root, step=step, keep=None)
    chosen = choose_snapshots(open_snapshots(root), posthoc.Window(1))
    weights = weighted_sum(chosen)
    read_sizes: list[int] = []
    write_reconstruction(chosen, weights, out, on_bytes=read_sizes.append)
    by_rank = [0, 0]
    dist.all_gather_object(by_rank, sum(read_sizes))
    assert sum(by_rank) == input_nbytes(chosen, weights)
    assert min(by_rank) > 0.3 * max(by_rank)
    dist.barrier()
    if dist.get_rank() == 0:
        flip_a_byte(root / "step-0000000001" / "__1_0.distcp")
    dist.barrier()
    with pytest.raises(checkpoint.CheckpointError, match=r"damaged.*__1_0\.distcp"):
        checkpoint.reconstruct(root, tmp_path / "new", posthoc.Window(1))
    assert not (tmp_path / "new").exists()


@pytest.mark.world_size(1)
def test_buffers_are_those_of_the_nearest_snapshot_even_if_its_averages_are_not_used(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(2)
    ema = ShardedEMA(model, decay=Uniform())
    for step in (1, 2, 3):
        model(torch.randn(8, 2))
        ema.update()
        checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=step, keep=None)
    snapshots = open_snapshots(tmp_path / "root").snapshots
    profiles = [snapshot.profile for snapshot in snapshots[:2]]
    fit = evaluate_coefficients(profiles, [-1.0, 2.0], profile_of(posthoc.Window(1), 2.0))
    reconstruction = Reconstruction(snapshots[:2], fit, snapshots[2], step=3, time=3.0)
    write_reconstruction(reconstruction, weighted_sum(reconstruction), tmp_path / "out")

    found, nearest = load_exported(tmp_path / "out"), ema.full_state_dict()
    assert found["num_batches_tracked"] == 3
    assert_bitwise_equal(*({name: it[name] for name in ("running_mean", "running_var")} for it in (found, nearest)))
    assert torch.equal(found["weight"], model.weight), "the weights never moved"
    recorded = json.loads((tmp_path / "out" / "reconstruct.json").read_text())
    assert [source["coefficient"] for source in recorded["sources"]] == [-1, 2, 0]
    assert len(recorded["tracks"]) == 3


def flip_a_byte(path: Path) -> None:
    """Changes the byte in the middle of a file."""
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)


@pytest.mark.world_size(1)
def test_an_entry_and_file_size_can_be_chosen_in_python(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    emas = {"a": ShardedEMA(model, decay=Uniform()), "b": ShardedEMA(model, decay=Uniform())}
    for step in (1, 2):
        for ema in emas.values():
            nn.init.constant_(model.weight, step + (ema is emas["b"]))
            ema.update()
        checkpoint.save({"model": model, **emas}, tmp_path / "root", step=step, keep=None)
    with pytest.raises(checkpoint.CheckpointError, match=r"'a', 'b'.*`entry`"):
        checkpoint.reconstruct(tmp_path / "root", tmp_path / "out", posthoc.Window(1))
    checkpoint.reconstruct(tmp_path / "root", tmp_path / "out", posthoc.Window(1), entry="b", max_shard_size=8)
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == 2
    assert torch.equal(load_exported(tmp_path / "out")["weight"], torch.full((2, 3), 3.0))


@pytest.mark.world_size(1)
def test_extra_states_that_safetensors_cannot_hold_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(Counter())
    ema = ShardedEMA(model, decay=Uniform())
    ema.update()
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    result = run("reconstruct", tmp_path / "root", "-o", tmp_path / "out", "--window", 1)
    assert re.search(r"note: .* 1 extra state.*0\._extra_state", result.stderr)
    kept = run("reconstruct", tmp_path / "root", "-o", tmp_path / "kept", "--window", 1, "--format", "torch")
    assert "extra state" not in kept.stderr


@pytest.mark.world_size(1)
@pytest.mark.parametrize("with_model", [{2}, {1}])
def test_snapshots_with_and_without_the_tied_model_combine(with_model: set[int], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    ema = ShardedEMA(model, decay=Uniform())
    for step in (1, 2):
        nn.init.constant_(model[0].weight, step)
        ema.update()
        state = {"ema": ema, **({"model": model} if step in with_model else {})}
        checkpoint.save(state, tmp_path / "root", step=step, keep=None)
    checkpoint.reconstruct(tmp_path / "root", tmp_path / "out", posthoc.Window(1))
    averages = load_exported(tmp_path / "out")
    assert torch.allclose(averages["0.weight"], torch.tensor(2.0))
    assert ("1.weight" in averages) == (2 in with_model)


@pytest.mark.world_size(1)
def test_steps_of_plain_dcp_are_snapshots(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, decay=Uniform())
    for epoch in (1, 2):
        for _ in range(5):
            nn.init.constant_(model.weight, epoch)
            ema.update()
        save_with_dcp(tmp_path / "root" / f"epoch-{epoch}", {"model": model.state_dict(), "ema": ema})
    result = run("reconstruct", tmp_path / "root", "-o", tmp_path / "out", "--window", 5)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert torch.allclose(load_exported(tmp_path / "out")["weight"], torch.tensor(2.0))


def rank() -> int:
    """This rank, also without a process group."""
    return int(os.environ["RANK"])
