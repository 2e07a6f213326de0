# ruff: noqa: INP001 - a script
"""Draws ``docs/assets/schedules.svg``, the averaging laws side by side: ``python docs/schedules.py``."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, Schedule, Uniform, Warmup
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import as_schedules

STEPS = 1000
LAWS: dict[str, Schedule | float] = {
    "0.99": 0.99,
    "HalfLife(200)": HalfLife(200),
    "HalfLife(200, ramp=0.09)": HalfLife(200, ramp=0.09),
    "Power(sigma_rel=0.15)": Power(sigma_rel=0.15),
    "Uniform()": Uniform(),
    "InverseGamma(0.999)": InverseGamma(0.999),
    "Warmup(0.99)": Warmup(0.99),
    "ExponentialWarmup(0.999, 200)": ExponentialWarmup(0.999, 200),
    "Cosine(0.99, 1, 1000)": Cosine(0.99, 1, 1000),
}


def run(law: Schedule | float) -> tuple[list[float], list[float], list[float]]:
    """The weight of the live value and the initial mass at each step, and each step's share of the last average."""
    clock = Clock(as_schedules(law), start=0, interval=1)
    weights: list[float] = []
    masses: list[float] = []
    for _ in range(STEPS):
        step = clock.next_step()
        clock.count(step)
        weights.append(float(step.weights["default"]))
        masses.append(clock.initial_mass("default"))
    shares: list[float] = []
    kept = 1.0
    for weight in reversed(weights):
        shares.append(kept * weight)
        kept *= 1 - weight
    return weights, masses, shares[::-1]


def draw() -> Figure:
    """Three panels, each with a line for every law."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = (
        "weight of the live value at each step",
        "share that still is the initial weights",
        f"share of each step, at step {STEPS:,}",
    )
    shown = [*range(10), *range(10, 100, 10), *range(100, STEPS, 30), STEPS - 1]
    steps = [index + 1 for index in shown]
    for number, (name, law) in enumerate(LAWS.items()):
        for axes, values in zip(panels, run(law), strict=True):
            axes.plot(steps, [values[index] for index in shown], label=name, color=f"C{number}", linewidth=1.4)
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(xscale="log", yscale="log", ylim=(1e-4, 1.3))
    panels[0].minorticks_off()
    panels[2].set_ylim(0, 0.0125)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


if __name__ == "__main__":
    mpl.rcParams |= {"svg.hashsalt": "ema_dist", "svg.fonttype": "none", "font.family": "sans-serif"}
    target = Path(__file__).parent / "assets" / "schedules.svg"
    draw().savefig(target, metadata={"Date": None, "Creator": None}, facecolor="white")
