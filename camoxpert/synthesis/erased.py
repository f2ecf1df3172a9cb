"""Make the counterfactuals of a data set; repeating the call finishes a stopped one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from camoxpert import console
from camoxpert.inference.job import BatchResult
from camoxpert.synthesis.erasing import MADE, EraseItem, EraseSpec, erase_head
from camoxpert.synthesis.job import Job, Work, make_images
from camoxpert.synthesis.masks import Masked, MaskOptions, with_masks
from camoxpert.synthesis.page import write_page
from camoxpert.synthesis.reading import index_of
from camoxpert.synthesis.records import Head, product_of
from camoxpert.synthesis.relit import notes_of
from camoxpert.synthesis.sources import SourceOptions, Sources, find_sources
from camoxpert.text import count


@dataclass(frozen=True)
class EraseOptions:
    """What is made.

    Attributes:
        seed: of the draws.
        size: longer side of the images, or None.
        image_format: jpg or png.
        page: write the page.
    """

    seed: int = 0
    size: int | None = None
    image_format: str = "jpg"
    page: bool = True


def erase_sources(
    sources: SourceOptions, masks: MaskOptions, output: Path, options: EraseOptions, work: Work
) -> BatchResult:
    """Write every source without its object, and with as much of its background changed.

    Args:
        sources, masks: where images and masks come from.
        output: folder; gets ``TrainDataset/``, ``pairs.csv``, ``provenance.jsonl``,
            ``synthesis.jsonl`` (the ledger), ``counterfactual.json`` and ``synthesis.html``.
        options: what is made.
        work: how it is done.

    Raises:
        ConfigError: the folder holds images of other settings.
        DataError: no sources, a source is a test image, or files cannot be written.
        Stopped: the command was asked to stop.
    """
    found = find_sources(sources)
    masked = with_masks(found.pairs, found.names, masks)
    items = items_of(found, masked)
    product = product_of(options.image_format)
    spec = EraseSpec(
        os.path.abspath(output), product, options.seed, options.size, sources.max_pixels
    )
    derived = masked.derived or "ground truth"
    job = Job(
        title="counterfactual",
        output=output,
        product=product,
        head=Head(erase_head(spec, derived, options.image_format)),
        items=items,
        spec=spec,
        notes=notes_of(found, masked),
    )
    console.decide(
        "erase",
        f"{count(len(items), 'image')} of {count(len(found.pairs), 'source')}: each without its "
        f"object, and with as much of its background changed; masks: {derived}",
    )
    return make_images(job, work, after=write_page if options.page else None)


def items_of(found: Sources, masked: Masked) -> list[EraseItem]:
    """Return the two items of each source, one after the other."""
    return [
        EraseItem(
            name=f"{name}_{made}",
            made=made,
            path=pair.image,
            mask=pair.mask,
            any_size=pair.any_size,
            group=pair.group,
            index=index_of(name, number),
            leak=found.leaks.get(position, ""),
            derived=masked.derived,
            fault=masked.failed.get(pair.image, ""),
        )
        for position, (name, pair) in enumerate(zip(found.names, masked.pairs, strict=True))
        for number, made in enumerate(MADE, start=1)
    ]
