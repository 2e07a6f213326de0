"""What an update costs in Composer's Trainer: by `ema_dist.composer.EMA` and by Composer's own algorithm, side by side.

Both are algorithms of one real Trainer and get its events. After a few real batches, at the update event of the last,
they take turns. The functions that measure run on every rank; times are the slowest rank's, bytes the largest one's.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import composer.algorithms
import torch
import torch.distributed as dist
import torch.nn.functional as F
from composer import Algorithm, Callback, Trainer
from composer.core import Event, State
from composer.loggers import Logger
from composer.models import ComposerModel
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor  # no public name
from torch.distributed.tensor.debug import CommDebugMode

from ema_dist.composer import EMA
from launch.benchmark.cases import Transformer, local, nbytes, scale_weights
from launch.benchmark.measure import highest, in_turn, peak_memory
from launch.recipe.model import Block

OURS, THEIRS = "ema_dist.composer.EMA", "composer.algorithms.EMA"
BATCHES, SAMPLES, TOKENS = 3, 2, 8
MEMORY_TURNS = 3
FSDP1 = {"sharding_strategy": "FULL_SHARD", "mixed_precision": "PURE", "state_dict_type": "sharded"}
PARALLELISM_CONFIGS = {"ddp": None, "fsdp1": {"fsdp": FSDP1}}
LAYOUT_LABELS = {"ddp": "DDP", "fsdp1": "FSDP1"}


@dataclass(frozen=True)
class TrainerCase:
    """One model in Composer's Trainer, which wraps it one way on so many ranks."""

    parallel: Literal["ddp", "fsdp1"]
    ranks: int
    shape: Transformer

    def __str__(self) -> str:
        return f"{LAYOUT_LABELS[self.parallel]}, {self.ranks} ranks"


@dataclass(frozen=True)
class TrainerCosts:
    """Of an update by either algorithm, Composer's own first: seconds, one a round, and what one rank needs for it.

    Args:
        held_bytes: of the averages.
        extra_bytes: the most memory during an update, beyond what was resident before.
        collectives: calls in one update.
    """

    case: TrainerCase
    elements: int
    seconds: dict[str, list[float]]
    held_bytes: dict[str, int]
    extra_bytes: dict[str, int]
    collectives: dict[str, int]


class ComposerEMA(composer.algorithms.EMA):
    """Composer's own. By its own name ours would refuse to run beside it; here nothing exchanges weights."""

    def averages(self) -> dict[str, Tensor]:
        assert self.ema_model is not None
        return self.ema_model.named_parameters_dict | self.ema_model.named_buffers_dict


