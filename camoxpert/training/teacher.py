"""Soft maps to learn from: a teacher's, made once for every training image and kept in the cache.

The teacher is an own model, run at two sizes, or a folder of any model's maps. Maps are stored as
grey PNGs under the content that they depend on: images or maps with other names, or in other
places, find them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from camoxpert import console
from camoxpert.config import Config, DataConfig
from camoxpert.data.cache.choice import cache_root
from camoxpert.data.files.image_io import read_map, write_png
from camoxpert.data.files.listing import list_files
from camoxpert.data.files.made import MADE
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.names import NameMatch, match_names
from camoxpert.data.files.negatives import NEGATIVES
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.unlabeled import read_files
from camoxpert.data.samples.augment import image_sides, resize_plane, source_side
from camoxpert.data.samples.soft import SoftMaps
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.evaluation.maps.find import map_folder
from camoxpert.evaluation.maps.masks import named
from camoxpert.files import file_digest, lock, why_missing
from camoxpert.inference.score import forward_batch, probability_maps
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.zoom import ZOOM, zoomed_side
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.runs.hub import is_hub_name
from camoxpert.runs.identity import model_file
from camoxpert.runtime.device import Precision, choose_device, choose_precision
from camoxpert.runtime.host import usable_cores
from camoxpert.text import count, shorten

FORMAT = 1
"""Increase it when the making of maps changes."""


@dataclass(frozen=True)
class Source:
    """What the maps are made from.

    Attributes:
        words: for the user.
        key: hash of all that a map depends on besides the image.
        model: file of an own model; None: a folder of maps, or a model that is gone.
        given: pair -> its map, of a folder of maps.
        rule: how the names of maps were matched with those of images, if they differ.
    """

    words: str
    key: str
    model: Path | None = None
    given: Mapping[Pair, Path] | None = None
    rule: str = ""


def find_soft_maps(
    config: Config,
    images: Manifest,
    *,
    digest: str,
    unreadable: Collection[Pair] = (),
    local_rank: int = 0,
    write: bool = True,
) -> SoftMaps | None:
    """Return the teacher's maps of the training images; make those that are not in the cache.

    Prints the teacher, and hit or miss.

    Args:
        config: settings.
        images: those that are trained on, with and without masks.
        digest: hash of the teacher, also where a stopped run needs only its maps.
        unreadable: images that get no map: they are skipped in training.
        local_rank: chooses the device that runs the teacher.
        write: False makes no maps.

    Returns:
        The maps; None without a teacher, or if some are missing and ``write`` is False.

    Raises:
        CheckpointError, DataError: the teacher or a map cannot be used, or an image has no map.
        Stopped: a stop was requested; the maps that are made stay.
    """
    data = config.data
    if not data.teacher:
        return None
    if not config.loss.teacher:
        console.decide("teacher", f"{data.teacher} is not used: loss.teacher is 0")
        return None
    pairs = [pair for pair in images.pairs if pair not in unreadable]
    device = choose_device(config.train.device, index=local_rank)
    precision = choose_precision(config.train, device)
    source = _source(data.teacher, pairs, digest=digest, precision=precision.name)
    side = source_side(data)
    folder = cache_root(data) / f"teacher-{source.key[:16]}-{side}"
    files = [pair.image if source.given is None else source.given[pair] for pair in pairs]
    places = {pair: folder / f"{name}.png" for pair, name in zip(pairs, _names(files), strict=True)}
    console.decide(
        "teacher",
        f"{source.words}; weight {config.loss.teacher:g}, where it agrees with the mask; "
        f"{count(len(pairs), 'map')} of {side} px",
    )
    if source.rule:
        console.decide("", f"maps matched by a rule: {source.rule}")
    missing = [pair for pair in pairs if not _is_there(places[pair])]
    if missing:
        verdict = f"miss: {len(missing)} of {count(len(pairs), 'map')} not made yet"
        if data.strict_cache:
            raise DataError(
                f"--strict-cache: {folder}: {verdict}. Run once without --strict-cache to make "
                f"them."
            )
        if not write:
            console.decide("", f"{verdict}; training would make them first, in {folder}")
            return None
        console.decide("", f"{verdict}; making them in {folder}")
        todo = {pair: places[pair] for pair in missing}
        _make(source, todo, side, config, device=device, precision=precision, folder=folder)
        if device.type == "cuda":
            # The batch size is chosen from the memory that is free.
            torch.cuda.empty_cache()
    else:
        console.decide("", f"hit: {folder}")
    found = {(pair.dataset, pair.name): place for pair, place in places.items()}
    return SoftMaps(found, side)


def _source(teacher: str, pairs: Sequence[Pair], *, digest: str, precision: str) -> Source:
    """Return what a teacher's maps are made from."""
    path = Path(teacher)
    parts: list[object] = [FORMAT, digest]
    if is_hub_name(path):
        try:
            path = resolve_checkpoint(path)
        except CheckpointError as error:
            if not digest:
                raise CheckpointError(f"--teacher: {error}") from error
    if not path.exists():
        if not digest:
            raise DataError(f"--teacher: {why_missing(path)}")
        words = f"{teacher}, which is gone: a stopped run needs its maps alone"
        return Source(words, _key([*parts, ZOOM, precision]))
    model = model_file(path)
    if model is None:
        given, rule = _given_maps(path, pairs)
        return Source(f"maps in {path}", _key(parts), given=given, rule=rule)
    words = f"{model}, its evaluated weights at 1 and {ZOOM:g} x its size"
    return Source(words, _key([*parts, ZOOM, precision]), model)


