"""The averages of one track as this rank stores them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from ema_dist.averages.precision import Precision
from ema_dist.kernels import recombine, split_hi_lo
from ema_dist.sharding import Layout, Shard


class Averages:
    """The averages of one track beside the live weights: of parameters by their parts, of buffers whole.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        precision: how they are kept.
        lerped_buffers: names of the buffers that are averaged; the others are copied.
        device: where they are; None for where the live weights are.

    Memory: one part of every selected parameter, and the persistent buffers.
    """

    def __init__(
        self,
        layout: Layout,
        names: Collection[str],
        *,
        precision: Precision,
        averaged_buffers: Collection[str],
        device: torch.device | None = None,
    ) -> None:
        parts = {name: layout.parameters[name].averaged_part for name in names}
        self.parameters = {
            name: _initial_average(averaged_part, precision.storage_dtype(averaged_part.local.dtype), device)
            for name, averaged_part in parts.items()
        }
        buffer_precision = {
            name: precision.buffer_precision if name in averaged_buffers else None for name in layout.buffers
        }
        self.buffers = {
            name: _initial_average(
                shard,
                own_precision.storage_dtype(shard.local.dtype) if (own_precision := buffer_precision[name]) else None,
                device,
            )
            for name, shard in layout.buffers.items()
        }
        self.residuals = {
            name: torch.zeros_like(self.parameters[name], dtype=torch.int16)
            for name, averaged_part in parts.items()
            if precision.has_residuals(averaged_part.local.dtype)
        }
        """What averages of parameters lack, where they are kept in two halves."""
        self.find_infinities()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Averages of parameters and buffers by name, as they are kept."""
        return self.parameters | self.buffers

    def recombined(self, tensors: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The averages by name; those that are kept in two halves as float32, each made when it is asked for.

        Args:
            places: where `all` of them lie now, if the model has them.
        """
        return _Recombined(self.tensors if tensors is None else tensors, self.residuals)

    def clone_shared(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of what `numbers` gave: those that it had to make are such."""
        return {name: tensor if name in self.residuals else tensor.clone() for name, tensor in values.items()}

    def value_for_dtype(self, name: str, dtype: torch.dtype) -> Tensor:
        """What becomes a weight of this dtype: the average as it is kept, or its number where that says more."""
        stored = self._stored(name)
        return stored if stored.dtype == dtype else _recombine_if_split(stored, self.residuals.get(name))

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Take ``value`` over as an average, unless it lies there already."""
        stored = self._stored(name)
        if value.data_ptr() == stored.data_ptr():
            return
        if name in self.residuals:
            value, residual = split_hi_lo(value.float())
            self.residuals[name].copy_(residual)
        stored.copy_(value)

    def _stored(self, name: str) -> Tensor:
        return (self.parameters if name in self.parameters else self.buffers)[name]

    def parameter_pairs(self, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
        """Each average, and the part of the live parameter beside it."""
        return {
            name: (average, layout.parameters[name].averaged_part.local) for name, average in self.parameters.items()
        }

    def buffer_pairs(self, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
        """Each average, and the live buffer beside it: buffers are averaged whole."""
        return {name: (average, layout.buffers[name].local) for name, average in self.buffers.items()}

    def find_infinities(self) -> None:
        """Look once for averages with infinities (masks): they take the careful kernel. Waits for the device."""
        self.infinite_names = {name for name, average in self.parameters.items() if not _is_finite(average)}


class _Recombined(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], residuals: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._rests = residuals

    def __getitem__(self, name: str) -> Tensor:
        return _recombine_if_split(self._tensors[name], self._rests.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _recombine_if_split(stored: Tensor, residual: Tensor | None) -> Tensor:
    return stored if residual is None else recombine(stored, residual)


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves it without the temporaries of the exact look, which is only needed where the sum overflows.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _initial_average(shard: Shard, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    average = shard.empty_local(dtype, device)
    return average.copy_(shard.local.to(average.device))  # from one device to another first: casts take memory
