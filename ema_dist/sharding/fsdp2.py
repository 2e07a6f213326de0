"""FSDP2: drops weights that a forward pass left gathered, and makes FSDP2 gather substitutes for the live shards."""

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

# There is no public way to make FSDP2 gather another tensor. These are the private attributes that this needs. If a
# version of torch lacks one, `FSDP2Units.missing_attributes` names it, and `serving()` swaps instead.
STATE_ATTRIBUTES = ("_training_state", "_state_ctx", "_comm_ctx", "_root_pre_forward")
STATE_ATTRIBUTES += ("_register_root_post_backward_final_callback",)
GROUP_ATTRIBUTES = ("fsdp_params", "is_sharded", "reshard", "lazy_init", "wait_for_unshard", "_all_gather_result")
GROUP_ATTRIBUTES += ("_training_state", "_post_forward_indices")
PARAMETER_ATTRIBUTES = ("sharded_param", "_sharded_param_data", "_sharded_local_tensor")
CONTEXT_ATTRIBUTES = ("iter_forward_root", "post_optim_event")


class FSDP2Units:
    """The modules of one model that ``fully_shard`` was applied to, with their states and parameter groups.

    The attributes are empty for a model without FSDP2, and if torch lacks one of the private attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        states = [module._get_fsdp_state() for module in self._modules if hasattr(module, "_get_fsdp_state")]
        self.states: list[FSDPState] = list({id(state): state for state in states}.values())
        self.groups: list[FSDPParamGroup] = [group for state in self.states for group in _param_groups(state)]
        fsdp_params: list[FSDPParam] = [
            fsdp_param for group in self.groups for fsdp_param in getattr(group, "fsdp_params", ())
        ]
        self.missing_attributes = _missing_attributes(self.states, self.groups, fsdp_params)
        """Private attributes that this version of torch lacks."""
        if self._modules and not self.states:
            self.missing_attributes: list[str] = ["_get_fsdp_state"]
        self._is_initialized = False
        self.fsdp_param_by_id: dict[int, FSDPParam] = (
            {} if self.missing_attributes else {id(fsdp_param.sharded_param): fsdp_param for fsdp_param in fsdp_params}
        )
        """FSDP2's own records, by the ids of the parameters that the modules hold."""

        self._first_entries: dict[tuple[int, str], tuple[nn.Module, str]] = {
            (id(module), name): (info.module, info.param_name)
            for fsdp_param in fsdp_params
            if (info := getattr(fsdp_param, "_module_info", None)) is not None
            for module, name in zip(info.shared_modules, info.shared_param_names, strict=True)
        }

    def first_parameter(self, module: nn.Module, name: str) -> Tensor | None:
        """The parameter that FSDP2 will also register as ``module.name``, because they are tied; None if there is none.

        ``load_state_dict(assign=True)`` gives each name a parameter of its own. FSDP2 uses the parameter of the first
        name, and registers it under the other names in the next forward pass.
        """
        first_module, first_name = self._first_entries.get((id(module), name), (None, ""))
        return None if first_module is None else first_module._parameters.get(first_name)

    def reshard(self) -> None:
        """Drop gathered weights and unfinished gathers, so that the next forward pass gathers the current shards."""
        if self.missing_attributes:
            for module in self._modules:
                module.reshard()
            return
        for group in self.groups:
            # unshard(async_op=True) is unfinished: the next forward pass would use its result.
            if group._all_gather_result is not None:
                group.wait_for_unshard()
            if not group.is_sharded:
                group.reshard()

    def clear_optim_events(self) -> None:
        """Make the next forward pass gather after all earlier work on the current stream.

        After ``set_post_optim_event(event)`` FSDP2 gathers as soon as the optimizer's event has passed, and would read
        shards to which a swap still writes. So the current stream waits for the event here, and FSDP2, which then has
        no event, waits for the current stream. Training loses only the overlap of one pass.
        """
        contexts: list[Any] = [getattr(state, "_state_ctx", None) for state in self.states]
        for context in contexts:
            if (event := getattr(context, "post_optim_event", None)) is not None:
                event.wait()
                context.post_optim_event = None

    def init_and_reshard(self) -> None:
        """Drop gathered weights, and run the initialization that FSDP2 does lazily in its first forward pass.

        The initialization may give uneven shards other storage.

        Raises: RuntimeError in the middle of a forward or backward pass.
        """
        groups = [] if self.missing_attributes else self.groups
        if any(not group.is_sharded and group._training_state.name != "IDLE" for group in groups):
            raise RuntimeError(
                "FSDP2 is in the middle of a forward or backward pass, or an exception ended one: make this call "
                "outside of a pass, after a complete pass"
            )
        for group in () if self._is_initialized else groups:
            group.lazy_init()
        self._is_initialized = True
        self.reshard()

    def abandon_pass(self) -> None:
        """Reset FSDP2 after an exception ended a pass, else it would keep the gathered weights for the next pass."""
        groups = [] if self.missing_attributes else self.groups
        if any(not group.is_sharded and group._training_state.name != "IDLE" for group in groups):
            idle = type(groups[0]._training_state).IDLE
            for owner in (*self.states, *groups):
                owner._training_state = idle
            for state in self.states:
                state._state_ctx.iter_forward_root = None
            self.reshard()

    def padded_numel(self, parameter: Tensor) -> int | None:
        """Elements of the buffer that FSDP2 gathers for ``parameter``, including padding; None if it gathers none."""
        fsdp_param = self.fsdp_param_by_id.get(id(parameter))
        return None if fsdp_param is None else fsdp_param._sharded_param_data.numel()

    @property
    def has_gather_transforms(self) -> bool:
        """Whether shards transform themselves before they are gathered (float8), so that they have no substitutes."""
        return any(
            hasattr(fsdp_param._sharded_local_tensor, "fsdp_pre_all_gather")
            for fsdp_param in self.fsdp_param_by_id.values()
        )


