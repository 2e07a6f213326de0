"""Checkpoints that survive: written aside and renamed, checked before they are read, resharded by DCP.

`save` and `load` are for resuming; `gather` and `scatter` for full weights in files that others read. Needs the extra
``checkpoint``: ``pip install "ema-dist[checkpoint]"``.
"""

try:
    import huggingface_hub as _  # noqa: F401
    import safetensors as _  # noqa: F401
    import xxhash as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'ema_dist.checkpoint needs {error.name}, which is not installed: pip install "ema-dist[checkpoint]"',
        name=error.name,
    ) from None

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.loading import latest, load
from ema_dist.checkpoint.saving import save, wait

__all__ = ["CheckpointError", "latest", "load", "save", "wait"]
