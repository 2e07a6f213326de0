"""The arguments that several commands take."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class WeightsChoice(str, Enum):
    """The weights to take."""

    EMA = "ema"
    LIVE = "live"


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="A root of checkpoints (the newest complete step is taken), the folder of one step, or any folder that "
        "dcp.save wrote.",
        show_default=False,
    ),
]
StepOption = Annotated[
    int | None, typer.Option(help="This step of a root, not the newest complete one.", show_default=False)
]
EntryOption = Annotated[
    str | None,
    typer.Option(
        help="The entry of the model or of its averages, dotted where it lies deep, if there are several.",
        show_default=False,
    ),
]
TrackOption = Annotated[
    str | None, typer.Option(help="The track of the averages, if there are several.", show_default=False)
]
WeightsOption = Annotated[WeightsChoice, typer.Option(help="The averages, or the live weights.")]
