"""Averages that other packages have written: imported into files, into a folder to resume from, and into averages."""

from __future__ import annotations

import json
import warnings
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ema_dist import HalfLife, ShardedEMA, checkpoint
from tests.checkpoint.importing.sources import LAYOUTS_OF_NET, SOURCES, Source, net, reference_net
from tests.support.cli_runs import load_exported, run, run_ok
from tests.support.layouts import LAYOUTS, assert_bitwise_equal, wrap

_made: dict[str, Source] = {}


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The source of this name; each is made once, in this process, and not by the ranks."""
    name = request.param
    if name not in _made:
        _made[name] = SOURCES[name][1](tmp_path_factory.mktemp(name))
    return _made[name]


def save_reference(folder: Path, model: nn.Module | None = None) -> tuple[Path, dict[str, Tensor]]:
    """A reference that marks its parameters, and the tensors in it without the second tied name."""
    state = (model or reference_net()).state_dict(keep_vars=True)
    torch.save(state, folder / "reference.pt")
    return folder / "reference.pt", {name: tensor for name, tensor in state.items() if name != "head.weight"}


def expected_of(source: Source, reference: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: source.averages.get(name, value).detach() for name, value in reference.items()}


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_a_file_has_all_tensors_of_the_model_once(source: Source, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Averages in the dtype of the source, integers in that of the model, and what has no average from the reference."""
    path, reference = save_reference(tmp_path)
    printed = json.loads(run_ok("import", source.path, "-o", tmp_path / "out", "--reference", path, "--json"))
    imported = load_exported(tmp_path / "out")
    expected = expected_of(source, reference)
    assert [*printed["files"]] == [str(it) for it in sorted((tmp_path / "out").iterdir())]
    kind = SOURCES[request.node.callspec.params["source"]][0]
    assert (printed["format"], printed["steps"] or 0) == (kind, source.steps)
    assert printed["law"] == (source.law and repr(source.law))
    assert set(printed["without_average"]) == expected.keys() - source.averages.keys()
    assert_bitwise_equal({name: value.to(expected[name].dtype) for name, value in imported.items()}, expected)
    assert imported["stats.num_batches_tracked"].dtype == torch.int64


CASES = [
    pytest.param(name, layout, marks=pytest.mark.world_size(LAYOUTS[layout].ranks), id=f"{name}-{layout}")
    for name, layout in zip(SOURCES, cycle(LAYOUTS_OF_NET[1:]))
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("source", "layout"), CASES, indirect=["source"])
def test_a_sharded_ema_resumes_from_it(source: Source, layout: str, tmp_path: Path) -> None:
    """From a folder of DCP and from the source itself: averages, counts and buffers, on sharded layouts."""
    path, reference = tmp_path / "reference.pt", reference_net().state_dict()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(reference_net().state_dict(keep_vars=True), path)
    checkpoint_folder = tmp_path / "out"
    kind = "auto"
    del kind
    _import_on_first_rank(source.path, checkpoint_folder, path)
    law = source.law or HalfLife(50)
    for load in ("folder", "source"):
        ema = ShardedEMA(wrap(layout, net()), decay=law)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "this state was saved with a different schedule")
            if load == "folder":
                checkpoint.load({"ema": ema}, checkpoint_folder)
            else:
                checkpoint.import_averages(source.path, ema, reference=path)
        assert (ema.steps, ema.updates, ema.time) == (source.steps, source.steps, source.steps)
        assert ema.initial_mass() == 0
        full = ema.full_state_dict()
        frozen = {"frozen.weight", "frozen.bias"}
        for name, value in full.items():
            first = "embed.weight" if name == "head.weight" else name
            expected = net().state_dict()[name] if name in frozen else source.averages.get(first, reference[name])
            assert torch.equal(value, expected.to(value.dtype)), name


def _import_on_first_rank(source: Path, folder: Path, reference: Path) -> None:
    """All ranks call it: the command knows one process only, but what it writes is shared if there are several."""
    from ema_dist.checkpoint.importing.writing import Import  # noqa: PLC0415

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    Import.open(source, "auto", reference, "dcp").write(folder)
