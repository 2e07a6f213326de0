"""Checks that pyright knows the type of every public symbol: ``tox -e types-public`` runs it.

Composer cannot be installed beside the other frameworks. Types that come from it are unknown here, and not reported.
"""

from __future__ import annotations

import json
import subprocess
import sys

COMMAND = (sys.executable, "-m", "pyright", "--verifytypes", "ema_dist", "--ignoreexternal", "--outputjson")


def main() -> None:
    result = subprocess.run(COMMAND, check=False, capture_output=True, text=True)
    if not result.stdout.startswith("{"):
        sys.exit(f"{result.stdout}{result.stderr}")
    symbols = json.loads(result.stdout)["typeCompleteness"]["symbols"]
    unknown = [
        f"{symbol['name']}: {' '.join(diagnostic['message'] for diagnostic in symbol['diagnostics'])}"
        for symbol in symbols
        if symbol["isExported"]
        and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"])
        and not symbol["name"].startswith("ema_dist.composer.")
    ]
    if unknown or not symbols:
        sys.exit("\n".join(["symbols whose types pyright does not know:", *unknown]))
    print(f"pyright knows the types of {len(symbols)} symbols")


if __name__ == "__main__":
    main()
