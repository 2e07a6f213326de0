"""What share of a training step an update takes: a step of `train.py`, then an update, each way to average in turn."""

import statistics
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.optim import AdamW

from launch.benchmark.averaging_methods import Averager, averaging_methods
from launch.benchmark.cases import DECAY, Case, Parallel
from launch.benchmark.measure import highest, in_turn
from launch.benchmark.updates import make_or_explain
from launch.recipe.data import Batches, load_images
from launch.recipe.model import VisionTransformer
from launch.recipe.parallelism import data_rank_and_size, wrap
from launch.recipe.stopwatch import stopwatch

BATCH_SIZE = 48
"""What `train.py` takes unless told otherwise."""


@dataclass(frozen=True)
class StepShares:
    """Seconds of each step without an average, and of updates by the name of the way to average, one a round."""

    parallel: Parallel
    ranks: int
    seconds_step: list[float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """The median update, in a step of which it is a part."""
        step = statistics.median(self.seconds_step)
        medians = {name: statistics.median(samples) for name, samples in self.seconds.items()}
        return {name: median / (step + median) for name, median in medians.items()}


def step_shares(device: torch.device, *, case: Case, repeats: int) -> StepShares:
    """Only the layout of `case` counts: the model is the one of `train.py`."""
    model = wrap(VisionTransformer(), case.parallel, device)
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batches = Batches(load_images(device)[0], BATCH_SIZE, 0, *data_rank_and_size(case.parallel))
    pixels, labels = next(iter(batches.epoch(1)))
    step_watch = stopwatch(device)
    seconds_step: list[float] = []

    def step(_: str = "") -> None:
        with step_watch:
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
        seconds_step.append(step_watch.read())

    averagers: dict[str, Averager] = {}
    failures: dict[str, str] = {}
    for name, method in averaging_methods(case).items():
        averager = make_or_explain(method.make, model, [DECAY], device)
        if isinstance(averager, str):
            failures[name] = averager
        else:
            averagers[name] = averager
    step()  # the optimizer makes its state in the first one
    seconds_step.clear()
    updates = {name: averager.update for name, averager in averagers.items()}
    seconds = in_turn(updates, before=step, repeats=repeats, device=device)
    slowest = {name: highest(samples, device) for name, samples in seconds.items()}
    return StepShares(case.parallel, case.ranks, highest(seconds_step, device), slowest, failures)
