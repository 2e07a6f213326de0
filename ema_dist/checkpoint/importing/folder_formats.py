"""The formats that are folders, one function each; a function returns None for a folder of another format."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ema_dist.checkpoint.dcp.metadata import METADATA_FILE
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing.foreign_averages import Counts, ForeignAverages
from ema_dist.checkpoint.importing.named_tensors import NamedTensors
from ema_dist.checkpoint.importing.torch_formats import diffusers_counts, read_count
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint

CONFIG_FILE = "config.json"

_TORCHTITAN_NAME = re.compile(r"ema_optimizer\.state\.(.+)\.ema_params")
_TORCHTITAN_STEP = "train_state.step"


def diffusers_folder(path: Path) -> ForeignAverages | None:
    """A folder that diffusers' ``EMAModel.save_pretrained`` wrote: a model whose configuration has the counts."""
    try:
        settings = json.loads((path / CONFIG_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE} cannot be read: {error}") from None
    if not isinstance(settings, dict) or not {"optimization_step", "decay"} <= settings.keys():
        return None
    return ForeignAverages(
        "diffusers", path, NamedTensors.of_files(path), counts=diffusers_counts(settings, path / CONFIG_FILE)
    )


def torchtitan(path: Path) -> ForeignAverages | None:
    """A DCP folder of torchtitan with its ``EMAOptimizersContainer``, which averages parameters only."""
    if not (path / METADATA_FILE).exists():
        return None
    stored = StoredCheckpoint(path)
    matches = {dcp_name: _TORCHTITAN_NAME.fullmatch(dcp_name) for dcp_name in stored.index.tensors}
    names = {match[1]: dcp_name for dcp_name, match in matches.items() if match}
    if not names:
        return None
    counts = Counts(are_recorded=False)
    if _TORCHTITAN_STEP in stored.index.key_paths:
        (step,) = stored.read_values([_TORCHTITAN_STEP]).values()
        counts = Counts.of_each_step(read_count(step, _TORCHTITAN_STEP, path))
    tensors = NamedTensors.of_checkpoint(stored, names)
    return ForeignAverages("torchtitan", path, tensors, counts=counts, buffers=frozenset())
