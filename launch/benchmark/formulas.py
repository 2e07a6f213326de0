"""What averages cost, as formulas: memory and traffic of one rank, by parameters, ranks, replicas, tracks and dtypes.

Arithmetic only. docs/cost.md derives it; `launch.cost` compares it with measurements and projects it to large models.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """A model over `shards * replicas` ranks: `shards` of them hold it together, `replicas` such groups hold it alike.

    DDP has one shard, FSDP2 one replica, HSDP several of both.

    Args:
        split: whether the averages are split among the replicas, or whole on each (``replicas="copy"``).
    """

    shards: int = 1
    replicas: int = 1
    split: bool = True

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas


@dataclass(frozen=True)
class ElementSizes:
    """What is kept of each element: bytes of the live weight, bytes of an average of it, and how many averages."""

    live_itemsize: int = 4
    average_itemsize: int = 4
    tracks: int = 1


@dataclass(frozen=True)
class TrainingStep:
    """A training step of the whole job.

    Args:
        tokens: in a batch, over all ranks.
        flops_per_second: that a rank reaches.
        memory_bandwidth: that an update reaches, in bytes per second.
    """

    tokens: float
    flops_per_second: float
    memory_bandwidth: float


def chunk_rows_of(rows: int, parts: int, index: int) -> int:
    """Rows of one part: all parts have ``ceil(rows / parts)``, the last ones fewer or none.

    Source: `torch.Tensor.chunk`, by which FSDP2 and `ema_dist` cut.
    """
    rows_per_part = math.ceil(rows / parts)
    return max(0, min(rows_per_part, rows - index * rows_per_part))


def live_elements(shapes: Iterable[Shape], sharding: Sharding, rank: int = 0) -> int:
    """Elements of live weights on a rank; none has more than the first."""
    return sum(_shard_rows(shape, sharding, rank) * _row_elements(shape) for shape in shapes)


def average_elements(shapes: Iterable[Shape], sharding: Sharding, rank: int = 0) -> int:
    """Elements of one track's averages on a rank; none has more than the first. A scalar is whole on every rank."""
    parts = sharding.replicas if sharding.split else 1
    return sum(
        chunk_rows_of(_shard_rows(shape, sharding, rank), parts, rank // sharding.shards % parts) * _row_elements(shape)
        if shape
        else 1
        for shape in shapes
    )


def average_bytes(elements: int, element_sizes: ElementSizes) -> int:
    """Memory for the averages of so many elements."""
    return elements * element_sizes.tracks * element_sizes.average_itemsize


def update_bytes(elements: int, element_sizes: ElementSizes) -> int:
    """What an update of the averages of so many elements moves: each live weight is read once for all tracks."""
    return elements * (element_sizes.live_itemsize + 2 * element_sizes.average_itemsize * element_sizes.tracks)


def swap_network_bytes(shapes: Sequence[Shape], sharding: Sharding, element_sizes: ElementSizes, rank: int = 0) -> int:
    """Payload of the collectives in which averages go into the model; their leaving takes the same less the checksums.

    Each replica sends its part of every tensor to the others, so all parts pass each rank, its own on the way out.
    Parts are padded to that of the first replica. Where this would more than double the bytes, tensors are sent as
    they are, by an all-reduce; its payload counts once, although a ring sends each byte of it twice. First the replicas
    compare 16 bytes for each tensor.
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
    """Time of an update over the time of the rest of a training step, when one rank's memory is what limits it.

    A step takes 6 floating-point operations for each parameter and token (Kaplan et al. 2020, section 2.1). Ranks share
    both, so their number cancels, unless replicas average the same rows again.
    """
    redundancy = 1 if sharding.split else sharding.replicas
    update = update_bytes(1, element_sizes) * redundancy / step.memory_bandwidth
    return update / (6 * step.tokens / step.flops_per_second)


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer with gated MLPs and grouped queries, by the sizes that its authors publish."""

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
    """Bytes up to the next multiple of 16, at which the rows of the next replica begin."""
    return math.ceil(size / 16) * 16


def _row_elements(shape: Shape) -> int:
    """Elements of one row."""
    return math.prod(shape[1:])
