"""Detects that DDP wraps a model after the model was read."""

from __future__ import annotations

import gc
from weakref import finalize, ref

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel


class DDPWrapDetector:
    """Detects whether DDP has wrapped ``model``, a part of it, or a module that contains it since this object was made.

    A second DDP around a module that is in DDP already does not count: its ranks held the same weights before.

    DDP does not change the module that it wraps, but registers it as a submodule, and torch calls a hook for that.
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
    """Whether an older DDP than ``ddp`` contains all of ``model``; slow, as modules do not know their parents."""
    modules = {*model.modules()}
    others = (other for other in gc.get_objects() if issubclass(type(other), DistributedDataParallel))
    return any(other is not ddp and modules <= {*other.modules()} for other in others)
