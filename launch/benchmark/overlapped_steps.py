"""How much longer training steps get by averages: without any, updated in the step, and behind the next one."""

from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import AdamW

from ema_dist import ShardedEMA
from launch.benchmark.cases import DECAY, LIVE_DTYPES, Case, Transformer
from launch.benchmark.measure import highest, in_turn
from launch.benchmark.results import median_ratio

NO_AVERAGES, ATTACHED, OVERLAPPED = "no averages", "attach(optimizer)", "attach(optimizer, overlap=True)"
STEPS_PER_TURN = 4
"""Of one turn: the last update of a turn is waited for in none of its steps."""
INPUT_SHAPES = {"cuda": (8, 512), "cpu": (1, 16)}
"""Sequences and their lengths."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step, one a round, by how its averages are updated."""

    case: Case
    elements: int
    seconds: dict[str, list[float]]

    def slowdown(self, name: str) -> float:
        """The median over the rounds of a step's time over that without averages."""
        return median_ratio(self.seconds[name], self.seconds[NO_AVERAGES])


def step_costs(device: torch.device, *, case: Case, repeats: int) -> StepCosts:
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
        for _ in range(STEPS_PER_TURN):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    runs = dict.fromkeys((NO_AVERAGES, ATTACHED, OVERLAPPED), steps)
    measure = partial(in_turn, runs, before=before, after=after, device=device)
    measure(repeats=1)  # the optimizer makes its state in the first step, and a device its streams
    turns = measure(repeats=repeats)
    seconds = {name: [turn / STEPS_PER_TURN for turn in highest(samples, device)] for name, samples in turns.items()}
    return StepCosts(case, sum(parameter.numel() for parameter in model.parameters()), seconds)
