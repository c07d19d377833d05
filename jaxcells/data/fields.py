"""Finds the classes, channels and fields of view under a folder.

The layout is `root/<class>/[<channel>/…/]<image>`. A folder that comes split already,
`root/{train,val,test}/<class>/…`, keeps its split; without `val`, a part of `train` serves.
"""

import collections
import dataclasses
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxcells.data.images import FOREIGN, SUFFIXES, ImageError, ImageInfo, inspect_image
from jaxcells.data.parallel import parallel_map
from jaxcells.data.picture import EXPORT
from jaxcells.files import Error, logger
from jaxcells.text import counted, some

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
SPLIT_OF = {name: names[0] for names in _SPLIT_NAMES for name in names}
"""The split that a name in lower case means."""

_SHEETS = (".csv", ".tsv", ".xlsx", ".xls", ".ods")


@dataclasses.dataclass(frozen=True)
class Field:
    """One image of a class: a field of view, or a crop that somebody else made.

    Attributes:
      path: the file.
      label: name of the class: the first folder below the root.
      channel: the first folder below the class; "" where images lie in the class folder itself.
      group: what must stand in one split alone. `find_fields` sets it to `name`.
      name: path below the root with forward slashes: the identity of the field in seeds and tables.
      info: size, channels and dtype.
      split: "train", "val" or "test" where the folder came split, else None; also for training
        images where there is no folder for validation.
    """

    path: Path
    label: str
    channel: str
    group: str
    name: str
    info: ImageInfo
    split: str | None = None


def find_fields(
    root: str | os.PathLike[str], *, plane: str = "", exclude: str = "", mask: str = ""
) -> list[Field]:
    """Returns every image under `root`, sorted by name.

    Hidden files and files that are no images are left out; the log says how many.

    Args:
      root: folder with one sub-folder per class, or with `train`, `val`, `test` folders of those.
      plane: which plane of a stack to read, see `read_image`.
      exclude: regular expression; files in whose path below `root` it is found are left out, and a
        class of which nothing remains. Empty: none.
      mask: ending of the names of masks, see `objects`, which are left out. Empty: there are none.

    Raises:
      Error: no such folder, no images, one class, an empty class, a format that is not read, or
        images that cannot be read: one message that names folders and counts.
    """
    root = Path(root).expanduser()
    folders = class_folders(root)
    files = [(c, path) for c in folders for path in _files_below(c.path, set())]
    files = [(c, path) for c, path in files if not (mask and path.stem.endswith(mask))]
    wanted = [f for f in files if not (exclude and re.search(exclude, _below(root, f[1])))]
    found = [(c, path) for c, path in wanted if path.suffix.lower() in SUFFIXES]
    foreign = [path for _, path in wanted if path.suffix.lower() in FOREIGN]
    strays = [path for path in root.iterdir() if path.is_file() and not is_hidden(path)]
    strays += [p for _, p in wanted if p.suffix.lower() not in SUFFIXES | FOREIGN]
    if foreign:
        suffix = foreign[0].suffix
        raise Error(
            f"{root}: files in a format that is not read: {_examples(root, foreign)}; "
            f"{EXPORT}, or leave them out with data.exclude='\\{suffix}$'"
        )
    left_out = {c for c, _ in files} - {c for c, _ in wanted}
    empty = [c.path for c in folders if c not in left_out | {c for c, _ in found}]
    counts = collections.Counter(c.label for c, _ in found)
    if empty or not found:
        listed = some([f"{label}: {n}" for label, n in sorted(counts.items())]) or "none"
        raise Error(
            f"{root}: no images in {_examples(root, empty)} (images per class: {listed}); add "
            f"images ({' '.join(sorted(SUFFIXES))}) or remove the folder{_sheet_hint(root)}"
        )
    if len(counts) < 2:
        raise Error(_one_class(root, [path for _, path in found]))
    if exclude:
        logger.info("data.exclude=%s leaves out %d files", exclude, len(files) - len(wanted))
    if strays:
        logger.info("ignored, being no images: %s", _examples(root, strays))

    fields = _read_headers(found, root, plane)
    channels = sorted({field.channel for field in fields} - {""})
    logger.info("classes: %s; channels: %s", some(sorted(counts)), some(channels) or "none")
    return sorted(fields, key=lambda field: field.name)


