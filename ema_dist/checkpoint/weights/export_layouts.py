"""How other libraries name the files and tensors of a model that they load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ema_dist.checkpoint.weights.formats import FORMATS, FileFormat

LayoutName = Literal["transformers", "diffusers", "timm", "averaged-model"]


@dataclass(frozen=True)
class ExportLayout:
    """The names that one library expects."""

    stem: str | None = None
    """The stem of the file; None for the format's own."""
    suffix: str | None = None
    """The suffix of the file; None for the format's own."""
    file_format: FileFormat | None = None
    """The only format that the library reads; None for any."""
    has_one_file: bool = False
    """Whether the library reads one file only."""
    prefix: str = ""
    """Precedes the name of each tensor."""
    count_name: str = ""
    """The name of a tensor with the number of updates; empty for none."""

    def file_name(self, file_format: FileFormat) -> str:
        """The name of a single file in this format."""
        spec = FORMATS[file_format]
        return (self.stem or spec.stem) + (self.suffix or spec.suffix)

    def counts(self, updates: int) -> dict[str, Tensor]:
        """The tensors beside those of the model."""
        return {self.count_name: torch.tensor(updates)} if self.count_name else {}

    def renamed(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of the model under the names that the library expects."""
        return {self.prefix + name: value for name, value in entries.items()}


LAYOUTS: dict[LayoutName, ExportLayout] = {
    "transformers": ExportLayout(),
    "diffusers": ExportLayout(stem="diffusion_pytorch_model"),
    "timm": ExportLayout(has_one_file=True),  # of several files, it reads the first one
    "averaged-model": ExportLayout(
        stem="averaged_model",
        suffix=".pt",
        file_format="torch",
        has_one_file=True,
        prefix="module.",
        count_name="n_averaged",
    ),
}
