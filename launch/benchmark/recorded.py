"""Results of an earlier run, read from its JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.benchmark.cases import Case, SmallTensors, Transformer
from launch.benchmark.page import Environment


@dataclass(frozen=True)
class Recorded:
    """Everything that `Page.as_json` wrote, with cases as `Case` objects."""

    environment: Environment
    not_measured: list[str]
    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        data = json.loads(path.read_text(), object_hook=_with_case)
        return cls(Environment(**data.pop("environment")), data.pop("not_measured"), data)

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401 - whatever the page has recorded
        return self.data[key]


def _with_case(entry: dict[str, Any]) -> Any:  # noqa: ANN401 - only some entries are cases
    if "shape" in entry and "parallel" in entry:
        shape = entry["shape"]
        return Case(**entry | {"shape": SmallTensors(**shape) if "count" in shape else Transformer(**shape)})
    return entry
