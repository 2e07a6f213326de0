"""Keeps torch from aborting a process that ends right after a collective."""

from __future__ import annotations

import atexit
import time
from functools import cache

DELAY = 0.1
"""Seconds that a process waits at its end."""


@cache
def delay_process_exit() -> None:
    """Wait at the end of this process, once, so that gloo's threads can finish.

    After a collective, a thread of gloo frees the tensors that were sent, which takes Python's global lock. If the
    interpreter is shutting down by then, torch aborts the process ("terminate called without an active exception"), and
    torchrun reports a run that has ended well as failed (pytorch issue 190489). `destroy_process_group` does not
    prevent it while a wrapped model refers to the group.
    """
    atexit.register(time.sleep, DELAY)
