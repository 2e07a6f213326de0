"""Stopping early: a signal handler only sets a flag; all ranks agree on it before each batch, and stop together."""

import os
import signal
import socket
import threading
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(SystemExit):
    """Raised on every rank, with the exit code, when the ranks have agreed to stop.

    It is not an `Exception`, so that no error handler catches it.
    """


class PreemptionHandler:
    """Tells whether any rank has received SIGTERM (from torchrun or a scheduler), SIGINT (Ctrl-C) or SIGUSR1.

    When a rank dies, torchrun sends SIGTERM to the others. They cannot agree with a dead rank, so they exit at once,
    even inside a collective, and torchrun can restart all ranks without waiting for them.

    Collective: every rank of the default process group.
    """

    def __init__(self) -> None:
        self._is_signalled = False
        hosts_and_pids: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(hosts_and_pids, (socket.gethostname(), os.getpid()))
        self._local_pids = [pid for host, pid in hosts_and_pids if host == socket.gethostname()]
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)  # written even while Python waits in a collective and runs no handlers
        threading.Thread(target=self._exit_if_a_peer_died, args=(read_end,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def should_stop(self) -> bool:
        """Returns the same value on every rank, so that all of them save and stop at the same batch.

        Collective: every rank, over gloo, so that the host does not wait for the device.
        """
        signalled = torch.tensor([self._is_signalled], dtype=torch.int32)
        dist.all_reduce(signalled, dist.ReduceOp.MAX)
        return bool(signalled.item())

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._is_signalled = True

    def _exit_if_a_peer_died(self, read_end: int) -> None:
        while os.read(read_end, 1)[0] not in SIGNALS:
            pass
        if not all(map(_is_alive, self._local_pids)):
            os._exit(1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
