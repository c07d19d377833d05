import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcells import cli
from tests.data.folders import write_folder

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    *("--config.data.crop_size=32", "--config.data.crops_per_class=10"),
    "--config.data.split=6,2,2",
]


@pytest.fixture
def launch(monkeypatch, capsys):
    """Runs a command line in this process; returns its exit code and what it printed."""
    logger = logging.getLogger("jaxcells")
    before = (logger.handlers, logger.propagate, logger.level)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.run()
        return exit_.value.code, *capsys.readouterr()

    yield call
    logger.handlers, logger.propagate, logger.level = before


def test_help_fits_a_screen_and_shows_three_examples(launch):
    code, out, _ = launch("--help")
    assert code == 0
    assert len(out.splitlines()) <= 30
    assert max(map(len, out.splitlines())) <= 88
    assert out.split("examples\n")[1].count("python launch.py") == 3
    assert launch()[:2] == (code, out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("train", "--config is missing"),
        ("--config.train.num_epochs=3", "--config is missing"),
        ("--config configs/none.py", "there is no file configs/none.py, nor a config of ours"),
        ("--config", "--config"),
        ("fly --config demo", "'fly' is not understood; give one verb of train"),
        ("train crop --config demo", "'train crop' is not understood; give one verb of train"),
        ("--config demo --config.num_epochs=3", "did you mean --config.train.num_epochs? See"),
        ("--config demo --config.quux=3", "--config.quux is not a key; see configs/default.py"),
        ("--config demo --config.seeds=3", "seeds is not a key; did you mean --config.seed?"),
        ("--config demo --config.seed=1 --config.seed=1", "--config.seed is given twice"),
        ("--config demo --config.data=x", "--config.data is a group of keys, such as data.augment"),
        ("--config demo --config.data.augment.dihedral=yes", "=yes must be True or False"),
        ("--config demo --config.optim.momentum=x", "--config.optim.momentum=x must be a number"),
        (r"--config demo --config.data.exclude=\d(", r"--config.data.exclude='\d(' must be"),
        ("--config demo --workdir=", "--workdir= must be a folder"),
        ("--config demo --workdir=README.md", "--workdir=README.md must be a folder"),
        ("--config demo --wrkdir=x", "wrkdir"),
        ("--config demo --config.train.epochs=3", "did you mean --config.train.num_epochs?"),
        ("--config demo --config.train.num_epochs=many", "=many must be a whole number"),
        ("--config demo --config.seed=-1 --config.train.batch_size=1", "2 mistakes"),
        ("--config demo --config.data.source=folder", "set --config.data.root=FOLDER"),
        ("--config compare", "run `compare` with it, not `train`"),
        ("compare --config demo", "needs the keys experiments and seeds"),
        ("compare --config compare --config.experiments=resnet19", "no file resnet19"),
        ("export --workdir nowhere", "export weights, export tfds; see --help"),
        ("export weights --workdir nowhere", "nowhere: no such workdir"),
        ("evaluate", "--workdir is missing"),
        ("evaluate --workdir configs --checkpoint=first", "must be best, latest or a step"),
        (
            "--config demo --config.model.name=resnet35",
            "--config.model.name=resnet35 is no network",
        ),
        ("--config demo --config.optim.freeze=layer9", "'layer9' matches no parameter"),
    ],
)
def test_wrong_command_lines_are_one_clear_error(launch, arguments, text, tmp_path):
    workdir = [] if "workdir" in text + arguments else ["--workdir", tmp_path / "run"]
    code, _, error = launch(*arguments.split(), *(workdir if "demo" in arguments else []))
    assert code == 2
    assert error.startswith("error: ")
    assert text in error
    assert "mistake" in error or error.count("\n") == 1
    assert not (tmp_path / "run" / "crops").exists()


def test_keys_in_messages_are_spelt_as_flags():
    said = cli._with_flags("set data.root=X or init=random (seed=1), not data.seed or x.init=2")
    assert said == (
        "set --config.data.root=X or --config.init=random (--config.seed=1), "
        "not data.seed or x.init=2"
    )
    assert cli._with_flags("choose another workdir") == "choose another --workdir"


def test_a_refused_command_leaves_no_folder(launch, tmp_path):
    root = write_folder(tmp_path / "images", {"A": 4, "B": 4})
    for folder, wrong in ((root / "run", root), (tmp_path / "run", tmp_path / "nowhere")):
        arguments = ("crop", "--config", "default", f"--config.data.root={wrong}", *SMALL)
        assert launch(*arguments, "--workdir", folder)[0] == 2
        assert not folder.exists()


def test_warnings_say_so_once(launch, capsys):
    launch("--help")
    cli._set_up_logging()
    logging.getLogger("jaxcells").warning("note: outlines")
    logging.getLogger("jaxcells").info("note: images")
    assert capsys.readouterr().err == "WARNING: outlines\nnote: images\n"


def test_crop_and_check_run_without_jax_and_by_name_from_any_folder(tmp_path):
    root = write_folder(tmp_path / "images", {"A": 4, "B": 4})
    blocked = tmp_path / "site"
    (blocked / "jax").mkdir(parents=True)
    (blocked / "jax" / "__init__.py").write_text("raise ImportError('JAX was imported')")
    for verb in ("crop", "check"):
        result = subprocess.run(
            [
                *(sys.executable, "-c", "from jaxcells.cli import run; run()", verb),
                *("--config", "resnet18", f"--config.data.root={root}", *SMALL),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{REPOSITORY}"},
            cwd=tmp_path,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    assert "audit passed" in result.stderr
    # The default workdir is named after the config.
    assert (tmp_path / "runs" / "resnet18" / "crops" / "manifest.csv").is_file()
    assert (tmp_path / "runs" / "resnet18" / "crops.png").stat().st_size > 1000


def test_errors_in_the_images_are_one_line_and_exit_2(launch, tmp_path):
    root = write_folder(tmp_path / "images", {"A": 4, "B": 4})
    (root / "A" / "field0.png").write_bytes(b"not an image")
    code, _, error = launch(
        *("check", "--config", "default", f"--config.data.root={root}"),
        *("--workdir", tmp_path / "run", *SMALL),
    )
    assert code == 2
    assert error.count("\n") == 1
    assert "A/field0.png" in error
