"""A swap of averages that replicas split: ranks enter and leave it together, and report errors to each other.

Before replicas overwrite each other's weights, they have a rendezvous, at which each reports whether its own parts are
in place. If one rank cannot continue, every rank learns this there, and none waits for it in a collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from ema_dist.averages.live_model import LiveModel
from ema_dist.communication.rendezvous import RendezvousError
from ema_dist.evaluation.swap import Swap, SwapStage
from ema_dist.messages import log_visibly
from ema_dist.signals import deferred_signals

_log = logging.getLogger(__name__)

_ADVICE = (
    "if a rank is only slow, call restore() on every rank, and next time pass a larger "
    "ShardedEMA(..., timeout=seconds); if it has ended, its part of the live weights is lost: restart from a "
    'checkpoint (replicas="copy" avoids this, because then no rank needs another)'
)


def enter_together(live: LiveModel, call: str, write_parts: Callable[[], Swap], undo: Callable[[], None]) -> Swap:
    """Write this rank's parts of the averages, compare the replicas, and fill the model from all replicas' parts.

    Args:
        live: the model; its replicas have all arrived at ``call``.
        call: the user's call, for messages.
        write_parts: returns the swap after `Swap.write_parts`.
        undo: puts this rank's parts of the live weights back, even if ``write_parts`` raised.

    Collective: over the ranks of ``live``.
    Raises: RendezvousError on every rank, after ``undo()``, when replicas differ or ``write_parts`` raises on one.
    """
    comparing = f"{call}, comparing replicas"
    drift = live.describe_drift()
    try:
        swap = write_parts()
    except BaseException as error:
        undo()
        _report(live, comparing, error)
        raise
    try:
        live.rendezvous(comparing, drift)
    except BaseException:
        undo()
        raise

    def record_and_fill() -> None:
        # After the fill, an interruption would leave the call recorded on other ranks only.
        live.record(call)
        swap.fill()

    _fill_or_announce(live, swap, record_and_fill)
    return swap


def leave_together(
    live: LiveModel, swap: Swap, error: BaseException | None, restore_parts: Callable[[], None]
) -> RendezvousError | None:
    """Put this rank's parts of the live weights back, and fill the model from all replicas' parts.

    Args:
        error: the exception that ended this rank's block, or None. Ranks restore the weights together in either case.
        restore_parts: calls `Swap.restore_parts`.

    Collective: over the ranks of ``live``.
    Returns: an error that names the ranks whose blocks raised; None if none did.
    Raises: RendezvousError when ranks do not arrive, or when ``restore_parts`` raises on one; ranks can try again.
    """
    problem = "" if error is None else f"{error!r} ended the block of swapped()"
    raised_in_block = None
    with deferred_signals():
        if problem:
            _log_report(live, problem)
        try:
            live.rendezvous("leaving swapped()", problem, compared=(), advice=_ADVICE)
        except RendezvousError as failure:
            if not failure.same_call:
                hint = "The model still holds the averages; restore() has not run"
                raise _with_hint(failure, hint) from None
            raised_in_block = failure
        call = "restoring the live weights"
        try:
            restore_parts()
        except BaseException as own_error:
            _report(live, call, own_error)
            raise
        try:
            live.rendezvous(call, compared=(), advice=_ADVICE)
        except RendezvousError as failure:
            hint = "The model may still hold some averages: call restore() on every rank before you use it"
            raise _with_hint(failure, hint) from None
        _fill_or_announce(live, swap, swap.fill_back)
    return raised_in_block


def announce_broken_swap(live: LiveModel, reason: str = "an exception") -> None:
    """Make every later call that needs other ranks raise: replicas were overwriting each other's weights."""
    live.announce_failure(
        f"{reason} ended swapped() on rank {dist.get_rank()} while replicas filled each other's weights, so part of "
        "the live weights is lost. Restart from a checkpoint; "
        'replicas="copy" avoids this, because then no rank needs the weights of another'
    )


def _fill_or_announce(live: LiveModel, swap: Swap, fill: Callable[[], None]) -> None:
    try:
        fill()
    except BaseException as error:
        if swap.stage not in (SwapStage.INSIDE, SwapStage.DONE):  # these stages begin after the last collective
            announce_broken_swap(live, repr(error))
        raise


def _report(live: LiveModel, call: str, error: BaseException) -> None:
    """Report to the other ranks, which wait in ``call``, that this rank cannot continue because of ``error``."""
    _log_report(live, repr(error))
    with suppress(RendezvousError):  # the caller raises ``error``
        live.rendezvous(call, repr(error), compared=())


def _log_report(live: LiveModel, problem: str) -> None:
    message = f"rank {dist.get_rank()}: {problem}. Waiting at most {live.timeout:g} s for the other ranks"
    log_visibly(_log, logging.ERROR, message)


def _with_hint(failure: RendezvousError, hint: str) -> RendezvousError:
    text = str(failure) if failure.is_final else f"{failure}. {hint}"
    return RendezvousError(text, same_call=failure.same_call, is_final=failure.is_final)
