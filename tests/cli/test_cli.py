"""The commands of `ema-dist`, compared with the library itself, on checkpoints of ours and of plain DCP."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from ema_dist import HalfLife, ShardedEMA, checkpoint
from tests.support.cli_runs import load_exported, make_checkpoint, make_dcp_checkpoint, run, run_ok, save_with_dcp
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    make_trained,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

SOURCES: dict[str, Callable[[Path], tuple[Path, ShardedEMA]]] = {
    "ours": lambda path: make_checkpoint(path / "root")[::2],
    "plain DCP": lambda path: make_dcp_checkpoint(path / "dcp"),
}
sources = pytest.mark.parametrize("source", SOURCES)


@sources
def test_export_gives_the_averaged_model(source: str, tmp_path: Path) -> None:
    path, ema = SOURCES[source](tmp_path)
    run_ok("export", path, tmp_path / "out")
    expected = ema.full_state_dict()
    exported = load_exported(tmp_path / "out")
    assert_bitwise_equal(exported, expected)
    assert {name: tensor.dtype for name, tensor in exported.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    make_net("plain", seed=1).load_state_dict(exported, strict=True)


@sources
def test_export_gives_the_live_model(source: str, tmp_path: Path) -> None:
    path, ema = SOURCES[source](tmp_path)
    run_ok("export", path, tmp_path / "out", "--weights", "live")
    with ema.swapped() as model:
        averaged = full_weights(model)
    live = load_exported(tmp_path / "out")
    assert_bitwise_equal(live, full_weights(model))
    assert not torch.equal(live["head.weight"].double(), averaged["head.weight"])


@sources
def test_export_casts_as_the_library_does(source: str, tmp_path: Path) -> None:
    path, ema = SOURCES[source](tmp_path)
    run_ok("export", path, tmp_path / "out", "--dtype", "bfloat16")
    expected = ema.full_state_dict(dtype=torch.bfloat16)
    exported = load_exported(tmp_path / "out")
    assert_bitwise_equal(exported, expected)
    assert exported["embed.weight"].dtype == torch.bfloat16
    assert exported["stats.num_batches_tracked"].dtype == torch.int64


def test_export_keeps_the_live_dtype(tmp_path: Path) -> None:
    model = make_net("plain").bfloat16()
    ema = ShardedEMA(model, decay=0.5)
    model.embed.weight.data.add_(1)
    ema.update()
    save_with_dcp(tmp_path / "dcp", {"model": get_model_state_dict(model), "ema": ema})
    run_ok("export", tmp_path / "dcp", tmp_path / "out")
    assert_bitwise_equal(load_exported(tmp_path / "out"), ema.full_state_dict())
    assert load_exported(tmp_path / "out")["embed.weight"].dtype == torch.bfloat16


def test_export_splits_into_files_with_an_index(tmp_path: Path) -> None:
    path, ema = make_dcp_checkpoint(tmp_path / "dcp")
    out = run_ok("export", path, tmp_path / "out", "--max-shard-size", "500")
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert all(str(file) in out for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    assert_bitwise_equal(load_exported(tmp_path / "out"), ema.full_state_dict())


class WithExtraState(nn.Linear):
    """A layer with an extra state that is not a tensor."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": 3, "scale": torch.tensor([2.0])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state


def test_export_in_torchs_format_keeps_extra_states(tmp_path: Path) -> None:
    model = nn.Sequential(WithExtraState(2, 2))
    ema = ShardedEMA(model, decay=0.5)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=1)
    run_ok("export", tmp_path / "root", tmp_path / "out", "--format", "torch")
    loaded = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    model.load_state_dict(loaded, strict=True)
    assert model[0].state == model[0].get_extra_state()
    result = run("export", tmp_path / "root", tmp_path / "tensors")
    assert result.exit_code == 0
    assert "0._extra_state" in result.stderr
    assert set(load_exported(tmp_path / "tensors")) == {"0.weight", "0.bias"}


def test_export_names_what_has_no_average(tmp_path: Path) -> None:
    result = run("export", make_dcp_checkpoint(tmp_path / "dcp")[0], tmp_path / "out")
    assert re.search(r"\b2 tensors.*average.*\bfrozen\.weight, frozen\.bias\b", result.stderr)
    root, *_ = make_checkpoint(tmp_path / "root")
    assert run("export", root, tmp_path / "out").stderr == ""


