"""Sends named weights to a stand-in for an inference engine: a separate process that verifies each tensor.

A message is the header of a tensor, as JSON, followed by its bytes; nothing is unpickled.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

END = "end of weights"
STOP = "stop"


class Engine:
    """The trainer's connection to an engine, a process that holds its own copy of the model.

    Args:
        make_model: makes the engine's model, in its process.
        answer: called with the engine's model after each update, in its process; returns JSON values.
        verifies: whether the engine compares the checksum of every tensor received with that of the tensor sent.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        answer: Callable[[nn.Module], Any] | None = None,
        *,
        verifies: bool = True,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._verifies = verifies
        self._process = context.Process(target=serve, args=(other_end, make_model, answer), daemon=True)
        self._process.start()
        other_end.close()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[int, Any]:
        """Send the weights one by one; returns the number of tensors that the engine has verified, and its answer.

        Raises: RuntimeError when the engine has no weight of that name, dtype and shape, when its values differ from
        those sent, when some tensors were not sent, and when its process has ended.
        """
        try:
            for name, tensor in weights:
                send_tensor(self._connection, name, tensor, with_checksum=self._verifies)
            _send_json(self._connection, END)
            report = _receive_json(self._connection)
        except (ConnectionError, EOFError) as error:
            self._process.join(timeout=10)
            raise RuntimeError(f"the engine's process has ended with exit code {self._process.exitcode}") from error
        if faults := {kind: report[kind] for kind in ("refused", "wrong", "missing") if report[kind]}:
            raise RuntimeError(f"expected the engine to hold every weight that was sent, found {faults}")
        return report["verified"], report["answer"]

    def stop(self) -> None:
        """End the process."""
        _send_json(self._connection, STOP)
        self._process.join()


def serve(
    connection: Connection, make_model: Callable[[], nn.Module], answer: Callable[[nn.Module], Any] | None
) -> None:
    """Run the engine: receive updates until the trainer sends `STOP` or ends."""
    torch.set_num_threads(1)
    model = make_model()
    weights = model.state_dict()
    while True:
        checksums: dict[str, str | None] = {}
        refused = []
        try:
            for name, tensor, checksum in receive_tensors(connection):
                weight = weights.get(name)
                if weight is None or (weight.dtype, weight.shape) != (tensor.dtype, tensor.shape):
                    expected = "no such weight" if weight is None else describe(weight)
                    refused.append(f"{name}: expected {expected}, received {describe(tensor)}")
                    continue
                weight.copy_(tensor)
                checksums[name] = checksum
        except EOFError:
            return
        # A checksum of None is not verified: `launch.cost.streaming` must not measure the hashing of the weights.
        verified = [name for name, checksum in checksums.items() if checksum and checksum == sha256(weights[name])]
        report = {
            "verified": len(verified),
            "refused": refused,
            "wrong": [name for name, checksum in checksums.items() if checksum and name not in verified],
            "missing": [name for name in weights if name not in checksums],
            "answer": answer(model) if answer else None,
        }
        _send_json(connection, report)


def send_tensor(connection: Connection, name: str, tensor: Tensor, *, with_checksum: bool) -> None:
    """Send one CPU tensor."""
    header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": [*tensor.shape]}
    _send_json(connection, header | {"sha256": sha256(tensor) if with_checksum else None})
    if tensor.numel():
        connection.send_bytes(_bytes_of(tensor))


def receive_tensors(connection: Connection) -> Iterator[tuple[str, Tensor, str | None]]:
    """The name, value and checksum of each tensor of one update.

    Raises: EOFError when the other process has ended, or has sent `STOP`.
    """
    while (header := _receive_json(connection)) != END:
        if header == STOP:
            raise EOFError
        tensor = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
        if tensor.numel():
            connection.recv_bytes_into(_bytes_of(tensor))
        yield header["name"], tensor, header["sha256"]


def describe(tensor: Tensor) -> str:
    """The dtype and shape of a tensor, for messages."""
    return f"{tensor.dtype} {[*tensor.shape]}"


def sha256(tensor: Tensor) -> str:
    """The digest of the tensor's bytes."""
    return hashlib.sha256(_bytes_of(tensor) if tensor.numel() else b"").hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _send_json(connection: Connection, value: object) -> None:
    connection.send_bytes(json.dumps(value).encode())


def _receive_json(connection: Connection) -> Any:  # noqa: ANN401
    return json.loads(connection.recv_bytes())
