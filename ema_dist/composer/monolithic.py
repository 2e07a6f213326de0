"""Averages in Composer's monolithic checkpoints, as full tensors: saved in Composer's format, read in older ones too.

In Composer's format, ``ema_model`` holds ``named_parameters_dict`` and ``named_buffers_dict`` of the averages, or of
the live weights while the averages are swapped in (``ema_weights_active``). This package adds the step counts. While
the averages are swapped in, it also adds ``averages`` if their dtype differs from that of the weights, because the
model rounds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ema_dist.ema import ShardedEMA
from ema_dist.messages import describe_difference

DDP_PREFIX = "module."
"""The prefix of names under DDP in Composer's checkpoints."""


@dataclass(frozen=True)
class MonolithicState:
    """The contents of the algorithm's part of a monolithic checkpoint, by canonical name.

    Args:
        averages: full tensors; empty if only the checkpoint's model holds the averages.
        live: full tensors, if the checkpoint's model holds the averages.
    """

    averages: Mapping[str, Tensor]
    live: Mapping[str, Tensor]
    steps: int = 0
    updates: int = 0


def make_state(ema: ShardedEMA, live: Mapping[str, Tensor] | None, *, prefix: str) -> dict[str, Any]:
    """Return the algorithm's part of a checkpoint; only the first rank's holds tensors.

    Args:
        live: full live weights by canonical name, while the averages are swapped in; else None.
        prefix: the prefix of names that Composer's own EMA expects under this wrapper.

    Collective: over all ranks that hold the model.
    """
    track = ema.state_dict()["tracks"]["default"]
    is_rounded = _is_rounded(ema, track)
    averages = _gather_exact(ema, track) if live is None or is_rounded else {}
    tensors = averages if live is None else live
    algorithm_state: dict[str, Any] = {"steps": ema.steps, "updates": ema.updates}
    algorithm_state["ema_model"] = {
        f"named_{kind}_dict": {prefix + name: tensors[name] for name in track[key]} if tensors else {}
        for kind, key in (("parameters", "averages"), ("buffers", "buffers"))
    }
    return algorithm_state if live is None else algorithm_state | {"averages": averages}


def transfer_averages(ema: ShardedEMA, target: ShardedEMA) -> ShardedEMA:
    """Copy the averages and step counts of ``ema`` to ``target``, whatever their layouts, and return ``target``.

    Collective: over all ranks that hold either model.
    """
    averages = _gather_exact(ema, ema.state_dict()["tracks"]["default"])
    target.load_state_dict(target.state_dict() | {"steps": ema.steps, "updates": ema.updates})
    target.load_full_state_dict(averages)
    return target


def parse_state(
    algorithm_state: Mapping[str, Any],
    *,
    averaged_names: list[str],
    known_names: Iterable[str],
    parameters: list[str],
    buffers: list[str],
) -> MonolithicState:
    """Parse the algorithm's part of a checkpoint that this package or any version of Composer's EMA saved.

    Args:
        averaged_names: canonical names of the tensors with an average.
        known_names: all names in the model's state.
        parameters: names of all parameters in the model's order: the oldest format lists tensors without names.
        buffers: names of all buffers in the model's order.

    Raises: ValueError when the checkpoint was saved from another model.
    """
    is_active = bool(algorithm_state.get("ema_weights_active", False))
    ema_model = algorithm_state["ema_model"]
    if "training_model" in algorithm_state:  # before Composer 0.13: two models, positional before 0.11
        averages = _parse_old_format(ema_model, parameters, buffers)
        live = _parse_old_format(algorithm_state["training_model"], parameters, buffers) if is_active else {}
    else:
        tensors = {**ema_model["named_parameters_dict"], **ema_model["named_buffers_dict"]}
        averages, live = (algorithm_state.get("averages", {}), tensors) if is_active else (tensors, {})
    # Older formats also hold frozen and tied tensors; Composer's holds buffers that the model's state does not.
    ignored_names = {*known_names, *buffers}
    selected = [
        _select_averages(values, averaged_names, ignored_names) if values else {} for values in (averages, live)
    ]
    return MonolithicState(
        *selected, steps=int(algorithm_state.get("steps", 0)), updates=int(algorithm_state.get("updates", 0))
    )


def _is_rounded(ema: ShardedEMA, track: Mapping[str, Any]) -> bool:
    """Whether the model would round the averages, because its weights have another dtype."""
    live = {name: tensor.dtype for name, tensor in ema.full_shapes().items() if tensor is not None}
    return any(tensor.dtype != live[name] for kind in ("averages", "buffers") for name, tensor in track[kind].items())


def _gather_exact(ema: ShardedEMA, track: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gather full averages on the first rank, in their own dtype or a wider one."""
    dtypes = {tensor.dtype for tensor in (*track["averages"].values(), *track["buffers"].values())}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    gathered = ema.gather(dtype=wide if _is_rounded(ema, track) else None)
    return {name: tensor for name, tensor in gathered if name in track["averages"] or name in track["buffers"]}


def _parse_old_format(model: Mapping[str, Any], parameters: list[str], buffers: list[str]) -> dict[str, Tensor]:
    if {*model} != {"parameters", "buffers"}:
        return dict(model)
    return {
        **_name_by_position(model["parameters"], parameters, "parameters"),
        **_name_by_position(model["buffers"], buffers, "buffers"),
    }


def _name_by_position(values: Iterable[Tensor], names: list[str], kind: str) -> dict[str, Tensor]:
    tensors = list(values)
    if len(tensors) != len(names):
        raise ValueError(
            f"expected averages of the {len(names)} {kind} of the model, found a checkpoint that lists {len(tensors)} "
            "without their names: load it into the model that it was saved from"
        )
    return dict(zip(names, tensors, strict=True))


def _select_averages(values: Mapping[str, Tensor], names: list[str], ignored_names: set[str]) -> dict[str, Tensor]:
    """The values by canonical name, in the order of ``names``: every rank must send and receive in the same order."""
    unprefixed = dict(values)
    if unprefixed.keys().isdisjoint(names) and all(name.startswith(DDP_PREFIX) for name in unprefixed):
        unprefixed = {name.removeprefix(DDP_PREFIX): value for name, value in unprefixed.items()}
    if difference := describe_difference(
        "the model", {*names} - unprefixed.keys(), "the checkpoint", unprefixed.keys() - {*names} - ignored_names
    ):
        raise ValueError(f"the checkpoint holds averages of another model: {difference}")
    return {name: unprefixed[name] for name in names}
