"""Stopping early: a signal is only noted when it comes; the ranks agree on it when all of them are ready to stop."""

import os
import signal
import socket
import threading
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """Leaves the training from wherever the ranks have agreed to stop; no error that anything should catch."""


class PreemptionHandler:
    """Whether any rank was told to stop, by SIGTERM (torchrun and schedulers send it) or SIGUSR1.

    torchrun sends SIGTERM to the others too when a rank has died. Then there is nobody to agree with: they end at once,
    wherever they wait, so that torchrun need not wait for them before it restarts all ranks.

    Collective: every rank of the default process group.
    """

    def __init__(self) -> None:
        self._is_signalled = False
        hosts_and_pids: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(hosts_and_pids, (socket.gethostname(), os.getpid()))
        self._local_pids = [pid for host, pid in hosts_and_pids if host == socket.gethostname()]
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)  # is written to while Python waits in a collective and runs no handler
        threading.Thread(target=self._exit_if_a_peer_died, args=(read_end,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def should_stop(self) -> bool:
        """The same answer on every rank, so that all of them save and leave at the same batch.

        Collective: every rank, through gloo, so that no device is waited for.
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
