"""A checkpoint holds the exact state, in every layout and also inside a swap, and loads in other layouts and worlds."""

from __future__ import annotations

import json
import resource
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import AdamW, Optimizer

from ema_dist import ShardedEMA, checkpoint
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read_entries
from ema_dist.sharding import local_tensor
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    STORAGE_LAYOUTS,
    Net,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    train_step,
    wrap,
)
from tests.support.reshard_cases import reshard_cases, run_in_world

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


Run = tuple[nn.Module, Optimizer, ShardedEMA]


def make_run(layout: str, net: Net | None = None, **settings: Any) -> Run:  # noqa: ANN401
    """A wrapped model with its optimizer and averages."""
    model = wrap(layout, net or make_net(layout))
    return model, AdamW(model.parameters(), lr=0.05), ShardedEMA(model, **{"decay": 0.8} | settings)


def train(run: Run, *steps: int) -> None:
    model, optimizer, ema = run
    for step in steps:
        train_step(model, optimizer, step)
        ema.update()


@torch.no_grad()
def mark_moments(optimizer: Optimizer) -> None:
    """Set the moments to functions of the weights, so that the full weights are an oracle for them."""
    for parameter, state in optimizer.state.items():
        local_tensor(state["exp_avg"]).copy_(local_tensor(parameter))
        local_tensor(state["exp_avg_sq"]).copy_(local_tensor(parameter).abs())


def state_of(run: Run) -> dict[str, Any]:
    return dict(zip(("model", "optim", "ema"), run, strict=True))


