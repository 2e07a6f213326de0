"""The swap: averages and live weights change places in the model's own storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ema_dist.averages.track import Track
from ema_dist.communication.replica_collectives import all_gather_parts
from ema_dist.evaluation.active import ActiveRegistry
from ema_dist.kernels import exchange_, group_pairs
from ema_dist.sharding import Layout, Shard

_active_swaps: ActiveRegistry[Swap] = ActiveRegistry()


class Swap:
    """The averages of one track are in the model, from construction until `leave`.

    If an average and its live part have the same dtype and device, they exchange values. Another dtype would round the
    average, and another device may have no memory for it. Then the average stays in its storage: the live part is
    stashed on the device of the average, and a cast copy of the average is written into the model.
    Finally, weights that replicas split are filled from every replica's part.

    Collective: over the replicas of split weights.
    Memory: one scratch of `ema_dist.kernels`; for averages of another dtype or device, the live part beside them.
    """

    def __init__(self, layout: Layout, track: Track) -> None:
        self.layout = layout
        self.track = track
        self._is_restored = False
        self._written: list[str] = []
        pairs = _pairs(layout, track)
        self._stash = {
            name: live.to(average.device, copy=True)
            for name, (average, live) in pairs.items()
            if (average.dtype, average.device) != (live.dtype, live.device)
        }
        self._swap_tensors(pairs)
        try:
            _copy_pairs(
                (live, track.value_for_dtype(name, live.dtype))
                for name, (_, live) in pairs.items()
                if name in self._stash
            )
            all_gather_parts(layout.parameters.values())
        except BaseException:
            # Another replica failed: restore this rank's averages and its parts of the live weights, at least.
            self._restore(pairs)
            raise
        self._versions = {name: layout.parameters[name].version for name in track.parameters}
        _active_swaps.add(self)

    def averages_now(self, layout: Layout) -> dict[str, Tensor]:
        """The tensors that hold the averages at present, by name; in the stored dtype, without residuals."""
        return {
            name: average if self._is_restored or name in self._stash else live
            for name, (average, live) in _pairs(layout, self.track).items()
        }

    def leave(self, layout: Layout) -> list[str]:
        """Put the live weights back, bit-identical. Returns the names of parameters that were written to.

        It can be called again if gathering the replicas' parts fails.

        Args:
            layout: the model as it is now.
        """
        if not self._is_restored:
            self._written = [name for name in self._versions if self._was_written(name, layout.parameters[name])]
            pairs = _pairs(layout, self.track)
            self._keep_written_buffers(pairs)
            self._restore(pairs)
            self._is_restored = True
        all_gather_parts(layout.parameters.values())
        _active_swaps.remove(self)
        return self._written

    def live_tensors(self) -> Iterator[tuple[Shard, Tensor]]:
        """Each swapped tensor's shard, and its live value wrapped as DCP saves it.

        The value shares storage with this rank's part of the live tensor: the average's storage, or the stash.
        Raises: RuntimeError when the model was moved or cast since the swap.
        """
        self.layout.refresh_buffers()
        if self.layout.has_moved():
            raise RuntimeError("the model was moved or cast inside swapped(); leave the block before saving")
        for name, (average, live) in _pairs(self.layout, self.track).items():
            live_value = live if self._is_restored else self._stash.get(name, average)
            shard = self.layout.parameters[name] if name in self.track.parameters else self.layout.buffers[name]
            yield shard, shard.averaged_part.wrap(live_value)

    def _was_written(self, name: str, shard: Shard) -> bool:
        swapped_in = self.layout.parameters[name]
        if shard.local.numel() and shard.local.data_ptr() == swapped_in.local.data_ptr():
            return shard.version != self._versions[name]
        # The first forward pass of FSDP2 moves uneven shards to other storage: compare values instead of versions.
        return shard.local.dtype != swapped_in.local.dtype or not torch.equal(
            _as_bytes(shard.local), _as_bytes(swapped_in.local)
        )

    def _restore(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._swap_tensors(pairs)
        _copy_pairs((pairs[name][1], stashed) for name, stashed in self._stash.items())

    def _swap_tensors(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        exchange_(group_pairs(pair for name, pair in pairs.items() if name not in self._stash))

    @torch.no_grad()
    def _keep_written_buffers(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name in self._stash.keys() & self.track.buffers.keys():
            average, live = pairs[name]
            # Only if written: copying the cast value back would round the average at each swap.
            if not torch.equal(average.to(live), live):
                average.copy_(live)


def active_swaps(model: nn.Module) -> list[Swap]:
    """The active swaps of ``model``, of its submodules, and of modules around it."""
    return _active_swaps.overlapping(model)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, which compare equal also for NaN."""
    return tensor.flatten().view(torch.uint8)


def _pairs(layout: Layout, track: Track) -> dict[str, tuple[Tensor, Tensor]]:
    return track.parameter_pairs(layout) | track.buffer_pairs(layout)


@torch.no_grad()
def _copy_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for targets, sources in group_pairs(pairs):
        torch._foreach_copy_(targets, sources)
