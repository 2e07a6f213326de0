"""The swap: exchanges averages and live weights in the model's own storage, and can be undone after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum, auto

import torch
from torch import Tensor, nn

from ema_dist.averages.track import Track
from ema_dist.communication.replica_collectives import prepare_all_gather_parts
from ema_dist.evaluation.active import ActiveRegistry
from ema_dist.kernels import Exchange, copy_pairs, group_pairs
from ema_dist.sharding import Layout, Shard, has_equal_bits

_active_swaps: ActiveRegistry[Swap] = ActiveRegistry()


class SwapStage(Enum):
    """How far a swap has got. A writing stage is set before its first write, a finished one after the last write."""

    NEW = auto()
    """Nothing is written."""
    ENTERING = auto()
    """This rank's parts of the averages are being written into the model."""
    FILLING = auto()
    """Replicas are filling the rest of the model with each other's averages."""
    INSIDE = auto()
    """The model holds the averages."""
    LEAVING = auto()
    """This rank's parts of the live weights are being written back."""
    PARTS_RESTORED = auto()
    """This rank's averages and its parts of the live weights are back."""
    FILLING_BACK = auto()
    """Replicas are filling the rest of the model with each other's live weights."""
    DONE = auto()
    """The live weights are back."""


class Swap:
    """Puts the averages of one track into the model, and keeps a journal of the writes so that they can be undone.

    An exception may end any of its methods between two bytecodes. `restore_parts` then puts this rank's averages and
    its parts of the live weights back, bit-identical. An exception in `fill` or `fill_back` breaks the swap: other
    ranks may wait for this one in a collective, and it is unknown which of its weights they hold.

    If an average and its live part have the same dtype and device, they exchange values. A different dtype would round
    the average, and a different device may have no memory for it. In these cases the average stays in its storage: the
    live part is stashed on the device of the average, and a cast copy of the average is written into the model.
    Finally, weights that replicas split are filled from every replica's part.

    Args:
        layout: the live weights.
        track: the averages.

    Memory: while it writes, one scratch of `ema_dist.kernels`, then those of `prepare_all_gather_parts`; from
        construction on, the stashed live parts.
    """

    def __init__(self, layout: Layout, track: Track) -> None:
        self.layout = layout
        self.track = track
        self.stage = SwapStage.NEW
        self._is_split = any(shard.is_split for shard in layout.shards)
        self._pairs = _pairs(layout, track)
        """The averages and live parts to exchange, as read on entering; read again when leaving begins."""
        stashed = {
            name: live
            for name, (average, live) in self._pairs.items()
            if (average.dtype, average.device) != (live.dtype, live.device)
        }
        self._stash = {
            name: torch.empty_like(live, device=self._pairs[name][0].device) for name, live in stashed.items()
        }
        copy_pairs((self._stash[name], live) for name, live in stashed.items())
        self._exchange = self._make_exchange(self._pairs)
        self._fill: Callable[[], None] | None = None
        self._versions: dict[str, tuple[object, ...]] = {}
        self.written: list[str] = []
        """The parameters that were written to while the model held the averages; known once leaving has begun."""

    @property
    def is_broken(self) -> bool:
        """Whether an exception interrupted `fill` or `fill_back`; meaningful only while neither runs."""
        return self.stage in (SwapStage.FILLING, SwapStage.FILLING_BACK)

    @property
    def has_filled(self) -> bool:
        """Whether rows that other replicas own may be overwritten here, so that leaving needs those replicas."""
        return self._is_split and self.stage not in (SwapStage.NEW, SwapStage.ENTERING, SwapStage.DONE)

    def write_parts(self) -> None:
        """Write this rank's parts of the averages into the model."""
        self.stage = SwapStage.ENTERING
        _active_swaps.add(self)
        self._exchange.run()
        copy_pairs(
            (live, self.track.value_for_dtype(name, live.dtype))
            for name, (_, live) in self._pairs.items()
            if name in self._stash
        )
        self._prepare_fill(self.layout)

    def fill(self) -> None:
        """Fill weights that replicas split with the other replicas' averages; the model then holds the averages.

        Collective: over the replicas of split weights.
        """
        if self._is_split:
            self._run_fill(during=SwapStage.FILLING, after=SwapStage.INSIDE)
        else:
            self.stage = SwapStage.INSIDE
        _increment_other_versions(self.layout)
        self._versions = {name: self.layout.parameters[name].version for name in self.track.parameters}

    def restore_parts(self, layout: Layout) -> None:
        """Put this rank's averages and its parts of the live weights back; does nothing if they are back.

        Ends the swap, unless `has_filled`: then `fill_back` ends it.

        Args:
            layout: the model as it is now.
        """
        if self.stage is SwapStage.PARTS_RESTORED:
            self._prepare_fill(layout)
        if self.stage in (SwapStage.PARTS_RESTORED, SwapStage.DONE):
            return
        if self.stage is SwapStage.INSIDE:
            self.written = [name for name in self._versions if self._was_written(name, layout.parameters[name])]
            pairs = _pairs(layout, self.track)
            self._keep_written_buffers(pairs)
            self._exchange = self._make_exchange(pairs, is_exchanged=True)
            self._pairs = pairs
            self.stage = SwapStage.LEAVING
        if self.stage is not SwapStage.NEW:
            self._exchange.run_back()
            copy_pairs((self._pairs[name][1], stashed) for name, stashed in self._stash.items())
            # An interrupted swap is undone in the storage in which it began, from which the model may have moved since.
            copy_pairs(
                (live, self._pairs[name][1])
                for name, (_, live) in _pairs(layout, self.track).items()
                if live.data_ptr() != self._pairs[name][1].data_ptr()
            )
        _increment_other_versions(layout)
        if self.has_filled:
            self.stage = SwapStage.PARTS_RESTORED
            self._prepare_fill(layout)
        else:
            self._end()

    def fill_back(self) -> None:
        """Fill weights that replicas split with the other replicas' live weights; ends the swap.

        Collective: over the replicas of split weights.
        """
        self._run_fill(during=SwapStage.FILLING_BACK, after=SwapStage.DONE)
        self._end()

    def averages_now(self, layout: Layout) -> dict[str, Tensor]:
        """The tensors that hold the averages at present, by name; in the stored dtype, without residuals."""
        return {
            name: average if name in self._stash else live
            for name, (average, live) in _pairs(layout, self.track).items()
        }

    def live_tensors(self) -> Iterator[tuple[Shard, Tensor]]:
        """Each swapped tensor's shard, and its live value wrapped as DCP saves it.

        The value shares storage with this rank's part of the live tensor: the average's storage, or the stash.
        Raises: RuntimeError when the model was moved or cast since the swap, or when the swap was interrupted.
        """
        if self.stage is not SwapStage.INSIDE:
            raise RuntimeError("swapped() was interrupted: call restore() on every rank before saving")
        if self.layout.has_moved():
            raise RuntimeError("the model was moved or cast inside swapped(); leave the block before saving")
        layout = self.layout.reread()  # modules may have replaced buffers
        for name, (average, _) in _pairs(layout, self.track).items():
            shard = layout.parameters[name] if name in self.track.parameters else layout.buffers[name]
            yield shard, shard.averaged_part.wrap(self._stash.get(name, average))

    def _prepare_fill(self, layout: Layout) -> None:
        if self._is_split:
            self._fill = prepare_all_gather_parts(layout.parameters.values())

    def _run_fill(self, *, during: SwapStage, after: SwapStage) -> None:
        fill, self._fill = self._fill, None
        assert fill is not None
        self.stage = during
        fill()
        self.stage = after

    def _end(self) -> None:
        self.stage: SwapStage = SwapStage.DONE
        _active_swaps.remove(self)

    def _was_written(self, name: str, shard: Shard) -> bool:
        swapped_in = self.layout.parameters[name]
        if shard.local.numel() and shard.local.data_ptr() == swapped_in.local.data_ptr():
            return shard.version != self._versions[name]
        # The first forward pass of FSDP2 moves uneven shards to other storage: compare values instead of versions.
        return not has_equal_bits(shard.local, swapped_in.local)

    def _make_exchange(self, pairs: dict[str, tuple[Tensor, Tensor]], *, is_exchanged: bool = False) -> Exchange:
        exchanged_pairs = (pair for name, pair in pairs.items() if name not in self._stash)
        return Exchange(group_pairs(exchanged_pairs), is_exchanged=is_exchanged)

    @torch.no_grad()
    def _keep_written_buffers(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name in self._stash.keys() & self.track.buffers.keys():
            average, live = pairs[name]
            # Only if written: copying the cast value back would round the average at each swap.
            if not has_equal_bits(average.to(live), live):
                average.copy_(live)


def active_swaps(model: nn.Module) -> list[Swap]:
    """The active swaps of ``model``, of its submodules, and of modules that contain it."""
    return [swap for swap in _active_swaps.overlapping(model) if swap.stage is not SwapStage.DONE]


def require_live_weights(model: nn.Module, call: str) -> None:
    """Raise RuntimeError while averages are swapped into ``model``, a submodule, or a module that contains it."""
    if active_swaps(model):
        raise RuntimeError(
            f"{call}: a ShardedEMA has its averages in this model; leave its swapped() first, or call its restore()"
        )


def _increment_other_versions(layout: Layout) -> None:
    """Let autograd notice the writes in other parameters that share memory with the tensors written to."""
    for shard in layout.shards:
        shard.increment_other_versions()


def _pairs(layout: Layout, track: Track) -> dict[str, tuple[Tensor, Tensor]]:
    return track.parameter_pairs(layout) | track.buffer_pairs(layout)
