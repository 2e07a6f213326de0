"""Finds the weighted sum of stored averages whose profile is closest to a wanted one."""

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

NEGLIGIBLE_SHARE = 1e-7
"""Combinations of snapshots whose squared norm is below this fraction of the largest are not used: profiles that nearly
cancel would get coefficients of thousands, and amplify the rounding of the snapshots as much."""

LARGEST_INITIAL_MASS_WEIGHT = 1e3
"""The starting weights count as the value of one unit of time, but not of less than a thousandth of the time."""

CELLS_PER_OCTAVE, OCTAVES = 16, 20
"""Total variation is summed over cells, of which towards each end of a profile so many halve in size so often."""


@dataclass(frozen=True)
class Fit:
    """A weighted sum of snapshots, and how far its profile is from the wanted one."""

    coefficients: tuple[float, ...]
    """Of the snapshots, in the order given; their sum is 1."""
    total_variation: float
    """Half of the sum of absolute differences between the wanted and the obtained weights of past values."""
    amplification: float
    """The sum of the absolute coefficients: so many times the rounding of the snapshots may be in the result."""


def sigma_rel(*, gamma: float) -> float:
    """The width of ``Power(gamma=gamma)`` as a fraction of the time trained.

    Raises: TypeError for no number, ValueError below 0.
    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), eq. 123.
    """
    return sigma_rel_from_gamma(checked_number("gamma", gamma, "a finite exponent, 0 or more", open_above=True))


def gamma(*, sigma_rel: float) -> float:
    """The exponent of ``Power(sigma_rel=sigma_rel)``; the inverse of `sigma_rel`.

    Raises: TypeError for no number, ValueError unless above 0 and at most 12 ** -0.5.
    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), Alg. 2.
    """
    expected = f"a width above 0 and up to 12 ** -0.5 = {LARGEST_SIGMA_REL:.5f}"
    return gamma_from_sigma_rel(
        checked_number("sigma_rel", sigma_rel, expected, highest=LARGEST_SIGMA_REL, open_below=True)
    )


def fit(snapshots: Sequence[tuple[float, Schedule | float]], *, target: Schedule | float | Window, at: float) -> Fit:
    """The weighted sum of averages whose profile is closest to that of ``target``: by least squares, then normalized.

    Times count since averaging began, in the unit of the clock. The weights at which averaging began count as the value
    of one more unit of time, or of a thousandth of the time if that is more. Snapshots with equal profiles get equal
    coefficients; if the target is among the snapshots, it is taken alone.

    Args:
        snapshots: the time of the last update of each stored average, and its law: `Power`, `Uniform`, `HalfLife`
            without a ramp, or a number that is taken once in each unit of the clock.
        target: one of these laws, or a `Window`.
        at: the time for which the wanted average is meant; usually that of the last snapshot.

    Raises: TypeError for no number; ValueError for no or only later snapshots, and for laws without an exact profile.
    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), Alg. 3, and eq. 151 for power averages.
    """
    if not snapshots:
        raise ValueError("expected at least one snapshot, a pair of a time and a law, got none")
    profiles = [profile_of(law, _checked_time("the time of a snapshot", time)) for time, law in snapshots]
    wanted = profile_of(target, _checked_time("at", at))
    if at < (first := min(profile.end for profile in profiles)):
        raise ValueError(f"the target time {at:g} is before the first snapshot, which is at {first:g}")
    return fit_profiles(profiles, wanted)


def fit_profiles(profiles: Sequence[Profile], wanted: Profile) -> Fit:
    """As `fit`, of profiles. Raises: ValueError when no profile overlaps with the wanted one."""
    if count := profiles.count(wanted):
        # Itself, although other combinations come as close: the average is stored, and no rounding is amplified.
        return evaluate_coefficients(profiles, [float(profile == wanted) / count for profile in profiles], wanted)
    return evaluate_coefficients(profiles, _least_squares(profiles, wanted).tolist(), wanted)


def evaluate_coefficients(profiles: Sequence[Profile], coefficients: Sequence[float], wanted: Profile) -> Fit:
    """These coefficients, and how far the sum of profiles that they make is from the wanted profile."""
    return Fit(tuple(coefficients), _total_variation(profiles, coefficients, wanted), sum(map(abs, coefficients)))


def _total_variation(profiles: Sequence[Profile], coefficients: Sequence[float], wanted: Profile) -> float:
    """Half of the L1 distance between a combination of profiles and the wanted one, the starting weights included."""
    times = _cell_bounds({0.0, wanted.begin, *(profile.end for profile in (*profiles, wanted))})
    difference = -wanted.cumulative(times)
    for coefficient, profile in zip(coefficients, profiles, strict=True):
        difference += coefficient * profile.cumulative(times)
    return 0.5 * (difference[0].abs() + difference.diff().abs().sum()).item()


def _least_squares(profiles: Sequence[Profile], wanted: Profile) -> Tensor:
    """Coefficients that minimize the squared distance of profiles, divided by their sum."""
    products = torch.tensor(
        [[wanted.end * inner_product(a, b) for b in (*profiles, wanted)] for a in profiles], dtype=torch.float64
    )
    masses = torch.tensor([profile.initial_mass for profile in (*profiles, wanted)], dtype=torch.float64)
    products += min(wanted.end, LARGEST_INITIAL_MASS_WEIGHT) * masses[:-1, None] * masses
    # Profiles of norm 1: what is negligible must not depend on how wide they are.
    norms = products.diagonal().sqrt()
    gram = products[:, :-1] / norms / norms[:, None]
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > NEGLIGIBLE_SHARE * values[-1], 1 / values, 0.0)
    coefficients = vectors @ (inverse * (vectors.T @ (products[:, -1] / norms))) / norms
    total = coefficients.sum()
    if not total > NEGLIGIBLE_SHARE:
        ends = sorted({profile.end for profile in profiles})
        raise ValueError(
            f"none of the snapshots at the times {abbreviated(map('{:g}'.format, ends))} averages what {wanted} does"
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
