"""Copies between devices and the host through pinned memory, which is several times faster than other host memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_dist.kernels.lists import chunks, group_rows
from ema_dist.kernels.scratch import scratch_views

STAGING_BYTES = 32 * 2**20
"""Size of each of the two pinned buffers: large enough for a transfer to reach the bandwidth of the bus."""

MIN_STAGED_BYTES = 2**20
"""For fewer bytes, waiting for the two buffers takes longer than a plain copy."""


@torch.no_grad()
def copy_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair to the first; returns once all host tensors are written or read.

    Memory: between a device and the host, two pinned buffers of `STAGING_BYTES`, and if dtypes differ, a scratch of
        that size on the device; torch keeps the buffers for the next call.
    """
    for targets, sources in _split_by_source_device(pairs):
        device = _pinnable_device(targets[0].device, sources[0].device)
        if device is None or sum(source.nbytes for source in sources) < MIN_STAGED_BYTES:
            torch._foreach_copy_(targets, sources)
            continue
        module = torch.get_device_module(device)
        with module.device(device):
            try:
                staging = _Staging.allocate(targets, sources, module)
            except RuntimeError:  # page-locked memory is limited; torch's own copies are slower, but need none
                torch._foreach_copy_(targets, sources)
                continue
            copy = _to_host if targets[0].device.type == "cpu" else _to_device
            copy(targets, sources, staging)


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, with the strides of ``torch.empty_like``. Memory: as `copy_pairs`."""
    copy = torch.empty_like(tensor, device="cpu")
    copy_pairs([(copy, tensor)])
    return copy


class _Staging(NamedTuple):
    """Two buffers on the host, for elements of the narrower of two dtypes."""

    buffers: tuple[Tensor, Tensor]
    module: Any
    """The torch module of the device, such as ``torch.cuda``."""

    @classmethod
    def allocate(
        cls,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        module: Any,  # noqa: ANN401
        *,
        pinned: bool = True,
    ) -> _Staging:
        # A cast to a narrower dtype is made before the transfer; a cast to a wider dtype, which is exact, after it.
        dtype = min(targets[0].dtype, sources[0].dtype, key=lambda dtype: dtype.itemsize)
        numel = min(STAGING_BYTES // dtype.itemsize, sum(source.numel() for source in sources))
        first, second = (torch.empty(numel, dtype=dtype, device="cpu", pin_memory=pinned) for _ in range(2))
        return cls((first, second), module)

    def batches(
        self, targets: list[Tensor], sources: list[Tensor]
    ) -> Iterable[tuple[int, list[Tensor], list[Tensor], list[Tensor]]]:
        """The index of each batch, its targets, the views of one of the buffers to stage it in, and its sources."""
        max_bytes = self.buffers[0].numel() * targets[0].element_size()
        for index, (some_targets, some_sources) in enumerate(chunks(targets, sources, max_bytes=max_bytes)):
            yield index, some_targets, scratch_views(self.buffers[index % 2], some_targets), some_sources

    def record_event(self) -> Any:  # noqa: ANN401
        event = self.module.Event()
        event.record()
        return event


def _to_host(targets: list[Tensor], sources: list[Tensor], staging: _Staging) -> None:
    previous: tuple[Any, list[Tensor], list[Tensor]] | None = None
    for _, some_targets, staged, some_sources in staging.batches(targets, sources):
        # Otherwise torch conjugates the copy of a lazily conjugated source on the host, before the copy has arrived.
        resolved = [source.to(staged[0].dtype).resolve_conj().resolve_neg() for source in some_sources]
        torch._foreach_copy_(staged, resolved, non_blocking=True)
        # The host empties the other buffer during this transfer.
        _complete(previous)
        previous = staging.record_event(), some_targets, staged
    _complete(previous)


def _complete(transfer: tuple[Any, list[Tensor], list[Tensor]] | None) -> None:
    if transfer is not None:
        event, targets, staged = transfer
        event.synchronize()
        torch._foreach_copy_(targets, staged)


def _to_device(targets: list[Tensor], sources: list[Tensor], staging: _Staging) -> None:
    events: list[Any] = []
    for index, some_targets, staged, some_sources in staging.batches(targets, sources):
        if index >= 2:  # the device may still read the batch that was in this buffer
            events[index - 2].synchronize()
        torch._foreach_copy_(staged, some_sources)
        torch._foreach_copy_(some_targets, staged, non_blocking=True)
        events.append(staging.record_event())
    for event in events[-2:]:
        event.synchronize()


def _split_by_source_device(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    by_source_device: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        by_source_device.setdefault(pair[1].device, []).append(pair)
    return [(targets, sources) for group in by_source_device.values() for targets, sources in group_rows(group)]


def _pinnable_device(*devices: torch.device) -> torch.device | None:
    """The device, if the copy is between the host and a device for which torch can pin memory; else None."""
    others = [device for device in devices if device.type != "cpu"]
    return others[0] if len(others) == 1 and others[0].type in ("cuda", "xpu") else None
