"""An optimizer of any kind resumes as if it had never stopped, or is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adagrad, Adam, Optimizer

from ema_dist import ShardedEMA, checkpoint
from ema_dist.sharding import local_tensor
from tests.support.layouts import assert_bitwise_equal, full_weights, layouts, make_net, train_step, wrap
from tests.support.optimizers import schedule_free, timm


class Delegating(Optimizer):
    """A launcher's prepared optimizer: all of its state is that of the one inside."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        self.inner.step()


class Perturbing(Optimizer):
    """Sharpness-aware: it has state of its own beside the moments of the one inside."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {})
        self.inner = Adam(self.param_groups, lr=0.05)

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.detach().clone()
        self.inner.step()


class Several(Optimizer):
    """Two optimizers as one, with a ``state_dict()`` of its own."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.inner = [Adam(parameters[:1], lr=0.05), Adam(parameters[1:], lr=0.05)]
        super().__init__(parameters, {})

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        for optimizer in self.inner:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": [optimizer.state_dict() for optimizer in self.inner]}


class WithoutInit(Optimizer):
    """Looks ahead; torch has no hooks for it."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        self.inner.step()


class CountingGlobally(Adam):
    """Keeps a number that belongs to no parameter."""

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        super().step()
        self.state["total"] = {"steps": 1}


def with_hook(change: dict[str, Any]) -> Callable[[Any], Optimizer]:
    def make(parameters: Sequence[Tensor]) -> Optimizer:
        optimizer = Adam(parameters)
        optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, **change})
        return optimizer

    return make


def train(model: nn.Module, optimizer: Any, steps: range) -> None:  # noqa: ANN401
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = None
        model(torch.full((1, 3), float(step))).square().sum().backward()
        optimizer.step()


RESUMED = {
    "torch.optim.Adam": lambda p: Adam(p, lr=0.05),
    "wrapper": lambda p: Delegating(Adam(p, lr=0.05)),
    "timm.Lookahead": lambda p: timm("lookahead", "Lookahead")(Adam(p, lr=0.05), k=3),
    "timm.Adafactor": timm("adafactor", "Adafactor"),  # moments of rows and columns
    "timm.AdafactorBigVision": timm("adafactor_bv", "AdafactorBigVision"),
    "timm.Adopt": timm("adopt", "Adopt"),
    "timm.Lion": timm("lion", "Lion"),
    "timm.Muon": timm("muon", "Muon"),
    "timm.NvNovoGrad": timm("nvnovograd", "NvNovoGrad"),  # one number for each parameter
    "schedulefree.AdamWScheduleFree": schedule_free("AdamWScheduleFree", lr=0.05),
    "schedulefree.SGDScheduleFree": schedule_free("SGDScheduleFree", lr=0.05),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", RESUMED)
def test_it_resumes_exactly(kind: str, tmp_path: Path) -> None:
    model, resumed = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer, other = RESUMED[kind]([*model.parameters()]), RESUMED[kind]([*resumed.parameters()])
    train(model, optimizer, range(4))
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=4)
    checkpoint.load({"model": resumed, "optim": other}, tmp_path)
    for each, stepping in ((model, optimizer), (resumed, other)):
        train(each, stepping, range(4, 8))
    assert torch.equal(model.weight, resumed.weight)


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (schedule_free("AdamWScheduleFree", lr=0.05), lambda optimizer: optimizer),
        (lambda p: schedule_free("ScheduleFreeWrapper")(SGD(p, lr=0.05)), lambda optimizer: optimizer.base),
    ],
    ids=["optimizer", "wrapper"],
)
def test_schedule_free_optimizers_resume_after_an_evaluation(
    make: Callable[[Any], Any], inside: Callable[[Any], Optimizer], tmp_path: Path
) -> None:
    """The advice for `ScheduleFreeWrapper` holds."""
    model, resumed = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer, other = make([*model.parameters()]), make([*resumed.parameters()])
    train(model, optimizer, range(4))
    optimizer.eval()
    checkpoint.save({"model": model, "optim": inside(optimizer)}, tmp_path, step=4)
    other.eval()
    checkpoint.load({"model": resumed, "optim": inside(other)}, tmp_path)
    for each, stepping in ((model, optimizer), (resumed, other)):
        stepping.train()
        train(each, stepping, range(4, 8))
    assert torch.equal(model.weight, resumed.weight)


def require_resumes_exactly(layout: str, make: Callable[[Any], Optimizer], root: Path) -> None:
    def make_run(seed: int) -> tuple[nn.Module, Optimizer]:
        model = wrap(layout, make_net(layout, seed=seed))
        return model, make([*model.parameters()])

    runs = (model, optimizer), (resumed, other) = make_run(0), make_run(1)
    train_step(model, optimizer, 0)
    checkpoint.save({"model": model, "optim": optimizer}, root, step=1)
    checkpoint.load({"model": resumed, "optim": other}, root)
    for run in runs:
        train_step(*run, 1)
    for value, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(local_tensor(value), local_tensor(expected))


@layouts("ddp", "fsdp1", "fsdp2", "tp")
def test_optimizers_of_timm_resume_exactly_under_any_layout(layout: str, tmp_path: Path) -> None:
    torch.compiler.set_stance("force_eager")  # the fixture is in effect in pytest's own process only
    for kind in ("timm.Adopt", "timm.Lion", "timm.Muon"):
        require_resumes_exactly(layout, RESUMED[kind], tmp_path / kind)


@layouts("ddp")
def test_one_number_for_each_parameter_is_saved_under_ddp(layout: str, tmp_path: Path) -> None:
    require_resumes_exactly(layout, RESUMED["timm.NvNovoGrad"], tmp_path)


@layouts("fsdp1")
def test_numbers_that_differ_between_ranks_are_refused_under_fsdp1(layout: str, tmp_path: Path) -> None:
    model = wrap(layout, make_net(layout))
    optimizer = RESUMED["timm.NvNovoGrad"]([*model.parameters()])
    train_step(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"optim\.state\.\S+\.exp_avg_sq"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)


@layouts("ddp", "fsdp2")
def test_prepared_optimizers_of_accelerate_resume_exactly(layout: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # asked for, though the process group exists
    accelerator = accelerate.Accelerator(cpu=True)
    require_resumes_exactly(layout, lambda p: accelerator.prepare_optimizer(Adam(p, lr=0.05)), tmp_path)


def test_schedules_of_a_wrapper_go_on_after_loading(tmp_path: Path) -> None:
    """They write to the group dictionaries of the optimizer inside."""
    model = nn.Linear(3, 3)
    optimizer = Delegating(Adam(model.parameters(), lr=1.0))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(model, optimizer, range(1))
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    checkpoint.load({"model": model, "optim": optimizer}, tmp_path)
    schedule.step()
    assert [group["lr"] for group in optimizer.inner.param_groups] == [0.5]
    assert optimizer.state is optimizer.inner.state


def test_an_optimizer_of_other_parameters_in_an_attribute_must_be_saved_as_well(tmp_path: Path) -> None:
    models = nn.Linear(3, 3), nn.Linear(3, 3)
    first, second = (Adam(model.parameters(), lr=0.05) for model in models)
    first.peer = second  # pyrefly: ignore[missing-attribute]
    train(models[0], first, range(2))
    state = {"first": models[0], "second": models[1], "optim": first}
    with pytest.raises(RuntimeError, match=r"'peer'.*optimizer\.peer}"):
        checkpoint.save(state, tmp_path, step=1)
    state["optim.peer"] = second
    checkpoint.save(state, tmp_path, step=1)
    assert checkpoint.load(state, tmp_path) == 1


class Counting(Delegating):
    """Has a number beside the state of the optimizer inside."""

    def state_dict(self) -> dict[str, Any]:
        state_dict = self.inner.state_dict()
        return {**state_dict, "param_groups": [{**group, "count": 7} for group in state_dict["param_groups"]]}


class StatefulWrapper:
    """Wraps an optimizer and is none; `group` is added to the parameter group of its state."""

    def __init__(self, inner: Optimizer, **group: Any) -> None:  # noqa: ANN401
        self.inner, self.param_groups, self._group = inner, inner.param_groups, group

    def step(self) -> None:
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {"param_groups": [{"lr": self.param_groups[0]["lr"], **self._group}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = state_dict["param_groups"][0]["lr"]


@pytest.mark.parametrize("group", [{}, {"params": ["weight", "bias"]}], ids=["groups without params", "params by name"])
def test_wrappers_that_do_not_number_parameters_are_saved_as_they_are(group: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    wrapper = StatefulWrapper(Adam(model.parameters(), lr=0.5), **group)
    checkpoint.save({"model": model, "optim": wrapper}, tmp_path, step=1)
    wrapper.param_groups[0]["lr"] = 0.1
    checkpoint.load({"model": model, "optim": wrapper}, tmp_path)
    assert wrapper.inner.param_groups[0]["lr"] == 0.5


def test_a_wrapper_that_numbers_parameters_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    wrapper = StatefulWrapper(Adam(model.parameters()), params=[0, 1])
    with pytest.raises(RuntimeError, match=r"StatefulWrapper.*optimizer\.inner\b"):
        checkpoint.save({"model": model, "optim": wrapper}, tmp_path, step=1)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sharpness-aware": (Perturbing, r"Perturbing.*optimizer\.inner\b"),
    "several": (Several, r"Several.*optimizer\.inner\[0\].*optimizer\.inner\[1\]"),
    "without init": (lambda p: WithoutInit(Adam(p)), r"WithoutInit.*optimizer\.inner\b"),
    "counting": (lambda p: Counting(Adam(p)), r"Counting.*optimizer\.inner\b"),
    "counting globally": (CountingGlobally, r"CountingGlobally.*'total'"),
    "hook adds": (with_hook({"more": 1}), "register_state_dict_post_hook"),
    "hook changes": (with_hook({"state": {}}), "register_state_dict_post_hook"),
    "timm.Kron": (timm("kron", "Kron"), "Kron"),
    "schedulefree.ScheduleFreeWrapper": (
        lambda p: schedule_free("ScheduleFreeWrapper")(SGD(p)),
        r"ScheduleFreeWrapper.*optimizer\.base\b.*eval\(\)",
    ),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore:.*opt_einsum:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    model = nn.Linear(3, 3)
    optimizer = make([*model.parameters()])
    train(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match=words):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    assert not [*tmp_path.iterdir()]


class Factored(SGD):
    """Has moments of rows."""

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["rows"] = local_tensor(parameter).detach().flatten(1).sum(dim=1)


@pytest.mark.world_size(2)
def test_factored_moments_of_sharded_parameters_are_refused(tmp_path: Path) -> None:
    model = fully_shard(nn.Linear(3, 3, bias=False))
    optimizer = Factored(model.parameters())
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match=r"'rows' of 'weight'"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    assert not [*tmp_path.iterdir()]


class Normed(SGD):
    """Keeps the norm of the part of a parameter that a rank holds, in its state or in its groups."""

    def __init__(self, parameters: Any, *, place: str) -> None:  # noqa: ANN401
        super().__init__(parameters, lr=0.1)
        self.place = place

    def step(self) -> None:  # pyrefly: ignore[bad-override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                local = local_tensor(parameter).detach()
                if local.numel() and not (self.place == "state of some ranks" and dist.get_rank() == 0):
                    (group if self.place == "groups" else self.state[parameter])["norm"] = local.norm()


@layouts("fsdp1-3", "fsdp2-3")
@pytest.mark.parametrize("place", ["state", "state of some ranks", "groups"])
def test_numbers_that_differ_between_ranks_are_refused(layout: str, place: str, tmp_path: Path) -> None:
    """A resumed run would continue with those of one rank."""
    model = wrap(layout, make_net(layout))
    optimizer = Normed(model.parameters(), place=place)
    train_step(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"optim\.(state\.\S+|param_groups\.0)\.norm"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)
    assert not [*tmp_path.iterdir()]


@layouts("ddp", "fsdp1", "fsdp1-flat", "fsdp2-3")
def test_numbers_of_parameters_that_a_rank_has_nothing_of_are_those_of_the_others(layout: str, tmp_path: Path) -> None:
    """Adagrad counts the steps of each parameter, and makes its state before the first one."""
    model = wrap(layout, make_net(layout))
    optimizer = Adagrad(model.parameters(), lr=0.1)
    for step in range(3):
        train_step(model, optimizer, step)
    checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=3)
    resumed = wrap(layout, make_net(layout, seed=1))
    other = Adagrad(resumed.parameters(), lr=0.1)
    checkpoint.load({"model": resumed, "optim": other}, tmp_path)
    for each, stepping in ((model, optimizer), (resumed, other)):
        train_step(each, stepping, 3)
    assert_bitwise_equal(full_weights(resumed), full_weights(model))
    trained = [p for p in resumed.parameters() if local_tensor(p).numel() and p.requires_grad]
    assert {float(other.state[p]["step"]) for p in trained} == {4}


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_states_that_only_one_rank_holds_are_refused(tmp_path: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415  importing it warns

    model = DistributedDataParallel(nn.Linear(3, 3))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), Adam, lr=0.1)
    train(model, optimizer, range(2))
    with pytest.raises(RuntimeError, match=r"ZeroRedundancyOptimizer.*fully_shard"):
        checkpoint.save({"model": model, "optim": optimizer}, tmp_path, step=1)


def test_what_cannot_be_read_back_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older checkpoints stay, though only one is to be kept."""
    checkpoint.save({"x": 1}, tmp_path, step=1, keep=1)
    monkeypatch.setattr("ema_dist.checkpoint.values.require_loadable", lambda *_: None)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-0+2.*pathlib"):
        checkpoint.save({"x": Path}, tmp_path, step=2, keep=1)
    state = {"x": 0}
    assert checkpoint.load(state, tmp_path) == 1
    assert state == {"x": 1}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda parameters: WithoutInit(Adam(parameters)), ValueError),
        (schedule_free("AdamWScheduleFree"), ValueError),
        (lambda parameters: schedule_free("ScheduleFreeWrapper")(SGD(parameters)), ValueError),
        (lambda _: object(), TypeError),
    ],
    ids=["without init", "schedule-free", "schedule-free wrapper", "object"],
)
def test_attaching_refuses_what_it_cannot_count(make: Callable[[Any], Any], error: type[Exception]) -> None:
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model)
    optimizer = make([*model.parameters()])
    with pytest.raises(error, match=rf"{type(optimizer).__name__}.*(update\(\)|attach the Adam)"):
        ema.attach(optimizer)
