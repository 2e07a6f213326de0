"""The start of `ema-dist`: help, usage errors and completion without torch, and the check of required packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from ema_dist.cli import REQUIRED_PACKAGES

RUN_AND_LIST_IMPORTS = """
import atexit, sys
sys.argv[0] = "ema-dist"
from ema_dist.cli import main
slow = {"torch", "safetensors", "huggingface_hub", "xxhash"}
atexit.register(lambda: print("imported:", sorted(slow & {*sys.modules}), file=sys.stderr))
main()
"""
RUN_WITHOUT_A_PACKAGE = """
import sys
sys.modules[sys.argv.pop(1)] = None
from ema_dist.cli import main
main()
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "printed"),
    [
        ([], 2, "inspect"),
        (["--help"], 0, "inspect"),
        (["export", "--help"], 0, "SIZE"),
        (["export", "checkpoints"], 2, "OUT"),
        (["export", "checkpoints", "out", "--dtype", "int8"], 2, "'int8'"),
    ],
)
def test_help_and_usage_errors_do_not_import_torch(arguments: list[str], code: int, printed: str) -> None:
    result = run_python(RUN_AND_LIST_IMPORTS, *arguments)
    assert result.returncode == code
    assert printed in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize(
    ("line", "word", "expected"),
    [
        ("ema-dist ", 1, ["inspect", "export", "verify", "diff", "merge", "reconstruct", "import"]),
        ("ema-dist ver", 1, ["verify"]),
        ("ema-dist export checkpoints out --max", 4, ["--max-shard-size"]),
        ("ema-dist export checkpoints out --max-shard-size 1GB --weights l", 7, ["live"]),
    ],
)
def test_shell_completion_does_not_import_torch(line: str, word: int, expected: list[str]) -> None:
    environment = {"_EMA_DIST_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(word)}
    result = run_python(RUN_AND_LIST_IMPORTS, **environment)
    assert result.stdout.split() == expected
    assert result.stderr == "imported: []\n"


def test_the_completion_script_is_that_of_the_installed_command() -> None:
    """`python -m ema_dist.cli` has another name in `sys.argv`."""
    command = [sys.executable, "-m", "ema_dist.cli"]
    environment = os.environ | {"_EMA_DIST_COMPLETE": "source_bash"}
    script = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "_EMA_DIST_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith(" ema-dist")


@pytest.mark.parametrize("name", REQUIRED_PACKAGES)
def test_without_the_extra_it_says_what_to_install(name: str) -> None:
    result = run_python(RUN_WITHOUT_A_PACKAGE, name, "--help")
    assert result.returncode == 1
    assert re.search(rf"\b{name}\b.*pip install {name}", result.stderr)
    assert "Traceback" not in result.stderr
