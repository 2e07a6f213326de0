"""The formats of averages that ``torch.save`` writes, one function each.

Each function takes the content of a file. It returns the averages, or None if the file has another format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.foreign_averages import Counts, ForeignAverages
from ema_dist.checkpoint.importing.named_tensors import WRAPPER_PREFIX, NamedTensors, smallest_inexact
from ema_dist.checkpoint.values import unreadable_reason
from ema_dist.schedules.diffusers_law import diffusers_law


def averaged_model(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """The ``state_dict()`` of ``torch.optim.swa_utils.AveragedModel``."""
    others = content.keys() - {"n_averaged"}
    if "n_averaged" not in content or not others or not all(name.startswith(WRAPPER_PREFIX) for name in others):
        return None
    tensors = NamedTensors.of_dictionary(content).without_prefix(WRAPPER_PREFIX).unwrapped()
    steps = read_count(content["n_averaged"], "n_averaged", path)
    return ForeignAverages("averaged-model", path, tensors, counts=Counts.of_each_step(steps))


def lightning(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """A checkpoint of Lightning with its callback ``WeightAveraging``, or with this package's callback."""
    averages, averaging_state = content.get("state_dict"), content.get("averaging_state")
    if not isinstance(averages, Mapping) or not isinstance(averaging_state, Mapping):
        return None
    steps = read_count(averaging_state.get("n_averaged"), "averaging_state.n_averaged", path)
    return ForeignAverages("lightning", path, NamedTensors.of_dictionary(averages), counts=Counts.of_each_step(steps))


def timm(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """A checkpoint of timm's ``CheckpointSaver``; older versions call the averages ``model_ema``."""
    for key in ("state_dict_ema", "model_ema"):
        if isinstance(averages := content.get(key), Mapping):
            return ForeignAverages("timm", path, NamedTensors.of_dictionary(averages).unwrapped())
    return None


def diffusers_state(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """The ``state_dict()`` of diffusers' ``EMAModel``, which lists its tensors without names."""
    listed = content.get("shadow_params")
    if not isinstance(listed, list) or not all(isinstance(tensor, Tensor) for tensor in listed):
        return None
    named = NamedTensors.of_dictionary({f"shadow_params[{index}]": tensor for index, tensor in enumerate(listed)})
    return ForeignAverages("diffusers", path, None, [*named.read(named.meta)], counts=diffusers_counts(content, path))


def ema_pytorch(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """The ``state_dict()`` of ema-pytorch's ``EMA``, or a snapshot of its ``PostHocEMA``, ``<index>.<step>.pt``."""
    if not {"initted", "step"} <= content.keys() or not any(name.startswith("ema_model.") for name in content):
        return None
    tensors = NamedTensors.of_dictionary(content).without_prefix("ema_model.").unwrapped()
    step = content["step"]
    is_rounded = isinstance(step, Tensor) and step.is_floating_point()
    name = re.fullmatch(r"\d+\.(\d+)\.pt", path.name) if is_rounded else None
    steps = int(name[1]) if name else read_count(step, "step", path)
    if is_rounded and not name and steps >= smallest_inexact(step.dtype):
        raise CheckpointError(
            f"{path} stores its step as {step.dtype}, {steps}, which may be rounded: restore the name that PostHocEMA "
            "gave to the file, which ends with the step, such as 0.5000.pt"
        )
    return ForeignAverages("ema-pytorch", path, tensors, counts=Counts.of_each_step(steps))


def composer(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """A monolithic checkpoint of Composer with its algorithm ``EMA``, or with this package's."""
    state = content.get("state")
    if not isinstance(state, Mapping):
        return None
    algorithms = state.get("algorithms")
    for pair in algorithms.items() if isinstance(algorithms, Mapping) else algorithms or ():
        match tuple(pair):
            case ("EMA", {"ema_model": {"named_parameters_dict": parameters, "named_buffers_dict": buffers}} as ema):
                return _composer_averages(state["model"], ema, parameters, buffers, path)
    return None


def _composer_averages(
    model: Mapping[str, Any],
    ema: Mapping[str, Any],
    parameters: Mapping[str, Any],
    buffers: Mapping[str, Any],
    path: Path,
) -> ForeignAverages:
    # The names in `model` have no prefix of DDP. A child of the model is often called `module`, so only names that
    # `model` lacks lose the prefix. Names that it lacks even then belong to buffers that are not persistent.
    unwrapped = {name: name if name in model else name.removeprefix(WRAPPER_PREFIX) for name in (*parameters, *buffers)}
    names = {name: known for name, known in unwrapped.items() if known in model}
    stored: Mapping[str, Any] = {**parameters, **buffers}
    if ema.get("ema_weights_active", False):  # then `stored` is the live weights, and `model` has the averages
        stored = {name: model[known] for name, known in names.items()}
        if exact := ema.get("averages"):  # this package also stores the averages that `model` holds rounded
            stored = {name: exact[known] for name, known in names.items()}
    averages = NamedTensors.of_dictionary({known: stored[name] for name, known in names.items()})
    counts = Counts(are_recorded=False)
    if "updates" in ema:  # Composer's own EMA counts nothing
        steps, updates = (read_count(ema[key], key, path) for key in ("steps", "updates"))
        counts = Counts(steps, updates)
    return ForeignAverages(
        "composer", path, averages, counts=counts, buffers=frozenset(unwrapped[name] for name in buffers)
    )


def nemo(content: Mapping[str, Any], path: Path) -> ForeignAverages | None:
    """The file ``*-EMA.ckpt`` that NeMo 1 writes beside a checkpoint."""
    averages, optimizers = content.get("state_dict"), content.get("optimizer_states")
    if not isinstance(averages, Mapping) or not isinstance(optimizers, list):
        return None
    for optimizer in optimizers:
        if isinstance(optimizer, Mapping) and {"ema", "current_step"} <= optimizer.keys():
            steps = read_count(optimizer["current_step"], "current_step", path)
            tensors = NamedTensors.of_dictionary(averages)
            return ForeignAverages("nemo", path, tensors, counts=Counts.of_each_step(steps))
    return None


def diffusers_counts(settings: Mapping[str, Any], path: Path) -> Counts:
    """The counts and the law in the settings of diffusers' ``EMAModel``."""
    steps = read_count(settings.get("optimization_step"), "optimization_step", path)
    start = read_count(settings.get("update_after_step", 0), "update_after_step", path)
    try:
        law = diffusers_law(
            decay=settings["decay"],
            min_decay=settings.get("min_decay", 0.0),
            use_ema_warmup=bool(settings.get("use_ema_warmup")),
            inv_gamma=settings.get("inv_gamma", 1.0),
            power=settings.get("power", 2 / 3),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the settings of the averages are damaged: {error}") from None
    return Counts.of_each_step(steps, start=start, law=law)


def read_count(value: object, name: str, path: Path) -> int:
    """A count in a file. Raises: CheckpointError unless it is a whole number that is not negative."""
    is_readable = isinstance(value, Tensor) and not unreadable_reason(value) and value.numel() == 1
    number = value.item() if is_readable else value
    is_whole = isinstance(number, int | float) and not isinstance(number, bool) and number == number // 1
    if not is_whole or not 0 <= number < 2**53:
        raise CheckpointError(f"{path}: expected a number of steps in {name}, found {_describe(value)}")
    return int(number)


def _describe(value: object) -> str:
    reason = unreadable_reason(value) if isinstance(value, Tensor) else ""
    return reason or repr(value)
