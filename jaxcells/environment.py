"""What a result depends on besides the config: versions, and the state of the code."""

import platform
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import jaxcells


def describe_environment() -> dict[str, Any]:
    """Returns versions of Python and of every dependency, the platform and the git commit."""
    required = requires("jaxcells") or []
    names = {re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line}
    return {
        "jaxcells": jaxcells.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "dependencies": {name: version(name) for name in sorted({*names, "jaxlib"})},
        "git_commit": _git_commit(Path(__file__).resolve().parents[1]),
        "command": sys.argv,
    }


def _git_commit(folder: Path) -> str | None:
    """Returns the commit of the source tree, with "+changes" if files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=10).decode()

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != folder:
            return None  # installed into somebody else's repository
        changes = "+changes" if git("status", "--porcelain") else ""
        return git("rev-parse", "HEAD").strip() + changes
    except (OSError, subprocess.SubprocessError):
        return None
