"""Chooses the device from which a tensor is sent: of a type on which the process group communicates, with its index."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup


def current_device(device_type: str) -> torch.device:
    """The current device of this type, with its index."""
    if device_type == "cpu":
        return torch.device(device_type)
    return torch.device(device_type, torch.get_device_module(device_type).current_device())


def sending_device(group: ProcessGroup, *preferred: torch.device) -> torch.device:
    """The first of the ``preferred`` devices that ``group`` can send from; else a current device that it can send from.

    NCCL alone cannot send tensors that are on the CPU, such as offloaded weights, or buffers that were never moved.
    """
    types = [device.type for device in group._device_types]  # no public name; get_backend_config() is for messages
    return next((device for device in preferred if device.type in types), None) or current_device(types[0])
