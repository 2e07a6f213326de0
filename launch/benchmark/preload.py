"""Imports what every rank would otherwise import by itself, for seconds each: peers, and what the programs import."""

from contextlib import suppress
from importlib import import_module

PEER_MODULES = ("diffusers.training_utils", "ema_pytorch", "pytorch_lightning.callbacks")
OWN_MODULES = ("ema_dist.cli.export", "matplotlib.figure", "rich.table", "sklearn.datasets")

for name in (*PEER_MODULES, *OWN_MODULES):
    with suppress(Exception):  # whoever asks for it gets to know why it cannot be had
        import_module(name)
