"""All averaging methods that the benchmark compares: ours, and those that a user could choose instead.

Each is set up as its documentation describes, with its fastest settings, float32 averages and a constant decay. Its
package is imported only when the averages are made, so that a missing package becomes a row of the table.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_dist import ShardedEMA
from launch.benchmark.cases import Case, local, unwrap_ddp

OURS = "ShardedEMA"
OURS_COPY = 'ShardedEMA, replicas="copy"'
OURS_AUTO = 'ShardedEMA, kernel="auto"'
SERVING = "ShardedEMA.serving()"
FOREACH = "_foreach_lerp_ on plain lists"
DTENSOR_FOREACH = "_foreach_lerp_ on DTensors"
COMPOSER = "Composer's formula"
AVERAGED_MODEL = "torch AveragedModel, foreach"
TIMM = "timm ModelEmaV3"
EMA_PYTORCH = "ema-pytorch EMA"
DIFFUSERS = "diffusers EMAModel, foreach"
LIGHTNING = "Lightning EMAWeightAveraging"
SHORT_NAMES = {
    OURS: "ours",
    OURS_AUTO: "ours, auto",
    OURS_COPY: "ours, copy",
    FOREACH: "plain foreach",
    DTENSOR_FOREACH: "DTensor foreach",
    AVERAGED_MODEL: "torch",
    TIMM: "timm",
    EMA_PYTORCH: "ema-pytorch",
    DIFFUSERS: "diffusers",
    LIGHTNING: "Lightning",
    COMPOSER: "Composer",
}


@dataclass(frozen=True)
class Averager:
    """Averages of one model.

    Args:
        averages: returns the averages of each track by name, in float32.
        swapped: a context manager inside which the model uses the first track; None if not supported.
        shares_live_reads: whether all tracks share one read of the live weights.
    """

    update: Callable[[], object]
    averages: Callable[[], Sequence[Mapping[str, Tensor]]]
    swapped: Callable[[], AbstractContextManager[object]] | None = None
    shares_live_reads: bool = False


Make = Callable[[nn.Module, Sequence[float]], Averager]
"""Makes the averages of a model, one track for each decay."""


def sharded_ema(
    model: nn.Module,
    decays: Sequence[float],
    replicas: Literal["shard", "copy"] = "shard",
    *,
    kernel: str | None = None,
    serving: bool = False,
) -> Averager:
    decay_by_track = {f"track {index}": decay for index, decay in enumerate(decays)}
    ema = ShardedEMA(model, decay=decay_by_track if len(decays) > 1 else decays[0], replicas=replicas, kernel=kernel)
    return Averager(
        ema.update,
        lambda: [track["averages"] for track in ema.state_dict()["tracks"].values()],
        partial(ema.serving if serving else ema.swapped, ema.tracks[0]),
        shares_live_reads=ema.update_kernel != "foreach",
    )


def foreach(model: nn.Module, decay: float, *, view: Callable[[Tensor], Tensor] = local) -> Averager:
    """The lower bound: nothing but the arithmetic, on this rank's tensors."""
    live_weights = {name: parameter.detach() for name, parameter in unwrap_ddp(model).named_parameters()}
    averages = {name: live.to(torch.float32, copy=True) for name, live in live_weights.items()}
    average_list, live_list = ([view(tensor) for tensor in tensors.values()] for tensors in (averages, live_weights))
    is_narrow = any(live.dtype != torch.float32 for live in live_list)

    @torch.no_grad()
    def update() -> None:
        ends = [live.float() for live in live_list] if is_narrow else live_list
        torch._foreach_lerp_(average_list, ends, 1 - decay)

    return Averager(update, lambda: [averages])


def averaged_model(model: nn.Module, decay: float) -> Averager:
    net = unwrap_ddp(model)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay)).float()
    return Averager(lambda: averaged.update_parameters(net), lambda: [dict(averaged.module.named_parameters())])


def composer_formula(model: nn.Module, decay: float) -> Averager:
    """What Composer's `compute_ema` does with each parameter."""
    net = unwrap_ddp(model)
    ema_model = copy.deepcopy(net).float()

    @torch.no_grad()
    def update() -> None:
        for average, live in zip(ema_model.parameters(), net.parameters(), strict=True):
            average.copy_(average * decay + (1.0 - decay) * live.detach())

    return Averager(update, lambda: [dict(ema_model.named_parameters())])


