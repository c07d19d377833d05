"""What a result depends on besides the config: versions, devices, and the state of the code."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxcells


def describe_environment() -> dict[str, Any]:
    """Returns versions of Python and of every dependency, the platform and the git commit."""
    names = [
        requirement.split(";")[0].split("[")[0].strip(" ()<>=!~.0123456789,")
        for requirement in importlib.metadata.requires("jaxcells") or []
        if "extra ==" not in requirement
    ]
    return {
        "jaxcells": jaxcells.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "dependencies": {name: _version(name) for name in sorted({*names, "jaxlib"})},
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Returns the commit of the source tree, with "+changes" if files differ from it."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent.parent
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).parent.parent.resolve():
            return None  # installed into somebody else's repository
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
