"""Draws the pictures of the documentation; a test compares them with those in docs/.

    python -m launch.pictures                                # into docs/
    python -m launch.pictures --record runs/digits/metrics.csv --command "python launch/train.py"

The second records a run of the recipe in docs/digits.json first, from which its curves are drawn.
"""

import argparse
import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from launch.benchmark.page import Environment
from launch.pictures.canvas import Canvas
from launch.pictures.diagrams import checkpoint_picture, layouts_picture, swap_picture
from launch.pictures.laws import laws_picture, memory_picture, merges_picture
from launch.pictures.measured import cost_picture, curves_picture
from launch.recipe.model import VisionTransformer

DOCS = Path(__file__).parents[2] / "docs"
PICTURES: dict[str, Callable[[], Canvas]] = {
    "assets/curves.svg": lambda: curves_picture(DOCS / "digits.json"),
    "assets/layouts.svg": layouts_picture,
    "assets/swap.svg": swap_picture,
    "assets/checkpoint.svg": checkpoint_picture,
    "assets/cost.svg": lambda: cost_picture(DOCS / "cost.json"),
    "assets/half-life.svg": memory_picture,
    "assets/schedules.svg": laws_picture,
    "assets/merges.svg": merges_picture,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="CSV", help="metrics of a run of launch/train.py")
    parser.add_argument("--command", help="the command of that run")
    args = parser.parse_args()
    if args.record:
        record_run(args.record, args.command)
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw().as_svg())


def record_run(metrics: Path, command: str) -> None:
    """Write the scores of a run that has just ended on this machine."""
    with metrics.open() as file:
        rows = [
            {
                key: int(value) if key in {"epoch", "step"} else round(float(value), 6)
                for key, value in row.items()
                if key not in {"update_share_of_step_time", "average_distance"}  # one is a time, one is not drawn
            }
            for row in csv.DictReader(file)
        ]
    environment = replace(Environment.here("cpu"), command=command)
    parameters = sum(parameter.numel() for parameter in VisionTransformer().parameters())
    record = {"environment": asdict(environment), "parameters": parameters, "epochs": rows}
    (DOCS / "digits.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
