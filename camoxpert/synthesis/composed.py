"""Compose images of objects into a folder; repeating the call finishes a stopped one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from camoxpert import console
from camoxpert.data.files.image_io import probe
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import file_digest
from camoxpert.inference.job import BatchResult
from camoxpert.runs.jobs import LeakGuard
from camoxpert.runtime.host import usable_cores
from camoxpert.synthesis.compose.cached import Source, backgrounds_of, objects_of
from camoxpert.synthesis.compose.draw import draw_composition
from camoxpert.synthesis.compose.library import read_picture
from camoxpert.synthesis.compose.reading import read_masked
from camoxpert.synthesis.compose.records import ComposeSettings
from camoxpert.synthesis.composing import ComposeItem, ComposeSpec, SourceFile, compose_head
from camoxpert.synthesis.job import Job, Work, make_images
from camoxpert.synthesis.masks import MaskOptions, with_masks
from camoxpert.synthesis.page import write_page
from camoxpert.synthesis.records import Head, product_of
from camoxpert.synthesis.sources import SourceOptions, find_sources
from camoxpert.text import count, shorten


@dataclass(frozen=True)
class ComposeOptions:
    """What is made.

    Attributes:
        settings: what compositions are drawn from.
        seed: of the draws.
        num_samples: images; None: one for each object.
        image_format: jpg or png.
        cutouts: folders of RGBA pictures that give objects.
        backgrounds: data sets or folders of images; empty: the sources themselves.
        cache_folder: of the descriptions of sources; None: nothing is kept.
        strict_cache: a description that is not cached is an error.
        page: write the page.
    """

    settings: ComposeSettings = field(default_factory=ComposeSettings)
    seed: int = 0
    num_samples: int | None = None
    image_format: str = "jpg"
    cutouts: Sequence[str] = ()
    backgrounds: Sequence[str] = ()
    cache_folder: Path | None = None
    strict_cache: bool = False
    page: bool = True


@dataclass
class _Pictures:
    """Pictures that give objects or backgrounds, and what is known of their files."""

    sources: list[Source] = field(default_factory=list)
    files: dict[str, SourceFile] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    compared: int = 0
    derived: str = ""
    models: int = 0
    broken: list[tuple[object, str]] = field(default_factory=list)


@dataclass
class ComposeResult:
    """What came out.

    Attributes:
        images: counts and failures.
        broken: (source, reason) of sources that were left out.
    """

    images: BatchResult
    broken: list[tuple[object, str]]


def compose_sources(
    sources: SourceOptions, masks: MaskOptions, output: Path, options: ComposeOptions, work: Work
) -> ComposeResult:
    """Write images of objects before backgrounds that resemble them.

    Args:
        sources, masks: where the objects come from.
        output: folder; gets what ``relight_sources`` writes, and ``compose.json``.
        options: what is made.
        work: how it is done.

    Raises:
        ConfigError: the folder holds images of other settings; descriptions are not cached, under
            ``--strict-cache``.
        DataError: no sources, a source is a test image, or files cannot be written.
        Stopped: the command was asked to stop.
    """
    lists = [
        sources,
        *(replace(sources, roots=r, masks=False) for r in (options.cutouts, options.backgrounds)),
    ]
    pictures = _pictures(sources, masks, beside=lists[1:]) if sources.roots else _Pictures()
    cutouts = _unmasked(lists[1], "cut-out", beside=[lists[0], lists[2]])
    given = _unmasked(lists[2], "background", beside=lists[:2])
    objects = [*pictures.sources, *cutouts.sources]
    grounds = given.sources or pictures.sources
    if not grounds:
        raise ConfigError(
            "Cut-outs need backgrounds: --backgrounds DIR names folders of images or data sets."
        )
    files = _all_files(pictures, cutouts, given)
    broken = [*pictures.broken, *cutouts.broken, *given.broken]
    shared = grounds is pictures.sources
    objects = _sound(objects, broken, sources.max_pixels, cut=True)
    whole = {source.image for source in objects}
    grounds = (
        [s for s in grounds if s.image in whole]
        if shared
        else (_sound(grounds, broken, sources.max_pixels))
    )
    if not objects or not grounds:
        what = "background" if objects else "object"
        raise DataError(f"No {what} is left to compose images of: {broken[0][0]}: {broken[0][1]}")
    library, verdict = objects_of(objects, options.cache_folder)
    index, second = backgrounds_of(grounds, options.cache_folder)
    for kind, text in (("objects", verdict), ("backgrounds", second)):
        console.decide("cache", f"{kind}: {text}")
        if options.strict_cache and text != "hit":
            raise ConfigError(
                f"--strict-cache: the descriptions of {kind} are not cached ({text})."
            )
    if not len(library) or not len(index.windows):
        # Says which of them is missing, and why.
        draw_composition(options.seed, 0, options.settings, library, index)
    if library.left_out:
        left = (f"{reason} {number}" for reason, number in library.left_out.items())
        console.note(f"not pasted: {shorten(left)}")
    product = product_of(options.image_format)
    spec = ComposeSpec(
        output=os.path.abspath(output),
        product=product,
        seed=options.seed,
        settings=options.settings,
        objects=library,
        backgrounds=index,
        files=files,
        derived=pictures.derived,
    )
    number = options.num_samples or max(1, len(library))
    described = (
        f"{count(len(library), 'object')}, {count(len(index), 'background')} "
        f"({_content_of(objects, grounds, files)})"
    )
    job = Job(
        title="compose",
        output=output,
        product=product,
        head=Head(compose_head(spec, described, options.image_format)),
        items=[ComposeItem(f"composed_{n:06d}", n) for n in range(number)],
        spec=spec,
        notes={
            "objects": len(library),
            "backgrounds": len(index),
            "not_pasted": library.left_out,
            "test_sources": {p: known.leak for p, known in files.items() if known.leak},
            "leak_guard": _guard(pictures, cutouts, given),
            "mask_models_loaded": pictures.models,
            "broken_sources": [[str(path), reason] for path, reason in broken],
        },
    )
    console.decide("compose", f"{count(number, 'image')} of {described}")
    return ComposeResult(make_images(job, work, after=write_page if options.page else None), broken)


def _all_files(*found: _Pictures) -> dict[str, SourceFile]:
    """Return the files of all pictures; one that any list knows as a test image stays that."""
    files: dict[str, SourceFile] = {}
    for pictures in found:
        for path, known in pictures.files.items():
            if path not in files or not files[path].leak:
                files[path] = known
    return files


def _pictures(
    options: SourceOptions, masks: MaskOptions, beside: Sequence[SourceOptions]
) -> _Pictures:
    """Return the pictures of data sets, with masks."""
    found = find_sources(options, what="source", beside=beside)
    masked = with_masks(found.pairs, found.names, masks)
    pictures = _Pictures(
        tests=found.tests,
        compared=found.compared,
        derived=masked.derived,
        models=masked.models,
        broken=[(path, reason) for path, reason in masked.failed.items()],
    )
    for position, (name, pair) in enumerate(zip(found.names, masked.pairs, strict=True)):
        if pair.image not in masked.failed:
            source = Source(name, str(pair.image), str(pair.mask))
            _add(pictures, source, pair.group, found.leaks.get(position, ""))
    return pictures


def _unmasked(options: SourceOptions, what: str, beside: Sequence[SourceOptions]) -> _Pictures:
    """Return RGBA pictures, whose alpha is their mask, or backgrounds: with the masks of data sets,
    or without any."""
    if not options.roots:
        return _Pictures()
    found = find_sources(options, what=what, beside=beside)
    pictures = _Pictures(tests=found.tests, compared=found.compared)
    for position, (name, pair) in enumerate(zip(found.names, found.pairs, strict=True)):
        mask = str(pair.mask) if pair.labeled and what == "background" else ""
        leak = found.leaks.get(position, "")
        _add(pictures, Source(name, str(pair.image), mask), pair.group, leak)
    return pictures


def _add(pictures: _Pictures, source: Source, group: str, leak: str) -> None:
    """Add a picture with the hashes of its files, or the reason why it cannot be read."""
    try:
        digests = {path: file_digest(Path(path)) for path in (source.image, source.mask) if path}
    except OSError as error:
        pictures.broken.append((source.image, f"it cannot be read: {error.strerror or error}"))
        return
    pictures.sources.append(source)
    for path, digest in digests.items():
        pictures.files[path] = SourceFile(digest, group, leak if path == source.image else "")


def _guard(*found: _Pictures) -> LeakGuard:
    """Return which test images the sources were compared with."""
    most = max(found, key=lambda pictures: pictures.compared)
    return {"test_sets": list(most.tests), "test_images": most.compared}


def _sound(
    sources: Sequence[Source],
    broken: list[tuple[object, str]],
    max_pixels: int,
    *,
    cut: bool = False,
) -> list[Source]:
    """Return the pictures that can be decoded and are not too large; add the others to ``broken``.

    ``cut``: objects are cut from them, so that those without a mask must be RGBA pictures.
    """

    def why(source: Source) -> str:
        try:
            for path in (source.image, source.mask):
                if path:
                    probe(path, max_pixels=max_pixels)
            if cut and not source.mask:
                read_picture(source.name, source.image)
            else:
                read_masked(source.image, source.mask)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(usable_cores()) as pool:
        reasons = list(
            console.track(pool.map(why, sources), "checking sources", total=len(sources))
        )
    known = {str(path) for path, _ in broken}
    for source, reason in zip(sources, reasons, strict=True):
        if reason and source.image not in known:
            broken.append((source.image, reason))
    return [source for source, reason in zip(sources, reasons, strict=True) if not reason]


def _content_of(
    objects: Sequence[Source], grounds: Sequence[Source], files: Mapping[str, SourceFile]
) -> str:
    """Return a short hash of what all sources hold, in their order."""
    digest = hashlib.sha256()
    for source in (*objects, None, *grounds):
        parts = () if source is None else (source.image, source.mask)
        digest.update(("\n".join(files[path].sha256 for path in parts if path) + "\n\n").encode())
    return digest.hexdigest()[:12]
