"""What the benchmark compares: models of two shapes, each way to average them, and what a swap and an export take.

The functions that measure run on every rank of a case; times are the slowest rank's, bytes the largest one's.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmark_measure import highest, in_turn, peak_memory
from ema_dist import ShardedEMA
from model import Block
from stopwatch import stopwatch

Parallel = Literal["plain", "ddp", "fsdp2"]
DECAY = 0.999
OURS = "ShardedEMA"
OURS_WHOLE = 'ShardedEMA, replicas="copy"'
FOREACH = "_foreach_lerp_ on plain lists"
AVERAGED_MODEL = "AveragedModel, foreach"
SEED = "Composer's formula"
DTENSOR_LOOP = "loop over DTensors"


@dataclass(frozen=True)
class SmallTensors:
    """So many square matrices."""

    count: int = 1000
    side: int = 64

    def __str__(self) -> str:
        return f"{self.count} of {self.side}x{self.side}"

    def model(self) -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(self.side, self.side, bias=False) for _ in range(self.count)))


@dataclass(frozen=True)
class Transformer:
    """The blocks and the head of GPT-2 small.

    The head, the largest tensor, comes last: when it is gathered, everything before it is there, and the peak shows.
    """

    blocks: int = 12
    width: int = 768
    vocabulary: int = 50257

    def __str__(self) -> str:
        return f"transformer of width {self.width}"

    def model(self) -> nn.Sequential:
        blocks = (Block(self.width, heads=1) for _ in range(self.blocks))
        return nn.Sequential(*blocks, nn.Linear(self.width, self.vocabulary, bias=False))


@dataclass(frozen=True)
class Case:
    """One model, wrapped one way, on so many ranks."""

    parallel: Parallel
    ranks: int
    shape: SmallTensors | Transformer

    def wrapped(self, device: torch.device) -> nn.Module:
        model = self.shape.model().to(device)
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        if self.parallel == "fsdp2":
            mesh = init_device_mesh(device.type, (self.ranks,))
            for module in model:
                if isinstance(module, Block):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model


@dataclass(frozen=True)
class UpdateTimes:
    """Seconds of an update by competitor, one a round; the first competitor is what the others are held against."""

    case: Case
    tensors: int
    elements: int
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class SwapCosts:
    """Seconds into and out of each swap; bytes of one rank's averages, and those that a swap takes beyond them."""

    case: Case
    shard_bytes: int
    extra_bytes: int
    seconds_in: list[float]
    seconds_out: list[float]


@dataclass(frozen=True)
class ExportCosts:
    """Seconds of each `full_state_dict()`; bytes beyond its result on the first rank, and bytes on any other rank."""

    case: Case
    result_bytes: int
    largest_tensor_bytes: int
    extra_bytes: int
    others_bytes: int
    seconds: list[float]


def update_times(device: torch.device, *, case: Case, repeats: int) -> UpdateTimes:
    model = case.wrapped(device)
    competitors = COMPETITORS[case.parallel](model)
    for competitor in competitors.values():
        competitor.update()  # AveragedModel's first one only copies; all others find nothing to average yet either
    change_weights(model, factor=1.5)
    seconds = in_turn(
        {name: competitor.update for name, competitor in competitors.items()},
        before=lambda _: change_weights(model, factor=1.0),
        repeats=repeats,
        device=device,
    )
    _assert_alike(competitors.values())
    elements = [parameter.numel() for parameter in model.parameters()]
    slowest = {name: highest(samples, device) for name, samples in seconds.items()}
    return UpdateTimes(case, len(elements), sum(elements), slowest)


def swap_costs(device: torch.device, *, case: Case, repeats: int) -> SwapCosts:
    model = case.wrapped(device)
    ema = ShardedEMA(model, decay=DECAY)
    change_weights(model, factor=1.5)
    time_in, time_out, memory = stopwatch(device), stopwatch(device), peak_memory(device)
    seconds_in: list[float] = []
    seconds_out: list[float] = []
    extra_bytes: list[int] = []
    for _ in range(repeats):
        dist.barrier()
        memory.reset()
        swap = ExitStack()
        with time_in:
            swap.enter_context(ema.swapped())
        with time_out:
            swap.close()
        extra_bytes.append(memory.read())
        seconds_in.append(time_in.read())
        seconds_out.append(time_out.read())
    averages = ema.state_dict()["tracks"]["default"]["averages"].values()
    shard_bytes, extra = highest([nbytes(map(local, averages)), max(extra_bytes)], device)
    return SwapCosts(case, int(shard_bytes), int(extra), highest(seconds_in, device), highest(seconds_out, device))


