"""The functional form of the moving average, between two models."""

from __future__ import annotations

from torch import Tensor, nn

from ema_dist.kernels import lerp_, paired
from ema_dist.messages import few
from ema_dist.schedules.decay import Constant
from ema_dist.sharding import Layout


def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Move the weights of ``ema_model`` in place: ``ema_model * smoothing + model * (1 - smoothing)``.

    Parameters and floating buffers are averaged; integer buffers are copied, as averages of counts would be truncated.
    Both models may be wrapped, in the same way: then each rank averages what it holds.

    Args:
        smoothing: the factor of the old average, in [0, 1] (`ShardedEMA` calls it decay).

    Collective: no. Memory: a constant scratch.
    Raises: ValueError when the models differ in names, shapes or in how they are cut, before anything changes.
    Source: ``composer.algorithms.ema.compute_ema``, whose half-life is ``-log(2) / log(smoothing)``.
    """
    weight = 1 - Constant(smoothing).value
    lives, averages = Layout(model, "copy"), Layout(ema_model, "copy")
    ours, theirs = averages.by_any_name(), lives.by_any_name()
    different = [
        n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs or not ours[n].same_cut(theirs[n])
    ]
    if different:
        raise ValueError(f"the models differ in the names, shapes or cuts of {few(sorted(different))}")
    averaged: list[tuple[Tensor, Tensor]] = []
    copied: list[tuple[Tensor, Tensor]] = []
    for name, shard in (averages.parameters | averages.buffers).items():
        pair = shard.local, theirs[name].local
        is_inexact = shard.owner.is_floating_point() or shard.owner.is_complex()
        (averaged if is_inexact else copied).append(pair)
    for targets, sources in paired(averaged):
        lerp_(targets, sources, weight, finite=False)
    for targets, sources in paired(copied):
        lerp_(targets, sources, 1.0)
