"""Serving: the forward pass reads the averages, and the parameters of the model stay untouched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_dist.averages.track import Track
from ema_dist.communication.replica_collectives import all_gather_parts
from ema_dist.evaluation.active import ActiveRegistry
from ema_dist.kernels import copy_pairs, group_pairs, lerp_
from ema_dist.messages import abbreviated
from ema_dist.sharding import Layout, Shard, Substitution, replays_cuda_graph, unsupported_reason

DIRECT = "the averages themselves"
CAST_COPY = "a cast copy"
DEVICE_COPY = "a copy on the model's device"
GATHERED_COPY = "a gathered copy"

_active_servings: ActiveRegistry[Serving] = ActiveRegistry()


class _ServingSetup(NamedTuple):
    """A substitution, and its substitutes that are copies, each with the average to copy into its averaged part."""

    substitution: Substitution
    copies: list[tuple[Shard, Tensor]]


class Serving:
    """Serves the averages of one track to the forward passes of a model, as long as ``layout`` describes it."""

    def __init__(self, layout: Layout, track: Track) -> None:
        self.layout = layout
        self._track = track
        self._unsupported_reason = unsupported_reason(layout, track.parameters)
        self._modules = list(layout.model.modules())
        pairs = {name: (layout.parameters[name], average) for name, average in track.parameters.items()}
        self._copied_shards = {
            name: shard for name, (shard, average) in pairs.items() if not _can_substitute(average, shard)
        }
        self._cached_setup: _ServingSetup | None = None
        self._entered_setup: _ServingSetup | None = None

    @property
    def mode(self) -> str:
        """What forward passes read; if parameters differ, the costliest of their modes."""
        if reason := self.reason_to_swap:
            return f"swapped(), since {reason}"
        if any(shard.is_split for shard in self._copied_shards.values()):
            return GATHERED_COPY
        if any(
            self._track.parameters[name].device != shard.local.device for name, shard in self._copied_shards.items()
        ):
            return DEVICE_COPY
        return CAST_COPY if self._copied_shards else DIRECT

    @torch.no_grad()
    def enter(self) -> None:
        """Make forward passes read the averages; allowed only if `reason_to_swap` is empty.

        Collective: over the replicas of split weights.
        Memory: a copy of the buffers, which is kept; until `leave`, copies of the parameters that `mode` describes.
        """
        self._entered_setup = self._prepare_setup()
        _active_servings.add(self)
        try:
            self._entered_setup.substitution.enter()
        except BaseException:
            self._leave_setup()
            raise

    def leave(self) -> None:
        """Make forward passes read the live weights again; does nothing unless `is_active`.

        Raises: RuntimeError when parameters were written to, cast, moved, replaced or given gradients since `enter`.
        """
        if not self.is_active:
            return
        changed, trained = self._leave_setup()
        if changed:
            raise RuntimeError(
                f"parameters were written to, cast, moved or replaced inside serving(): {abbreviated(changed)}. The "
                "averages, or under FSDP2 the live weights, may hold the written values: load both from a checkpoint"
            )
        if trained:
            raise RuntimeError(
                f"backward() inside serving() gave gradients to {abbreviated(trained)}: with activation checkpointing, "
                "they may be computed from the averages. Call backward() before or after the block"
            )

    @property
    def is_active(self) -> bool:
        """Whether forward passes read the averages, or `leave` was interrupted."""
        return self._entered_setup is not None

    @torch.no_grad()
    def _leave_setup(self) -> tuple[list[str], list[str]]:
        """Leave the substitution; can be called again after an interruption. Returns: as `Substitution.leave`."""
        setup = self._entered_setup
        assert setup is not None
        # Cleared first: a setup whose leave() raises must not be entered again.
        self._cached_setup = None
        try:
            changed, trained = setup.substitution.leave()
        except Exception:
            self._end()
            raise
        if not (changed or self._copied_shards or setup.substitution.has_requires_grad):
            self._cached_setup = setup
        self._end()
        return changed, trained

    def _end(self) -> None:
        _active_servings.remove(self)
        self._entered_setup = None

    @property
    def reason_to_swap(self) -> str:
        """Why this model cannot be served without a swap; empty if it can."""
        if self._unsupported_reason:
            return self._unsupported_reason
        return "a module replays a CUDA graph, which reads fixed addresses" if replays_cuda_graph(self._modules) else ""

    def _prepare_setup(self) -> _ServingSetup:
        """The substitution, with copies of the current averages."""
        # A cached setup made of inference tensors could not be used outside of inference mode.
        with torch.inference_mode(mode=False), torch.no_grad():
            setup = self._cached_setup or self._build_setup()
            pairs = [(copy.averaged_part.local, average) for copy, average in setup.copies]
            for targets, sources in group_pairs(pair for pair in pairs if pair[0].device == pair[1].device):
                lerp_(targets, sources, 1.0)
            copy_pairs(pair for pair in pairs if pair[0].device != pair[1].device)
            all_gather_parts(copy for copy, _ in setup.copies)
        return setup

    def _build_setup(self) -> _ServingSetup:
        parameters = self._track.parameters
        # Buffers are always copied: a forward pass may write to them, as BatchNorm does in training mode.
        copied_shards = {**self._copied_shards, **self.layout.buffers}
        empty_shards = {name: shard.with_empty_local() for name, shard in copied_shards.items()}
        substitutes = parameters | {name: shard.local for name, shard in empty_shards.items()}
        copies = [(shard, self._track.value_for_dtype(name, shard.local.dtype)) for name, shard in empty_shards.items()]
        return _ServingSetup(Substitution(self.layout, substitutes), copies)


def active_servings(model: nn.Module) -> list[Serving]:
    """The active servings of ``model``, of its submodules, and of modules that contain it."""
    return _active_servings.overlapping(model)


def _can_substitute(average: Tensor, shard: Shard) -> bool:
    """Whether modules can use the average itself in place of the live shard."""
    if shard.is_split or (average.dtype, average.device) != (shard.local.dtype, shard.local.device):
        return False
    # FSDP2 gathers a padded tensor, so the storage of the average must include the padding.
    elements = average.untyped_storage().nbytes() // average.element_size() - average.storage_offset()
    return elements >= shard.padded_numel
