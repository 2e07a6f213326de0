"""FSDP2: dropping what a forward pass left gathered, and letting it gather other tensors than the live shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

P = ParamSpec("P")
R = TypeVar("R")

# There is no public way to let FSDP2 gather another tensor. These are the private attributes that it takes; where a
# version of torch lacks one, `Units.missing` names it, and averages are served by a swap instead.
STATE_ATTRIBUTES = ("_training_state", "_state_ctx", "_comm_ctx", "_root_pre_forward")
STATE_ATTRIBUTES += ("_register_root_post_backward_final_callback",)
GROUP_ATTRIBUTES = ("fsdp_params", "is_sharded", "reshard", "lazy_init", "wait_for_unshard", "_all_gather_result")
GROUP_ATTRIBUTES += ("_training_state", "_post_forward_indices")
PARAMETER_ATTRIBUTES = ("sharded_param", "_sharded_param_data", "_sharded_local_tensor")
CONTEXT_ATTRIBUTES = ("iter_forward_root", "post_optim_event")


class Units:
    """What ``fully_shard`` has cut in one model.

    Its attributes are empty for a model without FSDP2, and where torch hides what must be read of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        states = [module._get_fsdp_state() for module in self._modules if hasattr(module, "_get_fsdp_state")]
        self.states: list[FSDPState] = list({id(state): state for state in states}.values())
        self.groups: list[FSDPParamGroup] = [group for state in self.states for group in _groups(state)]
        parameters: list[FSDPParam] = [it for group in self.groups for it in getattr(group, "fsdp_params", ())]
        self.missing = _missing(self.states, self.groups, parameters)
        """Private attributes that this version of torch lacks."""
        if self._modules and not self.states:
            self.missing = ["_get_fsdp_state"]
        self._is_settled = False
        self.parameters: dict[int, FSDPParam] = {} if self.missing else {id(it.sharded_param): it for it in parameters}
        """FSDP2's own records, by the ids of the parameters that the modules show."""

    def reshard(self) -> None:
        """Drop gathered weights, also those on their way: the next forward gathers the shards as they are then."""
        if self.missing:
            for module in self._modules:
                module.reshard()
            return
        for group in self.groups:
            if group._all_gather_result is not None:  # unshard(async_op=True): the next forward would take them as live
                group.wait_for_unshard()
            if not group.is_sharded:
                group.reshard()

    def settle(self) -> None:
        """Drop gathered weights, and do now what FSDP2 would put off until its first forward pass.

        Uneven shards may move by that. Raises: RuntimeError in the middle of a forward or backward pass.
        """
        groups = [] if self.missing else self.groups
        if any(not group.is_sharded and group._training_state.name != "IDLE" for group in groups):
            raise RuntimeError(
                "FSDP2 is in the middle of a forward or backward pass, or an exception ended one: come back outside of "
                "it, after a complete one"
            )
        for group in () if self._is_settled else groups:
            group.lazy_init()
        self._is_settled = True
        self.reshard()

    def abandon(self) -> None:
        """Forget a pass that an exception ended: FSDP2 would keep its weights gathered for the next one."""
        groups = [] if self.missing else self.groups
        if any(not group.is_sharded and group._training_state.name != "IDLE" for group in groups):
            idle = type(groups[0]._training_state).IDLE
            for owner in (*self.states, *groups):
                owner._training_state = idle
            for state in self.states:
                state._state_ctx.iter_forward_root = None
            self.reshard()

    def room(self, parameter: Tensor) -> int | None:
        """Elements of the buffer that FSDP2 gathers for ``parameter``, padding included; None where it does not."""
        record = self.parameters.get(id(parameter))
        return None if record is None else record._sharded_param_data.numel()

    @property
    def transformed(self) -> bool:
        """Whether shards transform themselves before they are gathered (float8): then others cannot be gathered."""
        return any(hasattr(it._sharded_local_tensor, "fsdp_pre_all_gather") for it in self.parameters.values())


