"""Which averages in a root of checkpoints are snapshots, at which time, and which of them a window takes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ema_dist import HalfLife, InverseGamma, Power, ShardedEMA, Uniform, checkpoint
from ema_dist.checkpoint.combine.reconstruction import choose_snapshots
from ema_dist.checkpoint.combine.snapshots import Snapshots, read_snapshots
from ema_dist.checkpoint.find_checkpoint import find_steps
from ema_dist.posthoc import Window
from tests.averages.test_laws_in_states import FORMAT_1
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = [IGNORE_INITIAL_WEIGHTS_WARNING, pytest.mark.world_size(1)]


def read(root: Path) -> Snapshots:
    return read_snapshots((step, folder) for step, (folder,) in find_steps(root).items())


def save_run(root: Path, steps: int = 40, every: int = 10, elapsed: float = 1, **settings: Any) -> ShardedEMA:  # noqa: ANN401
    """Averages of a run, saved every so many steps."""
    model = nn.Linear(2, 1)
    ema = ShardedEMA(model, **{"decay": Uniform()} | settings)
    for step in range(1, steps + 1):
        ema.update(elapsed=elapsed)
        if step % every == 0:
            checkpoint.save({"model": model, "ema": ema}, root, step=step, keep=None)
    return ema


def times(snapshots: Snapshots) -> list[tuple[int, str, float]]:
    return [(it.step, it.track, it.profile.end) for it in snapshots.snapshots]


def test_each_track_of_each_step_is_a_snapshot(tmp_path: Path) -> None:
    save_run(tmp_path, elapsed=8, decay={"a": Uniform(), "b": HalfLife(100)})
    found = read(tmp_path)
    assert times(found) == [(step, track, 8.0 * step) for step in (10, 20, 30, 40) for track in ("a", "b")]
    assert found.notes == []
    assert found.time_of(25) == 200
    with pytest.raises(checkpoint.CheckpointError, match=r"10 and 40.*\b9\b"):
        found.time_of(9)


def test_times_count_since_averaging_began_and_end_at_the_last_update(tmp_path: Path) -> None:
    save_run(tmp_path, start=15, update_interval=7)
    found = read(tmp_path)
    assert times(found) == [(30, "default", 28 - 15.0), (40, "default", 35 - 15.0)]
    assert [note.split()[1] for note in found.notes] == ["10", "20"]


def test_a_folder_of_format_1_has_averaged_since_step_0() -> None:
    found = read_snapshots([(6, FORMAT_1)])
    assert times(found) == [(6, "half_life", 6.0)]
    (note,) = found.notes
    assert "'number'" in note
    assert "3 times in 6 clock units" in note


def test_tracks_without_an_exact_law_are_left_out(tmp_path: Path) -> None:
    tracks = {"a": InverseGamma(), "b": HalfLife(9, ramp=0.1), "c": Power(gamma=3)}
    save_run(tmp_path, steps=10, decay=tracks)
    found = read(tmp_path)
    assert times(found) == [(10, "c", 10.0)]
    assert [repr(tracks[track]) in note for track, note in zip("ab", found.notes, strict=True)] == [True, True]
    save_run(tmp_path / "other", steps=10, decay=Warmed())
    with pytest.raises(checkpoint.CheckpointError, match="Warmed"):
        read(tmp_path / "other")


class Warmed:
    """A law of a user."""

    def decay(self, *, time: float, elapsed: float, step: int) -> float:  # noqa: ARG002
        return 0.5


def test_a_number_counts_where_it_was_taken_once_in_each_unit(tmp_path: Path) -> None:
    save_run(tmp_path / "each", decay=0.9)
    assert len(read(tmp_path / "each").snapshots) == 4
    for name, settings in {"interval": {"update_interval": 2}, "tokens": {"elapsed": 64}}.items():
        save_run(tmp_path / name, decay=0.9, **settings)
        with pytest.raises(checkpoint.CheckpointError, match="once per unit"):
            read(tmp_path / name)


def test_checkpoints_before_a_reset_are_ignored(tmp_path: Path) -> None:
    """A reset sets the clock back: older checkpoints are averages over other values."""
    ema = save_run(tmp_path, steps=20)
    ema.reset()
    for step in range(21, 41):
        ema.update()
        if step % 5 == 0:
            checkpoint.save({"ema": ema}, tmp_path, step=step, keep=None)
    found = read(tmp_path)
    assert times(found) == [(step, "default", step - 20.0) for step in (25, 30, 35, 40)]
    assert len(found.notes) == 2
    for hidden in (20, 25, 30):
        shutil.rmtree(tmp_path / f"step-{hidden:010}")
    found = read(tmp_path)
    assert times(found)[0] == (10, "default", 10.0), "the clock cannot tell"
    (note,) = found.notes
    assert re.search(r"10 and 35.*reset\(\)", note)


@pytest.mark.parametrize(("before", "after"), [(HalfLife(9), HalfLife(5)), (HalfLife(9), Power(gamma=2))])
def test_a_law_that_changed_ends_a_track(tmp_path: Path, before: Any, after: Any) -> None:  # noqa: ANN401
    save_run(tmp_path, steps=20, decay=before)
    model = nn.Linear(2, 1)
    ema = ShardedEMA(model, decay=after)
    with pytest.warns(UserWarning, match=" -> "):
        checkpoint.load({"ema": ema}, tmp_path)
    ema.update()
    checkpoint.save({"ema": ema}, tmp_path, step=21, keep=None)
    found = read(tmp_path)
    assert times(found) == [(10, "default", 10.0), (20, "default", 20.0)]
    shutil.rmtree(tmp_path / "step-0000000010")
    shutil.rmtree(tmp_path / "step-0000000020")
    with pytest.raises(checkpoint.CheckpointError, match="changed during"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("length", "step", "window", "coefficients", "variation"),
    [
        (10, None, (30, 40), [-3, 4], 0),
        (20, 30, (10, 30), [-0.5, 1.5], 0),
        (12, 39, (30, 40), [-3, 4], 0.25),
        (38, None, (0, 40), [1], 0.05),
        (40, None, (0, 40), [1], 0),
    ],
)
def test_a_window_is_the_difference_of_two_means(
    length: float,
    step: int | None,
    window: tuple[float, float],
    coefficients: list[float],
    variation: float,
    tmp_path: Path,
) -> None:
    save_run(tmp_path)
    found = choose_snapshots(read(tmp_path), Window(length), step=step)
    assert found.window == window
    assert found.fit.coefficients == pytest.approx(coefficients)
    assert found.fit.total_variation == pytest.approx(variation, abs=1e-9)


def test_snapshots_that_hardly_count_are_not_read(tmp_path: Path) -> None:
    save_run(tmp_path, decay={"a": Power(sigma_rel=0.05), "b": Power(sigma_rel=0.10)})
    snapshots = read(tmp_path)
    found = choose_snapshots(snapshots, Power(sigma_rel=0.09))
    assert len(found.snapshots) < len(snapshots.snapshots)
    assert found.fit.total_variation < 0.02
    assert found.nearest.step == 40
    assert {it.step for it in choose_snapshots(snapshots, Power(sigma_rel=0.09), step=30).snapshots} <= {10, 20, 30}
