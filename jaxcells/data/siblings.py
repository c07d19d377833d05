"""Files that show one field under several names: its stains, its mask, its frames in time.

Each would count as a field of its own, and training and test share cells without a word. Candidates
are images of one class and size whose paths differ in one place alone: the first or last folder
below the class (`DAPI/f0.png`, `GFP/f0.png`), or the ending of the name (`f0_DAPI.png`,
`f0_mask.png`, `f0.png`) unless it is a number: `f_1` and `f_2` are fields of a series. Likewise
those that differ only in known words for stains, or in the channel of a sheet, anywhere.

They are one field where names say so: all that differs are known words for stains and masks. Else
pixels decide, for the channels of a device may well repeat the names of their images. In pictures
of one field the local contrast lies in the same places, whatever the stain. The measure is its rank
correlation in a candidate pair, less that in images of different pairs (in which walls and
vignettes lie in the same places too). It was 0.7 to 0.9 between the colours of smears and 0.2 to
0.4 between simulated stains of the same cells; over four random pairs of other fields (7,200 draws
from smears, single cells and the sample) at most 0.11. Stains that share but half of their cells,
at 0.08, are not found by pixels.
"""

import contextlib
import itertools
import re
from collections.abc import Sequence

import numpy as np

from jaxcells.data.fields import SPLITS, Field
from jaxcells.data.foreground import local_contrast
from jaxcells.data.images import read_image
from jaxcells.data.splits import num_groups, with_groups
from jaxcells.files import Error
from jaxcells.text import counted, some

Siblings = dict[str, Field]  # by the words, between slashes, in the place where they differ

_MASK = r"(?:cp_)?masks?|seg|labels?|rois?|outlines?"
_is_mask = re.compile(_MASK, re.IGNORECASE).fullmatch
_WITH_MASK = rf"|images?|raw|{_MASK}"
_STAIN = (
    rf"{_WITH_MASK}|dapi|hoechst|e?[gycb]fp|rfp|m?cherry|tdtomato|fitc|tritc|cy\d|alexa\d+|"
    r"bf|brightfield|phase|dic"
)
_END = r"(?=(?:\.ome)?\.[^./]+$)"
# Where paths below the class may differ, and which words there say that the field is the same:
# folders ch1 and ch2 may be channels of a device, such endings may not.
_PLACES = {
    rf"^/?([^/]+)/|[-_. ](?:{_MASK}){_END}": _STAIN,
    rf"([^/]+)/(?=[^/]+$)|[-_. ](?:{_MASK}){_END}": _STAIN,
    rf"[-_. ]((?:cp_)?(?!\d+{_END})[^-_. /]+){_END}": rf"{_STAIN}|(?:ch|w)\d+",
    # Anywhere in the path: such words, or what the field has for a channel.
    "stain": _STAIN,
    "channel": _STAIN,
}
_MIN_SETS, _NUM_PAIRS = 3, 4  # compared in each class
_AGREEMENT = 0.12
_NUM_BLOCKS = 48  # along the longer side


def check_siblings(fields: Sequence[Field], split_by: str, plane: str, fold: str = "") -> list[str]:
    """Refuses masks among images, and images of one field that may come to stand in several splits.

    An expression as `split_by` says what belongs together, and a folder that came split likewise:
    then masks alone are looked for. A fold divides the folder anew.

    Args:
      fields: what will be split.
      split_by: "field", "channel", "crop" or an expression, see `with_groups`.
      plane: which plane of a stack to read, see `read_image`.
      fold: see `parse_fold`.

    Returns:
      A note, with an example, where candidates are different fields by their pixels.

    Raises:
      Error: with the expression that leaves masks out, or keeps the images of a field together.
    """
    came = not fold and all(field.split for field in fields)
    chosen = came or split_by not in ("field", "channel")
    notes: list[str] = []
    for place, stains in _PLACES.items():
        words = _WITH_MASK if chosen else stains
        candidates = _candidates(fields, place, words)
        known = re.compile(words, re.IGNORECASE).fullmatch
        named = [s for sets in candidates for s in sets if all(map(known, _words([s])))]
        if named := [s for s in named if not chosen or any(map(_is_mask, _words([s])))]:
            raise _refusal(fields, named, "as their names say")
        for sets in candidates:
            if chosen or len(sets) < _MIN_SETS:
                continue
            if _are_alike(sets, plane):
                raise _refusal(fields, sets, "with detail in the same places")
            notes.append(f"{_listed(sets)} are different fields, to go by their pixels")
    return notes[:1]


