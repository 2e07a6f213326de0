"""``kernel="auto"`` measures the compiled kernel too, where every rank has a C compiler, and says what it selects."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ema_dist import Offloaded, ShardedEMA
from ema_dist.kernels import KERNELS, make_kernel
from tests.averages.test_float64_reference import averaged_names, reference_step
from tests.support.fake_compiler import FakeCompiler, prefer
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING, full_weights, layouts, make_net, train_step, wrap

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING


def selected(dtype: torch.dtype = torch.float32) -> str:
    return make_kernel([[torch.zeros(3)]], [torch.ones(3, dtype=dtype)], kernel="auto").name


def use_no_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.delenv("CC", raising=False)
    patch.setenv("PATH", str(folder))
    FakeCompiler.restart()


@pytest.mark.parametrize("fastest", ["foreach", "compiled"])
def test_the_fastest_is_selected_and_the_log_says_why(
    fastest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ema_dist")
    compiler = FakeCompiler(tmp_path, monkeypatch)
    prefer(monkeypatch, fastest)
    assert selected() == fastest
    assert f"{fastest} 0.00 ms" in caplog.text
    assert f"kernel='auto' selects '{fastest}'" in caplog.text
    assert compiler.runs == 1


def test_by_default_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = FakeCompiler(tmp_path, monkeypatch)
    prefer(monkeypatch, "compiled")
    assert ShardedEMA(nn.Linear(2, 2)).update_kernel == "foreach"
    assert (compiler.runs, compiler.entries) == (0, [])


@pytest.mark.parametrize("problem", ["C compiler: install gcc or clang", "/bin/false", "/no/compiler"])
def test_without_a_compiler_that_works_it_selects_as_by_default(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the reason, and there is no warning."""
    caplog.set_level(logging.INFO, "ema_dist")
    use_no_compiler(monkeypatch, tmp_path)
    if problem.startswith("/"):
        monkeypatch.setenv("CC", problem)
    assert (selected(), selected(torch.bfloat16)) == ("foreach", "scratch")
    assert ShardedEMA(nn.Linear(2, 2), kernel="auto").update_kernel == "foreach"
    assert problem in caplog.text


def test_averages_that_cannot_be_compiled_for_use_another_kernel() -> None:
    averages = [[torch.zeros(3, dtype=torch.complex64)]]
    assert make_kernel(averages, [torch.ones(3, dtype=torch.complex64)], kernel="auto").name == "foreach"


@layouts("plain", "ddp", "fsdp1", "fsdp2", "tp")
def test_its_averages_equal_the_float64_reference(layout: str) -> None:
    net = make_net(layout)
    averaged = averaged_names(net)
    model = wrap(layout, net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    reference = full_weights(model)
    with pytest.MonkeyPatch.context() as patch:
        prefer(patch, "compiled")
        ema = ShardedEMA(model, decay=0.8, kernel="auto")
        offloaded = ShardedEMA(model, decay=0.8, kernel="auto", store=Offloaded())
    assert ema.update_kernel == offloaded.update_kernel == "compiled"
    for step in range(3):
        train_step(model, optimizer, step)
        ema.update()
        offloaded.update()
        reference_step(reference, full_weights(model), 0.8, averaged)
    for full in (ema.full_state_dict(), offloaded.full_state_dict()):
        for name, value in full.items():
            torch.testing.assert_close(value.double(), reference[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("without", [0, 1])
@layouts("ddp", "fsdp2")
def test_a_rank_without_a_compiler_decides_for_all(layout: str, without: int, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prefer(patch, "compiled")
        if dist.get_rank() == without:
            use_no_compiler(patch, tmp_path)
        ema = ShardedEMA(wrap(layout, make_net(layout)), kernel="auto")
    assert ema.update_kernel == "foreach"


@layouts("fsdp2")
def test_ranks_that_differ_in_the_setting_are_told(layout: str) -> None:
    kernel = ["auto", "foreach"][dist.get_rank()]
    with pytest.raises(RuntimeError, match=r"kernel='(auto|foreach)'"):
        ShardedEMA(wrap(layout, make_net(layout)), kernel=kernel)


@pytest.mark.parametrize("kernel", ["Auto", "gcc", 3, ["auto"]])
def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones(kernel: object) -> None:
    with pytest.raises(ValueError, match=f"{', '.join(KERNELS)}.*'auto'.*None"):
        ShardedEMA(nn.Linear(2, 2), kernel=kernel)  # pyrefly: ignore[bad-argument-type]
