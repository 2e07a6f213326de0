"""Tensors by name whose shapes and dtypes are known, and whose values are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.checkpoint.values import unreadable_reason
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.sharding import uncompiled_name

WRAPPER_PREFIX = "module."
"""The prefix of names in a wrapped module, such as in ``AveragedModel`` or ``DistributedDataParallel``."""


@dataclass(frozen=True)
class NamedTensors:
    """Tensors by name, in the order of the file; in `ties`, the first name precedes the others."""

    meta: Mapping[str, Tensor]
    """Shapes and dtypes, on the meta device."""
    read: Callable[[Iterable[str]], Iterator[Tensor]]
    """Yields the full tensors of the given names, in the given order, on the CPU."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """The first name of each tied tensor by its other names, if the file shows which tensors are tied."""

    @classmethod
    def of_dictionary(cls, values: Mapping[Any, Any]) -> NamedTensors:
        """The tensors in a dictionary, without the name segments of torch.compile; tied if they share all memory.

        Raises: CheckpointError for a tensor without full values of its own, and for two tensors of one name.
        """
        tensors: dict[str, Tensor] = {}
        for stored_name, value in values.items():
            if not isinstance(value, Tensor):
                continue
            name = uncompiled_name(str(stored_name))
            if reason := unreadable_reason(value):
                raise CheckpointError(f"expected {name!r} to be a dense tensor, found {reason}")
            if name in tensors:
                raise CheckpointError(
                    f"expected one tensor with the name {name!r}, found two: {stored_name!r} and one that differs "
                    "only in segments that torch.compile adds; remove one of them from the file"
                )
            tensors[name] = value.detach()
        meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        return cls(meta, lambda names: (tensors[name] for name in names), find_ties(tensors))

    @classmethod
    def of_files(cls, path: Path) -> NamedTensors:
        """The tensors in files of weights. Raises: CheckpointError when they cannot be read."""
        reader = WeightReader(path)
        meta = {name: tensor for name, tensor in reader.meta_tensors.items() if tensor is not None}
        return cls(meta, lambda names: (reader[name].detach() for name in names))

    @classmethod
    def of_checkpoint(cls, stored: StoredCheckpoint, dcp_names: Mapping[str, str]) -> NamedTensors:
        """Tensors in a DCP folder. ``dcp_names`` maps the names they get here to their names there."""
        index = stored.index
        meta = {
            name: torch.empty(index.shape(dcp_name), dtype=index.dtype(dcp_name), device="meta")
            for name, dcp_name in dcp_names.items()
        }
        return cls(meta, lambda names: stored.stream([dcp_names[name] for name in names]))

    def renamed(self, names: Mapping[str, str]) -> NamedTensors:
        """The tensors of ``names``, under the names to which it maps them."""
        old_names = {new: old for old, new in names.items()}

        def read(wanted: Iterable[str]) -> Iterator[Tensor]:
            return self.read([old_names[name] for name in wanted])

        return replace(
            self,
            meta={new: self.meta[old] for new, old in old_names.items()},
            read=read,
            ties={names[name]: names[first] for name, first in self.ties.items() if name in names and first in names},
        )

    def without_prefix(self, prefix: str) -> NamedTensors:
        """The tensors whose names start with ``prefix``, under the rest of their names."""
        return self.renamed({name: name.removeprefix(prefix) for name in self.meta if name.startswith(prefix)})

    def unwrapped(self) -> NamedTensors:
        """Without ``module.`` if all names start with it. If only some do, it is the name of a child of the model."""
        is_wrapped = bool(self.meta) and all(name.startswith(WRAPPER_PREFIX) for name in self.meta)
        return self.without_prefix(WRAPPER_PREFIX) if is_wrapped else self


def find_ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tensor that shares all of its memory with an earlier one, by its own name."""
    first_names: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            first = first_names.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
            if first != name:
                ties[name] = first
    return ties


def smallest_inexact(dtype: torch.dtype) -> float:
    """The number from which on a stored value of this floating dtype may be a rounded integer."""
    return 2 / torch.finfo(dtype).eps
