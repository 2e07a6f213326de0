"""Finds the optimizer whose ``state`` and ``param_groups`` are all that must be saved, and refuses any other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ema_dist.sharding import has_equal_bits


def saved_optimizer(optimizer: Optimizer, key: str, saved_beside: Iterable[Optimizer] = ()) -> Optimizer:
    """Return ``optimizer``, or the optimizer inside it that holds all of its state.

    Args:
        key: the optimizer's key in the saved dictionary, for messages.
        saved_beside: the optimizers that are saved under keys of their own.

    Raises: ValueError when its ``state_dict()`` raises, or holds more than that: the checkpoint would be incomplete.
    """
    name = type(optimizer).__name__
    held = _held_optimizers(optimizer)
    own_ids = _parameter_ids(optimizer)
    inner = {text: other for text, other in held.items() if _parameter_ids(other) <= own_ids}
    saved_ids = {*map(id, saved_beside)}
    for text, other in held.items():
        if text not in inner and id(other) not in saved_ids:
            raise ValueError(
                f"{name} holds the optimizer {text!r} of other parameters, whose state would not be saved: save it as "
                f'well, {{"{key}.{text}": optimizer.{text}}}'
            )
    try:
        state_dict = optimizer.state_dict()
    except Exception as error:
        raise ValueError(f"{name}.state_dict() raises {error!r}: {_advice(optimizer, inner, key)}") from error
    if len(inner) > 1:
        raise ValueError(f"{name} holds several optimizers: {_advice(optimizer, inner, key)}")
    if inner:
        ((attribute, candidate),) = inner.items()
        if not _holds_all_of(candidate, state_dict):
            raise ValueError(
                f"{name} keeps state in addition to that of its {attribute!r}: {_advice(optimizer, inner, key)}; the "
                f"state of {name} itself is then not saved"
            )
        return saved_optimizer(candidate, key, saved_beside)
    if not _holds_all_of(optimizer, state_dict):
        if type(optimizer).state_dict is Optimizer.state_dict:
            cause, advice = (
                f"hooks of {name} (register_state_dict_post_hook) change its state_dict()",
                "remove the hooks",
            )
        else:
            cause, advice = f"{name} overrides state_dict()", "use an optimizer that does not"
        raise ValueError(
            f"{cause}: it differs from the optimizer's state and param_groups, and only these can be saved under the "
            f"names of parameters; {advice}"
        )
    if foreign_keys := [key for key in optimizer.state if id(key) not in own_ids]:
        shown = sorted({type(key).__name__ if isinstance(key, Tensor) else repr(key) for key in foreign_keys})
        raise ValueError(
            f"{name}.state has the keys {', '.join(shown)}, which are none of its parameters and so have no name in a "
            "checkpoint: use an optimizer that keeps such values in its param_groups"
        )
    return optimizer


def require_torch_optimizer(value: Any, key: str) -> None:
    """Raise ValueError if ``value`` wraps optimizers but is not one, and its ``state_dict()`` numbers the parameters.

    The error says what to save instead.
    """
    if not all(hasattr(value, name) for name in ("param_groups", "step", "state_dict")):
        return
    inner = _held_optimizers(value)
    if not inner or not _has_parameters_by_index(value.state_dict()):
        return
    name = type(value).__name__
    message = f"{name} is not a torch.optim.Optimizer: {_advice(value, inner, key)}"
    if hasattr(value, "train_mode"):  # schedule-free
        message += (
            f". {name} does not save whether the parameters currently hold averaged weights: call its eval() before "
            "saving, and its train() only after loading"
        )
    raise ValueError(message)


def _held_optimizers(optimizer: Any) -> dict[str, Optimizer]:
    """The optimizers in the attributes of ``optimizer``, and in lists, tuples and mappings there.

    The keys are expressions such as ``inner[0]``.
    """
    found: dict[str, Optimizer] = {}
    for name, value in getattr(optimizer, "__dict__", {}).items():
        items: Iterable[tuple[str, Any]] = [(name, value)]
        if isinstance(value, Mapping):
            items = [(f"{name}[{key!r}]", item) for key, item in value.items() if isinstance(item, Optimizer)]
        elif isinstance(value, (list, tuple)):
            items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
        found |= {text: item for text, item in items if isinstance(item, Optimizer) and item is not optimizer}
    return found


def _holds_all_of(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> bool:
    """Whether ``state_dict`` equals what `Optimizer.state_dict` makes of the state and the groups of ``optimizer``.

    The expected value is built here: that method would run the hooks that this looks for.
    """
    indices: dict[int, int] = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        indices.setdefault(id(parameter), index)
    groups = [{**group, "params": [indices[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    state = {
        indices.get(id(key), id(key)) if isinstance(key, Tensor) else key: value
        for key, value in optimizer.state.items()
    }
    return _is_same(state_dict, {"state": state, "param_groups": groups})


def _has_parameters_by_index(state_dict: Mapping[str, Any]) -> bool:
    """Whether ``state_dict`` refers to parameters by index, as `torch.optim.Optimizer.state_dict` does."""
    groups = state_dict.get("param_groups")
    return isinstance(groups, list) and any(
        isinstance(index, int) for group in groups for index in group.get("params", ())
    )


def _is_same(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.device == right.device and has_equal_bits(left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_is_same(value, right[key]) for key, value in left.items())
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_is_same, left, right))
    return left is right or bool(left == right)


def _advice(optimizer: Any, inner: Mapping[str, Optimizer], key: str) -> str:
    if inner and _parameter_ids(optimizer) == set().union(*map(_parameter_ids, inner.values())):
        entries = ", ".join(f'"{key}{index or ""}": optimizer.{text}' for index, text in enumerate(inner))
        return f"save the wrapped {'optimizer' if len(inner) == 1 else 'optimizers'}, {{{entries}}}"
    return (
        "use an optimizer that holds the state of all its parameters on every rank, or shard the model with "
        "fully_shard(), which shards the optimizer's state"
    )


def _parameter_ids(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