def full_state_costs(device: torch.device, *, case: Case, repeats: int) -> ExportCosts:
    ema = ShardedEMA(case.wrapped(device), decay=DECAY)
    watch, memory = stopwatch(device), peak_memory(device)
    seconds: list[float] = []
    extra_bytes: list[int] = []
    sizes: list[int] = []
    for _ in range(repeats):
        dist.barrier()
        memory.reset()
        with watch:
            full = ema.full_state_dict()
        sizes = [nbytes([tensor]) for tensor in full.values()]
        extra_bytes.append(memory.read() - (sum(sizes) if device.type == "cpu" else 0))
        seconds.append(watch.read())
        del full
    first = dist.get_rank() == 0
    extra, others = highest([max(extra_bytes) if first else 0, 0 if first else max(extra_bytes)], device)
    return ExportCosts(case, sum(sizes), max(sizes, default=0), int(extra), int(others), highest(seconds, device))


@dataclass(frozen=True)
class Competitor:
    """One way to keep averages: how they are updated, and what they are, by name; all of them on the first rank."""

    update: Callable[[], object]
    averages: Callable[[], Mapping[str, Tensor]]


def ours(model: nn.Module, replicas: Literal["shard", "copy"] = "shard") -> Competitor:
    ema = ShardedEMA(model, decay=DECAY, replicas=replicas)
    return Competitor(ema.update, ema.full_state_dict)


def foreach(model: nn.Module) -> Competitor:
    """The floor: nothing but the arithmetic, on this rank's tensors."""
    lives = {name: local(parameter.detach()) for name, parameter in model.named_parameters()}
    averages = {name: live.clone() for name, live in lives.items()}
    lists = list(averages.values()), list(lives.values())
    return Competitor(lambda: torch._foreach_lerp_(*lists, 1 - DECAY), lambda: averages)


def averaged_model(model: nn.Module) -> Competitor:
    unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
    averaged = AveragedModel(unwrapped, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Competitor(lambda: averaged.update_parameters(unwrapped), lambda: dict(averaged.module.named_parameters()))


def seed_formula(model: nn.Module) -> Competitor:
    """What Composer's `compute_ema` does with each parameter."""
    ema_model = copy.deepcopy(model)

    @torch.no_grad()
    def update() -> None:
        for average, live in zip(ema_model.parameters(), model.parameters(), strict=True):
            average.copy_(average * DECAY + (1.0 - DECAY) * live.detach())

    return Competitor(update, lambda: dict(ema_model.named_parameters()))


def dtensor_loop(model: nn.Module) -> Competitor:
    lives = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averages = {name: live.clone() for name, live in lives.items()}

    def update() -> None:
        for average, live in zip(averages.values(), lives.values(), strict=True):
            average.mul_(DECAY).add_(live, alpha=1 - DECAY)

    return Competitor(update, lambda: {name: local(average) for name, average in averages.items()})


COMPETITORS: dict[str, Callable[[nn.Module], dict[str, Competitor]]] = {
    "plain": lambda model: {
        FOREACH: foreach(model),
        OURS: ours(model),
        AVERAGED_MODEL: averaged_model(model),
        SEED: seed_formula(model),
    },
    "ddp": lambda model: {
        AVERAGED_MODEL: averaged_model(model),
        OURS: ours(model),
        OURS_WHOLE: ours(model, "copy"),
    },
    "fsdp2": lambda model: {
        FOREACH: foreach(model),
        OURS: ours(model),
        DTENSOR_LOOP: dtensor_loop(model),
    },
}


@torch.no_grad()
def change_weights(model: nn.Module, *, factor: float) -> None:
    """Write to every weight, as an optimizer does just before an update; by a factor of 1 they stay what they are."""
    weights: list[Tensor] = list(model.parameters())
    torch._foreach_mul_(weights, factor)


def _assert_alike(competitors: Iterable[Competitor]) -> None:
    """Whoever computes something else has not taken part."""
    first, *others = (competitor.averages() for competitor in competitors)
    for averages in others:
        for name, average in averages.items():
            torch.testing.assert_close(average, first[name], rtol=1e-4, atol=1e-6, check_device=False)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
