"""Charts of the averaging laws and of merges, computed by the library."""

from ema_dist import Cosine, ExponentialWarmup, HalfLife, InverseGamma, Power, Schedule, Uniform, Warmup
from ema_dist.checkpoint.combine.decay_coefficients import DECAY_SHAPES, DecayShape, decay_coefficients
from ema_dist.schedules.clock import Clock
from ema_dist.schedules.decay import as_schedules
from launch.pictures.canvas import Canvas
from launch.pictures.charts import Axis, Frame, Line, line_chart

STEPS = 1000
LAWS: dict[str, tuple[Schedule | float, str]] = {
    "0.99": (0.99, "ink"),
    "HalfLife(200)": (HalfLife(200), "average"),
    "HalfLife(200, ramp=0.09)": (HalfLife(200, ramp=0.09), "teal"),
    "Power(sigma_rel=0.15)": (Power(sigma_rel=0.15), "green"),
    "Uniform()": (Uniform(), "live"),
    "InverseGamma(0.999)": (InverseGamma(0.999), "violet"),
    "Warmup(0.99)": (Warmup(0.99), "red"),
    "ExponentialWarmup(.999, 200)": (ExponentialWarmup(0.999, 200), "olive"),
    "Cosine(0.99, 1, 1000)": (Cosine(0.99, 1, 1000), "rose"),
}
SHOWN = [*range(10), *range(10, 100, 10), *range(100, STEPS, 30), STEPS - 1]
AGES = [age / 4 for age in range(81)]
"""In percent of the run."""
HALF_LIVES = {1: "live", 2: "violet", 5: "average", 10: "green"}
"""In percent of the run, with their colours."""

SHAPE_COLORS: dict[DecayShape, str] = {"linear": "live", "1-sqrt": "average", "cosine": "green"}
MERGED = 10
"""The number of checkpoints in the picture of merges."""


def run(law: Schedule | float) -> tuple[list[float], list[float], list[float]]:
    """By step: weight of the live value, share of the initial weights, and the step's share of the final average."""
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


def laws_picture() -> Canvas:
    """Three charts, one below the other, each with a line for every law."""
    canvas = Canvas(680, 1050, "The averaging laws side by side over 1000 steps")
    charts = [
        (
            "Weight of the live value at each step",
            Axis("optimizer step", 1, STEPS, [1, 10, 100, 1000], log=True),
            Axis("", 1e-4, 1, [1e-4, 1e-3, 1e-2, 0.1, 1], log=True),
        ),
        (
            "Share of the average that is still the initial weights",
            Axis("optimizer step", 1, STEPS, [1, 250, 500, 750, 1000]),
            Axis("", 0, 1, [0, 0.25, 0.5, 0.75, 1]),
        ),
        (
            f"Share of each step in the average at step {STEPS}",
            Axis("optimizer step", 1, STEPS, [1, 250, 500, 750, 1000]),
            Axis("", 0, 0.0125, [0, 0.004, 0.008, 0.012]),
        ),
    ]
    results = {name: (run(law), color) for name, (law, color) in LAWS.items()}
    for number, (title, x, y) in enumerate(charts):
        lines = [
            Line(name, [(step + 1, result[number][step]) for step in SHOWN], color)
            for name, (result, color) in results.items()
        ]
        line_chart(canvas, Frame(74, 46 + 350 * number, 332, 240), title, lines, x=x, y=y)
    return canvas


def memory_picture() -> Canvas:
    """How much of an average is older than an age, for four half-lives."""
    canvas = Canvas(
        680,
        390,
        "Share of the average that is older than a given age, for half-lives of 1, 2, 5 and 10 percent of the run",
    )
    lines = [
        Line(f"half-life {percent} %", [(age, 100 * 2 ** (-age / percent)) for age in AGES], color)
        for percent, color in HALF_LIVES.items()
    ]
    line_chart(
        canvas,
        Frame(74, 52, 440, 260),
        "Share of the average that is older",
        lines,
        x=Axis("age of the weights, in % of the run", 0, 20, [0, 5, 10, 15, 20]),
        y=Axis("", 0, 100, [0, 25, 50, 75, 100], "{:g} %".format),
    )
    return canvas


def merges_picture() -> Canvas:
    """The decay that a merge emulates, and the coefficients that do it."""
    canvas = Canvas(680, 730, f"Three decays of the learning rate, and the coefficients of {MERGED} checkpoints")
    shapes = [
        Line(name, [(percent, shape(percent / 100)) for percent in range(101)], SHAPE_COLORS[name])
        for name, shape in DECAY_SHAPES.items()
    ]
    coefficients = [
        Line(name, [*enumerate(decay_coefficients(name, MERGED), start=1)], SHAPE_COLORS[name], dots=True)
        for name in DECAY_SHAPES
    ]
    line_chart(
        canvas,
        Frame(74, 46, 440, 240),
        "Emulated learning rate, relative to the constant one",
        shapes,
        x=Axis("time between the oldest and the newest checkpoint, in %", 0, 100, [0, 25, 50, 75, 100]),
        y=Axis("", 0, 1, [0, 0.5, 1]),
    )
    line_chart(
        canvas,
        Frame(74, 406, 440, 240),
        "Coefficient of each checkpoint in the merge",
        coefficients,
        x=Axis("checkpoint, oldest first", 1, MERGED, [1, 4, 7, 10]),
        y=Axis("", 0, 0.35, [0, 0.1, 0.2, 0.3]),
    )
    return canvas
