"""Averages that other packages have written: imported into files, into a folder to resume from, and into averages."""

from __future__ import annotations

import json
import warnings
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ema_dist import HalfLife, ShardedEMA, checkpoint
from tests.checkpoint.importing.sources import LAYOUTS_OF_NET, SOURCES, Source, net, reference_net
from tests.support.cli_runs import load_exported, run_ok
from tests.support.layouts import IGNORED_WARNINGS, LAYOUTS, wrap

_made: dict[str, Source] = {}


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The source of this name; each is made once, in this process, and not by the ranks."""
    name = request.param
    if name not in _made:
        _made[name] = SOURCES[name][1](tmp_path_factory.mktemp(name))
    return _made[name]


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """A reference with other values, which marks its parameters."""
    torch.save(reference_net().state_dict(keep_vars=True), tmp_path / "reference.pt")
    return tmp_path / "reference.pt"


@pytest.fixture
def imported(source: Source, reference: Path, tmp_path: Path) -> Path:
    """The source as a folder of DCP."""
    run_ok("import", source.path, "-o", tmp_path / "imported", "--reference", reference, "--format", "dcp")
    return tmp_path / "imported"


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of tensors that differ; ema-pytorch makes NaN of an infinity in a buffer, which equals NaN here."""
    assert actual.keys() == expected.keys()
    return [
        name
        for name, value in expected.items()
        if not torch.equal(actual[name].double().nan_to_num(nan=7), value.double().nan_to_num(nan=7))
    ]


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_a_file_has_all_tensors_of_the_model_once(
    source: Source, reference: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Floats in the dtype of the source, integers in the model's, and from the reference what has no average."""
    out = tmp_path / "out"
    printed = json.loads(run_ok("import", source.path, "-o", out, "--reference", reference, "--json"))
    state = {name: value for name, value in reference_net().state_dict().items() if name != "head.weight"}
    imported = load_exported(out)
    assert differing(imported, {name: source.averages.get(name, value) for name, value in state.items()}) == []
    assert imported["stats.num_batches_tracked"].dtype == torch.int64
    assert printed["format"] == SOURCES[request.node.callspec.params["source"]][0]
    assert printed["steps"] == printed["updates"] == (source.steps or None)
    assert printed["law"] == (source.law and repr(source.law))
    assert set(printed["without_average"]) == state.keys() - source.averages.keys()
    assert {*printed["files"]} == {str(path) for path in out.iterdir()}


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        pytest.param(name, layout, marks=(pytest.mark.world_size(LAYOUTS[layout].ranks), *IGNORED_WARNINGS))
        for name, layout in zip(SOURCES, cycle(LAYOUTS_OF_NET[1:]), strict=False)
    ],
    indirect=["source"],
)
def test_a_sharded_ema_resumes_from_it(source: Source, layout: str, reference: Path, imported: Path) -> None:
    """From a folder of DCP, and from the source itself: averages, counts and buffers, on any layout."""
    state = reference_net().state_dict() | source.averages | dict(net().frozen.state_dict(prefix="frozen."))
    state["head.weight"] = state["embed.weight"]
    for target in ("folder", "source"):
        ema = ShardedEMA(wrap(layout, net()), decay=source.law or HalfLife(50))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "this state was saved with a different schedule")
            if target == "folder":
                checkpoint.load({"ema": ema}, imported)
            else:
                checkpoint.import_averages(source.path, ema, reference=reference)
        assert (ema.steps, ema.updates, ema.time, ema.initial_mass()) == (source.steps, source.steps, source.steps, 0)
        full = ema.full_state_dict()
        assert dist.get_rank() or differing(full, state) == []


@pytest.mark.world_size(2)
def test_every_rank_raises_what_the_first_one_finds(tmp_path: Path) -> None:
    """And nothing has changed: neither averages nor counts."""
    ema = ShardedEMA(wrap("fsdp2", net()))
    before = ema.full_state_dict()
    torch.save({"state_dict_ema": {"embed.weight": torch.ones(2)}}, tmp_path / f"rank {dist.get_rank()}.pt")
    dist.barrier()
    for path, expected in {"rank 0.pt": r"1 averages.*embed.weight \(\(5, 6\)", "missing.pt": "no such file"}.items():
        with pytest.raises(RuntimeError, match=expected):
            checkpoint.import_averages(tmp_path / path, ema)
    assert (ema.steps, ema.updates) == (0, 0)
    full = ema.full_state_dict()
    assert dist.get_rank() or differing(full, before) == []
