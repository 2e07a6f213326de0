"""A run of a measuring program: its command line, its ranks, and the cases that it skipped."""

import argparse
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from ema_dist import InitialWeightsWarning
from launch.benchmark.cases import Case, Transformer
from launch.benchmark.measure import Record
from launch.benchmark.page import Page
from launch.recipe.parallelism import BACKENDS

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "launch.benchmark.preload",
]


@dataclass(frozen=True)
class Run:
    """How one section is measured."""

    device_type: str
    repeats: int
    console: Console
    quick: bool = False
    scratch: Path = Path()
    large: Transformer = field(default_factory=Transformer)
    not_measured: list[str] = field(default_factory=list)

    def measure(self, costs: Callable[..., list[Record]], case: Case, **settings: Any) -> list[Record]:  # noqa: ANN401
        """Run `costs` for a case on new ranks, and return its records; empty if there are too few GPUs."""
        if self.device_type == "cuda" and case.ranks > torch.cuda.device_count():
            self.not_measured.append(f"{case} (needs {case.ranks} GPUs)")
            return []
        with self.console.status(str(case)):
            measure = partial(costs, case=case, repeats=self.repeats, **settings)
            return on_ranks(measure, case.ranks, self.device_type)

    def show_and_write(self, page: Page, folder: Path, *, data_name: str, page_name: str, program: str) -> None:
        for table in page.tables:
            self.console.print(table.for_terminal())
        page.write(folder, data=data_name, page=page_name, program=program)
        self.console.print(f"in {folder}: {data_name}, {page_name}")


def argument_parser(program: str, description: str | None, *, output_dir: str) -> argparse.ArgumentParser:
    """A parser with the options that all measuring programs share."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--device", choices=["auto", "cpu", "cuda"], default="auto")
    option("--quick", action="store_true", help="use tiny models, to see whether the benchmark works")
    option("--output-dir", type=Path, default=Path(output_dir), help="folder for the pages and their JSON")
    return parser


def make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.repeats is not None and args.repeats < 2:
        parser.error("--repeats: quartiles need 2 rounds or more")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def on_ranks(measure: Callable[[torch.device], T], ranks: int, device_type: str) -> T:
    """Run `measure` on new ranks, and return the result of the first; each rank has an equal share of the CPU's cores.

    Args:
        measure: runs on every rank, inside a process group; it and its result are sent by pickle.
    """
    forkserver.set_forkserver_preload(PRELOADED)
    # Python 3.11 does not pass `sys.path` to the server, which silently skips modules that it cannot find.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    threads = max(1, torch.get_num_threads() // ranks)
    arguments = (measure, ranks, device_type, store.port, threads)
    mp.start_processes(_main, arguments, nprocs=ranks, start_method="forkserver")
    return pickle.loads(bytes.fromhex(store.get("answer").decode()))


def _main(
    rank: int, measure: Callable[[torch.device], object], ranks: int, device_type: str, port: int, threads: int
) -> None:
    warnings.simplefilter("ignore", InitialWeightsWarning)  # averages of a few updates are measured, not used
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore(LOOPBACK, port, is_master=False)
    dist.init_process_group(BACKENDS[device_type], store=store, rank=rank, world_size=ranks)
    answer = measure(device)
    if rank == 0:
        store.set("answer", pickle.dumps(answer).hex())
    dist.barrier()
    if device.type == "cuda":  # gloo's threads may keep torch 2.7 waiting forever, and the process ends anyway
        dist.destroy_process_group()
