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


class Preemption:
    """Whether any rank was told to stop, by SIGTERM (torchrun and schedulers send it) or SIGUSR1.

    torchrun sends SIGTERM to the others too when a rank has died. Then there is nobody to agree with: they end at once,
    wherever they wait, so that torchrun need not wait for them before it restarts all ranks.

    Collective: every rank of the default process group.
    """

    def __init__(self) -> None:
        self._told = False
        of_ranks: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (socket.gethostname(), os.getpid()))
        self._neighbours = [pid for host, pid in of_ranks if host == socket.gethostname()]
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell)  # is written to while Python waits in a collective and runs no handler
        threading.Thread(target=self._leave_if_bereft, args=(told,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._note)

    def agreed(self) -> bool:
        """The same answer on every rank, so that all of them save and leave at the same batch.

        Collective: every rank, through gloo, so that no device is waited for.
        """
        told = torch.tensor([self._told], dtype=torch.int32)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told.item())

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True

    def _leave_if_bereft(self, told: int) -> None:
        while os.read(told, 1)[0] not in SIGNALS:
            pass
        if not all(map(_is_alive, self._neighbours)):
            os._exit(1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
