"""Writes a weighted sum of checkpoints into a new folder, which gets its name once the files are verified."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed import ProcessGroup

from ema_dist.checkpoint.agreement import checkpoint_rendezvous, rank_and_size, run_on_all_ranks, run_on_first_rank
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.folders import folder_lock, made_folder
from ema_dist.checkpoint.manifest import files_to_verify, verify_files
from ema_dist.checkpoint.step_folders import STEP_NAME, fsync
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.checkpoint.weighted_sum.output_formats import WeightOutput, make_output
from ema_dist.checkpoint.weighted_sum.weighted_sum import Term, WeightedSum, tensor_checksum
from ema_dist.messages import abbreviated
from ema_dist.modes import in_normal_mode

OutputFormat = Literal["safetensors", "torch", "dcp"]

RECORD_FILE = "merge.json"
"""The file beside the weights that records which checkpoints were merged."""


@in_normal_mode
def write_weighted_sum(
    weights: WeightedSum,
    folder: str | os.PathLike[str],
    *,
    call: str = "checkpoint.merge",
    verified: Iterable[StoredCheckpoint] = (),
    file_format: OutputFormat = "safetensors",
    custom_output: Callable[[ProcessGroup | None], WeightOutput] | None = None,
    max_shard_size: int | str = "5GiB",
    record: Mapping[str, Any] | None = None,
    record_name: str = RECORD_FILE,
    on_bytes: Callable[[int], object] = lambda _: None,
    timeout: float = 60.0,
) -> list[Path]:
    """Write a sum into a new folder, read it back to verify it, and return the files.

    With a process group, the ranks share the tensors, and each writes files of its own. Every tensor is read once.
    Until all tensors are verified, the files are in a folder beside ``folder``, which is removed on failure.

    Args:
        folder: must not exist; its parents are created.
        call: the function that the user called, for errors about ranks that differ.
        verified: checkpoints whose files are compared with their manifests first; the ranks share these files.
        file_format: files in the Hugging Face layout; or ``"dcp"``, which `checkpoint.load` takes under ``model``.
        custom_output: makes the output over a group, in place of one in ``file_format``.
        max_shard_size: of files in the Hugging Face layout; with more processes than files, files are smaller.
        record: more fields for the file ``record_name`` beside the weights, which has the path, step, coefficient and
            checksum of each source. ``checksum`` is the XXH3 of the sorted per-tensor XXH3 checksums of the tensors
            that are added, as JSON. It does not depend on the source's layout, and is null if the source was not read
            (coefficient 0). ``copied_checksum`` is the same for tensors copied from this source.
        on_bytes: called with the number of bytes read by this process since the last call.

    Collective: over all ranks, if there is a process group; all ranks must pass the same arguments.
    Memory: the sum of one batch (16 MiB, or one larger tensor) and that batch from one source; with ``"torch"``, also
        one output file.
    Raises: CheckpointError on every rank when a source is damaged, ``folder`` exists or cannot be written, or what was
        written reads differently; ValueError for a dtype that the format cannot hold.
    """
    folder = Path(folder).absolute()
    require_new_folder(folder)
    texts = {"coefficients": f"coefficients {[term.coefficient for term in weights.terms]}"}
    group = checkpoint_rendezvous(f"{call}(..., {str(folder)!r})", timeout=timeout, compared=[texts])
    run_on_all_ranks(lambda: _require_intact(verified, group, on_bytes), group)
    step = weights.base.step

    def open_output() -> WeightOutput:
        if custom_output is not None:
            return custom_output(group)
        return make_output(weights, file_format, max_shard_size=max_shard_size, step=step, group=group)

    output = run_on_all_ranks(open_output, group)
    checksums: dict[str, str] = {}

    def entries() -> Iterator[tuple[str, Any]]:
        for name, value in weights.entries(output.names, on_bytes=on_bytes):
            if isinstance(value, Tensor):
                checksums[name] = tensor_checksum(value.contiguous())
            yield name, value
            del value  # as in `WeightedSum.entries`

    with _new_folder(folder, group) as partial:
        run_on_all_ranks(lambda: output.write(partial, entries()), group)
        content = {"sources": _provenance(weights, group), **(record or {})}

        def finish() -> None:
            output.finish()
            (partial / record_name).write_text(json.dumps(content, indent=1) + "\n")
            fsync(partial / record_name)

        run_on_first_rank(finish, group)
        run_on_all_ranks(lambda: _verify(output, partial, checksums), group)
    return sorted(path for path in folder.iterdir() if path.is_file())


def _require_intact(
    checkpoints: Iterable[StoredCheckpoint], group: ProcessGroup | None, on_bytes: Callable[[int], object]
) -> None:
    """Raises: CheckpointError when one of the files that this rank verifies differs from its manifest."""
    problems: list[str] = []
    for stored in checkpoints:
        files = stored.manifest.files if stored.manifest else {}
        share = files_to_verify(files, *rank_and_size(group))
        problems += verify_files(stored.folder, share, on_bytes=on_bytes)
    if problems:
        raise CheckpointError(f"a source is damaged, so nothing is written: {'; '.join(problems)}")


def _provenance(weights: WeightedSum, group: ProcessGroup | None) -> list[dict[str, Any]]:
    """The entries of the record about each source. Collective: over ``group``."""
    terms: list[Term] = weights.terms
    checksums = [term.checksums for term in terms]
    by_rank: list[list[dict[str, str]]] = [checksums]
    if group is not None:
        by_rank = [[] for _ in range(group.size())]
        dist.all_gather_object(by_rank, checksums, group=group)
    merged = [{name: text for part in parts for name, text in part.items()} for parts in zip(*by_rank, strict=True)]
    return [
        {
            "path": str(term.source.path.absolute()),
            "step": term.source.step,
            "coefficient": term.coefficient,
            "checksum": _combined(parts, weights.added_names),
            "copied_checksum": _combined(parts, parts.keys() - weights.added_names),
        }
        for term, parts in zip(terms, merged, strict=True)
    ]


def _combined(checksums: Mapping[str, str], names: AbstractSet[str]) -> str | None:
    """The checksum of the sorted checksums of these names; None if there are none."""
    chosen = sorted((name, text) for name, text in checksums.items() if name in names)
    return xxhash.xxh3_128_hexdigest(json.dumps(chosen).encode()) if chosen else None


def require_new_folder(folder: Path) -> None:
    """Raises: CheckpointError when ``folder`` exists, has a parent that is a file, or is named like a step folder."""
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} already exists: choose another folder, or remove it")
    nearest_parent = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
    if not nearest_parent.is_dir():
        raise CheckpointError(f"cannot create {folder}: {nearest_parent} is not a folder; choose another folder")
    if STEP_NAME.fullmatch(folder.name):
        raise CheckpointError(
            f"{folder} is named like a step folder of checkpoint.save, and would be read as one: choose another name"
        )


def _verify(output: WeightOutput, folder: Path, checksums: Mapping[str, str]) -> None:
    """Raises: CheckpointError when a tensor reads differently from what was written."""
    source = output.open(folder)
    tensors = zip(checksums, source.read(checksums), strict=True)
    if changed := [name for name, tensor in tensors if tensor_checksum(tensor.contiguous()) != checksums[name]]:
        raise CheckpointError(
            f"verification failed: {abbreviated(changed)} in {folder} differ from the values written; check the disk"
        )


@contextmanager
def _new_folder(folder: Path, group: ProcessGroup | None) -> Iterator[Path]:
    """Create a temporary folder beside ``folder``; rename it when the block returns, remove it when the block raises.

    Collective: over ``group``. Raises: CheckpointError when ``folder`` exists, or cannot be created.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with ExitStack() as exit_stack:

        def make() -> None:
            require_new_folder(folder)
            exit_stack.callback(_remove_folder, partial)  # includes a folder that a killed process left
            exit_stack.enter_context(made_folder(partial))
            exit_stack.enter_context(folder_lock(partial, name=folder))
            _remove_files(partial)  # left by a process that was killed
            exit_stack.callback(_remove_files, partial)

        def publish() -> None:
            fsync(partial)
            if os.path.lexists(folder):
                raise CheckpointError(
                    f"{folder} was created by another process meanwhile: what was to become it is discarded; choose "
                    "another folder"
                )
            partial.rename(folder)
            fsync(folder.parent)

        run_on_first_rank(make, group)
        yield partial
        run_on_first_rank(publish, group)


def _remove_folder(folder: Path) -> None:
    with suppress(OSError):  # another process has locked the folder and writes into it
        folder.rmdir()


def _remove_files(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        path.unlink()
