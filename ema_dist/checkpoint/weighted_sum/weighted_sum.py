"""Weighted sums of full weights from several checkpoints, computed one batch of tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from ema_dist.checkpoint.dcp.archive import byte_view
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.stored_checkpoint import BATCH_BYTES
from ema_dist.checkpoint.weighted_sum.buffer import ReusableBuffer
from ema_dist.checkpoint.weighted_sum.source import WeightSource, is_extra_state
from ema_dist.checkpoint.weights.casts import cast, upcast_float8
from ema_dist.messages import abbreviated, describe_difference

BLOCK_ELEMENTS = 2**20
"""Tensors are added in blocks of this size: torch copies each block into the dtype of the sum."""


@dataclass
class Term:
    """Weights and their coefficient in a sum; reading adds the checksum of each tensor to ``checksums``."""

    source: WeightSource
    coefficient: float
    checksums: dict[str, str] = field(default_factory=dict)


class WeightedSum:
    """Computes ``sum(coefficient * weights)`` over several checkpoints of one model, one batch of tensors at a time.

    Floating-point tensors of 16 bits or fewer are accumulated in float32, all others in float64. Integer tensors, extra
    states of modules and the names in ``copied`` come from one source, the base. Elements that are not finite in the
    base, such as the -inf of attention masks, come from it too.

    Args:
        terms: of models with the same tensors.
        base: the index of the term that supplies everything that is not added.
        copied: more names of tensors that are not added.
        dtype: of floating-point tensors; None for the dtype of each in the base.

    Raises: CheckpointError when the models differ in names, shapes or dtype categories (floating-point/complex or
        integer).
    """

    def __init__(
        self,
        terms: Sequence[Term],
        *,
        base: int = -1,
        copied: Container[str] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        base_term = terms[base]
        self.terms: list[Term] = list(terms)
        self.base: WeightSource = base_term.source
        # The base comes last, because its non-finite elements replace those of the sum.
        self._terms = [term for term in terms if term is not base_term] + [base_term]
        self.ties: dict[str, str] = {
            name: first
            for name, first in self.base.ties.items()
            if all(term.source.ties.get(name) == first for term in terms)
        }
        """Names tied in every source, mapped to the name under which the tensor is stored."""
        tensors = self.base.meta_tensors
        self._is_single_source = [term.coefficient for term in terms] == [1]
        self.added_names: set[str] = {
            name for name, meta in tensors.items() if _is_added(name, meta) and name not in copied
        }
        for term in terms:
            _require_same_model(self.base, term.source, self.added_names, copied)
        self.meta_tensors: dict[str, Tensor] = {
            name: meta.to(dtype) if dtype is not None and meta.is_floating_point() else meta
            for name, meta in tensors.items()
        }
        """The tensors of the sum, on the meta device, in the model's order."""

    @property
    def planned(self) -> dict[str, Tensor | None]:
        """The tensors on the meta device, and None for extra states."""
        return {**self.meta_tensors, **dict.fromkeys(self.base.extra_states)}

    @property
    def input_nbytes(self) -> int:
        """The bytes of the tensors that `entries` reads for all names."""
        return sum(
            self._stored_nbytes(term, name)
            for name in self.meta_tensors.keys() - self._shared_names(self.meta_tensors).keys()
            for term in self._terms
        )

    def entries(self, names: Iterable[str], *, on_bytes: Callable[[int], object]) -> Iterator[tuple[str, Any]]:
        """Yield the extra states, then the tensors in order; a tied tensor comes right before the one it is tied to.

        Args:
            names: names of tensors and extra states.
            on_bytes: called with the number of bytes read since the last call.

        Memory: the sums of one batch of tensors (`BATCH_BYTES`, or one larger tensor), and the same from one source.
        Raises: CheckpointError when a sum is beyond the range of its dtype, or not finite where the base is.
        """
        requested = list(names)
        yield from ((name, self.base.extra_state(name)) for name in requested if name not in self.meta_tensors)
        tensors = [name for name in requested if name in self.meta_tensors]
        shared = self._shared_names(tensors)
        sums = ReusableBuffer()
        for batch in self._batches(name for name in tensors if name not in shared):
            added = [name for name in batch if name in self.added_names and not self._is_single_source]
            shapes = [(self.meta_tensors[name].shape, self._sum_dtype(name)) for name in added]
            totals = dict(zip(added, sums.tensors(shapes), strict=True))
            for total in totals.values():
                total.zero_()
            buffer = ReusableBuffer()
            for term in self._terms:
                self._add_batch(totals, term, batch, buffer, on_bytes)
            del buffer  # free it before the sums are cast, which allocates memory
            for name in batch:
                total = totals.pop(name)
                result = cast(name, total, self.meta_tensors[name].dtype)
                if result is total and name in added:
                    result = total.clone()  # the next batch overwrites the sums
                # The copies first, because the caller owns the yielded tensor and may free it.
                yield from ((other, result.clone()) for other, first in shared.items() if first == name)
                yield name, result
                del result, total  # else their memory would be held while the next batch is added

    def _add_batch(
        self,
        totals: dict[str, Tensor],
        term: Term,
        batch: list[str],
        buffer: ReusableBuffer,
        on_bytes: Callable[[int], object],
    ) -> None:
        names = [name for name in batch if self._reads(term, name)]
        stored_tensors = term.source.read(names) if self._is_single_source else term.source.read_batch(names, buffer)
        for name, stored in zip(names, stored_tensors, strict=True):
            tensor = stored.contiguous()
            term.checksums[name] = tensor_checksum(tensor)
            on_bytes(tensor.nbytes)
            if name not in self.added_names or self._is_single_source:
                totals[name] = tensor if self._is_single_source else tensor.clone()
                continue
            is_base = term is self._terms[-1]
            if not add_scaled_(totals[name], tensor, term.coefficient, keep_non_finite=is_base):
                raise CheckpointError(
                    f"{name!r} is finite in {self.base.path} but not in the sum: another source holds NaN or inf "
                    "there (run ema-dist verify on each), or the sum overflows"
                )

    def _sum_dtype(self, name: str) -> torch.dtype:
        dtypes = [term.source.stored_dtype(name) for term in self._terms]
        if any(dtype.is_complex for dtype in dtypes):
            return torch.complex128
        return torch.float32 if max(dtype.itemsize for dtype in dtypes) <= 2 else torch.float64

    def _reads(self, term: Term, name: str) -> bool:
        if term is self._terms[-1]:
            return True
        return name in self.added_names and term.coefficient != 0

    def _stored_nbytes(self, term: Term, name: str) -> int:
        return term.source.stored_nbytes(name) if self._reads(term, name) else 0

    def _shared_names(self, names: Iterable[str]) -> dict[str, str]:
        """The tied ones of these names, mapped to the name under which the tensor is stored."""
        present = set(names)
        return {name: first for name, first in self.ties.items() if {name, first} <= present}

    def _batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        batch: list[str] = []
        total = 0
        for name in names:
            nbytes = max(term.source.stored_nbytes(name) for term in self._terms if self._reads(term, name))
            if batch and total + nbytes > BATCH_BYTES:
                yield batch
                batch = []
                total = 0
            batch.append(name)
            total += nbytes
        if batch:
            yield batch


