"""Finds the classes, channels and fields of view under a folder.

The layout is `root/<class>/[<channel>/…/]<image>`. A folder that comes split already,
`root/{train,val,test}/<class>/…`, keeps its split.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxcells.data.images import SUFFIXES, ImageError, ImageInfo, inspect_image
from jaxcells.data.parallel import parallel_map
from jaxcells.files import Error

logger = logging.getLogger("jaxcells")

SPLITS = ("train", "val", "test")
_SIDE_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# Written by microscopes: leaving them out unasked would drop somebody's data.
_UNREAD_FORMATS = (
    *(".czi", ".nd2", ".lif", ".lsm", ".oib", ".oif", ".vsi", ".scn", ".svs", ".ims", ".mrxs"),
    *(".ndpi", ".dv", ".zvi", ".heic", ".heif", ".webp", ".gif", ".jp2", ".dcm", ".zarr"),
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One image of a class: a field of view, or a crop that somebody else made.

    Attributes:
      path: the file.
      label: name of the class: the first folder below the root.
      channel: the first folder below the class; "" where images lie in the class folder itself.
      group: what must not stand on two sides of a split. `find_fields` sets it to `name`.
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


def find_fields(root: str | os.PathLike[str], *, plane: str = "") -> list[Field]:
    """Returns every image under `root`, sorted by name.

    Hidden files and files that are no images are left out; the log says how many.

    Args:
      root: folder with one sub-folder per class, or with `train`, `val`, `test` folders of those.
      plane: which plane of a stack to read, see `read_image`.

    Raises:
      Error: no such folder, no images, one class, an empty class, a format that is not read, or
        images that cannot be read: one message that names folders and counts.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        reason = "is a file, not a folder" if root.exists() else "does not exist"
        raise Error(f"{root}: the image folder {reason}; set --config.data.root=FOLDER")

    folders = _visible_folders(root)
    if not folders:
        num_images = sum(_is_image(path) for path in root.iterdir())
        raise Error(
            f"{root}: no class folders found"
            + (f", but {num_images} images" if num_images else "")
            + "; put the images of each cell line into a sub-folder of its own"
        )
    sides = {name: _SIDE_NAMES[name.lower()] for name in folders if name.lower() in _SIDE_NAMES}
    came_split = len(set(sides.values())) >= 2
    class_folders: list[tuple[str | None, str, Path]]
    if came_split:
        _check_sides(root, folders, sides)
        class_folders = [
            (side, label, root / name / label)
            for name, side in sides.items()
            for label in _visible_folders(root / name)
        ]
        _check_same_classes(root, class_folders)
    else:
        class_folders = [(None, label, root / label) for label in folders]

    for _, _, folder in class_folders:
        _check_encoding(folder)
    found: list[tuple[str | None, str, Path, Path]] = []
    ignored: list[Path] = [
        path for path in root.iterdir() if path.is_file() and not is_hidden(path)
    ]
    unread: list[Path] = []
    empty: list[str] = []
    for split, label, folder in class_folders:
        before = len(found)
        for path in _files_below(folder):
            if _is_image(path):
                _check_encoding(path)
                found.append((split, label, folder, path))
            elif path.suffix.lower() in _UNREAD_FORMATS:
                unread.append(path)
            else:
                ignored.append(path)
        if len(found) == before:
            empty.append(str(folder.relative_to(root)))

    if unread:
        raise Error(
            f"{root}: files in a format that is not read: {_examples(unread, root)}; "
            "export them as TIFF or OME-TIFF, or move them out of the folder"
        )
    if not found:
        raise Error(
            f"{root}: no images in any of the {len(class_folders)} class folders "
            f"({_some(empty)}); looked for {' '.join(sorted(SUFFIXES))}"
        )
    if empty:
        counts = collections.Counter(label for _, label, _, _ in found)
        listed = _some([f"{label}: {n}" for label, n in sorted(counts.items())])
        raise Error(
            f"{root}: no images in {_some(empty)} (images per class: {listed}); "
            "add images or remove the folder"
        )
    labels = {label for _, label, _, _ in found}
    if len(labels) < 2:
        raise Error(
            f"{root}: only one class, {labels.pop()!r} with {len(found)} images; "
            "a classifier needs at least two class folders"
        )
    if ignored:
        logger.info("ignored, being no images: %s", _examples(ignored, root))

    infos = _inspect_all([path for _, _, _, path in found], root, plane)
    fields = []
    for (split, label, folder, path), info in zip(found, infos, strict=True):
        below = path.relative_to(folder).parts
        name = path.relative_to(root).as_posix()
        channel = below[0] if len(below) > 1 else ""
        fields.append(Field(path, label, channel, name, name, info, split))
    return sorted(fields, key=lambda field: field.name)


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
    if crop_size is not None:
        kept = [f for f in fields if num_positions(f.info, crop_size, border) > 0]
        num_all = collections.Counter(f.label for f in fields)
        num_kept = collections.Counter(f.label for f in kept)
        lost = [label for label in sorted(num_all) if not num_kept[label]]
        within = f" inside the border {border}" if any(border) else ""
        if lost:
            largest = {
                label: max((f.info.height, f.info.width) for f in fields if f.label == label)
                for label in lost
            }
            listed = _some(
                [f"{n!r}: {num_all[n]}, the largest {h}x{w}" for n, (h, w) in largest.items()]
            )
            raise Error(
                f"every image of these classes is smaller than the {crop_size}x{crop_size} crop"
                f"{within} ({listed}); set a smaller --config.data.crop_size, or "
                "--config.data.crop_size=0 to use the images whole"
            )
        notes = [
            f"{num_all[label] - num_kept[label]} of {num_all[label]} images of {label!r} are "
            f"smaller than the {crop_size}x{crop_size} crop{within} and give no crops"
            for label in sorted(num_all)
            if num_all[label] != num_kept[label]
        ]
    else:
        _check_uniform(kept, lambda f: f"{f.info.height}x{f.info.width} pixels", "size")
    _check_uniform(kept, lambda f: f"{f.info.channels}", "number of colour channels")
    _check_uniform(kept, lambda f: f.info.dtype, "pixel type")
    return kept, notes


