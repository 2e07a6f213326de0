"""Atomic, verified checkpoints: written under a temporary name and renamed, verified before loading, resharded by DCP.

`save` and `load` are for resuming. `gather` and `scatter` write and read files of full weights, which other libraries
load. `merge` averages several checkpoints, `reconstruct` makes averages that were chosen after training, and
`import_averages` loads those of other packages. Needs the extra ``checkpoint``.

Code that reads DCP folders belongs in `dcp`, and code for files of full weights in `weights`. What averages are and how
they are gathered belongs in ``ema_dist.averages``. May import `ema_dist.ema` and the levels below it.
"""

from importlib.util import find_spec

if _missing := [name for name in ("huggingface_hub", "safetensors", "xxhash") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"ema_dist.checkpoint needs {', '.join(_missing)}: pip install {' '.join(_missing)}", name=_missing[0]
    )

from ema_dist.checkpoint.combine.merging import merge
from ema_dist.checkpoint.combine.reconstruction import reconstruct
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.gathering import gather, scatter
from ema_dist.checkpoint.importing.loading import import_averages
from ema_dist.checkpoint.loading import latest, load
from ema_dist.checkpoint.saving import save, wait

__all__ = [
    "CheckpointError",
    "gather",
    "import_averages",
    "latest",
    "load",
    "merge",
    "reconstruct",
    "save",
    "scatter",
    "wait",
]
