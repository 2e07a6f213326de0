"""The model that imported averages belong to: its tensors, their order, and which of them are buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.named_tensors import WRAPPER_PREFIX, NamedTensors
from ema_dist.checkpoint.importing.torch_files import is_torch_file, load_torch_file
from ema_dist.checkpoint.importing.torch_formats import averaged_model, ema_pytorch
from ema_dist.sharding import Layout, uncompiled_name

COUNTER = "num_batches_tracked"
"""The name of the integer buffer of torch's BatchNorm."""

RUNNING_STATISTICS = ("running_mean", "running_var", COUNTER)
"""The names of the buffers of torch's normalization layers."""


@dataclass(frozen=True)
class Reference:
    """The tensors of a model: they check and name averages, and provide values for tensors without an average."""

    label: str
    """Names the reference in messages."""
    tensors: NamedTensors
    """Without the second names of tied tensors."""
    ties: Mapping[str, str]
    """The first name of each tied tensor by its other names."""
    buffers: frozenset[str]
    frozen: frozenset[str] = frozenset()
    """The parameters that are known to be frozen."""
    is_ordered: bool = True
    """Whether the tensors are in the order of the model's ``state_dict()``."""
    marks_parameters: bool = True
    """Whether the file distinguishes parameters from buffers; if not, `buffers` is guessed from names and dtypes."""

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters, in the order of the tensors."""
        return [name for name in self.tensors.meta if name not in self.buffers]

    @property
    def notes(self) -> list[str]:
        """What a user should know about the names."""
        if not self.tensors.meta or not all(name.startswith(WRAPPER_PREFIX) for name in self.tensors.meta):
            return []
        note = (
            f"all names in {self.label} begin with {WRAPPER_PREFIX!r}, and so do those of the result. If it was saved "
            "from a model wrapped by DDP, save model.module.state_dict() instead"
        )
        return [note]

    @classmethod
    def of_files(cls, path: Path) -> Reference:
        """The reference in a file by ``torch.save``, or in other weight files, which have no order.

        Raises: CheckpointError when it cannot be read or holds no tensors.
        """
        if not path.exists():
            raise CheckpointError(f"{path}: there is no such file or folder, expected the reference model")
        if path.is_file() and is_torch_file(path):
            content = load_torch_file(path)
            if not isinstance(content, Mapping):
                raise CheckpointError(f"expected a state_dict() in {path}, found a {type(content).__name__}")
            return cls._of_state_dict(content, path)
        tensors = NamedTensors.of_files(path)
        buffers = frozenset(_likely_buffers(tensors.meta))
        return cls(str(path), tensors, tensors.ties, buffers, is_ordered=False, marks_parameters=False)

    @classmethod
    def _of_state_dict(cls, content: Mapping[str, Any], path: Path) -> Reference:
        if averages := averaged_model(content, path) or ema_pytorch(content, path):
            raise CheckpointError(
                f"expected the weights of the model in {path}, found averages in the format {averages.kind!r}: pass a "
                "file with model.state_dict()"
            )
        all_tensors = NamedTensors.of_dictionary(content)
        if not all_tensors.meta:
            raise CheckpointError(
                f"expected a state_dict() with tensors by name in {path}, found {len(content)} other entries: save "
                "model.state_dict() itself"
            )
        tensors = all_tensors.renamed({name: name for name in all_tensors.meta if name not in all_tensors.ties})
        values = {uncompiled_name(str(name)): value for name, value in content.items()}
        parameters = {name: values[name] for name in tensors.meta if isinstance(values[name], nn.Parameter)}
        return cls(
            str(path),
            tensors,
            all_tensors.ties,
            frozenset(tensors.meta.keys() - parameters if parameters else _likely_buffers(tensors.meta)),
            frozenset(name for name, parameter in parameters.items() if not parameter.requires_grad),
            marks_parameters=bool(parameters),
        )

    @classmethod
    def of_layout(cls, layout: Layout, averaged: set[str]) -> Reference:
        """A live model as the reference, without its values.

        Args:
            averaged: the names of the tensors that have an average.
        """
        meta = {shard.name: torch.empty(shard.shape, dtype=shard.owner.dtype, device="meta") for shard in layout.shards}

        def read(names: object) -> Iterator[Tensor]:
            raise AssertionError(f"the values of {names} must not be read from the live model")

        frozen = frozenset(layout.parameters.keys() - averaged)
        return cls("the model", NamedTensors(meta, read), layout.ties, frozenset(layout.buffers), frozen)


def _likely_buffers(meta: Mapping[str, Tensor]) -> set[str]:
    """The tensors whose dtype or name suggests that they are buffers."""
    return {
        name
        for name, tensor in meta.items()
        if not (tensor.is_floating_point() or tensor.is_complex()) or name.rpartition(".")[2] in RUNNING_STATISTICS
    }
