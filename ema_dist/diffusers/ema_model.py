"""An EMAModel with the arguments, methods and files of diffusers' own, implemented by a `ShardedEMA`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from operator import attrgetter
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_dist.averages.offload import Offloaded
from ema_dist.diffusers.full_averages import (
    gather_averages,
    is_sharded,
    load_averages,
    require_shapes,
    shapes_of,
    write,
)
from ema_dist.diffusers.settings import DecaySettings
from ema_dist.ema import ShardedEMA
from ema_dist.kernels import copy_to_host
from ema_dist.sharding import Layout


def _setting(name: str, meaning: str) -> Any:  # noqa: ANN401  as `property`
    return property(attrgetter(f"_settings.{name}"), doc=meaning)


class EMAModel:
    """diffusers' EMAModel on every layout: change the import, and pass the model instead of its parameters.

    The averages are constructed at the first `step`, so DDP or ``fully_shard`` may still wrap the model after this
    constructor. Until the first `step`, the averages are the current weights of the model, or those that
    `load_state_dict` loaded. Frozen parameters have no average: their values are copied from the model.

    Args:
        model: the model, before or after ``accelerator.prepare``. For FSDP1: what ``prepare`` returned.
        decay: the largest decay.
        min_decay: the smallest decay after the first update.
        update_after_step: steps 1 to ``update_after_step + 1`` copy the weights; averaging begins after them.
        use_ema_warmup: whether the decay grows as ``1 - (1 + step / inv_gamma) ** -power``. Otherwise it grows as
            ``(1 + step) / (10 + step)``.
        inv_gamma: see ``use_ema_warmup``.
        power: see ``use_ema_warmup``.
        foreach: accepted for compatibility; updates always run on lists of tensors.
        model_cls: the model's class, for `save_pretrained`.
        model_config: the model's configuration, for `save_pretrained`.
        dtype: dtype of the averages, as for `ShardedEMA`.
        timeout: seconds that ranks wait for each other in a collective call, as for `ShardedEMA`.

    Collective: the first `step`, over the ranks that hold the model, if it is sharded or was wrapped before this
        constructor. If DDP wraps the model afterwards, no method communicates.
    Memory: as `ShardedEMA` with ``replicas="copy"``.
    Raises: TypeError for an argument of a wrong type; ValueError for a number out of range.
    Source: ``diffusers.training_utils.EMAModel`` of diffusers 0.42.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,  # noqa: FBT001, FBT002  as diffusers has it
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,  # noqa: FBT001, FBT002
        model_cls: Any | None = None,  # noqa: ANN401
        model_config: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        timeout: float = 60.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"expected the model, got a {type(model).__name__}: pass EMAModel(unet, ...) instead of "
                "EMAModel(unet.parameters(), ...)"
            )
        self.foreach = foreach
        self.model_cls = model_cls
        self.model_config = model_config
        self._settings = DecaySettings(decay, min_decay, update_after_step, use_ema_warmup, inv_gamma, power)
        self._model = model
        self._shapes = shapes_of(model)
        self._dtype = dtype
        self._timeout = timeout
        self._store: Offloaded | None = None
        self._ema: ShardedEMA | None = None
        self._loaded: list[Tensor] | None = None
        """Full averages that were loaded, until `_ema` is constructed."""
        self._loaded_step = 0
        self._trained: dict[int, bool] = {}
        """Whether each parameter, by `id`, required gradients when `_ema` was constructed."""
        self._stored: dict[str, Tensor] | None = None
        """This rank's live parameters and buffers, kept from `store` to `restore`."""

    decay: float = _setting("decay", "The largest decay.")
    min_decay: float = _setting("min_decay", "The smallest decay after the first update.")
    update_after_step: int = _setting("update_after_step", "Steps up to this one, and the next, copy the weights.")
    use_ema_warmup: bool = _setting("use_ema_warmup", "Whether the decay grows by ``inv_gamma`` and ``power``.")
    inv_gamma: float = _setting("inv_gamma", "The inverse multiplicative factor of the warm-up.")
    power: float = _setting("power", "The exponent of the warm-up.")

    @property
    def ema(self) -> ShardedEMA | None:
        """The averages; None until the first `step`."""
        return self._ema

    @property
    def optimization_step(self) -> int:
        """Number of calls of `step`, those of a loaded state included."""
        return self._loaded_step if self._ema is None else self._ema.steps

    @property
    def cur_decay_value(self) -> float | None:
        """The factor of the old average at the last step; None before the first one."""
        return self.get_decay(self.optimization_step) if self.optimization_step else None

    def get_decay(self, optimization_step: int) -> float:
        """The factor of the old average at a step, counted from 1; 0 if it copies the weights."""
        return self._settings.decay_at(optimization_step)

    @property
    def shadow_params(self) -> list[Tensor]:
        """Copies of the full averages on the CPU, in the order of ``model.parameters()``, frozen parameters included.

        Collective: over the ranks that hold a sharded model; on each of them it returns the whole list.
        """
        if self._ema is None and self._loaded is not None:
            return [tensor.clone() for tensor in self._loaded]
        layout = Layout(self._model, "copy")
        full = gather_averages(self._ema, layout, "shadow_params", timeout=self._timeout, is_destination=True)
        return [full[name] for name in layout.parameters]

    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update the averages; call it on every rank after each optimizer step.

        Args:
            parameters: ``model.parameters()``, after any wrapping.

        Collective: the first call, as described at the class; later calls are not.
        Raises: ValueError for parameters of another model, for a model that was changed or wrapped after the first
            call, and for parameters that DeepSpeed ZeRO-3 has partitioned.
        """
        own = self._require_own(parameters, "step")
        if any(
            self._trained.get(id(parameter), parameter.requires_grad) != parameter.requires_grad for parameter in own
        ):
            raise ValueError(
                "parameters were frozen or unfrozen since the first step(): call state = ema.state_dict() before that, "
                "and ema.load_state_dict(state) after it"
            )
        if self._ema is None:
            ema = ShardedEMA(
                self._model,
                decay=self._settings.make_law(),
                start=self.update_after_step,
                dtype=self._dtype,
                replicas="copy",  # the main process may then call copy_to() and save_pretrained() alone
                buffers="copy",
                store=self._store,
                timeout=self._timeout,
            )
            if self._loaded_step or self._loaded is not None:
                load_averages(ema, self._loaded, self._settings, self._loaded_step)
            self._ema, self._loaded, self._loaded_step = ema, None, 0
            self._trained = {id(parameter): parameter.requires_grad for parameter in own}
        self._ema.update()

    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite ``parameters`` with the averages.

        Args:
            parameters: those of the model, or those of an unwrapped model of the same shapes, in the same order.

        Collective: no, except for a sharded model.
        Raises: ValueError for parameters that do not match the averages, before anything changes; RuntimeError when
            ranks of a sharded model do not arrive within ``timeout``.
        """
        targets = _as_list(parameters)
        if not self._are_own(targets):
            self._copy_to_others(targets)
        elif self._ema is not None:
            self._ema.copy_to(self._model)
        elif self._loaded is not None:
            layout = Layout(self._model, "copy")
            shards = layout.parameters.values()
            write(layout, {s.name: s.slice_full(full) for s, full in zip(shards, self._loaded, strict=True)})

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of the model's parameters and buffers on the CPU, for `restore`.

        Args:
            parameters: ``model.parameters()``.

        Collective: no. Memory: the live parameters and buffers of this rank, on the CPU.
        Raises: ValueError for parameters of another model.
        """
        self._require_own(parameters, "store")
        self._stored = {shard.name: copy_to_host(shard.local) for shard in Layout(self._model, "copy").shards}

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write the values that `store` kept back into the model, bit-identical.

        Args:
            parameters: ``model.parameters()``.

        Collective: no.
        Raises: RuntimeError if there is no stored copy; ValueError for parameters of another model.
        """
        if self._stored is None:
            raise RuntimeError("restore() has nothing to restore: call store() first")
        self._require_own(parameters, "restore")
        write(Layout(self._model, "copy"), self._stored)
        self._stored = None

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the averages and settings as a folder that diffusers' own `from_pretrained` loads.

        The main process may call it alone, unless the model is sharded: then all its ranks call it, and the first one
        writes.

        Collective: over the ranks that hold a sharded model. Memory: a model on the CPU of the rank that writes.
        Raises: ValueError if ``model_cls`` or ``model_config`` was not given; RuntimeError if the model constructed
            from them has other parameters, or if ranks of a sharded model do not arrive within ``timeout``.
        """
        for name in ("model_cls", "model_config"):
            if getattr(self, name) is None:
                raise ValueError(f"save_pretrained() needs {name}: pass it, EMAModel(model, {name}=...)")
        layout = Layout(self._model, "copy")
        is_writer = not is_sharded(layout) or dist.get_rank() == layout.ranks[0]
        full = gather_averages(self._ema, layout, "save_pretrained()", timeout=self._timeout, is_destination=is_writer)
        if not is_writer:
            return
        if self._ema is None and self._loaded is not None:
            full |= dict(zip(layout.parameters, self._loaded, strict=True))
        model = self.model_cls.from_config(self.model_config)  # pyrefly: ignore[missing-attribute]
        model.register_to_config(**self._settings.as_dict(), optimization_step=self.optimization_step)
        model.load_state_dict(full)
        model.save_pretrained(path)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        model_cls: Any,  # noqa: ANN401
        foreach: bool = False,  # noqa: FBT001, FBT002  as diffusers has it
    ) -> EMAModel:
        """An EMAModel with the averages and settings in a folder that this class or diffusers' own has saved.

        Its model is a new one, not the trained one. To resume, pass its `state_dict` to `load_state_dict` of the
        EMAModel that was constructed with the trained model.

        Args:
            path: the folder.
            model_cls: the model's class.
            foreach: as for the constructor.
        """
        model = model_cls.from_pretrained(path)
        ema = cls(model, foreach=foreach, model_cls=model_cls, model_config=model.config)
        ema.load_state_dict(model_cls.load_config(path))
        return ema

    def state_dict(self) -> dict[str, Any]:
        """The settings, ``optimization_step`` and `shadow_params`, as diffusers' own `load_state_dict` takes them.

        Collective: as `shadow_params`.
        """
        return {
            **self._settings.as_dict(),
            "optimization_step": self.optimization_step,
            "shadow_params": self.shadow_params,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of diffusers' own, settings included; entries that it lacks do not change.

        Every rank passes the same state. The averages are copied and sharded at the next `step`.

        Raises: ValueError before any change, when tensors differ in number or shape from the model's parameters.
        """
        settings = self._settings.updated(state_dict)
        step = state_dict.get("optimization_step", self.optimization_step)
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"optimization_step must be an integer >= 0, got {step!r}")
        tensors = state_dict.get("shadow_params")
        if tensors is not None:
            require_shapes(tensors, self._shapes, "shadow_params")
            tensors = [tensor.detach().clone() for tensor in tensors]
        elif self._ema is not None or self._loaded is not None:
            tensors = self.shadow_params
        self._settings, self._loaded_step, self._loaded, self._ema = settings, step, tensors, None
        self._trained = {}

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,  # noqa: ARG002, FBT001, FBT002  as diffusers has it
    ) -> None:
        """Choose the dtype of the averages, before the first `step`; ``device`` is accepted for compatibility.

        Averages stay on the device of the live weights, or in CPU memory after `pin_memory`. Scripts with
        ``--offload_ema`` need not move them.

        Raises: RuntimeError for another ``dtype`` after the first step.
        Warns: UserWarning for ``to("cpu")`` without `pin_memory`, if the live weights are on another device.
        """
        if dtype is not None and dtype != self._dtype:
            if self._ema is not None:
                averages = self._ema.state_dict()["tracks"]["default"]["averages"]
                if stored := {average.dtype for average in averages.values()} - {dtype}:
                    raise RuntimeError(
                        f"to(dtype={dtype}) came after the first step, and the averages are "
                        f"{', '.join(map(str, stored))}: call it before, or pass EMAModel(dtype=)"
                    )
            self._dtype = dtype
        if device is not None and self._store is None and torch.device(device).type == "cpu":
            live = next(self._model.parameters()).device.type
            if live not in ("cpu", "meta"):
                warnings.warn(
                    f'to("cpu") has no effect: the averages stay on {live} beside the weights. To keep them in CPU '
                    "memory, call pin_memory() before the first step",
                    stacklevel=2,
                )

    def pin_memory(self) -> None:
        """Keep the averages in pinned CPU memory, as ``store=Offloaded()``; call it before the first `step`.

        Raises: RuntimeError after the first step, unless the averages are already there.
        """
        if self._ema is not None and self._store is None:
            raise RuntimeError("pin_memory() after the first step: call it before")
        self._store = Offloaded()

    def _copy_to_others(self, targets: list[nn.Parameter]) -> None:
        averages = self.shadow_params
        require_shapes(targets, [average.shape for average in averages], "parameters given to copy_to()")
        with torch.no_grad():
            for target, average in zip(targets, averages, strict=True):
                target.copy_(average)

    def _are_own(self, parameters: list[nn.Parameter]) -> bool:
        return [*map(id, parameters)] == [*map(id, self._model.parameters())]

    def _require_own(self, parameters: Iterable[nn.Parameter] | nn.Module, method: str) -> list[nn.Parameter]:
        given = _as_list(parameters)
        if not self._are_own(given):
            own = {id(parameter) for parameter in self._model.parameters()}
            shared = sum(id(parameter) in own for parameter in given)
            raise ValueError(
                f"{method}() expected the {len(own)} parameters of the model given to EMAModel, got {len(given)}, "
                f"{shared} of them from that model. Pass parameters() of the same model; if it was rebuilt, construct "
                "EMAModel again from the new one"
            )
        return given


def _as_list(parameters: Iterable[nn.Parameter] | nn.Module) -> list[nn.Parameter]:
    """The parameters; diffusers' own methods also take the model itself."""
    return [*(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)]