def add_scaled_(total: Tensor, tensor: Tensor, coefficient: float, *, keep_non_finite: bool = False) -> bool:
    """Add ``coefficient * tensor`` in the dtype of ``total``, both contiguous; return whether the result is valid.

    Args:
        keep_non_finite: elements of ``tensor`` that are not finite replace those of ``total``. The result is valid
            if all its other elements are finite. Without this, every result is valid.
    """
    blocks = zip(total.view(-1).split(BLOCK_ELEMENTS), tensor.view(-1).split(BLOCK_ELEMENTS), strict=True)
    for target, stored in blocks:
        target.add_(upcast_float8(stored), alpha=coefficient)
        # The sum is finite only if all elements are, and faster than `isfinite`.
        if keep_non_finite and not target.sum().isfinite():
            values = stored.to(target.dtype)
            finite = values.isfinite()
            if not target[finite].isfinite().all():
                return False
            target.copy_(torch.where(finite, target, values))
    return True


def tensor_checksum(tensor: Tensor) -> str:
    """The XXH3 checksum of a contiguous CPU tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(byte_view(tensor) if tensor.nbytes else b"")


def _is_added(name: str, meta: Tensor) -> bool:
    return (meta.is_floating_point() or meta.is_complex()) and not is_extra_state(name)


def _require_same_model(
    expected: WeightSource, found: WeightSource, added: Container[str], copied: Container[str]
) -> None:
    """Raises: CheckpointError when names or dtype categories differ, or the shapes of tensors to be added."""
    left = {name for name in expected.meta_tensors if not is_extra_state(name) and name not in copied}
    right = {name for name in found.meta_tensors if not is_extra_state(name) and name not in copied}
    if difference := describe_difference(str(expected.path), left, str(found.path), right):
        raise CheckpointError(
            f"{expected.path} and {found.path} hold different models: {difference}; {len(left & right)} names match"
        )
    pairs = [(name, expected.meta_tensors[name], found.meta_tensors[name]) for name in left]
    shapes = [f"{name} {[*a.shape]} and {[*b.shape]}" for name, a, b in pairs if name in added and a.shape != b.shape]
    kinds = [f"{name} {a.dtype} and {b.dtype}" for name, a, b in pairs if _is_added(name, a) != _is_added(name, b)]
    for what, differing in {"shapes": shapes, "dtype categories": kinds}.items():
        if differing:
            raise CheckpointError(
                f"{expected.path} and {found.path} hold different models: they differ in the {what} of "
                f"{len(differing)} tensors: {abbreviated(sorted(differing), separator='; ')}"
            )
