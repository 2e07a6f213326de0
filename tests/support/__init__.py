"""Helpers of the tests: the harness for several ranks, wrapped models, runs of commands and scripts, sample tensors.

No tests here, and nothing that only one test module needs. Helpers import `ema_dist` and each other, no test module.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
