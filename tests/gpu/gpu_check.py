"""What no CPU shows of ema_dist on CUDA: one command, for one GPU, that takes less than eight minutes.

    PYTHONPATH=. OUT=folder python tests/gpu/gpu_check.py                    # all sections, each in its own process
    PYTHONPATH=. python tests/gpu/gpu_check.py environment bandwidth         # some of them
    SMALL=1 DEVICE=cpu PYTHONPATH=. python tests/gpu/gpu_check.py            # its own logic, without a GPU

It prints a line for each finding: PASS, FAIL, INFO or SKIP, a name and a value; at the end the FAILs again. The folder
gets results.json, gpu.md (the table of docs/benchmarks/gpu.md), a log of each section and pytest.log. The section
`suite` runs the tests marked `gpu`, which compare values; the other sections measure times and memory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ema_dist import Compensated, Offloaded, ShardedEMA, Stochastic
from ema_dist.kernels import KERNELS, CompensatedRounding, Rounding, StochasticRounding, TensorOffset, make_kernel
from tests.gpu.measuring import (
    DEVICE,
    GIB,
    IS_SMALL,
    ON_GPU,
    check,
    copy_bandwidth,
    guarded,
    peak_bytes,
    report,
    seconds,
)

ROOT = Path(__file__).parents[2]
OUT = Path(os.environ.get("OUT") or tempfile.gettempdir())
DEADLINE_SECONDS = 465.0
"""After this time no section runs."""

GRACE_SECONDS = 10.0
"""From the interrupt that ends a section, after which it says where it was, until it is killed."""

CALL_SECONDS = 0.01
"""What a swap or serving of some hundred tensors may take beyond the bytes that it moves."""

F32, BF16 = torch.float32, torch.bfloat16
MIB = 2**20


def init_one_rank() -> None:
    if ON_GPU:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def environment() -> None:
    """Versions, and how fast plain copies are."""
    report("INFO", "Python, torch", (sys.version.split()[0], torch.__version__))
    with guarded("Triton"):
        import triton  # noqa: PLC0415

        report("INFO", "Triton", triton.__version__)
    report("INFO", "C compiler", shutil.which("cc") or shutil.which("gcc"))
    report("INFO", "copy on the device, GB/s read and written", round(copy_bandwidth() / 1e9))
    if not ON_GPU:
        return
    report("INFO", "device", (torch.cuda.get_device_name(), torch.cuda.mem_get_info(), torch.cuda.nccl.version()))
    on_device = torch.empty(GIB // 4, dtype=torch.uint8, device=DEVICE)
    for pinned in (True, False):
        on_host = torch.empty(on_device.nbytes, dtype=torch.uint8, pin_memory=pinned)
        times = (
            seconds(partial(on_host.copy_, on_device, non_blocking=pinned), 5),
            seconds(partial(on_device.copy_, on_host, non_blocking=pinned), 5),
        )
        speeds = [round(on_device.nbytes / each / 1e9, 1) for each in times]
        report("INFO", f"bus, GB/s to the host and to the device, pinned={pinned}", speeds)


CASES: dict[str, tuple[torch.dtype, torch.dtype, str]] = {
    "float32": (F32, F32, ""),
    "bfloat16 -> float32": (BF16, F32, ""),
    "bfloat16, stochastic": (BF16, BF16, "stochastic"),
    "bfloat16, compensated": (BF16, BF16, "compensated"),
}
NUMELS = (
    {"10 of 64": [64] * 10, "2**16": [2**14] * 4}
    if IS_SMALL
    else {"1000 of 4096": [4096] * 1000, "2**27": [2**24] * 8, "2**30": [2**26] * 16}
)


def make_tensors(numels: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(numel, dtype=dtype, device=DEVICE) for numel in numels]


def bandwidth() -> None:
    """Every kernel's share of the speed of a copy; the chosen one reaches 90 % of it, and is the fastest."""
    copy_speed = copy_bandwidth()
    for size, numels in NUMELS.items():
        for case, (live, stored, rounding) in CASES.items():
            for tracks in (1, 2, 4):
                with guarded(f"{size}, {case}, {tracks} tracks"):
                    _measure_case(
                        f"{size}, {case}, {tracks} tracks", numels, live, stored, rounding, tracks, copy_speed
                    )


