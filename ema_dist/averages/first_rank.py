"""Sends results and tensors from the first rank of a model to its other ranks, whatever devices they are on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.communication.objects import broadcast_object
from ema_dist.kernels import copy_pairs
from ema_dist.sharding import Layout, as_bytes, sending_device

T = TypeVar("T")


class SendingDevices:
    """The devices from which ``group`` sends tensors and pickled objects of a model."""

    def __init__(self, group: ProcessGroup, layout: Layout) -> None:
        self._group = group
        self._preferred = [*dict.fromkeys(shard.communication_device for shard in layout.shards)]
        self.for_host_values: torch.device = self.for_tensor(torch.device("cpu"))
        """The device for pickled objects and for CPU tensors: the CPU if the group can send from it."""

    def for_tensor(self, *preferred: torch.device) -> torch.device:
        """The first of these devices from which the group can send; else another device of the model."""
        return sending_device(self._group, *preferred, *self._preferred)


class FirstRankBroadcast:
    """Broadcasts from the layout's first rank.

    If reading fails there, every rank raises, instead of waiting for the broadcast.

    Args:
        hint: appended to the message of an error in `broadcast_tensor`.
    """

    def __init__(self, layout: Layout, *, hint: str = "") -> None:
        self._hint = hint
        self._group = layout.group
        self._devices = SendingDevices(self._group, layout) if self._group else None
        self._source = layout.ranks[0] if layout.ranks else 0
        self._is_source = self._group is None or dist.get_rank() == self._source
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def broadcast_result(self, call: Callable[[], T], hint: str = "") -> T:
        """Calls ``call`` on the first rank, and returns its result on every rank.

        Args:
            hint: appended to the message of an error.
        """
        result: Any = None
        problem, cause = "", None
        if self._is_source:
            try:
                result = call()
                pickle.dumps(result)  # an error in the broadcast would leave the other ranks waiting
            except Exception as error:  # noqa: BLE001
                result, cause = None, error
                problem = f"the full tensors cannot be read: {error!r}{hint}"
        if self._group is not None and self._devices is not None:
            message = (result, problem)
            result, problem = broadcast_object(
                message, source=self._source, group=self._group, device=self._devices.for_host_values
            )
        if problem:
            raise RuntimeError(problem) from cause
        return result

    def broadcast_tensor(self, read: Callable[[], Tensor], spec: Tensor, device: torch.device) -> Tensor:
        """Calls ``read`` on the first rank, and returns its full tensor on every rank.

        Args:
            device: holds the tensor if the ranks communicate there.

        The other ranks receive into one buffer: the tensor is valid until the next call.
        """
        if self._devices:
            device = self._devices.for_tensor(device)
        values: list[Tensor] = []
        self.broadcast_result(
            lambda: values.append(contiguous_on(device, _require_spec(read(), spec))),
            hint=self._hint,
        )
        value = values.pop() if values else self._receive_buffer(spec, device)
        if self._group is not None:
            dist.broadcast(as_bytes(value), src=self._source, group=self._group)
        return value

    def _receive_buffer(self, spec: Tensor, device: torch.device) -> Tensor:
        # One buffer for all tensors: gloo threads release received tensors late, so memory would grow.
        if self._buffer.nbytes < spec.nbytes or self._buffer.device != device:
            self._buffer = torch.empty(spec.nbytes, dtype=torch.uint8, device=device)
        return self._buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)


def contiguous_on(device: torch.device, tensor: Tensor) -> Tensor:
    """``tensor`` itself if it is contiguous and on ``device``, else a copy there, whose bytes can be sent."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device == device:
        return tensor.contiguous()
    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    copy_pairs([(moved, tensor)])
    return moved


def _require_spec(value: Tensor, spec: Tensor) -> Tensor:
    if (value.shape, value.dtype) != (spec.shape, spec.dtype):
        expected, got = (f"{tensor.dtype} of {tuple(tensor.shape)}" for tensor in (spec, value))
        raise ValueError(f"the tensor changed between two reads: expected {expected}, got {got}")
    return value
