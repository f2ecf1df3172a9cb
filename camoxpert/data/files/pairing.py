"""Match images and masks of two folders by name, without checking them yet."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from camoxpert.data.files.layouts import Found, class_of, flat_pairs, is_noncam, split_of
from camoxpert.data.files.listing import endings, image_files, list_files
from camoxpert.data.files.names import match_names
from camoxpert.text import count, shorten


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        name: path of the image below its folder without the ending, unique in its data set.
        image, mask: files.
        dataset: name of the data set.
        group: class encoded in the name, or the sub-folder, or "".
        any_size: the mask may have another size than the image.
        labeled: False for an image without a mask; ``mask`` is then the image itself.
        made: True for a made image: it is trained on and never measured with.
        empty: True for an image that is known to have no object and is treated as such; without a
            mask of its own, ``mask`` is the image itself.
        told: True where a table says the class, which a name only suggests.
        series: patient, video or sequence that a table says the image is of, or "": images of one
            series are never on both sides of a split.
        modalities: (name, file) of what other sensors saw of it, as far as there is any.
    """

    name: str
    image: Path
    mask: Path
    dataset: str
    group: str
    any_size: bool = False
    labeled: bool = True
    made: bool = False
    empty: bool = False
    told: bool = False
    series: str = ""
    modalities: tuple[tuple[str, Path], ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Image, mask and the files of the modalities."""
        return (self.image, self.mask, *(path for _, path in self.modalities))


@dataclass(frozen=True)
class Pairing:
    """Matched and unmatched files of two folders.

    Attributes:
        found: the folders.
        layout: name of the layout.
        pairs: images with a mask, by name.
        missing: names of images without a mask.
        unused: names of masks without an image.
        doubled: files of one folder that share a name.
        left_out: images without a camouflaged object, excluded on purpose.
        notes: files that are no images, and how names were matched if they differ.
    """

    found: Found
    layout: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    doubled: tuple[tuple[Path, Path], ...]
    left_out: int
    notes: tuple[str, ...] = ()


def pair_files(found: Found, layout: str, noncam: str = "exclude") -> Pairing:
    """Match the images and masks of two folders by name.

    Raises:
        DataError: several masks fit each image.
    """
    image_paths, mask_paths, notes = _files(found)
    images, doubled = by_name(image_paths, found.images)
    masks, doubled_masks = by_name(mask_paths, found.masks)
    own = {found.source.mask_stem(name): name for name in images}
    matched = match_names(
        own, masks, advice=f"Keep the masks of one kind in {found.masks} and move the others."
    )
    of_image = {own[name]: mask for name, mask in matched.partner.items()}
    if matched.rule:
        notes.append(f"masks matched by a rule: {matched.rule}")
    # Sub-folders that hold something else (previews, edges) do not belong to the data.
    strange = _strange_folders(images, of_image)
    if strange:
        number = sum(strange.values())
        notes.append(
            f"{count(number, 'image')} in sub-folders of {found.images} in which no image has a "
            f"mask are not used: {shorten(strange)}"
        )
        images = {name: path for name, path in images.items() if _folder(name) not in strange}
    kept = {s: p for s, p in images.items() if noncam == "include" or not is_noncam(path_stem(s))}
    pairs = tuple(
        Pair(name, path, masks[of_image[name]], found.dataset, group_of(name))
        for name, path in sorted(kept.items())
        if name in of_image
    )
    shared = found.source.shared_masks and not split_of(found.masks.name)
    unused = () if shared else tuple(sorted(set(masks) - set(of_image.values())))
    return Pairing(
        found,
        layout,
        pairs,
        tuple(name for name in kept if name not in of_image),
        unused,
        (*doubled, *doubled_masks),
        len(images) - len(kept),
        tuple(f"{found.dataset} {found.source.split}: {note}" for note in notes),
    )


def by_name(files: Iterable[Path], folder: Path) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """Return files by their path below ``folder`` without ending, and the pairs that share one."""
    named: dict[str, Path] = {}
    doubled = []
    for path in files:
        # macOS writes decomposed accents: the same name must compare equal.
        name = path.relative_to(folder).with_suffix("").as_posix()
        name = unicodedata.normalize("NFC", name)
        if name in named:
            doubled.append((named[name], path))
        named.setdefault(name, path)
    return named, doubled


def path_stem(name: str) -> str:
    """Return the last part of a name."""
    return name.rpartition("/")[2]


def group_of(name: str) -> str:
    """Return the class of an image: encoded in its name, else its sub-folder, else ""."""
    return class_of(path_stem(name)) or _folder(name)


def _files(found: Found) -> tuple[Sequence[Path], Sequence[Path], list[str]]:
    """Return the image files, the mask files, and notes about the other files."""
    if found.images == found.masks:
        images, masks = flat_pairs(image_files(found.images))
        return images, masks, ["one folder for images and masks"]
    notes = []
    listed = []
    for place, other in ((found.images, found.masks), (found.masks, found.images)):
        # A split in a folder of images is never read as a class of it.
        splits = place == found.images
        listing = list_files(
            place, nested=True, enter=partial(_belongs, without=other, splits=splits)
        )
        if splits and any(path != other for path in listing.folders):
            left = shorten(path.name for path in listing.folders if path != other)
            notes.append(f"splits in {place} are not read: {left}")
        listed.append(listing.images)
        if listing.others:
            notes.append(
                f"{count(len(listing.others), 'file')} in {place} are not images of a known kind "
                f"and are not used: {endings(listing.others)}"
            )
    return listed[0], listed[1], notes


def _belongs(folder: Path, *, without: Path, splits: bool) -> bool:
    return folder != without and not (splits and split_of(folder.name))


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _strange_folders(names: Iterable[str], matched: Collection[str]) -> dict[str, int]:
    """Return sub-folder -> images, for those in which no image has a mask while others have."""
    folders = Counter(_folder(name) for name in names)
    used = {_folder(name) for name in matched}
    if not used:
        return {}
    return {place: number for place, number in folders.items() if place and place not in used}
