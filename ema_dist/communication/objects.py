"""Sends pickled objects between ranks. `torch.distributed` has functions for this, but they need NumPy."""

from __future__ import annotations

import ctypes
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def broadcast_object(value: object, *, source: int, group: ProcessGroup, device: torch.device) -> Any:  # noqa: ANN401
    """The object that the rank ``source`` of the world passes, on every rank of ``group``.

    Args:
        value: ignored except on ``source``, where pickling it must succeed.
        device: a device from which ``group`` can send.

    Collective: over ``group``.
    """
    is_source = dist.get_rank() == source
    pickled = _to_bytes(value, device) if is_source else None
    size = torch.tensor([pickled.numel() if pickled is not None else 0], device=device)
    dist.broadcast(size, src=source, group=group)
    if pickled is None:
        pickled = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(pickled, src=source, group=group)
    return value if is_source else _from_bytes(pickled)


def send_object(value: object, *, destination: int, group: ProcessGroup, device: torch.device) -> None:
    """Send ``value`` to the rank ``destination`` of the world, which calls `receive_object`."""
    pickled = _to_bytes(value, device)
    dist.send(torch.tensor([pickled.numel()], device=device), dst=destination, group=group)
    dist.send(pickled, dst=destination, group=group)


def receive_object(*, source: int, group: ProcessGroup, device: torch.device) -> Any:  # noqa: ANN401
    """The object that the rank ``source`` of the world sends by `send_object`."""
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, src=source, group=group)
    pickled = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.recv(pickled, src=source, group=group)
    return _from_bytes(pickled)


def _to_bytes(value: object, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)


def _from_bytes(pickled: Tensor) -> Any:  # noqa: ANN401
    on_host = pickled.cpu()
    return pickle.loads(ctypes.string_at(on_host.data_ptr(), on_host.numel()))