def _measure_case(
    name: str, numels: list[int], live: torch.dtype, stored: torch.dtype, rounding: str, tracks: int, copy_speed: float
) -> None:
    residual_bytes = 4 if rounding == "compensated" else 0
    moved_bytes = sum(numels) * (live.itemsize + tracks * (2 * stored.itemsize + residual_bytes))
    if ON_GPU and moved_bytes > torch.cuda.mem_get_info()[0]:
        report("SKIP", name, "too little memory")
        return
    values, averages = make_tensors(numels, live), [make_tensors(numels, stored) for _ in range(tracks)]
    roundings: dict[str, Callable[[], Rounding | None]] = {
        "": lambda: None,
        "stochastic": lambda: StochasticRounding([TensorOffset(index) for index in range(len(numels))]),
        "compensated": lambda: CompensatedRounding([make_tensors(numels, torch.int16) for _ in range(tracks)]),
    }
    make = partial(make_kernel, averages, values, rounding=roundings[rounding]())
    names = [kernel for kernel in KERNELS if kernel != "compiled" and (ON_GPU or kernel != "triton")]
    times: dict[str, float] = {}
    for kernel in names:
        if kernel == "foreach" and (rounding or live != stored):
            continue
        made, index = make(kernel=kernel), count()
        call = partial(_update, made, tracks, index)
        times[kernel] = seconds(call)
        report(
            "INFO",
            f"{name}, {kernel}",
            f"{times[kernel] * 1e3:.3f} ms, {seconds(call, of_host=True) * 1e3:.3f} ms of the host, "
            f"{moved_bytes / times[kernel] / copy_speed:.2f} of a copy's speed",
        )
    chosen, fastest = make().name, min(times, key=lambda kernel: times[kernel])
    check(f"{name}: the chosen kernel is the fastest", times[chosen] <= 1.15 * times[fastest], (chosen, fastest))
    if sum(numels) >= 2**27:
        share = moved_bytes / times[chosen] / copy_speed
        check(f"{name}: at least 0.9 of a copy's speed", share >= 0.9, round(share, 2))


def _update(kernel: Callable[..., None], tracks: int, index: Iterator[int]) -> None:
    kernel([0.001] * tracks, next(index))


def host_time() -> None:
    """An update of 1000 tensors takes at most 300 us of the host."""
    init_one_rank()
    mesh = init_device_mesh(DEVICE, (1,))
    for layout in ("plain", "FSDP2"):
        for name, dtype in (("float32", F32), ("bfloat16", BF16)):
            make = partial(nn.Linear, 64, 64, bias=False, device=DEVICE, dtype=dtype)
            model = nn.Sequential(*(make() for _ in range(10 if IS_SMALL else 1000)))
            if layout == "FSDP2":
                fully_shard(model, mesh=mesh)
            taken = seconds(ShardedEMA(model).update, 50, of_host=True)
            text = f"{taken * 1e6:.0f} us"
            check(f"host time of an update of 1000 tensors, {layout}, {name}", taken <= 300e-6 or IS_SMALL, text)


def overlap() -> None:
    """Steps of a model of 1B parameters under FSDP2 take at most 1 % longer with an update that overlaps."""
    init_one_rank()
    width, blocks, tokens = (32, 2, 8) if IS_SMALL else (2048, 30, 4096)
    make = partial(nn.Linear, bias=False, device=DEVICE, dtype=BF16)
    model = nn.Sequential(
        *(nn.Sequential(make(width, 4 * width), nn.GELU(), make(4 * width, width)) for _ in range(blocks))
    )
    mesh = init_device_mesh(DEVICE, (1,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema, batch = ShardedEMA(model), torch.randn(tokens, width, device=DEVICE, dtype=BF16)

    def steps() -> None:
        for _ in range(4):
            model(batch).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    # In turns: clocks and temperature change during the measurement. Each turn begins with steps that do not count.
    measured: dict[bool | None, list[float]] = {None: [], False: [], True: []}
    for _ in range(7):
        for overlaps, times in measured.items():
            handle = None if overlaps is None else ema.attach(optimizer, overlap=overlaps)
            times.append(seconds(steps, 1) / 4)
            if handle is not None:
                handle.remove()
    base, in_order, overlapped = (median(times) for times in measured.values())
    report("INFO", "a step with an update in order", f"{base * 1e3:.2f} ms, {(in_order / base - 1) * 100:+.1f} %")
    text = f"{base * 1e3:.2f} ms, {(overlapped / base - 1) * 100:+.1f} %"
    check("a step with overlap=True takes at most 1 % longer", overlapped <= 1.01 * base or IS_SMALL, text)


def graphs() -> None:
    """A step in a CUDA graph: update() is refused there; after each replay it takes as long as after other steps."""
    if not ON_GPU:
        report("SKIP", "graphs", "needs a GPU")
        return
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False, device=DEVICE) for _ in range(100)))
    ema, graph = ShardedEMA(model), torch.cuda.CUDAGraph()
    weights = [parameter.detach() for parameter in model.parameters()]

    def capture(update: Callable[[], object]) -> None:
        with torch.cuda.graph(graph):
            torch._foreach_mul_(weights, 1.0)
            update()

    refused = ""
    try:
        capture(ema.update)
    except RuntimeError as error:
        refused = str(error)
    check("update() in a CUDA graph is refused", "captures a CUDA graph" in refused, refused[:80])
    graph = torch.cuda.CUDAGraph()
    capture(lambda: None)
    for name, replay in {"update()": lambda: None, "replay() and update()": graph.replay}.items():
        taken = seconds(lambda replay=replay: (replay(), ema.update()), 20)
        report("INFO", f"{name}, 100 tensors of 512 x 512", f"{taken * 1e6:.0f} us")


