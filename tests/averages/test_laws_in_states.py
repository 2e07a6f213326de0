"""Laws and the clock in saved states: they resume bit-identically, and states of other laws and of format 1 load."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from ema_dist import HalfLife, Power, ShardedEMA, Uniform, checkpoint
from tests.schedules.laws import FORMULAS, LAWS
from tests.support.cli_runs import run_ok
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, IGNORED_WARNINGS, averages_of_tracks, make_net, wrap
from tests.support.reshard_cases import run_in_world

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


FORMAT_1 = Path(__file__).with_name("format_1")
"""A folder that the version before laws and clocks wrote by plain ``dcp.save``.

The averages of `make_old_model`, whose values were the number of the step, from six steps with ``update_interval=2``:
the track ``half_life`` with ``HalfLife(4)``, the track ``number`` with 0.5.
"""


def make_old_model() -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    model.register_buffer("mean", torch.zeros(2))
    nn.init.zeros_(model.weight)
    return model


def load_format_1(law: Any, **settings: Any) -> tuple[nn.Module, ShardedEMA]:  # noqa: ANN401
    model = make_old_model()
    ema = ShardedEMA(model, decay={"half_life": law, "number": 0.5}, **settings)
    dcp.load({"ema": ema}, checkpoint_id=FORMAT_1)
    return model, ema


def value_of(ema: ShardedEMA, track: str) -> float:
    return float(ema.full_state_dict(track=track)["weight"][0, 0])


def follow(decay: float) -> float:
    """The average of 2, 4 and 6, which began at 0."""
    average = 0.0
    for value in (2, 4, 6):
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.world_size(1)
def test_a_folder_of_format_1_loads_and_goes_on() -> None:
    """Averaging began at time 0, and the last update was at step 6."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, ema = load_format_1(HalfLife(4), update_interval=2)
    assert (ema.steps, ema.updates, ema.time) == (6, 3, 6.0)
    assert ema.initial_mass("half_life") == pytest.approx(2 ** (-6 / 4))
    assert ema.initial_mass("number") == 0.5**3
    assert ema.metrics()["ema/half_life/decay"] == pytest.approx(2 ** (-2 / 4))
    expected = {"half_life": follow(2**-0.5), "number": follow(0.5)}
    assert {name: value_of(ema, name) for name in expected} == pytest.approx(expected)
    nn.init.constant_(model.weight, 8.0)
    ema.update()
    ema.update()
    assert value_of(ema, "half_life") == pytest.approx(8 - 2**-0.5 * (8 - expected["half_life"]))


@pytest.mark.world_size(1)
@pytest.mark.parametrize("name", [name for name in LAWS if name != "half_life"])
def test_a_half_life_of_format_1_loads_into_every_other_law(name: str) -> None:
    with pytest.warns(UserWarning, match=r"half_life: HalfLife\(4\.0\) -> ") as found:
        model, ema = load_format_1(LAWS[name])
    (words,) = [str(warning.message) for warning in found if "HalfLife" in str(warning.message)]
    assert words.endswith(f"-> {LAWS[name]!r}")
    before, mass = value_of(ema, "half_life"), ema.initial_mass("half_life")
    nn.init.constant_(model.weight, 9.0)
    ema.update()
    weight = FORMULAS[name].weight(7, 1, 6)
    assert value_of(ema, "half_life") == pytest.approx(before + weight * (9 - before), rel=1e-6)
    assert ema.initial_mass("half_life") == pytest.approx(mass * (1 - weight))


@pytest.mark.world_size(1)
def test_plain_dcp_loads_a_folder_of_other_laws(tmp_path: Path) -> None:
    """The names of stored values do not depend on the law."""
    model = nn.Linear(2, 1)
    saved = ShardedEMA(model, decay=LAWS, start=2)
    for _ in range(5):
        saved.update(elapsed=1.5)
    dcp.save({"ema": saved}, checkpoint_id=tmp_path)
    loaded = ShardedEMA(model, decay=dict.fromkeys(LAWS, HalfLife(60)), start=2)
    with pytest.warns(UserWarning, match=" -> ") as found:
        dcp.load({"ema": loaded}, checkpoint_id=tmp_path)
    (words,) = [str(warning.message) for warning in found if " -> " in str(warning.message)]
    assert words.endswith(", ".join(f"{name}: {LAWS[name]!r} -> HalfLife(60)" for name in [*LAWS][1:]))
    assert (loaded.steps, loaded.updates, loaded.time) == (5, 4, 7.5)
    assert loaded.metrics() == saved.metrics()


@pytest.mark.world_size(1)
def test_the_leaves_are_those_of_format_1(tmp_path: Path) -> None:
    stored = dcp.FileSystemReader(FORMAT_1).read_metadata().state_dict_metadata
    ema = ShardedEMA(make_old_model(), decay={"half_life": Power(gamma=3), "number": 0.5})
    dcp.save({"ema": ema}, checkpoint_id=tmp_path)
    assert {*dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata} == {*stored}
    decay = ema.state_dict()["tracks"]["half_life"]["decay"]
    assert decay["kind"] == "power"
    assert json.loads(decay["value"])["law"] == {"gamma": 3, "sigma_rel": None}


