"""``ema-dist import``: writes averages by another package into files of weights, or a folder to resume from."""

from __future__ import annotations

from pathlib import Path

from ema_dist.checkpoint.importing.detection import KindOrAuto
from ema_dist.checkpoint.importing.writing import Import, ImportFormat
from ema_dist.checkpoint.weighted_sum.write import require_new_folder
from ema_dist.cli.terminal import exit_on_sigterm, print_files, print_json, print_stderr, progress, stdout_console


def import_averages(
    source: Path,
    out: Path,
    *,
    kind: KindOrAuto = "auto",
    reference: Path | None = None,
    file_format: ImportFormat = "safetensors",
    steps: int | None = None,
    as_json: bool = False,
) -> None:
    """Prints what the averages are, writes them, and prints the files.

    Raises: CheckpointError when they cannot be read or do not fit the reference, or ``out`` exists or cannot be
        written; nothing is left there then.
    """
    require_new_folder(out)
    opened = Import.open(source, kind, reference, file_format, steps=steps)
    for note in opened.notes:
        print_stderr(f"note: {note}")
    if not as_json:
        stdout_console().print(_describe(opened), markup=False, soft_wrap=True)
    with exit_on_sigterm(), progress("importing", opened.input_nbytes) as advance:
        paths = opened.write(out, on_bytes=advance)
    sizes = {str(path): path.stat().st_size for path in paths}
    if as_json:
        print_json({**opened.record, "files": sizes})
        return
    print_files(sizes)


def _describe(opened: Import) -> str:
    counts = opened.foreign.counts
    recorded = f"steps {counts.steps}, updates {counts.updates}" if counts.are_recorded else "steps not recorded"
    law = "law not recorded" if counts.law is None else repr(counts.law)
    return f"{opened.foreign.kind}: {len(opened.resolved.meta)} tensors, {recorded}, {law}"
