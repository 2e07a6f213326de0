"""The averages of one track as this rank stores them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from ema_dist.averages.precision import Precision
from ema_dist.kernels import copy_pairs, recombine, split_hi_lo
from ema_dist.sharding import Layout


class Track:
    """The averages of one track: this rank's `Shard.averaged_part` of each selected parameter, and whole buffers.

    Args:
        layout: the live weights.
        names: first canonical names of the parameters to average.
        precision: the dtype and the rounding of the averages.
        averaged_buffers: names of the buffers that are averaged; the others are copied.
        device: stores the averages; None for the device of each live weight.

    Memory: one average for the averaged part of each selected parameter, and for each persistent buffer.
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
        self.parameters: dict[str, Tensor] = {
            name: averaged_part.empty_local(precision.storage_dtype(averaged_part.local.dtype), device)
            for name, averaged_part in parts.items()
        }
        self.buffers: dict[str, Tensor] = {
            name: shard.empty_local(
                precision.buffer_precision.storage_dtype(shard.local.dtype) if name in averaged_buffers else None,
                device,
            )
            for name, shard in layout.buffers.items()
        }
        tensors = self.tensors
        copy_pairs((tensors[name], shard.local) for name, shard in (parts | layout.buffers).items())
        self.residuals: dict[str, Tensor] = {
            name: torch.zeros_like(self.parameters[name], dtype=torch.int16)
            for name, averaged_part in parts.items()
            if precision.has_residuals(averaged_part.local.dtype)
        }
        """The low 16 bits of averages that are stored as a bfloat16 and a residual (`Compensated`), by name."""
        self.refresh_infinite_names()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Averages of parameters and buffers by name, in the dtype they are stored in and without residuals."""
        return self.parameters | self.buffers

    def recombined(self, tensors: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The averages by name; those with residuals as float32, each recombined when it is read.

        Args:
            tensors: used instead of `tensors` while the averages are swapped into the model.
        """
        return _Recombined(self.tensors if tensors is None else tensors, self.residuals)

    def without_shared_storage(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``values`` of `recombined` without shared storage: recombined values are new tensors, others are cloned."""
        return {name: tensor if name in self.residuals else tensor.clone() for name, tensor in values.items()}

    def value_for_dtype(self, name: str, dtype: torch.dtype) -> Tensor:
        """The value to load into a weight of ``dtype``: the stored average, or the float32 one recombined from it.

        Only a dtype other than the stored one can represent the recombined value better.
        """
        stored = self._stored(name)
        return stored if stored.dtype == dtype else _recombine_if_split(stored, self.residuals.get(name))

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Store ``value`` as an average, unless it shares the average's storage because DCP has loaded it in place."""
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
        """Each average of a parameter, paired with the averaged part of the live parameter."""
        return {
            name: (average, layout.parameters[name].averaged_part.local) for name, average in self.parameters.items()
        }

    def buffer_pairs(self, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
        """Each average of a buffer, paired with the live buffer; replicas do not split buffers."""
        return {name: (average, layout.buffers[name].local) for name, average in self.buffers.items()}

    def refresh_infinite_names(self) -> None:
        """Find averages with infinities, such as masks, which need the non-finite kernel. Waits for the device."""
        self.infinite_names: set[str] = {name for name, average in self.parameters.items() if not _is_finite(average)}


class _Recombined(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], residuals: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._residuals = residuals

    def __getitem__(self, name: str) -> Tensor:
        return _recombine_if_split(self._tensors[name], self._residuals.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _recombine_if_split(stored: Tensor, residual: Tensor | None) -> Tensor:
    return stored if residual is None else recombine(stored, residual)


def _is_finite(tensor: Tensor) -> bool:
    # A finite sum proves that all elements are finite, without temporaries. The sum of finite elements may overflow, so
    # only a non-finite sum needs the exact check.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