class ClassFolder(NamedTuple):
    """A folder of one class, and the split it came in, if any and if it is not to be divided."""

    split: str | None
    label: str
    path: Path


def class_folders(root: Path) -> list[ClassFolder]:
    """Returns the folder of every class under `root`, and of every split where it came split.

    Raises:
      Error: no such folder, no folders in it, or a part of a split without the others.
    """
    if not root.is_dir():
        raise Error(f"{root}: the image folder does not exist, or is a file; set data.root=FOLDER")
    folders = _visible_folders(root)
    if not folders:
        raise Error(
            f"{root}: no class folders found; put the images of each cell line into a folder "
            f"of its own{_sheet_hint(root)}"
        )
    splits = {name: SPLIT_OF[name.lower()] for name in folders if name.lower() in SPLIT_OF}
    found = {*splits.values()}
    if len(found) < 2:
        return [ClassFolder(None, label, root / label) for label in folders]
    if len(folders) != len(found) or not {"train", "test"} <= found:
        raise Error(
            f"{root}: {some(sorted(splits))} look like a split, which needs the folders train, val "
            f"(or none) and test and no other; there are {some(folders)}: rename them, or put the "
            "classes directly below the root to have them split"
        )
    inner = [{*_visible_folders(root / name)} for name in folders]
    labels = sorted(inner[0].union(*inner))
    if uneven := sorted(set(labels) - inner[0].intersection(*inner)):
        raise Error(
            f"{root}: {', '.join(folders)} need the same class folders, and not all of them have "
            f"{some(uneven)}"
        )
    # Without a folder for validation, it takes a part of the training fields.
    came = {name: split for name, split in splits.items() if len(splits) == 3 or split == "test"}
    return [
        ClassFolder(came.get(name), label, root / name / label)
        for name in folders
        for label in labels
    ]


def _one_class(root: Path, paths: list[Path]) -> str:
    """Says what was found instead of two classes, and what to give."""
    what = f"{root}: only one class, {paths[0].relative_to(root).parts[0]!r}"
    common = Path(os.path.commonpath([path.parent for path in paths]))
    inner = sorted({path.relative_to(common).parts[0] for path in paths})
    if common not in {path.parent for path in paths}:
        return (
            f"{what}; {common} holds {len(inner)} folders of images ({some(inner)}): if these are "
            f"the classes, give data.root={shlex.quote(str(common))}"
        )
    number = counted(len(paths), "image")
    return f"{what} with {number}; a classifier needs two or more{_sheet_hint(root)}"


def _sheet_hint(root: Path) -> str:
    for path in root.iterdir():
        if path.suffix.lower() in _SHEETS and not is_hidden(path):
            return (
                f"; to take the classes from {path.name}, save it as CSV with the columns path and "
                "class and set data.sheet=FILE"
            )
    return ""


