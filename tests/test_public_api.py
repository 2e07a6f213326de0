"""The public API is the recorded one: a change of it is made on purpose, and follows the deprecation policy."""

from __future__ import annotations

from tests.support.public_api import FILE, public_api


def test_the_public_api_is_the_recorded_one() -> None:
    """After a change on purpose, run ``python -m tests.support.public_api`` and note it in CHANGELOG.md."""
    assert public_api().splitlines() == FILE.read_text().splitlines()
