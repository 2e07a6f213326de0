"""Measures saving and loading a model and its averages, and writing the averages to weight files.

Other tools get the same tensors, already collected, so that only the tools' own work is timed. Functions named
`..._costs` run on every rank of a case. Times and bytes are maxima over ranks.
"""

import io
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ema_dist import ShardedEMA, checkpoint
from ema_dist.checkpoint.gathering import gather
from ema_dist.checkpoint.weights.reader import WeightReader
from ema_dist.cli.export import Destination, export
from launch.benchmark.cases import DECAY, Case, local, nbytes, scale_weights
from launch.benchmark.measure import FileMethod, Record, is_first, measure_files

DCP_SAVE, DCP_LOAD, DCP_ASYNC_SAVE = "dcp.save", "dcp.load", "dcp.async_save, until it returns"
SAVE, LOAD, ASYNC_SAVE = "checkpoint.save", "checkpoint.load", "checkpoint.save, block=False, until it returns"
TORCH_SAVE, TORCH_LOAD = "gathered, torch.save, fsync", "torch.load, scattered"
GATHERED = "full_state_dict, save_file, fsync"
GATHER, GATHER_SMALL = "checkpoint.gather", "checkpoint.gather, small files"
SAVE_FILE, SAVE_FILE_CACHED = "save_file from memory, fsync", "save_file from memory, no fsync"
EXPORT, EXPORT_SMALL = "ema-dist export", "ema-dist export, small files"


