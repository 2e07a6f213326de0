"""Cases in which `ema-dist export` could silently write wrong weights: it exports the right ones, warns, or refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.manifest import read_manifest
from ema_dist.checkpoint.weights.casts import cast
from ema_dist.checkpoint.weights.weight_writer import WeightWriter
from tests.support.cli_runs import load_exported, make_checkpoint, make_dcp_checkpoint, run, run_ok, save_with_dcp
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, assert_bitwise_equal, peak_resident_memory

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def average_after_one_step(model: nn.Module, **settings: Any) -> ShardedEMA:  # noqa: ANN401
    """Averages that differ from the live weights: one step and one update after their start."""
    ema = ShardedEMA(model, **{"decay": 0.5} | settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    return ema


def test_empty_tensors_are_exported(tmp_path: Path) -> None:
    model = nn.ParameterDict({"empty": torch.empty(0, 3), "full": torch.ones(2, 3)})
    ema = average_after_one_step(model)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    run_ok("inspect", tmp_path / "root")
    run_ok("verify", tmp_path / "root")
    run_ok("export", tmp_path / "root", tmp_path / "out")
    assert_bitwise_equal(load_exported(tmp_path / "out"), ema.full_state_dict())
    assert load_exported(tmp_path / "out")["empty"].shape == (0, 3)
    run_ok("diff", tmp_path / "root", tmp_path / "out")


def test_identical_models_have_their_own_averages(tmp_path: Path) -> None:
    """Names and shapes are the same: only the manifest says which averages belong to which model."""
    models = {name: nn.Linear(2, 2) for name in ("gen", "disc")}
    averages = {name: average_after_one_step(model) for name, model in models.items()}
    state = {**models, **{f"ema_{name}": ema for name, ema in averages.items()}}
    checkpoint.save(state, tmp_path / "root", step=1)
    assert run("export", tmp_path / "root", tmp_path / "out").exit_code == 1
    for name, ema in averages.items():
        for entry in (name, f"ema_{name}"):
            run_ok("export", tmp_path / "root", tmp_path / entry, "--entry", entry)
            assert_bitwise_equal(load_exported(tmp_path / entry), ema.full_state_dict())
    run_ok("export", tmp_path / "root", tmp_path / "live", "--entry", "disc", "--weights", "live")
    assert_bitwise_equal(load_exported(tmp_path / "live"), models["disc"].state_dict())


def test_trainable_parameters_without_averages_are_reported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = average_after_one_step(model, select=lambda name, _: name.startswith("0."))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    checkpoint.save({"model": model, "ema": ema, "optim": optimizer}, tmp_path / "root", step=1)
    stderr = run("export", tmp_path / "root", tmp_path / "out").stderr
    assert re.search(r"\b2 tensors.*optimizer.*\b1\.weight, 1\.bias\b", stderr)


def test_an_inferred_tie_is_reported(tmp_path: Path) -> None:
    """A frozen tensor may happen to equal a trained one; without a manifest it looks like a tied one."""
    model = nn.ParameterDict(
        {"trained": torch.zeros(2, 2), "frozen": nn.Parameter(torch.ones(2, 2), requires_grad=False)}
    )
    ema = ShardedEMA(model, decay=HalfLife(0.25))
    model["trained"].data.add_(1)
    ema.update()
    path = save_with_dcp(tmp_path / "dcp", {"model": model.state_dict(), "ema": ema})
    stderr = run("export", path, tmp_path / "out").stderr
    assert re.search(r"\b1 tensor.*\bfrozen\b.*\btrained\b", stderr)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    assert run("export", tmp_path / "root", tmp_path / "ours").stderr == ""
    assert_bitwise_equal(load_exported(tmp_path / "ours"), ema.full_state_dict())


def test_averages_that_never_started_are_reported(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = average_after_one_step(model, update_interval=10)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    assert re.search(r"averages.*\b1 step", run("export", tmp_path / "root", tmp_path / "out").stderr)
    assert re.search(r"averages.*\b1 step.*'ema'", run("verify", tmp_path / "root").stderr)
    assert run("export", make_checkpoint(tmp_path / "moving")[0], tmp_path / "moving").stderr == ""


@pytest.mark.parametrize(
    ("settings", "updates", "expected"),
    [
        ({}, 0, r"never updated: .*still the initial weights"),
        ({"update_interval": 10}, 5, r"never updated in 5 steps: .*still the initial weights"),
        ({"start": 100}, 5, r"copies of the live weights"),
    ],
)
def test_averages_without_an_update_are_described(
    settings: dict[str, Any], updates: int, expected: str, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, **settings)
    for _ in range(updates):
        ema.update()
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=5)
    assert re.search(rf"note +.*{expected}", run("inspect", tmp_path / "root").stdout)
    assert re.search(expected, run("verify", tmp_path / "root").stderr)
    assert re.search(expected, run("export", tmp_path / "root", tmp_path / "out").stderr)


def test_averages_that_still_are_the_initial_weights_are_reported(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = average_after_one_step(model, decay=HalfLife(10))
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    told = r"93\.3%.*averages.*'default'.*\b1 update\b.*HalfLife\(10\)"
    assert re.search(told, run("export", tmp_path / "root", tmp_path / "out").stderr)
    assert re.search(f"{told}.*'ema'", run("verify", tmp_path / "root").stderr)
    assert re.search(r"note .*93\.3%.*\bdefault\b", run_ok("inspect", tmp_path / "root"))
    assert not re.search("%", run("export", tmp_path / "root", tmp_path / "live", "--weights", "live").stderr)


def test_averages_of_a_different_model_are_reported(tmp_path: Path) -> None:
    path = save_with_dcp(
        tmp_path / "dcp", {"ema": average_after_one_step(nn.Linear(2, 2)), "other": {"scale": torch.ones(2)}}
    )
    stderr = run("export", path, tmp_path / "out").stderr
    assert re.search("live model.*'other'", stderr)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_no_weight_overflows_in_a_cast(dtype: str, tmp_path: Path) -> None:
    model = nn.ParameterDict({"fits": torch.ones(2), "large": torch.tensor([1.0, -7e4])})
    checkpoint.save({"model": model, "ema": ShardedEMA(model)}, tmp_path / "root", step=1)
    result = run("export", tmp_path / "root", tmp_path / "out", "--dtype", dtype)
    assert result.exit_code == 1
    assert re.search(rf"'large'.*\b70000\b.*{dtype}", result.stderr)
    assert not (tmp_path / "out").exists()
    run_ok("export", tmp_path / "root", tmp_path / "out", "--dtype", "bfloat16")
    assert load_exported(tmp_path / "out")["large"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("values", [[], [1.0, -448.0], [math.inf, -math.inf, 2.0], [math.nan], [-math.inf]])
def test_nonfinite_values_survive_a_cast(values: list[float], dtype: torch.dtype) -> None:
    result = cast("mask", torch.tensor(values), dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), torch.tensor(values), equal_nan=True)
    with pytest.raises(CheckpointError, match=rf"'mask'.*\b1e\+300\b.*{dtype}"):
        cast("mask", torch.tensor([*values, -1e300], dtype=torch.float64), dtype)


def test_a_float8_tensor_is_cast_too() -> None:
    with pytest.raises(CheckpointError, match=r"'weight'.*\b57344\b.*torch\.float8_e4m3fn"):
        cast("weight", torch.tensor([57344.0]).to(torch.float8_e5m2), torch.float8_e4m3fn)


def test_two_exports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    tensors = {name: torch.full((4,), 1.0) for name in ("a", "b")}
    planned: dict[str, Tensor | None] = {name: value.to("meta") for name, value in tensors.items()}
    with WeightWriter(tmp_path / "out", planned=planned, max_shard_size=16) as writer:
        writer.add("a", tensors["a"])
        result = run("export", path, tmp_path / "out")
        assert result.exit_code == 1
        assert re.search(rf"another process.*{re.escape(str(tmp_path / 'out'))}", result.stderr)
        writer.add("b", tensors["b"])
    assert_bitwise_equal(load_exported(tmp_path / "out"), tensors)
    run_ok("export", path, tmp_path / "out")


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda state: state.update(format=torch.ones(2)),
    "steps": lambda state: state.update(steps=math.inf),
    "updates": lambda state: state.update(updates=torch.ones(2)),
    "decay": lambda state: state["tracks"]["default"]["decay"].update(value="soon"),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE.keys())
def test_averages_with_invalid_counts_are_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    state = average_after_one_step(nn.Linear(2, 2)).state_dict()
    change(state)
    path = save_with_dcp(tmp_path / "dcp", {"ema": state})
    for command in (["inspect", path], ["verify", path], ["export", path, tmp_path / "out"]):
        result = run(*command)
        assert result.exit_code == 1
        assert "'ema'" in result.output


def test_ties_of_different_shapes_are_refused(tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    folder = root / "step-0000000003"
    manifest = read_manifest(folder)
    assert manifest is not None
    replace(manifest, ties={"model": {"frozen.weight": "embed.weight"}}).write(folder)
    for command in (["inspect", root], ["export", root, tmp_path / "out"]):
        result = run(*command)
        assert result.exit_code == 1
        assert re.search(r"'model'.*\btie.*frozen\.weight", result.stderr)


def test_a_name_that_is_not_a_string_is_refused(tmp_path: Path) -> None:
    path = save_with_dcp(tmp_path / "dcp", {"model": {"a\udc80": torch.ones(2)}})
    result = run("export", path, tmp_path / "out", "--weights", "live")
    assert result.exit_code == 1
    assert re.search(r"safetensors.*\budc80.*Unicode", result.stderr)


@pytest.mark.world_size(1)
def test_export_memory_is_a_few_tensors(tmp_path: Path) -> None:
    mebibyte = 2**20
    model = nn.ParameterDict({f"layer{index:02}": nn.Parameter(torch.ones(2, mebibyte)) for index in range(48)})
    checkpoint.save({"model": model, "ema": ShardedEMA(model)}, tmp_path / "root", step=1)
    del model
    run_ok("export", tmp_path / "root", tmp_path / "out")  # so that memory of its imports is not measured
    peak = peak_resident_memory(lambda: run_ok("export", tmp_path / "root", tmp_path / "out"))
    file_size, tensor_size = 48 * 8 * mebibyte, 8 * mebibyte
    assert sum(tensor.nbytes for tensor in load_exported(tmp_path / "out").values()) == file_size
    assert peak < 16 * tensor_size < file_size / 2
