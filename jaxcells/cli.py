"""The command line: flags and verbs, one call a verb, expected errors as one clear line."""

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from jaxcells.config import Experiment, expand_comparison, validate
from jaxcells.evaluation.figures import plot_examples
from jaxcells.files import Error, lock_workdir
from jaxcells.workflows.prepare import prepare_crops, prepare_data

logger = logging.getLogger("jaxcells")

_HELP = """\
jaxcells: from folders of microscope images, one per cell line, to a tested classifier.

  python launch.py [VERB] --config FILE [--workdir FOLDER] [--config.KEY=VALUE ...]

verbs
  train      make crops, train, test the best checkpoint once (the default);
             the same command resumes a run that was stopped
  compare    train several networks on the same crops, choose one, test them
  crop       make the crops and their manifest only
  check      make or verify the crops, and audit them for leaks
  evaluate   figures of a trained workdir; --split=train|val|test (default val),
             --checkpoint=best|latest|STEP (default best); --workdir is enough
  export     `export weights --workdir FOLDER [--output FILE]`: for torchvision, timm
  describe   the network as a table of layers and a drawing
  gradients  gradient norms by depth: plain, residual, pre-activation

examples
  python launch.py --config configs/demo.py
  python launch.py --config configs/resnet34.py --config.data.root=FOLDER
  python launch.py evaluate --workdir runs/resnet34 --split=test

FOLDER has one sub-folder per class, each with images, or with one sub-folder of
images per channel. Results go to --workdir, by default runs/<name of the config>:
results.json, predictions_test.csv, curves.png, confusion.png, crops/, checkpoints/.
Every key is explained in configs/default.py.
"""


class _AboveBars(logging.Handler):
    """Writes to standard error without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"WARNING: {text}"
        tqdm.write(text, file=sys.stderr)


def set_up_logging(*, quiet: bool = False) -> None:
    """Sends our own lines to standard error and keeps other libraries' to warnings.

    Args:
      quiet: warnings only, for all processes of a run but the first.
    """
    logger.handlers = [_AboveBars()]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


_FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The experiment: a file that defines get_config().")
flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<name of the config>.")
flags.DEFINE_string("split", "val", "For evaluate: train, val or test.")
flags.DEFINE_string("checkpoint", "best", "For evaluate and export: best, latest or a step.")
flags.DEFINE_string("output", None, "For export: the file; default FOLDER/weights.safetensors.")


def run() -> None:
    """Runs the command line and exits: 0 done, 2 an expected error, 128 + n stopped by signal n.

    Arguments are those of `sys.argv`, where the config library looks for them too.
    """
    sys.exit(_run())


def _run() -> int:
    set_up_logging()
    if len(sys.argv) < 2 or {"-h", "--help", "-help", "help"} & set(sys.argv[1:]):
        print(_HELP, end="")
        return 0
    try:
        _dispatch(sys.argv)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        where = f"{error.filename}: " if error.filename else ""
        todo = "; make room and run the same command again" if full else ""
        print(f"error: {where}{error.strerror}{todo}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _dispatch(argv: Sequence[str]) -> None:
    verb = _parse(argv)
    if verb in _WORKDIR_VERBS:
        _WORKDIR_VERBS[verb]()
        return
    config = _config()
    if "experiments" in config and verb in ("crop", "check"):
        config, _ = _comparison(config)
    elif "experiments" in config and verb != "compare":
        raise Error(f"this config is of a comparison; run `compare` with it, not `{verb}`")
    elif verb != "compare":
        validate(config)
    _CONFIG_VERBS[verb](config, _workdir())


def _parse(argv: Sequence[str]) -> str:
    """Parses the flags and returns the verb."""
    # A config may import its neighbours as `configs.NAME`, whatever the current folder.
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if match:
            path = Path(match[1] or following)
            if not path.is_file():
                raise Error(f"--config: there is no file {path}; configs/ holds ours")
            sys.path.insert(0, str(path.resolve().parent.parent))
    # The flag library has no notation for "none" in a whole number.
    argv = [re.sub(r"^(--?config\.data\.crop_size)=None$", r"\1=0", text) for text in argv]
    try:
        rest = _FLAGS(argv)[1:]
    except flags.Error as error:
        raise Error(f"{error}; see --help") from error
    except (AttributeError, KeyError) as error:  # how the config library reports an unknown key
        text = " ".join(str(error).strip("\"'").replace("\\'", "'").split())
        if "get_config" in text:
            raise Error(
                "--config: the file defines no get_config(); see configs/default.py"
            ) from error
        raise Error(f"unknown key in --config.KEY=VALUE: {text}; see configs/default.py") from error
    verb, *rest = rest or ["train"]
    if verb == "export" and rest[:1] == ["weights"]:
        rest = rest[1:]
    elif verb == "export":
        raise Error("export what? say `export weights`; see --help")
    verbs = [*_CONFIG_VERBS, *_WORKDIR_VERBS]
    if verb not in verbs or rest:
        odd = rest[0] if verb in verbs else verb
        raise Error(f"{odd!r} is not understood; the verbs are {', '.join(verbs)}; see --help")
    return verb


def _config() -> ConfigDict:
    if _FLAGS.config is None:
        raise Error("--config is missing; for instance --config configs/demo.py, see --help")
    config: ConfigDict = _FLAGS.config
    config.lock()
    return config


def _workdir() -> Path:
    if _FLAGS.workdir is not None:
        return Path(_FLAGS.workdir).expanduser()
    if _FLAGS.config is None:
        raise Error("--workdir is missing; give the folder of a run, see --help")
    return Path("runs", Path(_FLAGS["config"].config_filename).stem)


def _comparison(config: ConfigDict) -> tuple[ConfigDict, list[Experiment]]:
    """Returns the config of the crops, and the experiments, whose files lie beside it."""
    folder = Path(_FLAGS["config"].config_filename).resolve().parent
    return expand_comparison(config, folder)


def _train(config: ConfigDict, workdir: Path) -> None:
    with _training():
        from jaxcells.workflows.train import train_and_evaluate

        train_and_evaluate(config, workdir)


def _compare(config: ConfigDict, workdir: Path) -> None:
    base, experiments = _comparison(config)
    with _training():
        from jaxcells.workflows.compare import compare

        compare(base, experiments, workdir)


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Joins the processes of a run, and exits as a shell expects when a signal stopped it."""
    from jaxcells.training.mesh import initialize_distributed

    initialize_distributed()
    import jax

    from jaxcells.training.signals import Interrupted

    set_up_logging(quiet=jax.process_index() > 0)
    try:
        yield
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)


