"""Merged checkpoints, against float64 sums of the full weights; saved by ranks of several layouts, and by files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.checkpoint.folders import folder_lock
from ema_dist.checkpoint.weighted_sum.source import FileSource, open_source
from ema_dist.checkpoint.weighted_sum.write import OutputFormat
from tests.support.cli_runs import save_with_dcp
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    IGNORED_WARNINGS,
    LAYOUTS,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    make_trained,
)
from tests.support.reshard_cases import run_in_world

pytestmark = [*IGNORED_WARNINGS, IGNORE_INITIAL_WEIGHTS_WARNING]

FORMATS = ["safetensors", "torch", "dcp"]


def weighted_sum(models: list[Mapping[str, Tensor]], coefficients: list[float]) -> dict[str, Tensor]:
    """The oracle: float64 on full tensors; what is no floating or finite number in the last model is its own."""
    expected: dict[str, Tensor] = {}
    for name, last in models[-1].items():
        expected[name] = last
        if last.is_floating_point():
            total = sum(c * model[name].double() for c, model in zip(coefficients, models, strict=True))
            expected[name] = torch.where(last.isfinite(), total, last.double()).to(last.dtype)
    return expected


def read_all(folder: Path) -> dict[str, Tensor]:
    source = open_source(folder, "live")
    return dict(zip(source.meta_tensors, source.read(source.meta_tensors), strict=True))


@pytest.mark.world_size(4)
@pytest.mark.parametrize("kind", ["live", "ema"])
def test_checkpoints_of_any_layout_and_number_of_ranks_merge(kind: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """Saved by 4, 2 and 3 ranks; merged by 2, each of which writes files of its own."""
    models: list[Mapping[str, Tensor]] = []
    coefficients = [0.5, -0.25, 0.75]
    for step, (layout, ranks) in enumerate({"hsdp": 4, "tp": 2, "fsdp1-3": 3}.items()):

        def save(layout: str = layout, step: int = step) -> None:
            net = make_net("tp", layout, seed=step)
            model = LAYOUTS[layout].wrap(net)
            ema = ShardedEMA(model, decay=0.5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            ema.update()
            checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=step, keep=None)
            dtypes = {name: tensor.dtype for name, tensor in make_net("plain").state_dict().items()}
            live = {name: tensor.to(dtypes[name]) for name, tensor in full_weights(model).items()}
            full = live if kind == "live" else ema.full_state_dict()
            if dist.get_rank() == 0:
                torch.save(full, tmp_path / f"full-{step}.pt")

        save.__name__ = f"save{step}"
        run_in_world(ranks, tmp_path, save)
    paths = [tmp_path / f"full-{step}.pt" for step in range(3)]

    def merge() -> None:
        models.extend(torch.load(path, weights_only=True) for path in paths)
        expected = weighted_sum(models, coefficients)
        for file_format in FORMATS:
            folder = tmp_path / file_format
            files = checkpoint.merge(
                [tmp_path / "root"], folder, coefficients=coefficients, weights=kind, file_format=file_format
            )
            assert_bitwise_equal(read_all(folder), expected)
            assert len([file for file in files if file.suffix in {".safetensors", ".bin", ".distcp"}]) >= 2
            assert [path.name for path in tmp_path.glob(".*")] == []

    run_in_world(2, tmp_path, merge)


def make_mixed_sources(folder: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """The same model at four times, in every kind of source."""
    nets = [make_net("plain", seed=seed) for seed in range(4)]
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]
    checkpoint.save({"model": nets[0]}, folder / "root", step=7)
    save_with_dcp(folder / "dcp-8", dict(nets[1].state_dict()))
    save_file(states[2], folder / "weights-9.safetensors")
    torch.save(states[3], folder / "weights-10.bin")
    return [folder / name for name in ("root", "dcp-8", "weights-9.safetensors", "weights-10.bin")], states


@pytest.mark.parametrize("file_format", FORMATS)
def test_kinds_of_sources_mix_and_are_recorded(file_format: OutputFormat, tmp_path: Path) -> None:
    paths, states = make_mixed_sources(tmp_path)
    checkpoint.merge(paths, tmp_path / "out", file_format=file_format)
    assert_bitwise_equal(read_all(tmp_path / "out"), weighted_sum(states, [0.25] * 4))
    sources = json.loads((tmp_path / "out" / "merge.json").read_text())["sources"]
    assert [(source["step"], source["coefficient"]) for source in sources] == [(step, 0.25) for step in (7, 8, 9, 10)]
    assert [Path(source["path"]) for source in sources] == [paths[0] / "step-0000000007", *paths[1:]]
    assert len({source["checksum"] for source in sources}) == 4


def test_the_checksum_is_of_the_weights_whatever_holds_them(tmp_path: Path) -> None:
    state = {"weight": torch.randn(5, 3)}
    save_file(state, tmp_path / "a.safetensors")
    save_with_dcp(tmp_path / "b", state)
    checkpoint.merge([tmp_path / "a.safetensors", tmp_path / "b"], tmp_path / "out")
    first, second = json.loads((tmp_path / "out" / "merge.json").read_text())["sources"]
    assert first["checksum"] == second["checksum"]


@pytest.mark.parametrize(("stored", "result"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_low_precision_is_added_in_float32(stored: torch.dtype, result: torch.dtype, tmp_path: Path) -> None:
    """Ten values of 16 bits, whose rounding errors would add up if each partial sum were rounded."""
    states = [{"weight": torch.randn(40, 50).to(stored)} for _ in range(10)]
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(10)]
    checkpoint.merge(paths, tmp_path / "out", dtype=result)
    expected = sum(0.1 * state["weight"].double() for state in states)
    assert isinstance(expected, Tensor)
    merged = read_all(tmp_path / "out")["weight"]
    assert merged.dtype == result
    torch.testing.assert_close(merged.double(), expected, rtol=torch.finfo(result).eps, atol=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1.0), (torch.bfloat16, 0.0)])
def test_wider_tensors_are_added_in_float64(dtype: torch.dtype, expected: float, tmp_path: Path) -> None:
    """In float32, which is enough for 16 bits, 2**25 + 1 is 2**25."""
    for number, value in enumerate((2.0**25, 1.0, 2.0**25)):
        save_file({"weight": torch.tensor([value], dtype=dtype)}, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    checkpoint.merge(paths, tmp_path / "out", coefficients=[1, 1, -1])
    assert read_all(tmp_path / "out")["weight"].item() == expected


class Counter(nn.Linear):
    """A layer with an extra state, an integer buffer and a mask with infinities."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen = 0
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen, "scale": torch.tensor([float(self.seen)])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_integers_extra_states_and_infinities_are_those_of_the_last(file_format: OutputFormat, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        model = nn.Sequential(Counter())
        model[0].count.fill_(step)
        model[0].seen = step
        checkpoint.save({"model": model}, tmp_path / "root", step=step)
    checkpoint.merge([tmp_path / "root"], tmp_path / "out", coefficients=[2, -2, 1], file_format=file_format)
    note, *others = json.loads((tmp_path / "out" / "merge.json").read_text())["notes"]
    loaded = nn.Sequential(Counter())
    if file_format == "dcp":
        assert checkpoint.load({"model": loaded}, tmp_path / "out") == 3
    elif file_format == "torch":
        loaded.load_state_dict(torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True))
    else:
        loaded.load_state_dict(read_all(tmp_path / "out"), strict=False)
    is_kept = file_format != "safetensors"
    assert re.match(r"2 .*0\.count, 0\._extra_state" if is_kept else r"1 .*0\.count$", note)
    assert [bool(re.match(r".* 1 extra state.*0\._extra_state.*torch.*dcp", it)) for it in others] == [True] * (
        not is_kept
    )
    assert (loaded[0].seen, int(loaded[0].count)) == (3 if is_kept else 0, 3)
    assert loaded[0].mask.tolist() == [0.0, float("-inf")]


