"""Rules of the whole tree: imports in one direction, small files, one test command."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_BYTES = 500_000

# Who may import whom. Everyone may import the SMALL ones, which import nothing but one another, and
# a room its own modules.
MAY_IMPORT = {
    "data": [],
    "models": [],
    "training": ["data", "models"],
    # Evaluation runs a trained network, but neither optimisers nor the loop.
    "evaluation": [
        "data",
        "models",
        *(f"training.{m}" for m in ("checkpoints", "mesh", "state", "steps")),
    ],
    "config": ["data"],
    "workflows": ["config", "data", "models", "training", "evaluation"],
    "cli": ["config", "data", "models", "training", "evaluation", "workflows"],
}
SMALL = ("__init__", "environment", "files", "text")


def tracked_files():
    """Every file that git holds or would add; skips outside a clone."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    names = [name for name in out.decode().split("\0") if name]
    assert names
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def module_name(path):
    """`jaxcells/data/crops.py` is "data.crops", `jaxcells/data/__init__.py` "data.__init__"."""
    return ".".join(path.relative_to(ROOT / "jaxcells").with_suffix("").parts)


def modules():
    return {module_name(path): path for path in sorted((ROOT / "jaxcells").rglob("*.py"))}


def imported(name, known):
    """Our modules that a module imports, anywhere in its text: inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            full_names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import in line {node.lineno}"
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {resolved(full, known) for full in full_names if full.split(".")[0] == "jaxcells"}
    return found


def resolved(full_name, known):
    """`jaxcells.models.create_model` and `jaxcells.models` are both "models.__init__"."""
    parts = full_name.split(".")[1:]
    for length in range(len(parts), -1, -1):
        for candidate in (".".join(parts[:length]), ".".join([*parts[:length], "__init__"])):
            if candidate in known:
                return candidate
    raise AssertionError(full_name)


def within(name, place):
    return name == place or name.startswith(place + ".")


def test_names_are_resolved():
    known = dict.fromkeys(["__init__", "errors", "models.__init__", "models.resnet"])
    assert resolved("jaxcells", known) == "__init__"
    assert resolved("jaxcells.Error", known) == "__init__"
    assert resolved("jaxcells.errors.Error", known) == "errors"
    assert resolved("jaxcells.models.create_model", known) == "models.__init__"
    assert resolved("jaxcells.models.resnet", known) == "models.resnet"


def test_imports_go_in_one_direction():
    known = modules()
    wrong = []
    for name in known:
        places = [place for place in (*MAY_IMPORT, *SMALL) if within(name, place)]
        assert places, f"jaxcells/{name}: add it to MAY_IMPORT"
        allowed = [places[0], *SMALL, *MAY_IMPORT.get(places[0], [])]
        wrong += [
            f"{name} imports {target}"
            for target in imported(name, known)
            if not any(within(target, place) for place in allowed)
        ]
    assert not wrong


def test_imports_make_no_circle():
    known = modules()
    graph = {name: imported(name, known) - {name} for name in known}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(known)


def test_data_never_imports_jax():
    names = ["jaxcells"] + [
        f"jaxcells.{name}".removesuffix(".__init__") for name in modules() if within(name, "data")
    ]
    assert len(names) > 5
    code = f"""
import importlib, sys
for blocked in ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "torch"):
    sys.modules[blocked] = None  # importing it now fails, as on a machine without it
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_tracked_file_is_large():
    sizes = {path: path.stat().st_size for path in tracked_files()}
    assert not {path.name: size for path, size in sizes.items() if size > MAX_BYTES}


def test_no_file_holds_a_note_to_self_or_a_path_of_one_machine():
    # In pieces, so that this file does not hold them.
    notes = rf"\b({'TO' + 'DO'}|{'FIX' + 'ME'}|{'XX' + 'X'})\b"
    paths = rf"(?<![\w.])/({'ro' + 'ot'}|{'wo' + 'rk'}|{'ho' + 'me'}|{'Us' + 'ers'})/\w"
    temporary = rf"(?<![\w.])/{'t' + 'mp'}/\w"
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content[:8000]:
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            if re.search(f"{notes}|{paths}|{temporary}", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_continuous_integration_runs_the_command_of_the_readme_and_the_slow_tests():
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    in_readme = [line for line in "".join(blocks).splitlines() if "pytest" in line]
    in_ci = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "pytest" in line]
    assert in_ci == [*in_readme, ".venv/bin/pytest -m slow"]
    assert in_ci[0].startswith("python3 -m venv .venv && ")


def test_constraints_are_plain_and_meet_the_requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), lines
    pinned = dict(line.split("==") for line in lines)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.search(r"^dependencies = \[.*?^\]", project, re.M | re.S)[0]
    required += re.search(r"^test = \[.*?^\]", project, re.M | re.S)[0]
    for name in re.findall(r'^  "([\w.-]+)', required, re.M):
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned, name
    assert pinned["jax"] not in ("0.10.2", "0.11.0")  # these miscompile on the CPU


def test_version_is_the_same_everywhere():
    version = re.search(r'__version__ = "(.*)"', (ROOT / "jaxcells/__init__.py").read_text())[1]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