def _describe(config: ConfigDict, workdir: Path) -> None:
    from jaxcells.workflows.describe import describe

    describe(config, workdir)


def _gradients(config: ConfigDict, workdir: Path) -> None:
    from jaxcells.workflows.gradients import compare_gradients

    compare_gradients(config, workdir)


def _crop(config: ConfigDict, workdir: Path) -> None:
    with lock_workdir(workdir):
        prepare_crops(config, workdir)


def _check(config: ConfigDict, workdir: Path) -> None:
    with lock_workdir(workdir):
        data = prepare_data(config, workdir)
        train, path = data.arrays["train"], workdir / "crops.png"
        plot_examples(train.images, train.labels, data.crop_set.class_names, path)
        logger.info("crops of every class are shown in %s", path)
        data.audit.raise_errors()


def _evaluate() -> None:
    from jaxcells.workflows.train import check_config, evaluate

    workdir = _trained_workdir()
    if _FLAGS.config is not None:
        check_config(_config(), workdir)
    evaluate(workdir, split=_FLAGS.split, which=_which())


def _export() -> None:
    from jaxcells.workflows.export import export_weights

    output = None if _FLAGS.output is None else Path(_FLAGS.output).expanduser()
    export_weights(_trained_workdir(), output, which=_which())


def _trained_workdir() -> Path:
    workdir = _workdir()
    if not workdir.is_dir():
        raise Error(f"{workdir}: no such workdir; train first, or give the folder of a run")
    trainings = sorted(path.name for path in (workdir / "experiments").glob("*"))
    if trainings:
        raise Error(
            f"{workdir} is a comparison; give one of its trainings, --workdir "
            f"{workdir / 'experiments' / trainings[0]} ({', '.join(trainings)})"
        )
    return workdir


def _which() -> int | Literal["best", "latest"]:
    which = _FLAGS.checkpoint
    if which in ("best", "latest"):
        return which
    if not which.isdecimal():
        raise Error(f"--checkpoint={which} must be best, latest or a step")
    return int(which)


_CONFIG_VERBS: dict[str, Callable[[ConfigDict, Path], None]] = {
    "train": _train,
    "compare": _compare,
    "crop": _crop,
    "check": _check,
    "describe": _describe,
    "gradients": _gradients,
}
_WORKDIR_VERBS: dict[str, Callable[[], None]] = {"evaluate": _evaluate, "export": _export}
