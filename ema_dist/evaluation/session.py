"""A live model and its averages: they keep up with each other, and the averages may stay in the model for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ema_dist.averages.tracks import Averages, Tracks
from ema_dist.evaluation.live_model import LiveModel
from ema_dist.evaluation.serving import Serving, servings_in
from ema_dist.evaluation.swap import Exchange, exchanges_in
from ema_dist.messages import few


class Pair:
    """The averages of ``tracks``, and the ``live`` weights that they follow; at most one swap or serving at a time."""

    def __init__(self, live: LiveModel, tracks: Tracks) -> None:
        self.live = live
        self.tracks = tracks
        self.exchange: Exchange | None = None
        """While averages are swapped into the model."""
        self._servings: dict[Averages, Serving] = {}

    def prepare(self, call: str, *, together: bool, quick: bool = False) -> None:
        """Finish the updates under way, look at the model as it is now, and follow it; see `LiveModel.prepare`."""
        before = self.live.layout
        problem = None
        try:
            self.tracks.drain()
        except RuntimeError as error:  # the other ranks must get to know
            problem = error
        try:
            self.live.prepare(call, together=together, quick=quick, problem=problem)
        finally:
            if self.live.layout is not before:
                self.tracks.bind(self.live.layout)

    def prepare_update(self) -> None:
        """As `prepare`, at each step: it reads the model again only where something has moved, and waits for nothing.

        Raises: ValueError when the model has changed.
        """
        if self.live.layout.has_moved():
            self.prepare("update()", together=False)
        elif self.live.layout.follow_buffers():
            self._servings.clear()  # they would put the old ones back
            self.tracks.bind_buffers(self.live.layout)

    def current(self, averages: Averages) -> Mapping[str, Tensor]:
        """The averages by name, wherever they are now."""
        if self.exchange is None or self.exchange.averages is not averages:
            return averages.numbers()
        return averages.numbers(self.exchange.current(self.live.layout))

    @contextmanager
    def swapped(self, averages: Averages) -> Iterator[nn.Module]:
        """See `ShardedEMA.swapped`."""
        if self.exchange is not None:
            raise RuntimeError(
                "the averages are in the model already: leave swapped() before entering it again, "
                "or call restore() on every rank if they could not leave it together"
            )
        self._enter("swapped()", quick=False)
        if self.live.is_split:
            self.live.refuse_drift("swapped()")
        self.exchange = Exchange(self.live.layout, averages)
        try:
            yield self.live.layout.model
        finally:
            self.restore()

    @contextmanager
    def serving(self, averages: Averages) -> Iterator[nn.Module]:
        """See `ShardedEMA.serving`."""
        self._enter("serving()", quick=True)
        with self.serving_of(averages).on(lambda: self.swapped(averages)) as model:
            yield model

    def serving_of(self, averages: Averages) -> Serving:
        """How they are served as the model is now."""
        found = self._servings.get(averages)
        if found is None or (found.layout is not self.live.layout and not found.is_on):
            found = self._servings[averages] = Serving(self.live.layout, averages)
        return found

    def restore(self) -> None:
        """Put the live weights back, whatever has happened to the model meanwhile, and only then complain about it."""
        if self.exchange is None:
            return
        if self.live.is_split:
            try:
                self.live.meet("leaving swapped()")
            except RuntimeError as error:
                hint = "The averages are still in the model; restore() on every rank puts the live weights back"
                raise RuntimeError(f"{error}. {hint}") from error
        self.live.layout.units.abandon()
        problem = self.live.follow()
        self.tracks.bind(self.live.layout)
        written = self.exchange.leave(self.live.layout)
        self.exchange = None
        if problem:
            raise problem
        if written:
            raise RuntimeError(
                f"parameters were written to inside swapped(): {few(written)}. The live weights are back, but what was "
                "written is in the averages now; load them from a checkpoint, and train outside swapped()"
            )

    def refuse_inside(self, call: str) -> None:
        """Raises: RuntimeError where the model holds the averages, or reads them."""
        if self.exchange is not None:
            raise RuntimeError(f"{call} inside swapped(): the model holds the averages there; call it after the block")
        if any(serving.is_on for serving in self._servings.values()):
            raise RuntimeError(f"{call} inside serving(): the model reads the averages there; call it after the block")

    def _enter(self, call: str, *, quick: bool) -> None:
        self.refuse_inside(call)
        if exchanges_in(self.live.layout.model):
            raise RuntimeError("another ShardedEMA has its averages in this model: leave its swapped() first")
        if servings_in(self.live.layout.model):
            raise RuntimeError("another ShardedEMA serves this model: leave its serving() first")
        self.prepare(call, together=self.live.is_split, quick=quick)
