"""The first command of the README: the sample is hard for brightness, not for a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_demo_tells_the_simulated_lines_apart_on_fields_it_never_saw(tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, str(REPOSITORY / "launch.py")),
            *("--config", str(REPOSITORY / "configs/demo.py"), "--workdir", str(tmp_path / "demo")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["data"]["audit"]["errors"] == []
    assert results["data"]["split_by"] == "field"
    assert results["test"]["accuracy"] > 0.90
    assert results["evidence"]["baselines"]["brightness"]["accuracy"] < 0.60
    assert results["test"]["interval_note"] is None