def num_positions(info: ImageInfo, crop_size: int, border: tuple[int, int, int, int]) -> int:
    """Returns in how many places a square crop fits into an image inside its border."""
    top, right, bottom, left = border
    rows = info.height - top - bottom - crop_size + 1
    columns = info.width - left - right - crop_size + 1
    return max(rows, 0) * max(columns, 0)


def image_notes(fields: Sequence[Field]) -> list[str]:
    """Returns what reading changed or interpreted (alpha dropped, …), a line each with a count."""
    counts = collections.Counter(note for field in fields for note in field.info.notes)
    return [f"{count} images: {note}" for note, count in sorted(counts.items())]


def _check_uniform(fields: Sequence[Field], describe: Callable[[Field], str], what: str) -> None:
    examples: dict[str, Field] = {}
    counts: collections.Counter[str] = collections.Counter()
    for field in fields:
        value = describe(field)
        examples.setdefault(value, field)
        counts[value] += 1
    if len(counts) > 1:
        listed = _some([f"{n} with {v}, e.g. {examples[v].name}" for v, n in counts.most_common()])
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


def _check_sides(root: Path, folders: list[str], sides: dict[str, str]) -> None:
    others = sorted(set(folders) - set(sides))
    if others:
        raise Error(
            f"{root}: folders {_some(sorted(sides))} look like a split, {_some(others)} like "
            "classes; use either root/<class>/ or root/{train,val,test}/<class>/"
        )
    if sorted(sides.values()) != sorted(SPLITS):
        raise Error(
            f"{root}: a folder that comes split needs train, val and test, and has "
            f"{_some(sorted(sides))}"
            "; rename the folders, or put the classes directly below the root to have them split"
        )


def _check_same_classes(root: Path, class_folders: list[tuple[str | None, str, Path]]) -> None:
    classes = {side: {label for s, label, _ in class_folders if s == side} for side in SPLITS}
    everywhere = set.intersection(*classes.values())
    for side in SPLITS:
        odd = sorted(classes[side] - everywhere)
        if odd:
            without = [s for s in SPLITS if odd[0] not in classes[s]]
            raise Error(
                f"{root}: class {odd[0]!r} is in {side} but not in {' and '.join(without)}; "
                "train, val and test need the same class folders"
            )


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


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not is_hidden(path)


def _examples(paths: list[Path], root: Path) -> str:
    return _some([path.relative_to(root).as_posix() for path in paths])


def _some(items: Sequence[str], limit: int = 4) -> str:
    more = f", … {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
