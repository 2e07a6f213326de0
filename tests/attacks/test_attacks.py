"""No attack does harm through ema_dist; each one does harm to an ordinary reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.attacks.payload import save
from tests.attacks.trial import ATTACKS, READERS, try_attack
from tests.support import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_does_harm_only_elsewhere(name: str, tmp_path: Path) -> None:
    trial = try_attack(name, tmp_path)
    assert trial.succeeds_elsewhere
    assert trial.harmed == []
    assert [*trial.refusals] == [*READERS]
    assert any(trial.refusals.values())


def test_the_readers_read_what_is_no_attack(tmp_path: Path) -> None:
    save(tmp_path / "dcp")
    (tmp_path / "torch").mkdir()
    torch.save({"weight": torch.ones(4, 3)}, tmp_path / "torch" / "pytorch_model.bin")
    refused = {
        reader
        for reader, read in READERS.items()
        if read(tmp_path / "dcp", tmp_path / "output") and read(tmp_path / "torch", tmp_path / "output")
    }
    assert refused == {"checkpoint.load", "ema-dist import"}  # for averages, which neither folder holds


def test_the_page_lists_every_attack() -> None:
    page = (ROOT / "docs" / "threats.md").read_text()
    assert [name for name in ATTACKS if f"`{name}.py`" not in page] == []