class BenchmarkModel(ComposerModel):
    """A transformer, under the only name of an attribute with which Composer's own algorithm runs under FSDP1."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.module = shape.model()
        for part in self.module:
            vars(part)["_fsdp_wrap"] = isinstance(part, Block)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], *_: object, **__: object) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


class LastBatchCallback(Callback):
    """Calls `measure` once, when the last batch has been trained and both algorithms have averaged its weights."""

    def __init__(self, measure: Callable[[State, Logger], None]) -> None:
        self._measure = measure

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == BATCHES:
            self._measure(state, logger)


def trainer_costs(device: torch.device, *, case: TrainerCase, repeats: int) -> TrainerCosts:
    results: list[TrainerCosts] = []
    ours, theirs = EMA(), ComposerEMA()

    def measure(state: State, logger: Logger) -> None:
        updates = AlternatingUpdates(state, logger, {THEIRS: theirs, OURS: ours})
        seconds = updates.seconds(repeats, device)
        extra_bytes = updates.extra_bytes(device)
        collectives = updates.collectives(device)
        assert ours.ema is not None
        _assert_averages_close(ours.ema.full_state_dict(), theirs.averages())
        held = [nbytes(theirs.averages().values()), _held_bytes(ours)]
        held_bytes = {name: int(size) for name, size in zip(seconds, highest(held, device), strict=True)}
        results.append(TrainerCosts(case, elements, seconds, held_bytes, extra_bytes, collectives))

    model = BenchmarkModel(case.shape)
    elements = sum(parameter.numel() for parameter in model.parameters())
    # Composer asks CUDA for the current device when it prepares FSDP1; nothing else keeps that from a CPU.
    with patch.object(torch.cuda, "current_device", return_value=device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about the Trainer and the settings of wrappers
        _trainer(case, model, [ours, theirs], LastBatchCallback(measure)).fit()
    return results[0]


class AlternatingUpdates:
    """The algorithms' updates in turn, each after a step of the optimizer."""

    def __init__(self, state: State, logger: Logger, algorithms: Mapping[str, Algorithm]) -> None:
        self._updates = {name: partial(_update, algorithm, state, logger) for name, algorithm in algorithms.items()}
        (self._optimizer,) = state.optimizers
        scale_weights(state.model, factor=1.5)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # it reads gradients and writes weights, which stay what they are: averages stay alike

    def seconds(self, repeats: int, device: torch.device) -> dict[str, list[float]]:
        seconds = in_turn(self._updates, before=self._step, repeats=repeats, device=device)
        return {name: highest(samples, device) for name, samples in seconds.items()}

    def extra_bytes(self, device: torch.device) -> dict[str, int]:
        """The most memory of an update. Apart from the times: who gave memory back must wait to get it again."""
        memory = peak_memory(device)
        peak_bytes: dict[str, list[int]] = {name: [] for name in self._updates}

        def before(name: str) -> None:
            self._step(name)
            memory.reset()

        def after(name: str) -> None:
            peak_bytes[name].append(memory.read())

        in_turn(self._updates, before=before, after=after, repeats=MEMORY_TURNS, device=device)
        return self._highest({name: max(sizes) for name, sizes in peak_bytes.items()}, device)

    def collectives(self, device: torch.device) -> dict[str, int]:
        """How many calls torch counts in an update."""
        counts: dict[str, int] = {}
        for name, update in self._updates.items():
            self._step(name)
            with CommDebugMode() as mode:
                update()
            counts[name] = mode.get_total_counts()
        return self._highest(counts, device)

    def _highest(self, values: Mapping[str, int], device: torch.device) -> dict[str, int]:
        return dict(zip(values, map(int, highest([*values.values()], device)), strict=True))

    def _step(self, _: str) -> None:
        gradients = [
            parameter.grad
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.numel() > 0
        ]
        assert all(gradient is not None for gradient in gradients), "without gradients a step does nothing"
        self._optimizer.step()


def _update(algorithm: Algorithm, state: State, logger: Logger) -> None:
    """As Composer's engine calls it."""
    assert algorithm.match(Event.BATCH_END, state)
    algorithm.apply(Event.BATCH_END, state, logger)


def _trainer(case: TrainerCase, model: BenchmarkModel, algorithms: list[Algorithm], callback: Callback) -> Trainer:
    rank, ranks = str(dist.get_rank()), str(case.ranks)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": "0"}
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(SAMPLES, TOKENS, case.shape.width, generator=generator)
    targets = torch.randint(0, case.shape.vocabulary, (SAMPLES, TOKENS), generator=generator)
    settings: dict[str, Any] = {"progress_bar": False, "log_to_console": False, "auto_log_hparams": False}
    return Trainer(
        model=model,
        algorithms=algorithms,
        callbacks=[callback],
        train_dataloader=[(tokens, targets)] * BATCHES,
        max_duration=f"{BATCHES}ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        parallelism_config=PARALLELISM_CONFIGS[case.parallel],
        device_train_microbatch_size=SAMPLES,
        precision="fp32",
        device="cpu",
        seed=0,
        **settings,
    )


def _held_bytes(algorithm: EMA) -> int:
    assert algorithm.ema is not None
    track = algorithm.ema.state_dict()["tracks"]["default"]
    tensors = [*track["averages"].values(), *track["buffers"].values()]
    return nbytes(part for tensor in tensors for part in _local_tensors(tensor))


def _local_tensors(tensor: Tensor) -> list[Tensor]:
    if isinstance(tensor, ShardedTensor):
        return [block.tensor for block in tensor.local_shards()]
    return [local(tensor)]


def _assert_averages_close(full: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Whoever computes something else has not taken part. `full` is there on the first rank only."""
    if dist.get_rank() == 0:
        by_name = {name.replace("_fsdp_wrapped_module.", ""): average for name, average in theirs.items()}
        prefix = "module." if len(by_name.keys() & full.keys()) < len(full) else ""  # DDP's
        torch.testing.assert_close(
            {name.removeprefix(prefix): average for name, average in by_name.items()}, dict(full), rtol=1e-4, atol=1e-6
        )
