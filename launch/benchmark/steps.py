"""Measures how much longer training steps take with averages, updated inside a step or overlapping the next one.

Functions named `..._costs` run on every rank of a case. Times are those of the slowest rank.
"""

import statistics

import torch
import torch.nn.functional as F
from torch.optim import AdamW

from ema_dist import ShardedEMA
from launch.benchmark.averaging_methods import Averager, averaging_methods
from launch.benchmark.cases import DECAY, LIVE_DTYPES, Case, Transformer
from launch.benchmark.measure import InterleavedCalls, Record, highest, times_reference
from launch.benchmark.updates import make_or_describe_failure
from launch.recipe.data import Batches, load_images
from launch.recipe.model import VisionTransformer
from launch.recipe.parallelism import data_rank_and_size, wrap
from launch.recipe.stopwatch import stopwatch

BATCH_SIZE = 48
"""The default of `train.py`."""
NO_AVERAGES, ATTACHED, OVERLAPPED = "no averages", "attach(optimizer)", "attach(optimizer, overlap=True)"
STEPS_PER_CALL = 4
"""Steps in one timed call. With overlap, none of them waits for the last update of the call."""
INPUT_SHAPES = {"cuda": (8, 512), "cpu": (1, 16)}
"""Number of sequences, and their length."""


def step_share_costs(device: torch.device, *, case: Case, repeats: int) -> list[Record]:
    """Seconds of each step of `train.py` without averages, and of an update after it by each method.

    Only the layout of `case` is used: the model is that of `train.py`. `shares` are the median update's fractions of a
    step that includes it.
    """
    model = wrap(VisionTransformer(), case.parallel, device)
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batches = Batches(load_images(device)[0], BATCH_SIZE, 0, *data_rank_and_size(case.parallel))
    pixels, labels = next(iter(batches.epoch(1)))
    watch = stopwatch(device)
    seconds_step: list[float] = []

    def step(_: str = "") -> None:
        with watch:
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
        seconds_step.append(watch.read())

    made = {
        name: make_or_describe_failure(make, model, [DECAY], device) for name, make in averaging_methods(case).items()
    }
    step()  # the first step creates the optimizer's state
    seconds_step.clear()
    updates = {name: averager.update for name, averager in made.items() if isinstance(averager, Averager)}
    seconds = InterleavedCalls(updates, device, before=step).measure(repeats).seconds
    seconds_step = highest(seconds_step, device)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    return [
        {
            "parallel": case.parallel,
            "ranks": case.ranks,
            "seconds_step": seconds_step,
            "seconds": seconds,
            "failures": {name: failure for name, failure in made.items() if isinstance(failure, str)},
            "shares": {name: update / (statistics.median(seconds_step) + update) for name, update in medians.items()},
        }
    ]


def overlap_costs(device: torch.device, *, case: Case, repeats: int) -> list[Record]:
    """Seconds of a step without averages, with an update inside it, and with an update that overlaps the next step.

    `longer` are the ratios to the step without averages.
    """
    assert isinstance(case.shape, Transformer)
    model = case.build_model(device)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    ema = ShardedEMA(model, decay=DECAY)
    inputs = torch.randn(*INPUT_SHAPES[device.type], case.shape.width, device=device, dtype=LIVE_DTYPES[case.live])
    handles = []

    def before(name: str) -> None:
        if name != NO_AVERAGES:
            handles.append(ema.attach(optimizer, overlap=name == OVERLAPPED))

    def after(_: str) -> None:
        while handles:
            handles.pop().remove()

    def steps() -> None:
        for _ in range(STEPS_PER_CALL):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    interleaved = InterleavedCalls(dict.fromkeys((NO_AVERAGES, ATTACHED, OVERLAPPED), steps), device, before, after)
    interleaved.measure(1)  # the first step creates the optimizer's state and the device's streams
    seconds = {
        name: [call / STEPS_PER_CALL for call in own] for name, own in interleaved.measure(repeats).seconds.items()
    }
    elements = sum(parameter.numel() for parameter in model.parameters())
    return [{"case": case, "elements": elements, "seconds": seconds, "longer": times_reference(seconds)}]
