"""Averages chosen after training: approximates a profile by a weighted sum of stored averages, by least squares.

No module here knows a model, a tensor of weights or a checkpoint; ``ema-dist reconstruct`` reads snapshots and sums
them. From the lowest level up: `equations`, `profiles` (which weight an average gives to each past value), `fitting`.
"""

from ema_dist.posthoc.fitting import Fit, fit, gamma, sigma_rel
from ema_dist.posthoc.profiles import Window

__all__ = ["Fit", "Window", "fit", "gamma", "sigma_rel"]
