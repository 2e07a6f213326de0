"""The connection to the process group's store that rendezvous use."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import Store

from ema_dist.communication.process_exit import delay_process_exit
from ema_dist.sharding import world_store

_connections: MutableMapping[object, Store] = WeakKeyDictionary()
"""The connection of this process, by world."""

# A forked child shares its parent's socket, so replies to one could be read by the other.
os.register_at_fork(after_in_child=_connections.clear)


def rendezvous_store() -> Store:
    """The store of the default process group, over a separate connection if the store uses connections.

    A connection serves one request at a time, and waiting is a request. NCCL's heartbeat polls the store through the
    process group's own connection, which a waiting rendezvous would block.
    """
    world = dist.group.WORLD
    if world not in _connections:
        delay_process_exit()
        store = world_store()
        # torch 2.7 cannot clone. Stores in files and in memory have no connection.
        can_clone = hasattr(store, "clone") and isinstance(_without_prefix(store), dist.TCPStore)
        _connections[world] = cast("Any", store).clone() if can_clone else store
    return _connections[world]


def _without_prefix(store: Store) -> Store:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store
