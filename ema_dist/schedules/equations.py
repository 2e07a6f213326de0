"""The averaging laws as equations, for both numbers and 0-d tensors.

Each returns the factor of the old average at one update. ``time`` is the time since averaging began; ``elapsed`` is the
time since the last update, or since averaging began if there was none; ``step`` is the number of optimizer steps since
averaging began, not counting this one.
"""

from __future__ import annotations

import math

from ema_dist.schedules.arithmetic import Number, cosine, exponential, maximum, minimum, power_of_two

LARGEST_SIGMA_REL = 12**-0.5
"""The relative width of a uniform average."""
SMALLEST_SIGMA_REL = 1e-9
"""The equation for the exponent overflows at much smaller values; such an average would equal the last live value."""


def half_life_decay(*, elapsed: Number, half_life: Number) -> Number:
    """Decay for a half-life: after ``half_life``, half of the old average is left.

    Source: Composer's EMA, ``smoothing = exp(-log(2) / half_life)``, here ``2 ** (-elapsed / half_life)``.
    """
    return power_of_two(-elapsed / half_life)


def ramped_half_life(*, time: Number, half_life: float, ramp: float) -> Number:
    """A half-life that grows with the time, ``min(half_life, ramp * time)``.

    Source: EDM's ``ema_rampup_ratio`` (Karras et al. 2022, arXiv 2206.00364), which uses the time before this update;
    EDM2's ``phema.py``, which uses the time after it, as here; torchtitan's default, which is the ramp alone, in
    updates.
    """
    return minimum(ramp * time, half_life)


def power_decay(*, time: Number, elapsed: Number, gamma: float) -> Number:
    """Decay of an average that weights each past value by a power of its time.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), eq. 127, ``(1 - elapsed / time) ** (gamma + 1)``.
    """
    # time - elapsed is exact for integral times, 1 - elapsed / time is not.
    return ((time - elapsed) / time) ** (gamma + 1)


def uniform_decay(*, time: Number, elapsed: Number) -> Number:
    """Decay of an average that weights all times equally.

    Source: Polyak and Juditsky 1992; stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407).
    """
    return (time - elapsed) / time


def inverse_gamma_decay(*, step: Number, decay: float, inv_gamma: float, power: float, min_decay: float) -> Number:
    """Decay that grows as ``1 - (1 + step / inv_gamma) ** -power``, between two bounds; 0 at the first update.

    Source: Crowson's k-diffusion; diffusers' ``EMAModel(use_ema_warmup=True)``, timm's ``ModelEmaV3(use_warmup=True)``,
    ema-pytorch's ``EMA``.
    """
    grown = 1 - (1 + step / inv_gamma) ** -power
    return zero_at_first_step(step) * minimum(maximum(grown, min_decay), decay)


def warmup_decay(*, step: Number, decay: float) -> Number:
    """Decay that grows as ``(1 + step) / (10 + step)`` up to a bound; 0 at the first update.

    Source: TensorFlow's ``ExponentialMovingAverage(num_updates=...)``, except that its decay is not 0 at the first
    update; diffusers' ``EMAModel``.
    """
    return zero_at_first_step(step) * minimum((1 + step) / (10 + step), decay)


def exponential_warmup_decay(*, step: Number, decay: float, tau: float) -> Number:
    """Decay that approaches its final value exponentially, ``decay * (1 - exp(-(step + 1) / tau))``.

    Source: YOLO's ``ModelEMA``.
    """
    return decay * (1 - exponential(-(step + 1) / tau))


def cosine_decay(*, time: Number, elapsed: Number, first: float, last: float, total: float) -> Number:
    """Decay that goes from ``first`` to ``last`` on half a cosine over the time ``total``.

    Source: BYOL (Grill et al. 2020, arXiv 2006.07733), eq. in section 3.2; DINO (Caron et al. 2021, arXiv 2104.14294).
    """
    progress = minimum((time - elapsed) / total, 1.0)
    return last - (last - first) * (cosine(math.pi * progress) + 1) / 2


def zero_at_first_step(step: Number) -> Number:
    """0 at the first step, else 1."""
    return minimum(step, 1)


def decay_from_half_life(half_life: float, steps: float = 1) -> float:
    """The decay over ``steps`` steps for which half of the old average is left after ``half_life`` steps.

    Source: `half_life_decay`; a half-life of 0 means no averaging.
    """
    return 0.0 if half_life == 0 else float(half_life_decay(elapsed=steps, half_life=half_life))


def half_life_from_decay(decay: float) -> float:
    """The number of updates with this decay after which half of the old average is left.

    Source: the inverse of `decay_from_half_life`.
    """
    if decay in {0.0, 1.0}:
        return math.inf if decay else 0.0
    return -1 / math.log2(decay)


def sigma_rel_from_gamma(gamma: float) -> float:
    """The standard deviation of a power profile, as a fraction of the time trained.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), eq. 123.
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent of the power profile that has this relative width; the inverse of `sigma_rel_from_gamma`.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), Alg. 2: the largest real root of
    ``g^3 + 7 g^2 + (16 - s) g + (12 - s)``, ``s = sigma_rel ** -2``.
    """
    # Substituting g = x - 7/3 removes the quadratic term. The cubic has three real roots; the trigonometric formula
    # with k = 0 gives the largest.
    s = sigma_rel**-2
    p = (16 - s) - 49 / 3
    q = 2 * 343 / 27 - 7 * (16 - s) / 3 + (12 - s)
    scale = 2 * math.sqrt(-p / 3)
    angle = math.acos(min(1.0, max(-1.0, 3 * q / (p * scale)))) / 3
    return max(0.0, scale * math.cos(angle) - 7 / 3)
