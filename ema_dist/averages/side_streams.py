"""Work on a second stream of an accelerator, concurrent with the current stream."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStreams:
    """A second stream on each device; on a device without streams, such as the CPU, work stays in order.

    Args:
        devices: the devices that may run work.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        modules = {device: module_with_streams(device) for device in devices}
        self._modules = {device: module for device, module in modules.items() if module is not None}
        self._process_id = os.getpid()
        self._streams: dict[torch.device, Any] = {}
        self._end_events: dict[torch.device, Any] = {}

    @property
    def devices(self) -> set[torch.device]:
        """The devices that have streams."""
        return {*self._modules}

    @property
    def is_capturing(self) -> bool:
        """Whether a graph is being captured: work launched now then runs at each replay, and not now."""
        return any(map(_is_capturing, {*self._modules.values()}))

    @contextmanager
    def fork(self, inputs: Iterable[object] = ()) -> Iterator[None]:
        """Work launched in the block runs on the side streams, after the current stream's earlier work.

        Args:
            inputs: tensors that the block reads and that may be freed before its work is done. Values that are not
                tensors are ignored.
        """
        with ExitStack() as stack:
            for device, module in self._modules.items():
                if device not in self._streams:
                    self._streams[device] = module.Stream(device)
                stream = self._streams[device]
                stream.wait_stream(module.current_stream(device))
                # A callback, so that join() also waits for the work of a block that raised halfway.
                stack.callback(self._record_end, device, _new_event(module))
                stack.enter_context(module.stream(stream))
            for tensor in inputs:
                # Otherwise the allocator may reuse a freed tensor's memory while the side stream still reads it.
                if isinstance(tensor, Tensor) and tensor.device in self._streams:
                    tensor.record_stream(self._streams[tensor.device])
            yield

    def join(self) -> None:
        """Later work on the current stream of each device runs after the last block; the host does not wait.

        The events are kept, because another stream may need to join later.
        """
        if os.getpid() != self._process_id:  # a forked process cannot use the devices of its parent
            return
        for device, event in self._end_events.items():
            module = self._modules[device]
            if not _is_capturing(module):  # a captured graph cannot wait for an event from outside
                module.current_stream(device).wait_event(event)

    @property
    def end_events(self) -> list[Any]:
        """One event for each device, recorded at the end of the last block; pass them to `synchronize`."""
        return [*self._end_events.values()]

    def synchronize(self, events: Iterable[Any]) -> None:
        """Let the host wait for ``events``; any thread may call it."""
        # A new thread starts on device 0, and waiting for an event creates a context on the current device. Without
        # this, the thread of every rank would take half a gigabyte of the first rank's GPU.
        for device, module in [*self._modules.items()][:1]:
            module.set_device(device)
        for event in events:
            event.synchronize()

    def _record_end(self, device: torch.device, event: Any) -> None:  # noqa: ANN401  each device type has its own class
        self._streams[device].record_event(event)
        self._end_events[device] = event


def module_with_streams(device: torch.device) -> Any:  # noqa: ANN401  ``torch.cuda`` and its like have no common type
    """The torch module with the streams of this device, such as ``torch.cuda``; None for a device without streams."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    return module if hasattr(module, "Stream") else None


def _is_capturing(module: Any) -> bool:  # noqa: ANN401
    """Whether work launched now is captured into a graph."""
    is_capturing = getattr(module, "is_current_stream_capturing", None)
    return bool(is_capturing and is_capturing())


def _new_event(module: Any) -> Any:  # noqa: ANN401
    try:
        return module.Event(blocking=True)  # synchronize() sleeps instead of spinning on a core
    except TypeError:  # only CUDA events have the argument
        return module.Event()
