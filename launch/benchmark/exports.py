"""What it costs to write averages into files of weights: from all ranks, or in one process out of a checkpoint."""

import io
import os
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ema_dist.checkpoint.gathering import gather
from ema_dist.checkpoint.weights.files import WeightFiles
from ema_dist.cli.export import export
from launch.benchmark.cases import Case
from launch.benchmark.checkpoints import TrainingState
from launch.benchmark.file_methods import Costs, Way, is_first, measured

GATHERED = "full_state_dict, save_file, fsync"
GATHER, GATHER_SMALL = "checkpoint.gather", "checkpoint.gather, small files"
SAVE_FILE, SAVE_FILE_CACHED = "save_file from memory, fsync", "save_file from memory, no fsync"
EXPORT, EXPORT_SMALL = "ema-dist export", "ema-dist export, small files"


@dataclass(frozen=True)
class ExportSizes:
    """Bytes of all tensors, of files that are small, and of the largest tensor."""

    total: int
    small: int
    largest: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "ExportSizes":
        sizes = [tensor.nbytes for tensor in tensors]
        return cls(sum(sizes), max(sum(sizes) // 8, *sizes), max(sizes))

    def allowed(self, total: str, small: str) -> dict[str, int]:
        """One file and one tensor, for ways with files of either size."""
        return {total: self.total + self.largest, small: self.small + self.largest}


def gather_costs(device: torch.device, *, case: Case, repeats: int, folder: Path) -> list[Costs]:
    """Of writing everyone's averages from the first rank."""
    ema = TrainingState(case, device).ema
    sizes = ExportSizes.of(tensor for tensor in ema.full_shapes().values() if tensor is not None)

    def gather_and_save() -> None:
        full = ema.full_state_dict()
        if is_first():
            _save_file(full, folder / "gathered", sync=True)

    ways = {
        GATHERED: Way(gather_and_save, folder / "gathered"),
        GATHER: Way(lambda: gather(ema, folder / "whole", max_shard_size=sizes.total), folder / "whole"),
        GATHER_SMALL: Way(lambda: gather(ema, folder / "small", max_shard_size=sizes.small), folder / "small"),
    }
    found = measured(ways, repeats=repeats, device=device)
    full = ema.full_state_dict()
    if is_first():
        _assert_files_equal([folder / "gathered", folder / "whole", folder / "small"], full)
    allowed = sizes.allowed(GATHER, GATHER_SMALL)
    return [Costs("gather", case, case, sizes.total, *found, allowed_bytes=allowed)]


def export_costs(device: torch.device, *, case: Case, saved: Case, repeats: int, folder: Path) -> list[Costs]:
    """Of writing the averages in what another case has left in `folder`, in one process."""
    averages = TrainingState(case, device).ema.full_state_dict()
    sizes = ExportSizes.of(averages.values())
    names = (SAVE_FILE, SAVE_FILE_CACHED, EXPORT, EXPORT_SMALL)
    output_folders = {name: folder / f"export{index}" for index, name in enumerate(names)}

    def run_export(name: str, size: int) -> None:
        with redirect_stdout(io.StringIO()):
            export(folder / "ours", output_folders[name], max_shard_size=f"{size // 1000 + 1}KB")

    ways = {
        SAVE_FILE: Way(lambda: _save_file(averages, output_folders[SAVE_FILE], sync=True), output_folders[SAVE_FILE]),
        SAVE_FILE_CACHED: Way(
            lambda: _save_file(averages, output_folders[SAVE_FILE_CACHED], sync=False), output_folders[SAVE_FILE_CACHED]
        ),
        EXPORT: Way(lambda: run_export(EXPORT, sizes.total), output_folders[EXPORT]),
        EXPORT_SMALL: Way(lambda: run_export(EXPORT_SMALL, sizes.small), output_folders[EXPORT_SMALL]),
    }
    costs: list[Costs] = []
    allowed = sizes.allowed(EXPORT, EXPORT_SMALL)
    for forgotten in (None, folder / "ours"):
        found = measured(ways, repeats=repeats, device=device, forgotten=forgotten)
        cold = forgotten is not None
        costs.append(Costs("export", case, saved, sizes.total, *found, cold=cold, allowed_bytes=allowed))
    _assert_files_equal([*output_folders.values()], averages)
    return costs


def _save_file(tensors: Mapping[str, Tensor], folder: Path, *, sync: bool) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors")
    if sync:
        with (folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())


def _assert_files_equal(folders: list[Path], expected: Mapping[str, Any]) -> None:
    """Whoever writes something else has not taken part."""
    for folder in folders:
        found = WeightFiles(folder)
        assert found.keys() == expected.keys(), folder
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), folder
