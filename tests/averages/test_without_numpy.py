"""Averages depend on torch alone: every call of `ShardedEMA` works where NumPy is not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.modules["numpy"] = None  # before torch looks for it

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from ema_dist import HalfLife, ShardedEMA

dist.init_process_group("gloo")
for wrap in (DistributedDataParallel, lambda net: fully_shard(net, mesh=init_device_mesh("cpu", (2,)))):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
    ema = ShardedEMA(model, decay=HalfLife(0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
        ema.update()
    with ema.swapped(), torch.no_grad():
        model(torch.randn(4, 4))
    with ema.serving(), torch.no_grad():
        model(torch.randn(4, 4))
    full = ema.full_state_dict()
    ema.load_full_state_dict(full)
    ema.load_consolidated_state_dict(ema.consolidated_state_dict())
    ema.load_state_dict(ema.state_dict())
    ema.copy_to(model)
    assert ema.distance() < 1e-6
    ema.full_state_dict(pipeline=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    again = ema.full_state_dict()
    assert all(torch.equal(again[name], full[name]) for name in full) and bool(full) == (dist.get_rank() == 0)
try:
    torch.ones(1).numpy()
except RuntimeError:
    print("done without NumPy")
dist.destroy_process_group()
"""


def test_every_call_works_without_numpy(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=tmp_path,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(output.endswith("done without NumPy\n") for output in outputs), outputs
