"""Calls in any global mode of torch are right, and leave nothing behind that breaks training or the next update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ema_dist import Compensated, Offloaded, ShardedEMA, checkpoint, compute_ema
from tests.support.layouts import (
    IGNORE_INITIAL_WEIGHTS_WARNING,
    IGNORED_WARNINGS,
    LAYOUTS,
    assert_bitwise_equal,
    full_weights,
    make_net,
    wrap,
)

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


class RecordedCalls(TorchFunctionMode):
    """A mode of the user's own, such as a profiler's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        return func(*args, **kwargs or {})


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "bfloat16 by default": partial(default_dtype, torch.bfloat16),
    "float64 by default": partial(default_dtype, torch.float64),
    "device": partial(torch.device, "meta"),
    "set_default_device": partial(default_device, "meta"),
    "anomaly": partial(torch.autograd.set_detect_anomaly, True, check_nan=False),  # noqa: FBT003
    "deterministic": deterministic,
    "function mode": RecordedCalls,
    "saved tensors": torch.autograd.graph.save_on_cpu,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 of bfloat16": {},
    "halves of bfloat16": {"dtype": torch.bfloat16, "rounding": Compensated()},
    "stochastic": {"dtype": torch.bfloat16},
    "offloaded": {"store": Offloaded()},
    "tracks": {"decay": {"a": 0.5, "b": 0.75}},
    "whole copies": {"replicas": "copy"},
}


