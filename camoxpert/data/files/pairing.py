"""Match images and masks of two folders by name, without checking them yet."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from camoxpert.data.files.layouts import Found, class_of, image_files, is_noncam


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        name: stem of the image, unique in its data set.
        image, mask: files.
        dataset: name of the data set.
        group: class encoded in the name, or "".
    """

    name: str
    image: Path
    mask: Path
    dataset: str
    group: str


@dataclass(frozen=True)
class Pairing:
    """Matched and unmatched files of two folders.

    Attributes:
        found: the folders.
        layout: name of the layout.
        pairs: images with a mask, by name.
        missing: stems of images without a mask.
        unused: stems of masks without an image.
        doubled: files of one folder that share a stem.
        left_out: images without a camouflaged object, excluded on purpose.
    """

    found: Found
    layout: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    doubled: tuple[tuple[Path, Path], ...]
    left_out: int


def pair_files(found: Found, layout: str, noncam: str = "exclude") -> Pairing:
    """Match the images and masks of two folders by name."""
    images, doubled = _by_stem(found.images)
    masks, doubled_masks = _by_stem(found.masks)
    kept = {s: p for s, p in images.items() if noncam == "include" or not is_noncam(s)}
    of_image = {stem: found.source.mask_stem(stem) for stem in kept}
    unused = sorted(set(masks) - {found.source.mask_stem(stem) for stem in images})
    pairs = tuple(
        Pair(stem, path, masks[of_image[stem]], found.dataset, class_of(stem))
        for stem, path in sorted(kept.items())
        if of_image[stem] in masks
    )
    return Pairing(
        found,
        layout,
        pairs,
        tuple(stem for stem, mask in of_image.items() if mask not in masks),
        () if found.source.shared_masks else tuple(unused),
        (*doubled, *doubled_masks),
        len(images) - len(kept),
    )


def _by_stem(folder: Path) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """Return a folder's image files by stem, and the pairs of files that share one."""
    files: dict[str, Path] = {}
    doubled = []
    for path in image_files(folder):
        # macOS writes decomposed accents: the same name must compare equal.
        stem = unicodedata.normalize("NFC", path.stem)
        if stem in files:
            doubled.append((files[stem], path))
        files.setdefault(stem, path)
    return files, doubled
