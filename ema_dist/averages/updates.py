"""Updates the averages, and counts each optimizer step once, after its update, even if an exception interrupts it."""

from __future__ import annotations

from torch import Tensor

from ema_dist.averages.live_model import LiveModel
from ema_dist.averages.tracks import Tracks
from ema_dist.communication.call_history import Calls
from ema_dist.kernels import WriteLog
from ema_dist.schedules.clock import Clock, ClockStep


class Updates:
    """Updates the averages of ``tracks`` from the ``live`` model, with the weights that ``clock`` gives."""

    def __init__(self, clock: Clock, live: LiveModel, tracks: Tracks) -> None:
        self._clock = clock
        self._live = live
        self._tracks = tracks
        self._unfinished: _Update | None = None
        """An update that has begun and is not counted yet."""

    def update(self, found_inf: Tensor | None, *, elapsed: float, overlap: bool) -> None:
        """Make one update, and count the step.

        Args:
            elapsed: as for `Clock.next_step`.
            found_inf: as for `Clock.next_step`.
            overlap: as for `Tracks.update_averages`.

        Raises: RuntimeError when an earlier update failed on its thread; as `Clock.next_step`.
        """
        step = self._clock.next_step(elapsed, found_inf)
        calls = self._live.history.calls.after("update()", *([elapsed] if elapsed != 1 else ()))
        self._unfinished = _Update(step, calls, overlap=overlap)
        self._run(self._unfinished)

    def finish(self) -> None:
        """Finish an update that an exception interrupted; call it before anything reads averages or counts.

        Raises: RuntimeError when it cannot be finished, in this call and in all later ones.
        """
        update = self._unfinished
        if update is None:
            return
        if not update.write_log.has_begun:  # no average has moved: the update has not happened
            self._unfinished = None
            return
        if reason := self._reason_not_to_finish(update):
            raise RuntimeError(
                f"update() was interrupted and cannot be finished: {reason}. Some averages were updated and others "
                "were not: load them from a checkpoint (load_state_dict)"
            )
        self._run(update)

    def start_from(self, call: str) -> None:
        """Forget earlier calls and an unfinished update, because ``call`` has replaced the averages."""
        self._unfinished = None
        self._live.history.replace(call, self._clock.steps)

    def _run(self, update: _Update) -> None:
        try:
            step = update.step
            if not update.is_made:
                self._tracks.update_averages(step.weights, step.update_index, update.write_log, overlap=update.overlap)
                update.is_made = True
            self._clock.count(step)
            self._live.history.calls = update.calls
            self._unfinished = None
        except BaseException:
            update.versions = self._versions()
            raise

    def _reason_not_to_finish(self, update: _Update) -> str:
        if update.is_made:
            return ""
        if update.write_log.is_uncertain:
            return "a kernel was interrupted halfway"
        if update.versions is None:
            return "it was interrupted twice"
        return "" if update.versions == self._versions() else "weights or buffers were written to since"

    def _versions(self) -> list[object]:
        return [shard.version for shard in self._live.layout.shards]


class _Update:
    def __init__(self, step: ClockStep, calls: Calls, *, overlap: bool) -> None:
        self.step = step
        self.calls = calls
        """The history that includes this update."""
        self.overlap = overlap
        self.write_log = WriteLog()
        self.is_made = False
        """Whether all writes are made, so that the step is to be counted."""
        self.versions: list[object] | None = None
        """The versions of the live weights at the interruption."""
