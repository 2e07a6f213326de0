"""Distributed checkpoints of a run: one folder an epoch, which has its name only when it is whole."""

from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`."""
    return max(folder.glob("epoch-????"), default=None)


def save(folder: Path, epoch: int, model: nn.Module, optimizer: Optimizer, **others: Stateful) -> None:
    """Write `folder/epoch-NNNN`, beside its place first and renamed when every rank has finished.

    Collective: every rank of the default process group.
    """
    whole = folder / f"epoch-{epoch:04}"
    partial = whole.with_suffix(".partial")
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, **others}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(whole)


def load(path: Path, model: nn.Module, optimizer: Optimizer, **others: Stateful) -> None:
    """Put the checkpoint at `path` into the model, the optimizer and `others`, whatever layout and world size saved it.

    Collective: every rank of the default process group.
    """
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optim": moments, **others}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
