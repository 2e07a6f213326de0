"""Reads files by ``torch.save`` without running anything in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.weights.torch_archive import can_be_mapped, refused_names
from ema_dist.messages import abbreviated

PLACEHOLDER_NAMES = (
    "argparse.Namespace",  # timm: the command line's arguments
    "datetime.timedelta",  # Composer: the time trained
    "torch.torch_version.TorchVersion",
    *(  # Lightning and timm: hyperparameters and arguments
        f"pathlib{module}.{name}"
        for module in ("", "._local")  # where Python 3.13 has them
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    "numpy.dtype",  # Composer: random states
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)
"""Types in other packages' files that torch refuses to load safely; averages do not contain them."""

CONVERSION = (
    "load it where its code is trusted and installed, torch.save the state_dict() of the averaged module as "
    "docs/importing.md shows, and import that file"
)


class _Placeholder:
    """Replaces an object in a file; the object's content is dropped."""

    def __init__(self, *_args: object, **_settings: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def load_torch_file(path: Path) -> Any:
    """Load a file by ``torch.save`` with its tensors on the CPU; nothing in the file is run.

    Memory: the pages of the file that are in use, if torch can map it into memory; else all its tensors.
    Raises: CheckpointError when it cannot be read, or cannot be read without running code.
    """
    # torch constructs a placeholder for each of these names, never the object itself.
    placeholders: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    placeholders += [(_Placeholder, name) for name in PLACEHOLDER_NAMES]
    try:
        with torch.serialization.safe_globals(placeholders), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the protocol of a pickle that is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  parsers raise all kinds of errors
        if names := sorted({*refused_names(path, str(error))} - {*PLACEHOLDER_NAMES}):
            raise CheckpointError(
                f"{path} cannot be read without running code: it holds {abbreviated(names)}. Nothing in it was run; "
                f"{CONVERSION}"
            ) from None  # torch's own message recommends weights_only=False
        raise CheckpointError(
            f"{path} is damaged, or is not a torch.save file that can be read without running code. Nothing in it was "
            f"run. If it is a pickle of modules, such as those of EDM and StyleGAN, {CONVERSION}"
        ) from None if isinstance(error, UnpicklingError) else error


def is_torch_file(path: Path) -> bool:
    """Whether the file begins like those of ``torch.save``, or like other pickles."""
    with path.open("rb") as file:
        start = file.read(4)
    return start[:1] == b"\x80" or start == b"PK\x03\x04"
