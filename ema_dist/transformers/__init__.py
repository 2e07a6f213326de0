"""Averages in the Trainer of transformers, and of PEFT's adapters: ``EMACallback(...).bind(trainer)``.

Needs transformers: ``pip install "transformers>=5" "accelerate>=1.10"``.

Code that knows the `Trainer` belongs here and nowhere else; code for any loop with accelerate belongs in
`ema_dist.accelerate`. May import `ema_dist.accelerate` and the levels below it.
"""

from importlib.util import find_spec

if _missing := [name for name in ("transformers", "accelerate") if find_spec(name) is None]:
    raise ModuleNotFoundError(
        f'ema_dist.transformers needs {" and ".join(_missing)}: pip install "transformers>=5" "accelerate>=1.10"',
        name=_missing[0],
    )

from ema_dist.transformers.callback import EMACallback

__all__ = ["EMACallback"]
