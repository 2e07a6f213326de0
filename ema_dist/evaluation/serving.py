"""The forward pass reads the averages, and the live weights stay where they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, MutableSet
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ema_dist.averages.tracks import Averages
from ema_dist.communication.replicas import fill_from_parts
from ema_dist.evaluation.active import Stays
from ema_dist.kernels import lerp_, paired
from ema_dist.messages import few
from ema_dist.sharding import Layout, Shard, Stage, obstacle, replays_graphs

THEMSELVES = "the averages themselves"
CAST = "a cast copy"
MOVED = "a copy on the model's device"
GATHERED = "a gathered copy"

_stays: Stays[Serving] = Stays()

_told: MutableSet[Averages] = WeakSet()
"""Those of which a warning has said that serving them takes a swap."""


class _Scene(NamedTuple):
    """A stage, and the tensors on it that are copies: each as a shard, with the average that belongs into its part."""

    stage: Stage
    copies: list[tuple[Shard, Tensor]]


class Serving:
    """How the averages of one track reach the forward passes of a model that still is as ``layout`` shows it."""

    def __init__(self, layout: Layout, averages: Averages) -> None:
        self.layout = layout
        self.is_on = False
        self._averages = averages
        self._obstacle = obstacle(layout)
        self._modules = list(layout.model.modules())
        pairs = {name: (layout.parameters[name], average) for name, average in averages.parameters.items()}
        self._copied = {name: shard for name, (shard, average) in pairs.items() if not _fits(average, shard)}
        self._lasting: _Scene | None = None

    @property
    def by(self) -> str:
        """What forward passes read: the costliest of the ways in which averages of parameters are served."""
        if reason := self._reason_to_swap():
            return f"swapped(), since {reason}"
        if any(shard.is_split for shard in self._copied.values()):
            return GATHERED
        if any(self._averages.parameters[name].device != shard.local.device for name, shard in self._copied.items()):
            return MOVED
        return CAST if self._copied else THEMSELVES

    @contextmanager
    def on(self, swapped: Callable[[], AbstractContextManager[nn.Module]]) -> Iterator[nn.Module]:
        """Forward passes in the ``with`` block read the averages, without gradients; or ``swapped`` has to do.

        Collective: over the replicas of split weights, on entering.
        Memory: a copy of buffers, kept; of parameters those that `by` says are copied, for the time of the block.
        Raises: RuntimeError after the block, when parameters were written to, cast, moved, replaced, or given gradients
            in it.
        """
        with torch.no_grad():
            if reason := self._reason_to_swap():
                if self._averages not in _told:
                    _told.add(self._averages)
                    warnings.warn(f"serving() swaps the averages into the model: {reason}", stacklevel=5)
                with swapped() as model:
                    yield model
                return
            scene = self._set()
            self.is_on = True
            _stays.begin(self)
            try:
                scene.stage.enter()
                yield self.layout.model
            finally:
                self.is_on = False
                _stays.end(self)
                self._lasting = None  # unless what modules were shown is what it was
                changed, trained = scene.stage.leave()
                if not (changed or self._copied or scene.stage.is_touched):
                    self._lasting = scene
        if changed:
            raise RuntimeError(
                f"parameters were written to, cast, moved or replaced inside serving(): {few(changed)}. What was "
                "written may be in the averages, or under FSDP2 in the live weights: load them from a checkpoint"
            )
        if trained:
            raise RuntimeError(
                f"backward() inside serving() gave gradients to {few(trained)}: with activation checkpointing they may "
                "come from averages; call it after the block, or before"
            )

    def _reason_to_swap(self) -> str:
        if self._obstacle:
            return self._obstacle
        return "a module replays a CUDA graph, which reads fixed addresses" if replays_graphs(self._modules) else ""

    def _set(self) -> _Scene:
        """What the forward pass is to find, with the averages as they are now."""
        with torch.inference_mode(mode=False), torch.no_grad():  # what is kept must serve outside of it, too
            scene = self._lasting or self._build()
            for targets, sources in paired((copy.part.local, average) for copy, average in scene.copies):
                lerp_(targets, sources, 1.0)
            fill_from_parts(copy for copy, _ in scene.copies)
        return scene

    def _build(self) -> _Scene:
        parameters = self._averages.parameters
        # Of buffers always, as forward passes may write to them: what BatchNorm does in training mode goes nowhere.
        fresh = {name: shard.fresh() for name, shard in {**self._copied, **self.layout.buffers}.items()}
        locals_ = parameters | {name: shard.local for name, shard in fresh.items()}
        copies = [(shard, self._averages.shown(name, shard.local.dtype)) for name, shard in fresh.items()]
        return _Scene(Stage(self.layout, locals_), copies)


def servings_in(model: nn.Module) -> list[Serving]:
    """Those under way in ``model``, or in a part of it, or in something that it is a part of."""
    return _stays.within(model)


def _fits(average: Tensor, shard: Shard) -> bool:
    """Whether the average itself can take the place of the live shard."""
    if shard.is_split or (average.dtype, average.device) != (shard.local.dtype, shard.local.device):
        return False
    elements = average.untyped_storage().nbytes() // average.element_size() - average.storage_offset()
    return elements >= shard.room
