"""Notices that DDP wraps a model after it was read."""

from __future__ import annotations

from weakref import finalize, ref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel


class LaterDDP:
    """Whether DDP has wrapped ``model``, a part of it, or a module around it since this object was made.

    DDP changes nothing in the module that it wraps, but it registers it as a submodule, for which torch calls a hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self.has_wrapped = False
        self_ref, model_ref = ref(self), ref(model)  # torch references the hook globally

        def on_registration(parent: nn.Module, _name: str, child: nn.Module | None) -> None:
            if not isinstance(parent, DistributedDataParallel) or child is None:
                return
            group = parent.process_group  # set before the module is registered
            if group is None or group.size() == 1:
                return
            later_ddp, model = self_ref(), model_ref()
            if later_ddp is not None and model is not None and not {*child.modules()}.isdisjoint(model.modules()):
                later_ddp.has_wrapped = True

        finalize(self, register_module_module_registration_hook(on_registration).remove)
