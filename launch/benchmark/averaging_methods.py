"""Every way to average that the benchmark holds beside the others: ours, and those that a user could pick instead.

Each is set up as its own documentation does it, with its fastest setting, an average in float32 and a constant decay.
What it needs is imported only when it is made: a package that is missing is a row that says so.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ema_dist import ShardedEMA
from launch.benchmark.cases import Case, local, unwrap_ddp
from launch.benchmark.formulas import ElementSizes, Passes, update_bytes

OURS = "ShardedEMA"
OURS_COPY = 'ShardedEMA, replicas="copy"'
SERVING = "ShardedEMA.serving()"
FOREACH = "_foreach_lerp_ on plain lists"
DTENSOR_FOREACH = "_foreach_lerp_ on DTensors"
COMPOSER = "Composer's formula"
AVERAGED_MODEL = "torch AveragedModel, foreach"
TIMM = "timm ModelEmaV3"
EMA_PYTORCH = "ema-pytorch EMA"
DIFFUSERS = "diffusers EMAModel, foreach"
LIGHTNING = "Lightning EMAWeightAveraging"


@dataclass(frozen=True)
class Averager:
    """Averages of one model, kept one way.

    Args:
        update: take each average once.
        averages: those of each track by name, in float32.
        swapped: a block inside which the model computes with the first track; None where there is no such thing.
        reads_once: whether all tracks share one reading of the live weights.
    """

    update: Callable[[], object]
    averages: Callable[[], Sequence[Mapping[str, Tensor]]]
    swapped: Callable[[], AbstractContextManager[object]] | None = None
    shares_live_reads: bool = False


@dataclass(frozen=True)
class AveragingMethod:
    """How averages of one model are made, one for each decay, and what an update of them moves.

    Args:
        passes: over one track's average and its live weights, where these have its dtype.
        narrow: the same where the live dtype is narrower; None if there is no difference.
    """

    make: Callable[[nn.Module, Sequence[float]], Averager]
    passes: Passes
    narrow_passes: Passes | None = None

    def bytes_moved(self, averager: Averager, elements: int, element_sizes: ElementSizes) -> int:
        """In an update of the averages of so many elements."""
        if averager.shares_live_reads:
            return update_bytes(elements, element_sizes)
        passes = (
            self.narrow_passes
            if self.narrow_passes and element_sizes.live_itemsize < element_sizes.average_itemsize
            else self.passes
        )
        return passes.bytes(elements, element_sizes)


def sharded_ema(
    model: nn.Module, decays: Sequence[float], replicas: Literal["shard", "copy"] = "shard", *, serving: bool = False
) -> Averager:
    decay_by_track = {f"track {index}": decay for index, decay in enumerate(decays)}
    ema = ShardedEMA(model, decay=decay_by_track if len(decays) > 1 else decays[0], replicas=replicas)
    return Averager(
        ema.update,
        lambda: [track["averages"] for track in ema.state_dict()["tracks"].values()],
        partial(ema.serving if serving else ema.swapped, ema.tracks[0]),
        shares_live_reads=ema.update_kernel != "foreach",
    )


def foreach(model: nn.Module, decay: float) -> Averager:
    """The floor: nothing but the arithmetic, on this rank's tensors."""
    live_weights = {name: parameter.detach() for name, parameter in unwrap_ddp(model).named_parameters()}
    averages = {name: live.to(torch.float32, copy=True) for name, live in live_weights.items()}
    plain = [local(average) for average in averages.values()], [local(live) for live in live_weights.values()]
    return Averager(lambda: _foreach_lerp_(*plain, 1 - decay), lambda: [averages])


def dtensor_foreach(model: nn.Module, decay: float) -> Averager:
    live_weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averages = {name: live.to(torch.float32, copy=True) for name, live in live_weights.items()}
    lists = list(averages.values()), list(live_weights.values())
    return Averager(lambda: _foreach_lerp_(*lists, 1 - decay), lambda: [averages])


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
    net = unwrap_ddp(model)
    ema = _load_module("timm", "utils/model_ema.py").ModelEmaV3(net, decay=decay, dtype=torch.float32)
    return Averager(lambda: ema.update(net), lambda: [dict(ema.module.named_parameters())])


def ema_pytorch(model: nn.Module, decay: float) -> Averager:
    from ema_pytorch import EMA  # noqa: PLC0415

    net = unwrap_ddp(model)
    is_narrow = any(parameter.dtype != torch.float32 for parameter in net.parameters())
    # It warms its decay up; these settings make it constant from the first step.
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
    # All that the callback asks of a Trainer.
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


def one_per_track(make: Callable[[nn.Module, float], Averager]) -> Callable[[nn.Module, Sequence[float]], Averager]:
    """Several tracks where there is no such thing: as many instances."""

    def make_per_track(model: nn.Module, decays: Sequence[float]) -> Averager:
        instances = [make(model, decay) for decay in decays]

        def update() -> None:
            for instance in instances:
                instance.update()

        return Averager(update, lambda: [instance.averages()[0] for instance in instances], instances[0].swapped)

    return make_per_track


LERP, CAST_AND_LERP = Passes(live=1, average=2), Passes(live=1, average=4)
PEER_METHODS = {
    AVERAGED_MODEL: AveragingMethod(one_per_track(averaged_model), LERP),
    # A narrow live weight is added to the average after that was multiplied.
    TIMM: AveragingMethod(one_per_track(timm), LERP, Passes(live=1, average=4)),
    EMA_PYTORCH: AveragingMethod(one_per_track(ema_pytorch), LERP, CAST_AND_LERP),
    # (average - live), then the average minus a part of that.
    DIFFUSERS: AveragingMethod(one_per_track(diffusers), Passes(live=1, average=5)),
    # A product each, their sum, a copy.
    LIGHTNING: AveragingMethod(one_per_track(lightning), Passes(live=3, average=6)),
    COMPOSER: AveragingMethod(one_per_track(composer_formula), Passes(live=3, average=6)),
}
"""They keep a second model, or a second list of its parameters."""

SWAPPING_PEERS = [DIFFUSERS, LIGHTNING]
"""Those that can put the averages into the model; who keeps a second model computes with that one."""


def averaging_methods(case: Case) -> dict[str, AveragingMethod]:
    """All of them for a case, by name; the first is the floor."""
    methods = {
        FOREACH: AveragingMethod(one_per_track(foreach), LERP, CAST_AND_LERP),
        OURS: AveragingMethod(sharded_ema, LERP),
    }
    if case.parallel == "ddp":
        methods[OURS_COPY] = AveragingMethod(lambda model, decays: sharded_ema(model, decays, "copy"), LERP)
    if case.parallel == "fsdp2":
        methods[DTENSOR_FOREACH] = AveragingMethod(one_per_track(dtensor_foreach), LERP, CAST_AND_LERP)
    return methods | PEER_METHODS


@torch.no_grad()
def _foreach_lerp_(averages: list[Tensor], live_weights: list[Tensor], weight: float) -> None:
    if live_weights[0].dtype != torch.float32:
        live_weights = [live.float() for live in live_weights]
    torch._foreach_lerp_(averages, live_weights, weight)


def _load_module(package: str, path: str) -> Any:  # noqa: ANN401
    """One module, without its package: timm's imports torchvision, which does not load beside every build of torch."""
    package_spec = find_spec(package)
    if package_spec is None or not package_spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{package}'")
    spec = spec_from_file_location(f"{package} alone", Path(package_spec.submodule_search_locations[0]) / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
