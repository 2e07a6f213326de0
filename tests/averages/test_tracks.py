"""Several averages of one model: each is what it would be alone, and is asked for by its name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_dist import HalfLife, ShardedEMA, checkpoint
from tests.support.cli_runs import load_exported, run_ok
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    assert_bitwise_equal,
    full_weights,
    layouts,
    make_net,
    train_step,
    wrap,
)
from tests.support.reshard_cases import run_in_world

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


DECAYS: dict[str, Any] = {"short": HalfLife(1), "long": HalfLife(20)}

everywhere = layouts("plain", "ddp-3", "fsdp1", "fsdp2-3", "hsdp", "tp", "fsdp2-tp")


def together_and_alone(layout: str, **settings: Any) -> tuple[nn.Module, ShardedEMA, dict[str, ShardedEMA]]:  # noqa: ANN401
    """A trained model, the averages of all tracks, and each of them by itself."""
    model = wrap(layout, make_net(layout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = ShardedEMA(model, decay=DECAYS, **settings)
    alone = {track: ShardedEMA(model, decay=decay, **settings) for track, decay in DECAYS.items()}
    for step in range(5):
        train_step(model, optimizer, step)
        for each in (ema, *alone.values()):
            each.update()
    return model, ema, alone


@everywhere
@pytest.mark.parametrize("settings", [{}, {"start": 2, "update_interval": 2}, {"dtype": torch.float64}], ids=str)
def test_each_track_is_what_it_would_be_alone(layout: str, settings: dict[str, Any]) -> None:
    _, ema, alone = together_and_alone(layout, **settings)
    together = {track: ema.full_state_dict(track=track) for track in ema.tracks}
    for track, single in alone.items():
        assert_bitwise_equal(together[track], single.full_state_dict())
    if together["short"]:
        assert not torch.equal(together["short"]["head.weight"], together["long"]["head.weight"])


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_a_step_left_out_on_the_device_is_left_out_of_every_track(skipped: float) -> None:
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay={"short": 0.5, "long": 0.75})
    before = {track: ema.full_state_dict(track=track) for track in ema.tracks}
    with torch.no_grad():
        model.weight.add_(8)
    ema.update(found_inf=torch.tensor(skipped))
    moved = {track: ema.full_state_dict(track=track)["weight"] - before[track]["weight"] for track in ema.tracks}
    expected = {"short": 0.0, "long": 0.0} if skipped else {"short": 4.0, "long": 2.0}
    for track, step in expected.items():
        torch.testing.assert_close(moved[track], torch.full((3, 3), step))


@everywhere
def test_a_swap_exchanges_one_track_and_leaves_the_others(layout: str) -> None:
    model, ema, alone = together_and_alone(layout)
    live = full_weights(model)
    for track, single in alone.items():
        expected = {name: ema.full_state_dict(track=name) for name in ema.tracks}
        with single.swapped():
            averaged = full_weights(model)
        with ema.swapped(track):
            assert_bitwise_equal(full_weights(model), averaged)
            for name in ema.tracks:
                assert_bitwise_equal(ema.full_state_dict(track=name), expected[name])
        assert_bitwise_equal(full_weights(model), live)


@everywhere
def test_full_tensors_load_into_one_track(layout: str) -> None:
    _, ema, alone = together_and_alone(layout)
    ema.load_full_state_dict(make_net(layout, seed=1).state_dict(), track="short")
    alone["short"].load_full_state_dict(make_net(layout, seed=1).state_dict())
    for track, single in alone.items():
        assert_bitwise_equal(ema.full_state_dict(track=track), single.full_state_dict())
    target = make_net(layout, seed=2)
    ema.copy_to(target, track="long")
    single = alone["long"].full_state_dict()
    if single:
        assert_bitwise_equal(target.state_dict(), single)


@pytest.mark.world_size(4)
@pytest.mark.parametrize(("source_layout", "target_layout"), [("ddp", "fsdp2"), ("fsdp2", "hsdp"), ("hsdp", "plain")])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside a swap"])
def test_tracks_are_saved_and_resharded_by_name(
    source_layout: str,
    target_layout: str,
    inside: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    def save() -> None:
        _, ema, _ = together_and_alone(source_layout)
        torch.save(
            {track: ema.full_state_dict(track=track) for track in ema.tracks}, tmp_path / f"{dist.get_rank()}.pt"
        )
        if inside:
            with ema.swapped("long"):
                dcp.save({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")
        else:
            dcp.save({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")

    def load() -> None:
        ema = ShardedEMA(wrap(target_layout, make_net(source_layout, target_layout, seed=1)), decay=DECAYS)
        dcp.load({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")
        expected = torch.load(tmp_path / "0.pt")
        for track in ema.tracks:
            full = ema.full_state_dict(track=track)
            for name in full.keys() - {"frozen.weight", "frozen.bias"}:
                assert torch.equal(full[name], expected[track][name])
        assert ema.updates == 5

    run_in_world(4, tmp_path, save)
    run_in_world(1 if target_layout == "plain" else 4, tmp_path, load)


@pytest.mark.world_size(2)
def test_a_checkpoint_without_averages_starts_every_track(tmp_path: Path) -> None:
    model = DistributedDataParallel(make_net("ddp"))
    checkpoint.save({"model": model}, tmp_path, step=1)
    other = DistributedDataParallel(make_net("ddp", seed=1))
    ema = ShardedEMA(other, decay=DECAYS)
    with pytest.warns(UserWarning, match="'ema'.*live weights.*step 0"):
        checkpoint.load({"model": other, "ema": ema}, tmp_path)
    for track in ema.tracks:
        if full := ema.full_state_dict(track=track):
            assert_bitwise_equal(full, full_weights(model))


def test_a_checkpoint_of_other_tracks_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, ema, _ = together_and_alone("plain")
    checkpoint.save({"model": model, "ema": ema}, tmp_path, step=1)
    for decay, tracks in (({"short": 0.5, "other": 0.5}, r"\['short', 'other'\]"), (0.5, r"\['default'\]")):
        other = ShardedEMA(make_net("plain", seed=1), decay=decay)
        before = {track: other.full_state_dict(track=track) for track in other.tracks}
        with pytest.raises(RuntimeError, match=rf"tracks.*{tracks}.*\['long', 'short'\]"):
            checkpoint.load({"ema": other}, tmp_path)
        with pytest.raises(ValueError, match=rf"tracks.*{tracks}.*\['short', 'long'\]"):
            other.load_state_dict(ema.state_dict())
        for track, full in before.items():
            assert_bitwise_equal(other.full_state_dict(track=track), full)


def test_the_command_line_names_tracks(tmp_path: Path) -> None:
    model, ema, _ = together_and_alone("plain")
    checkpoint.save({"model": model, "ema": ema}, tmp_path / "root", step=5)
    for track in ema.tracks:
        run_ok("export", tmp_path / "root", tmp_path / track, "--track", track)
        assert_bitwise_equal(load_exported(tmp_path / track), ema.full_state_dict(track=track))
        assert re.search(rf"track.*\b{track}\b.*half-life", run_ok("inspect", tmp_path / "root"))
    run_ok("verify", tmp_path / "root")


def test_a_track_must_be_named_where_none_is_called_default() -> None:
    _, ema, _ = together_and_alone("plain")
    for call in (ema.full_state_dict, ema.gather, ema.swapped, ema.serving, lambda: ema.copy_to(ema.model)):
        with pytest.raises(ValueError, match=r"\['short', 'long'\].*None"):
            call()
    with pytest.raises(ValueError, match=r"\['short', 'long'\].*'medium'"):
        ema.full_state_dict(track="medium")
    several = ShardedEMA(nn.Linear(2, 2), decay={"default": 0.5, "long": 0.9})
    assert_bitwise_equal(several.full_state_dict(), several.full_state_dict(track="default"))


@pytest.mark.parametrize("decay", [{}, {"": 0.5}, {"a.b": 0.5}, {1: 0.5}], ids=str)
def test_tracks_without_a_usable_name_are_refused(decay: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=f"decay.*tracks?.*{re.escape(repr(decay))}"):
        ShardedEMA(nn.Linear(2, 2), decay=decay)


def test_all_decays_are_in_the_summary() -> None:
    assert "{'short': HalfLife(1), 'long': HalfLife(20)}" in repr(together_and_alone("plain")[1])