class Diversion:
    """FSDP2 gathers other tensors than the live shards between `enter` and `leave`; nobody else sees the difference.

    A graph that was built before runs backward after it as ever, and nothing else of the pass in progress changes. What
    would mix averages into gradients is refused inside: a forward pass with gradients, and any backward pass.

    Args:
        data: for each parameter, by its id, a tensor in storage with as many elements as `Units.room` says.

    Memory: nothing. Collective: no; but gathered weights are dropped, and gathered again when they are needed.
    """

    def __init__(self, units: Units, data: Mapping[int, Tensor]) -> None:
        self._units = units
        self._records = [(units.parameters[key], _flat_room(units, key, local)) for key, local in data.items()]
        self._live: list[Tensor] = []
        self._marks: list[tuple[Any, str, Any]] = []
        self._lengths: list[tuple[list[Any], int]] = []

    def enter(self) -> None:
        """Begin: what is gathered from now on is ``data``."""
        units = self._units
        contexts = list({id(state._state_ctx): state._state_ctx for state in units.states}.values())
        orders = {id(order): order for state in units.states if (order := _order(state)) is not None}.values()
        self._marks = [(it, "_training_state", it._training_state) for it in (*units.states, *units.groups)]
        self._marks += [(context, name, getattr(context, name)) for context in contexts for name in CONTEXT_ATTRIBUTES]
        self._lengths = [(it, len(it)) for it in (*orders, *(group._post_forward_indices for group in units.groups))]
        for context in contexts:
            context.post_optim_event = None  # else gathering waits for the optimizer only, not for the averages
        for state in units.states:
            vars(state)["_root_pre_forward"] = partial(_refuse_graphs, state._root_pre_forward)
            refuse = partial(_refuse_backward, state, state._training_state)
            vars(state)["_register_root_post_backward_final_callback"] = refuse
        self._live = [record._sharded_param_data for record, _ in self._records]
        for record, data in self._records:
            record._sharded_param_data = data

    def leave(self) -> list[Tensor]:
        """End: the live shards are gathered again; the parameters that somebody gave other storage meanwhile."""
        for state in self._units.states:
            for name in ("_root_pre_forward", "_register_root_post_backward_final_callback"):
                vars(state).pop(name, None)
        for owner, name, value in self._marks:  # as they were, also when an exception left a forward pass
            setattr(owner, name, value)
        for passes, length in self._lengths:  # backward prefetches as if there had been no forward pass meanwhile
            del passes[length:]
        moved: list[Tensor] = []
        for (record, data), live in zip(self._records, self._live, strict=True):
            if record._sharded_param_data is data:
                record._sharded_param_data = live
            else:
                moved.append(record.sharded_param)
        self._units.reshard()
        return moved


def _groups(state: FSDPState) -> list[FSDPParamGroup]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is None:  # a state has one group in older versions of torch
        one = getattr(state, "_fsdp_param_group", None)
        return [] if one is None else [one]
    return list(several)


def _order(state: FSDPState) -> list[FSDPParamGroup] | None:
    """The groups in the order of their forward passes; there is no such list before the first pass."""
    return getattr(state._comm_ctx, "post_forward_order", None)


def _missing(states: list[FSDPState], groups: list[FSDPParamGroup], parameters: list[FSDPParam]) -> list[str]:
    asked: list[tuple[object, tuple[str, ...]]] = [(state, STATE_ATTRIBUTES) for state in states]
    asked += [(getattr(state, "_state_ctx", None), CONTEXT_ATTRIBUTES) for state in states]
    asked += [(group, GROUP_ATTRIBUTES) for group in groups]
    asked += [(parameter, PARAMETER_ATTRIBUTES) for parameter in parameters]
    return sorted({name for owner, names in asked for name in names if not hasattr(owner, name)})


def _flat_room(units: Units, key: int, local: Tensor) -> Tensor:
    room = units.parameters[key]._sharded_param_data.numel()
    return local.as_strided((room,), (1,))


def _refuse_graphs(root_pre_forward: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a forward pass with gradients inside serving(): FSDP2 would run its backward with the live weights; "
            "leave out torch.enable_grad(), or use swapped()"
        )
    return root_pre_forward(*args, **kwargs)


def _refuse_backward(state: FSDPState, before: TrainingState) -> NoReturn:
    state._training_state = before
    raise RuntimeError(
        "backward() inside serving(): FSDP2 would gather averages for it; call it after the block, or before"
    )
