"""Saves averages in Lightning's checkpoints as the model's weights, with the live weights in an entry of their own.

A full checkpoint has the entries of Lightning's own callback, ``state_dict`` (averages), ``current_model_state`` (live
weights) and ``averaging_state``, and an entry ``ema_dist``, a `consolidated_state_dict`.

In a sharded checkpoint, Lightning shards only what is in ``state_dict``. The live weights are therefore saved there, as
``ema_dist_live``, except those without an average, which ``state_dict`` holds anyway. So is the rest of the averages'
state, as ``ema_dist``: its numbers, the buffers, and the averages that the model's weights cannot hold, which are those
of another dtype and those of tracks that are not swapped in. The top-level ``ema_dist`` has the numbers too, because
Lightning does not read additional entries of ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ema_dist.checkpoint.dcp.checkpoint_index import LIGHTNING_LIVE, LIGHTNING_STATE, swapped_in_track
from ema_dist.ema import ShardedEMA
from ema_dist.messages import describe_difference
from ema_dist.sharding import Layout, cpu_copy, is_sharded

WEIGHTS = "state_dict"
LIVE = "current_model_state"
AVERAGING_STATE = "averaging_state"
OURS = LIGHTNING_STATE
WITHOUT_AVERAGE = "without_average"
"""The key, in the top-level ``ema_dist``, of the names of parameters without an average."""
KINDS = ("averages", "buffers")
"""The keys of a track's tensors in the state of `ShardedEMA`."""


