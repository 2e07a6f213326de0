"""Finds the weighted sum of snapshots whose profile is closest to a target profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ema_dist.messages import abbreviated
from ema_dist.posthoc.profiles import Profile, Window, inner_product, profile_of
from ema_dist.schedules.checked_number import checked_number
from ema_dist.schedules.equations import LARGEST_SIGMA_REL, gamma_from_sigma_rel, sigma_rel_from_gamma
from ema_dist.schedules.schedule import Schedule

MIN_EIGENVALUE_RATIO = 1e-7
"""Eigenvalues of the normalized Gram matrix below this fraction of the largest are dropped (truncated pseudo-inverse).
Keeping them would give coefficients in the thousands, which amplify rounding by the same factor."""

MIN_COEFFICIENT_SUM = 1e-7
"""If the coefficients sum to less than this, no snapshot overlaps the target."""

LARGEST_INITIAL_MASS_WEIGHT = 1e3
"""The initial weights enter the inner product as a density of width ``w = max(1, end / 1000)``, so the product of their
masses is scaled by ``end / w``."""

CELLS_PER_OCTAVE, OCTAVES = 16, 20
"""Total variation is summed on a grid that refines towards the end of each profile: 16 cells for each halving of the
distance, 20 halvings."""


@dataclass(frozen=True)
class Fit:
    """A weighted sum of snapshots, and how far its profile is from the target profile."""

    coefficients: tuple[float, ...]
    """Coefficient of each snapshot, in the order given; they sum to 1."""
    total_variation: float
    """Half the L1 distance between the target profile and the fitted one."""
    amplification: float
    """Sum of the absolute coefficients: the factor by which rounding errors of the snapshots can grow."""


def sigma_rel(*, gamma: float) -> float:
    """The width of ``Power(gamma=gamma)`` as a fraction of the time trained.

    Raises: TypeError if ``gamma`` is not a number, ValueError below 0.
    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), eq. 123.
    """
    return sigma_rel_from_gamma(checked_number("gamma", gamma, "a finite exponent, 0 or more", open_above=True))


def gamma(*, sigma_rel: float) -> float:
    """The exponent of ``Power(sigma_rel=sigma_rel)``; the inverse of `sigma_rel`.

    Raises: TypeError if ``sigma_rel`` is not a number, ValueError unless above 0 and at most 12 ** -0.5.
    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), Alg. 2.
    """
    expected = f"a width above 0 and up to 12 ** -0.5 = {LARGEST_SIGMA_REL:.5f}"
    return gamma_from_sigma_rel(
        checked_number("sigma_rel", sigma_rel, expected, highest=LARGEST_SIGMA_REL, open_below=True)
    )


def fit(snapshots: Sequence[tuple[float, Schedule | float]], *, target: Schedule | float | Window, at: float) -> Fit:
    """Finds the weighted sum of snapshots whose profile is closest to ``target``.

    The coefficients minimize the squared distance of the profiles, and are then scaled to sum to 1. Times are in clock
    units since averaging began. The initial weights count like values of one more clock unit, or of a thousandth of the
    time if that is longer. Identical snapshots get identical coefficients. If ``target`` is itself a snapshot, only
    that snapshot is used.

    Args:
        snapshots: the time of the last update of each stored average, and its law: `Power`, `Uniform`, `HalfLife`
            without a ramp, or a constant decay applied once per clock unit.
        target: one of these laws, or a `Window`.
        at: the time at which the target average is taken; usually the time of the last snapshot.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), Alg. 3, and eq. 151 for power averages.
    Raises: TypeError if a time is not a number; ValueError if there is no snapshot, if all snapshots are later than
        ``at``, or if a law has no exact profile.
    """
    if not snapshots:
        raise ValueError("expected at least one snapshot, a pair of a time and a law, got none")
    profiles = [profile_of(law, _checked_time("the time of a snapshot", time)) for time, law in snapshots]
    target_profile = profile_of(target, _checked_time("at", at))
    if at < (first := min(profile.end for profile in profiles)):
        raise ValueError(
            f"the target time {at:g} is before the first snapshot, which is at {first:g}: choose a later target time"
        )
    return fit_profiles(profiles, target_profile)


def fit_profiles(profiles: Sequence[Profile], target: Profile) -> Fit:
    """As `fit`, for profiles. Raises: ValueError when no profile overlaps the target."""
    if count := profiles.count(target):
        # Use that snapshot, even if other combinations come as close: a stored average amplifies no rounding error.
        return evaluate_coefficients(profiles, [float(profile == target) / count for profile in profiles], target)
    return evaluate_coefficients(profiles, _least_squares(profiles, target).tolist(), target)


def evaluate_coefficients(profiles: Sequence[Profile], coefficients: Sequence[float], target: Profile) -> Fit:
    """A `Fit` with these coefficients: measures how far the weighted sum of profiles is from the target profile."""
    return Fit(tuple(coefficients), _total_variation(profiles, coefficients, target), sum(map(abs, coefficients)))


def _total_variation(profiles: Sequence[Profile], coefficients: Sequence[float], target: Profile) -> float:
    """Half the L1 distance between a combination of profiles and the target, the initial weights included."""
    times = _cell_bounds({0.0, target.begin, *(profile.end for profile in (*profiles, target))})
    difference = -target.cumulative(times)
    for coefficient, profile in zip(coefficients, profiles, strict=True):
        difference += coefficient * profile.cumulative(times)
    return 0.5 * (difference[0].abs() + difference.diff().abs().sum()).item()


def _least_squares(profiles: Sequence[Profile], target: Profile) -> Tensor:
    """Coefficients that minimize the squared distance of profiles, divided by their sum."""
    products = torch.tensor(
        [[target.end * inner_product(a, b) for b in (*profiles, target)] for a in profiles],
        dtype=torch.float64,
    )
    masses = torch.tensor([profile.initial_mass for profile in (*profiles, target)], dtype=torch.float64)
    products += min(target.end, LARGEST_INITIAL_MASS_WEIGHT) * masses[:-1, None] * masses
    # Profiles are scaled to norm 1, so that the eigenvalue threshold does not depend on their widths.
    norms = products.diagonal().sqrt()
    gram = products[:, :-1] / norms / norms[:, None]
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > MIN_EIGENVALUE_RATIO * values[-1], 1 / values, 0.0)
    coefficients = vectors @ (inverse * (vectors.T @ (products[:, -1] / norms))) / norms
    total = coefficients.sum()
    if not total > MIN_COEFFICIENT_SUM:
        ends = sorted({profile.end for profile in profiles})
        raise ValueError(
            f"no snapshot overlaps the target, which averages values from {target.begin:g} to {target.end:g}: the "
            f"snapshots end at {abbreviated(map('{:g}'.format, ends))}. Save later snapshots, or choose a wider target"
        )
    return coefficients / total


def _cell_bounds(ends: set[float]) -> Tensor:
    """Times from the first end to the last, which become dense towards each end, where densities change fastest."""
    distances = 2.0 ** (-torch.arange(CELLS_PER_OCTAVE * OCTAVES + 1, dtype=torch.float64) / CELLS_PER_OCTAVE)
    bounds = sorted(ends)
    between = [end - (end - start) * distances for start, end in pairwise(bounds)]
    return torch.cat([*between, torch.tensor(bounds[-1:], dtype=torch.float64)])


def _checked_time(name: str, time: float) -> float:
    return checked_number(
        name, time, "a time since averaging began, positive and finite", open_below=True, open_above=True
    )