@layouts("ddp", "fsdp1", "fsdp2", "tp")
def test_a_merge_is_loaded_as_a_model_of_any_layout(layout: str, tmp_path: Path) -> None:
    states = [dict(make_net(layout, seed=seed).state_dict()) for seed in range(2)]
    if dist.get_rank() == 0:
        for number, state in enumerate(states):
            save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / f"{number}.safetensors")
    dist.barrier()
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    checkpoint.merge(paths, tmp_path / "out", file_format="dcp")
    model, _ = make_trained(layout)
    checkpoint.load({"model": model}, tmp_path / "out")
    assert_bitwise_equal(full_weights(model), weighted_sum(states, [0.5, 0.5]))


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_output_that_reads_differently_is_an_error_and_nothing_is_left(
    file_format: OutputFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = make_mixed_sources(tmp_path)
    before = sorted(tmp_path.iterdir())
    calls = count()
    monkeypatch.setattr("ema_dist.checkpoint.weighted_sum.write.tensor_checksum", lambda _: str(next(calls)))
    with pytest.raises(checkpoint.CheckpointError, match=r"embed\.weight.*differ"):
        checkpoint.merge(paths, tmp_path / "new" / "out", file_format=file_format)
    assert sorted(tmp_path.iterdir()) == before


def test_a_tensor_as_an_extra_state_is_reported_as_copied(tmp_path: Path) -> None:
    for number in range(2):
        state = {"weight": torch.full((2,), float(number)), "_extra_state": torch.tensor([float(number)])}
        save_file(state, tmp_path / f"{number}.safetensors")
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    checkpoint.merge(paths, tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert (merged["weight"].tolist(), merged["_extra_state"].tolist()) == ([0.5, 0.5], [1.0])
    (note,) = json.loads((tmp_path / "out" / "merge.json").read_text())["notes"]
    assert re.match(r"1 .*_extra_state", note)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"last": -1}, r"between 1 and 4.*got -1"),
        ({"last": 0}, r"between 1 and 4.*got 0"),
        ({"last": 5}, r"between 1 and 4.*got 5"),
        ({"emulate_decay": "exponential"}, r"linear.*1-sqrt.*cosine.*'exponential'"),
        ({"file_format": "onnx"}, r"safetensors.*torch.*dcp.*'onnx'"),
    ],
)
def test_wrong_arguments_are_errors_with_the_choices(settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    paths, _ = make_mixed_sources(tmp_path)
    with pytest.raises(ValueError, match=expected):
        checkpoint.merge(paths, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one.*none"):
        checkpoint.merge([], tmp_path / "out")


def test_a_folder_that_another_merge_writes_is_named(tmp_path: Path) -> None:
    paths, _ = make_mixed_sources(tmp_path)
    (tmp_path / ".out.partial").mkdir()
    with folder_lock(tmp_path / ".out.partial"), pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.merge(paths, tmp_path / "out")
    assert f"{tmp_path}/out" in str(caught.value)
    assert "partial" not in str(caught.value)


def tied_or_not(*, is_tied: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    if is_tied:
        model[1].weight = model[0].weight
    return model


def test_tensors_that_only_some_sources_tie_are_not_tied_in_the_output(tmp_path: Path) -> None:
    models = [tied_or_not(is_tied=is_tied, seed=seed) for seed, is_tied in enumerate((False, True))]
    for step, model in enumerate(models):
        checkpoint.save({"model": model}, tmp_path / "root", step=step)
    expected = weighted_sum([dict(model.state_dict()) for model in models], [0.5, 0.5])
    checkpoint.merge(tmp_path / "root", tmp_path / "out", file_format="dcp")
    checkpoint.merge(tmp_path / "out", tmp_path / "again")
    assert_bitwise_equal(read_all(tmp_path / "again"), expected)
    (note,) = json.loads((tmp_path / "out" / "merge.json").read_text())["notes"]
    assert re.match(r"1 .*some.*1\.weight", note)


def test_a_folder_named_as_a_step_is_refused(tmp_path: Path) -> None:
    paths, _ = make_mixed_sources(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="step-0000000100 is named like a step"):
        checkpoint.merge(paths, tmp_path / "root" / "step-0000000100", file_format="dcp")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["step-0000000007"]


def test_a_file_where_a_parent_folder_is_expected_is_named(tmp_path: Path) -> None:
    paths, _ = make_mixed_sources(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"weights-9\.safetensors is not a folder"):
        checkpoint.merge(paths, paths[2] / "new" / "merged")


@pytest.mark.world_size(2)
def test_an_extra_state_that_cannot_be_read_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    if dist.get_rank() == 0:
        torch.save(nn.Sequential(Counter()).state_dict(), tmp_path / "a.bin")
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch, pytest.raises((checkpoint.CheckpointError, ValueError)):
        if dist.get_rank() == 0:
            patch.setattr(FileSource, "extra_state", lambda *_: object())
        checkpoint.merge(tmp_path / "a.bin", tmp_path / "out", file_format="dcp")
    assert not (tmp_path / "out").exists()


def test_files_of_parameters_are_merged(tmp_path: Path) -> None:
    models = [nn.Linear(2, 2) for _ in range(2)]
    for number, model in enumerate(models):
        torch.save(dict(model.named_parameters()), tmp_path / f"{number}.bin")
    checkpoint.merge([tmp_path / "0.bin", tmp_path / "1.bin"], tmp_path / "out")
    expected = weighted_sum([dict(model.state_dict()) for model in models], [0.5, 0.5])
    assert_bitwise_equal(read_all(tmp_path / "out"), expected)


def test_the_checksum_does_not_depend_on_the_position(tmp_path: Path) -> None:
    for number in range(2):
        save_file({"w": torch.randn(3), "n": torch.tensor(number)}, tmp_path / f"{number}.safetensors")
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    checksums = []
    for out, order in {"a": files, "b": files[::-1]}.items():
        checkpoint.merge(order, tmp_path / out)
        sources = json.loads((tmp_path / out / "merge.json").read_text())["sources"]
        checksums.append({source["path"]: source["checksum"] for source in sources})
        assert [source["copied_checksum"] is None for source in sources] == [True, False]
    assert checksums[0] == checksums[1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lr1-step-100", "lr1-step-200", "lr1-step-1000"], [100, 200, 1000]),
        (["lr1-step-100", "a-step-100"], r"lr1-step-100|a-step-100"),
        (["step-100", "step-0100"], r"several.*step-0100, step-100"),
        (["step-100", "final"], r"step-100.*without one.*final"),
        (["my-bf16", "my-v2"], "no weights"),
    ],
)
def test_no_folder_of_weights_in_a_root_is_dropped(names: list[str], expected: Any, tmp_path: Path) -> None:  # noqa: ANN401
    for name in names:
        (tmp_path / "root" / name).mkdir(parents=True)
        save_file({"weight": torch.ones(1)}, tmp_path / "root" / name / "model.safetensors")
    if isinstance(expected, str):
        with pytest.raises(checkpoint.CheckpointError, match=expected):
            checkpoint.merge(tmp_path / "root", tmp_path / "out")
        return
    checkpoint.merge(tmp_path / "root", tmp_path / "out")
    sources = json.loads((tmp_path / "out" / "merge.json").read_text())["sources"]
    assert [source["step"] for source in sources] == expected


def test_numbered_weights_beside_steps_are_not_dropped(tmp_path: Path) -> None:
    checkpoint.save({"model": nn.Linear(1, 1)}, tmp_path / "root", step=1)
    (tmp_path / "root" / "step-2").mkdir()
    save_file({"weight": torch.ones(1)}, tmp_path / "root" / "step-2" / "model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="weight files in step-2"):
        checkpoint.merge(tmp_path / "root", tmp_path / "out")


def test_averages_are_merged_in_the_dtype_they_are_stored_in(tmp_path: Path) -> None:
    """Not rounded to the bfloat16 of the live weights before they are added."""
    averages: list[dict[str, Tensor]] = []
    for step in range(2):
        torch.manual_seed(step)
        model = nn.Linear(30, 40, bias=False).bfloat16()
        ema = ShardedEMA(model, decay=HalfLife(3))
        model.weight.data.add_(0.1)
        ema.update()
        averages.append(ema.full_state_dict(dtype=torch.float32))
        checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=step)
    checkpoint.merge([tmp_path / "root"], tmp_path / "out", weights="ema", dtype=torch.float32)
    checkpoint.merge([tmp_path / "root"], tmp_path / "narrow", weights="ema")
    expected = weighted_sum(averages, [0.5, 0.5])["weight"]
    assert torch.equal(read_all(tmp_path / "out")["weight"], expected)
    assert torch.equal(read_all(tmp_path / "narrow")["weight"], expected.bfloat16())
