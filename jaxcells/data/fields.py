"""Finds the classes, channels and fields of view under a folder.

The layout is `root/<class>/[<channel>/…/]<image>`. A folder that comes split already,
`root/{train,val,test}/<class>/…`, keeps its split.
"""

import collections
import dataclasses
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxcells.data.images import FOREIGN, SUFFIXES, ImageError, ImageInfo, inspect_image
from jaxcells.data.parallel import parallel_map
from jaxcells.files import Error
from jaxcells.text import counted, some

logger = logging.getLogger("jaxcells")

SPLITS = ("train", "val", "test")
_SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))
_SPLIT_OF = {name: names[0] for names in _SPLIT_NAMES for name in names}
# How programs name the outlines of 0.png: 0_mask.png, 0_cp_masks.png, 0-seg.tif, 0_labels.png.
_MASK = re.compile(r"(.+?)([-_. ](?:cp_)?(?:masks?|seg|labels?|rois?))", re.IGNORECASE)
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
      split: "train", "val" or "test" where the folder came split, else None.
    """

    path: Path
    label: str
    channel: str
    group: str
    name: str
    info: ImageInfo
    split: str | None = None


def find_fields(root: str | os.PathLike[str], *, plane: str = "", exclude: str = "") -> list[Field]:
    """Returns every image under `root`, sorted by name.

    Hidden files and files that are no images are left out; the log says how many.

    Args:
      root: folder with one sub-folder per class, or with `train`, `val`, `test` folders of those.
      plane: which plane of a stack to read, see `read_image`.
      exclude: regular expression; files in whose path below `root` it is found are left out, and a
        class of which nothing remains. Empty: none.

    Raises:
      Error: no such folder, no images, one class, an empty class, a format that is not read, or
        images that cannot be read: one message that names folders and counts.
    """
    root = Path(root).expanduser()
    pattern = _compile(exclude)
    class_folders = _class_folders(root)
    files = [(*c, path) for c in class_folders for path in _files_below(c[2])]
    wanted = [f for f in files if not (exclude and pattern.search(_below(root, f[3])))]
    found = [f for f in wanted if f[3].suffix.lower() in SUFFIXES]
    foreign = [f[3] for f in wanted if f[3].suffix.lower() in FOREIGN]
    strays = [path for path in root.iterdir() if path.is_file() and not is_hidden(path)]
    strays += [f[3] for f in wanted if f[3].suffix.lower() not in {*SUFFIXES, *FOREIGN}]
    for path in [*(c[2] for c in class_folders), *(f[3] for f in found)]:
        _check_encoding(path)
    if foreign:
        raise Error(
            f"{root}: files in a format that is not read: {_examples(root, foreign)}; "
            f"{FOREIGN[foreign[0].suffix.lower()]}, or leave them out with "
            f"data.exclude='\\{foreign[0].suffix}$'"
        )
    counts = collections.Counter(label for _, label, _, _ in found)
    left_out = {f[2] for f in files} - {f[2] for f in wanted}
    empty = [c[2] for c in class_folders if c[2] not in left_out | {f[2] for f in found}]
    if empty or not found:
        listed = some([f"{label}: {n}" for label, n in sorted(counts.items())]) or "none"
        raise Error(
            f"{root}: no images in {_examples(root, empty)} (images per class: {listed}); add "
            f"images ({' '.join(sorted(SUFFIXES))}) or remove the folder{_sheet_hint(root)}"
        )
    if len(counts) < 2:
        raise Error(_one_class(root, [f[3] for f in found]))
    if exclude:
        num_excluded = counted(len(files) - len(wanted), "file")
        logger.info("left out by data.exclude=%s: %s", exclude, num_excluded)
    if strays:
        logger.info("ignored, being no images: %s", _examples(root, strays))

    infos = _inspect_all([path for _, _, _, path in found], root, plane)
    fields = []
    for (split, label, folder, path), info in zip(found, infos, strict=True):
        name = _below(root, path)
        below = path.relative_to(folder).parts
        channel = below[0] if len(below) > 1 else ""
        fields.append(Field(path, label, channel, name, name, info, split))
    for warning in _mask_notes(fields):
        logger.warning(warning)
    return sorted(fields, key=lambda field: field.name)


def _compile(exclude: str) -> re.Pattern[str]:
    try:
        return re.compile(exclude)
    except re.error as error:
        raise Error(f"data.exclude={exclude!r} is no regular expression: {error}") from None


def _class_folders(root: Path) -> list[tuple[str | None, str, Path]]:
    """Returns split (None where the folder does not come split), class and path."""
    if not root.is_dir():
        reason = "is a file, not a folder" if root.exists() else "does not exist"
        raise Error(f"{root}: the image folder {reason}; set data.root=FOLDER")
    folders = _visible_folders(root)
    if not folders:
        number = sum(path.suffix.lower() in SUFFIXES for path in root.iterdir())
        raise Error(
            f"{root}: no class folders found, but {counted(number, 'image')}; put the images of "
            f"each cell line into a folder of its own{_sheet_hint(root)}"
        )
    splits = {name: _SPLIT_OF[name.lower()] for name in folders if name.lower() in _SPLIT_OF}
    if len(set(splits.values())) < 2:
        return [(None, label, root / label) for label in folders]
    if len(folders) != len(SPLITS) or sorted(splits.values()) != sorted(SPLITS):
        raise Error(
            f"{root}: {some(sorted(splits))} look like a split, for which a folder needs train, val "
            f"and test and no other, and it has {some(folders)}; or else put the classes directly "
            "below it to have them split"
        )
    classes = [_visible_folders(root / name) for name in folders]
    somewhere, everywhere = set().union(*classes), set.intersection(*map(set, classes))
    if somewhere != everywhere:
        raise Error(
            f"{root}: train, val and test need the same class folders, and not all of them have "
            f"{some(sorted(somewhere - everywhere))}"
        )
    return [
        (splits[name], label, root / name / label)
        for name in folders
        for label in sorted(everywhere)
    ]


def _one_class(root: Path, paths: list[Path]) -> str:
    """Says what was found instead of two classes, and what to give."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    inner = sorted({path.relative_to(common).parts[0] for path in paths})
    what = f"{root}: only one class, {_below(root, paths[0]).split('/')[0]!r}"
    if all(common / name not in paths for name in inner):
        return (
            f"{what}; {common} holds {len(inner)} folders of images ({some(inner)}): if these are "
            f"the classes, give data.root={shlex.quote(str(common))}"
        )
    return (
        f"{what} with {counted(len(paths), 'image')}; a classifier needs at least two class "
        f"folders{_sheet_hint(root)}"
    )