def offload() -> None:
    """Offloaded averages: what an update and a swap take."""
    width, layers = (64, 2) if IS_SMALL else (4096, 32)
    make = partial(nn.Linear, bias=False, device=DEVICE, dtype=BF16)
    model = nn.Sequential(*(make(width, width) for _ in range(layers)))
    live_bytes = sum(parameter.nbytes for parameter in model.parameters())
    ema = ShardedEMA(model, store=Offloaded())

    def update() -> None:
        ema.update()
        ema.state_dict()  # waits for the thread

    report("INFO", "offloaded: GB/s of live weights", round(live_bytes / seconds(update, 5, of_host=True) / 1e9, 1))
    report("INFO", "offloaded: swapped() in and out, s", round(seconds(partial(_swap, ema), 3, of_host=True), 3))
    peak = peak_bytes(lambda: (update(), _swap(ema)))
    check("offloaded: update and swap take at most 64 MiB of the device", peak <= 64 * MIB, peak)


def memory() -> None:
    """A model of 8B parameters in bfloat16: the time and the peak memory of the calls."""
    hidden, inner, layers, vocabulary = (32, 64, 2, 100) if IS_SMALL else (4096, 14336, 32, 128256)
    if ON_GPU and torch.cuda.mem_get_info()[0] < 80 * GIB:
        report("SKIP", "8B", "needs 80 GiB of a GPU")
        return
    shapes = [(vocabulary, hidden)] * 2 + [(hidden,)]
    layer = [(hidden, hidden)] * 2 + [(hidden // 4, hidden)] * 2 + [(inner, hidden)] * 3 + [(hidden,)] * 2
    shapes += layer * layers
    model = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=BF16, device=DEVICE)) for shape in shapes)
    numel, speed = sum(parameter.numel() for parameter in model), copy_bandwidth()
    for name, stored in {
        # swapped() stashes the live weights, writes cast averages and copies the stash back; serving() casts.
        "float32": _Stored({}, 4, copied=2, moved={"swapped()": 4 + 6 + 4, "serving()": 6}),
        # swapped() exchanges values through a scratch, three copies each way; serving() reads the averages themselves.
        "compensated": _Stored({"dtype": BF16, "rounding": Compensated()}, 4, moved={"swapped()": 24, "serving()": 0}),
        "stochastic": _Stored({"dtype": BF16, "rounding": Stochastic(0)}, 2, moved={"swapped()": 24, "serving()": 0}),
    }.items():
        with guarded(f"8B {name}"):
            _measure_calls(f"8B {name}", model, stored, numel, speed)


class _Stored(NamedTuple):
    """A way to store averages of bfloat16 weights, and bytes for each parameter."""

    arguments: Mapping[str, Any]
    width: int
    """Of the averages."""
    moved: Mapping[str, int]
    """Read and written by a call."""
    copied: int = 0
    """Of the temporary memory of `swapped()` and `serving()`."""


def _measure_calls(name: str, model: nn.Module, stored: _Stored, numel: int, speed: float) -> None:
    width = stored.width
    made: list[ShardedEMA] = []
    begin = time.perf_counter()
    peak = peak_bytes(lambda: made.append(ShardedEMA(model, **stored.arguments))) - numel * width
    report(
        "INFO", f"{name}: construction", f"{time.perf_counter() - begin:.2f} s, {peak / MIB:.0f} MiB beyond averages"
    )
    ema = made[0]
    share = numel * (2 + 2 * width) / seconds(ema.update, 5) / speed
    check(f"{name}: update at 0.9 of a copy's speed", share >= 0.9 or IS_SMALL, (ema.update_kernel, round(share, 2)))
    peak = peak_bytes(ema.update)
    check(f"{name}: update takes at most 64 MiB", peak <= 64 * MIB, peak)
    for call_name, call in {"swapped()": _swap, "serving()": _serve}.items():
        taken, peak = seconds(partial(call, ema), 3), peak_bytes(partial(call, ema))
        bounded = peak <= numel * stored.copied + 64 * MIB
        check(f"{name}: {call_name} within the stated memory", bounded, f"{peak / GIB:.2f} GiB")
        stated = 1.3 * numel * stored.moved[call_name] / speed + CALL_SECONDS
        text = f"{taken * 1e3:.1f} ms of {stated * 1e3:.1f} ms"
        check(f"{name}: {call_name} within the stated time", taken <= stated or IS_SMALL, text)
    if stored.copied:
        begin = time.perf_counter()
        full = ema.full_state_dict()
        taken = time.perf_counter() - begin
        report("INFO", f"{name}: full_state_dict()", f"{taken:.1f} s, {2 * numel / taken / 1e9:.1f} GB/s")
        del full