class Training:
    """A model in training, its averages, and the float64 averages that they should be."""

    def __init__(
        self, layout: str, setting: str, enter: Callable[[], AbstractContextManager[object]], root: Path
    ) -> None:
        dtype = torch.bfloat16 if "of bfloat16" in setting else torch.float32
        self.model, self.other = (wrap(layout, make_net(layout).to(dtype)) for _ in range(2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.root = root
        self.decays = SETTINGS[setting].get("decay", {"default": 0.5})
        self.track = [*self.decays][-1]
        self.tolerance = 0.03 if setting == "stochastic" else 1e-5
        self.expected = {track: full_weights(self.model) for track in self.decays}
        with enter():
            self.ema = ShardedEMA(self.model, **{"decay": 0.5} | SETTINGS[setting])

    def step(self) -> None:
        """One training step."""
        self.model.train()(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def follow(self) -> None:
        """The averages should now have followed the live weights."""
        live = full_weights(self.model)
        for track, decay in self.decays.items():
            for name, value in self.expected[track].items():
                average = live[name] if "num_batches" in name else decay * value + (1 - decay) * live[name]
                self.expected[track][name] = average

    def check(self) -> None:
        """The averages are what they should be."""
        for track, expected in self.expected.items():
            full = self.ema.full_state_dict(dtype=torch.float32, track=track)
            for name, value in full.items():
                torch.testing.assert_close(value.double(), expected[name], rtol=self.tolerance, atol=self.tolerance)


def nothing(_: Training) -> None:
    pass


def update(training: Training) -> None:
    training.ema.update()


def attached_step(training: Training) -> None:
    handle = training.ema.attach(training.optimizer)
    training.optimizer.step()
    handle.remove()


def swapped(training: Training) -> None:
    with training.ema.swapped(training.track):
        training.model.eval()(training.batch)


def restored(training: Training) -> None:
    block = training.ema.swapped(training.track)
    block.__enter__()
    training.ema.restore()
    block.__exit__(None, None, None)


def serving(training: Training) -> None:
    with training.ema.serving(training.track):
        output = training.model.eval()(training.batch)
        assert not torch.is_grad_enabled()
    assert not output.requires_grad


def gathered(training: Training) -> None:
    assert dict(training.ema.gather(track=training.track)).keys() == training.ema.full_shapes().keys()


def loaded(training: Training) -> None:
    training.ema.load_state_dict(training.ema.state_dict())


def loaded_in_full(training: Training) -> None:
    full = training.ema.full_state_dict(dtype=torch.float32, track=training.track)
    training.ema.load_full_state_dict(full, track=training.track)


def copied(training: Training) -> None:
    training.ema.copy_to(training.other, track=training.track)
    compute_ema(training.model, training.other, smoothing=0.5)


def checked(training: Training) -> None:
    training.ema.check_replicas()
    assert repr(training.ema)
    assert training.ema.serving_mode
    assert training.ema.update_kernel
    assert training.ema.updates


def saved_and_loaded(training: Training) -> None:
    state = {"model": training.model, "ema": training.ema, "optim": training.optimizer}
    checkpoint.save(state, training.root, step=1)
    checkpoint.save(state, training.root, step=2, block=False)
    assert checkpoint.load(state, training.root) == 2


def exported_and_imported(training: Training) -> None:
    if training.decays.keys() == {"default"} and training.tolerance < 0.01:
        checkpoint.gather(training.ema, training.root / "full", dtype=torch.float32)
        checkpoint.scatter(training.ema, training.root / "full")


CALLS = [
    *(nothing, update, attached_step, swapped, restored, serving, gathered, loaded, loaded_in_full, copied, checked),
    *(saved_and_loaded, exported_and_imported),
]


RUNS = [
    *product(["plain"], MODES, [list(SETTINGS)]),
    *product(
        ["ddp", "fsdp2"],
        ["inference_mode", "autocast", "bfloat16 by default", "device", "anomaly", "deterministic"],
        [["float32", "halves of bfloat16", "tracks"]],
    ),
    *product(["fsdp1", "tp", "hsdp"], ["inference_mode", "device"], [["float32 of bfloat16"]]),
]


@pytest.mark.parametrize(
    ("layout", "mode", "settings"),
    [
        pytest.param(
            *run, id=f"{run[0]}-{run[1]}", marks=(pytest.mark.world_size(LAYOUTS[run[0]].ranks), *IGNORED_WARNINGS)
        )
        for run in RUNS
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings(r"ignore:.*serving\(\) swaps:UserWarning")
def test_calls_in_a_mode_leave_nothing_behind(layout: str, mode: str, settings: list[str], tmp_path: Path) -> None:
    """After construction and after each call in the mode, the next training step and update outside of it are right."""
    failures: list[str] = []
    for setting in settings:
        training = Training(layout, setting, MODES[mode], tmp_path / setting)
        for call in CALLS:
            try:
                live = full_weights(training.model)
                with MODES[mode]():
                    call(training)
                assert torch.is_grad_enabled()
                if call in (update, attached_step):
                    training.follow()
                else:
                    assert_bitwise_equal(full_weights(training.model), live)
                training.step()
                training.ema.update()
                training.follow()
                training.check()
            except Exception as error:  # noqa: BLE001, PERF203  all failures of a mode are shown at once
                failures.append(f"{setting}, {call.__name__}: {str(error)[:300]!r}")
                break
    assert not failures, "\n".join(failures)


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    """It could not be trained either; reading it is no problem."""
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    live = nn.Linear(2, 2)
    for call in (
        lambda: ShardedEMA(model),
        lambda: ShardedEMA(live).copy_to(model),
        lambda: compute_ema(live, model),
    ):
        with pytest.raises(ValueError, match=r"'weight'.*inference_mode"):
            call()
    compute_ema(model, live, smoothing=0.0)
    assert torch.equal(live.weight, model.weight)


class Counting(nn.Module):
    """A module that assigns its buffers, two of them one tensor, so that an evaluation makes inference tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        for name in ("total", "same"):
            self.register_buffer(name, torch.zeros(()))
        self.same = self.total

    def forward(self, x: Tensor) -> Tensor:
        self.total = self.same = self.total + 1
        return x * self.weight


@pytest.mark.parametrize("call", [update, swapped, serving, gathered, loaded, nothing])
@pytest.mark.parametrize("inside", [torch.inference_mode, nullcontext])
def test_buffers_that_an_evaluation_in_inference_mode_made(
    call: Callable[[Training], None], inside: Callable[[], AbstractContextManager[object]]
) -> None:
    """They are replaced by equal ones that can be written to."""
    training = Training.__new__(Training)
    training.model, training.track, training.batch = Counting(), "default", torch.ones(2)
    training.ema = ShardedEMA(training.model, decay=0.5)
    with torch.inference_mode():
        training.model(torch.ones(2))
    assert training.model.total.is_inference()
    with inside():
        if call is nothing:
            training.ema = ShardedEMA(training.model, decay=0.5)
        call(training)
    training.ema.update()
    assert not training.model.total.is_inference()
    assert training.model.same is training.model.total
    assert training.model.total == 1


@pytest.mark.parametrize("grad_inside", [True, False])
def test_the_block_runs_in_the_callers_modes(grad_inside: bool) -> None:  # noqa: FBT001
    ema = ShardedEMA(nn.Linear(2, 2))
    with torch.inference_mode(), ema.swapped():
        assert torch.is_inference_mode_enabled()
    with torch.set_grad_enabled(grad_inside):
        with ema.swapped():
            assert torch.is_grad_enabled() == grad_inside
        with ema.serving():
            assert not torch.is_grad_enabled()
        with torch.inference_mode(), ema.serving():
            assert torch.is_inference_mode_enabled()
        for _ in ema.gather():
            assert torch.is_grad_enabled() == grad_inside
        assert torch.is_grad_enabled() == grad_inside
    with torch.inference_mode():
        names = [name for name, _ in ema.gather() if torch.is_inference_mode_enabled()]
    assert names == ["weight", "bias"]


@pytest.mark.parametrize("call", [swapped, serving])
def test_an_error_on_entering_leaves_the_modes_as_they_were(call: Callable[[Training], None]) -> None:
    training = Training.__new__(Training)
    training.model, training.track = Counting(), "default"
    training.ema = ShardedEMA(training.model)
    training.model.weight = nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        with pytest.raises(ValueError, match="weight"):
            call(training)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