def _key(parts: Sequence[object]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _names(files: Sequence[Path]) -> list[str]:
    """Return names made of the contents of files."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        digests = pool.map(_digest, files)
        found = console.track(digests, "reading images", total=len(files))
        return [digest[:32] for digest in found]


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _is_there(path: Path) -> bool:
    # A power cut can leave an empty file.
    return path.is_file() and path.stat().st_size > 0


def _given_maps(folder: Path, pairs: Sequence[Pair]) -> tuple[dict[Pair, Path], str]:
    """Return the map of each image in a folder of maps, matched by name as ``evaluate`` does, and
    the rule that matched them.

    Names may be those of the images, or have the name of the data set before them.

    Raises:
        DataError: an image has no map.
    """
    place = map_folder(folder) or folder
    maps = named(list_files(place, nested=True).images, place)
    if not maps:
        raise DataError(
            f"--teacher: {folder} holds neither a checkpoint nor maps. Give a run, a checkpoint, "
            f"shared weights, or a folder of grey maps named like the images."
        )
    plain: Mapping[str, Pair] = {pair.name: pair for pair in pairs}
    whole = {f"{_plain_dataset(pair)}/{pair.name}": pair for pair in pairs}
    matched, names = NameMatch({}), plain
    for tried in (plain, whole):
        # Names that several data sets have say nothing alone.
        if len(tried) == len(pairs):
            advice = f"Keep the maps of one kind in {place} and move the others."
            found_here = match_names(tried, maps, advice=advice)
            if len(found_here.partner) > len(matched.partner):
                matched, names = found_here, tried
    found = {names[name]: maps[partner] for name, partner in matched.partner.items()}
    missing = [pair.name for pair in pairs if pair not in found]
    if missing:
        raise DataError(
            f"--teacher: {len(missing)} of {len(pairs)} training images have no map in {place}: "
            f"{shorten(missing)}. A map must have its image's name. Add the maps, or give an own "
            f"model, which makes them itself."
        )
    return found, matched.rule


def _make(
    source: Source,
    todo: Mapping[Pair, Path],
    side: int,
    config: Config,
    *,
    device: torch.device,
    precision: Precision,
    folder: Path,
) -> None:
    """Write the missing maps."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock(folder / ".lock", waiting=_say_waiting)
        with locked:
            # Another process may have made them while this one waited.
            left = {pair: place for pair, place in todo.items() if not _is_there(place)}
            if source.given is not None:
                made = _resized_maps(source.given, list(left), side, config.data.max_pixels)
            elif source.model is not None:
                teacher = Teacher(load_checkpoint(source.model), device, precision)
                made = teacher.maps(list(left), side, config.data)
            else:
                raise CheckpointError(
                    f"--teacher: {config.data.teacher} is gone, and so are {len(left)} of its maps "
                    f"({folder}). Bring the teacher back."
                )
            for pair, map_HW in console.track(made, "teacher's maps", total=len(left)):
                write_png(left[pair], map_HW)
    except OSError as error:
        raise DataError(
            f"The teacher's maps cannot be written in {folder}: {error}. Give another folder with "
            f"--cache-dir."
        ) from error


def _say_waiting() -> None:
    console.decide("", "another process is making these maps; waiting for it")


def _resized_maps(
    given: Mapping[Pair, Path], pairs: Sequence[Pair], side: int, max_pixels: int
) -> Iterator[tuple[Pair, np.ndarray]]:
    for pair in pairs:
        yield pair, resize_plane(read_map(given[pair], max_pixels=max_pixels), side)


class Teacher:
    """An own model that makes soft maps: its evaluated weights at two sizes, averaged.

    Args:
        checkpoint: the model.
        device, precision: where it runs and in which number format.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, precision: Precision) -> None:
        own = image_sides(checkpoint.config.data)
        self.device, self.precision = device, precision
        self.sides: tuple[int, ...] = tuple(dict.fromkeys((own[0], zoomed_side(own[0]))))
        try:
            model = _built(checkpoint, (*own, *self.sides))
        except ConfigError:
            # A backbone for images of one size.
            self.sides = own[:1]
            model = _built(checkpoint, own)
        shown = " and ".join(map(str, self.sides))
        console.decide("", f"the teacher sees each image at {shown} px and averages probabilities")
        self.model = model.to(device).eval()

    def maps(
        self, pairs: Sequence[Pair], side: int, data: DataConfig
    ) -> Iterator[tuple[Pair, np.ndarray]]:
        """Yield each image with its map, uint8 (``side``, ``side``).

        Args:
            pairs: the images.
            side: of the maps.
            data: settings; with ``unreadable`` skip, unreadable images have no map: training skips
                them as well.

        Raises:
            DataError: an image cannot be read.
        """
        size = forward_batch(self.device)
        read = partial(self._read, max_pixels=data.max_pixels, skip=data.unreadable == "skip")
        with ThreadPoolExecutor(usable_cores()) as pool:
            for start in range(0, len(pairs), size):
                part = pairs[start : start + size]
                found = [(p, x) for p, x in zip(part, pool.map(read, part), strict=True) if x]
                if not found:
                    continue
                # How a convolution rounds depends on the number of images: it is always the same.
                inputs = [x for _, x in found] + [found[-1][1]] * (size - len(found))
                stacked = [torch.stack(at_size) for at_size in zip(*inputs, strict=True)]
                probs = self.probabilities(stacked, side)
                values = (probs * 255).round().byte().cpu().numpy()
                yield from zip((pair for pair, _ in found), values, strict=False)

    def probabilities(self, images: Sequence[Tensor], side: int) -> Tensor:
        """Return float32 (B, ``side``, ``side``), the mean over the sizes of the images.

        Args:
            images: uint8 (B, 3, S, S) for each of ``sides``.
            side: of the result.
        """
        total = torch.zeros(())
        for at_size in images:
            sizes = [(side, side)] * len(at_size)
            on_device = at_size.to(self.device)
            found = probability_maps(self.model, on_device, sizes, precision=self.precision)
            total = torch.stack(found.maps) + total.to(self.device)
        return total / len(images)

    def _read(self, pair: Pair, *, max_pixels: int, skip: bool) -> list[Tensor]:
        """Return an image at each size, uint8 (3, S, S); [] for one that is skipped."""
        try:
            image, _ = read_files(pair, max_pixels=max_pixels, at_least=max(self.sides))
        except DataError:
            if skip:
                return []
            raise
        resized = [resize_plane(image, side) for side in self.sides]
        return [torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1))) for x in resized]


def _plain_dataset(pair: Pair) -> str:
    """Return the name of a pair's data set without the word for its kind."""
    name = pair.dataset
    for kind in ("unlabeled", MADE, NEGATIVES):
        name = name.removeprefix(f"{kind} ")
    return name


def _built(checkpoint: Checkpoint, sides: Sequence[int]) -> CamoXpert:
    names = checkpoint.config.data.beside_rgb
    model = build_model(checkpoint.model_config, sides=sides, modalities=names)
    try:
        model.load_state_dict(checkpoint.evaluated_weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"--teacher: {checkpoint.path} does not fit its own settings: {error}"
        ) from error
    return model