@pytest.mark.world_size(1)
@pytest.mark.parametrize("path", ["format_1", "new"])
def test_the_command_reads_both(path: str, tmp_path: Path) -> None:
    folder = FORMAT_1
    if path == "new":
        folder = tmp_path / "new"
        ema = ShardedEMA(make_old_model(), decay={**LAWS, "half_life": HalfLife(4), "number": 0.5}, update_interval=2)
        for _ in range(6):
            ema.update()
        dcp.save({"ema": ema}, checkpoint_id=folder)
    summary = json.loads(run_ok("inspect", folder, "--json"))["averages"]["ema"]
    assert (summary["steps"], summary["updates"], summary["time"]) == (6, 3, 6.0)
    half_life = summary["tracks"]["half_life"]
    assert half_life["initial_mass"] == pytest.approx(2**-1.5)
    assert (half_life["decay"]["half_life"], half_life["decay"]["per"]) == (4, "step")
    run_ok("verify", folder)
    shown = run_ok("inspect", folder)
    assert "half-life 4 steps" in shown
    if path == "new":
        assert summary["tracks"]["sigma_rel"]["decay"]["law"] == "Power(sigma_rel=0.1)"
        assert "Power(sigma_rel=0.1) (decay " in shown
        run_ok("export", folder, tmp_path / "out", "--track", "sigma_rel")


@dataclass(frozen=True)
class Mine:
    """A user's own law."""

    rate: float
    schedule: Any = max

    def decay(self, *, time: float, elapsed: float, step: float) -> float:  # noqa: ARG002
        return self.rate ** (elapsed / time)


@pytest.mark.world_size(2)
def test_a_law_that_differs_is_one_warning_on_one_rank(tmp_path: Path) -> None:
    """Of a user's own the class and the fields are compared, and ranks compare them at construction."""
    model = wrap("fsdp2", make_net("fsdp2"))
    dcp.save({"ema": ShardedEMA(model, decay=Mine(0.5))}, checkpoint_id=tmp_path)
    for law, expected in {Mine(0.5): "", Mine(0.25): "Mine(rate=0.5, schedule='max') -> Mine(rate=0.25, sch"}.items():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            dcp.load({"ema": ShardedEMA(model, decay=law)}, checkpoint_id=tmp_path)
        words = [str(warning.message) for warning in found if " -> " in str(warning.message)]
        assert len(words) == int(bool(expected) and dist.get_rank() == 0)
        assert all(expected in text for text in words)
    with pytest.raises(RuntimeError, match=r"Mine\(rate=0\.0.*Mine\(rate=1\.0"):
        ShardedEMA(model, decay=Mine(float(dist.get_rank())))


