"""What it costs to compute with the averages, and to gather them.

The functions that measure run on every rank of a case; times are the slowest rank's, bytes the largest one's.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_dist import ShardedEMA
from launch.benchmark.averaging_methods import OURS, PEER_METHODS, SERVING, SWAPPING_PEERS, Averager, sharded_ema
from launch.benchmark.cases import DECAY, LIVE_DTYPES, Case, SmallTensors, local, nbytes, scale_weights
from launch.benchmark.measure import highest, in_turn, peak_memory
from launch.benchmark.updates import make_or_explain
from launch.recipe.stopwatch import stopwatch

SWAPPED = f"{OURS}.swapped()"
MEMORY_TURNS = 3
Swap = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class SwapCosts:
    """Of a block in which the model computes with the averages, by the name of the way to do that.

    Args:
        held_bytes: of one rank's averages.
        extra_bytes: the most memory inside, beyond what was resident before.
        seconds_in: on entering, one a round; `seconds_out` on leaving.
        failures: how those fail that are not in the others.
    """

    case: Case
    held_bytes: dict[str, int] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    seconds_in: dict[str, list[float]] = field(default_factory=dict)
    seconds_out: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportCosts:
    """Seconds of each `full_state_dict()`; bytes beyond its result on the first rank, and bytes on any other rank."""

    case: Case
    result_bytes: int
    largest_tensor_bytes: int
    extra_bytes: int
    others_bytes: int
    seconds: list[float]


def swap_costs(device: torch.device, *, case: Case, repeats: int) -> SwapCosts:
    """Of our ways, and of those peers that have one."""
    model = case.build_model(device)
    costs = SwapCosts(case)
    factories = {SWAPPED: sharded_ema, SERVING: partial(sharded_ema, serving=True)} | {
        name: PEER_METHODS[name].make for name in SWAPPING_PEERS
    }
    swaps: dict[str, Swap] = {}
    for name, make in factories.items():
        averager = make_or_explain(partial(_make_and_swap, make), model, [DECAY], device)
        if isinstance(averager, str):
            costs.failures[name] = averager
            continue
        swaps[name] = _swap(averager)
        (held,) = highest([nbytes(local(average) for average in averager.averages()[0].values())], device)
        costs.held_bytes[name] = int(held)
    scale_weights(model, factor=1.5)
    _assert_outputs_close(swaps, model, case, device)
    _measure(costs, swaps, model, repeats, device)
    return costs


def full_state_costs(device: torch.device, *, case: Case, repeats: int) -> ExportCosts:
    ema = ShardedEMA(case.build_model(device), decay=DECAY)
    watch, memory = stopwatch(device), peak_memory(device)
    seconds: list[float] = []
    extra_bytes: list[int] = []
    sizes: list[int] = []
    for _ in range(repeats):
        dist.barrier()
        memory.reset()
        with watch:
            gathered = ema.full_state_dict()
        sizes = [nbytes([tensor]) for tensor in gathered.values()]
        extra_bytes.append(memory.read() - (sum(sizes) if device.type == "cpu" else 0))
        seconds.append(watch.read())
        del gathered
    first = dist.get_rank() == 0
    extra, other_ranks = highest([max(extra_bytes) if first else 0, 0 if first else max(extra_bytes)], device)
    return ExportCosts(case, sum(sizes), max(sizes, default=0), int(extra), int(other_ranks), highest(seconds, device))


def _make_and_swap(
    make: Callable[[nn.Module, Sequence[float]], Averager], model: nn.Module, decays: Sequence[float]
) -> Averager:
    averager = make(model, decays)
    with _swap(averager)():
        return averager


def _swap(averager: Averager) -> Swap:
    assert averager.swapped is not None
    return averager.swapped


@torch.no_grad()
def _assert_outputs_close(swaps: Mapping[str, Swap], model: nn.Module, case: Case, device: torch.device) -> None:
    """Whoever computes something else has not taken part."""
    width = case.shape.side if isinstance(case.shape, SmallTensors) else case.shape.width
    inputs = torch.randn(1, 2, width, device=device, dtype=LIVE_DTYPES[case.live])
    outputs: dict[str, Tensor] = {}
    for name, swap in swaps.items():
        with swap():
            outputs[name] = model(inputs)
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs[SWAPPED], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _measure(costs: SwapCosts, swaps: Mapping[str, Swap], model: nn.Module, repeats: int, device: torch.device) -> None:
    """Memory apart from the times: who gave memory back must wait to get it again."""
    leave_watch, memory = stopwatch(device), peak_memory(device)
    stack = ExitStack()
    seconds_out: dict[str, list[float]] = {name: [] for name in swaps}
    peak_bytes: dict[str, list[int]] = {name: [] for name in swaps}

    def leave(name: str) -> None:
        with leave_watch:
            stack.close()
        seconds_out[name].append(leave_watch.read())

    def leave_and_read(name: str) -> None:
        stack.close()
        peak_bytes[name].append(memory.read())

    def touch_weights(_: str) -> None:
        scale_weights(model, factor=1.0)

    runs = {name: partial(_enter, stack, swap) for name, swap in swaps.items()}
    seconds_in = in_turn(runs, before=touch_weights, after=leave, repeats=repeats, device=device)
    in_turn(runs, before=lambda _: memory.reset(), after=leave_and_read, repeats=MEMORY_TURNS, device=device)
    for name in swaps:
        costs.seconds_in[name] = highest(seconds_in[name], device)
        costs.seconds_out[name] = highest(seconds_out[name], device)
        costs.extra_bytes[name] = int(highest([max(peak_bytes[name])], device)[0])


def _enter(stack: ExitStack, swap: Swap) -> None:
    stack.enter_context(swap())
