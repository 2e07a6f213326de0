"""The protocol of a decay schedule (an averaging law), and its text form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from ema_dist.schedules.arithmetic import Number

ARGUMENT_NAME = "argument"
"""Metadata key of a dataclass field whose constructor argument has a different name."""


@runtime_checkable
class Schedule(Protocol):
    """An averaging law: how much of the old average an update keeps.

    Times are in optimizer steps, or in the unit of ``update(elapsed=)``. Checkpoints record the class name and the
    fields of a user-defined law; loading compares them.
    """

    def decay(self, *, time: Number, elapsed: Number, step: Number) -> Number:
        """The factor of the old average, in [0, 1].

        With a fused optimizer and a gradient scaler, only the device knows which steps count, and the arguments are 0-d
        float64 tensors. Use arithmetic that works for numbers and tensors; an ``if`` waits for the device.

        Args:
            time: the time since averaging began, up to and including this step. Averaging begins at ``start``.
            elapsed: the time since the last update, or since averaging began; never more than ``time``.
            step: the number of optimizer steps since averaging began, not counting this one; 0 at the first step.
        """
        ...


def fields_of(law: object) -> dict[str, Any]:
    """The fields of a law as JSON values; a value that JSON does not have is replaced by its name or `repr`."""
    if dataclasses.is_dataclass(law):
        values = {
            field.metadata.get(ARGUMENT_NAME, field.name): getattr(law, field.name)
            for field in dataclasses.fields(law)
            if field.init
        }
    else:
        values = {name: getattr(law, name) for name in _slots(type(law)) if hasattr(law, name)}
        values |= getattr(law, "__dict__", {})
    return {name: _plain(value) for name, value in values.items()}


def describe(name: str, fields: Mapping[str, Any]) -> str:
    """``Name(field=value, ...)``, omitting fields that are None."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items() if value is not None)})"


def _slots(cls: type) -> Iterator[str]:
    for base in reversed(cls.__mro__):
        slots = vars(base).get("__slots__", ())
        yield from (name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))


def _plain(value: object) -> Any:  # noqa: ANN401
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_plain(item) for item in value]
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
    # Without the address, which differs between processes.
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value))
