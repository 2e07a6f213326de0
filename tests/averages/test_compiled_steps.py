"""`torch.compile(optimizer.step)` compiles the optimizer, and calls our hooks as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
import torch
from torch import nn
from torch._dynamo.convert_frame import register_bytecode_hook

import ema_dist
from ema_dist import ShardedEMA
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING

pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

PACKAGE = Path(ema_dist.__file__).parent


@pytest.fixture
def compiled_code() -> Iterator[list[CodeType]]:
    """The functions that were compiled."""
    compiled: list[CodeType] = []

    def note(code: CodeType, _: CodeType) -> None:
        compiled.append(code)

    torch.compiler.reset()
    handle = register_bytecode_hook(note)
    yield compiled
    handle.remove()
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize(("backend", "overlap"), [("eager", False), ("aot_eager", True)])
def test_a_compiled_step_calls_the_hook_as_it_is(
    backend: str,
    overlap: bool,  # noqa: FBT001
    compiled_code: list[CodeType],
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = ShardedEMA(model, decay=0.75, start=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema.attach(optimizer, overlap=overlap)
    step = torch.compile(optimizer.step, backend=backend)
    average = model[0].weight.detach().double()
    for index in range(4):
        model(torch.randn(4, 3)).square().sum().backward()
        step()
        optimizer.zero_grad()
        average += (0.25 if index else 1.0) * (model[0].weight.detach().double() - average)
    assert ema.steps == 4
    torch.testing.assert_close(ema.full_state_dict()["0.weight"].double(), average, rtol=1e-6, atol=1e-7)
    files = {Path(code.co_filename) for code in compiled_code}
    assert any(path.name == "sgd.py" for path in files)
    assert not [path for path in files if path.is_relative_to(PACKAGE)]