def timm(model: nn.Module, decay: float) -> Averager:
    package = find_spec("timm")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'timm'")
    # Run the file without importing timm: timm imports torchvision, which does not load with every build of torch.
    model_ema = run_path(str(Path(package.origin).with_name("utils") / "model_ema.py"))
    net = unwrap_ddp(model)
    ema = model_ema["ModelEmaV3"](net, decay=decay, dtype=torch.float32)
    return Averager(lambda: ema.update(net), lambda: [dict(ema.module.named_parameters())])


def ema_pytorch(model: nn.Module, decay: float) -> Averager:
    from ema_pytorch import EMA  # noqa: PLC0415

    net = unwrap_ddp(model)
    is_narrow = any(parameter.dtype != torch.float32 for parameter in net.parameters())
    # By default, its decay warms up; these settings make the decay constant from the first step.
    constant = {"beta": decay, "min_value": decay, "update_after_step": -2, "update_every": 1}
    ema = EMA(net, use_foreach=True, coerce_dtype=is_narrow, **constant)
    ema.ema_model.float()
    return Averager(ema.update, lambda: [dict(ema.ema_model.named_parameters())])


def diffusers(model: nn.Module, decay: float) -> Averager:
    from diffusers.training_utils import EMAModel  # noqa: PLC0415

    net = unwrap_ddp(model)
    ema = EMAModel(net.parameters(), decay=decay, min_decay=decay, foreach=True)
    ema.to(dtype=torch.float32)
    names = [name for name, _ in net.named_parameters()]

    @contextmanager
    def swapped() -> Iterator[None]:
        ema.store(net.parameters())
        ema.copy_to(net.parameters())
        yield
        ema.restore(net.parameters())

    return Averager(
        lambda: ema.step(net.parameters()), lambda: [dict(zip(names, ema.shadow_params, strict=True))], swapped
    )


def lightning(model: nn.Module, decay: float) -> Averager:
    from pytorch_lightning import LightningModule  # noqa: PLC0415
    from pytorch_lightning.callbacks import EMAWeightAveraging  # noqa: PLC0415

    module = LightningModule()
    module.net = unwrap_ddp(model)
    # The only attribute of a Trainer that the callback reads.
    trainer: Any = SimpleNamespace(global_step=0)
    callback = EMAWeightAveraging(decay=decay)
    callback.setup(trainer, module, "fit")

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    def averages() -> list[dict[str, Tensor]]:
        checkpoint: dict[str, Any] = {"state_dict": {}}
        callback.on_save_checkpoint(trainer, module, checkpoint)
        return [{name.removeprefix("net."): average for name, average in checkpoint["state_dict"].items()}]

    @contextmanager
    def swapped() -> Iterator[None]:
        callback.on_validation_epoch_start(trainer, module)
        yield
        callback.on_validation_epoch_end(trainer, module)

    return Averager(update, averages, swapped)


def one_per_track(make: Callable[[nn.Module, float], Averager]) -> Make:
    """One instance for each track, for methods without several tracks."""

    def make_per_track(model: nn.Module, decays: Sequence[float]) -> Averager:
        instances = [make(model, decay) for decay in decays]

        def update() -> None:
            for instance in instances:
                instance.update()

        return Averager(update, lambda: [instance.averages()[0] for instance in instances], instances[0].swapped)

    return make_per_track


PEER_METHODS: dict[str, Make] = {
    AVERAGED_MODEL: one_per_track(averaged_model),
    TIMM: one_per_track(timm),
    EMA_PYTORCH: one_per_track(ema_pytorch),
    DIFFUSERS: one_per_track(diffusers),
    LIGHTNING: one_per_track(lightning),
    COMPOSER: one_per_track(composer_formula),
}
"""Methods that keep a second model, or a second list of its parameters."""
SWAPPING_PEERS = [DIFFUSERS, LIGHTNING]
"""Methods that can copy the averages into the model; the others evaluate their second model."""


def averaging_methods(case: Case) -> dict[str, Make]:
    """All methods for a case, by name; the first one is the lower bound."""
    methods: dict[str, Make] = {FOREACH: one_per_track(foreach), OURS: sharded_ema}
    methods[OURS_AUTO] = partial(sharded_ema, kernel="auto")
    if case.parallel == "ddp":
        methods[OURS_COPY] = partial(sharded_ema, replicas="copy")
    if case.parallel == "fsdp2":
        methods[DTENSOR_FOREACH] = one_per_track(partial(foreach, view=lambda tensor: tensor))
    return methods | PEER_METHODS
