"""`ema-dist import`: what it prints and writes, and what wrong input ends with."""

from __future__ import annotations

import json
import pickle
import re
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.torch_files import load_torch_file
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.schedules.laws import Uniform, Warmup
from ema_dist.schedules.schedule import Schedule
from tests.attacks.payload import Payload
from tests.support.cli_runs import load_exported, make_checkpoint, run, run_ok
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    LAYOUTS,
    Net,
    assert_bitwise_equal,
    make_net,
    make_trained,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

DIFFUSERS = {
    "decay": 0.9,
    "min_decay": 0.0,
    "optimization_step": 7,
    "update_after_step": 2,
    "use_ema_warmup": False,
    "inv_gamma": 1.0,
    "power": 2 / 3,
}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def nested_tensor() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a prototype
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])


def snapshot(step: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of ema-pytorch's ``PostHocEMA`` in a file that was renamed."""
    return {
        "initted": torch.ones(1, dtype=torch.bool),
        "step": torch.tensor(step, dtype=dtype),
        "ema_model.a": torch.ones(1, dtype=dtype),
    }


def averaged(model: nn.Module, path: Path) -> Path:
    averages = AveragedModel(model)
    averages.update_parameters(model)
    return save(averages.state_dict(), path)


def state_of(net: Net) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if name != "head.weight"}


def refusal(*arguments: object) -> str:
    """The error of a command that is refused, and that leaves nothing at or beside OUT."""
    folder = next(Path(str(it)) for it in arguments if isinstance(it, Path)).parent
    before = sorted(folder.iterdir())
    result = run("import", *arguments, "-o", folder / "out")
    assert result.exit_code == 1, result.output
    assert sorted(folder.iterdir()) == before
    return re.sub(r"\s+", " ", result.stderr)


def test_what_is_printed_and_recorded(tmp_path: Path) -> None:
    source, out = averaged(make_net("plain"), tmp_path / "a.pt"), tmp_path / "out"
    printed = run_ok("import", source, "-o", out)
    assert printed.startswith("averaged-model: 23 tensors, steps 1, updates 1")
    assert str(out / "model.safetensors") in printed
    record = json.loads((out / "import.json").read_text())
    assert (record["format"], record["steps"], record["law"]) == ("averaged-model", 1, None)
    assert record["sources"][0]["path"] == str(source)
    assert any("head.weight" in note for note in record["notes"])
    assert_bitwise_equal(load_exported(out), state_of(make_net("plain")))