def copy_weights(trainer: pl.Trainer) -> dict[str, Any]:
    """Copy the state that Lightning saves of the model to the CPU; ``{}`` on ranks that write nothing.

    Collective: over all ranks, if the model is sharded.
    """
    state = trainer.strategy.lightning_module_state_dict()
    if not (trainer.is_global_zero or has_shards(state)):
        return {}
    return {name: cpu_copy(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def has_shards(state: Mapping[str, Any]) -> bool:
    """Return whether tensors are sharded, so that each rank writes a part of the checkpoint."""
    return any(is_sharded(value) for value in state.values() if isinstance(value, Tensor))


def add_averages(
    checkpoint: dict[str, Any], ema: ShardedEMA, *, live: dict[str, Any], averages: dict[str, Any]
) -> None:
    """Save the averages as the weights of a checkpoint, and add the live weights and the counts.

    Args:
        live: the model's state with the live weights.
        averages: the model's state with the averages.

    Collective: over all ranks that hold the model.
    """
    checkpoint[AVERAGING_STATE] = {"n_averaged": torch.tensor(ema.steps)}
    if has_shards(live):
        state = ema.state_dict()
        swapped_in = swapped_in_track(state["tracks"])
        tensors = {
            track: {
                "averages": _not_in_weights(entry["averages"], averages if track == swapped_in else {}),
                "buffers": entry["buffers"],
            }
            for track, entry in state["tracks"].items()
        }
        names = {track: {kind: [*values] for kind, values in kinds.items()} for track, kinds in tensors.items()}
        remaining = _replace_tensors(state, _filled(tensors))
        without_average = _without_average(ema, state["tracks"][swapped_in])
        changed = {name: value for name, value in live.items() if name not in without_average}
        checkpoint[WEIGHTS] = {**averages, LIGHTNING_LIVE: changed, LIGHTNING_STATE: remaining}
        checkpoint[OURS] = {**_replace_tensors(state, names), WITHOUT_AVERAGE: [*without_average]}
        return
    checkpoint[LIVE] = live
    if state := ema.consolidated_state_dict():
        for kind in KINDS:  # torch.save writes a tensor once, however many entries refer to it
            saved = state["tracks"][swapped_in_track(state["tracks"])][kind]
            saved |= {name: averages[name] for name in saved.keys() - _not_in_weights(saved, averages).keys()}
        checkpoint[WEIGHTS] = averages
        checkpoint[OURS] = state


def load_averages(
    checkpoint: Mapping[str, Any], trainer: pl.Trainer, make_averages: Callable[[], ShardedEMA]
) -> ShardedEMA:
    """Return the averages of a checkpoint, and load its live weights; Lightning has loaded its ``state_dict`` before.

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


def _filled(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the tracks without empty dictionaries: DCP would save these as values, and not on every rank."""
    filled = {track: {kind: values for kind, values in kinds.items() if values} for track, kinds in tensors.items()}
    return {track: kinds for track, kinds in filled.items() if kinds}


def _replace_tensors(state: Mapping[str, Any], replacements: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a state, with other entries in place of the tensors of each track."""
    tracks = {
        track: {"decay": dict(entry["decay"]), **replacements.get(track, {})}
        for track, entry in state["tracks"].items()
    }
    return {"format": state["format"], "steps": state["steps"], "updates": state["updates"], "tracks": tracks}


def _without_average(ema: ShardedEMA, track: Mapping[str, Any]) -> set[str]:
    """Return the names of the parameters that a track does not average."""
    layout = Layout(ema.model, "copy")
    return {name for shard in layout.parameters.values() if shard.name not in track["averages"] for name in shard.names}


def _not_in_weights(tensors: Mapping[str, Tensor], averages: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that ``averages``, the model's state, lacks or has with another dtype."""
    return {
        name: tensor for name, tensor in tensors.items() if name not in averages or averages[name].dtype != tensor.dtype
    }


def _load_full(live: Mapping[str, Any], trainer: pl.Trainer) -> None:
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        set_model_state_dict(trainer.strategy.model, dict(live), options=StateDictOptions(full_state_dict=True))
    else:
        trainer.lightning_module.load_state_dict(live, strict=trainer.lightning_module.strict_loading)


def _load_sharded(saved: Mapping[str, Any], ema: ShardedEMA, trainer: pl.Trainer) -> None:
    # Lightning reads only the model's own tensors, and passes no others to on_load_checkpoint.
    model = trainer.strategy.model
    live = get_model_state_dict(model)
    state = ema.state_dict(for_loading=True)
    without_average = _without_average(ema, state["tracks"][swapped_in_track(state["tracks"])])
    _require_same_averages(saved, state["tracks"].keys(), without_average)
    tensors = {
        track: {kind: {name: state["tracks"][track][kind][name] for name in entry[kind]} for kind in KINDS}
        for track, entry in saved["tracks"].items()
    }
    root = "model" if isinstance(trainer.strategy, FSDPStrategy) else WEIGHTS
    path = Path(trainer.strategy.broadcast(trainer.ckpt_path))
    filled = _filled(tensors)
    averages = {LIGHTNING_STATE: {"tracks": filled}} if filled else {}
    changed = {name: value for name, value in live.items() if name not in without_average}
    dcp.load({root: {LIGHTNING_LIVE: changed, **averages}}, checkpoint_id=path)
    # Lightning has loaded the averages that are the model's weights.
    loaded = {
        track: {kind: {**state["tracks"][track][kind], **kinds[kind]} for kind in KINDS}
        for track, kinds in tensors.items()
    }
    ema.load_state_dict(_replace_tensors(saved, loaded))
    set_model_state_dict(model, live)


def _require_same_averages(saved: Mapping[str, Any], tracks: Collection[str], without_average: set[str]) -> None:
    """Raise ValueError unless a checkpoint has the same tracks, and averages of the same parameters, as this fit."""
    if saved["tracks"].keys() != {*tracks}:
        raise ValueError(
            f"expected a checkpoint with the tracks {[*tracks]} (decay=), got one with {[*saved['tracks']]}"
        )
    if difference := describe_difference("the checkpoint", {*saved[WITHOUT_AVERAGE]}, "this fit", without_average):
        raise ValueError(f"the parameters without an average (select=) differ: {difference}")