class GatherSubstitution:
    """Between `enter` and `leave`, FSDP2 gathers other tensors instead of the live shards; parameters do not change.

    A graph that was built before `enter` can run backward after `leave`. In between, passes that would mix averages
    into gradients raise a RuntimeError: a forward pass with gradients, and any backward pass.

    Args:
        replacements: a tensor for each parameter, by the parameter's id. Its storage must have as many elements as
            `FSDP2Units.padded_numel` says.

    Memory: none. Collective: no, but gathered weights are dropped, so that the next forward pass gathers them again.
    """

    def __init__(self, fsdp2_units: FSDP2Units, replacements: Mapping[int, Tensor]) -> None:
        self._units = fsdp2_units
        self._replacements = [
            (fsdp2_units.fsdp_param_by_id[key], _padded_view(fsdp2_units.fsdp_param_by_id[key], local))
            for key, local in replacements.items()
        ]
        self._live_data: list[Tensor] = []
        self._saved_attributes: list[tuple[Any, str, Any]] = []
        self._saved_lengths: list[tuple[list[Any], int]] = []
        self._is_inside = False
        """Whether `enter` has completed, and `leave` has not begun."""

    def enter(self) -> None:
        """Make FSDP2 gather the replacements."""
        fsdp2_units = self._units
        contexts = list({id(state._state_ctx): state._state_ctx for state in fsdp2_units.states}.values())
        forward_orders = {
            id(order): order for state in fsdp2_units.states if (order := _forward_order(state)) is not None
        }.values()
        self._saved_attributes = [
            (owner, "_training_state", owner._training_state) for owner in (*fsdp2_units.states, *fsdp2_units.groups)
        ]
        self._saved_attributes += [
            (context, name, getattr(context, name)) for context in contexts for name in CONTEXT_ATTRIBUTES
        ]
        self._saved_lengths = [
            (order, len(order))
            for order in (*forward_orders, *(group._post_forward_indices for group in fsdp2_units.groups))
        ]
        for context in contexts:
            # FSDP2 would wait for this event of the optimizer only, and gather before the averages are written.
            context.post_optim_event = None
        # Instance attributes hide the methods until `leave` removes them.
        for state in fsdp2_units.states:
            vars(state)["_root_pre_forward"] = partial(_refuse_grad_forward, state._root_pre_forward)
            refuse = partial(_refuse_backward, state, state._training_state)
            vars(state)["_register_root_post_backward_final_callback"] = refuse
        self._live_data = [fsdp_param._sharded_param_data for fsdp_param, _ in self._replacements]
        for fsdp_param, data in self._replacements:
            fsdp_param._sharded_param_data = data
        self._is_inside = True

    def leave(self) -> list[Tensor]:
        """Make FSDP2 gather the live shards again; can be called again if an exception interrupted it or `enter`.

        Returns: the parameters that got other storage since `enter`.
        """
        was_inside, self._is_inside = self._is_inside, False
        for state in self._units.states:
            for name in ("_root_pre_forward", "_register_root_post_backward_final_callback"):
                vars(state).pop(name, None)
        # An exception may have ended a forward pass inside: the states must not remain in the middle of it.
        for owner, name, value in self._saved_attributes:
            setattr(owner, name, value)
        # Backward passes prefetch in the order of forward passes: forward passes inside the block must not count.
        for order, length in self._saved_lengths:
            del order[length:]
        with_other_storage: list[Tensor] = []
        for (fsdp_param, data), live in zip(self._replacements, self._live_data, strict=False):  # empty before `enter`
            current = fsdp_param._sharded_param_data
            if current is data:
                fsdp_param._sharded_param_data = live
            elif was_inside or current is not live:
                with_other_storage.append(fsdp_param.sharded_param)
        self._units.reshard()
        return with_other_storage


def _param_groups(state: FSDPState) -> list[FSDPParamGroup]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # in older versions of torch a state has one group
        group = getattr(state, "_fsdp_param_group", None)
        return [] if group is None else [group]
    return list(groups)


def _forward_order(state: FSDPState) -> list[FSDPParamGroup] | None:
    """The groups in the order of their forward passes; None before the first pass."""
    return getattr(state._comm_ctx, "post_forward_order", None)


def _missing_attributes(
    states: list[FSDPState], groups: list[FSDPParamGroup], fsdp_params: list[FSDPParam]
) -> list[str]:
    required: list[tuple[object, tuple[str, ...]]] = [(state, STATE_ATTRIBUTES) for state in states]
    required += [(getattr(state, "_state_ctx", None), CONTEXT_ATTRIBUTES) for state in states]
    required += [(group, GROUP_ATTRIBUTES) for group in groups]
    required += [(parameter, PARAMETER_ATTRIBUTES) for parameter in fsdp_params]
    return sorted({name for owner, names in required for name in names if not hasattr(owner, name)})


def _padded_view(fsdp_param: FSDPParam, local: Tensor) -> Tensor:
    return local.as_strided((fsdp_param._sharded_param_data.numel(),), (1,))


def _refuse_grad_forward(root_pre_forward: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a forward pass with gradients inside serving() is not supported: FSDP2 would run its backward pass with "
            "the live weights. Remove torch.enable_grad(), or use swapped()"
        )
    return root_pre_forward(*args, **kwargs)


def _refuse_backward(state: FSDPState, training_state: TrainingState) -> NoReturn:
    state._training_state = training_state
    raise RuntimeError(
        "backward() inside serving() is not supported: FSDP2 would gather averages for it. Call it before or after the "
        "block"
    )