def _candidates(fields: Sequence[Field], place: str, words: str) -> list[list[Siblings]]:
    """Returns images that differ in one place alone: sets of them, by class and size."""
    found: dict[object, dict[object, Siblings]] = {}
    for field in fields:
        *above, path = f"/{field.name}".split(f"/{field.label}/", 1)
        # A channel that is a number would take those of a series for its own.
        anywhere = {"stain": words, "channel": rf"(?=\D){re.escape(field.channel)}"}
        if word := anywhere.get(place):
            above, path = [], field.name
            word = rf"(?<![^-_. /])({word})(?:[-_. /]|$)"
        pattern = re.compile(word or place, re.IGNORECASE)
        part = "/".join(filter(None, pattern.findall(path)))
        kind = found.setdefault((field.label, field.info.height, field.info.width), {})
        kind.setdefault((*above, pattern.sub("", path)), {}).setdefault(part, field)
    kinds = [[s for s in of_kind.values() if len(s) > 1] for of_kind in found.values()]
    return [sets for sets in kinds if sets]


def _are_alike(sets: Sequence[Siblings], plane: str) -> bool:
    """Returns whether images are more alike within sets than across."""

    def contrast(field: Field) -> np.ndarray:
        image = read_image(field.path, plane=plane)
        blocks = local_contrast(image, max(2, max(image.shape[:2]) // _NUM_BLOCKS))
        return np.unique(blocks, return_inverse=True)[1].ravel()  # ranks

    pairs = [list(siblings.values())[:2] for siblings in sets[:: -(-len(sets) // _NUM_PAIRS)]]
    first, second = ([contrast(pair[k]) for pair in pairs] for k in (0, 1))
    with np.errstate(invalid="ignore"):  # flat images have no correlation
        table = np.nan_to_num(np.corrcoef(first, second)[: len(pairs), len(pairs) :])
    across = table[~np.eye(len(pairs), dtype=bool)]
    return bool(table.diagonal().mean() - across.mean() > _AGREEMENT)


def _refusal(fields: Sequence[Field], found: Sequence[Siblings], why: str) -> Error:
    """Says which setting mends it; what keeps the images of a field together has been tried."""
    what = f"{_listed(found)} show one field each, {why}"
    words = sorted(filter(None, _words(found)))
    if masks := "|".join(filter(_is_mask, words)):
        return Error(
            f"{what}: data.exclude='(?:^|[-_. /])({masks})[-_. /]' leaves the masks out; masks "
            "that end alike, such as f0_mask.png beside f0.png, can also centre crops on their "
            "cells: data.mask=_mask"
        )
    starts = ("(.+?)", "^[^/]+/[^/]+/(.+?)", "([^/]+?)")
    word = f"(?:{'|'.join(map(re.escape, words))})"
    tails = (r"\.\w+$", r"\.ome\.\w+$")
    patterns = [*map("".join, itertools.product(starts, ("", rf"(?:[-_. ]{word})?"), tails))]
    # What stands behind the word, or before it.
    patterns += [rf"^(?:(?:.*[-_. /])?{word}[-_. /])?(.+)", rf"(.+)[-_. /]{word}[-_. /]"]
    cures: dict[tuple[int, int], str] = {}
    for pattern in patterns:
        with contextlib.suppress(Error):  # an image that it does not match
            grouped = with_groups(fields, pattern)
            group = {field.name: field.group for field in grouped}
            together = all(len({group[f.name] for f in s.values()}) == 1 for s in found)
            apart = len({(f.group, f.split) for f in grouped}) == len({*group.values()})
            if together and apart:
                number = min(num_groups(grouped).values()), len({*group.values()})
                cures.setdefault(number, pattern)
    cure = "=EXPRESSION, whose group 1 is the same in all images of a field and in no others,"
    if (most := max(cures, default=(0, 0))) >= (len(SPLITS), 0):  # the finest
        cure = f"='{cures[most]}'"
    return Error(
        f"{what}: training and test would share cells; data.split_by{cure} keeps each together, as "
        "images of their own (for stains as colours of one image, merge them into one file first), "
        "and data.split_by='(.+)' says that they are different fields"
    )


def _words(sets: Sequence[Siblings]) -> set[str]:
    """Returns the words in which the images of a set differ."""
    parts = [[{*part.split("/")} for part in siblings] for siblings in sets]
    return {word for s in parts for word in s[0].union(*s) - s[0].intersection(*s)}


def _listed(sets: Sequence[Siblings]) -> str:
    names = some([field.name for field in sets[0].values()], 3)
    return f"{counted(len(sets), 'set')} of images, such as {names},"
