"""Live weights and averages change places in the model's own storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ema_dist.averages.storage import Averages
from ema_dist.communication.replicas import all_gather_parts
from ema_dist.evaluation.active import ActiveRegistry
from ema_dist.kernels import group_pairs, swap_
from ema_dist.sharding import Layout, Shard

_active_swaps: ActiveRegistry[Swap] = ActiveRegistry()


class Swap:
    """One stay of the averages in the model, from construction until `leave`.

    Where dtypes are equal, an average changes places with the part of the live weight beside it. Where they differ
    that would round the average, so it stays where it is: the live part is stashed, a rounded copy goes in its place.
    So it does on another device, as there may be no room for it on that of the live part, which is stashed beside it.
    Either way, weights that replicas share are then filled from every replica's part.

    Collective: over the replicas of split weights.
    Memory: one scratch of `ema_dist.kernels`, and one live part where dtypes or devices differ, beside the average.
    """

    def __init__(self, layout: Layout, averages: Averages) -> None:
        self.layout = layout
        self.averages = averages
        self._is_restored = False
        self._written: list[str] = []
        pairs = _pairs(layout, averages)
        self._stash = {
            name: live.to(average.device, copy=True)
            for name, (average, live) in pairs.items()
            if (average.dtype, average.device) != (live.dtype, live.device)
        }
        self._swap_tensors(pairs)
        try:
            _copy_pairs(
                (live, averages.value_for_dtype(name, live.dtype))
                for name, (_, live) in pairs.items()
                if name in self._stash
            )
            all_gather_parts(layout.parameters.values())
        except BaseException:
            # A replica is gone: at least this rank's parts of the live weights, and its averages, are themselves again.
            self._restore(pairs)
            raise
        self._versions = {name: layout.parameters[name].version for name in averages.parameters}
        _active_swaps.add(self)

    def current(self, layout: Layout) -> dict[str, Tensor]:
        """Where the averages are now, as they are kept: parameters' parts and buffers by name."""
        return {
            name: average if self._is_restored or name in self._stash else live
            for name, (average, live) in _pairs(layout, self.averages).items()
        }

    def leave(self, layout: Layout) -> list[str]:
        """Put the live weights back, to the bit; the names of parameters that were written to meanwhile.

        When replicas fail while they fill each other's weights, it can be called again.
        """
        if not self._is_restored:
            self._written = [name for name in self._versions if self._was_written(name, layout.parameters[name])]
            pairs = _pairs(layout, self.averages)
            self._keep_written_buffers(pairs)
            self._restore(pairs)
            self._is_restored = True
        all_gather_parts(layout.parameters.values())
        _active_swaps.remove(self)
        return self._written

    def live(self) -> Iterator[tuple[Shard, Tensor]]:
        """What the model holds in exchange for each of its live tensors, and the live one as DCP saves it.

        The second shares storage with this rank's part of the live tensor, wherever that lies now.
        Raises: RuntimeError when the model left the storage in which they changed places.
        """
        self.layout.refresh_buffers()
        if self.layout.has_moved():
            raise RuntimeError("the model was moved or cast inside swapped(); leave the block before saving")
        for name, (average, live) in _pairs(self.layout, self.averages).items():
            live_value = live if self._is_restored else self._stash.get(name, average)
            shard = self.layout.parameters[name] if name in self.averages.parameters else self.layout.buffers[name]
            yield shard, shard.averaged_part.wrap(live_value)

    def _was_written(self, name: str, now: Shard) -> bool:
        before = self.layout.parameters[name]
        if now.local.numel() and now.local.data_ptr() == before.local.data_ptr():
            return now.version != self._versions[name]
        # FSDP2 moves uneven shards when it first runs forward: what matters is whether they are what they were.
        return now.local.dtype != before.local.dtype or not torch.equal(_as_bytes(now.local), _as_bytes(before.local))

    def _restore(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._swap_tensors(pairs)
        _copy_pairs((pairs[name][1], stashed) for name, stashed in self._stash.items())

    def _swap_tensors(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        swap_(group_pairs(pair for name, pair in pairs.items() if name not in self._stash))

    @torch.no_grad()
    def _keep_written_buffers(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name in self._stash.keys() & self.averages.buffers.keys():
            average, live = pairs[name]
            if not torch.equal(average.to(live), live):
                average.copy_(live)


def active_swaps(model: nn.Module) -> list[Swap]:
    """The exchanges that are under way in ``model``, or in a part of it, or in something that it is a part of."""
    return _active_swaps.overlapping(model)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Equal to those of a tensor with the same values, NaN among them."""
    return tensor.flatten().view(torch.uint8)


def _pairs(layout: Layout, averages: Averages) -> dict[str, tuple[Tensor, Tensor]]:
    return averages.parameter_pairs(layout) | averages.buffer_pairs(layout)


@torch.no_grad()
def _copy_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for targets, sources in group_pairs(pairs):
        torch._foreach_copy_(targets, sources)
