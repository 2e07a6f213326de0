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
from ema_dist.messages import apart

WRAPPED = "module."
"""How the names of a replicated model begin, as Composer saves them."""


@dataclass(frozen=True)
class Saved:
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
    averages = _exact(ema, track) if live is None or is_rounded else {}
    others = averages if live is None else live
    part: dict[str, Any] = {"steps": ema.steps, "updates": ema.updates}
    part["ema_model"] = {
        f"named_{kind}_dict": {prefix + name: others[name] for name in track[of]} if others else {}
        for kind, of in (("parameters", "averages"), ("buffers", "buffers"))
    }
    return part if live is None else part | {"averages": averages}


def moved(ema: ShardedEMA, target: ShardedEMA) -> ShardedEMA:
    """The target, which has the averages and counts of ``ema`` now, whatever the layouts.

    Collective: over all ranks that hold either.
    """
    averages = _exact(ema, ema.state_dict()["tracks"]["default"])
    target.load_state_dict(target.state_dict() | {"steps": ema.steps, "updates": ema.updates})
    target.load_full_state_dict(averages)
    return target


def read(
    part: Mapping[str, Any], averaged: list[str], known: Iterable[str], parameters: list[str], buffers: list[str]
) -> Saved:
    """What a part of a checkpoint holds: of ours, of Composer's own, or of its older versions.

    Args:
        averaged: canonical names of what has an average.
        known: all names in the model's state.
        parameters: every parameter that the model has, in its order: the oldest format lists them without names.
        buffers: every buffer.

    Raises: ValueError when it is of another model.
    """
    is_active = bool(part.get("ema_weights_active", False))
    ema_model = part["ema_model"]
    if "training_model" in part:  # before Composer 0.13: two models, positional before 0.11
        averages = _older(ema_model, parameters, buffers)
        live = _older(part["training_model"], parameters, buffers) if is_active else {}
    else:
        others = {**ema_model["named_parameters_dict"], **ema_model["named_buffers_dict"]}
        averages, live = (part.get("averages", {}), others) if is_active else (others, {})
    spare = {*known, *buffers}  # frozen and tied ones, in the older formats; buffers that are not saved, in Composer's
    found = [_fitting(it, averaged, spare) if it else {} for it in (averages, live)]
    return Saved(*found, steps=int(part.get("steps", 0)), updates=int(part.get("updates", 0)))


def _is_rounded(ema: ShardedEMA, track: Mapping[str, Any]) -> bool:
    """Whether the model cannot hold the averages as they are, having weights of another dtype."""
    live = {name: it.dtype for name, it in ema.full_shapes().items() if it is not None}
    return any(it.dtype != live[name] for kind in ("averages", "buffers") for name, it in track[kind].items())


def _exact(ema: ShardedEMA, track: Mapping[str, Any]) -> dict[str, Tensor]:
    """Full averages as they are, or wider, on the first rank."""
    dtypes = {it.dtype for it in (*track["averages"].values(), *track["buffers"].values())}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    gathered = ema.gather(dtype=wide if _is_rounded(ema, track) else None)
    return {name: it for name, it in gathered if name in track["averages"] or name in track["buffers"]}


def _older(model: Mapping[str, Any], parameters: list[str], buffers: list[str]) -> dict[str, Tensor]:
    if {*model} != {"parameters", "buffers"}:
        return dict(model)
    listed = [*_listed(model["parameters"], parameters, "parameters"), *_listed(model["buffers"], buffers, "buffers")]
    return dict(listed)


def _listed(values: Iterable[Tensor], names: list[str], kind: str) -> list[tuple[str, Tensor]]:
    found = list(values)
    if len(found) != len(names):
        raise ValueError(
            f"the checkpoint lists {len(found)} averaged {kind} without names, and the model has {len(names)}: it is "
            "of another model"
        )
    return list(zip(names, found, strict=True))


def _fitting(values: Mapping[str, Tensor], wanted: list[str], spare: set[str]) -> dict[str, Tensor]:
    """The values by canonical names, in the order wanted: on every rank the same, as each is sent."""
    plain = dict(values)
    if plain.keys().isdisjoint(wanted) and all(name.startswith(WRAPPED) for name in plain):
        plain = {name.removeprefix(WRAPPED): value for name, value in plain.items()}
    if different := apart("the model", {*wanted} - plain.keys(), "the checkpoint", plain.keys() - {*wanted} - spare):
        raise ValueError(f"the checkpoint holds the averages of another model: {different}")
    return {name: plain[name] for name in wanted}