def test_a_plain_reference_tells_buffers_by_dtype_and_name(tmp_path: Path) -> None:
    """All but the mask and the frozen layer, which only a reference with parameters tells: the note says so."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    source, reference = averaged(model, tmp_path / "a.pt"), save(model.state_dict(), tmp_path / "model.pt")
    result = run("import", source, "-o", tmp_path / "out", "--reference", reference, "--format", "dcp")
    assert "keep_vars" in result.stderr
    ema = ShardedEMA(model)
    checkpoint.load({"ema": ema}, tmp_path / "out")
    assert (ema.steps, ema.updates) == (1, 1)
    run_ok("export", tmp_path / "out", tmp_path / "exported")
    assert_bitwise_equal(load_exported(tmp_path / "exported"), model.state_dict())
    assert "law not recorded, 1 steps, 1 updates" in run_ok("inspect", tmp_path / "out")
    run_ok("verify", tmp_path / "out")


def test_the_law_and_the_delay_of_diffusers_go_on(tmp_path: Path) -> None:
    """Two steps only copied, so that the next step weighs as in a run of this package that was never interrupted."""
    net = make_net("plain")
    source = save(DIFFUSERS | {"shadow_params": [*net.parameters()]}, tmp_path / "ema.pkl")
    law = Warmup(0.9)
    unbroken, ema = ShardedEMA(net, decay=law, start=2), ShardedEMA(net, decay=law, start=2)
    for _ in range(7):
        unbroken.update()
    checkpoint.import_averages(source, ema)
    assert (ema.steps, ema.updates, ema.metrics()) == (7, 5, unbroken.metrics())
    for averages in (ema, unbroken):
        averages.update()
    assert ema.metrics() == unbroken.metrics()


def test_a_child_called_module_keeps_its_name(tmp_path: Path) -> None:
    """All names have the prefix a second time, as of a wrapper; the model tells."""
    model = nn.Module()
    model.module = nn.Linear(3, 2)
    source, reference = averaged(model, tmp_path / "a.pt"), save(model.state_dict(), tmp_path / "model.pt")
    run_ok("import", source, "-o", tmp_path / "alone")
    assert load_exported(tmp_path / "alone").keys() == {"weight", "bias"}
    run_ok("import", source, "-o", tmp_path / "out", "--reference", reference)
    assert load_exported(tmp_path / "out").keys() == model.state_dict().keys()
    ema = ShardedEMA(model)
    checkpoint.import_averages(source, ema)
    assert ema.steps == 1


def test_ties_are_those_of_the_reference(tmp_path: Path) -> None:
    """One that has only the second name, and one that holds both as tensors of their own."""
    net = make_net("plain")
    source = averaged(net, tmp_path / "source.pt")
    untied = {name: value.clone() + 1 for name, value in net.state_dict().items()}
    for left_out in ({"embed.weight"}, set[str]()):
        kept = {name: value for name, value in untied.items() if name not in left_out}
        save_file(kept, tmp_path / "model.safetensors")
        out = tmp_path / f"without {len(left_out)}"
        run_ok("import", source, "-o", out, "--reference", tmp_path / "model.safetensors")
        assert_bitwise_equal(load_exported(out), {name: net.state_dict()[name] for name in kept})


def test_compiled_models_have_the_names_of_plain_ones(tmp_path: Path) -> None:
    compiled = nn.ModuleDict({"_orig_mod": make_net("plain")})
    source, reference = averaged(compiled, tmp_path / "a.pt"), save(compiled.state_dict(), tmp_path / "model.pt")
    run_ok("import", source, "-o", tmp_path / "out", "--reference", reference)
    assert_bitwise_equal(load_exported(tmp_path / "out"), state_of(make_net("plain")))


def test_buffers_stay_and_the_law_is_kept_without_a_reference(tmp_path: Path) -> None:
    model, ema = make_trained("plain", decay=HalfLife(3))
    expected = {name: value.clone() for name, value in ema.full_state_dict().items()}
    listed = [torch.full_like(parameter, 2.0) for parameter in model.parameters()]
    source = save(DIFFUSERS | {"shadow_params": listed, "min_decay": 0.5}, tmp_path / "e.pt")
    with (
        pytest.warns(UserWarning, match=r"min_decay=0\.5\) -> HalfLife\(3\)"),
        pytest.warns(UserWarning, match=r"not imported: frozen\.weight, frozen\.bias"),
    ):
        checkpoint.import_averages(source, ema)
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    expected |= {name: torch.full_like(expected[name], 2.0) for name in names}
    assert_bitwise_equal(ema.full_state_dict(), expected)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda net: net.state_dict(), r"found 24 tensors"),
        (lambda net: {"state_dict": net.state_dict(), "epoch": 1}, r"found the keys state_dict, epoch"),
        (lambda net: [net.state_dict()], "found a list"),
        (lambda _: {"state_dict_ema": Payload("harm")}, r"without running code: it holds .*Nothing in it was run"),
        (lambda _: {"n_averaged": torch.tensor(-1), "module.a": torch.ones(1)}, "n_averaged"),
        (lambda _: {"n_averaged": torch.tensor(1), "module.a": torch.ones(1).to_sparse()}, "'module.a'.*sparse"),
        (
            lambda _: {"state_dict": {}, "averaging_state": {"n_averaged": torch.ones(1, device="meta")}},
            "averaging_state.n_averaged, found .*meta",
        ),
        (lambda _: {"state_dict_ema": {"a": torch.ones(1, device="meta")}}, "'a'.*meta"),
        (lambda _: {"state_dict_ema": {"a": nested_tensor()}}, "'a'.*nested"),
        (lambda _: {"state_dict_ema": {"a": torch.ones(1).expand(2**40)}}, "'a'.*repeats 4 stored bytes"),
        (lambda _: {"state_dict_ema": {"a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}}, "two: '_orig_mod.a'"),
        (lambda _: DIFFUSERS | {"shadow_params": [torch.ones(1, device="meta")]}, r"shadow_params\[0\].*meta"),
        (lambda _: snapshot(2048.0, torch.float16), "float16, 2048, .*rounded"),
        (lambda _: snapshot(256.0, torch.bfloat16), "bfloat16, 256, .*rounded"),
        (lambda _: {"state_dict_ema": {}}, "'timm', but they hold no tensors"),
        (lambda net: DIFFUSERS | {"shadow_params": [*net.parameters()]}, r"lists 19 averages .*--reference"),
        (lambda _: {"state_dict": {}, "averaging_state": {}}, "averaging_state.n_averaged"),
        (lambda net: {"a": AveragedModel(net).state_dict(), "b": AveragedModel(net).state_dict()}, "'a'.*'b': save"),
        (
            lambda net: {"a": AveragedModel(net).state_dict(), "b": {"state_dict_ema": net.state_dict()}},
            r"averaged-model under the key 'a', timm under the key 'b': choose one format by `kind` \(--from\)",
        ),
    ],
)
def test_files_without_averages_are_refused(make: Callable[[Net], Any], expected: str, tmp_path: Path) -> None:
    assert re.search(expected, refusal(save(make(make_net("plain")), tmp_path / "source.pt")))


@pytest.mark.world_size(1)
def test_the_shards_of_one_rank_are_refused(tmp_path: Path) -> None:
    """By name and before any operation on them, which needs the process group: also in a reference."""
    part = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    assert re.search("'a'.*full tensors", refusal(save({"state_dict_ema": {"a": part}}, tmp_path / "source.pt")))
    for name in ("model.pt", "model.bin"):
        with pytest.raises(CheckpointError, match=r"'a'.*full tensors"):
            dict(WeightReader(save({"a": part}, tmp_path / name)))


def test_pickles_of_modules_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """As those of EDM and StyleGAN: nothing in them runs."""
    (tmp_path / "network-snapshot.pkl").write_bytes(pickle.dumps({"ema": Payload(tmp_path / "harm")}))
    assert "importing.md" in refusal(tmp_path / "network-snapshot.pkl")


def test_folders_and_other_files_without_averages_are_refused(tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    assert "ema-dist export" in refusal(root / "step-0000000003")
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "without averages" in refusal(tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert "a folder with nothing" in refusal(tmp_path / "empty")
    assert "no such file" in refusal(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("blocks.0.scale"), r"23 averages, .* 22 tensors.*only the file has blocks.0.scale"),
        (lambda state: state.update({"mask": torch.ones(4)}), r"shapes of 1 differ: mask \(\(4,\), average \(3,\)\)"),
        (lambda state: state.update({"mask": torch.ones(3, dtype=torch.complex64)}), r"dtypes of 1 differ: mask"),
        (lambda state: state.clear(), r"expected a state_dict\(\)"),
        (
            lambda state: state.update({"stats.num_batches_tracked": torch.ones(()).half()}),
            r"dtypes of 1 differ: stats.num_batches_tracked",
        ),
    ],
)
def test_another_reference_is_refused(
    change: Callable[[dict[str, Tensor]], object], expected: str, tmp_path: Path
) -> None:
    net = make_net("plain")
    state = state_of(net)
    change(state)
    reference = save(state, tmp_path / "model.pt")
    assert re.search(expected, refusal(averaged(net, tmp_path / "source.pt"), "--reference", reference))


def test_averages_are_no_reference(tmp_path: Path) -> None:
    """Their counter and their prefix would become tensors and names of the model."""
    source = averaged(make_net("plain"), tmp_path / "source.pt")
    assert "'averaged-model'" in refusal(source, "--reference", source)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda listed: listed.pop(), r"lists 18 averages .* has 19 parameters and 4 buffers"),
        (lambda listed: listed.insert(0, listed.pop()), r"shapes of \d+ of 19 parameters: \S+ \(position 0"),
    ],
)
def test_lists_are_checked_by_count_and_shape(
    change: Callable[[list[Tensor]], object], expected: str, tmp_path: Path
) -> None:
    net = make_net("plain")
    listed = [parameter.detach() for parameter in net.parameters()]
    change(listed)
    source = save(DIFFUSERS | {"shadow_params": listed}, tmp_path / "source.pt")
    reference = save(net.state_dict(keep_vars=True), tmp_path / "model.pt")
    assert re.search(expected, refusal(source, "--reference", reference))
    with pytest.raises(RuntimeError, match=expected.replace("4 buffers", r"\d buffers")):
        checkpoint.import_averages(source, ShardedEMA(net))


def test_lists_need_an_order(tmp_path: Path) -> None:
    net = make_net("plain")
    source = save(DIFFUSERS | {"shadow_params": [*net.parameters()]}, tmp_path / "source.pt")
    save_file(state_of(net), tmp_path / "model.safetensors")
    assert "no order" in refusal(source, "--reference", tmp_path / "model.safetensors")


def test_wrong_choices_are_refused(tmp_path: Path) -> None:
    source = averaged(make_net("plain"), tmp_path / "source.pt")
    assert "'timm'" in refusal(source, "--from", "timm")
    assert "--reference" in refusal(source, "--format", "dcp")
    (tmp_path / "out").mkdir()
    assert "exists" in refusal(source)
    with pytest.raises(ValueError, match="'a', 'b'"):
        checkpoint.import_averages(source, ShardedEMA(make_net("plain"), decay={"a": 0.9, "b": 0.99}))
    with pytest.raises(ValueError, match=r"averaged-model.*'torch'"):
        checkpoint.import_averages(source, ShardedEMA(make_net("plain")), kind="torch")


def test_tied_names_with_different_averages_are_refused(tmp_path: Path) -> None:
    net = make_net("plain")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["head.weight"] += 1
    source = save({"state_dict_ema": state}, tmp_path / "source.pt")
    reference = save(net.state_dict(), tmp_path / "model.pt")
    assert "'head.weight' and 'embed.weight'" in refusal(source, "--reference", reference)


def test_the_way_back_for_averaged_model(tmp_path: Path) -> None:
    """`export --layout averaged-model` and `import` are inverse, counts included."""
    root, model, ema = make_checkpoint(tmp_path / "root")
    run_ok("export", root, tmp_path / "out", "--layout", "averaged-model")
    state = torch.load(tmp_path / "out" / "averaged_model.pt", weights_only=True)
    averages = AveragedModel(make_net("plain"), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averages.load_state_dict(state)
    assert averages.n_averaged == 3
    assert_bitwise_equal(averages.module.state_dict(), ema.full_state_dict())
    resumed = ShardedEMA(model)
    checkpoint.import_averages(tmp_path / "out" / "averaged_model.pt", resumed)
    assert resumed.updates == 3
    assert_bitwise_equal(resumed.full_state_dict(), ema.full_state_dict())


@pytest.mark.parametrize(
    "options",
    [
        ("--layout", "diffusers", "--name", "a.safetensors"),
        ("--layout", "averaged-model", "--weights", "live"),
        ("--layout", "averaged-model", "--max-shard-size", "5GiB"),
        ("--layout", "averaged-model", "--format", "safetensors"),
        ("--layout", "timm", "--max-shard-size", "1KiB"),
    ],
)
def test_choices_that_exclude_each_other_are_refused(options: tuple[str, ...], tmp_path: Path) -> None:
    root, *_ = make_checkpoint(tmp_path / "root")
    result = run("export", root, tmp_path / "out", *options)
    assert result.exit_code == 1
    assert options[2] in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_compressed_archive_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """Torch would map the compressed bytes as values."""
    net = make_net("plain")
    for path in (averaged(net, tmp_path / "source.pt"), save(net.state_dict(), tmp_path / "model.bin")):
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    run_ok("import", tmp_path / "source.pt", "-o", tmp_path / "out", "--reference", tmp_path / "model.bin")
    assert_bitwise_equal(load_exported(tmp_path / "out"), state_of(net))
    assert_bitwise_equal(dict(WeightReader(tmp_path / "model.bin")), net.state_dict())


@pytest.mark.parametrize(
    ("decay", "start", "steps", "weight"),
    [
        (Warmup(0.999), 0, None, 1.0),
        (Uniform(), 0, None, 1.0),
        (HalfLife(1), 50, None, 1.0),
        (HalfLife(1), 50, 20, 1.0),
        (Warmup(0.999), 0, 890, 0.01),
        (Uniform(), 0, 99, 0.01),
        (Uniform(), 50, 99, 0.02),
        (HalfLife(1), 0, None, 0.5),
    ],
)
def test_averages_without_counts_are_not_replaced_silently(
    decay: Schedule, start: int, steps: int | None, weight: float, tmp_path: Path
) -> None:
    """From a folder and from the source; `start` counts as in a run that was never interrupted."""
    model = nn.Linear(3, 2)
    imported = {name: value + 1 for name, value in model.state_dict().items()}
    source, reference = save({"state_dict_ema": imported}, tmp_path / "a.pt"), tmp_path / "model.pt"
    torch.save(model.state_dict(keep_vars=True), reference)
    options = () if steps is None else ("--steps", steps)
    run_ok("import", source, "-o", tmp_path / "out", "--format", "dcp", "--reference", reference, *options)
    for target in ("folder", "source"):
        ema = ShardedEMA(model, decay=decay, start=start)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if target == "folder":
                checkpoint.load({"ema": ema}, tmp_path / "out")
            else:
                checkpoint.import_averages(source, ema, steps=steps)
        assert ["--steps" in str(warning.message) for warning in caught] == [True] * (weight > 0.5)
        assert (ema.steps, ema.updates) == (steps or 0, steps or 0)
        ema.update()
        distance = (ema.full_state_dict()["weight"] - model.weight).mean().item()
        assert distance == pytest.approx(1 - weight, abs=1e-6)


def test_steps_are_refused_where_the_source_records_them(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    source = averaged(model, tmp_path / "source.pt")
    assert "cover 1 steps, got steps=7" in refusal(source, "--steps", 7)
    with pytest.raises(RuntimeError, match="got steps=7"):
        checkpoint.import_averages(source, ShardedEMA(model), steps=7)
    with pytest.raises(ValueError, match=r"steps.*0"):
        checkpoint.import_averages(source, ShardedEMA(model), steps=0)


@pytest.mark.parametrize(("count", "expected"), [(2047.0, 2047), (2048.0, 70000), (float("inf"), 70000)])
def test_rounded_integers_are_those_of_the_reference(count: float, expected: int, tmp_path: Path) -> None:
    """PostHocEMA stores them in float16."""
    model = nn.BatchNorm1d(2)
    stored = {name: value.half() for name, value in model.state_dict().items()}
    stored["num_batches_tracked"] = torch.tensor(count).half()
    source = save({"state_dict_ema": stored}, tmp_path / "source.pt")
    model.num_batches_tracked.fill_(70000)
    reference = save(model.state_dict(), tmp_path / "model.pt")
    is_kept = expected == count
    if is_kept:
        run_ok("import", source, "-o", tmp_path / "alone")
    else:
        assert re.search("num_batches_tracked; .*--reference", refusal(source))
    result = run("import", source, "-o", tmp_path / "out", "--reference", reference)
    assert ("rounded" in result.stderr) is not is_kept
    assert load_exported(tmp_path / "out")["num_batches_tracked"].tolist() == expected
    ema = ShardedEMA(model)
    checkpoint.import_averages(source, ema, steps=1)
    assert ema.full_state_dict()["num_batches_tracked"].item() == expected


def test_paths_among_the_hyperparameters_are_no_obstacle(tmp_path: Path) -> None:
    content = {"state_dict_ema": {"a": torch.ones(1)}, "args": [tmp_path, PureWindowsPath("a"), PurePosixPath("b")]}
    run_ok("import", save(content, tmp_path / "source.pt"), "-o", tmp_path / "out")


def test_a_reference_of_a_wrapped_model_is_noted(tmp_path: Path) -> None:
    net = make_net("plain")
    reference = save({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "model.pt")
    result = run("import", averaged(net, tmp_path / "a.pt"), "-o", tmp_path / "out", "--reference", reference)
    assert "model.module.state_dict()" in result.stderr


def test_a_model_without_trained_parameters_has_no_averages_to_resume_from(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).requires_grad_(requires_grad=False)
    source, reference = averaged(model, tmp_path / "a.pt"), tmp_path / "model.pt"
    torch.save(model.state_dict(keep_vars=True), reference)
    assert "are frozen" in refusal(source, "--format", "dcp", "--reference", reference)


def test_the_averages_of_a_module_around_the_model_are_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    source = averaged(nn.ModuleDict({"net": model}), tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=r"begin with 'net\.' match without it"):
        checkpoint.import_averages(source, ShardedEMA(model))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.world_size(LAYOUTS[name].ranks)) for name in ("plain", "fsdp2")]
)
def test_frozen_parameters_that_differ_are_named(layout: str, tmp_path: Path) -> None:
    """On the first rank, which reads them."""
    source = averaged(make_net(layout), tmp_path / f"{dist.get_rank()}.pt")
    net = make_net(layout)
    with torch.no_grad():
        net.frozen.weight.add_(1)
    for model, names in ((make_net(layout), []), (net, ["frozen.weight"])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.import_averages(source, ShardedEMA(wrap(layout, model)))
        found = [str(warning.message) for warning in caught if "frozen parameters" in str(warning.message)]
        assert len(found) == (len(names) if dist.get_rank() == 0 else 0)
        assert all(name in found[0] for name in names if found)


def test_errors_do_not_advise_to_run_code(tmp_path: Path) -> None:
    """As torch's own messages do."""
    path = save({"a": Payload("harm")}, tmp_path / "a.pt")
    for read in (load_torch_file, lambda it: dict(WeightReader(it))):
        with pytest.raises(CheckpointError, match="without running code: it holds") as caught:
            read(path)
        assert "weights_only" not in "".join(traceback.format_exception(caught.value))
