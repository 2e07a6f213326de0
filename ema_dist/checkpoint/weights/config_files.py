"""The files beside weights that `from_pretrained` reads: configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

from ema_dist.checkpoint.errors import CheckpointError
from ema_dist.checkpoint.weights.formats import INDEX_SUFFIX

CONFIG_SUFFIXES = (".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt", ".vocab")
"""Configuration, vocabularies and chat templates; no weights, and no code."""


def config_files(folder: Path) -> list[Path]:
    """The files of configuration and tokenizer in a folder, without its subfolders and the indices of weights.

    Raises: CheckpointError when there are none.
    """
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in names if path.suffix in CONFIG_SUFFIXES and path.is_file()]
    files = [path for path in files if not path.name.endswith(INDEX_SUFFIX)]
    if not files:
        found = f"found {len(names)} other files" if names else "found no such folder, or an empty one"
        raise CheckpointError(
            f"expected configuration files such as config.json in {folder}, {found}; give the folder of the model "
            "that was trained"
        )
    return files