def read_all(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint, read by this process alone."""
    metadata = read_metadata(folder)
    values: dict[str, Any] = dict.fromkeys(metadata.state_dict_metadata)
    read_entries(folder, values, metadata=metadata)
    return values


def tensors_under(prefix: str, values: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def assert_stored_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_values_equal(actual[name], sorted(value) if name.endswith(".params") else value, name)


def assert_values_equal(actual: Any, expected: Any, name: str = "") -> None:  # noqa: ANN401
    match expected:
        case Tensor():
            assert torch.equal(actual, expected), name
        case dict():
            assert actual.keys() == expected.keys()
            for key, value in expected.items():
                assert_values_equal(actual[key], value, f"{name}.{key}")
        case list():
            actual = sorted(actual) if name.endswith(".params") else actual
            for index, (item, value) in enumerate(zip(actual, expected, strict=True)):
                assert_values_equal(item, value, f"{name}.{index}")
        case _:
            assert actual == expected, name


@layouts(*STORAGE_LAYOUTS, "fsdp1-flat-grad-op", "ddp-checkpointed", "fsdp2-compiled")
def test_weights_moments_and_averages_round_trip(layout: str, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0, 1, 2)
    model, optimizer, ema = run
    mark_moments(optimizer)
    checkpoint.save(state_of(run), tmp_path, step=3)
    weights, averages = full_weights(model), ema.full_state_dict()
    saved = read_all(tmp_path / "step-0000000003")
    assert_bitwise_equal(tensors_under("model.", saved), weights)
    for name in dict(make_net(layout).named_parameters()).keys() - {"frozen.weight", "frozen.bias"}:
        assert torch.equal(saved[f"optim.state.{name}.exp_avg"].double(), weights[name]), name
        assert torch.equal(saved[f"optim.state.{name}.exp_avg_sq"].double(), weights[name].abs()), name
        assert saved[f"optim.state.{name}.step"] == 3

    other = make_run(layout, make_net(layout, seed=1))
    assert checkpoint.load(state_of(other), tmp_path) == 3
    assert_bitwise_equal(full_weights(other[0]), weights)
    assert_bitwise_equal(other[2].full_state_dict(), averages)
    checkpoint.save(state_of(other), tmp_path, step=4)
    assert_stored_equal(read_all(tmp_path / "step-0000000004"), saved)
    train(run, 3)
    train(other, 3)
    assert_bitwise_equal(full_weights(other[0]), full_weights(model))
    assert_bitwise_equal(other[2].full_state_dict(), ema.full_state_dict())


# The last four leave weights gathered after a pass, or wrap the modules once more.
@layouts(*STORAGE_LAYOUTS, "fsdp2-keep", "fsdp1-flat-grad-op", "fsdp2-compiled", "ddp-checkpointed")
def test_a_checkpoint_taken_inside_a_swap_has_the_live_weights(layout: str, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0, 1)
    model, _, ema = run
    checkpoint.save(state_of(run), tmp_path, step=1)
    with ema.swapped():
        checkpoint.save(state_of(run), tmp_path, step=2)
        checkpoint.save({"model": model}, tmp_path, step=3)
    outside = read_all(tmp_path / "step-0000000001")
    assert not torch.equal(outside["model.blocks.0.scale"], outside["ema.tracks.default.averages.blocks.0.scale"])
    assert_stored_equal(read_all(tmp_path / "step-0000000002"), outside)
    assert_bitwise_equal(
        tensors_under("model.", read_all(tmp_path / "step-0000000003")), tensors_under("model.", outside)
    )


@reshard_cases
def test_everything_loads_under_another_layout_and_world(
    source_layout: str, source_ranks: int, target_layout: str, target_ranks: int, tmp_path: Path
) -> None:
    def save() -> None:
        run = make_run(source_layout, make_net(source_layout, target_layout))
        train(run, 0, 1)
        mark_moments(run[1])
        with run[2].swapped():
            checkpoint.save(state_of(run), tmp_path, step=2)

    def load() -> None:
        run = make_run(target_layout, make_net(source_layout, target_layout, seed=1))
        train(run, 7)  # there is a state already, which the loaded one must replace
        checkpoint.load(state_of(run), tmp_path)
        checkpoint.save(state_of(run), tmp_path / "again", step=2)
        assert_bitwise_equal(full_weights(run[0]), tensors_under("model.", read_all(tmp_path / "step-0000000002")))
        assert_stored_equal(read_all(tmp_path / "again" / "step-0000000002"), read_all(tmp_path / "step-0000000002"))
        train(run, 2)

    run_in_world(source_ranks, tmp_path, save)
    run_in_world(target_ranks, tmp_path, load)


@layouts("plain", "ddp", "fsdp2", "hsdp")
def test_a_submodule_saved_inside_a_swap_has_live_weights(layout: str, tmp_path: Path) -> None:
    net = make_net(layout)
    run = make_run(layout, net)
    train(run, 0, 1)
    checkpoint.save({"block": net.blocks[0]}, tmp_path, step=1)
    with run[2].swapped():
        checkpoint.save({"block": net.blocks[0]}, tmp_path, step=2)
    assert_stored_equal(read_all(tmp_path / "step-0000000002"), read_all(tmp_path / "step-0000000001"))


@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp")
def test_changes_after_an_async_save_do_not_leak_into_it(layout: str, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0)
    for step in (1, 2, 3):
        checkpoint.save(state_of(run), tmp_path / "blocking", step=step, keep=None)
        checkpoint.save(state_of(run), tmp_path / "background", step=step, keep=None, block=False)
        train(run, step)
    checkpoint.wait()
    for step in (1, 2, 3):
        name = f"step-000000000{step}"
        assert_stored_equal(read_all(tmp_path / "background" / name), read_all(tmp_path / "blocking" / name))


@layouts("plain", "ddp", "fsdp2", "tp")
def test_dcp_loads_our_checkpoints(layout: str, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0, 1)
    checkpoint.save(state_of(run), tmp_path, step=2)
    model, optimizer, ema = make_run(layout, make_net(layout, seed=1))
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": moments, "ema": ema}, checkpoint_id=tmp_path / "step-0000000002")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    train(run, 2)
    train((model, optimizer, ema), 2)
    assert_bitwise_equal(full_weights(model), full_weights(run[0]))
    assert_bitwise_equal(ema.full_state_dict(), run[2].full_state_dict())


@layouts("plain", "ddp", "fsdp2", "tp")
def test_checkpoints_of_plain_dcp_are_loaded(layout: str, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0, 1)
    weights, moments = get_state_dict(run[0], run[1])
    dcp.save({"model": weights, "optim": moments, "ema": run[2]}, checkpoint_id=tmp_path / "torch")
    other = make_run(layout, make_net(layout, seed=1))
    assert checkpoint.load(state_of(other), tmp_path / "torch") is None
    train(run, 2)
    train(other, 2)
    assert_bitwise_equal(full_weights(other[0]), full_weights(run[0]))
    assert_bitwise_equal(other[2].full_state_dict(), run[2].full_state_dict())


@layouts("plain", "ddp", "fsdp1-flat", "fsdp2-3", "hsdp", "fsdp2-tp")
def test_a_checkpoint_from_before_the_averages_starts_them_from_its_live_weights(layout: str, tmp_path: Path) -> None:
    model, optimizer, ema = make_run(layout)
    train((model, optimizer, ema), 0, 1)
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=2)
    run = make_run(layout, make_net(layout, seed=1))
    train(run, 0)
    run[2].update(elapsed=7)
    with pytest.warns(UserWarning, match=r"'ema'.*live weights.*step 0"):
        checkpoint.load(state_of(run), tmp_path)
    averages = run[2].full_state_dict()
    if averages:
        assert_bitwise_equal(averages, tensors_under("model.", read_all(tmp_path / "step-0000000002")))
    assert (run[2].steps, run[2].updates, run[2].time, run[2].initial_mass()) == (0, 0, 0.0, 1.0)
    alone = make_run(layout, make_net(layout, seed=2))[2]
    with pytest.warns(UserWarning, match=r"'ema'.*live weights.*step 0"):
        checkpoint.load({"ema": alone}, tmp_path)
    fulls = (alone.full_state_dict(), averages)
    assert_bitwise_equal(*({name: value for name, value in f.items() if "frozen" not in name} for f in fulls))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@layouts("plain", "ddp", "fsdp1", "fsdp2", "hsdp")
def test_averages_load_into_a_plain_model_as_its_weights(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0, 1)
    checkpoint.save(state_of(run), tmp_path, step=2)
    averages = run[2].full_state_dict(dtype=dtype)
    plain = make_net(layout, seed=1).to(dtype)
    checkpoint.load({"ema": plain}, tmp_path)
    if averages:
        assert_bitwise_equal(dict(plain.state_dict()), averages)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32])
def test_live_weights_stashed_during_a_swap_are_saved(live: torch.dtype, tmp_path: Path) -> None:
    run = make_run("fsdp2", make_net("fsdp2").to(live), dtype=torch.float64)
    for parameter in run[0].parameters():
        local_tensor(parameter).mul_(1.7)
    run[2].update()
    checkpoint.save(state_of(run), tmp_path, step=1)
    with run[2].swapped():
        checkpoint.save(state_of(run), tmp_path, step=2)
    outside, inside = (read_all(tmp_path / f"step-000000000{step}") for step in (1, 2))
    assert_stored_equal(inside, outside)
    assert outside["model.blocks.0.scale"].dtype == live
    assert outside["ema.tracks.default.averages.blocks.0.scale"].dtype == torch.float64


class Counter:
    """A Stateful with values that DCP would change: keys that are not strings, empty containers."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


@pytest.mark.world_size(2)
def test_plain_values_and_stateful_objects_come_back_equal(tmp_path: Path) -> None:
    counter, fresh = Counter(), Counter()
    counter.state = {
        "milestones": {30: 1, 60: 2},
        "empty": {},
        "list": [],
        "rows": [{"loss": 0.5, "tensor": torch.arange(3)}, {"loss": 0.25, "tensor": torch.arange(2)}],
        "pair": (1, "two"),
        "nothing": None,
    }
    plain = {"epoch": 3, "names": ["a", "b"], "nested": {"tensor": torch.ones(2)}, "layers": {7: {"x": 1}}}
    checkpoint.save({"counter": counter, "plain": plain, "seed": 5}, tmp_path, step=0)
    state = {"counter": fresh, "plain": None, "seed": 0}
    checkpoint.load(state, tmp_path)
    assert_values_equal(fresh.state, counter.state)
    assert_values_equal(state, {"counter": fresh, "plain": plain, "seed": 5})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({0: torch.ones(2)}, "'x'.*keys.*strings"),
        (Path("somewhere"), r"'x'.*\bPosixPath\b"),
        (HTTPStatus.OK, r"'x'.*\bHTTPStatus\b"),
        ([object()], r"'x\.0'.*\bobject\b"),
    ],
)
@pytest.mark.world_size(2)
def test_values_that_could_not_be_loaded_are_refused_by_save(value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        checkpoint.save({"x": value}, tmp_path, step=0)
    assert not list(tmp_path.glob("step*"))


@pytest.mark.world_size(2)
def test_an_optimizer_without_its_model_is_refused_by_save(tmp_path: Path) -> None:
    _, optimizer, _ = make_run("fsdp2")
    with pytest.raises(RuntimeError, match=r'\b19 parameters.*\(5, 6\).*\{"model": model, "optim": optimizer\}'):
        checkpoint.save({"optim": optimizer}, tmp_path, step=0)


@layouts("plain", "ddp", "fsdp2")
def test_a_checkpoint_that_does_not_fit_changes_nothing(layout: str, tmp_path: Path) -> None:
    run = make_run(layout)
    train(run, 0)
    checkpoint.save(state_of(run), tmp_path, step=1)
    other = wrap(layout, nn.Sequential(make_net(layout))) if layout != "fsdp2" else None
    small = make_run(layout, Net(hidden=6))
    before = full_weights(small[0]), small[2].full_state_dict()
    with pytest.raises(RuntimeError, match=r"shapes.*\bblocks\.0\.module\.weight\b.*\(6, 6\).*\(7, 6\)"):
        checkpoint.load(state_of(small), tmp_path)
    with pytest.raises(RuntimeError, match=r"'stranger'.*\['model', 'optim', 'ema'\]"):
        checkpoint.load({**state_of(small), "stranger": 1}, tmp_path)
    if other is not None:
        with pytest.raises(RuntimeError, match=r"'model'.*model\b.* 0\.blocks\.0\.module\.bias"):
            checkpoint.load({"model": other}, tmp_path)
    assert_bitwise_equal(full_weights(small[0]), before[0])
    assert_bitwise_equal(small[2].full_state_dict(), before[1])


@pytest.mark.world_size(2)
def test_a_model_is_not_loaded_while_it_holds_its_averages(tmp_path: Path) -> None:
    run = make_run("fsdp2")
    checkpoint.save(state_of(run), tmp_path, step=0)
    with run[2].swapped(), pytest.raises(RuntimeError, match=r"'model'.*swapped\(\)"):
        checkpoint.load({"model": run[0]}, tmp_path)


@pytest.mark.world_size(2)
def test_a_save_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    value = object() if dist.get_rank() == 1 else 1
    with pytest.raises(RuntimeError, match=r"\bstep 0\b.*\brank 1\b.*'x'.*\bobject\b"):
        checkpoint.save({"x": value}, tmp_path, step=0)
    with pytest.raises(RuntimeError, match=r"checkpoint\.save\(step=0\).*checkpoint\.save\(step=1\)"):
        checkpoint.save({"x": 1}, tmp_path, step=dist.get_rank())
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"0\.3 s.*checkpoint\.save\(step=3\).*rank 1"):
            checkpoint.save({"x": 1}, tmp_path, step=3, timeout=0.3)
    dist.barrier()


