import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.folders import write_folder

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    *("--config.data.crop_size=32", "--config.data.crops_per_class=10"),
    "--config.data.split=6,2,2",
]


def launch(*arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, REPOSITORY / "launch.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=120,
        check=False,
    )


def test_help_fits_a_screen_and_shows_three_examples():
    result = launch("--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 88
    examples = result.stdout.split("examples\n")[1]
    assert examples.count("python launch.py") == 3
    assert launch().stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train"], "--config is missing"),
        (["--config", "configs/none.py"], "there is no file configs/none.py"),
        (["--config"], "--config"),
        (["fly", "--config", "configs/demo.py"], "'fly' is not understood; the verbs are train"),
        (["train", "crop", "--config", "configs/demo.py"], "'crop' is not understood"),
        (["--config", "configs/demo.py", "--wrkdir=x"], "wrkdir"),
        (["--config", "configs/demo.py", "--config.train.epochs=3"], "unknown key"),
        (["--config", "configs/demo.py", "--config.train.num_epochs=many"], "num_epochs"),
        (
            ["--config", "configs/demo.py", "--config.seed=-1", "--config.model.name=x"],
            "2 mistakes",
        ),
        (["--config", "configs/compare.py"], "run `compare` with it, not `train`"),
        (["compare", "--config", "configs/demo.py"], "needs the keys experiments and seeds"),
        (
            ["compare", "--config", "configs/compare.py", "--config.experiments=resnet18,resnet19"],
            "resnet19.py",
        ),
        (["export", "--workdir", "nowhere"], "say `export weights`"),
        (["export", "weights", "--workdir", "nowhere"], "nowhere: no such workdir"),
        (["evaluate"], "--workdir is missing"),
        (["evaluate", "--workdir", "nowhere"], "nowhere: no such workdir"),
    ],
)
def test_wrong_command_lines_are_one_clear_error(arguments, text):
    result = launch(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_a_pattern_that_matches_nothing_is_an_error_before_crops_are_made(tmp_path):
    result = launch(
        *("--config", "configs/demo.py", "--config.optim.freeze=layer9", "--workdir", tmp_path)
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: optim.freeze: 'layer9' matches no parameter")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "crops").exists()


def test_crop_and_check_run_without_jax(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 4, "B": 4})
    blocked = tmp_path / "site"
    (blocked / "jax").mkdir(parents=True)
    (blocked / "jax" / "__init__.py").write_text("raise ImportError('JAX was imported')")
    for verb in ("crop", "check"):
        result = subprocess.run(
            [
                *(sys.executable, REPOSITORY / "launch.py", verb),
                *("--config", REPOSITORY / "configs/default.py", f"--config.data.root={root}"),
                *("--workdir", tmp_path / "run", *SMALL),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{REPOSITORY}"},
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert "reusing 20 verified crops" in result.stderr
    assert "audit passed" in result.stderr
    assert (tmp_path / "run" / "crops.png").stat().st_size > 1000


def test_configs_import_their_neighbours_from_any_folder(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 4, "B": 4})
    result = subprocess.run(
        [
            *(sys.executable, "-c", "from jaxcells.cli import run; run()", "crop"),
            *(f"--config={REPOSITORY / 'configs/resnet18.py'}", f"--config.data.root={root}"),
            *SMALL,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # The default workdir is named after the config.
    assert (tmp_path / "runs" / "resnet18" / "crops" / "manifest.csv").is_file()


def test_crop_size_none_means_whole_images(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 10, "B": 10})
    result = launch(
        *("crop", "--config", "configs/default.py", f"--config.data.root={root}"),
        *("--config.data.crop_size=None", "--workdir", tmp_path / "run"),
    )
    assert result.returncode == 0, result.stderr
    assert "images are used whole" in result.stderr


def test_errors_in_the_images_are_one_line_and_exit_2(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 4, "B": 4})
    (root / "A" / "field0.png").write_bytes(b"not an image")
    result = launch(
        *("check", "--config", "configs/default.py", f"--config.data.root={root}"),
        *("--workdir", tmp_path / "run", *SMALL),
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "A/field0.png" in result.stderr