def _swap(ema: ShardedEMA) -> None:
    with ema.swapped():
        pass


def _serve(ema: ShardedEMA) -> None:
    with ema.serving():
        pass


SECTIONS: dict[str, tuple[Callable[[], None] | None, int]] = {
    "environment": (environment, 30),
    "suite": (None, 240),
    "bandwidth": (bandwidth, 100),
    "host_time": (host_time, 30),
    "overlap": (overlap, 50),
    "graphs": (graphs, 30),
    "offload": (offload, 40),
    "memory": (memory, 70),
}
"""The sections in the order of what matters most where time runs out, and at most how many seconds each takes.

`suite` is no function: it is a pytest of its own.
"""


def run_group(command: Sequence[str | Path], log: Path, *, limit: float, **variables: str) -> str:
    """Runs a command, and ends all processes that it started: they would use the GPU during later sections.

    Returns: why it failed; empty if it did not.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest prints its failures then, and a section where it was
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return f"stopped after {limit:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit code {code}" if code else ""


def run_suite(limit: float) -> list[str]:
    """The findings of the tests marked `gpu`, which write to pytest.log."""
    folders = ["tests/gpu", "tests/kernels", "tests/averages", "tests/test_harness.py"]
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "-rfE", "--tb=short", "-n", "4" if ON_GPU else "1"]
    log = OUT / "pytest.log"
    problem = run_group([sys.executable, "-m", "pytest", *options, *folders], log, limit=limit)
    text = log.read_text(errors="replace")
    # Each result has a line when it is known, and those of failures one more at the end, with the reason.
    failed = {found.partition(" - ")[0].strip(): found for found in re.findall(r"\b(?:FAILED|ERROR) +(tests/.*)", text)}
    counts = f"{len(re.findall('PASSED tests/', text))} passed, {len(failed)} failed"
    lines = [f"FAIL suite: {found[:200]}" for found in failed.values()]
    return [*lines, f"FAIL suite: {problem}; {counts}" if problem else f"PASS suite: {counts}"]


def run_section(name: str, limit: float) -> list[str]:
    """The findings of a section, which runs in its own process, so that a crash or a hang ends no other."""
    log = OUT / f"{name}.log"
    problem = run_group([sys.executable, Path(__file__).resolve()], log, limit=limit, GPU_CHECK_SECTION=name)
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if line.startswith(("PASS ", "FAIL ", "INFO ", "SKIP "))]
    return [*found, f"FAIL {name}: {problem}: {' '.join(lines[-3:])[-300:]!r}"] if problem else found


def main() -> None:
    """Run the sections named on the command line, or all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    begin, lines = time.perf_counter(), list[str]()
    for name in sys.argv[1:] or SECTIONS:
        limit = min(SECTIONS[name][1], DEADLINE_SECONDS - (time.perf_counter() - begin))
        if IS_SMALL:  # its logic is tried, maybe on a machine that does other work
            limit = 10.0 * SECTIONS[name][1]
        if limit < GRACE_SECONDS:
            found = [f"FAIL {name}: no time left"]
        else:
            found = run_suite(limit) if name == "suite" else run_section(name, limit)
        print(f"== {name}, {time.perf_counter() - begin:.0f} s", *found, sep="\n", flush=True)
        lines += found
        (OUT / "results.json").write_text(json.dumps(lines, indent=1))
        rows = [line.replace("|", "/").partition(": ") for line in lines]
        table = [f"| {left.split(' ', 1)[0]} | {left.split(' ', 1)[1]} | {value} |" for left, _, value in rows]
        (OUT / "gpu.md").write_text("\n".join(["| | what | value |", "|---|---|---|", *table, ""]))
    failed = [line for line in lines if line.startswith("FAIL")]
    passed = sum(line.startswith("PASS") for line in lines)
    print(f"== {time.perf_counter() - begin:.0f} s, {passed} PASS, {len(failed)} FAIL", *failed, sep="\n")


if __name__ == "__main__":
    if section := SECTIONS.get(os.environ.pop("GPU_CHECK_SECTION", ""), (None, 0))[0]:
        section()
        sys.stdout.flush()
        os._exit(0)  # an NCCL group that is not destroyed may wait at exit
    main()