class TrainingState:
    """A model and its averages, as objects for `ema_dist.checkpoint` and as tensors for other tools."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.model = case.build_model(device)
        self.ema = ShardedEMA(self.model, decay=DECAY)
        scale_weights(self.model, factor=1.5)
        self.objects: dict[str, Any] = {"model": self.model, "ema": self.ema}
        self.tensors: dict[str, Any] = {"model": get_model_state_dict(self.model), "ema": self.ema.state_dict()}
        tensors = [*self.tensors["model"].values(), *self.tensors["ema"]["tracks"]["default"]["averages"].values()]
        self.total_bytes = nbytes(tensors)
        self._locals = [local(tensor) for tensor in tensors]
        self._sums = self._compute_sums()

    def full(self) -> dict[str, Any]:
        """Full tensors on the first rank."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {"model": get_model_state_dict(self.model, options=options), "ema": self.ema.full_state_dict()}

    def load_full(self, full: Mapping[str, Any]) -> None:
        """Load the result of `full` on all ranks."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, full["model"], options=options)
        self.ema.load_full_state_dict(full["ema"])

    def erase(self) -> None:
        torch._foreach_zero_(self._locals)

    def assert_restored(self) -> None:
        """Fail the run if a method has loaded other values."""
        assert self._compute_sums() == self._sums

    def _compute_sums(self) -> list[float]:
        return [tensor.sum(dtype=torch.float64).item() for tensor in self._locals]


def checkpoint_costs(device: torch.device, *, case: Case, repeats: int, folder: Path) -> list[Record]:
    """Costs of saving to `folder`, where the checkpoints are kept, and of loading them."""
    state = TrainingState(case, device)
    about: Record = {"case": case, "saved": case, "total_bytes": state.total_bytes, "allowed_bytes": {}}
    records = [{"what": "save"} | about | measure_files(_save_methods(state, folder), repeats=repeats, device=device)]
    for evicted in (None, folder):
        found = measure_files(_load_methods(state, folder), repeats=repeats, device=device, evicted=evicted)
        records.append({"what": "load"} | about | found)
    return records


def reshard_costs(device: torch.device, *, case: Case, saved: Case, repeats: int, folder: Path) -> list[Record]:
    """Costs of loading the checkpoints of another case, `saved`, that `checkpoint_costs` kept in `folder`."""
    state = TrainingState(case, device)
    methods = _load_methods(state, folder)
    del methods[TORCH_LOAD]
    about: Record = {
        "what": "load",
        "case": case,
        "saved": saved,
        "total_bytes": state.total_bytes,
        "allowed_bytes": {},
    }
    return [about | measure_files(methods, repeats=repeats, device=device)]


def gather_costs(device: torch.device, *, case: Case, repeats: int, folder: Path) -> list[Record]:
    """Costs of gathering the averages of all ranks on the first rank, which writes them."""
    ema = TrainingState(case, device).ema
    total, small, largest = _sizes(tensor for tensor in ema.full_shapes().values() if tensor is not None)

    def gather_and_save() -> None:
        full = ema.full_state_dict()
        if is_first():
            _save_file(full, folder / "gathered", sync=True)

    methods = {
        GATHERED: FileMethod(gather_and_save, folder / "gathered"),
        GATHER: FileMethod(lambda: gather(ema, folder / "whole", max_shard_size=total), folder / "whole"),
        GATHER_SMALL: FileMethod(lambda: gather(ema, folder / "small", max_shard_size=small), folder / "small"),
    }
    found = measure_files(methods, repeats=repeats, device=device)
    full = ema.full_state_dict()
    if is_first():
        _assert_files_equal([folder / "gathered", folder / "whole", folder / "small"], full)
    allowed = {GATHER: total + largest, GATHER_SMALL: small + largest}
    return [{"what": "gather", "case": case, "saved": case, "total_bytes": total, "allowed_bytes": allowed} | found]


def export_costs(device: torch.device, *, case: Case, saved: Case, repeats: int, folder: Path) -> list[Record]:
    """Costs of exporting, in one process, the averages of another case, `saved`, that `checkpoint_costs` kept."""
    averages = TrainingState(case, device).ema.full_state_dict()
    total, small, largest = _sizes(averages.values())

    def run_export(out: Path, size: int) -> None:
        with redirect_stdout(io.StringIO()):
            export(folder / "ours", Destination(out, max_shard_size=f"{size // 1000 + 1}KB"))

    outs = [folder / f"export{index}" for index in range(4)]
    methods = {
        SAVE_FILE: FileMethod(lambda: _save_file(averages, outs[0], sync=True), outs[0]),
        SAVE_FILE_CACHED: FileMethod(lambda: _save_file(averages, outs[1], sync=False), outs[1]),
        EXPORT: FileMethod(lambda: run_export(outs[2], total), outs[2]),
        EXPORT_SMALL: FileMethod(lambda: run_export(outs[3], small), outs[3]),
    }
    allowed = {EXPORT: total + largest, EXPORT_SMALL: small + largest}
    about = {"what": "export", "case": case, "saved": saved, "total_bytes": total, "allowed_bytes": allowed}
    records = [
        about | measure_files(methods, repeats=repeats, device=device, evicted=evicted)
        for evicted in (None, folder / "ours")
    ]
    _assert_files_equal(outs, averages)
    return records


def _save_methods(state: TrainingState, folder: Path) -> dict[str, FileMethod]:
    background: list[Any] = []

    def dcp_async_save() -> None:
        background.append(dcp.async_save(state.tensors, checkpoint_id=folder / "dcp_async"))

    def torch_save() -> None:
        full = state.full()
        if is_first():
            (folder / "torch").mkdir()
            with (folder / "torch" / "state.pt").open("wb") as file:
                torch.save(full, file)
                file.flush()
                os.fsync(file.fileno())

    ours, ours_async = folder / "ours", folder / "ours_async"
    return {
        DCP_SAVE: FileMethod(lambda: dcp.save(state.tensors, checkpoint_id=folder / "dcp"), folder / "dcp"),
        SAVE: FileMethod(lambda: checkpoint.save(state.objects, ours, step=1), ours),
        DCP_ASYNC_SAVE: FileMethod(dcp_async_save, folder / "dcp_async", after=lambda: background.pop().result()),
        ASYNC_SAVE: FileMethod(
            lambda: checkpoint.save(state.objects, ours_async, step=1, block=False), ours_async, after=checkpoint.wait
        ),
        TORCH_SAVE: FileMethod(torch_save, folder / "torch"),
    }


def _load_methods(state: TrainingState, folder: Path) -> dict[str, FileMethod]:
    def torch_load() -> None:
        full: dict[str, Any] = {"model": {}, "ema": {}}
        state.load_full(torch.load(folder / "torch" / "state.pt", weights_only=True) if is_first() else full)

    runs: dict[str, Callable[[], object]] = {
        DCP_LOAD: lambda: dcp.load(state.tensors, checkpoint_id=folder / "dcp"),
        LOAD: lambda: checkpoint.load(state.objects, folder / "ours"),
        TORCH_LOAD: torch_load,
    }
    return {name: FileMethod(run, before=state.erase, after=state.assert_restored) for name, run in runs.items()}


def _sizes(tensors: Iterable[Tensor]) -> tuple[int, int, int]:
    """Bytes of all tensors, of small files, and of the largest tensor. A method may hold a file and a tensor."""
    sizes = [tensor.nbytes for tensor in tensors]
    return sum(sizes), max(sum(sizes) // 8, *sizes), max(sizes)


def _save_file(tensors: Mapping[str, Tensor], folder: Path, *, sync: bool) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors")
    if sync:
        with (folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())


def _assert_files_equal(folders: list[Path], expected: Mapping[str, Any]) -> None:
    """Fail the run if a method has written other values."""
    for folder in folders:
        found = WeightReader(folder)
        assert found.keys() == expected.keys(), folder
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), folder
