"""Lightning's EMA callback for every layout: ``from ema_dist.lightning import EMAWeightAveraging``.

Needs Lightning: ``pip install "lightning>=2.6"``.

Code that knows Lightning's hooks, strategies or checkpoints belongs here and nowhere else. Code that another framework
could use belongs on a lower level. May import `ema_dist.ema` and the levels below it.
"""

from importlib.util import find_spec

if find_spec("lightning") is None:
    hint = (
        "; the callback works with `import lightning.pytorch`, not with `import pytorch_lightning`"
        if find_spec("pytorch_lightning")
        else ""
    )
    raise ModuleNotFoundError(
        f'ema_dist.lightning needs lightning: pip install "lightning>=2.6"{hint}', name="lightning"
    )

from ema_dist.lightning.callback import EMAWeightAveraging

__all__ = ["EMAWeightAveraging"]
