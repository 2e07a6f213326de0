"""What an update costs in Composer's Trainer: by `ema_dist.composer.EMA` and by Composer's own algorithm, side by side.

Both are algorithms of one real Trainer and receive its events. Their updates are interleaved at the update event of
the last of a few real batches. Times and bytes are maxima over ranks.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any
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
from launch.benchmark.cases import Case, Parallel, Transformer, local, nbytes, scale_weights
from launch.benchmark.composer_page import LIMITS, OURS, THEIRS, composer_page
from launch.benchmark.measure import InterleavedCalls, Record, highest_by_key, times_reference
from launch.benchmark.page import Environment, Page
from launch.benchmark.run import Run
from launch.recipe.model import Block

BATCHES, SAMPLES, TOKENS = 3, 2, 8
FSDP1 = {"sharding_strategy": "FULL_SHARD", "mixed_precision": "PURE", "state_dict_type": "sharded"}
PARALLELISM_CONFIGS: dict[Parallel, Any] = {"ddp": None, "fsdp1": {"fsdp": FSDP1}}


class ComposerEMA(composer.algorithms.EMA):
    """Composer's own EMA, renamed: ours refuses to run with another EMA. Here they can: neither swaps weights."""

    def averages(self) -> dict[str, Tensor]:
        assert self.ema_model is not None
        return self.ema_model.named_parameters_dict | self.ema_model.named_buffers_dict


class BenchmarkModel(ComposerModel):
    """A transformer in the attribute `module`; with another name, Composer's own algorithm fails under FSDP1."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.module = shape.build()
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


def measure_composer(run: Run) -> Page:
    shape = Transformer(2, 16, 97) if run.quick else Transformer()
    environment = Environment.here(run.device_type)
    costs = [it for parallel in LIMITS for it in run.measure(trainer_costs, Case(parallel, 2, shape))]
    return composer_page(environment, run.not_measured, costs, composer_version=version("mosaicml"))


def trainer_costs(device: torch.device, *, case: Case, repeats: int) -> list[Record]:
    """Costs of an update by each algorithm, Composer's own first; `collectives` are the calls in one update."""
    assert isinstance(case.shape, Transformer)
    records: list[Record] = []
    model = BenchmarkModel(case.shape)
    elements = sum(parameter.numel() for parameter in model.parameters())
    ours, theirs = EMA(), ComposerEMA()

    def measure(state: State, logger: Logger) -> None:
        costs = _update_costs(state, logger, {THEIRS: theirs, OURS: ours}, device=device, repeats=repeats)
        assert ours.ema is not None
        _assert_averages_close(ours.ema.full_state_dict(), theirs.averages())
        held_bytes = highest_by_key({THEIRS: nbytes(theirs.averages().values()), OURS: _held_bytes(ours)}, device)
        records.append({"case": case, "elements": elements, "held_bytes": held_bytes} | costs)

    # Composer asks CUDA for the current device when it prepares FSDP1, also on a CPU.
    with patch.object(torch.cuda, "current_device", return_value=device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all about the Trainer and the wrappers' settings
        _trainer(case, model, [ours, theirs], LastBatchCallback(measure)).fit()
    return records


def _update_costs(
    state: State, logger: Logger, algorithms: Mapping[str, Algorithm], *, device: torch.device, repeats: int
) -> Record:
    """Costs of the algorithms' updates, interleaved; an optimizer step precedes each update."""
    updates = {name: partial(_update, algorithm, state, logger) for name, algorithm in algorithms.items()}
    (optimizer,) = state.optimizers
    scale_weights(state.model, factor=1.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a step then writes the weights without changing them: the averages stay equal
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(_: str) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.numel() > 0]
        assert all(gradient is not None for gradient in gradients), "without gradients a step does nothing"
        optimizer.step()

    interleaved = InterleavedCalls(updates, device, before=step)
    seconds, extra_bytes = interleaved.measure(repeats).seconds, interleaved.measure_memory().extra_bytes
    collectives: dict[str, int] = {}
    for name, update in updates.items():
        step(name)
        with CommDebugMode() as mode:
            update()
        collectives[name] = mode.get_total_counts()
    return {
        "seconds": seconds,
        "times_reference": times_reference(seconds),
        "extra_bytes": extra_bytes,
        "collectives": highest_by_key(collectives, device),
    }


def _update(algorithm: Algorithm, state: State, logger: Logger) -> None:
    """Call the algorithm as Composer's engine does."""
    assert algorithm.match(Event.BATCH_END, state)
    algorithm.apply(Event.BATCH_END, state, logger)


def _trainer(case: Case, model: BenchmarkModel, algorithms: list[Algorithm], callback: Callback) -> Trainer:
    assert isinstance(case.shape, Transformer)
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
    """Fail the run if the algorithms' averages differ. `full` is empty on all ranks but the first."""
    if dist.get_rank() == 0:
        by_name = {name.replace("_fsdp_wrapped_module.", ""): average for name, average in theirs.items()}
        prefix = "module." if len(by_name.keys() & full.keys()) < len(full) else ""  # DDP's prefix
        torch.testing.assert_close(
            {name.removeprefix(prefix): average for name, average in by_name.items()}, dict(full), rtol=1e-4, atol=1e-6
        )
