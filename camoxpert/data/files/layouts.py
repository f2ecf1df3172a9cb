"""Table of known data set layouts: where images and masks are, and which split they belong to.

To add a layout, add a row. Patterns are relative to the data set folder; ``*`` stands for one
folder name, which then names the data set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"))
IMAGE_FOLDERS = ("Imgs", "Image", "Images", "images", "image", "imgs", "img", "im")
MASK_FOLDERS = ("GT", "gt", "GT_Object", "Mask", "Masks", "masks", "mask")


@dataclass(frozen=True)
class Source:
    """One pair of folders of a layout.

    Attributes:
        split: train, test, or all (the data set has no splits).
        images, masks: alternatives; the first pair that exists is used.
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
    """A named layout: every source that exists is used; one of ``needs`` must exist."""

    name: str
    needs: tuple[str, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Found:
    """A source that exists on disk."""

    source: Source
    dataset: str
    images: Path
    masks: Path


def _animal_to_mask(stem: str) -> str:
    return re.sub(r"^animal", "mask", stem)


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
        ),
    ),
)

CSV_LAYOUT = "CSV"


def recognise(root: Path, name: str = "auto") -> tuple[Layout, Path, list[Found]] | None:
    """Find the layout of a folder, or of the only folder inside it (archives often add one).

    Returns:
        The layout, its root folder and its sources on disk; None if no layout matches.
    """
    rows = [layout for layout in LAYOUTS if name in ("auto", layout.name)]
    inner = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    candidates = [root]
    candidates += [p for p in inner if p.name.lower().startswith(("cod10k", "camo-v"))]
    if len(inner) == 1 and inner[0] not in candidates:
        candidates.append(inner[0])
    for start in candidates:
        for layout in rows:
            if any(_exists(start, pattern) for pattern in layout.needs):
                found = [f for source in layout.sources for f in locate(start, source)]
                if found:
                    return layout, start, found
    return None


def locate(root: Path, source: Source) -> Iterator[Found]:
    """Yield every pair of folders that a source names below ``root``."""
    seen: set[Path] = set()
    for pattern in source.images:
        for images in sorted(root.glob(pattern)):
            parent = images.parent
            if not images.is_dir() or parent in seen:
                continue
            star = _star(pattern, images.relative_to(root).as_posix())
            for mask_pattern in source.masks:
                masks = root / mask_pattern.replace("*", star)
                # On a case-insensitive disk Imgs and imgs are one folder, and so are GT and gt.
                if masks.is_dir() and masks != images:
                    seen.add(parent)
                    # Resolved, because the folder "." has no name.
                    own = root.resolve().name
                    named = star if "/" in pattern else own
                    yield Found(source, source.dataset or named or own, images, masks)
                    break


def image_files(folder: Path) -> list[Path]:
    """Return a folder's image files sorted by name, without hidden ones."""
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


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


def _exists(root: Path, pattern: str) -> bool:
    return next(iter(root.glob(pattern)), None) is not None


def _star(pattern: str, path: str) -> str:
    """Return what ``*`` stands for in a path that the pattern matched."""
    expression = re.escape(pattern).replace(r"\*", "(.+?)")
    match = re.fullmatch(expression, path)
    return match.group(1) if match and match.groups() else ""
