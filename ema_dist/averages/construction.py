"""Constructs the averages, and compares settings, selected parameters and ties between ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from zlib import crc32

from torch.distributed import ProcessGroup

from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.precision import Precision
from ema_dist.averages.tracks import Tracks
from ema_dist.communication.rendezvous import RendezvousError, advice_on_absence
from ema_dist.kernels import AUTO, compiler_problem
from ema_dist.messages import warn_caller
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import DEFAULT_TRACK, DecayRecord
from ema_dist.schedules.laws import Constant
from ema_dist.schedules.schedule import Schedule

_log = logging.getLogger(__name__)

_CALL = "ShardedEMA(model)"
_COMPILER = "C compiler"
_PART = "selected names, part"
_PARTS = 64
_NAMES_SENT = 200


@contextmanager
def problems_reported(live: LiveModel) -> Iterator[None]:
    """Reports an exception in the ``with`` block to the other ranks, so that they raise and do not wait for this one.

    Collective: over the ranks that hold the model, if the block raises.
    """
    try:
        yield
    except Exception as error:
        with suppress(RendezvousError):
            live.rendezvous(_CALL, problem=str(error) or repr(error), compared=())
        raise


def warn_of_unlikely_decays(schedules: Mapping[str, Schedule]) -> None:
    """Warn about constant decays that are probably the weight of the live values, not the factor of the old average."""
    for law in schedules.values():
        if isinstance(law, Constant) and (law.value < 0.5 or law.value == 1):
            intended = {0.0: "HalfLife(0) (no averaging)", 1.0: "HalfLife(math.inf) (never update)"}
            warn_caller(
                f"decay={law!r} keeps {100 * law.value:.3g} % of the old average at each update. decay is the factor "
                "of the old average (such as 0.999), not of the live weight. If this is intended, use "
                f"{intended.get(law.value, 'HalfLife(steps)')}"
            )


def resolve_kernel(kernel: str | None, live: LiveModel, settings: Mapping[str, str]) -> str | None:
    """``kernel``; for `AUTO`, None unless every rank has a working C compiler, so that all ranks use the same kernel.

    Collective: over the ranks that hold the model, for `AUTO` only.
    Raises: RendezvousError when ranks differ in their settings, and when another rank has a problem or is absent.
    """
    if kernel != AUTO:
        return kernel
    with problems_reported(live):
        problem = compiler_problem()
    try:
        _rendezvous(live, [settings, {_COMPILER: "no working C compiler" if problem else "a working C compiler"}])
    except RendezvousError as error:
        if [*error.differing] != [_COMPILER]:
            raise
        problem = problem or "another rank has no working C compiler"
    if problem:
        _log.info("kernel='auto' does not consider 'compiled': %s", problem)
        return None
    return kernel


def construct_on_all_ranks(live: LiveModel, settings: Mapping[str, str], make_tracks: Callable[[], Tracks]) -> Tracks:
    """Make the averages, and compare settings and selected parameters between ranks. All ranks raise if one does.

    Args:
        settings: see `describe_settings`.
        make_tracks: may raise.

    Collective: over the ranks that hold the model; compares the weights of replicas that split averages.
    Raises: as ``make_tracks``; RendezvousError when ranks differ, and when another rank has a problem or is absent.
    """
    with problems_reported(live):
        tracks = make_tracks()
    _compare(live, settings)
    if live.has_split_averages:
        live.check_replicas(_CALL)
    return tracks


def _compare(live: LiveModel, settings: Mapping[str, str]) -> None:
    tied = [f"{name}, tied to {first}" for name, first in live.layout.ties.items()]
    selected = [*live.selected, *tied]
    try:
        _rendezvous(live, [settings, _digest_names(selected)])
    except RendezvousError as error:
        differing_parts = [key for key in error.differing if key.startswith(_PART)]
        if not differing_parts:
            raise
        failure = error
    else:
        return
    # Outside of except, so that the error raised here is not chained to the previous one, which compared digests. Ten
    # thousand ranks cannot all send every name, so each sends only the names in one of the parts that differ.
    names = [name for name in sorted(selected) if _part(name) == min(differing_parts)]
    _rendezvous(live, [{name: f"selected {name}" for name in names[:_NAMES_SENT]}])
    raise failure


def _rendezvous(live: LiveModel, compared: Sequence[Mapping[str, str]]) -> None:
    advice = advice_on_absence("construct it on each of them; to average on rank 0 only, pass the unwrapped module")
    live.rendezvous(_CALL, compared=compared, advice=advice)


def describe_settings(clock: Clock, precision: Precision, **others: object) -> dict[str, str]:
    """Settings as text for `construct_on_all_ranks`; the texts of two ranks are equal if their settings agree."""
    decays = {
        "decay" if track == DEFAULT_TRACK else f"decay[{track!r}]": DecayRecord.of_law(law).describe()
        for track, law in clock.schedules.items()
    }
    settings = {
        "start": clock.start,
        "update_interval": clock.interval,
        "dtype": precision.dtype,
        "rounding": precision.rounding,
        **others,
    }
    texts = decays | {name: _describe(value) for name, value in settings.items()}
    return {name: f"{name}={text}" for name, text in texts.items()}


def _describe(setting: object) -> str:
    # If the model is also tensor-parallel, ranks correctly pass different groups of the same size.
    return f"a process group of {setting.size()} ranks" if isinstance(setting, ProcessGroup) else repr(setting)


def _digest_names(names: Collection[str]) -> dict[str, str]:
    digests: dict[str, int] = {}
    for name in sorted(names):
        part = _part(name)
        digests[part] = crc32(f"{name}\n".encode(), digests.get(part, 0))
    return {part: f"{part}: {digest:08x}" for part, digest in digests.items()}


def _part(name: str) -> str:
    return f"{_PART} {crc32(name.encode()) % _PARTS}"
