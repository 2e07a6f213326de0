"""Composer's EMA algorithm for every layout: ``from ema_dist.composer import EMA`` instead of ``composer.algorithms``.

Needs Composer: ``pip install "mosaicml>=0.32"``.

Code that knows Composer's events, trainer or checkpoints belongs here and nowhere else. Code that another framework
could use belongs on a lower level. May import `ema_dist.ema`, `ema_dist.functional` and the levels below them.
"""

from importlib.util import find_spec

if find_spec("composer") is None:
    raise ModuleNotFoundError('ema_dist.composer needs mosaicml: pip install "mosaicml>=0.32"', name="composer")

from ema_dist.composer.algorithm import EMA
from ema_dist.functional import compute_ema

__all__ = [
    "EMA",
    "compute_ema",
]
