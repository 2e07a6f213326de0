"""Whether the live weights were written to since a mark, without a look at their values."""

from __future__ import annotations

from typing import Any
from weakref import WeakMethod, finalize

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ema_dist.averages.live_model import LiveModel
from ema_dist.sharding import Shard, untraced


class LiveWrites:
    """Notices writes to the averaged parameters of ``live``: by version counters, and by the steps of optimizers.

    Version counters alone do not suffice: fused optimizers do not increase them, and neither do the multi-tensor
    operations of sharded parameters. A write that goes through ``.data``, outside of an optimizer, is not noticed.
    """

    def __init__(self, live: LiveModel) -> None:
        self._live = live
        self._unwritten: dict[str, list[object]] = {}
        """The marks since which no write was noticed, with the versions of then."""
        self._is_paused = False
        note_step = WeakMethod(self._note_step)  # torch references the hook globally

        @untraced  # as torch.compile(optimizer.step) would trace it, at each mark anew
        def after_step(optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401  as torch calls it
            if (note := note_step()) is not None:
                note(optimizer)

        finalize(self, register_optimizer_step_post_hook(after_step).remove)

    def mark(self, name: str) -> None:
        """Set a mark, or move it here."""
        self._unwritten[name] = self._versions()

    def was_written_since(self, name: str) -> bool:
        """Whether a write was noticed since a mark; False for one that was never set."""
        self._drop_written()
        return name not in self._unwritten

    def pause(self) -> None:
        """Until `resume`, take no notice: the weights are exchanged with averages, and will be put back."""
        self._drop_written()
        self._is_paused = True

    def resume(self) -> None:
        """Take notice again, once the live weights are back."""
        self._is_paused = False
        for name in self._unwritten:
            self.mark(name)

    def _drop_written(self) -> None:
        if self._unwritten and not self._is_paused:
            versions = self._versions()
            self._unwritten = {name: then for name, then in self._unwritten.items() if then == versions}

    def _note_step(self, optimizer: Optimizer) -> None:
        # torch.distributed.checkpoint takes a step with learning rates of zero to initialize an optimizer.
        if not self._unwritten or all(
            isinstance(rate := group.get("lr"), int | float) and rate == 0 for group in optimizer.param_groups
        ):
            return
        owner_ids = {id(owner) for name in self._live.selected for owner in self._shard(name).owners.values()}
        if any(id(parameter) in owner_ids for group in optimizer.param_groups for parameter in group["params"]):
            self._unwritten.clear()

    def _versions(self) -> list[object]:
        return [self._shard(name).owner_versions for name in self._live.selected]

    def _shard(self, name: str) -> Shard:
        return self._live.layout.parameters[name]
