"""``python -m ema_dist.cli`` is ``ema-dist``."""

from ema_dist.cli import main

main()
