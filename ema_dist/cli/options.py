"""The types of arguments and options that several commands share or that need parsing."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class WeightsChoice(str, Enum):
    """The weights to use."""

    EMA = "ema"
    LIVE = "live"


class FormatChoice(str, Enum):
    """What files to write."""

    # The keys of `FORMATS`, repeated: its module imports torch, for which help and completion must not wait.

    SAFETENSORS = "safetensors"
    TORCH = "torch"


class LayoutChoice(str, Enum):
    """The library that will load exported weights."""

    # The keys of `LAYOUTS`, repeated for the same reason.

    TRANSFORMERS = "transformers"
    DIFFUSERS = "diffusers"
    TIMM = "timm"
    AVERAGED_MODEL = "averaged-model"


class OutputFormatChoice(str, Enum):
    """The formats in which to write a weighted sum of checkpoints."""

    # The values of `OutputFormat`, repeated for the same reason.

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    DCP = "dcp"


class ImportFormatChoice(str, Enum):
    """What to write imported averages into."""

    # The values of `ImportFormat`, repeated for the same reason.

    SAFETENSORS = "safetensors"
    DCP = "dcp"


class ImportChoice(str, Enum):
    """The format of averages by another package."""

    # The values of `KindOrAuto`, repeated for the same reason.

    AUTO = "auto"
    AVERAGED_MODEL = "averaged-model"
    LIGHTNING = "lightning"
    TIMM = "timm"
    DIFFUSERS = "diffusers"
    EMA_PYTORCH = "ema-pytorch"
    COMPOSER = "composer"
    TORCHTITAN = "torchtitan"
    NEMO = "nemo"


DTYPE_NAMES = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "double",
    "float",
    "half",
)
"""The names in torch of the dtypes that weights can be cast to; torch itself is not imported here."""


def parse_dtype(text: str) -> str:
    """Returns the name of a floating dtype without the prefix ``torch.``.

    Raises: typer.BadParameter when there is no such dtype.
    """
    name = text.removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise typer.BadParameter(
            f"{text!r} is not a supported floating-point dtype: choose one of {', '.join(DTYPE_NAMES)}"
        )
    return name


class DecayChoice(str, Enum):
    """The decay of the learning rate that a merge emulates."""

    # The values of `DecayShape`, repeated for the same reason.

    LINEAR = "linear"
    ONE_MINUS_SQRT = "1-sqrt"
    COSINE = "cosine"


def parse_coefficients(text: str) -> list[float]:
    """Returns the numbers in a text like ``0.2,0.3,0.5``. Raises: typer.BadParameter for any other text."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers like 0.2,0.3,0.5") from None


def check_shard_size(context: typer.Context, text: str | None) -> str | None:
    """Returns the same text, a number of bytes or a size like ``"5GiB"``; None if the option was not given.

    Raises: typer.BadParameter when it is not a size.
    """
    if (
        text is not None and not context.resilient_parsing
    ):  # shell completion parses options too, and must not import torch
        from ema_dist.checkpoint.weights.sharded_files import size_in_bytes  # noqa: PLC0415

        try:
            size_in_bytes(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return text


CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="A folder of checkpoints (step-6, checkpoint-12/ema, ...; the newest complete one is used), one "
        "checkpoint, or any folder that dcp.save wrote.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
StepOption = Annotated[
    int | None, typer.Option(help="The step to read; by default the newest complete one.", show_default=False)
]
EntryOption = Annotated[
    str | None,
    typer.Option(
        help="The entry of the model or of its averages, if there are several; dots lead to nested ones (state.model).",
        show_default=False,
    ),
]
TrackOption = Annotated[
    str | None, typer.Option(help="The track of the averages, if there are several.", show_default=False)
]
WeightsOption = Annotated[WeightsChoice, typer.Option(help="The averages, or the live weights.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        parser=parse_dtype,
        metavar="DTYPE",
        help="The dtype of floating-point tensors, such as bfloat16; by default that of each live weight.",
        show_default=False,
    ),
]
ShardSizeOption = Annotated[
    str,
    typer.Option(callback=check_shard_size, metavar="SIZE", help="The maximum size of a file, such as 500MiB."),
]
NewFolderOption = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="OUT", help="The folder to write; it must not exist.", show_default=False),
]
OutputFormatOption = Annotated[
    OutputFormatChoice,
    typer.Option("--format", help="Files of weights, or a folder that checkpoint.load takes under the key `model`."),
]
