"""Averages in Lightning's checkpoints: the model's weights there, with the live weights beside them.

A monolithic checkpoint has the entries of Lightning's own callback: ``state_dict`` (averages), ``current_model_state``
(live weights) and ``averaging_state``; and ``ema_dist``, a `consolidated_state_dict`. In a sharded one only what is in
``state_dict`` is sharded, so the live weights are in there as ``ema_dist_live``, and averages that the model would
round, because its weights have another dtype, as ``ema_dist``; the top-level ``ema_dist`` has no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ema_dist.ema import ShardedEMA
from ema_dist.sharding import cpu_copy, is_sharded

WEIGHTS = "state_dict"
LIVE = "current_model_state"
AVERAGING_STATE = "averaging_state"
OURS = "ema_dist"
SHARDED_LIVE = "ema_dist_live"
KINDS = ("averages", "buffers")
"""The keys of a track's tensors in the state of `ShardedEMA`."""


def copy_weights(trainer: pl.Trainer) -> dict[str, Any]:
    """Copy what Lightning saves of the model to the CPU; empty on ranks that write nothing.

    Collective: over all ranks, if the model is sharded.
    """
    state = trainer.strategy.lightning_module_state_dict()
    if not (trainer.is_global_zero or has_shards(state)):
        return {}
    return {name: cpu_copy(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def has_shards(state: Mapping[str, Any]) -> bool:
    """Whether each rank has its own parts of these tensors, so that each writes a part of the checkpoint."""
    return any(is_sharded(value) for value in state.values() if isinstance(value, Tensor))


def add_averages(
    checkpoint: dict[str, Any], ema: ShardedEMA, *, live: dict[str, Any], averages: dict[str, Any]
) -> None:
    """Make the averages the weights of a checkpoint, and add the live weights and the counts.

    Args:
        live: the model's state with the live weights.
        averages: the model's state with the averages.

    Collective: over all ranks that hold the model.
    """
    checkpoint[AVERAGING_STATE] = {"n_averaged": torch.tensor(ema.steps)}
    if has_shards(live):
        state = ema.state_dict()
        tensors = {
            track: {kind: _without_equals(entry[kind], averages if track == _shown(state) else {}) for kind in KINDS}
            for track, entry in state["tracks"].items()
        }
        checkpoint[WEIGHTS] = {**averages, **_beside_weights(live, tensors)}
        checkpoint[OURS] = _without_tensors(state, tensors)
        return
    checkpoint[LIVE] = live
    if state := ema.consolidated_state_dict():
        for kind in KINDS:  # one tensor in memory is one in the file
            saved = state["tracks"][_shown(state)][kind]
            saved |= {name: averages[name] for name in saved.keys() - _without_equals(saved, averages).keys()}
        checkpoint[WEIGHTS] = averages
        checkpoint[OURS] = state


def load_averages(
    checkpoint: Mapping[str, Any], trainer: pl.Trainer, make_averages: Callable[[], ShardedEMA]
) -> ShardedEMA:
    """Return the averages of a checkpoint of which Lightning has loaded the weights, and load the live weights.

    Args:
        make_averages: makes averages that are copies of the model's weights.

    Collective: over all ranks that hold the model.
    """
    ema = make_averages()
    if AVERAGING_STATE not in checkpoint:
        rank_zero_warn(
            "The checkpoint was saved without EMAWeightAveraging, or after the fit had ended: the live weights and the "
            "averages both start from its state_dict"
        )
        return ema
    if OURS not in checkpoint:
        averaged = int(checkpoint[AVERAGING_STATE]["n_averaged"])
        ema.load_state_dict({**ema.state_dict(), "steps": averaged, "updates": max(0, averaged - 1)})
        _load_full(checkpoint[LIVE], trainer)
    elif LIVE in checkpoint:
        ema.load_state_dict(checkpoint[OURS])
        _load_full(checkpoint[LIVE], trainer)
    else:
        _load_sharded(checkpoint[OURS], ema, trainer)
    return ema


def _beside_weights(live: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What is under ``state_dict`` of a sharded checkpoint beside the model's weights."""
    # Without empty dictionaries: DCP would save them as values, and not on every rank.
    filled = {
        track: {kind: values for kind, values in kinds.items() if values}
        for track, kinds in tensors.items()
        if any(kinds.values())
    }
    return {SHARDED_LIVE: live, **({OURS: filled} if filled else {})}


def _shown(state: Mapping[str, Any]) -> str:
    """The track that is in the model during an evaluation."""
    return "default" if "default" in state["tracks"] else next(iter(state["tracks"]))


def _without_equals(tensors: Mapping[str, Tensor], averages: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averages that the model's weights do not hold exactly, because these have another dtype."""
    return {
        name: tensor for name, tensor in tensors.items() if name not in averages or averages[name].dtype != tensor.dtype
    }


def _without_tensors(state: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a state, and the names of the ``tensors`` that are saved apart."""
    tracks = {
        track: {"decay": dict(entry["decay"]), **{kind: [*tensors[track][kind]] for kind in KINDS}}
        for track, entry in state["tracks"].items()
    }
    return {"format": state["format"], "steps": state["steps"], "updates": state["updates"], "tracks": tracks}


def _load_full(live: Mapping[str, Any], trainer: pl.Trainer) -> None:
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        set_model_state_dict(trainer.strategy.model, dict(live), options=StateDictOptions(full_state_dict=True))
    else:
        trainer.lightning_module.load_state_dict(live, strict=trainer.lightning_module.strict_loading)


def _load_sharded(saved: Mapping[str, Any], ema: ShardedEMA, trainer: pl.Trainer) -> None:
    # Lightning reads the model's tensors only, and passes no others to on_load_checkpoint.
    model = trainer.strategy.model
    live = get_model_state_dict(model)
    state = ema.state_dict(for_loading=True)
    tensors = {
        track: {kind: {name: state["tracks"][track][kind][name] for name in entry[kind]} for kind in KINDS}
        for track, entry in saved["tracks"].items()
    }
    root = "model" if isinstance(trainer.strategy, FSDPStrategy) else WEIGHTS
    path = Path(trainer.strategy.broadcast(trainer.ckpt_path))
    dcp.load({root: _beside_weights(live, tensors)}, checkpoint_id=path)
    tracks = {
        track: {
            "decay": entry["decay"],
            **{kind: {**state["tracks"][track][kind], **tensors[track][kind]} for kind in KINDS},
        }
        for track, entry in saved["tracks"].items()
    }
    ema.load_state_dict({**saved, "tracks": tracks})
    set_model_state_dict(model, live)
