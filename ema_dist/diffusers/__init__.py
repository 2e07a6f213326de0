"""diffusers' EMAModel for every layout: ``from ema_dist.diffusers import EMAModel`` instead of its ``training_utils``.

Needs diffusers: ``pip install "diffusers>=0.36"``.

Code that knows diffusers' scripts, folders or arguments belongs here and nowhere else. Code that another framework
could use belongs on a lower level. May import `ema_dist.ema` and the levels below it.
"""

from importlib.util import find_spec

if find_spec("diffusers") is None:
    raise ModuleNotFoundError('ema_dist.diffusers needs diffusers: pip install "diffusers>=0.36"', name="diffusers")

from ema_dist.diffusers.ema_model import EMAModel

__all__ = [
    "EMAModel",
]
