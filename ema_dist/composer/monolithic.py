"""Averages in Composer's monolithic checkpoints, in its own format and in the older ones, by full tensors.

Composer's own: ``ema_model`` holds ``named_parameters_dict`` and ``named_buffers_dict``, of the averages, or of the
live weights while the averages are in the model (``ema_weights_active``). Ours adds counts, and ``averages`` where they
are of another dtype than the weights: the model would round them.
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
"""How the names of a replicated model begin, as Composer saves them."""


@dataclass(frozen=True)
class MonolithicState:
    """What an algorithm's part of a monolithic checkpoint holds, by canonical names.

    Args:
        averages: full tensors; those that are missing are in the model.
        live: full tensors, while the averages are in the model.
    """

    averages: Mapping[str, Tensor]
    live: Mapping[str, Tensor]
    steps: int = 0
    updates: int = 0


def write(ema: ShardedEMA, live: Mapping[str, Tensor] | None, *, prefix: str) -> dict[str, Any]:
    """The part of a checkpoint, on the first rank; on others it has no tensors.

    Args:
        live: full tensors of the live weights by canonical names, while the averages are in the model.
        prefix: of the names, as Composer's own EMA expects them under this wrapper.

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
    """The target, which has the averages and counts of ``ema`` now, whatever the layouts.

    Collective: over all ranks that hold either.
    """
    averages = _gather_exact(ema, ema.state_dict()["tracks"]["default"])
    target.load_state_dict(target.state_dict() | {"steps": ema.steps, "updates": ema.updates})
    target.load_full_state_dict(averages)
    return target


def read(
    algorithm_state: Mapping[str, Any],
    averaged_names: list[str],
    known_names: Iterable[str],
    parameters: list[str],
    buffers: list[str],
) -> MonolithicState:
    """What a part of a checkpoint holds: of ours, of Composer's own, or of its older versions.

    Args:
        averaged: canonical names of what has an average.
        known: all names in the model's state.
        parameters: every parameter that the model has, in its order: the oldest format lists them without names.
        buffers: every buffer.

    Raises: ValueError when it is of another model.
    """
    is_active = bool(algorithm_state.get("ema_weights_active", False))
    ema_model = algorithm_state["ema_model"]
    if "training_model" in algorithm_state:  # before Composer 0.13: two models, positional before 0.11
        averages = _parse_old_format(ema_model, parameters, buffers)
        live = _parse_old_format(algorithm_state["training_model"], parameters, buffers) if is_active else {}
    else:
        tensors = {**ema_model["named_parameters_dict"], **ema_model["named_buffers_dict"]}
        averages, live = (algorithm_state.get("averages", {}), tensors) if is_active else (tensors, {})
    ignored_names = {
        *known_names,
        *buffers,
    }  # frozen and tied ones, in the older formats; buffers that are not saved, in Composer's
    selected = [
        _select_averages(values, averaged_names, ignored_names) if values else {} for values in (averages, live)
    ]
    return MonolithicState(
        *selected, steps=int(algorithm_state.get("steps", 0)), updates=int(algorithm_state.get("updates", 0))
    )


def _is_rounded(ema: ShardedEMA, track: Mapping[str, Any]) -> bool:
    """Whether the model cannot hold the averages as they are, having weights of another dtype."""
    live = {name: tensor.dtype for name, tensor in ema.full_shapes().items() if tensor is not None}
    return any(tensor.dtype != live[name] for kind in ("averages", "buffers") for name, tensor in track[kind].items())


def _gather_exact(ema: ShardedEMA, track: Mapping[str, Any]) -> dict[str, Tensor]:
    """Full averages as they are, or wider, on the first rank."""
    dtypes = {tensor.dtype for tensor in (*track["averages"].values(), *track["buffers"].values())}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    gathered = ema.gather(dtype=wide if _is_rounded(ema, track) else None)
    return {name: tensor for name, tensor in gathered if name in track["averages"] or name in track["buffers"]}


def _parse_old_format(model: Mapping[str, Any], parameters: list[str], buffers: list[str]) -> dict[str, Tensor]:
    if {*model} != {"parameters", "buffers"}:
        return dict(model)
    listed = [
        *_pair_by_position(model["parameters"], parameters, "parameters"),
        *_pair_by_position(model["buffers"], buffers, "buffers"),
    ]
    return dict(listed)


def _pair_by_position(values: Iterable[Tensor], names: list[str], kind: str) -> list[tuple[str, Tensor]]:
    found = list(values)
    if len(found) != len(names):
        raise ValueError(
            f"the checkpoint lists {len(found)} averaged {kind} without names, and the model has {len(names)}: it is "
            "of another model"
        )
    return list(zip(names, found, strict=True))


def _select_averages(values: Mapping[str, Tensor], wanted: list[str], ignored_names: set[str]) -> dict[str, Tensor]:
    """The values by canonical names, in the order wanted: on every rank the same, as each is sent."""
    unprefixed = dict(values)
    if unprefixed.keys().isdisjoint(wanted) and all(name.startswith(DDP_PREFIX) for name in unprefixed):
        unprefixed = {name.removeprefix(DDP_PREFIX): value for name, value in unprefixed.items()}
    if difference := describe_difference(
        "the model", {*wanted} - unprefixed.keys(), "the checkpoint", unprefixed.keys() - {*wanted} - ignored_names
    ):
        raise ValueError(f"the checkpoint holds the averages of another model: {difference}")
    return {name: unprefixed[name] for name in wanted}
