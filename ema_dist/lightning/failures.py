"""An exception that ends a fit: whether all ranks have it, and what they are told if not."""

from __future__ import annotations

import torch.distributed as dist

from ema_dist.communication.rendezvous import RendezvousError, announce_failure, rendezvous

PATIENCE = 30.0
"""Seconds that a rank on which the fit has failed waits for the others, which may be gone."""


def wait_for_failure_of_all_ranks(timeout: float) -> RendezvousError | None:
    """Return None once the fit has failed on all ranks; else an error that names the others, after `PATIENCE`.

    Args:
        timeout: seconds, if that is less.

    Collective: over all ranks.
    """
    call, advice = "on_exception() of EMAWeightAveraging", "find the error of the rank that failed first, and restart"
    try:
        rendezvous(call, _all_ranks(), timeout=min(timeout, PATIENCE), advice=advice)
    except RendezvousError as error:
        return error
    return None


def report_failure(exception: BaseException) -> None:
    """Tell the other ranks, which then do not wait for this one. Collective: no."""
    ranks = _all_ranks()
    if ranks:
        announce_failure(ranks, f"{exception!r} ended the fit on rank {dist.get_rank()}")


def _all_ranks() -> list[int]:
    return [*range(dist.get_world_size())] if dist.is_initialized() else []
