"""A folder has its name exactly if its checkpoint is complete; a damaged checkpoint is reported and skipped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ema_dist import ShardedEMA, checkpoint
from tests.support.layouts import make_net, wrap


@pytest.mark.parametrize("settings", [{"step": -1}, {"step": 0, "keep": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=".*".join(f"{name}={value}" for name, value in settings.items())):
        checkpoint.save({"x": 1}, tmp_path, **settings)


def save_numbers(root: Path, *steps: int, **settings: Any) -> None:  # noqa: ANN401
    for step in steps:
        checkpoint.save({"x": torch.full((100,), float(step)), "n": step}, root, step=step, **settings)


def loaded_number(root: Path) -> float:
    state = {"x": torch.zeros(100)}
    checkpoint.load(state, root)
    return state["x"][0].item()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-0000000003", "step-0000000004"]
    save_numbers(tmp_path, 5, 6, keep=None)
    assert checkpoint.latest(tmp_path) == 6
    assert len(names(tmp_path)) == 4


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1)
    checkpoint.save({"x": torch.full((100,), 8.0)}, tmp_path, step=1)
    assert names(tmp_path) == ["step-0000000001"]
    assert loaded_number(tmp_path) == 8


def test_checkpoints_of_a_run_that_was_rolled_back_are_set_aside(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 2, 3)
    with pytest.warns(UserWarning, match=r"step-0000000003\b.*\b2\b.*step-0000000003\.superseded"):
        save_numbers(tmp_path, 2)
    assert names(tmp_path) == ["step-0000000001", "step-0000000002", "step-0000000003.superseded"]
    assert loaded_number(tmp_path) == 2


def test_unfinished_checkpoints_are_not_loaded_and_are_removed(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 2)
    (tmp_path / "step-0000000002").rename(tmp_path / "step-0000000002.partial")
    assert loaded_number(tmp_path) == 1
    save_numbers(tmp_path, 3)
    assert names(tmp_path) == ["step-0000000001", "step-0000000003"]


def test_a_checkpoint_about_to_be_replaced_counts_until_the_other_has_its_name(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 2)
    (tmp_path / "step-0000000002").rename(tmp_path / "step-0000000002.replaced")
    assert loaded_number(tmp_path) == 2
    save_numbers(tmp_path, 2)
    assert names(tmp_path) == ["step-0000000001", "step-0000000002"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_checkpoint_is_reported_and_skipped(damage: Any, name: str, tmp_path: Path) -> None:  # noqa: ANN401
    save_numbers(tmp_path, 1, 2)
    damage(tmp_path / "step-0000000002" / name)
    with pytest.warns(UserWarning, match=rf"step-0000000001.*step-0000000002.*{name}"):
        assert loaded_number(tmp_path) == 1
    with pytest.raises(checkpoint.CheckpointError, match=rf"\bno \w+ checkpoint.*step-0000000002.*{name}"):
        checkpoint.load({"x": torch.zeros(100)}, tmp_path, step=2)
    shutil.rmtree(tmp_path / "step-0000000001")
    state = {"x": torch.zeros(100)}
    with pytest.raises(checkpoint.CheckpointError, match=rf"\bno \w+ checkpoint.*step-0000000002.*{name}"):
        checkpoint.load(state, tmp_path)
    assert not state["x"].any()


@pytest.mark.world_size(3)
def test_damage_found_by_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    ema = ShardedEMA(wrap("fsdp2-3", make_net("fsdp2-3")))
    for step in (1, 2):
        ema.update()
        checkpoint.save({"ema": ema}, tmp_path, step=step)
    if dist.get_rank() == 0:
        flip_a_bit(tmp_path / "step-0000000002" / "__1_0.distcp")
    dist.barrier()
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match=r"(?=.*checksum).*__1_0\.distcp"):
            assert checkpoint.load({"ema": ema}, tmp_path) == 1
    else:
        assert checkpoint.load({"ema": ema}, tmp_path) == 1
    assert ema.steps == 1


def test_a_checkpoint_under_the_name_of_another_step_is_not_taken_for_it(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1, 2)
    (tmp_path / "step-0000000001").rename(tmp_path / "step-0000000007")
    with pytest.warns(UserWarning, match=r"step-0000000007\b.*manifest\.json.*\bstep 1\b"):
        assert loaded_number(tmp_path) == 2


@pytest.mark.parametrize("step", [True, 2.0, "2"])
def test_a_step_that_is_no_whole_number_is_refused(step: Any, tmp_path: Path) -> None:  # noqa: ANN401
    with pytest.raises((TypeError, ValueError), match=r"step|integer"):
        checkpoint.save({"x": 1}, tmp_path, step=step)
    assert not names(tmp_path)


def test_a_failed_cleanup_does_not_fail_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rmtree(_: object) -> None:
        raise OSError("busy")

    save_numbers(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    save_numbers(tmp_path, 3, keep=1)
    assert loaded_number(tmp_path) == 3


def test_nothing_to_load_is_an_error(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "nowhere") is None
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint.*nowhere.*no such folder"):
        checkpoint.load({}, tmp_path / "nowhere")
    save_numbers(tmp_path, 1)
    with pytest.raises(checkpoint.CheckpointError, match=r"\bstep 5\b.*\[1\]"):
        checkpoint.load({}, tmp_path, step=5)


@pytest.mark.world_size(2)
def test_a_failed_save_leaves_the_older_ones_and_raises_on_every_rank(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1)
    make_writing_fail()
    with pytest.raises(checkpoint.CheckpointError, match=r"^(?!.*background).*step-0000000002\b.*\[1\].*OSError: full"):
        save_numbers(tmp_path, 2)
    assert loaded_number(tmp_path) == 1


@pytest.mark.world_size(2)
def test_a_save_that_failed_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    save_numbers(tmp_path, 1)
    make_writing_fail()
    save_numbers(tmp_path, 2, block=False)
    with pytest.raises(RuntimeError, match=r"background.*step-0000000002\b.*\[1\].*OSError: full"):
        save_numbers(tmp_path, 3)
    assert loaded_number(tmp_path) == 1
    save_numbers(tmp_path, 4, block=False)
    with pytest.raises(checkpoint.CheckpointError, match=r"background.*step-0000000004\b.*\[1\].*OSError: full"):
        checkpoint.wait()
    checkpoint.wait()


def make_writing_fail() -> None:
    """Make writing fail on rank 1, as on a full disk."""
    from ema_dist.checkpoint import writer  # noqa: PLC0415  in this rank's process only

    def write(*_: object) -> int:
        raise OSError("full")

    if dist.get_rank() == 1:
        writer.HashingStream.write = write
