"""Checks Lightning's arguments, and translates them to those of `ShardedEMA`."""

from __future__ import annotations

import operator

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ema_dist.averages.offload import Offloaded
from ema_dist.sharding import is_wrapper_subclass, local_tensor


def is_averaged_by_default(_: str, parameter: Tensor) -> bool:
    """The default of ``select``: also frozen parameters, which may be unfrozen later, unless they are quantized."""
    has_average = parameter.is_floating_point() or parameter.is_complex()
    return parameter.requires_grad or (has_average and not is_wrapper_subclass(local_tensor(parameter)))


def checked_count(name: str, value: int | None) -> int | None:
    """Return ``value`` if it is None or an integer of at least 0.

    Raises: MisconfigurationException for another value.
    """
    try:
        count = None if value is None else operator.index(value)
    except TypeError:
        count = -1
    if count is not None and count < 0:
        raise MisconfigurationException(f"{name}: expected an integer of at least 0, got {value!r}")
    return count


def checked_device(device: torch.device | str | int | None, store: Offloaded | None) -> torch.device | None:
    """Return the device for the averages, None for that of the model.

    Raises: MisconfigurationException when ``device`` is not a device, or ``store`` is given as well.
    """
    if device is None:
        return None
    if store is not None:
        raise MisconfigurationException(
            f"expected either device= or store=, got device={device!r} and store={store!r}; store=Offloaded() keeps "
            'the averages in CPU memory, as device="cpu" does'
        )
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise MisconfigurationException(f"device: expected a torch.device, a name or an index: {error}") from None


def make_store(device: torch.device | None, store: Offloaded | None, model_device: torch.device) -> Offloaded | None:
    """Return the ``store`` argument of `ShardedEMA` for a model on ``model_device``.

    Raises: MisconfigurationException unless ``device`` is the model's or the CPU.
    """
    if device is None or (device.type == model_device.type and device.index in (None, model_device.index)):
        return store
    if device.type == "cpu":
        return Offloaded()
    raise MisconfigurationException(
        f'device: expected the device of the model, {model_device}, or "cpu", got {device}: the averages '
        "cannot be stored on a third device"
    )
