"""FSDP1: finds the original tensors in flat parameters, and drops weights that a forward pass left gathered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState
from torch.distributed.fsdp._flat_param import FlatParamHandle

from ema_dist.sharding.flat_shard import FlatRanges, FlatShard
from ema_dist.sharding.plain_shard import PlainShard
from ema_dist.sharding.shard import Shard

# FSDP1 is in maintenance and has no public way to see how it shards, or to drop gathered weights without gathering
# them first. These are the private attributes read here; a torch that lacks one of them gets an error that names it.
HANDLE_ATTRIBUTES = ("flat_param", "process_group", "uses_sharded_strategy", "device", "_training_state")
FLAT_PARAM_ATTRIBUTES = (
    "_param_infos",
    "_shared_param_infos",
    "_shapes",
    "_strides",
    "_numels_with_padding",
    "_is_padding_mask",
    "_sharded_size",
    "_params",
    "_param_extensions",
)


@dataclass(frozen=True)
class FlatTensor:
    """One original tensor in a flat parameter; tied tensors have equal keys. `make_shard` takes all names."""

    key: object
    make_shard: Callable[[tuple[str, ...]], Shard]


def handles(model: nn.Module) -> list[tuple[FullyShardedDataParallel, FlatParamHandle]]:
    """The FSDP1 modules in ``model`` that own a flat parameter, each with its handle.

    Raises: RuntimeError when this version of torch lacks an attribute of FSDP1 that must be read.
    """
    units = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    units_with_handles = [(unit, handle) for unit in units if (handle := getattr(unit, "_handle", None)) is not None]
    for _, handle in units_with_handles:
        missing = [name for name in HANDLE_ATTRIBUTES if not hasattr(handle, name)]
        missing += [name for name in FLAT_PARAM_ATTRIBUTES if not hasattr(handle.flat_param, name)]
        if missing:
            raise RuntimeError(
                f"FSDP1 in torch {torch.__version__} lacks {missing}, which ema_dist reads; "
                "use fully_shard (FSDP2), or a version of torch that CHANGELOG names as tested"
            )
    return units_with_handles


def flat_tensors(model: nn.Module) -> dict[int, dict[str, FlatTensor]]:
    """Every original tensor in a flat parameter, by the id of its module and its name in that module."""
    by_module: dict[int, dict[str, FlatTensor]] = defaultdict(dict)
    for unit, handle in handles(model):
        flat_param = handle.flat_param
        if any(extension is not None for extension in flat_param._param_extensions):
            raise ValueError("FSDP1 around tensor-parallel parameters is not supported: use fully_shard (FSDP2)")
        for index, (info, start) in enumerate(zip(flat_param._param_infos, _tensor_starts(flat_param), strict=True)):
            by_module[id(info.module)][info.param_name] = FlatTensor(
                (id(flat_param), index), _shard_maker(unit, handle, index, start)
            )
        for info in flat_param._shared_param_infos:
            by_module[id(info.module)][info.param_name] = by_module[id(info.prim_module)][info.prim_param_name]
    return by_module


def local_shard(handle: FlatParamHandle) -> Tensor:
    """This rank's shard of a flat parameter, even while the parameter holds the gathered weights."""
    # Before the first forward pass there is no _local_shard, and the parameter itself is the shard.
    local: Tensor = getattr(handle.flat_param, "_local_shard", handle.flat_param)
    return local.detach()


def offloaded_devices(flat_handles: Iterable[FlatParamHandle]) -> set[torch.device]:
    """The devices that compute with flat parameters which are offloaded to the CPU."""
    return {
        handle.device
        for handle in flat_handles
        if handle.device.type != "cpu" and local_shard(handle).device.type == "cpu"
    }


def reshard(flat_handles: Iterable[FlatParamHandle]) -> None:
    """Drop gathered weights, so that the next forward pass gathers the shards as they are then.

    Raises: RuntimeError inside ``summon_full_params``, which will write its gathered weights back to the shards.
    """
    for handle in flat_handles:
        if handle._training_state == HandleTrainingState.SUMMON_FULL_PARAMS:
            raise RuntimeError("the model is inside FullyShardedDataParallel.summon_full_params(): leave it first")
        if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(free_unsharded_flat_param=True)
            handle.post_reshard()
            handle._prefetched = False  # otherwise FSDP1 would not gather a unit again that the last pass prefetched


def _tensor_starts(flat_param: FlatParameter) -> Iterator[int]:
    """The first element of each original tensor in the full flat parameter, including alignment padding."""
    *starts, _ = accumulate(flat_param._numels_with_padding, initial=0)
    for start, is_padding in zip(starts, flat_param._is_padding_mask, strict=True):
        if not is_padding:
            yield start


def _shard_maker(
    unit: FullyShardedDataParallel, handle: FlatParamHandle, index: int, start: int
) -> Callable[[tuple[str, ...]], Shard]:
    flat_param = handle.flat_param
    group: ProcessGroup = handle.process_group
    shape: torch.Size = flat_param._shapes[index]
    stride: tuple[int, ...] = tuple(flat_param._strides[index])
    owner: Tensor = flat_param if flat_param._params is None else flat_param._params[index]
    local = local_shard(handle)

    def with_owner_offset(shard: Shard, owner_offset: int) -> Shard:
        shard.owner_offset = owner_offset if owner is flat_param else None
        return shard

    if not handle.uses_sharded_strategy:
        tensor = local.as_strided(shape, stride, local.storage_offset() + start)
        return lambda names: with_owner_offset(PlainShard(names, tensor, owner, replica_group=group), start)

    shard_numel = flat_param._sharded_size.numel()
    ranges = FlatRanges(start, shape.numel(), shard_numel)
    own_range = ranges.of_rank(group.rank())
    offset = start + own_range[0] - group.rank() * shard_numel if own_range[0] < own_range[1] else 0
    # Only HYBRID_SHARD sets this private attribute: the ranks that hold the same shard.
    replica_group: ProcessGroup | None = getattr(unit, "_inter_node_pg", None)
    return lambda names: with_owner_offset(
        FlatShard(
            names,
            local[offset : offset + own_range[1] - own_range[0]],
            owner,
            ranges=ranges,
            shape=shape,
            stride=stride,
            group=group,
            device=handle.device,
            replica_group=replica_group,
        ),
        offset,
    )