def test_a_model_without_buffers_is_loaded(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    ema = ShardedEMA(net)
    checkpoint.save({"model": net, "ema": ema}, tmp_path, step=0)
    averages = ema.full_state_dict()
    ema.load_full_state_dict(nn.Linear(3, 2).state_dict())
    checkpoint.load({"ema": ema}, tmp_path)
    assert_bitwise_equal(ema.full_state_dict(), averages)


@pytest.mark.world_size(2)
def test_averages_of_identical_models_are_distinguished(tmp_path: Path) -> None:
    """Two models have the same names and shapes: tensors without an average are read from the right one."""
    runs = {key: make_run("fsdp2", make_net("fsdp2", seed=seed)) for seed, key in enumerate("ab")}
    for key, run in runs.items():
        train(run, ord(key))
    state = {f"model-{key}": run[0] for key, run in runs.items()} | {f"ema-{key}": run[2] for key, run in runs.items()}
    checkpoint.save(state, tmp_path, step=1)
    for key, run in runs.items():
        expected, net = run[2].full_state_dict(), make_net("fsdp2", seed=5)
        checkpoint.load({f"ema-{key}": net}, tmp_path)
        if expected:
            assert_bitwise_equal(dict(net.state_dict()), expected)


@pytest.mark.world_size(2)
def test_optimizers_of_models_with_equal_names_keep_their_own_moments(tmp_path: Path) -> None:
    runs = [make_run("fsdp2", make_net("fsdp2", seed=seed)) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        train(run, seed)
    state = {f"model-{i}": run[0] for i, run in enumerate(runs)} | {f"optim-{i}": run[1] for i, run in enumerate(runs)}
    checkpoint.save(state, tmp_path, step=1)
    train(runs[0], 2)
    train(runs[1], 2)
    expected = [full_weights(run[0]) for run in runs]
    checkpoint.load(state, tmp_path)
    train(runs[0], 2)
    train(runs[1], 2)
    for run, weights in zip(runs, expected, strict=True):
        assert_bitwise_equal(full_weights(run[0]), weights)
    both = AdamW([*runs[0][0].parameters(), *runs[1][0].parameters()])
    with pytest.raises(RuntimeError, match=r"several models.*\bembed\.weight\b.*\b14 more\b"):
        checkpoint.save({"a": runs[0][0], "b": runs[1][0], "optim": both}, tmp_path, step=2)


def test_moments_in_another_dtype_round_trip_exactly(tmp_path: Path) -> None:
    net = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    optimizer.state[net.weight]["momentum_buffer"] = torch.full((2, 3), 1 / 3)
    checkpoint.save({"model": net, "optim": optimizer}, tmp_path, step=0)
    optimizer.state.clear()
    checkpoint.load({"model": net, "optim": optimizer}, tmp_path)
    assert torch.equal(optimizer.state[net.weight]["momentum_buffer"], torch.full((2, 3), 1 / 3))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("odd", [torch.ones(2), [torch.ones(3)], {"row": torch.ones(1)}])
def test_optimizer_state_of_unknown_sharding_is_refused_by_save(odd: object, tmp_path: Path) -> None:
    model, optimizer, ema = make_run("fsdp2")
    train((model, optimizer, ema), 0)
    optimizer.state[model.blocks[0].out.weight]["odd"] = odd
    with pytest.raises(RuntimeError, match=r"'odd'.*'blocks\.0\.out\.weight'"):
        checkpoint.save(state_of((model, optimizer, ema)), tmp_path, step=0)


@layouts("fsdp1")
def test_the_module_inside_fsdp1_is_refused_by_save(layout: str, tmp_path: Path) -> None:
    model, _, _ = make_run(layout)
    with pytest.raises(RuntimeError, match=r"FSDP1.*FullyShardedDataParallel"):
        checkpoint.save({"model": model.module}, tmp_path, step=0)


def test_two_averages_cannot_be_loaded_into_one_model(tmp_path: Path) -> None:
    run = make_run("plain")
    other = ShardedEMA(run[0])
    with run[2].swapped():
        with pytest.raises(RuntimeError, match=r"ShardedEMA.*swapped\(\)"), other.swapped():
            pass
        checkpoint.save({"model": run[0]}, tmp_path, step=0)


@pytest.mark.world_size(2)
def test_ranks_with_different_models_or_keys_get_an_error(tmp_path: Path) -> None:
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"part{rank}": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match=r"ranks 0 and 1\b.*\bmodel\.part0\.bias\b"):
        checkpoint.save({"model": stage}, tmp_path, step=0)
    checkpoint.save({"x": 1, "y": 2}, tmp_path, step=0)
    with pytest.raises(RuntimeError, match=r"keys.*ranks 0 and 1 differ in y\b"):
        checkpoint.load({"x": 1} if rank else {"x": 1, "y": 2}, tmp_path)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("mode", ["block", "background"])
def test_a_full_disk_is_an_error_on_every_rank(mode: str, tmp_path: Path) -> None:
    """A limit on the size of files makes writing fail as a full disk does."""
    checkpoint.save({"x": torch.ones(3)}, tmp_path, step=1, keep=1)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard_limit))
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"step-0+2 .*disk full"):
            checkpoint.save({"x": torch.ones(10_000)}, tmp_path, step=2, keep=1, block=mode == "block")
            checkpoint.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
    assert checkpoint.latest(tmp_path) == 1


