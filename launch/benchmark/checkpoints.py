"""What it costs to save and load a model and its averages, beside the same tensors through other tools.

The other tools get those tensors ready-made: nothing but their own work counts. The functions that measure run on every
rank of a case; times are the slowest rank's, bytes the largest one's.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ema_dist import ShardedEMA, checkpoint
from launch.benchmark.cases import DECAY, Case, local, nbytes, scale_weights
from launch.benchmark.file_methods import Costs, Way, is_first, measured

DCP_SAVE, DCP_LOAD, DCP_ASYNC_SAVE = "dcp.save", "dcp.load", "dcp.async_save, until it returns"
SAVE, LOAD, ASYNC_SAVE = "checkpoint.save", "checkpoint.load", "checkpoint.save, block=False, until it returns"
TORCH_SAVE, TORCH_LOAD = "gathered, torch.save, fsync", "torch.load, scattered"


class TrainingState:
    """A model and its averages, and the same as other tools take it."""

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
        """The reverse of `full`."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, full["model"], options=options)
        self.ema.load_full_state_dict(full["ema"])

    def erase(self) -> None:
        torch._foreach_zero_(self._locals)

    def assert_restored(self) -> None:
        """Whoever loads something else has not taken part."""
        assert self._compute_sums() == self._sums

    def _compute_sums(self) -> list[float]:
        return [tensor.sum(dtype=torch.float64).item() for tensor in self._locals]


def checkpoint_costs(device: torch.device, *, case: Case, repeats: int, folder: Path) -> list[Costs]:
    """Of saving into `folder`, where it stays, and of loading that."""
    state = TrainingState(case, device)
    measure = partial(measured, repeats=repeats, device=device)
    costs = [Costs("save", case, case, state.total_bytes, *measure(_save_methods(state, folder)))]
    for forgotten in (None, folder):
        found = measure(_load_methods(state, folder), forgotten=forgotten)
        costs.append(Costs("load", case, case, state.total_bytes, *found, cold=forgotten is not None))
    return costs


def reshard_costs(device: torch.device, *, case: Case, saved: Case, repeats: int, folder: Path) -> list[Costs]:
    """Of loading what another case has left in `folder`."""
    state = TrainingState(case, device)
    ways = _load_methods(state, folder)
    del ways[TORCH_LOAD]
    return [Costs("load", case, saved, state.total_bytes, *measured(ways, repeats=repeats, device=device))]


def _save_methods(state: TrainingState, folder: Path) -> dict[str, Way]:
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
        DCP_SAVE: Way(lambda: dcp.save(state.tensors, checkpoint_id=folder / "dcp"), folder / "dcp"),
        SAVE: Way(lambda: checkpoint.save(state.objects, ours, step=1), ours),
        DCP_ASYNC_SAVE: Way(dcp_async_save, folder / "dcp_async", after=lambda: background.pop().result()),
        ASYNC_SAVE: Way(
            lambda: checkpoint.save(state.objects, ours_async, step=1, block=False), ours_async, after=checkpoint.wait
        ),
        TORCH_SAVE: Way(torch_save, folder / "torch"),
    }


def _load_methods(state: TrainingState, folder: Path) -> dict[str, Way]:
    def torch_load() -> None:
        full: dict[str, Any] = {"model": {}, "ema": {}}
        state.load_full(torch.load(folder / "torch" / "state.pt", weights_only=True) if is_first() else full)

    runs: dict[str, Callable[[], object]] = {
        DCP_LOAD: lambda: dcp.load(state.tensors, checkpoint_id=folder / "dcp"),
        LOAD: lambda: checkpoint.load(state.objects, folder / "ours"),
        TORCH_LOAD: torch_load,
    }
    return {name: Way(run, before=state.erase, after=state.assert_restored) for name, run in runs.items()}
