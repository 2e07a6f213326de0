"""What averages cost, as formulas: memory and traffic of one rank, by parameters, ranks, replicas, tracks and dtypes.

docs/cost.md derives the formulas; `launch.cost` compares them with measurements and applies them to large models.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """A model on `shards * replicas` ranks: each of `replicas` groups holds it all, sharded over `shards` ranks.

    DDP has one shard, FSDP2 one replica, HSDP several of both.

    Args:
        split: whether the averages are split among the replicas, or complete on each (``replicas="copy"``).
    """

    shards: int = 1
    replicas: int = 1
    split: bool = True

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas


@dataclass(frozen=True)
class ElementSizes:
    """Memory of one element: bytes of the live weight, bytes of an average, and the number of averages."""

    live_itemsize: int = 4
    average_itemsize: int = 4
    tracks: int = 1


@dataclass(frozen=True)
class TrainingStep:
    """A training step of the whole job.

    Args:
        tokens: the number in a batch, over all ranks.
        flops_per_second: what one rank reaches.
        memory_bandwidth: what an update reaches, in bytes per second.
    """

    tokens: float
    flops_per_second: float
    memory_bandwidth: float


def chunk_rows_of(rows: int, parts: int, index: int) -> int:
    """Rows of one part: all parts have ``ceil(rows / parts)``, the last ones fewer or none.

    Source: `torch.Tensor.chunk`, which FSDP2 and `ema_dist` use to shard.
    """
    rows_per_part = math.ceil(rows / parts)
    return max(0, min(rows_per_part, rows - index * rows_per_part))


def live_elements(shapes: Iterable[Shape], sharding: Sharding, rank: int = 0) -> int:
    """Elements of live weights on a rank; no rank has more than the first."""
    return sum(_shard_rows(shape, sharding, rank) * _row_elements(shape) for shape in shapes)


def average_elements(shapes: Iterable[Shape], sharding: Sharding, rank: int = 0) -> int:
    """Elements of one track's averages on a rank; no rank has more than the first. A scalar is whole on every rank."""
    parts = sharding.replicas if sharding.split else 1
    return sum(
        chunk_rows_of(_shard_rows(shape, sharding, rank), parts, rank // sharding.shards % parts) * _row_elements(shape)
        if shape
        else 1
        for shape in shapes
    )


def average_bytes(elements: int, element_sizes: ElementSizes) -> int:
    """Memory of the averages of this many elements."""
    return elements * element_sizes.tracks * element_sizes.average_itemsize


def update_bytes(elements: int, element_sizes: ElementSizes) -> int:
    """Bytes that an update of this many elements reads and writes; it reads a live weight once for all tracks."""
    return elements * (element_sizes.live_itemsize + 2 * element_sizes.average_itemsize * element_sizes.tracks)


def swap_network_bytes(shapes: Sequence[Shape], sharding: Sharding, element_sizes: ElementSizes, rank: int = 0) -> int:
    """Payload of the collectives that swap averages in; swapping out takes the same, without the checksums.

    Each replica sends its part of every tensor to the others, so that a rank sends its own part and receives all other
    parts. Parts are padded to the size of the first replica's. If the padding would more than double the bytes, an
    all-reduce sends the tensor without it; the payload of the all-reduce counts once, although a ring sends each byte
    twice. At the beginning, the replicas compare a checksum of 16 bytes for each tensor.
    """
    if not sharding.split or sharding.replicas == 1:
        return 0
    part, merged = 0, 0
    for shape in filter(None, shapes):
        rows = _shard_rows(shape, sharding, rank)
        part_rows = chunk_rows_of(rows, sharding.replicas, 0)
        if part_rows * sharding.replicas <= 2 * rows:
            part += part_rows * _row_elements(shape)
        else:
            merged += rows * _row_elements(shape)
    part_bytes, merged_bytes = (_aligned(elements * element_sizes.live_itemsize) for elements in (part, merged))
    return part_bytes * sharding.replicas + merged_bytes + 16 * len(shapes)


def update_time_ratio(sharding: Sharding, element_sizes: ElementSizes, step: TrainingStep) -> float:
    """Time of an update over the time of the rest of a training step, if memory bandwidth limits the update.

    A step takes 6 floating-point operations for each parameter and token (Kaplan et al. 2020, section 2.1). The ranks
    divide both among them, so that their number cancels, unless each replica averages all rows.
    """
    redundancy = 1 if sharding.split else sharding.replicas
    update = update_bytes(1, element_sizes) * redundancy / step.memory_bandwidth
    return update / (6 * step.tokens / step.flops_per_second)


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer with gated MLPs and grouped-query attention, by the sizes that its authors publish."""

    name: str
    layers: int
    width: int
    hidden: int
    kv_width: int
    vocabulary: int

    def shapes(self) -> list[Shape]:
        width, hidden, kv_width = self.width, self.hidden, self.kv_width
        attention: list[Shape] = [(width, width), (kv_width, width), (kv_width, width), (width, width)]
        mlp: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
        norms: list[Shape] = [(width,), (width,)]
        outside_blocks: list[Shape] = [(self.vocabulary, width), (self.vocabulary, width), (width,)]
        return self.layers * (attention + mlp + norms) + outside_blocks

    def elements(self) -> int:
        return sum(map(math.prod, self.shapes()))


def _shard_rows(shape: Shape, sharding: Sharding, rank: int) -> int:
    return chunk_rows_of(shape[0], sharding.shards, rank % sharding.shards) if shape else 1


def _aligned(size: int) -> int:
    """The size rounded up to a multiple of 16 bytes, where the rows of the next replica begin."""
    return math.ceil(size / 16) * 16


def _row_elements(shape: Shape) -> int:
    """Elements of one row."""
    return math.prod(shape[1:])
