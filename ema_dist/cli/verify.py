"""``ema-dist verify``: whether a checkpoint is complete, undamaged, finite and consistent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer
from torch import Tensor

from ema_dist.checkpoint.dcp.index import dotted
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.folders import locate
from ema_dist.checkpoint.manifest import problems, read_manifest
from ema_dist.checkpoint.stored_checkpoint import Stored
from ema_dist.checkpoint.values import Path as Place
from ema_dist.checkpoint.weights.casts import calculable
from ema_dist.cli.options import CheckpointArgument, StepOption
from ema_dist.cli.terminal import in_bytes, output, progress, say
from ema_dist.messages import few


def verify(checkpoint: CheckpointArgument, *, step: StepOption = None) -> None:
    """Read all of a checkpoint and tell what is wrong with it: exit code 0 for nothing, 1 with a list on stdout.

    Checked are sizes and checksums of its files (a folder that plain dcp.save wrote has no list of these), its
    metadata, whether every value can be read and is finite, and whether the averages fit the model. Infinities outside
    of weights and optimizers are noted only: masks kept as buffers hold them.
    """
    folder = locate(checkpoint, step)
    report = Report()
    with report.collecting():
        _check_files(folder, report)
    with report.collecting():
        stored = Stored(folder)
        _check_averages(stored, report)
        _check_values(stored, report)
        tensors = stored.outline.tensors
        summary = f"{len(tensors)} tensors, {in_bytes(sum(map(stored.outline.nbytes, tensors)))}"
    for note in report.notes:
        say(f"note: {note}")
    for problem in report.problems:
        output().print(problem, markup=False, soft_wrap=True)
    if count := len(report.problems):
        say(f"{folder}: {count} {'problem' if count == 1 else 'problems'}")
        raise typer.Exit(1)
    output().print(f"{folder}: all is well ({summary})", markup=False, soft_wrap=True)


@dataclass
class Report:
    """What is wrong with a checkpoint, and what is merely worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Whatever makes the checkpoint unreadable inside the block is one more problem."""
        try:
            yield
        except CheckpointError as error:
            self.problems.append(str(error))


def _check_files(folder: Path, report: Report) -> None:
    manifest = read_manifest(folder)
    if manifest is None:
        report.notes.append(f"{folder} has no manifest (plain dcp.save writes none): files are not checked by checksum")
        return
    with progress("checksums", sum(record.size for record in manifest.files.values())) as advance:
        report.problems += problems(folder, manifest.files, on_bytes=advance)
    beside = [path.name for path in folder.parent.glob("step-*.*") if path.is_dir()]
    if beside:
        report.notes.append(f"{folder.parent} also holds what is no complete checkpoint: {few(sorted(beside))}")


def _check_averages(stored: Stored, report: Report) -> None:
    """The averages' names and shapes must be those of a model beside them."""
    for place in stored.outline.averages:
        with report.collecting():
            averages = stored.averages[place]
            tracks = averages.tracks
            if averages.stale:
                report.notes.append(
                    f"the averages in {dotted(place)!r} saw {averages.steps} steps, and no average was taken yet"
                )
            models = {model: stored.outline.models[model] for model in stored.models_of(place)}
            if not models:
                report.notes.append(f"{stored.folder} holds no model for the averages in {dotted(place)!r}")
            for name, track in tracks.items() if models else ():
                unfit = {model: stored.unfit(track, tensors) for model, tensors in models.items()}
                if all(unfit.values()):
                    model, how = next(iter(unfit.items()))
                    report.problems.append(
                        f"track {name!r} of the averages in {dotted(place)!r} does not fit the model in "
                        f"{dotted(model)!r}: {how}"
                    )


def _check_values(stored: Stored, report: Report) -> None:
    """Everything must be readable, and floating tensors finite."""
    outline = stored.outline
    weights = _weights(stored)
    with progress("values", sum(map(outline.nbytes, outline.tensors))) as advance:
        for name in outline.paths:
            with report.collecting():
                if name not in outline.tensors:
                    stored.values([name])
                    continue
                nans, infinities = _not_finite(next(stored.stream([name], on_bytes=advance)))
                if nans:
                    report.problems.append(f"{name} holds {nans} NaN")
                if infinities:
                    (report.problems if name in weights else report.notes).append(
                        f"{name} holds {infinities} infinities"
                    )


def _weights(stored: Stored) -> set[str]:
    """The DCP names of what must never be infinite: weights, their averages, and optimizer states.

    Which of a model's tensors are weights, its averages tell, or its optimizer; if there is neither, all count as such.
    """
    outline = stored.outline
    found = {name for place in outline.optimizers for name in outline.under(place)}
    buffers: dict[Place, set[str]] = {}
    for place, tracks in outline.averages.items():
        for track in tracks.values():
            found |= {*track.averages.values()}
            for model in stored.models_of(place):
                buffers.setdefault(model, set()).update(track.buffers)
    for model, tensors in outline.models.items():
        trained = tensors.keys() & outline.optimized or tensors.keys()
        names = tensors.keys() - buffers[model] if model in buffers else trained
        found |= {tensors[name] for name in names}
    return found


def _not_finite(tensor: Tensor) -> tuple[int, int]:
    """How many NaN and how many infinities are in a tensor."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    tensor = calculable(tensor)
    if tensor.isfinite().all():
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())