def usable_fields(
    fields: Sequence[Field], crop_size: int | None, border: tuple[int, int, int, int]
) -> tuple[list[Field], list[str]]:
    """Leaves out fields that cannot hold one crop and checks that the rest fit in one array.

    Args:
      fields: what `find_fields` found.
      crop_size: side of a crop in pixels; None: images are used whole.
      border: pixels left out at the (top, right, bottom, left).

    Returns:
      The fields that can be used, and notes for the report: one per class that lost some, and one
      where images may be crops themselves.

    Raises:
      Error: a class has no image that is large enough; images differ in channels or dtype; or,
        used whole, in size.
    """
    kept, notes = list(fields), []
    largest = max(max(field.info.height, field.info.width) for field in fields)
    if not crop_size or largest < 2 * crop_size:
        what = "are hardly larger than crops" if crop_size else "are used whole"
        notes = [
            f"images {what}, as if cut elsewhere, and each counts as a field; those cut from one "
            "image need a group in common (data.split_by), or test and training share images"
        ]
    if crop_size:
        kept = [f for f in fields if num_positions(f.info, crop_size, border) > 0]
        num_all = collections.Counter(f.label for f in fields)
        num_lost = num_all - collections.Counter(f.label for f in kept)
        within = f" inside the border {border}" if any(border) else ""
        lost_notes = [
            f"{lost} of {num_all[label]} images of {label!r} are smaller than the "
            f"{crop_size}x{crop_size} crop{within} and give no crops"
            for label, lost in sorted(num_lost.items())
        ]
        # What fits into nine of ten images of every class.
        size = min(
            sorted(min(_room(f.info, border)) for f in fields if f.label == label)[n // 10]
            for label, n in num_all.items()
        )
        fits = f"data.crop_size={size} fits into at least nine of ten images of every class"
        advice = f"; {fits}" if 0 < size < crop_size else ""
        if any(num_lost[label] == n for label, n in num_all.items()):
            raise Error(f"{some(lost_notes)}{advice}; data.crop_size=0 uses the images whole")
        notes += [note + advice for note in lost_notes]
    else:
        _check_uniform(kept, lambda f: f"{f.info.height}x{f.info.width} pixels", "size")
    _check_uniform(kept, lambda f: f"{f.info.channels}", "number of colour channels")
    _check_uniform(kept, lambda f: f.info.dtype, "pixel type")
    return kept, notes


def _room(info: ImageInfo, border: tuple[int, int, int, int]) -> tuple[int, int]:
    top, right, bottom, left = border
    return info.height - top - bottom, info.width - left - right


def num_positions(
    info: ImageInfo, crop_size: int, border: tuple[int, int, int, int], step: int = 1
) -> int:
    """Returns in how many places, `step` pixels apart, a square crop fits inside the border."""
    rows, columns = ((side - crop_size) // step + 1 for side in _room(info, border))
    return max(rows, 0) * max(columns, 0)


def image_notes(fields: Sequence[Field]) -> list[str]:
    """Returns what reading changed or interpreted (alpha dropped, …), a line each with a count."""
    counts = collections.Counter(note for field in fields for note in field.info.notes)
    if {field.split for field in fields} == {"test", None}:
        number = sum(field.split is None for field in fields)
        counts["from the folder train, divided into training and validation images"] = number
    return [f"{counted(count, 'image')}: {note}" for note, count in sorted(counts.items())]


def _check_uniform(fields: Sequence[Field], describe: Callable[[Field], str], what: str) -> None:
    example = {describe(field): field.name for field in reversed(fields)}
    if len(example) > 1:
        most = collections.Counter(map(describe, fields)).most_common()
        listed = some([f"{number} with {kind}, e.g. {example[kind]}" for kind, number in most])
        raise Error(
            f"the images differ in {what}: {listed}; convert them to one kind, since a network "
            "would learn the difference instead of the cells"
        )


def _read_headers(found: list[tuple[ClassFolder, Path]], root: Path, plane: str) -> list[Field]:
    def read_header(place: tuple[ClassFolder, Path]) -> Field | ImageError:
        c, path = place
        if str(path).encode(errors="ignore").decode() != str(path):
            raise Error(f"{str(path)!a}: the name is not valid UTF-8; rename the file or folder")
        try:
            info = inspect_image(path, plane=plane)
        except ImageError as error:
            return error
        name, below = _below(root, path), path.relative_to(c.path).parts
        channel = below[0] if len(below) > 1 else ""
        return Field(path, c.label, channel, name, name, info, c.split)

    results = parallel_map(read_header, found, title="reading headers")
    if errors := [result for result in results if isinstance(result, ImageError)]:
        more = f" (and {len(errors) - 1} more of {len(found)} images under {root})"
        raise Error(f"{errors[0]}{more * (len(errors) > 1)}") from errors[0]
    return [result for result in results if isinstance(result, Field)]


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields all visible files below `folder`, following links but never in a circle."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.suffix.lower() not in FOREIGN and not is_hidden(path):
            yield from _files_below(path, seen)
        elif not is_hidden(path):
            yield path


def _visible_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path))


def is_hidden(path: Path) -> bool:
    """Returns whether a file is one that systems leave behind rather than people."""
    return path.name.startswith(".") or path.name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _examples(root: Path, paths: Sequence[Path]) -> str:
    return some([_below(root, path) for path in paths])
