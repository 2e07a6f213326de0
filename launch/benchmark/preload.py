"""Imports slow modules once, in the server that forks the ranks: each rank would otherwise spend seconds on them."""

from contextlib import suppress
from importlib import import_module

PEER_MODULES = ("diffusers.training_utils", "ema_pytorch", "pytorch_lightning.callbacks")
OWN_MODULES = ("ema_dist.cli.export", "matplotlib.figure", "rich.table", "sklearn.datasets")

for name in (*PEER_MODULES, *OWN_MODULES):
    with suppress(Exception):  # the code that needs the module reports why it cannot be imported
        import_module(name)
