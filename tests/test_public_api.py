"""The public API is the recorded one: a change of it is made on purpose, and follows the deprecation policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.public_api import SECTIONS, describe, is_available, recorded
from tests.typed_usage import train


@pytest.mark.parametrize("section", SECTIONS)
def test_the_public_api_is_the_recorded_one(section: str) -> None:
    """After a change on purpose, run ``python -m tests.support.public_api`` and note it in CHANGELOG.md."""
    if not is_available(section):
        pytest.skip(f"{section} needs a framework that is not installed")
    assert describe(section) == recorded(section)


@pytest.mark.world_size(1)
@IGNORE_INITIAL_WEIGHTS_WARNING
def test_annotated_code_of_a_user_runs(tmp_path: Path) -> None:
    """`tox -e types` checks its annotations."""
    assert train(tmp_path / "run").keys() == {"weight", "bias"}
