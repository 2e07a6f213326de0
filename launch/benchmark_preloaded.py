"""Imports what ranks would otherwise import one by one, for seconds each: the peers that are installed."""

from contextlib import suppress
from importlib import import_module

for name in ("diffusers.training_utils", "ema_pytorch", "pytorch_lightning.callbacks"):
    with suppress(Exception):  # whoever asks for it gets to know why it cannot be had
        import_module(name)
