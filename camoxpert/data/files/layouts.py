"""Table of known data set layouts: where images and masks are, and which split they belong to.

To add a layout, add a row. Patterns are relative to the data set folder, in upper or lower case;
``*`` stands for one folder name, which then names the data set; ``<train>`` stands for a folder
whose name says that it is a split (``split_of``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from camoxpert.data.files.listing import image_files, is_image_name, is_side_file, subfolders
from camoxpert.data.files.unread import unread

IMAGE_FOLDERS = ("imgs", "image", "images", "img", "im", "jpegimages")
MASK_FOLDERS = (
    *("gt", "gt_object", "mask", "masks", "ground_truth", "groundtruth", "ground-truth"),
    *("segmentationclass", "label", "labels", "annotation", "annotations", "segmentation"),
)
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_NAME = re.compile(rf"({'|'.join(SPLIT_WORDS)})([-_ ]?(set|data|dataset))?([-_ ]?\d+)?")
MASK_NAME = re.compile(
    r"(?:(?:mask|gt|label|seg)[-_. ].+|.+[-_. ](?:masks?|gt|labels?|seg|segmentation|matte))",
    re.IGNORECASE,
)
"""Names of masks in a folder that holds images as well."""
PART_OF_NAME = re.compile(r"-T([RE])$", re.IGNORECASE)
LOSSLESS = frozenset((".png", ".bmp", ".tif", ".tiff", ".gif", ".pbm", ".pgm"))


@dataclass(frozen=True)
class Source:
    """One pair of folders of a layout.

    Attributes:
        split: train, val, test, or all (the data set has no splits).
        images, masks: alternatives; the first pair that exists is used. The same folder for both
            is a flat one, with a mask beside each image.
        dataset: name of the data set; empty: the folder that ``*`` matched, or the root's name.
        mask_stem: function from an image's stem to its mask's.
        shared_masks: masks of other splits are in the same folder, so unused masks are normal.
    """

    split: str
    images: tuple[str, ...]
    masks: tuple[str, ...]
    dataset: str = ""
    mask_stem: Callable[[str], str] = str
    shared_masks: bool = False


@dataclass(frozen=True)
class Layout:
    """A named layout: every source that exists is used; one of ``needs`` must exist.

    Attributes:
        exact: upper and lower case matter, because the row names the data set.
    """

    name: str
    needs: tuple[str, ...]
    sources: tuple[Source, ...]
    exact: bool = False


class Place(NamedTuple):
    """A path that a pattern names, and what ``*`` and ``<train>`` stand for in it; "" without."""

    path: Path
    star: str
    word: str


@dataclass(frozen=True)
class Found:
    """A source that exists on disk."""

    source: Source
    dataset: str
    images: Path
    masks: Path


@dataclass(frozen=True)
class Recognised:
    """The layout of a folder.

    Attributes:
        layout: its row.
        root: the folder, or the one in it that holds the data.
        found: its sources on disk.
        notes: folders with images that no source reads.
    """

    layout: Layout
    root: Path
    found: tuple[Found, ...]
    notes: tuple[str, ...] = ()


def split_of(name: str) -> str:
    """Return train, val or test if a name says so (Training, valid, test_set), else ""."""
    match = SPLIT_NAME.fullmatch(name.lower())
    return SPLIT_WORDS[match[1]] if match else ""


def _animal_to_mask(stem: str) -> str:
    return re.sub(r"^animal", "mask", stem)


def _split_sources(images: tuple[str, ...], masks: tuple[str, ...]) -> tuple[Source, ...]:
    """Return a source for each split; ``{}`` in a pattern stands for its word."""
    return tuple(
        Source(
            split,
            tuple(pattern.format(f"<{split}>") for pattern in images),
            tuple(pattern.format(f"<{split}>") for pattern in masks),
            shared_masks=any("{}" not in pattern for pattern in masks),
        )
        for split in SPLITS
    )


def _camo_sources() -> tuple[Source, ...]:
    """Return the sources of R2C7K: hidden objects of 64 classes, by split."""
    images = tuple(f"Camo/{{}}/{name}" for name in IMAGE_FOLDERS)
    masks = tuple(f"Camo/{{}}/{name}" for name in MASK_FOLDERS)
    return tuple(replace(source, dataset="R2C7K") for source in _split_sources(images, masks))


ANY_SPLIT = tuple(f"<{split}>" for split in SPLITS)
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "COD10K-v3",
        ("Train/GT_Object", "Test/GT_Object", "Train/Mask", "Test/Mask"),
        tuple(
            Source(
                split.lower(),
                (f"{split}/Image", f"{split}/Imgs"),
                (f"{split}/GT_Object", f"{split}/Mask", f"{split}/GT"),
                dataset="COD10K",
            )
            for split in ("Train", "Test")
        ),
        exact=True,
    ),
    Layout(
        "CAMO-V.1.0",
        ("Images/Train", "Images/Test"),
        tuple(
            Source(
                split.lower(),
                (f"Images/{split}",),
                (f"GT/{split}", "GT"),
                dataset="CAMO",
                shared_masks=True,
            )
            for split in ("Train", "Test")
        ),
        exact=True,
    ),
    Layout("R2C7K", tuple(f"Camo/{split}" for split in ANY_SPLIT), _camo_sources()),
    # Its images that show the classes openly, with the maps that a saliency network made of them.
    Layout(
        "R2C7K references",
        ("Saliency_ICON-R",),
        (Source("all", ("Images",), ("Saliency_ICON-R",)),),
        exact=True,
    ),
    Layout(
        "TrainDataset/TestDataset",
        ("TrainDataset", "TestDataset"),
        (
            Source(
                "train",
                tuple(f"TrainDataset/{name}" for name in IMAGE_FOLDERS),
                tuple(f"TrainDataset/{name}" for name in MASK_FOLDERS),
            ),
            Source(
                "test",
                tuple(f"TestDataset/*/{name}" for name in IMAGE_FOLDERS),
                tuple(f"TestDataset/*/{name}" for name in MASK_FOLDERS),
            ),
            Source(
                "test",
                tuple(f"TestDataset/{name}" for name in IMAGE_FOLDERS),
                tuple(f"TestDataset/{name}" for name in MASK_FOLDERS),
            ),
        ),
    ),
    Layout(
        "CHAMELEON masks",
        ("masks/mask-1.png", "masks/mask-2.png"),
        (Source("all", IMAGE_FOLDERS, ("masks",), mask_stem=_animal_to_mask),),
    ),
    Layout(
        "X-Image/X-Mask",
        ("*-Image", "*-TR-Image", "*-TE-Image"),
        (Source("all", ("*-Image",), ("*-Mask",)),),
        exact=True,
    ),
    Layout(
        "split folders",
        (*ANY_SPLIT, *(f"{name}/{split}" for name in IMAGE_FOLDERS for split in ANY_SPLIT)),
        (
            *_split_sources(
                tuple(f"{{}}/{name}" for name in IMAGE_FOLDERS),
                tuple(f"{{}}/{name}" for name in MASK_FOLDERS),
            ),
            *_split_sources(
                tuple(f"{{}}/*/{name}" for name in IMAGE_FOLDERS),
                tuple(f"{{}}/*/{name}" for name in MASK_FOLDERS),
            ),
            *_split_sources(
                tuple(f"{name}/{{}}" for name in IMAGE_FOLDERS),
                (*(f"{name}/{{}}" for name in MASK_FOLDERS), *MASK_FOLDERS),
            ),
            *_split_sources(("{}",), ("{}",)),
        ),
    ),
    Layout(
        "images and masks",
        IMAGE_FOLDERS,
        (Source("all", IMAGE_FOLDERS, MASK_FOLDERS),),
    ),
    Layout(
        "folder of data sets",
        tuple(f"*/{name}" for name in IMAGE_FOLDERS),
        (
            Source(
                "test",
                tuple(f"*/{name}" for name in IMAGE_FOLDERS),
                tuple(f"*/{name}" for name in MASK_FOLDERS),
            ),
            Source(
                "test",
                tuple(f"*/{name}/<test>" for name in IMAGE_FOLDERS),
                (
                    *(f"*/{name}/<test>" for name in MASK_FOLDERS),
                    *(f"*/{name}" for name in MASK_FOLDERS),
                ),
                shared_masks=True,
            ),
        ),
    ),
    Layout("flat folder", (".",), (Source("all", (".",), (".",)),)),
)

CSV_LAYOUT = "CSV"
FOLDER_OF_SETS = "folder of data sets"


def recognise(root: Path, name: str = "auto", *, beside: Sequence[str] = ()) -> Recognised | None:
    """Find the layout of a folder, or of the only folder inside it (archives often add one).

    Args:
        root: the folder.
        name: of a known layout, or auto.
        beside: names of other folders, in any case, that are read beside the images.

    Returns:
        The layout, its root folder and its sources on disk; None if no layout matches.
    """
    inner = subfolders(root)
    found = _recognise(root, inner, name, beside)
    sets = found is not None and found.root == root and found.layout.name == FOLDER_OF_SETS
    if sets and name == "auto" and len(inner) == 1:
        # A folder around data with a training split is no folder of test sets.
        within = recognise(inner[0], beside=beside)
        if within is not None and any(f.source.split == "train" for f in within.found):
            return within
    return found


def _recognise(
    root: Path, inner: Sequence[Path], name: str, beside: Sequence[str]
) -> Recognised | None:
    rows = [layout for layout in LAYOUTS if name in ("auto", layout.name)]
    # CAMO-COCO as distributed holds CAMO and, beside it, images without an object.
    pair = [p for p in inner if p.name in ("Camouflage", "Non-Camouflage")]
    candidates = [*pair[: len(pair) - 1], root]
    candidates += [p for p in inner if p.name.lower().startswith(("cod10k", "camo-v"))]
    if len(inner) == 1 and inner[0] not in candidates:
        candidates.append(inner[0])
    for start in candidates:
        for layout in rows:
            named = any(source.dataset for source in layout.sources)
            if named and layout.exact and name == "auto" and _has_validation(start):
                # The data sets that these rows name have none; a row that reads it follows.
                continue
            if any(next(_places(start, n, layout.exact), None) for n in layout.needs):
                found = [f for source in layout.sources for f in locate(start, source, layout)]
                if found:
                    places = dict.fromkeys((root, start))
                    used = [path.resolve() for f in found for path in (f.images, f.masks)]
                    kinds = (*IMAGE_FOLDERS, *MASK_FOLDERS)
                    notes = (n for place in places for n in unread(place, used, beside, kinds))
                    return Recognised(layout, start, tuple(found), tuple(dict.fromkeys(notes)))
    return None


def locate(root: Path, source: Source, layout: Layout) -> Iterator[Found]:
    """Yield every pair of folders that a source names below ``root``."""
    seen: set[Path] = set()
    # Resolved, because the folder "." has no name.
    own = root.resolve().name
    for pattern in source.images:
        places = [p for p in _places(root, pattern, layout.exact) if p.path.is_dir()]
        words = {star: {p.word for p in places if p.star == star} for _, star, _ in places}
        for images, star, word in places:
            parent = images if pattern.endswith(">") or "*-" in pattern else images.parent
            # A training split is never a test set.
            hidden = pattern.startswith("*/") and split_of(star) in ("train", "val")
            hidden = hidden or (not pattern.endswith(">") and _holds_splits(images))
            if parent in seen or hidden:
                continue
            alone = len(words[star]) == 1
            masks = _masks_of(root, source, images, star, word, alone=alone, exact=layout.exact)
            if masks is not None:
                seen.add(parent)
                named = (star if "/" in pattern else "") or own
                if _is_called(source.dataset, root, images):
                    named = source.dataset
                # test1 and test2 are two data sets.
                named += "" if alone else f"-{word}"
                kept = source
                if pattern.startswith("*-"):
                    # DUTS-TR and DUTS-TE are one data set's splits.
                    said = PART_OF_NAME.search(star)
                    named = PART_OF_NAME.sub("", star) or own
                    if said:
                        split = "train" if said[1].lower() == "r" else "test"
                        kept = replace(source, split=split)
                # Splits may number their images alike; in one run they need different names.
                named += "-val" if kept.split == "val" else ""
                yield Found(kept, named, images, masks)


def _holds_splits(folder: Path) -> bool:
    """Return whether a folder holds splits instead of images."""
    return folder.is_dir() and not image_files(folder) and _has_splits(folder)


def flat_pairs(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Divide the images of a flat folder into (images, masks).

    Masks are called so (``a_mask.png`` beside ``a.jpg``), or are the lossless one of two files with
    the same name (``a.png`` beside ``a.jpg``).
    """
    masks = [path for path in files if MASK_NAME.fullmatch(path.stem)]
    if not masks:
        lossy = {path.stem for path in files if path.suffix.lower() not in LOSSLESS}
        masks = [p for p in files if p.suffix.lower() in LOSSLESS and p.stem in lossy]
    found = set(masks)
    return [path for path in files if path not in found], masks