def _sheet_hint(root: Path) -> str:
    sheets = [p.name for p in root.iterdir() if p.suffix.lower() in _SHEETS and not is_hidden(p)]
    if not sheets:
        return ""
    return f"; labels in sheets such as {sheets[0]} are not read yet: one folder per class is"


def usable_fields(
    fields: Sequence[Field], crop_size: int | None, border: tuple[int, int, int, int]
) -> tuple[list[Field], list[str]]:
    """Leaves out fields that cannot hold one crop and checks that the rest fit in one array.

    Args:
      fields: what `find_fields` found.
      crop_size: side of a crop in pixels; None: images are used whole.
      border: pixels left out at the (top, right, bottom, left).

    Returns:
      The fields that can be used, and one note per class that lost some, for the report.

    Raises:
      Error: a class has no image that is large enough; images differ in channels or dtype; or,
        used whole, in size.
    """
    kept, notes = list(fields), []
    if crop_size:
        kept = [f for f in fields if num_positions(f.info, crop_size, border) > 0]
        num_all = collections.Counter(f.label for f in fields)
        num_kept = collections.Counter(f.label for f in kept)
        within = f" inside the border {border}" if any(border) else ""
        notes = [
            f"{num_all[label] - num_kept[label]} of {num_all[label]} images of {label!r} are "
            f"smaller than the {crop_size}x{crop_size} crop{within} and give no crops"
            for label in sorted(num_all)
            if num_all[label] != num_kept[label]
        ]
        advice = _smaller_crop(fields, crop_size, border)
        if len(num_kept) < len(num_all):
            raise Error(f"{some(notes)}; {advice}data.crop_size=0 uses the images whole")
        if notes and advice:
            notes[-1] += f"; {advice}".removesuffix(", ")
    else:
        _check_uniform(kept, lambda f: f"{f.info.height}x{f.info.width} pixels", "size")
    _check_uniform(kept, lambda f: f"{f.info.channels}", "number of colour channels")
    _check_uniform(kept, lambda f: f.info.dtype, "pixel type")
    return kept, notes


