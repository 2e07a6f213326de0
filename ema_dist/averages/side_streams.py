"""Work that accelerators do beside what they are told next."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStreams:
    """A second stream on each of these devices; where one has no streams, as the CPU, all stays in order.

    Args:
        devices: on which there may be work.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        modules = {device: module_with_streams(device) for device in devices}
        self._modules = {device: module for device, module in modules.items() if module is not None}
        self._process = os.getpid()
        self._streams: dict[torch.device, Any] = {}
        self._end_events: dict[torch.device, Any] = {}

    @property
    def devices(self) -> set[torch.device]:
        """Those that have streams."""
        return {*self._modules}

    @contextmanager
    def fork(self, inputs: Iterable[object] = ()) -> Iterator[None]:
        """What the block tells a device is done after all it was told before, and beside what it is told next.

        Args:
            read: what the block's work reads and nobody keeps until it is done; other things than tensors are ignored.
        """
        with ExitStack() as stack:
            for device, module in self._modules.items():
                if _is_capturing(module):  # a graph takes the block as it comes
                    continue
                if device not in self._streams:
                    self._streams[device] = module.Stream(device)
                stream = self._streams[device]
                stream.wait_stream(module.current_stream(device))
                stack.callback(self._record_end, device, _new_event(module))  # also when the block raises in the middle
                stack.enter_context(module.stream(stream))
            for tensor in inputs:
                if isinstance(tensor, Tensor) and tensor.device in self._streams:
                    tensor.record_stream(self._streams[tensor.device])
            yield

    def join(self) -> None:
        """What devices are told from now on is done after the last block; the host does not wait.

        It may be asked for again by another stream, so the end of the block is kept.
        """
        if os.getpid() != self._process:  # a forked one has no device
            return
        for device, end in self._end_events.items():
            module = self._modules[device]
            if not _is_capturing(module):  # nor does a graph wait for what is not in it
                module.current_stream(device).wait_event(end)

    @property
    def end_events(self) -> list[Any]:
        """Events, one for each device: when the last block was done. To ``synchronize()`` with one is for the host."""
        return [*self._end_events.values()]

    def _record_end(self, device: torch.device, event: Any) -> None:  # noqa: ANN401  each kind of device has its own
        self._streams[device].record_event(event)
        self._end_events[device] = event


def module_with_streams(device: torch.device) -> Any:  # noqa: ANN401  ``torch.cuda`` and its like have no common type
    """The part of torch that has this device's streams; None where there are none."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    return module if hasattr(module, "Stream") else None


def _is_capturing(module: Any) -> bool:  # noqa: ANN401
    """Whether what is told now becomes part of a graph."""
    is_capturing = getattr(module, "is_current_stream_capturing", None)
    return bool(is_capturing and is_capturing())


def _new_event(module: Any) -> Any:  # noqa: ANN401
    try:
        return module.Event(blocking=True)  # a thread that waits for it lets others have its core
    except TypeError:  # only CUDA's can
        return module.Event()
