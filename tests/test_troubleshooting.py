"""docs/troubleshooting.md quotes every message as the library raises it.

After messages were reworded, write the quotations again: ``RECORD=1 pytest -n 0 tests/test_troubleshooting.py``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_dist import HalfLife, ShardedEMA, checkpoint
from tests.support import ROOT
from tests.support.cli_runs import run
from tests.support.quotations import quotations, quoted

PAGE = ROOT / "docs" / "troubleshooting.md"
LONGEST = 420
FORGETS_SOON = HalfLife(0.1)
"""For averages that are not the initial weights after one update."""

Provocation = Callable[[Path], object]


def linear() -> nn.Linear:
    return nn.Linear(2, 2)


def decay_of_the_live_weight(_: Path) -> None:
    ShardedEMA(linear(), decay=0.001)


def nothing_to_average(_: Path) -> None:
    ShardedEMA(linear().requires_grad_(requires_grad=False))


def a_parameter_was_replaced(_: Path) -> None:
    model = linear()
    ema = ShardedEMA(model)
    model.weight = nn.Parameter(torch.zeros(3, 2))
    ema.update()


def became_trainable(_: Path) -> None:
    model = nn.Sequential(linear().requires_grad_(requires_grad=False), linear())
    ema = ShardedEMA(model, decay=FORGETS_SOON)
    model[0].requires_grad_(requires_grad=True)
    ema.update()
    ema.full_state_dict()


def wrapped_after_construction(_: Path) -> None:
    model = linear()
    ema = ShardedEMA(model, decay=FORGETS_SOON)
    DistributedDataParallel(model)
    ema.update()


def update_inside_swapped(_: Path) -> None:
    ema = ShardedEMA(linear())
    with ema.swapped():
        ema.update()


def swapped_twice(_: Path) -> None:
    ema = ShardedEMA(linear())
    with ema.swapped(), ema.swapped():
        pass


def cast_inside_swapped(_: Path) -> None:
    model = linear()
    ema = trained(model)
    with ema.swapped():
        model.bfloat16()


def still_the_initial_weights(_: Path) -> None:
    model = linear()
    ema = ShardedEMA(model, decay=0.999)
    for _ in range(100):
        with torch.no_grad():
            model.weight.add_(0.1)
        ema.update()
    ema.full_state_dict()


def unknown_track(_: Path) -> None:
    ShardedEMA(linear(), decay={"short": 0.9, "long": 0.99}).full_state_dict(track="lang")


def float16_averages(_: Path) -> None:
    ShardedEMA(linear(), dtype=torch.float16)


def optimizer_without_hooks(_: Path) -> None:
    class Optimizer(torch.optim.Optimizer):
        def __init__(self) -> None:
            pass

    ShardedEMA(linear()).attach(Optimizer())


def a_rank_did_not_arrive(_: Path) -> None:
    ema = ShardedEMA(DistributedDataParallel(linear()), timeout=0.5)
    if dist.get_rank() == 0:
        ema.full_state_dict()


def one_rank_skipped_an_update(_: Path) -> None:
    ema = ShardedEMA(DistributedDataParallel(linear()), decay=FORGETS_SOON)
    ema.update()
    if dist.get_rank() == 0:
        ema.update()
    ema.full_state_dict()


def settings_differ(_: Path) -> None:
    ShardedEMA(DistributedDataParallel(linear()), decay=HalfLife(1000 + dist.get_rank()))


def nothing_to_load(folder: Path) -> None:
    checkpoint.load({"model": linear()}, folder / "checkpoints")


def damaged_file(folder: Path) -> None:
    path = saved(folder) / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-5])
    checkpoint.load({"model": linear()}, folder / "checkpoints", step=1)


def another_model(folder: Path) -> None:
    saved(folder)
    checkpoint.load({"model": nn.Linear(3, 2)}, folder / "checkpoints")


def optimizer_without_its_model(folder: Path) -> None:
    optimizer = torch.optim.AdamW(linear().parameters())
    checkpoint.save({"optim": optimizer}, folder / "checkpoints", step=1)


def other_tracks(_: Path) -> None:
    ema = ShardedEMA(linear(), decay={"long": 0.99})
    ema.load_state_dict(ShardedEMA(linear()).state_dict())


def another_law(_: Path) -> None:
    ema = ShardedEMA(linear(), decay=HalfLife(60))
    ema.load_state_dict(ShardedEMA(linear(), decay=0.999).state_dict())


def not_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    command("inspect", folder / "checkpoints")


def weights_of_others(folder: Path) -> None:
    saved(folder)
    (folder / "exported").mkdir()
    save_file({"weight": torch.zeros(1)}, folder / "exported" / "model.safetensors")
    command("export", folder / "checkpoints", folder / "exported")


def trained(model: nn.Module) -> ShardedEMA:
    """Averages that no longer are the initial weights."""
    ema = ShardedEMA(model, decay=FORGETS_SOON)
    ema.update()
    return ema


def saved(folder: Path) -> Path:
    """The folder of a checkpoint of one step."""
    model = linear()
    checkpoint.save({"model": model, "ema": trained(model)}, folder / "checkpoints", step=1)
    return folder / "checkpoints" / "step-0000000001"


def command(*arguments: object) -> None:
    """The error of a command becomes an exception, as on the terminal."""
    result = run(*arguments)
    assert result.exit_code
    raise SystemExit(result.stderr)


ONE_PROCESS: list[Provocation] = [
    *(
        nothing_to_average,
        decay_of_the_live_weight,
        a_parameter_was_replaced,
        became_trainable,
        unknown_track,
        float16_averages,
    ),
    *(update_inside_swapped, swapped_twice, cast_inside_swapped, still_the_initial_weights, optimizer_without_hooks),
    *(nothing_to_load, damaged_file, another_model, optimizer_without_its_model, other_tracks, another_law),
    *(not_a_checkpoint, weights_of_others),
]
TWO_RANKS: list[Provocation] = [
    wrapped_after_construction, a_rank_did_not_arrive, one_rank_skipped_an_update, settings_differ,
]  # fmt: skip


@pytest.mark.parametrize("provoke", ONE_PROCESS, ids=lambda provoke: provoke.__name__)
def test_the_page_quotes_what_is_raised(provoke: Provocation, tmp_path: Path) -> None:
    require_quoted(provoke, tmp_path)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("provoke", TWO_RANKS, ids=lambda provoke: provoke.__name__)
def test_the_page_quotes_what_is_raised_on_the_first_rank(provoke: Provocation, tmp_path: Path) -> None:
    require_quoted(provoke, tmp_path)
    dist.barrier()


def test_every_message_of_the_page_is_provoked() -> None:
    names = [provoke.__name__ for provoke in ONE_PROCESS + TWO_RANKS]
    assert sorted(names) == sorted(quotations(PAGE, "message"))


def require_quoted(provoke: Provocation, folder: Path) -> None:
    """Compares the quotation on the page with the message; with ``RECORD=1``, writes it there."""
    message = ""
    try:
        provoke(folder)
    except (Exception, SystemExit) as error:  # noqa: BLE001  warnings are errors here
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        message = " ".join(f"{kind}{error}".replace(f"{folder}/", "").split())
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    assert message, "nothing was raised"
    short = message if len(message) <= LONGEST else message[:LONGEST].rpartition(" ")[0] + " ..."
    on_page = " ".join(quoted(PAGE, "message", provoke.__name__, textwrap.fill(short, 88)).split())
    assert message.startswith(on_page.removesuffix(" ..."))