def folders_named(path: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the folders in ``path`` that have one of the names, in their order, in any case."""
    return [p.path for name in names for p in _places(path, name, False) if p.path.is_dir()]


def is_noncam(stem: str) -> bool:
    """Return whether a COD10K name marks an image without a camouflaged object."""
    return stem.startswith("COD10K-NonCAM-")


def class_of(stem: str) -> str:
    """Return the class encoded in a name, or "".

    COD10K names are read from both ends (COD10K-CAM-1-Aquatic-3-Crab-32 is Aquatic/Crab; the short
    NonCAM form has no sub-class); other names by the letters before a final number (In_12 is In).
    """
    parts = stem.split("-")
    if parts[0] == "COD10K" and len(parts) >= 5:
        if parts[1] == "NonCAM":
            return "NonCAM"
        return f"{parts[3]}/{parts[-2]}" if len(parts) >= 7 else parts[3]
    match = re.fullmatch(r"([A-Za-z]+)[-_ ]?\d+", stem)
    return match.group(1) if match else ""


def _has_validation(root: Path) -> bool:
    """Return whether a folder, or a folder of images in it, holds a validation split."""
    places = [root, *folders_named(root, IMAGE_FOLDERS)]
    return any(split_of(path.name) == "val" for place in places for path in subfolders(place))


def _is_called(dataset: str, root: Path, images: Path) -> bool:
    """Return whether a folder or the first of its images says that it is a known data set, which
    others may be laid out like."""
    files = image_files(images)
    said = (root.resolve().name, *(path.name for path in files[:1]))
    # R2C7K has COD10K's names.
    return bool(dataset) and (
        dataset == "R2C7K" or any(dataset.lower() in name.lower() for name in said)
    )


def _masks_of(
    root: Path, source: Source, images: Path, star: str, word: str, *, alone: bool, exact: bool
) -> Path | None:
    """Return the folder of masks that belongs to a folder of images.

    Args:
        root, source, images: where it is looked for, and what for.
        star, word: what ``*`` and ``<train>`` stand for in the path of the images.
        alone: no other folder of images is of that split; then its masks may be called otherwise
            (``test`` and ``testing``), if one folder is.
        exact: upper and lower case matter.
    """
    for pattern in source.masks:
        places = [p for p in _places(root, pattern, exact, star=star) if p.path.is_dir()]
        same = [p for p in places if p.word.lower() == word.lower() or "<" not in pattern]
        if not same and alone and len(places) == 1 and pattern not in source.images:
            same = places
        for masks, _, _ in same:
            shared = "<" not in pattern and not split_of(pattern.rpartition("/")[2])
            if source.split != "all" and shared and _has_splits(masks):
                # Those of the other splits; this one has none.
                continue
            # On a case-insensitive disk Imgs and imgs are one folder, and so are GT and gt.
            if not masks.samefile(images):
                return masks
            if pattern in source.images and all(flat_pairs(image_files(masks))):
                return masks
    return None


def _has_splits(folder: Path) -> bool:
    return any(split_of(inner.name) for inner in subfolders(folder))


def _places(root: Path, pattern: str, exact: bool, *, star: str | None = None) -> Iterator[Place]:
    """Yield the paths below ``root`` that a pattern names.

    Args:
        root: where the pattern starts.
        pattern: names joined by ``/``; see the top of this file.
        exact: upper and lower case matter.
        star: the only name that ``*`` may stand for; None: any.
    """
    first, _, rest = pattern.partition("/")
    if first == ".":
        yield Place(root, "", "")
        return
    for name in sorted(path.name for path in root.iterdir()):
        stands = _stands_for(first, name, exact, star)
        if stands is None or is_side_file(name):
            continue
        path, word = root / name, name if first.startswith("<") else ""
        if not rest:
            yield Place(path, stands, word)
        elif not is_image_name(path) and path.is_dir():
            for place, inner, inner_word in _places(path, rest, exact, star=star):
                yield Place(place, stands + inner, word + inner_word)


def _stands_for(pattern: str, name: str, exact: bool, star: str | None) -> str | None:
    """Return what ``*`` stands for in a name, "" without one; None if the name does not match."""
    if pattern.startswith("<"):
        return "" if split_of(name) == pattern[1:-1] else None
    before, wild, after = pattern.partition("*")
    if not wild:
        same = name == pattern if exact else name.lower() == pattern.lower()
        return "" if same else None
    middle = name[len(before) : len(name) - len(after)]
    same = bool(middle) and name == before + middle + after
    return middle if same and star in (None, middle) else None
