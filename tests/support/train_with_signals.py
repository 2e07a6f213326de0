"""launch/train.py on ranks that send signals at chosen moments: `torchrun ... train_with_signals.py OPTIONS`.

The environment variable INJECTED_SIGNALS says which ranks and when: see injected_signals.py. No code is patched:
Python's profiler sees every call in every thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
# The `sys.path` that `train.py` would have, and the root for `tests`, but not the folder of this script.
sys.path[0:1] = [str(ROOT / "launch"), str(ROOT)]

import train  # noqa: E402
from recipe.script import run_script  # noqa: E402
from tests.support.injected_signals import InjectedSignal  # noqa: E402


def profiler(injected: InjectedSignal) -> Callable[[FrameType, str, object], None]:
    """Returns a profiler that counts calls of the function, then all events of its thread, and sends the signal."""
    calls, events, thread = injected.call_number, injected.events_after, 0

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls, events, thread
        if calls and event == "call" and frame.f_code.co_name == injected.function:
            calls -= frame.f_code.co_filename.endswith(injected.file)
            thread = threading.get_ident()
        if calls == 0 and events >= 0 and threading.get_ident() == thread:
            events -= 1
            if events < 0:
                os.write(2, f"now: {injected}\n".encode())
                os.kill(os.getppid() if injected.to_agent else os.getpid(), signal.Signals[injected.signal])

    return profile


def main() -> None:
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if folder := os.environ.get("INJECTED_SIGNALS_PIDS"):
        (Path(folder) / f"{attempt}-{rank}").write_text(str(os.getpid()))
    plan = InjectedSignal.from_json(os.environ.get("INJECTED_SIGNALS", "[]"))
    for injected in plan:
        if (injected.attempt, injected.rank) == (attempt, rank):
            threading.setprofile(profiler(injected))
            sys.setprofile(profiler(injected))
    run_script(train.main)


if __name__ == "__main__":
    main()
