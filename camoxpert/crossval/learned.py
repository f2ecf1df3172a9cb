"""Which images of a cross-validation a model has learned from, as far as its records say.

A run names its images in ``samples.csv``, with the sizes of their files. A checkpoint alone holds
the hash and the folders of its data; shared weights hold the hash.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from camoxpert.config import get_setting
from camoxpert.data.files.folds import SPLITS, read_splits
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.provenance import Finder, read_origins
from camoxpert.errors import CheckpointError, DataError
from camoxpert.files import read_json
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint
from camoxpert.runs.hub import is_hub_name
from camoxpert.runs.identity import MODELS, PLACES, SYNTHETIC, model_file
from camoxpert.runs.samples import SAMPLES, Sample, read_sample_rows
from camoxpert.text import count, shorten
from camoxpert.training.split import LEFT_OUT

FEWEST_RENAMED = 3
"""Images of other names, with image and mask of the same sizes, that are more than chance."""
SHARE_RENAMED = 0.1
"""The same as a share of the smaller of the two data sets."""


@dataclass(frozen=True)
class Learned:
    """What a model, or a folder of maps, learned from.

    Attributes:
        name: as the user named it, with the models that it led to.
        samples: images that it trained on or was chosen by, or (): not recorded.
        roots: folders and files that it took images from.
        made: folders of made images among them.
        digest: hash of its data, or "".
    """

    name: str
    samples: tuple[Sample, ...] = ()
    roots: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    digest: str = ""


def lineage(value: str) -> Iterator[Learned]:
    """Yield what a model learned from, then what the models did that it started from or was taught
    by, as far as they are still there.

    Args:
        value: a model as a user names it, or a folder of maps.

    Raises:
        CheckpointError: the model cannot be had or read; not for those before it.
    """
    waiting, known = [(value, value)], set[str]()
    while waiting:
        name, words = waiting.pop(0)
        place = name if is_hub_name(name) else os.path.realpath(name)
        if place in known:
            continue
        known.add(place)
        try:
            file = model_file(Path(name))
            checkpoint = None if file is None else load_checkpoint(file)
        except CheckpointError:
            if name == value:
                raise
            continue
        if checkpoint is None:
            yield _of_maps(Path(name), words)
            continue
        yield _of_model(checkpoint, words)
        for path in MODELS:
            before = str(get_setting(checkpoint.config, path))
            # Models on the Hub are downloaded for their own sake alone.
            if before and not is_hub_name(before) and Path(before).exists():
                how = "started from" if path == "model.init_from" else "was taught by"
                waiting.append((before, f"{words}, which {how} {before},"))


def run_of(file: Path) -> Path:
    """Return the run folder that a checkpoint file is from, also that of a stage in the cache."""
    kept = read_json(file.parent / "stage.json").get("run")
    return Path(kept) if isinstance(kept, str) else file.parent.parent


def overlap(pool: Manifest, learned: Learned, digests: Iterable[str]) -> str:
    """Return in words which images of a pool something was learned from; "": none is known.

    Args:
        pool: the divided images.
        learned: what a model learned from.
        digests: hashes of the data that the folds train on.
    """
    if learned.digest and learned.digest in digests:
        return "the same data"
    names = _same_images(pool, learned.samples)
    if names:
        return f"{len(names)} of {count(len(pool), 'image')}: {shorten(names, 3)}"
    finder = Finder({"": pool})
    sources = {
        found.path.name
        for folder in learned.made
        for origin in read_origins(Path(folder)).values()
        for found in map(finder.find, origin.sources)
        if found is not None
    }
    if sources:
        return f"images made from {len(sources)} of them: {shorten(sorted(sources), 3)}"
    if not learned.samples:
        for root in learned.roots:
            inside = [pair.name for pair in pool.pairs if _is_below(pair.image, root)]
            if inside:
                return f"data in {root}, where {len(inside)} of them are"
    return ""


def _of_model(checkpoint: Checkpoint, name: str) -> Learned:
    run, config = run_of(checkpoint.path), checkpoint.config
    roots = [get_setting(config, path) for path in sorted(PLACES)]
    return Learned(
        name,
        tuple(row for row in read_sample_rows(run / SAMPLES) if row.split != LEFT_OUT),
        tuple(r for given in roots for r in ((given,) if isinstance(given, str) else given) if r),
        tuple(get_setting(config, SYNTHETIC)),
        str(checkpoint.values.get("data_hash") or ""),
    )


def _of_maps(folder: Path, name: str) -> Learned:
    """Return what the models learned from that made a folder of maps, if folds made it."""
    for place in folder.resolve().parents[:3]:
        if (place / SPLITS).is_file():
            try:
                images = read_splits(place / SPLITS).images
            except DataError:
                break
            return Learned(
                f"{name}, maps of the folds of {place},",
                tuple(Sample(i.dataset, i.name, "training", *i.sizes) for i in images),
            )
    return Learned(name)


def _same_images(pool: Manifest, samples: Iterable[Sample]) -> list[str]:
    """Return the names of images that are among samples: by name and size, or renamed."""
    files = pool.files()
    by_name: dict[str, list[tuple[str, tuple[int, int]]]] = defaultdict(list)
    by_sizes: dict[tuple[int, int], str] = {}
    for (dataset, name), sizes in files.items():
        by_name[name].append((dataset, sizes))
        by_sizes[sizes] = name
    own, moved, renamed, number = set[str](), dict[str, tuple[int, int]](), set[str](), 0
    for sample in samples:
        number += 1
        for dataset, sizes in by_name.get(sample.name, ()):
            if sizes[0] == sample.image_bytes:
                moved[sample.name] = sizes
                if dataset == sample.dataset:
                    own.add(sample.name)
        if sample.mask_bytes > 0 and (sample.image_bytes, sample.mask_bytes) in by_sizes:
            renamed.add(by_sizes[sample.image_bytes, sample.mask_bytes])
    # Numbered images of one size each (BMP) have names and sizes in common and nothing else.
    if own or 2 * len(set(moved.values())) > len(moved):
        return sorted(moved)
    least = max(FEWEST_RENAMED, SHARE_RENAMED * min(len(files), number))
    return sorted(renamed) if len(renamed) >= least else []


def _is_below(image: Path, root: str) -> bool:
    place = Path(root).resolve()
    # A CSV file names images beside it and elsewhere.
    return image.resolve().is_relative_to(place.parent if place.is_file() else place)
