"""Measures the host time of every call on one of 16 to 8192 ranks, without communication.

python -m launch.cost.scale --output-dir docs          # some minutes; writes the lower half of docs/scale.md
python -m launch.cost.scale --quick                    # a tiny model: whether it works at all
"""

import sys
from launch.cost.fake_ranks import CALLS, LAYOUTS, FakeCase, measure_apart
import argparse

p = argparse.ArgumentParser()
p.add_argument("--layouts", nargs="+", default=["ddp", "fsdp2", "hsdp", "tp"])
p.add_argument("--ranks", nargs="+", type=int, default=[16, 1024, 8192])
p.add_argument("--tensors", type=int, default=300)
p.add_argument("--repeats", type=int, default=5)
if __name__ == "__main__":
    a = p.parse_args()
    print("| layout | ranks | " + " | ".join(CALLS) + " |")
    for l in a.layouts:
        for r in a.ranks:
            rec = measure_apart(FakeCase(l, r, a.tensors, a.repeats))
            print(f"| {l} | {r} | " + " | ".join(f"{1000 * rec['seconds'][c]:.1f}" for c in CALLS) + " |", flush=True)
