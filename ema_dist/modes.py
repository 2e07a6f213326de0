"""Leaves ``torch.inference_mode()`` while `ema_dist` works: tensors created in it cannot be updated outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

CALLED_BY_USERS = ("__init__", "__repr__", "__enter__", "__exit__")
"""The special methods that `in_normal_mode` covers."""


def normal_mode() -> AbstractContextManager[object]:
    """A context in which new tensors are normal; within ``torch.inference_mode()``, it also disables gradients."""
    return _NormalMode() if torch.is_inference_mode_enabled() else nullcontext()


def in_normal_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function to run in `normal_mode`; iterators and context managers that it returns do not."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with _NormalMode():
            return function(*args, **kwargs)

    return call


def public_calls_in_normal_mode(cls: type[T]) -> type[T]:
    """Decorates a class to run its public methods and properties, and `CALLED_BY_USERS`, in `normal_mode`."""
    for name, member in vars(cls).copy().items():
        if name.startswith("_") and name not in CALLED_BY_USERS:
            continue
        if isinstance(member, FunctionType):
            setattr(cls, name, in_normal_mode(member))
        elif isinstance(member, property) and member.fget is not None:
            setattr(cls, name, property(in_normal_mode(member.fget), doc=member.__doc__))
    return cls


def iterate_in_normal_mode(iterator: Iterator[T]) -> Iterator[T]:
    """The items of ``iterator``, each computed in `normal_mode`; the body of the caller's loop keeps its own modes."""
    while True:
        with normal_mode():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


class _NormalMode:
    """Leaves inference mode and disables gradients, which leaving inference mode alone would enable."""

    def __enter__(self) -> None:
        self._inference_mode = torch.inference_mode(mode=False)
        self._inference_mode.__enter__()
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(None, None, None)
        self._inference_mode.__exit__(None, None, None)
