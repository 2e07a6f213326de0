"""Plain values in checkpoints: packed where DCP would change them, refused where they could not be read back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ema_dist.sharding import is_sharded, subclass_name

KeyPath: TypeAlias = tuple[str | int, ...]
"""The path to a value: keys of nested dictionaries (str) and indices of lists (int)."""

PACKED_MARKER = "ema_dist.packed"
"""Marks a packed mapping. DCP turns keys into strings and drops empty mappings, so such mappings are packed."""

PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))


def unreadable_reason(value: Tensor) -> str:
    """Why a tensor in a file of another program has no full values of its own; empty if it has.

    It must be empty before anything else is done with the tensor: some operations end the process for other tensors.
    """
    if is_sharded(value):
        return "the part of one rank of a sharded tensor: save full tensors, for example those of full_tensor()"
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return f"{'a nested tensor' if value.is_nested else value.layout}, {value.dtype}"
    if value.device.type != "cpu":
        return f"a tensor on the device {value.device}, which has no values here"
    if subclass := subclass_name(value):
        return f"a {subclass}"
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.itemsize > stored:
        return f"a tensor of shape {tuple(value.shape)} that repeats {stored} stored bytes: save a copy by contiguous()"
    return ""


def pack_value(value: object, name: str) -> Any:
    """Return ``value`` in a form that DCP does not change; `unpack_value` is the inverse.

    Args:
        name: names the value in errors.

    Raises: ValueError for values that a checkpoint cannot hold: objects that torch would not load without running code,
        sharded tensors in tuples, tensors under keys that are not strings.
    """
    if isinstance(value, Mapping):
        if value and all(isinstance(key, str) for key in value):
            return {key: pack_value(item, f"{name}.{key}") for key, item in value.items()}
        _refuse_tensors_in(list(value.values()), name)
        return _require_storable((PACKED_MARKER, list(value.items())), name)
    if isinstance(value, list):
        return [pack_value(item, f"{name}.{index}") for index, item in enumerate(value)]
    if isinstance(value, Tensor):
        return require_plain_tensor(value, name)
    if type(value) in PLAIN_TYPES:
        return value
    return _require_storable(value, name)


def require_plain_tensor(tensor: Tensor, name: str) -> Tensor:
    """Return ``tensor``. Raises: ValueError for a subclass (quantized, float8): it could not be loaded again safely."""
    if subclass := subclass_name(tensor):
        raise ValueError(
            f"{name!r} has type {subclass}, a tensor subclass, which a checkpoint cannot hold: use plain tensors, or "
            "leave this entry out"
        )
    return tensor


def unpack_value(value: Any) -> Any:
    """The inverse of `pack_value`, for a value that was read from a checkpoint."""
    match value:
        case (packed, list(items)) if isinstance(packed, str) and packed == PACKED_MARKER:
            return dict(items)
        case dict():
            return {key: unpack_value(item) for key, item in value.items()}
        case list():
            return [unpack_value(item) for item in value]
    return value


def flatten(value: object, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """The leaves of nested mappings and lists by path, as DCP flattens them: a list of plain values is one leaf.

    Unlike in DCP, an empty mapping is a leaf.
    """
    if isinstance(value, Mapping) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and _holds_tensors_or_mappings(value):
        items = list(enumerate(value))
    else:
        return {path: value}
    return {leaf_path: leaf for key, item in items for leaf_path, leaf in flatten(item, (*path, key)).items()}


def unflatten(values: Mapping[KeyPath, Any]) -> Any:
    """The inverse of `flatten`."""
    if () in values:
        return values[()]
    groups: dict[str | int, dict[KeyPath, Any]] = {}
    for (key, *rest), value in values.items():
        groups.setdefault(key, {})[tuple(rest)] = value
    if all(isinstance(key, int) for key in groups):
        return [unflatten(groups[key]) for key in sorted(groups, key=int)]
    return {key: unflatten(group) for key, group in groups.items()}


def require_loadable(value: Any, message: str) -> None:
    """Raise ValueError with ``message`` if torch would not load the value without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise ValueError(f"{message} ({error})") from error


def _holds_tensors_or_mappings(value: list[Any]) -> bool:
    return any(
        isinstance(item, (Tensor, Mapping)) or (isinstance(item, list) and _holds_tensors_or_mappings(item))
        for item in value
    )


def _require_storable(value: Any, name: str) -> Any:
    if isinstance(value, tuple):
        _refuse_tensors_in([item for item in value if isinstance(item, Tensor) and is_sharded(item)], name)
    require_loadable(
        value,
        f"{name!r} is a {type(value).__name__}, which could not be loaded again without running code from the "
        "checkpoint: save numbers, strings, lists, dictionaries and tensors instead",
    )
    return value


def _refuse_tensors_in(values: list[Any], name: str) -> None:
    if any(isinstance(leaf, Tensor) for value in values for leaf in flatten(value).values()):
        raise ValueError(
            f"{name!r} holds tensors under keys that are not strings, or sharded tensors in a tuple, of which DCP "
            "would save one rank's values only: pass optimizers and modules themselves, and tensors in dictionaries "
            "with string keys"
        )
