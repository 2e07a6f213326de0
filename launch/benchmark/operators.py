"""Counts the operators that a block of code runs, the bytes that they read and write, and the bytes that ranks send."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode  # no public name
from torch.utils._pytree import tree_leaves  # no public name

WRITES_ONLY = {"copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_"}
"""Operators that write to an argument without reading it."""


class OperatorCounter(TorchDispatchMode):
    """Counts operators on plain tensors inside its `with` block, including the local tensors of DTensors.

    Views and new uninitialized tensors do not count, because they move no bytes. Work inside a compiled kernel is not
    seen.

    Args:
        tensors: only bytes in the storage of these tensors count; None counts the bytes of all tensors.
    """

    def __init__(self, tensors: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.count = 0
        self.bytes_moved = 0
        self.bytes_sent = 0
        """Payload of collectives, as one rank sees it."""
        self._storages = None if tensors is None else {_storage(tensor) for tensor in tensors}

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # torch calls this again for the local tensors
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.bytes_sent += sum(tensor.nbytes for tensor in _tensors(args[0]))
        elif func.namespace == "aten" and _is_counted(func):
            self.count += 1
            self.bytes_moved += sum(map(self._nbytes, self._accessed(func, args, kwargs or {}, result)))
        return result

    def _accessed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: object) -> Iterator[Tensor]:  # noqa: ANN401
        """Each tensor that is read, and each that is written to."""
        name = func.overloadpacket.__name__
        for index, argument in enumerate(func._schema.arguments):  # noqa: SLF001 - says which arguments are written to
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written:
                yield from _tensors(value)
            if not (is_written and name in WRITES_ONLY):
                yield from _tensors(value)
        if all(returned.alias_info is None for returned in func._schema.returns):  # noqa: SLF001
            yield from _tensors(result)

    def _nbytes(self, tensor: Tensor) -> int:
        return tensor.nbytes if self._storages is None or _storage(tensor) in self._storages else 0


def count_operators(call: Callable[[], object], *, tensors: Iterable[Tensor] | None = None) -> OperatorCounter:
    """The operators that one call runs."""
    with OperatorCounter(tensors) as operators:
        call()
    return operators


def _is_counted(func: Any) -> bool:  # noqa: ANN401
    """Whether the operator neither makes a view nor only allocates memory."""
    returns = func._schema.returns  # noqa: SLF001
    is_view = bool(returns) and all(
        returned.alias_info is not None and not returned.alias_info.is_write for returned in returns
    )
    return not is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach"))


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
