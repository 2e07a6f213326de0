"""Code of a user with annotations: the type checker of `tox -e types` reads it, and a test runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ema_dist import HalfLife, Offloaded, Power, Schedule, ShardedEMA, Uniform, checkpoint, compute_ema, posthoc


class HalfOfEach(Protocol):
    """A function that a user passes on."""

    def __call__(self, name: str, parameter: Tensor, /) -> bool: ...


class Slow:
    """A law of a user, which needs no base class."""

    def decay(self, *, time: float | Tensor, elapsed: float | Tensor, step: float | Tensor) -> float:
        del time, elapsed, step
        return 0.999


def is_matrix(_: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2


def train(folder: Path, *, select: HalfOfEach = is_matrix) -> dict[str, Tensor]:
    model: nn.Module = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    laws: dict[str, Schedule | float] = {"narrow": Power(sigma_rel=0.05), "mean": Uniform(), "user": Slow(), "c": 0.9}
    ema: ShardedEMA = ShardedEMA(model, decay=laws, start=1, dtype=torch.float32, select=select)
    offloaded = ShardedEMA(model, decay=HalfLife(20), store=Offloaded())
    handle = ema.attach(optimizer, elapsed=lambda: 1.0)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        offloaded.update(elapsed=8)
    handle.remove()
    with ema.swapped("mean") as averaged:
        outputs: Tensor = averaged(torch.ones(1, 4))
    assert outputs.shape == (1, 2)
    counts: tuple[int, int] = ema.steps, ema.updates
    metrics: dict[str, float] = ema.metrics()
    assert counts == (4, 3), "the first step copies"
    assert metrics["ema/steps"] == 4
    checkpoint.save({"model": model, "optim": optimizer, "ema": ema}, folder, step=ema.steps)
    step: int | None = checkpoint.load({"ema": ema}, folder)
    assert step == 4
    paths: list[Path] = checkpoint.merge([folder], folder / "merged", emulate_decay="linear")
    assert paths
    fit: posthoc.Fit = posthoc.fit([(4, Uniform())], target=Uniform(), at=4)
    assert [*fit.coefficients] == [1]
    compute_ema(model, nn.Linear(4, 2), smoothing=0.9)
    return ema.full_state_dict(track="narrow")
