"""What tests share: ranks, layouts, runs of commands. Nothing here is a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
