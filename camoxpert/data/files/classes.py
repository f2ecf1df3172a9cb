"""Classes of objects, as far as names, folders and tables tell them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from camoxpert.data.files.layouts import IMAGE_FOLDERS, split_of
from camoxpert.data.files.pairing import Pair

NO_CLASS = ("noncam", "other", "camourflage", "camouflage")
"""Words, in lower case, of COD10K for images without an object and for objects that have nothing in
common, and of CAMO for all of its images, which are often in one folder with those of COD10K."""


def object_classes(pairs: Sequence[Pair]) -> list[str]:
    """Return the class of the object in each image, "" where it is not known.

    It is the last part of ``Pair.group``: ``Aquatic/Crab`` in the names of COD10K and a folder
    ``Crab`` mean the same. A word that all images of a data set share tells nothing unless it is a
    class in another data set; neither do ``camourflage`` in ``camourflage_00001``, the name of a
    split, or ``image``. The column ``class`` of a CSV is always believed. Images
    that are known to have no object, and those without a mask, which cannot show theirs, are of
    none, whatever their names say.
    """
    shows = [pair.labeled and not pair.empty for pair in pairs]
    words: dict[str, set[str]] = defaultdict(set)
    for pair, one in zip(pairs, shows, strict=True):
        if one:
            words[pair.dataset].add(pair.group)
    names = [
        pair.group.rpartition("/")[2] if one else "" for pair, one in zip(pairs, shows, strict=True)
    ]
    known = {
        name
        for pair, name in zip(pairs, names, strict=True)
        if pair.told or (len(words[pair.dataset] - {""}) > 1 and not _says_nothing(name))
    }
    return [name if name in known else "" for name in names]


def _says_nothing(name: str) -> bool:
    return name.lower() in (*NO_CLASS, *IMAGE_FOLDERS) or bool(split_of(name))
