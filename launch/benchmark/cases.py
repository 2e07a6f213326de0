"""The models that the benchmark measures: two shapes, wrapped in several ways, in either dtype."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from launch.benchmark.formulas import ElementSizes
from launch.recipe.model import Block

Parallel = Literal["plain", "ddp", "fsdp1", "fsdp2", "hsdp"]
LiveDtype = Literal["float32", "bfloat16"]
DECAY = 0.999
LIVE_DTYPES: dict[LiveDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SmallTensors:
    """Square matrices."""

    count: int = 1000
    side: int = 64

    def __str__(self) -> str:
        return f"{self.count} of {self.side}x{self.side}"

    def build(self) -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(self.side, self.side, bias=False) for _ in range(self.count)))


@dataclass(frozen=True)
class Transformer:
    """The blocks and the head of GPT-2 small.

    The head is the largest tensor. It comes last, so that all other tensors are in memory while it is gathered: the
    memory then peaks.
    """

    blocks: int = 12
    width: int = 768
    vocabulary: int = 50257

    def __str__(self) -> str:
        return f"transformer of {self.blocks} blocks of width {self.width}"

    def build(self) -> nn.Sequential:
        blocks = (Block(self.width, heads=1) for _ in range(self.blocks))
        return nn.Sequential(*blocks, nn.Linear(self.width, self.vocabulary, bias=False))


@dataclass(frozen=True)
class Case:
    """A model, wrapped in one way, on some ranks. `live` is the dtype of its weights; its averages are float32."""

    parallel: Parallel
    ranks: int
    shape: SmallTensors | Transformer
    live: LiveDtype = "float32"

    def __str__(self) -> str:
        return f"{self.layout}, {self.shape}" + ("" if self.live == "float32" else f", {self.live}")

    @property
    def layout(self) -> str:
        label = self.parallel if self.parallel == "plain" else self.parallel.upper()
        return f"{label}, {self.ranks} {'rank' if self.ranks == 1 else 'ranks'}"

    @property
    def element_sizes(self) -> ElementSizes:
        return ElementSizes(live_itemsize=LIVE_DTYPES[self.live].itemsize)

    def build_model(self, device: torch.device) -> nn.Module:
        assert self.parallel != "fsdp1", "only Composer wraps models in FSDP1"
        model = self.shape.build().to(device, LIVE_DTYPES[self.live])
        if self.parallel == "ddp":
            return DistributedDataParallel(model)
        if self.parallel in {"fsdp2", "hsdp"}:
            sizes = {"replicate": 2, "shard": self.ranks // 2} if self.parallel == "hsdp" else {"shard": self.ranks}
            mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
            for module in model:
                if isinstance(module, Block):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model


@torch.no_grad()
def scale_weights(model: nn.Module, *, factor: float) -> None:
    """Write to every weight, as an optimizer does just before an update; a factor of 1 keeps the values."""
    weights: list[Tensor] = list(model.parameters())
    torch._foreach_mul_(weights, factor)


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """The module inside DDP, which a training script passes to methods that copy the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The full tensor. Collective: over the ranks that hold it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
