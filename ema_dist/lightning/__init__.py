"""Lightning's EMA callback for every layout: ``from ema_dist.lightning import EMAWeightAveraging``.

Needs Lightning: ``pip install "lightning>=2.6"``.

Only this package knows Lightning's hooks and strategies; `ema_dist.checkpoint.importing` also reads its checkpoints.
Code that another framework could use belongs on a lower level. May import `ema_dist.ema` and the levels below it.
"""

from importlib.util import find_spec

if find_spec("lightning") is None:
    hint = (
        "; the package pytorch_lightning is not enough: import the Trainer from lightning.pytorch"
        if find_spec("pytorch_lightning")
        else ""
    )
    raise ModuleNotFoundError(
        f'ema_dist.lightning needs lightning: pip install "lightning>=2.6"{hint}', name="lightning"
    )

from ema_dist.lightning.callback import EMAWeightAveraging

__all__ = ["EMAWeightAveraging"]
