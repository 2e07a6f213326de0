"""A checkpoint with mutated bytes loads, or is refused with an error that names it."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ema_dist import ShardedEMA, checkpoint
from ema_dist.checkpoint.dcp.metadata import read_metadata
from ema_dist.checkpoint.dcp.reader import read_entries
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint

EXAMPLES = 300
CLI_EXAMPLES = 60

MEMORY_LIMIT = 2 * 2**30
"""The limit for reading a checkpoint of some kilobytes: far more than it needs, far less than the machine has."""

Mutation = tuple[str, int, int, bytes]

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "overwrite", "insert", "delete", "truncate", "splice"]),
        st.integers(0, 2**16),
        st.integers(0, 2**16),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


def mutated(data: bytes, mutations: list[Mutation]) -> bytes:
    for kind, at, other, new in mutations:
        at, other = at % (len(data) + 1), other % (len(data) + 1)  # noqa: PLW2901  positions in the current data
        length = 1 + new[0] % 16
        match kind:
            case "flip":
                data = data[:at] + bytes(byte ^ 1 << other % 8 for byte in data[at : at + 1]) + data[at + 1 :]
            case "overwrite":
                data = data[:at] + new + data[at + len(new) :]
            case "insert":
                data = data[:at] + new + data[at:]
            case "delete":
                data = data[:at] + data[at + length :]
            case "truncate":
                data = data[:at]
            case "splice":
                data = data[:at] + data[other : other + length] + data[at:]
    return data


def test_every_mutation_changes_something() -> None:
    data = bytes(range(64))
    for kind in ["flip", "overwrite", "insert", "delete", "truncate", "splice"]:
        assert mutated(data, [(kind, 20, 40, b"abc")]) != data


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit this process to `MEMORY_LIMIT` more than it has now: a larger allocation raises at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_all(folder: Path) -> None:
    """Read every value, as loading does."""
    read_entries(folder, dict.fromkeys(read_metadata(folder).state_dict_metadata))


def read_averages(folder: Path) -> None:
    """Read the averages, as the command line does."""
    stored = StoredCheckpoint(folder)
    for _ in stored.read_weights(stored.weights("ema")):
        pass


def fuzz(
    path: Path, folder: Path, read: Callable[[Path], None] = read_all, examples: int = EXAMPLES
) -> tuple[int, int]:
    """Read the checkpoint with mutated bytes in one file; count how often it loads and is refused by name."""
    original = path.read_bytes()
    loaded = refused = 0

    @given(MUTATIONS)
    @settings(max_examples=examples)
    def run(mutations: list[Mutation]) -> None:
        nonlocal loaded, refused
        path.write_bytes(mutated(original, mutations))
        try:
            read(folder)
            loaded += 1
        except CheckpointError as error:
            refused += str(folder) in str(error)

    with limited_memory():
        run()
    return loaded, refused


def save(folder: Path) -> None:
    """Save sharded tensors, whole tensors, and values that are not tensors."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    state = {
        "model": {"weight": distribute_tensor(torch.randn(7, 3), mesh, [Shard(0)]), "bias": torch.randn(3).bfloat16()},
        "optim": [{"lr": 0.1, "betas": (0.9, 0.999)}, torch.arange(4)],
        "note": "as it was",
    }
    dcp.save(state, checkpoint_id=folder)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory the way Linux counts it")
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.world_size(2)
def test_a_mutated_checkpoint_loads_or_is_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path / "saved")
    if dist.get_rank() == 0:
        loaded, refused = fuzz(tmp_path / "saved" / name, tmp_path / "saved")
        assert refused > EXAMPLES / 10
        assert loaded + refused >= EXAMPLES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory the way Linux counts it")
@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_the_command_line_refuses_a_mutated_checkpoint_by_name(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(0, 2))
    checkpoint.save({"model": model, "ema": ShardedEMA(model)}, tmp_path, step=1)
    folder = tmp_path / "step-0000000001"
    loaded, refused = fuzz(folder / name, folder, read_averages, CLI_EXAMPLES)
    assert refused > CLI_EXAMPLES / 10
    assert loaded + refused >= CLI_EXAMPLES
