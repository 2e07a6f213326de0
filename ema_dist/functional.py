"""The functional form: one update of an averaged model from a live one."""

from __future__ import annotations

from torch import Tensor, nn

from ema_dist.evaluation.swap import require_live_weights
from ema_dist.kernels import group_pairs, lerp_
from ema_dist.messages import abbreviated
from ema_dist.modes import in_normal_mode
from ema_dist.schedules.laws import Constant
from ema_dist.sharding import Layout


@in_normal_mode
def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Update the weights of ``ema_model`` in place to ``ema_model * smoothing + model * (1 - smoothing)``.

    Parameters and floating buffers are averaged; integer buffers are copied, as averages of counts would be truncated.
    The models may be wrapped if both are wrapped in the same way; each rank then averages its own shards.

    Args:
        model: the live model.
        ema_model: the model that holds the averages.
        smoothing: the factor of the old average, in [0, 1] (`ShardedEMA` calls it decay).

    Collective: no. Memory: a scratch of constant size.
    Raises: before anything changes: ValueError when the models differ in names, shapes, ties or sharding; RuntimeError
        when a `ShardedEMA` has swapped its averages into either model.
    Source: ``composer.algorithms.ema.compute_ema``, whose half-life is ``-log(2) / log(smoothing)``.
    """
    weight = 1 - Constant(smoothing).value
    for either in (model, ema_model):
        require_live_weights(either, "compute_ema()")
    live_layout, average_layout = Layout(model, "copy"), Layout(ema_model, "copy")
    average_layout.require_writable()
    average_shards, live_shards = average_layout.shards_by_name(), live_layout.shards_by_name()
    different = [
        name
        for name in average_shards.keys() | live_shards.keys()
        if name not in average_shards
        or name not in live_shards
        or not average_shards[name].is_sharded_like(live_shards[name])
    ]
    if different:
        raise ValueError(
            f"model and ema_model differ in the names, shapes or sharding of {abbreviated(sorted(different))}: "
            "construct and wrap both in the same way"
        )
    if extra_ties := average_layout.ties_missing_in(live_layout):
        raise ValueError(f"ema_model ties {abbreviated(extra_ties)}, and model does not: untie them in ema_model")
    averaged: list[tuple[Tensor, Tensor]] = []
    copied: list[tuple[Tensor, Tensor]] = []
    for name, shard in (average_layout.parameters | average_layout.buffers).items():
        pair = shard.local, live_shards[name].local
        is_inexact = shard.owner.is_floating_point() or shard.owner.is_complex()
        (averaged if is_inexact else copied).append(pair)
    average_layout.wait_for_device()
    for targets, sources in group_pairs(averaged):
        lerp_(targets, sources, weight, finite=False)
    for targets, sources in group_pairs(copied):
        lerp_(targets, sources, 1.0)
