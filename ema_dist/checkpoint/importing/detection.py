"""Opens averages of another package; the format is detected from the content of the file or folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from ema_dist.checkpoint.dcp.checkpoint_index import dotted_name
from ema_dist.checkpoint.dcp.metadata import METADATA_FILE
from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.importing import folder_formats, torch_formats
from ema_dist.checkpoint.importing.foreign_averages import ForeignAverages, Kind
from ema_dist.checkpoint.importing.torch_files import is_torch_file, load_torch_file
from ema_dist.checkpoint.stored_checkpoint import StoredCheckpoint
from ema_dist.messages import abbreviated

KindOrAuto = Literal["auto"] | Kind

_FILE_FORMATS: list[tuple[Kind, Callable[[Mapping[str, Any], Path], ForeignAverages | None]]] = [
    ("lightning", torch_formats.lightning),
    ("nemo", torch_formats.nemo),
    ("timm", torch_formats.timm),
    ("composer", torch_formats.composer),
    ("averaged-model", torch_formats.averaged_model),
    ("diffusers", torch_formats.diffusers_state),
    ("ema-pytorch", torch_formats.ema_pytorch),
]
_FOLDER_FORMATS: list[tuple[Kind, Callable[[Path], ForeignAverages | None]]] = [
    ("torchtitan", folder_formats.torchtitan),
    ("diffusers", folder_formats.diffusers_folder),
]


def open_averages(path: Path, kind: KindOrAuto = "auto") -> ForeignAverages:
    """Open the averages in a file or folder; nothing in it is run.

    Args:
        kind: the format; ``"auto"`` detects it from the content.

    Raises: CheckpointError when it cannot be read or holds no averages in a known format; ValueError for an unknown
        ``kind``.
    """
    require_known(kind)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    found: list[tuple[str, ForeignAverages]] = []
    if path.is_dir():
        found = [("", it) for name, read in _FOLDER_FORMATS if kind in ("auto", name) and (it := read(path))]
    elif is_torch_file(path):
        found = _in_content(load_torch_file(path), path, kind)
    if not found:
        expected = "averages in a known format" if kind == "auto" else f"averages in the format {kind!r}"
        raise CheckpointError(f"expected {expected} in {path}, found {_describe_content(path)}")
    if len(found) > 1:
        described = [f"{it.kind}{key and f' under the key {key!r}'}" for key, it in found]
        choice = "choose one format by `kind` (--from), or " if len({it.kind for _, it in found}) > 1 else ""
        raise CheckpointError(
            f"{path} holds {len(found)} averages, {abbreviated(described)}: {choice}save only the averages that you "
            "want in a separate file"
        )
    ((_, averages),) = found
    if not averages.listed and not (averages.tensors and averages.tensors.meta):
        raise CheckpointError(f"{path} has averages in the format {averages.kind!r}, but they hold no tensors")
    return averages


def require_known(kind: str) -> None:
    """Raise ValueError unless ``kind`` is a format, or ``"auto"``."""
    if kind not in ("auto", *get_args(Kind)):
        raise ValueError(f"expected kind to be one of {abbreviated(['auto', *get_args(Kind)])}, got {kind!r}")


def _in_content(content: Any, path: Path, kind: KindOrAuto) -> list[tuple[str, ForeignAverages]]:
    """The averages in the content of a file, or else in its entries, each with the key of its entry.

    People save averages in one file with other things.
    """
    entries = content.items() if isinstance(content, Mapping) else ()
    for candidates in ([("", content)], entries):
        if found := [(str(key), it) for key, mapping in candidates for it in _in_mapping(mapping, path, kind)]:
            return found
    return []


def _in_mapping(content: Any, path: Path, kind: KindOrAuto) -> Iterator[ForeignAverages]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return
    for name, read in _FILE_FORMATS:
        if kind in ("auto", name):
            try:
                averages = read(content, path)
            except (AttributeError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} looks like the format {name!r}, but is damaged: {error!r}") from error
            if averages:
                yield averages


def _describe_content(path: Path) -> str:
    """What a file or folder holds instead of averages, and what to do with it."""
    if path.is_dir() and (path / METADATA_FILE).exists():
        index = StoredCheckpoint(path).index
        names = [f"{kind} {dotted_name(key_path)!r}" for key_path, kind in index.entries()]
        advice = "; ema-dist export and checkpoint.load read the averages of ShardedEMA as they are"
        return f"a DCP checkpoint with {abbreviated(names) or 'nothing'}{advice if index.averages else ''}"
    if path.is_dir():
        names = sorted(it.name for it in path.iterdir())
        return f"a folder with {abbreviated(names) or 'nothing'}, without averages of diffusers or torchtitan"
    if not is_torch_file(path):
        return "a file that torch.save did not write (a safetensors file holds weights without averages)"
    content = load_torch_file(path)
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    tensors = sum(isinstance(value, Tensor) for value in content.values())
    described = f"{tensors} tensors" if tensors == len(content) else f"the keys {abbreviated(map(str, content))}"
    return f"{described}: weights without averages? ema-dist merge and diff read those"
