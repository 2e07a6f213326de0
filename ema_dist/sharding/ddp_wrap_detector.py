"""Notices that DDP wraps a model after it was read."""

from __future__ import annotations

import gc
from weakref import finalize, ref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel


class DDPWrapDetector:
    """Whether DDP has wrapped ``model``, a part of it, or a module around it since this object was made.

    Another DDP around the module of one does not count: the ranks held the same weights before.

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
            detector, model = self_ref(), model_ref()
            if detector is None or model is None or {*child.modules()}.isdisjoint(model.modules()):
                return
            if not _is_in_another_ddp(model, parent):
                detector.has_wrapped = True

        finalize(self, register_module_module_registration_hook(on_registration).remove)


def _is_in_another_ddp(model: nn.Module, ddp: DistributedDataParallel) -> bool:
    """Whether an older DDP than ``ddp`` contains all of ``model``. Modules do not know their parents: a slow search."""
    modules = {*model.modules()}
    others = (other for other in gc.get_objects() if issubclass(type(other), DistributedDataParallel))
    return any(other is not ddp and modules <= {*other.modules()} for other in others)
