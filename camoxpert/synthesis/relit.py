"""Relight the sources of a data set into a folder; repeating the call finishes a stopped one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from camoxpert import console
from camoxpert.data.cache.stages import HIT, choose_folder, require_hits
from camoxpert.data.files.image_io import probe
from camoxpert.data.files.listing import list_files
from camoxpert.data.files.names import match_names
from camoxpert.data.files.pairing import by_name
from camoxpert.errors import DataError
from camoxpert.files import why_missing
from camoxpert.inference.job import BatchResult
from camoxpert.inference.plan import digest_of
from camoxpert.runs.jobs import SourceNotes
from camoxpert.synthesis.job import Job, Work, describe_caches, make_images
from camoxpert.synthesis.lightsource import Reading, RelightItem, read_source
from camoxpert.synthesis.masks import Masked, MaskOptions, with_masks
from camoxpert.synthesis.page import write_page
from camoxpert.synthesis.reading import index_of
from camoxpert.synthesis.records import Head, product_of
from camoxpert.synthesis.relight.draw import RelightSettings
from camoxpert.synthesis.relighting import RelightSpec, relight_head
from camoxpert.synthesis.sources import SourceOptions, Sources, find_sources
from camoxpert.text import count, shorten

MODEL_FILES = (".json", ".safetensors", ".bin")
BYTES_A_PIXEL = 4
"""Of the stage cache: albedo and height in half precision."""


@dataclass(frozen=True)
class RelightOptions:
    """What is made.

    Attributes:
        settings: what lights are drawn from.
        seed: of the draws.
        per_image: lights of each source.
        num_samples: images in total, instead; None: ``per_image`` counts.
        size: longer side of the images, or None.
        image_format: jpg or png.
        depth_maps: folder of depth maps, or None.
        depth_model: folder of a network that estimates depth, or None: without either heights come
            from masks.
        cache: auto, disk or none.
        cache_folder: of the stages.
        strict_cache: a result that is not cached is an error.
        page: write the page.
    """

    settings: RelightSettings = field(default_factory=RelightSettings)
    seed: int = 0
    per_image: int = 4
    num_samples: int | None = None
    size: int | None = None
    image_format: str = "jpg"
    depth_maps: str | None = None
    depth_model: str | None = None
    cache: str = "auto"
    cache_folder: Path = Path()
    strict_cache: bool = False
    page: bool = True


def relight_sources(
    sources: SourceOptions, masks: MaskOptions, output: Path, options: RelightOptions, work: Work
) -> BatchResult:
    """Write every source in several lights.

    Args:
        sources, masks: where images and masks come from.
        output: folder; gets ``TrainDataset/``, ``pairs.csv``, ``provenance.jsonl``,
            ``synthesis.jsonl`` (the ledger), ``relight.json`` and ``synthesis.html``.
        options: what is made.
        work: how it is done.

    Raises:
        ConfigError: the folder holds images of other settings; a result is not cached, under
            ``--strict-cache``.
        DataError: no sources, a source is a test image, or files cannot be written.
        Stopped: the command was asked to stop.
    """
    found = find_sources(sources)
    masked = with_masks(found.pairs, found.names, masks)
    depth = _depth_maps(options.depth_maps, found)
    items = items_of(found, masked, options, depth)
    product = product_of(options.image_format)
    folder = choose_folder(options.cache, options.cache_folder, _cache_bytes(found, options))
    spec = RelightSpec(
        output=os.path.abspath(output),
        product=product,
        seed=options.seed,
        settings=options.settings,
        reading=Reading(
            size=options.size,
            max_pixels=sources.max_pixels,
            cache=None if folder is None else os.path.abspath(folder),
            depth=_heights(options),
        ),
        depth_model=options.depth_model or "",
    )
    if options.strict_cache:
        _require_cached(items, spec.reading)
    derived = masked.derived or "ground truth"
    job = Job(
        title="relight",
        output=output,
        product=product,
        head=Head(relight_head(spec, derived, options.image_format)),
        items=items,
        spec=spec,
        notes=notes_of(found, masked),
    )
    console.decide(
        "relight",
        f"{count(len(items), 'image')} of {count(len(found.pairs), 'source')}; masks: {derived}; "
        f"heights: {spec.reading.depth or 'from masks'}",
    )
    result = make_images(job, work, after=write_page if options.page else None)
    describe_caches(result.summary.get("caches", {}))
    return result


def items_of(
    found: Sources, masked: Masked, options: RelightOptions, depth: Sequence[Path]
) -> list[RelightItem]:
    """Return an item for each image, the lights of a source one after the other."""
    number = len(found.pairs)
    total = options.num_samples or number * options.per_image
    # Who gets one more than others: spread over the data, and the same with a larger total.
    order = sorted(range(number), key=lambda position: index_of(found.names[position], 0))
    more = set(order[: total % number])
    items = []
    for position, (name, pair) in enumerate(zip(found.names, masked.pairs, strict=True)):
        each = total // number + (position in more)
        items += [
            RelightItem(
                name=f"{name}_r{variant}",
                path=pair.image,
                mask=pair.mask,
                depth=depth[position] if depth else None,
                any_size=pair.any_size,
                group=pair.group,
                index=index_of(name, variant),
                leak=found.leaks.get(position, ""),
                derived=masked.derived,
                fault=masked.failed.get(pair.image, ""),
            )
            for variant in range(1, each + 1)
        ]
    return items


def _heights(options: RelightOptions) -> str:
    """Return where heights come from, "" for masks.

    Raises:
        DataError: there is no such folder.
    """
    if options.depth_model is None:
        return "" if options.depth_maps is None else "depth maps"
    folder = Path(options.depth_model)
    if not folder.is_dir():
        raise DataError(f"--depth-model: {why_missing(folder, 'folder')}")
    files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
    return f"depth model {folder.resolve().name} ({(digest_of(files) or '')[:12]})"


def _depth_maps(folder: str | None, found: Sources) -> list[Path]:
    """Return the depth map of every source; [] where none are used.

    Raises:
        DataError: an image has no depth map.
    """
    if folder is None:
        return []
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"--depth-maps: {why_missing(root, 'folder')}")
    maps, _ = by_name(list_files(root, nested=True).images, root)
    names = list(found.names)
    matched = match_names(names, maps, advice=f"Keep the maps of one kind in {root}.")
    missing = [name for name in names if name not in matched.partner]
    if missing:
        raise DataError(
            f"--depth-maps {root}: {len(missing)} of {len(names)} images have no depth map: "
            f"{shorten(missing)}. A depth map must have its image's name."
        )
    return [maps[matched.partner[name]] for name in names]


def _cache_bytes(found: Sources, options: RelightOptions) -> int:
    """Estimate the bytes of the stage cache from a few sources."""
    step = max(1, len(found.pairs) // 16)
    pixels = []
    for pair in found.pairs[::step]:
        try:
            height, width = probe(pair.image).upright
        except DataError:
            continue
        scale = 1.0 if options.size is None else min(1.0, options.size / max(height, width))
        pixels.append(height * width * scale**2)
    mean = sum(pixels) / len(pixels) if pixels else 0.0
    return round(BYTES_A_PIXEL * mean * len(found.pairs))


def _require_cached(items: Sequence[RelightItem], reading: Reading) -> None:
    """Raise ConfigError if a stage has no cached result for a source."""
    first = {item.files: item for item in items}.values()
    misses: dict[str, list[tuple[object, str]]] = {}
    for item in console.track(first, "looking at the caches", total=len(first)):
        try:
            source = read_source(item, reading, {})
        except DataError:
            # It becomes a failed row.
            continue
        for stage, cache in reading.caches().items():
            outcome = source.outcomes.get(stage) or cache.holds(source.keys[stage])
            if outcome != HIT:
                misses.setdefault(stage, []).append((item.path, outcome))
    for stage, missing in misses.items():
        require_hits(stage, missing)


def notes_of(found: Sources, masked: Masked) -> SourceNotes:
    """Return what the summary says of the sources."""
    return {
        "sources": len(found.pairs),
        "test_sources": {str(found.pairs[n].image): reason for n, reason in found.leaks.items()},
        "leak_guard": {"test_sets": list(found.tests), "test_images": found.compared},
        "mask_models_loaded": masked.models,
    }