@pytest.mark.world_size(2)
def test_a_save_error_on_one_rank_does_not_hang_the_averages(tmp_path: Path) -> None:
    run = make_run("fsdp2")
    state = {"a": object() if dist.get_rank() else 1, **state_of(run)}
    with pytest.raises(RuntimeError, match=r"\bstep 0\b.*\brank 1\b.*'a'.*\bobject\b"):
        checkpoint.save(state, tmp_path, step=0)


def test_loading_does_not_cast_tensors(tmp_path: Path) -> None:
    checkpoint.save({"x": torch.tensor(0.75)}, tmp_path, step=torch.tensor(1))
    state = {"x": torch.tensor(0)}
    assert checkpoint.load(state, tmp_path) == 1
    assert torch.equal(state["x"], torch.tensor(0.75))


def test_the_manifest_says_how_it_was_saved(tmp_path: Path) -> None:
    run = make_run("plain")
    checkpoint.save(state_of(run), tmp_path, step=5)
    manifest = json.loads((tmp_path / "step-0000000005" / "manifest.json").read_text())
    assert (manifest["step"], manifest["world_size"]) == (5, 1)
    assert manifest["ties"] == {"model": {"head.weight": "embed.weight"}}
    assert manifest["models"] == {"ema": "model"}
    assert manifest["layouts"] == {"model": f"{len(run[0].state_dict()) - 1} tensors whole"}
    assert manifest["files"].keys() == {"__0_0.distcp", ".metadata"}
