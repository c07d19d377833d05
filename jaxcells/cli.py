"""jaxcells: from folders of microscope images, one per cell line, to a tested classifier.

  python launch.py [VERB] --config CONFIG [--workdir FOLDER] [--config.KEY=VALUE ...]

verbs
  train      make crops, train, test the best checkpoint once (the default);
             the same command resumes a run that was stopped
  compare    train several networks on the same crops, choose one, test them
  cross_validate   test every field once, by a network that never saw it
  crop       make the crops and their manifest only
  check      make or verify the crops, and audit them for leaks
  evaluate   figures of a trained workdir; --split=train|val|test (default val),
             --checkpoint=best|latest|STEP (default best); --workdir is enough
  report     report.html of a finished run, comparison or cross-validation again;
             --workdir is enough
  export     `export weights --workdir FOLDER [--output FILE]`: for torchvision, timm;
             `export tfds`: the crops as a TensorFlow Datasets data set
  describe   the network as a table of layers and a drawing
  gradients  gradient norms by depth: plain, residual, pre-activation

examples
  python launch.py --config configs/demo.py
  python launch.py --config resnet34 --config.data.root=FOLDER
  python launch.py evaluate --workdir runs/resnet34 --split=test

CONFIG is a file, or the name of one of ours. FOLDER has one sub-folder per class, each
with images, or with one sub-folder of images per channel. Results go to --workdir, by
default runs/<name of the config>. Every key is explained in configs/default.py.
"""

import contextlib
import difflib
import errno
import functools
import importlib
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from jaxcells.config import (
    default_config,
    expand_comparison,
    expand_cross_validation,
    find_config,
    flatten,
    load_config,
    validate,
)
from jaxcells.files import Error, Workdir, logger
from jaxcells.text import some

# Module and function of every verb. They are imported when used: `crop` works without JAX, and help
# is quick.
_CONFIG_VERBS = {
    "train": ("train", "train_and_evaluate"),
    "compare": ("compare", "compare"),
    "cross_validate": ("cross_validate", "cross_validate"),
    "crop": ("prepare", "crop"),
    "check": ("prepare", "check"),
    "describe": ("describe", "describe"),
    "gradients": ("gradients", "compare_gradients"),
}
_WORKDIR_VERBS = {
    "evaluate": ("evaluate", "evaluate"),
    "report": ("report", "report"),
    "export weights": ("export", "export_weights"),
    "export tfds": ("export", "export_tfds"),
}
_MORE_KEYS = ("experiments", "seeds", "fractions", "experiment", "folds", "keep_test")
# What a value must be that cannot be read as what its key's default is.
_VALUES = {bool: "True or False", int: "a whole number", float: "a number"}
_NO_CONFIG = "--config is missing; for instance --config demo, see --help"


def run() -> None:
    """Runs the command line and exits: 0 done, 2 an expected error, 128 + n stopped by signal n."""
    sys.exit(_run())


def _run() -> int:
    _set_up_logging()
    if len(sys.argv) < 2 or {"-h", "--help", "-help", "help"} & set(sys.argv[1:]):
        print(__doc__, end="")
        return 0
    try:
        _dispatch()
    except Error as error:
        print(f"error: {_with_flags(str(error))}", file=sys.stderr)
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


def _dispatch() -> None:
    verb, args = _parse()
    if verb in _WORKDIR_VERBS:
        _use_trained(verb, args)
        return
    config, workdir = _config(args), _workdir(args)
    more: list[Any] = []
    folder = Path(args["config"].config_filename).parent
    if verb == "cross_validate":
        config, *more = expand_cross_validation(config, folder)
    elif verb == "compare":
        config, *more = expand_comparison(config, folder)
    elif "experiments" in config and verb in ("crop", "check"):
        config, _ = expand_comparison(config, folder)
    elif "experiments" in config or "folds" in config:
        other = "compare" if "experiments" in config else "cross_validate"
        raise Error(f"this config is for another verb; run `{other}` with it, not `{verb}`")
    else:
        validate(config)
    _workflow("prepare", "check_place")(config, workdir)
    trains = verb in ("train", "compare", "cross_validate")
    with _training() if trains else contextlib.nullcontext():
        _workflow(*_CONFIG_VERBS[verb])(config, *more, workdir)


def _use_trained(verb: str, args: flags.FlagValues) -> None:
    """Runs a verb that needs a trained workdir and nothing else."""
    workdir = _workdir(args)
    if not workdir.path.is_dir():
        raise Error(f"{workdir}: no such workdir; train first, or give the folder of a run")
    runs = [*workdir.experiments.glob("*"), *workdir.folds.glob("*")]
    if runs and verb != "report":
        raise Error(
            f"{workdir} is of several runs; give the workdir of one of them, such as {min(runs)} "
            f"(there are {', '.join(sorted(run.name for run in runs))})"
        )
    output = None if args.output is None else Path(args.output).expanduser()
    arguments: dict[str, dict[str, Any]] = {
        "report": {},
        "evaluate": {"split": args.split, "which": _checkpoint(args)},
        "export weights": {"output": output, "which": _checkpoint(args)},
        "export tfds": {"output": output},
    }
    if args.config is not None:
        _workflow("train", "check_config")(_config(args), workdir)
    _workflow(*_WORKDIR_VERBS[verb])(workdir, **arguments[verb])