def test_exporting_averages_without_a_model_warns(tmp_path: Path) -> None:
    _, ema = make_trained("plain")
    path = save_with_dcp(tmp_path / "dcp", {"ema": ema})
    result = run("export", path, tmp_path / "out")
    assert result.exit_code == 0
    assert re.search(rf"{re.escape(str(path))}.*\bno live model", result.stderr)
    full = ema.full_state_dict()
    exported = load_exported(tmp_path / "out")
    assert_bitwise_equal(exported, {name: full[name] for name in exported})
    assert full.keys() - exported.keys() == {"frozen.weight", "frozen.bias", "head.weight"}


def test_a_flat_checkpoint_has_live_weights_only(tmp_path: Path) -> None:
    model, _ = make_trained("plain")
    path = save_with_dcp(tmp_path / "dcp", dict(model.state_dict()))
    result = run("export", path, tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(rf"averages.*{re.escape(str(path))}.*--weights live", result.stderr)
    run_ok("export", path, tmp_path / "out", "--weights", "live")
    assert_bitwise_equal(load_exported(tmp_path / "out"), full_weights(model))


def test_averages_and_models_are_found_however_deep(tmp_path: Path) -> None:
    model, ema = make_trained("plain")
    optimizer = torch.optim.AdamW(model.parameters())
    state = {
        "state": {
            "algorithms": {"EMA": ema.state_dict()},
            "model": get_model_state_dict(model),
            "optimizers": {"AdamW": optimizer.state_dict()},
        },
        "rng": {"cpu": torch.get_rng_state()},
    }
    path = save_with_dcp(tmp_path / "dcp", state)
    run_ok("export", path, tmp_path / "out")
    assert_bitwise_equal(load_exported(tmp_path / "out"), ema.full_state_dict())
    kinds = {name: entry["kind"] for name, entry in json.loads(run_ok("inspect", path, "--json"))["entries"].items()}
    assert kinds == {
        "state.algorithms.EMA": "averages",
        "state.model": "model",
        "state.optimizers.AdamW": "optimizer",
        "rng": "other",
    }


def test_several_models_are_distinguished_by_entry(tmp_path: Path) -> None:
    states: dict[str, Any] = {}
    averages: dict[str, ShardedEMA] = {}
    for name, width in {"generator": 2, "discriminator": 3}.items():
        model = nn.Linear(width, width)
        averages[name] = ShardedEMA(model, decay=0.5)
        states |= {name: model, f"{name}_ema": averages[name]}
    checkpoint.save(states, tmp_path / "root", step=1)
    result = run("export", tmp_path / "root", tmp_path / "out")
    assert result.exit_code == 1
    assert "--entry" in result.stderr
    assert "'discriminator_ema'" in result.stderr
    for entry in ("generator", "generator_ema"):
        run_ok("export", tmp_path / "root", tmp_path / entry, "--entry", entry)
        assert_bitwise_equal(load_exported(tmp_path / entry), averages["generator"].full_state_dict())


@layouts("fsdp2-3", "hsdp", "fsdp1", "ddp", "fsdp2-tp")
def test_export_puts_any_layout_together(layout: str, tmp_path: Path) -> None:
    model, ema = make_trained(layout)
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=7)
    expected = ema.full_state_dict()
    if dist.get_rank() == 0:
        run_ok("export", tmp_path / "root", tmp_path / "out")
        assert_bitwise_equal(load_exported(tmp_path / "out"), expected)
        assert re.search(r"\b\d+ tensors", run_ok("verify", tmp_path / "root"))
        contents = json.loads(run_ok("inspect", tmp_path / "root", "--json"))
        assert contents["saved"]["world_size"] == dist.get_world_size()
    dist.barrier()


@layouts("fsdp2", "fsdp1")
def test_export_puts_sharded_checkpoints_of_plain_dcp_together(layout: str, tmp_path: Path) -> None:
    model, ema = make_trained(layout)
    save_with_dcp(tmp_path / "dcp", {"model": get_model_state_dict(model), "ema": ema})
    expected = ema.full_state_dict()
    if dist.get_rank() == 0:
        run_ok("export", tmp_path / "dcp", tmp_path / "out")
        assert_bitwise_equal(load_exported(tmp_path / "out"), expected)
    dist.barrier()


