"""Runs of the command `ema-dist` in this process, and the checkpoints that they read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from typer.testing import CliRunner, Result

from ema_dist import HalfLife, ShardedEMA, checkpoint
from ema_dist.cli.app import app
from tests.support.layouts import make_trained


def run(*arguments: object) -> Result:
    """Runs the command in this process; any exception but `SystemExit` is raised again."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


def run_ok(*arguments: object) -> str:
    """Runs the command, which must succeed, and returns its standard output."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def save_with_dcp(folder: Path, state: dict[str, Any]) -> Path:
    """Saves `state` with plain DCP, without `ema_dist.checkpoint`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    return folder


def make_dcp_checkpoint(folder: Path, **settings: Any) -> tuple[Path, ShardedEMA]:  # noqa: ANN401
    """Saves a trained model and its averages with plain DCP; returns the folder and the averages."""
    model, ema = make_trained("plain", **settings)
    return save_with_dcp(folder, {"model": get_model_state_dict(model), "ema": ema}), ema


def make_checkpoint(root: Path, step: int = 3, **entries: Any) -> tuple[Path, nn.Module, ShardedEMA]:  # noqa: ANN401
    """Saves a trained model, averages and `entries` with `ema_dist.checkpoint`; returns root, model and averages."""
    model, ema = make_trained("plain", decay=HalfLife(0.75))  # after three steps, the commands print no notes
    checkpoint.save({"model": model, "ema": ema, **entries}, root, step=step)
    return root, model, ema


def load_exported(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an export, read by safetensors."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
