"""Averages in the checkpoints of accelerate: ``register(accelerator, ema)``.

Needs accelerate: ``pip install "accelerate>=1.10"``.

Code that knows the `Accelerator` belongs here and nowhere else. May import `ema_dist.ema`, `ema_dist.checkpoint` and
the levels below them.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("accelerate") is None:
    raise ModuleNotFoundError('ema_dist.accelerate needs accelerate: pip install "accelerate>=1.10"', name="accelerate")

import os
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ema_dist import checkpoint
from ema_dist.ema import ShardedEMA
from ema_dist.evaluation.swap import active_swaps
from ema_dist.messages import warn_caller

__all__ = ["Registration", "register"]

# A value must not refer to its key: the accelerator would never be freed.
_registrations: WeakKeyDictionary[Accelerator, list[Registration]] = WeakKeyDictionary()


def register(accelerator: Accelerator, ema: ShardedEMA, *, name: str = "ema", timeout: float = 600.0) -> Registration:
    """Makes ``accelerator.save_state`` save the averages, and ``accelerator.load_state`` load them.

    `ema_dist.checkpoint.save` writes the averages into the folder ``name`` of each checkpoint. They load on another
    number of ranks and under another layout. If a checkpoint has no averages, they start from its weights, with a
    warning. ``save_state`` raises a RuntimeError inside ``swapped()``.

    Args:
        ema: the averages of a model that ``accelerator.prepare`` returned.
        name: the folder; each `ShardedEMA` of one accelerator needs its own.
        timeout: most seconds that ranks wait for each other before they save or load the averages.

    Returns: an object whose ``remove()`` undoes this call.

    Collective: no. ``save_state`` and ``load_state`` are, over all ranks.
    Memory: as `ema_dist.checkpoint.save` and `ema_dist.checkpoint.load`.
    Raises: TypeError for arguments of other types; ValueError if these averages or this name are registered already, or
        if ``name`` is not the name of a folder.
    """
    if not isinstance(accelerator, Accelerator) or not isinstance(ema, ShardedEMA):
        raise TypeError(
            "expected register(accelerator, ema) with an Accelerator and a ShardedEMA, got "
            f"{type(accelerator).__name__} and {type(ema).__name__}"
        )
    if name in ("", "..") or Path(name).name != name:
        raise ValueError(f"name must be the name of a folder in each checkpoint, got {name!r}")
    registered = _registrations.setdefault(accelerator, [])
    if any(other.ema is ema or other.name == name for other in registered):
        raise ValueError(
            f"these averages or the name {name!r} are registered with this accelerator already: register each "
            "ShardedEMA once, under its own name, or first call remove() on the object that register() returned"
        )
    registered.append(Registration(accelerator, ema, name=name, timeout=timeout))
    return registered[-1]


class Registration:
    """Averages that an `Accelerator` saves and loads with its state; made by `register`."""

    def __init__(self, accelerator: Accelerator, ema: ShardedEMA, *, name: str, timeout: float) -> None:
        self.ema = ema
        self.name = name
        self._timeout = timeout
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Stop saving and loading these averages with the accelerator's state."""
        for handle in self._handles:
            handle.remove()
        for registered in _registrations.values():
            if self in registered:
                registered.remove(self)

    def _save(self, _models: list[nn.Module], _weights: list[dict[str, Any]], folder: str) -> None:
        if active_swaps(self.ema.model):
            raise RuntimeError(
                "save_state() was called inside swapped(), and would save the averages as the live weights: call it "
                "after the block"
            )
        save_averages(self.ema, Path(folder, self.name), step=self.ema.steps, timeout=self._timeout)

    def _load(self, models: list[nn.Module], folder: str) -> None:
        averages = Path(folder, self.name)
        if averages.is_dir():
            checkpoint.load({"ema": self.ema}, averages, timeout=self._timeout)
        elif models:
            _reset_after_next_load(self.ema, folder)
        else:
            start_from_weights(self.ema, folder)  # FSDP: accelerate has loaded the weights already


def save_averages(ema: ShardedEMA, folder: Path, *, step: int, timeout: float) -> None:
    """Write a checkpoint of the averages, replacing an older one in the same folder. Collective: over all ranks."""
    checkpoint.save({"ema": ema}, folder, step=step, keep=1, timeout=timeout)


def start_from_weights(ema: ShardedEMA, folder: str | os.PathLike[str]) -> None:
    """Restart the averages from the live weights; warn on the first rank that ``folder`` has no averages."""
    if PartialState().is_main_process:
        warn_caller(f"{folder} has no averages: they start from its weights, at step 0")
    ema.reset()


def _reset_after_next_load(ema: ShardedEMA, folder: str) -> None:
    """Restart the averages once accelerate has loaded the model, which it does after it has called all hooks."""

    def reset(_module: nn.Module, _incompatible_keys: object) -> None:
        handle.remove()
        start_from_weights(ema, folder)

    # The inner module: accelerate loads into it or into its wrapper, and both call its hooks.
    inner_module = extract_model_from_parallel(ema.model, keep_torch_compile=False)
    handle = inner_module.register_load_state_dict_post_hook(reset)