def test_the_newest_step_is_the_default(tmp_path: Path) -> None:
    model, ema = make_trained("plain")
    expected: dict[int, dict[str, Tensor]] = {}
    for step in (1, 2):
        checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=step)
        expected[step] = ema.full_state_dict()
        model.embed.weight.data.add_(1)
        ema.update()
    run_ok("export", tmp_path / "root", tmp_path / "newest")
    run_ok("export", tmp_path / "root", tmp_path / "older", "--step", 1)
    assert_bitwise_equal(load_exported(tmp_path / "newest"), expected[2])
    assert_bitwise_equal(load_exported(tmp_path / "older"), expected[1])
    result = run("export", tmp_path / "root", tmp_path / "never", "--step", 3)
    assert result.exit_code == 1
    assert "[1, 2]" in result.stderr


@pytest.mark.filterwarnings("ignore:decay=[01]:UserWarning")
@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (HalfLife(100), {"kind": "half_life", "half_life": 100, "decay": 2 ** (-1 / 100), "per": "step"}),
        (0.5, {"kind": "constant", "half_life": 1, "decay": 0.5, "per": "update"}),
        (1.0, {"kind": "constant", "half_life": "inf", "decay": 1, "per": "update"}),
        (0.0, {"kind": "constant", "half_life": 0, "decay": 0, "per": "update"}),
    ],
)
def test_inspect_knows_the_decay(decay: HalfLife | float, expected: dict[str, Any], tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp", decay=decay)
    averages = json.loads(run_ok("inspect", path, "--json"))["averages"]["ema"]
    stored_decay = averages["tracks"]["default"]["decay"]
    assert {key: stored_decay[key] for key in expected} == pytest.approx(expected)
    assert (averages["steps"], averages["updates"]) == (3, 3)


@sources
def test_inspect_measures_distances_as_the_formula_says(source: str, tmp_path: Path) -> None:
    path, ema = SOURCES[source](tmp_path)
    track = json.loads(run_ok("inspect", path, "--json"))["averages"]["ema"]["tracks"]["default"]
    with ema.swapped() as model:
        averaged = full_weights(model)
    live = full_weights(model)
    expected = {
        name: ((averaged[name] - live[name]).norm() / live[name].norm()).item()
        for name in live
        if name not in ("mask", "frozen.weight", "frozen.bias")
    }
    assert track["distances"] == pytest.approx({"mask": 0.0, **expected})


def test_inspect_lists_the_contents(tmp_path: Path) -> None:
    root, model, ema = make_checkpoint(tmp_path / "root", step=12)
    contents = json.loads(run_ok("inspect", root, "--json"))
    assert (contents["step"], contents["saved"]["world_size"]) == (12, 1)
    assert contents["tensors"]["model.embed.weight"] == {"shape": [5, 6], "dtype": "float32", "bytes": 120, "pieces": 1}
    assert contents["entries"]["model"]["tensors"] == len(model.state_dict())
    assert contents["averages"]["ema"]["model"] == "model"
    text = run_ok("inspect", root)
    assert all(name in text for name in ema.full_state_dict())
    assert "half-life" in text


def test_a_narrow_terminal_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = run_ok("inspect", make_dcp_checkpoint(tmp_path / "dcp")[0])
    assert "…" not in text


@sources
def test_verify_passes_what_is_sound(source: str, tmp_path: Path) -> None:
    path, _ = SOURCES[source](tmp_path)
    result = run("verify", path)
    assert result.exit_code == 0
    assert re.search(r"\b\d+ tensors", result.stdout)
    assert ("manifest" in result.stderr) == (source == "plain DCP")


def damage(path: Path, kind: str) -> None:
    """Truncates a file, or flips one of its bits."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_damage_is_found_and_never_exported(file: str, kind: str, tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    damage(root / "step-0000000003" / file, kind)
    result = run("verify", root)
    assert result.exit_code == 1
    assert file in result.stdout
    result = run("export", root, tmp_path / "out")
    assert result.exit_code == 1
    assert file in result.stderr
    assert load_exported(tmp_path / "out") == {}


def test_verify_names_what_is_not_finite(tmp_path: Path) -> None:
    model, ema = make_trained("plain")
    model.embed.weight.data[0, 0] = torch.nan
    model.blocks[0].scale.data[0, 0] = torch.inf
    path = save_with_dcp(tmp_path / "dcp", {"model": get_model_state_dict(model), "ema": ema})
    result = run("verify", path)
    assert result.exit_code == 1
    assert [re.findall(r"^(\S+) .*\b1 (NaN|infinit)", line) for line in result.stdout.splitlines()] == [
        [("model.embed.weight", "NaN")],
        [("model.blocks.0.scale", "infinit")],
        [("model.head.weight", "NaN")],
    ]
    assert re.search(r"model\.mask\b.*\b1 infinit", result.stderr)


def test_verify_finds_averages_of_another_model(tmp_path: Path) -> None:
    model, ema = make_trained("plain")
    state = get_model_state_dict(model)
    del state["blocks.1.out.weight"]
    state["stats.weight"] = torch.zeros(2)
    state["stats.bias"] = state["stats.bias"].long()
    path = save_with_dcp(tmp_path / "dcp", {"model": state, "ema": ema})
    for command in (["verify", path], ["export", path, tmp_path / "out"]):
        result = run(*command)
        assert result.exit_code == 1
        assert "blocks.1.out.weight" in result.output
        assert "stats.weight" in result.output
        assert re.search(r"floating.*\bstats\.bias\b", result.output)


class Hostile:
    """Runs a shell command when `pickle` loads it."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


def test_no_code_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    model, ema = make_trained("plain")
    state = {"model": get_model_state_dict(model), "ema": ema, "extra": {"config": Hostile(tmp_path / "ran")}}
    path = save_with_dcp(tmp_path / "dcp", state)
    assert run("verify", path).exit_code == 1
    run_ok("inspect", path)
    run_ok("export", path, tmp_path / "out")
    torch.save({"weight": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pt")
    assert run("diff", tmp_path / "hostile.pt", path).exit_code == 2
    assert not (tmp_path / "ran").exists()


def test_diff_of_equal_weights_is_0(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    run_ok("export", path, tmp_path / "out")
    run_ok("export", path, tmp_path / "torch", "--format", "torch")
    for a, b in [(path, tmp_path / "out"), (tmp_path / "out" / "model.safetensors", tmp_path / "torch")]:
        assert "24 of 24 tensors" in run_ok("diff", a, b)


def test_diff_measures_as_the_formula_says(tmp_path: Path) -> None:
    left = {"same": torch.ones(3), "moved": torch.tensor([1.0, -3.0]), "shape": torch.ones(2), "left": torch.ones(1)}
    right = {"same": torch.ones(3), "moved": torch.tensor([1.0, -2.0]), "shape": torch.ones(3), "right": torch.ones(1)}
    save_file(left, tmp_path / "a.safetensors")
    save_file(right, tmp_path / "b.safetensors")
    result = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["moved", "0.5", "0.25"] in lines
    assert re.search(r"only.*\bA\b.*\bleft\b", result.stdout)
    assert re.search(r"only.*\bB\b.*\bright\b", result.stdout)
    assert re.search(r"shape\b.*\[2\].*\bA\b.*\[3\].*\bB\b", result.stdout)
    assert "1 of 2 tensors" in result.stdout


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.tensor([2**60]), torch.tensor([2**60 + 1])),
        (torch.tensor([1e300, 5e-324], dtype=torch.float64), torch.tensor([1e300, 1e-323], dtype=torch.float64)),
        (torch.tensor([1.7e308, 1.7e308], dtype=torch.float64), torch.tensor([1.7e308, 1.6e308], dtype=torch.float64)),
        (torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.inf])),
    ],
    ids=["integers", "underflow", "overflow", "NaN"],
)
def test_diff_never_reports_different_tensors_as_equal(left: Tensor, right: Tensor, tmp_path: Path) -> None:
    save_file({"weight": left}, tmp_path / "a.safetensors")
    save_file({"weight": right}, tmp_path / "b.safetensors")
    assert "1 of 1 tensors" in run_ok("diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    result = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert "0 of 1 tensors" in result.stdout


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    name = "weight\x1b]0;owned\x07\u202e"
    path = save_with_dcp(tmp_path / "dcp", {"model": {name: torch.tensor([torch.nan])}})
    save_file({name: torch.ones(1)}, tmp_path / "a.safetensors")
    for command in (
        ["inspect", path],
        ["verify", path],
        ["export", path, tmp_path / "out"],
        ["diff", path, tmp_path / "a.safetensors", "--weights", "live"],
    ):
        output = run(*command).output
        assert all(char.isprintable() or char == "\n" for char in output)
        assert command[0] == "export" or "weight\\x1b]0;owned\\x07\\u202e" in output


def test_diff_compares_averages_with_live_weights(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    result = run("diff", path, path, "--weights-b", "live")
    assert result.exit_code == 1
    assert "embed.weight" in result.stdout
    assert "frozen.weight" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "{}/nowhere"], 1, "checkpoint.*{}/nowhere.*no such"),
        (["inspect", "{}/empty"], 1, "checkpoint.*{}/empty"),
        (["verify", "{}/file"], 1, "checkpoint.*{}/file"),
        (["export", "{}/dcp", "{}/out", "--dtype", "bfloat17"], 2, "'--dtype'.*'bfloat17'"),
        (["export", "{}/dcp", "{}/out", "--dtype", "int8"], 2, "'--dtype'.*'int8'"),
        (["export", "{}/dcp", "{}/out", "--weights", "both"], 2, "both"),
        (["export", "{}/dcp", "{}/out", "--dtype", "float4_e2m1fn_x2"], 2, "'--dtype'.*'float4_e2m1fn_x2'"),
        (["export", "{}/dcp", "{}/out", "--max-shard-size", "5 apples"], 2, "5 apples"),
        (["export", "{}/dcp", "{}/out", "--max-shard-size=infGB"], 2, "infGB"),
        (["export", "{}/dcp", "{}/out", "--max-shard-size=0MB"], 2, "0MB"),
        (["export", "{}/dcp", "{}/out", "--max-shard-size=-5MB"], 2, "-5MB"),
        (["export", "{}/dcp", "{}/out", "--track", "slow"], 1, r"'slow'.*\['default'\]"),
        (["export", "{}/dcp", "{}/out", "--entry", "teacher"], 1, "'teacher'"),
        (["export", "{}/dcp", "{}/out", "--step", "3"], 1, "{}/dcp.*step"),
        (["export", "{}/dcp", "{}/file"], 1, "{}/file"),
        (["export", "{}/dcp"], 2, "OUT"),
        (["diff", "{}/dcp", "{}/nowhere"], 2, "{}/nowhere.*no such"),
        (["diff", "{}/dcp", "{}/empty"], 2, "{}/empty.*no weights"),
        (["diff", "{}/dcp", "{}/file"], 2, "{}/file"),
    ],
)
def test_user_errors_print_a_message_and_no_traceback(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    make_dcp_checkpoint(tmp_path / "dcp")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("nothing of the kind")
    result = run(*(argument.format(tmp_path) for argument in arguments))
    assert result.exit_code == code
    pattern = message.replace("{}", re.escape(str(tmp_path)))
    assert re.search(pattern, " ".join(result.stderr.split()))
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_export_refuses_to_replace_weights_in_another_format(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    run_ok("export", path, tmp_path / "out", "--format", "torch")
    before = (tmp_path / "out" / "pytorch_model.bin").read_bytes()
    result = run("export", path, tmp_path / "out")
    assert result.exit_code == 1
    assert re.search(r"\bformat\b.*\bpytorch_model\.bin\b", result.stderr)
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == before
    assert load_exported(tmp_path / "out") == {}


FULL_DISK = """
import resource, signal, sys
import ema_dist.checkpoint  # older versions of torch write a file while they are imported
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
from ema_dist.cli import main
main()
"""


@pytest.mark.parametrize("file_format", ["safetensors", "torch"])
def test_a_full_disk_is_an_error_and_leaves_no_files(file_format: str, tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    # -B: the limit would truncate cached bytecode of modules too, and break their next import.
    command = [sys.executable, "-B", "-c", FULL_DISK, "export", path, tmp_path / "out", "--format", file_format]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "disk full" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_runs_in_its_own_process(tmp_path: Path) -> None:
    path, _ = make_dcp_checkpoint(tmp_path / "dcp")
    command = [sys.executable, "-W", "error", "-m", "ema_dist.cli", "verify", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\b\d+ tensors", result.stdout)
