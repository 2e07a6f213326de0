"""Builds wheel and sdist, checks them, and runs the quickstart with the wheel in an empty environment.

``tox -e release`` runs it. Nothing is uploaded; the files are left in the folder given as the argument.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = (ROOT / "docs" / "index.md").read_text()
SCRIPT = re.compile(r'^```python title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ema-dist .*", re.MULTILINE)


def main(folder: Path) -> None:
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    require_changelog_entry(version=wheel.name.split("-")[1])
    with TemporaryDirectory() as work:
        environment = Path(work) / "environment"
        venv.create(environment, with_pip=True)
        binaries = environment / "bin"
        run(binaries / "pip", "install", "--no-compile", "-c", ROOT / "constraints.txt", f"{wheel}[cli]", cwd=work)
        run(binaries / "ema-dist", "--version", cwd=work)
        for name, source in SCRIPT.findall(QUICKSTART):
            (Path(work) / name).write_text(source)
            run(binaries / "torchrun", "--nproc-per-node", "2", name, cwd=work)
        for command in COMMAND.findall(QUICKSTART):
            program, *arguments = shlex.split(command, comments=True)
            run(binaries / program, *arguments, cwd=work)
    print(f"{wheel.name} and {sdist.name} could be released")


def require_changelog_entry(version: str) -> None:
    """The newest entry of the changelog is the version that was built."""
    newest = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    if newest != version:
        sys.exit(f"the package is version {version}, but the newest entry of CHANGELOG.md is {newest}")


def run(*command: object, cwd: str | None = None) -> None:
    """Run a command that must succeed, without this checkout on the path."""
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
