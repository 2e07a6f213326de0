"""``ema-dist verify``: checks that a checkpoint is complete, undamaged, finite and consistent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ema_dist.checkpoint.dcp.checkpoint_index import dotted_name
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.find_checkpoint import find_checkpoint
from ema_dist.checkpoint.manifest import read_manifest, verify_files
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.checkpoint.values import KeyPath
from ema_dist.checkpoint.weights.casts import upcast_float8
from ema_dist.cli.terminal import format_bytes, print_json, print_stderr, progress, stdout_console
from ema_dist.messages import abbreviated


def verify(checkpoint: Path, *, step: int | None = None, as_json: bool = False) -> bool:
    """Reads a whole checkpoint, prints its problems, and returns whether it has none."""
    folder = find_checkpoint(checkpoint, step)
    report = Report()
    with report.collecting_errors():
        _check_files(folder, report)
    num_tensors, num_bytes = 0, 0
    if report.problems:
        # Most problems found now would be consequences of a damaged file that is already reported.
        report.notes.append("the entries are not checked, because files are damaged")
    else:
        with report.collecting_errors():
            stored = StoredCheckpoint(folder)
            _check_averages(stored, report)
            _check_values(stored, report)
            num_tensors, num_bytes = len(stored.index.tensors), sum(map(stored.index.nbytes, stored.index.tensors))
    if as_json:
        summary = {"path": str(folder), "tensors": num_tensors, "bytes": num_bytes}
        print_json(summary | {"problems": report.problems, "notes": report.notes})
        return not report.problems
    for note in report.notes:
        print_stderr(f"note: {note}")
    for problem in report.problems:
        stdout_console().print(problem, markup=False, soft_wrap=True)
    if count := len(report.problems):
        print_stderr(f"{folder}: {count} {'problem' if count == 1 else 'problems'}")
        return False
    contents = f"{num_tensors} tensors, {format_bytes(num_bytes)}"
    stdout_console().print(f"{folder}: no problems found ({contents})", markup=False, soft_wrap=True)
    return True


@dataclass
class Report:
    """The problems of a checkpoint, and notes that are not problems."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def collecting_errors(self) -> Iterator[None]:
        """Records a CheckpointError that ends the block as a problem."""
        try:
            yield
        except CheckpointError as error:
            self.problems.append(str(error))


def _check_files(folder: Path, report: Report) -> None:
    """Checks the sizes and checksums of the files that the manifest lists."""
    manifest = read_manifest(folder)
    if manifest is None:
        report.notes.append(f"{folder} has no manifest (plain dcp.save writes none), so checksums are not checked")
        return
    with progress("checksums", sum(record.size for record in manifest.files.values())) as advance:
        report.problems += verify_files(folder, manifest.files, on_bytes=advance)
    leftovers = [path.name for path in folder.parent.glob("step-*.*") if path.is_dir()]
    if leftovers:
        report.notes.append(
            f"{folder.parent} also holds incomplete or superseded checkpoints: {abbreviated(sorted(leftovers))}"
        )


def _check_averages(stored: StoredCheckpoint, report: Report) -> None:
    """Checks that averages have the names and shapes of a model in the checkpoint."""
    for key_path in stored.index.averages:
        with report.collecting_errors():
            averages = stored.averages[key_path]
            tracks = averages.tracks
            report.notes += [
                f"{note}, in {dotted_name(key_path)!r}"
                for note in map(averages.describe_initial_weights, tracks)
                if note
            ]
            models = {model: stored.index.models[model] for model in stored.matching_models(key_path)}
            if not models:
                report.notes.append(f"{stored.folder} holds no model for the averages in {dotted_name(key_path)!r}")
            for name, track in tracks.items() if models else ():
                mismatches = {model: stored.mismatches(track, tensors) for model, tensors in models.items()}
                if all(mismatches.values()):
                    model, mismatch = next(iter(mismatches.items()))
                    report.problems.append(
                        f"track {name!r} of the averages in {dotted_name(key_path)!r} does not match the model in "
                        f"{dotted_name(model)!r}: {mismatch}"
                    )


def _check_values(stored: StoredCheckpoint, report: Report) -> None:
    """Checks that every value can be read, and that floating tensors are finite."""
    index = stored.index
    must_be_finite = _finite_tensor_names(stored)
    with progress("values", sum(map(index.nbytes, index.tensors))) as advance:
        for name in index.key_paths:
            with report.collecting_errors():
                if name not in index.tensors:
                    stored.read_values([name])
                    continue
                nans, infinities = _count_non_finite(next(stored.stream([name], on_bytes=advance)))
                if nans:
                    report.problems.append(f"{name} holds {nans} NaN")
                if infinities:
                    (report.problems if name in must_be_finite else report.notes).append(
                        f"{name} holds {infinities} infinities"
                    )


def _finite_tensor_names(stored: StoredCheckpoint) -> set[str]:
    """The DCP names of tensors that must be finite: weights, their averages, and the states of optimizers.

    The weights of a model are the tensors that its averages do not list as buffers. Without averages, they are the
    tensors that an optimizer trains. Without either, all tensors count.
    """
    index = stored.index
    finite_names = {name for key_path in index.optimizers for name in index.names_under(key_path)}
    buffers: dict[KeyPath, set[str]] = {}
    for key_path, tracks in index.averages.items():
        for track in tracks.values():
            finite_names |= {*track.averages.values()}
            for model in stored.matching_models(key_path):
                buffers.setdefault(model, set()).update(track.buffers)
    for model, tensors in index.models.items():
        trained = tensors.keys() & index.optimized_names or tensors.keys()
        weight_names = tensors.keys() - buffers[model] if model in buffers else trained
        finite_names |= {tensors[name] for name in weight_names}
    return finite_names


def _count_non_finite(tensor: Tensor) -> tuple[int, int]:
    """The number of NaN and of infinities in a tensor."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    tensor = upcast_float8(tensor)
    if tensor.isfinite().all():
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())
