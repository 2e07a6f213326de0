"""Measures swapping averages into the model and back, and gathering them.

Functions named `..._costs` run on every rank of a case. Times and bytes are maxima over ranks.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ema_dist import ShardedEMA
from launch.benchmark.averaging_methods import OURS, PEER_METHODS, SERVING, SWAPPING_PEERS, sharded_ema
from launch.benchmark.cases import DECAY, LIVE_DTYPES, Case, SmallTensors, local, nbytes, scale_weights
from launch.benchmark.measure import InterleavedCalls, Record, highest, highest_by_key, peak_memory
from launch.benchmark.updates import make_or_describe_failure
from launch.recipe.stopwatch import stopwatch

SWAPPED = f"{OURS}.swapped()"
Swap = Callable[[], AbstractContextManager[object]]


def swap_costs(device: torch.device, *, case: Case, repeats: int) -> list[Record]:
    """Costs of a block in which the model uses the averages: `seconds_in` to enter it, `seconds_out` to leave it.

    `extra_bytes` is the peak memory until the block is left; `failures` is as in `update_costs`.
    """
    model = case.build_model(device)
    factories = {SWAPPED: sharded_ema, SERVING: partial(sharded_ema, serving=True)} | {
        name: PEER_METHODS[name] for name in SWAPPING_PEERS
    }
    swaps: dict[str, Swap] = {}
    held_bytes: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, make in factories.items():
        averager = make_or_describe_failure(make, model, [DECAY], device, swap=True)
        if isinstance(averager, str):
            failures[name] = averager
            continue
        assert averager.swapped is not None
        swaps[name] = averager.swapped
        held_bytes[name] = nbytes(local(average) for average in averager.averages()[0].values())
    scale_weights(model, factor=1.5)
    _assert_outputs_close(swaps, model, case, device)

    stack, watch = ExitStack(), stopwatch(device)
    seconds_out: dict[str, list[float]] = {name: [] for name in swaps}

    def leave(name: str) -> None:
        with watch:
            stack.close()
        seconds_out[name].append(watch.read())

    calls = {name: lambda swap=swap: stack.enter_context(swap()) for name, swap in swaps.items()}
    interleaved = InterleavedCalls(calls, device, before=lambda _: scale_weights(model, factor=1.0), after=leave)
    seconds_in = interleaved.measure(repeats).seconds
    return [
        {
            "case": case,
            "held_bytes": highest_by_key(held_bytes, device),
            "extra_bytes": interleaved.measure_memory().extra_bytes,
            "seconds_in": seconds_in,
            "seconds_out": {name: highest(samples[:repeats], device) for name, samples in seconds_out.items()},
            "failures": failures,
        }
    ]


def full_state_costs(device: torch.device, *, case: Case, repeats: int) -> list[Record]:
    """Costs of `full_state_dict()`: `extra_bytes` beyond its result on the first rank, `others_bytes` on the others."""
    ema = ShardedEMA(case.build_model(device), decay=DECAY)
    watch, memory, is_first = stopwatch(device), peak_memory(device), dist.get_rank() == 0
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
    extra, others = highest([max(extra_bytes) if is_first else 0, 0 if is_first else max(extra_bytes)], device)
    return [
        {
            "case": case,
            "result_bytes": sum(sizes),
            "largest_tensor_bytes": max(sizes, default=0),
            "extra_bytes": int(extra),
            "others_bytes": int(others),
            "seconds": highest(seconds, device),
        }
    ]


@torch.no_grad()
def _assert_outputs_close(swaps: dict[str, Swap], model: nn.Module, case: Case, device: torch.device) -> None:
    """Fail the run if the methods' outputs differ."""
    width = case.shape.side if isinstance(case.shape, SmallTensors) else case.shape.width
    inputs = torch.randn(1, 2, width, device=device, dtype=LIVE_DTYPES[case.live])
    outputs: dict[str, Tensor] = {}
    for name, swap in swaps.items():
        with swap():
            outputs[name] = model(inputs)
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs[SWAPPED], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
