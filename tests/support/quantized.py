"""A tensor subclass like those of quantization libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import Self


class Quantized(Tensor):
    """A wrapper subclass, as torchao makes them: it has no memory of its own."""

    values: Tensor

    def __new__(cls, values: Tensor) -> Self:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # noqa: SLF001

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: object) -> Quantized:
        return Quantized(inner["values"])

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        _types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  what torch's operators return
        args, kwargs = pytree.tree_map_only(Quantized, lambda value: value.values, (args, kwargs or {}))
        return pytree.tree_map_only(
            Tensor, lambda value: Quantized(value) if value.dtype == torch.int8 else value, func(*args, **kwargs)
        )