def _workflow(module: str, function: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"jaxcells.workflows.{module}"), function)


def _parse() -> tuple[str, flags.FlagValues]:
    """Returns the verb and the flags of `sys.argv`, where the config library looks for them too."""
    args = flags.FlagValues()
    define = functools.partial(flags.DEFINE_string, flag_values=args)
    config_flags.DEFINE_config_file("config", None, "The experiment.", flag_values=args)
    define("workdir", None, "Folder of the run; default runs/<name of the config>.")
    define("split", "val", "For evaluate: train, val or test.")
    define("checkpoint", "best", "For evaluate and export: best, latest or a step.")
    define("output", None, "For export: the file or folder; by default in the workdir.")

    # `--config NAME` in one word, and NAME as a path.
    text = re.sub(r"\0--?config\0", "\0--config=", "\0".join(sys.argv))
    sys.argv = text.split("\0")
    known: dict[str, Any] = {}
    for number, argument in enumerate(sys.argv):
        if re.match(r"--?config=", argument):
            path = find_config(argument.partition("=")[2])
            known = flatten(load_config(path))
            _check_keys(known)
            sys.argv[number] = f"--config={path}"
    try:
        words = args(sys.argv)[1:] or ["train"]
    except flags.IllegalFlagValueError as error:
        flag = re.match(r"flag --(config\.(\S+)=.*?): ", str(error), re.DOTALL)
        must_be = _VALUES.get(type(known[flag[2]])) if flag else None
        raise Error(f"--{flag[1]} must be {must_be}" if flag and must_be else str(error)) from error
    except flags.Error as error:
        raise Error(f"{error}; see --help" if known else _NO_CONFIG) from error
    verb, verbs = " ".join(words), (*_CONFIG_VERBS, *_WORKDIR_VERBS)
    if verb not in verbs:
        raise Error(f"{verb!r} is not understood; give one verb of {', '.join(verbs)}; see --help")
    return verb, args


def _check_keys(known: Collection[str]) -> None:
    """Refuses keys of the command line that are not known, or are given twice."""
    given = re.findall(r"\0--?config\.([^=\0]*)", "\0".join(sys.argv))
    for key in given:
        if inside := [name for name in known if name.startswith(f"{key}.")]:
            raise Error(f"--config.{key} is a group of keys, such as {some(inside)}; set these")
        if key not in known:
            like = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean --config.{like[0]}? See" if like else "see"
            raise Error(f"--config.{key} is not a key; {hint} configs/default.py")
        if given.count(key) > 1:
            raise Error(f"--config.{key} is given twice; give it once")


def _config(args: flags.FlagValues) -> ConfigDict:
    if args.config is None:
        raise Error(_NO_CONFIG)
    config: ConfigDict = args.config
    return config


def _workdir(args: flags.FlagValues) -> Workdir:
    if args.workdir is not None:
        path = Path(args.workdir).expanduser()
        if not args.workdir or path.is_file():
            raise Error(f"--workdir={args.workdir} must be a folder, which is made if need be")
        return Workdir(path)
    if args.config is None:
        raise Error("--workdir is missing; give the folder of a run, see --help")
    return Workdir(Path("runs", Path(args["config"].config_filename).stem))


def _checkpoint(args: flags.FlagValues) -> int | Literal["best", "latest"]:
    if args.checkpoint in ("best", "latest"):
        return args.checkpoint
    if not args.checkpoint.isdecimal():
        raise Error(f"--checkpoint={args.checkpoint} must be best, latest or a step")
    return int(args.checkpoint)


@contextlib.contextmanager
def _training() -> Iterator[None]:
    """Joins the processes of a run, and exits as a shell expects when a signal stopped it."""
    from jaxcells.training.mesh import initialize_distributed

    initialize_distributed()
    import jax

    from jaxcells.training.signals import Interrupted

    _set_up_logging(quiet=jax.process_index() > 0)
    try:
        yield
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)


def _with_flags(message: str) -> str:
    """Spells keys as flags, `data.root=X` as `--config.data.root=X`, and values as in a shell."""
    keys = "|".join(map(re.escape, (*flatten(default_config()), *_MORE_KEYS)))
    message = re.sub(rf"(?<![\w.-])({keys})=(?!=)", r"--config.\1=", message)
    # Python doubles the backslashes of what it quotes.
    message = re.sub(r"'[^'\n]*'", lambda quoted: quoted[0].replace("\\\\", "\\"), message)
    return message.replace("another workdir", "another --workdir")


class _AboveBars(logging.Handler):
    """Writes to standard error without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = "WARNING: " if record.levelno >= logging.WARNING else ""
        text = self.format(record).removeprefix("note: " if warning else "")
        tqdm.write(warning + _with_flags(text), file=sys.stderr)


def _set_up_logging(*, quiet: bool = False) -> None:
    """Sends our own lines to standard error and keeps other libraries' to warnings.

    Args:
      quiet: warnings only, for all processes of a run but the first.
    """
    logger.handlers = [_AboveBars()]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
