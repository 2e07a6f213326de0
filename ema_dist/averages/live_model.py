"""The model whose weights are averaged: its current layout, and the ranks that hold it together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ema_dist.communication.call_history import CallHistory
from ema_dist.communication.rendezvous import (
    RendezvousError,
    announce_failure,
    rendezvous,
    require_process_group,
)
from ema_dist.communication.replica_collectives import describe_drift
from ema_dist.messages import abbreviated
from ema_dist.sharding import DDPWrapDetector, Layout, ReplicaPolicy, is_wrapper_subclass


class LiveModel:
    """A model with averages for some of its parameters.

    Args:
        model: plain or wrapped, as for `Layout`.
        replicas: as for `Layout`.
        select: ``(name, parameter) -> bool``; None selects the parameters that require a gradient.
        timeout: seconds that ranks wait for each other.

    Raises: as `Layout`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        replicas: ReplicaPolicy,
        select: Callable[[str, Tensor], bool] | None,
        timeout: float,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected the model, a torch.nn.Module, got a {type(model).__name__}: call ShardedEMA(model)"
            )
        if select is not None and not callable(select):
            raise TypeError(f"select must be a function (name, parameter) -> bool or None, got {select!r}")
        self._replicas: ReplicaPolicy = replicas
        self._select = select or _requires_grad
        self.timeout = timeout
        self._failure = ""
        self.layout = Layout(model, replicas)
        self.layout.require_writable()
        self.ranks: list[int] = self.layout.ranks
        """The global ranks that hold the model together, in order; empty when this rank holds it alone."""
        self._ddp_wrap_detector = None if self.ranks else DDPWrapDetector(model)
        self.history: CallHistory = CallHistory()
        """The calls that have changed the averages; ranks compare theirs at every rendezvous."""
        self.selected: list[str] = []
        """The names of the parameters to average; see `select_parameters`."""
        self._unselected: list[str] = []
        self.has_split_averages: bool = any(shard.is_split for shard in self.layout.shards)
        """Whether replicas split averages among themselves."""
        self.has_sharded_averages: bool = any(
            shard.gather_ranks or shard.averaged_part.gather_ranks for shard in self.layout.shards
        )
        """Whether several ranks hold parts of the averages."""
        if (
            isinstance(replicas, ProcessGroup)
            and replicas.size() > 1
            and all(shard.replica_group is not replicas for shard in self.layout.shards)
        ):
            warnings.warn(
                "replicas=<group> has no effect, because the model's wrapper determines its replicas: omit it",
                stacklevel=4,
            )

    @property
    def has_replicated_averages(self) -> bool:
        """Whether replicas store the same averages, each of them in full."""
        return any(shard.replica_group is not None and not shard.is_split for shard in self.layout.parameters.values())

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of `ranks`, which receives full tensors."""
        return not self.ranks or dist.get_rank() == self.ranks[0]

    def select_parameters(self) -> list[str]:
        """Fill `selected`, and return it.

        Raises: ValueError when no parameter is selected, or one that cannot be averaged.
        """
        self.selected = [name for name in self.layout.parameters if self._is_selected(name)]
        selected = {*self.selected}
        self._unselected = [name for name in self.layout.parameters if name not in selected]
        if not self.selected:
            raise ValueError(
                f"nothing to average: none of the {len(self._unselected)} parameters "
                + (
                    "requires a gradient: choose some with select="
                    if self._select is _requires_grad
                    else "was selected: select(name, parameter) must return True for some"
                )
            )
        owners = {name: self.layout.parameters[name].owner for name in self.selected}
        if unsupported := [
            name for name, owner in owners.items() if not (owner.is_floating_point() or owner.is_complex())
        ]:
            raise ValueError(
                f"select returned True for {abbreviated(unsupported)}, which cannot be averaged, because they are "
                "neither floating-point nor complex: exclude them"
            )
        if subclasses := [
            f"{name} ({type(local).__name__})"
            for name in self.selected
            if is_wrapper_subclass(local := self.layout.parameters[name].local)
        ]:
            raise ValueError(
                f"tensor subclasses cannot be averaged: {abbreviated(subclasses)}. Train plain tensors (with torchao's "
                "float8, enable_fsdp_float8_all_gather=False), or exclude these with select="
            )
        return self.selected

    def record(self, call: str) -> None:
        """Add a swap or serving to `history`; not with ``replicas="copy"``, where one rank may evaluate alone."""
        if self.ranks and not (self._replicas == "copy" and self.has_replicated_averages):
            self.history.record(call)

    def rendezvous(
        self,
        call: str,
        problem: str = "",
        *,
        compared: Sequence[Mapping[str, str]] | None = None,
        advice: str = "",
    ) -> None:
        """Return once every rank that holds the model has entered ``call``, none reports a problem, and they agree.

        Args:
            compared: what must be equal on all ranks; None for `history`.
            advice: as for `ema_dist.communication.rendezvous.rendezvous`.

        Collective: over `ranks`. Raises: RendezvousError otherwise.
        """
        compared = self.history.compared() if compared is None else compared
        try:
            rendezvous(call, self.ranks, timeout=self.timeout, problem=problem, compared=compared, advice=advice)
        except RendezvousError as error:
            if error.is_final:
                self._failure = str(error)
            raise

    def prepare(
        self,
        call: str,
        *,
        collective: bool,
        for_serving: bool = False,
        problem: Exception | None = None,
        check: Callable[[], Exception | None] | None = None,
        compared: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        """Refresh the layout; if ``collective``, also run the rendezvous, so that a problem on one rank raises on all.

        Args:
            call: the user's call, for messages.
            collective: whether ``call`` communicates.
            for_serving: as for `refresh`.
            problem: an error found earlier on this rank; it is raised after the rendezvous.
            check: called after the refresh if there is no error yet; returns an error or None.
            compared: as for `rendezvous`.

        Collective: over `ranks`, if ``collective``.
        Raises: ValueError when the model has changed; RuntimeError when another rank has a problem or does not arrive.
        """
        if collective:
            require_process_group(call, self.ranks)
        change = self.refresh(for_serving=for_serving)
        problem = problem or change or (check() if check else None)
        if collective:
            # A rank with a problem takes part, too: if it raised first, the others would wait for it in the collective.
            try:
                self.rendezvous(call, str(problem or ""), compared=compared)
            except RendezvousError:
                if problem is None:
                    raise
        if problem is not None:
            raise problem

    def refresh(self, *, only_if_moved: bool = False, for_serving: bool = False) -> ValueError | None:
        """Read the current storage of the live weights into `layout`. Returns an error if the model cannot be averaged.

        Args:
            only_if_moved: read the model again only if its tensors were replaced or their storage has changed.
            for_serving: as ``only_if_moved``; also let FSDP2 initialize itself now, not in its next forward pass.
        """
        try:
            is_current = self.layout.is_current(init_fsdp2=for_serving)
            if not (is_current and (only_if_moved or for_serving)):
                layout = self.layout.reread()
                if changes := self.layout.describe_changes(layout):
                    described = abbreviated(
                        (f"{name} was {then}, and is now {now}" for name, (then, now) in changes.items()),
                        limit=3,
                        separator="; ",
                    )
                    return ValueError(
                        f"the model changed after ShardedEMA(model) was constructed: {described}. Change and wrap a "
                        "model first, then construct ShardedEMA"
                    )
                # If the tensors are in the same memory, keep the layout: kernels and servings need not be bound again.
                if not (is_current and self.layout.is_same_reading(layout)):
                    layout.require_writable()
                    self.layout: Layout = layout
            if newly_selected := [name for name in self._unselected if self._is_selected(name)]:
                return ValueError(
                    f"parameters {abbreviated(newly_selected)} became trainable after ShardedEMA(model) and have no "
                    "average; construct it after unfreezing, or leave them out with select="
                )
        except Exception as error:  # noqa: BLE001  `prepare` reports any error to the other ranks
            return ValueError(
                f"the model cannot be read: {error!r}; undo its last change, or construct ShardedEMA again"
            ).with_traceback(error.__traceback__)
        return None

    def require_not_wrapped_in_ddp(self, call: str) -> None:
        """Raise ValueError if DDP has wrapped the model after construction."""
        if self._ddp_wrap_detector is not None and self._ddp_wrap_detector.has_wrapped:
            raise ValueError(
                f"{call}: DDP wrapped this model after ShardedEMA(...) was constructed, and broadcast rank 0's "
                "weights, so the averages on other ranks started from different weights. Wrap the model first, then "
                "construct ShardedEMA(wrapped_model)"
            )

    def describe_drift(self) -> str:
        """Name the live weights that differ between replicas, by checksums; empty if there are none.

        Collective: over `ranks`; only the replicas that differ get the names, other ranks get an empty text.
        """
        return describe_drift(self.layout.parameters.values())

    def check_replicas(self, call: str) -> None:
        """Compare the live weights of replicas by checksums.

        Collective: over `ranks`. Raises: RuntimeError on every rank when any replicas differ.
        """
        self.rendezvous(f"{call}, comparing replicas", problem=self.describe_drift())

    def announce_failure(self, message: str) -> None:
        """Make every later call that needs other ranks raise, here and, through the store, on the other `ranks`.

        Collective: no.
        """
        if self._failure:
            return
        self._failure = message
        announce_failure(self.ranks, message)

    def require_unbroken(self) -> None:
        """Raise RuntimeError after `announce_failure` on any rank."""
        if self._failure:
            raise RuntimeError(self._failure)

    def _is_selected(self, name: str) -> bool:
        return self._select(name, self.layout.parameters[name].owner)


def _requires_grad(_: str, parameter: Tensor) -> bool:
    return parameter.requires_grad