def _smaller_crop(
    fields: Sequence[Field], crop_size: int, border: tuple[int, int, int, int]
) -> str:
    """Names a crop that fits into nine of ten images of every class, where `crop_size` does not."""
    top, right, bottom, left = border
    sides = collections.defaultdict(list)
    for field in fields:
        rows, columns = field.info.height - top - bottom, field.info.width - left - right
        sides[field.label].append(min(rows, columns))
    size = min(sorted(values)[len(values) // 10] for values in sides.values())
    if not 0 < size < crop_size:
        return ""
    return f"data.crop_size={size} fits into at least nine of ten images of every class, "


def num_positions(info: ImageInfo, crop_size: int, border: tuple[int, int, int, int]) -> int:
    """Returns in how many places a square crop fits into an image inside its border."""
    top, right, bottom, left = border
    rows = info.height - top - bottom - crop_size + 1
    columns = info.width - left - right - crop_size + 1
    return max(rows, 0) * max(columns, 0)


def image_notes(fields: Sequence[Field]) -> list[str]:
    """Returns what reading changed or interpreted (alpha dropped, …), a line each with a count."""
    counts = collections.Counter(note for field in fields for note in field.info.notes)
    notes = [f"{counted(count, 'image')}: {note}" for note, count in sorted(counts.items())]
    return notes + _mask_notes(fields)


def _mask_notes(fields: Sequence[Field]) -> list[str]:
    """Warns of outlines beside their images, with the pattern that leaves them all out."""
    stems = {os.path.splitext(field.name)[0] for field in fields}
    matches = [match for stem in stems if (match := _MASK.fullmatch(stem)) and match[1] in stems]
    if not matches:
        return []
    endings = "|".join(sorted({match[2] for match in matches}))
    pattern = rf"({endings})\." if "|" in endings else rf"{endings}\."
    masks = [field.name for field in fields if re.search(pattern, field.name)]
    return [
        f"{counted(len(masks), 'image')} named as masks of others beside them ({some(masks)}) are "
        "used as images themselves, so that outlines of a test image may stand in training; "
        f"data.exclude='{pattern}' leaves them out"
    ]


def _check_uniform(fields: Sequence[Field], describe: Callable[[Field], str], what: str) -> None:
    examples: dict[str, Field] = {}
    counts: collections.Counter[str] = collections.Counter()
    for field in fields:
        value = describe(field)
        examples.setdefault(value, field)
        counts[value] += 1
    if len(counts) > 1:
        listed = some([f"{n} with {v}, e.g. {examples[v].name}" for v, n in counts.most_common()])
        raise Error(
            f"the images differ in {what}: {listed}; convert them to one kind, since a network "
            "would learn the difference instead of the cells"
        )


def _inspect_all(paths: list[Path], root: Path, plane: str) -> list[ImageInfo]:
    def inspect(path: Path) -> ImageInfo | ImageError:
        try:
            return inspect_image(path, plane=plane)
        except ImageError as error:
            return error

    results = parallel_map(inspect, paths, title="reading headers")
    errors = [result for result in results if isinstance(result, ImageError)]
    if errors:
        more = f" (and {len(errors) - 1} more of {len(paths)} images under {root})"
        raise Error(f"{errors[0]}{more if len(errors) > 1 else ''}") from errors[0]
    return [result for result in results if isinstance(result, ImageInfo)]


def _check_encoding(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = str(path).encode("utf-8", "backslashreplace").decode()
        raise Error(f"{name}: the name is not valid UTF-8; rename the file or folder") from None


def _files_below(folder: Path) -> Iterator[Path]:
    """Yields all visible files below `folder`, following links but never in a circle."""
    seen = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(n for n in subfolders if not is_hidden(Path(n)))
        for name in sorted(names):
            path = Path(directory, name)
            if not is_hidden(path):
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