def set_live(model: nn.Module, step: int) -> None:
    """Live weights of a step, equal on every layout."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.sin(step))


def run(model: nn.Module, ema: ShardedEMA, steps: range, *, scaled: bool) -> None:
    for step in steps:
        set_live(model, step)
        found_inf = {"found_inf": torch.tensor(float(step == 4))} if scaled else {}
        ema.update(elapsed=1000 + 7 * step, **found_inf)


@pytest.mark.parametrize("scaled", [False, True], ids=["host", "scaler"])
@pytest.mark.parametrize("through", ["dcp", "consolidated", "checkpoint"])
@pytest.mark.parametrize(
    ("source", "source_ranks", "target", "target_ranks"),
    [
        pytest.param(*case, marks=(pytest.mark.world_size(max(case[1], case[3])), *IGNORED_WARNINGS))
        for case in [("fsdp2", 3, "fsdp2", 2), ("ddp", 2, "plain", 1), ("plain", 1, "fsdp1-flat", 2)]
    ],
)
def test_every_law_resumes_in_the_middle(
    source: str,
    source_ranks: int,
    target: str,
    target_ranks: int,
    through: str,
    scaled: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    """Bit-identical to a run without interruption, on another world size and layout."""
    settings: dict[str, Any] = {"decay": LAWS, "start": 2500, "update_interval": 2}
    folder, file = tmp_path / "folder", tmp_path / "state.pt"

    def start() -> None:
        model = wrap(source, make_net(source, target))
        ema = ShardedEMA(model, **settings)
        run(model, ema, range(6), scaled=scaled)
        if through == "dcp":
            dcp.save({"ema": ema}, checkpoint_id=folder)
        elif through == "checkpoint":
            checkpoint.save({"ema": ema}, folder, step=ema.steps)
        elif state := ema.consolidated_state_dict():
            torch.save(state, file)
        run(model, ema, range(6, 12), scaled=scaled)
        averages = averages_of_tracks(ema)
        if dist.get_rank() == 0:
            torch.save((averages, ema.metrics()), tmp_path / "expected.pt")

    def resume() -> None:
        model = wrap(target, make_net(source, target))
        ema = ShardedEMA(model, **settings)
        if through == "dcp":
            dcp.load({"ema": ema}, checkpoint_id=folder)
        elif through == "checkpoint":
            checkpoint.load({"ema": ema}, folder)
        else:
            ema.load_consolidated_state_dict(torch.load(file) if dist.get_rank() == 0 else {})
        run(model, ema, range(6, 12), scaled=scaled)
        averages, metrics = torch.load(tmp_path / "expected.pt")
        assert ema.metrics() == metrics
        actual = averages_of_tracks(ema)
        if dist.get_rank() == 0:
            assert [name for name, value in averages.items() if not torch.equal(actual[name], value)] == []

    run_in_world(source_ranks, tmp_path, start)
    run_in_world(target_ranks, tmp_path, resume)


def test_a_damaged_clock_changes_nothing() -> None:
    ema = ShardedEMA(nn.Linear(2, 1), decay=Uniform())
    ema.update()
    state = ema.state_dict()
    value = json.loads(state["tracks"]["default"]["decay"]["value"])
    for damage in (
        {"time": math.nan},
        {"last_update": 5.0},
        {"initial_mass": 2},
        {"start_step": -1},
        {"steps": 10**400},
        {"time": None},
    ):
        text = json.dumps({**value, "clock": value["clock"] | damage})
        decay = state["tracks"]["default"]["decay"] | {"value": text}
        with pytest.raises(ValueError, match=r"'uniform' is damaged"):
            ema.load_state_dict({**state, "tracks": {"default": state["tracks"]["default"] | {"decay": decay}}})
    for value in ("soon", "[]", "{}", '{"law": 1, "clock": {}}', "[" * 100_000, 3, None):
        decay = state["tracks"]["default"]["decay"] | {"value": value}
        with pytest.raises(ValueError, match=r"'uniform' (is damaged|must be a JSON text)"):
            ema.load_state_dict({**state, "tracks": {"default": state["tracks"]["default"] | {"decay": decay}}})
    assert (ema.steps, ema.time) == (1, 1.0)


@pytest.mark.world_size(1)
def test_a_checkpoint_without_averages_starts_the_clock_anew(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    checkpoint.save({"model": model}, tmp_path, step=1)
    ema = ShardedEMA(model, decay={"a": HalfLife(2), "b": Uniform()})
    ema.update(elapsed=10)
    with pytest.warns(UserWarning, match="no averages"):
        checkpoint.load({"model": model, "ema": ema}, tmp_path)
    assert ema.metrics() == ShardedEMA(model, decay={"a": HalfLife(2), "b": Uniform()}).metrics()


@pytest.mark.world_size(1)
def test_averages_of_a_part_start_from_the_weights_of_the_whole_model(tmp_path: Path) -> None:
    saved = nn.Sequential(nn.Linear(2, 1))
    checkpoint.save({"model": saved}, tmp_path, step=1)
    model = nn.Sequential(nn.Linear(2, 1))
    ema = ShardedEMA(model[0])
    ema.update()
    with pytest.warns(UserWarning, match="no averages"):
        checkpoint.load({"model": model, "ema": ema}, tmp_path)
    assert torch.equal(ema.full_state_dict()["weight"], saved[0].weight)
    assert (ema.steps, ema.initial_mass()) == (0, 1.0)


def test_a_later_start_follows_again() -> None:
    """Averaging begins anew there, whatever the state says."""
    model = nn.Linear(1, 1, bias=False)
    ema = ShardedEMA(model, decay=LAWS)
    for _ in range(5):
        ema.update()
    later = ShardedEMA(model, decay=LAWS, start=6)
    later.load_state_dict(ema.state_dict())
    later.update()
    assert {later.initial_mass(name) for name in LAWS} == {1.0}
    for t in (1, 2):
        before = {name: value_of(later, name) for name in LAWS}
        nn.init.constant_(model.weight, float(t))
        later.update()
        for name, formula in FORMULAS.items():
            expected = before[name] + formula.weight(t, 1, t - 1) * (t - before[name])
            assert value_of(later, name) == pytest.approx(expected, rel=1e-5)


class Slotted:
    """A law of a user without ``__dict__``."""

    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def decay(self, **_: float) -> float:
        return self.factor


def test_the_fields_of_a_law_in_slots_are_compared() -> None:
    saved, loaded = (ShardedEMA(nn.Linear(2, 1), decay=Slotted(factor)) for factor in (0.5, 0.9))
    with pytest.warns(UserWarning, match=r"Slotted\(factor=0\.5\) -> Slotted\(factor=0\.9\)"):
        loaded.load_state_dict(saved.state_dict())
