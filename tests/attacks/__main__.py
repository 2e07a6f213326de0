"""Tries every attack, and prints what became of it: ``python -m tests.attacks``."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.attacks.trial import ATTACKS, READERS, try_attack

if __name__ == "__main__":
    harm_done = False
    for name in ATTACKS:
        with TemporaryDirectory() as work:
            trial = try_attack(name, Path(work))
        harm_done |= bool(trial.harmed)
        refused = sum(refusal is not None for refusal in trial.refusals.values())
        print(f"{name}: {trial.threat}")
        print(f"  an ordinary reader: {'harmed' if trial.succeeds_elsewhere else 'NOT harmed'}")
        harmed = ", ".join(trial.harmed) or "nothing"
        print(f"  ema_dist: {harmed} harmed, {refused} of {len(READERS)} readers refuse it")
    sys.exit(harm_done)
