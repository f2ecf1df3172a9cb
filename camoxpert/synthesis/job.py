"""Make images with the engine of ``predict``: what is left, the ledger, the provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from camoxpert import console, stop
from camoxpert.data.cache.stages import HIT
from camoxpert.data.files.listing import is_image_name, is_side_file
from camoxpert.errors import ConfigError
from camoxpert.files import write_json
from camoxpert.inference.devices import DeviceEngine
from camoxpert.inference.engine import ChunkResult, Spec
from camoxpert.inference.job import BatchResult, Engine, audit, do_items
from camoxpert.inference.ledger import FAILED, Ledger, open_ledger
from camoxpert.inference.local import LocalEngine
from camoxpert.inference.plan import Made, make_plan, remove_unfinished
from camoxpert.inference.products import Product
from camoxpert.runs.jobs import JobSummary, SourceNotes
from camoxpert.synthesis.records import FORMATS, KINDS, PROVENANCE, TABLE, Head, write_provenance
from camoxpert.text import count, shorten


@dataclass(frozen=True)
class Work:
    """How a job is done; none of it changes an image.

    Attributes:
        batch_size: images of a forward pass; None chooses.
        devices: names of devices for worker processes; empty: this process, on ``device``.
        device: as in ``--device``.
        overwrite: make images again that are there.
        limit: make at most this many of the images that are left.
    """

    batch_size: int | None = 8
    devices: Sequence[str] = ()
    device: str = "auto"
    overwrite: bool = False
    limit: int | None = None


@dataclass
class Job:
    """Images to make.

    Attributes:
        title: relight or compose.
        output: folder of the results.
        product: its files.
        head: what all images depend on.
        items: one for each image, with names that differ.
        spec: builds the stages in the process that works.
        notes: facts for the summary.
    """

    title: str
    output: Path
    product: Product
    head: Head
    items: Sequence[Made]
    spec: Spec
    notes: SourceNotes = field(default_factory=SourceNotes)


class _Counted:
    """An engine whose rows say what the caches had; counts that and takes it out of them.

    Whether a result was cached must not be in the ledger: a run that was stopped and finished would
    end with other rows than one that was not.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.caches: dict[str, Counter[str]] = {}

    def results(self, items: Sequence[Any]) -> Iterator[ChunkResult]:
        for result in self.engine.results(items):
            for row in result.rows:
                for stage, outcome in row.pop("cache", {}).items():
                    self.caches.setdefault(stage, Counter())[outcome] += 1
            yield result

    def summary(self) -> JobSummary:
        counts = {stage: dict(counter) for stage, counter in self.caches.items()}
        return self.engine.summary() | {"caches": counts}


def make_images(
    job: Job, work: Work, *, after: Callable[[Ledger, BatchResult], None] | None = None
) -> BatchResult:
    """Make the images that are not there yet; the same call finishes a stopped one.

    Args:
        job: the images.
        work: how it is done.
        after: writes what is told about the whole folder, such as a page.

    Raises:
        ConfigError: the folder holds images of other settings, or of unknown origin.
        DataError: a file cannot be written, or images have no row in the end.
        Stopped: the command was asked to stop.
    """
    result = BatchResult()
    with open_ledger(job.output, KINDS, name=job.product.ledger, table=TABLE) as ledger:
        if ledger.earlier is None:
            _require_own_folder(job)
        if not ledger.finished:
            remove_unfinished(job.output, job.product)
        if work.overwrite:
            _remove_others(job, ledger)
        plan = make_plan(
            ledger, job.head, job.items, KINDS, overwrite=work.overwrite, product=job.product
        )
        if work.limit is not None:
            plan.todo = plan.todo[: work.limit]
        result.skipped, result.replaced = plan.skipped, plan.replaced
        order = [item.name for item in job.items]
        try:
            if plan.todo:
                engine = _Counted(_engine(job, work))
                do_items(engine, plan.todo, ledger, result, job.title)
                result.summary = engine.summary()
                if result.summary.get("deaths"):
                    remove_unfinished(job.output, job.product)
                # What an earlier call made of a source that fails now has no row any more.
                _remove(job, [i.name for i in plan.todo if ledger.index.status(i.name) == FAILED])
        finally:
            with stop.current().deferred():
                ledger.finish(order, complete=False)
                if plan.todo or not (job.output / PROVENANCE).is_file():
                    write_provenance(ledger)
        audit(ledger, plan, result, job.product.item)
        _note_others(job, ledger)
        if result.summary:
            result.summary = {
                **result.summary,
                "settings": job.head.fields(),
                **job.notes,
            }
            write_json(job.output / f"{job.title}.json", result.summary, durable=False)
        if after is not None:
            after(ledger, result)
        # Last: a call that is killed before is not over, and the next one continues it.
        with stop.current().deferred():
            ledger.finish(order, complete=True)
    return result


def _require_own_folder(job: Job) -> None:
    """Refuse to put made images among others: they would be mixed with a real data set."""
    for folder in (*(job.output / name for name in job.product.folders.values()), job.output):
        if folder.is_dir() and any(_is_data(path, job) for path in folder.iterdir()):
            raise ConfigError(
                f"{folder} holds files, and no {job.product.ledger} in {job.output} says that they "
                "were made. Made images are not put among others: name a new folder with -o."
            )


def _is_data(path: Path, job: Job) -> bool:
    """Return whether a file or folder may belong to a data set that lies in the output already.

    As a data set of another layout it would not be read any more beside what is made.
    """
    if is_side_file(path.name):
        return False
    if path.is_dir():
        top = {Path(name).parts[0] for name in job.product.folders.values()}
        return path.name not in top or path.parent != job.output
    return path.parent != job.output or is_image_name(path)


def _remove_others(job: Job, ledger: Ledger) -> None:
    """Remove images of other settings that this call does not replace: train would read them."""
    if ledger.earlier is None or not job.head.differences(ledger.earlier):
        return
    names = {item.name for item in job.items}
    others = [name for name in ledger.made if name not in names]
    # Those of this call may have been written in another format.
    _remove(job, ledger.made)
    if others:
        console.note(f"{count(len(others), 'image')} made with other settings are removed")


def _remove(job: Job, names: Sequence[str]) -> None:
    """Remove the files of images, in whichever format they were written."""
    for name in names:
        for kind in KINDS:
            path = job.product.path(job.output, kind, name)
            for suffix in {path.suffix, *FORMATS.values()}:
                path.with_name(path.name.removesuffix(path.suffix) + suffix).unlink(missing_ok=True)


def _note_others(job: Job, ledger: Ledger) -> None:
    """Say which images stay whose sources are not among those of this call."""
    names = {item.name for item in job.items}
    others = [name for name in ledger.made if name not in names]
    if others:
        console.warn(
            f"{job.output} still holds {count(len(others), 'image')} of an earlier call, which "
            f"this one would not make: {shorten(others)}. Sources are gone, left out or have other "
            "names now. To train without such images make all in a new folder"
        )


def _engine(job: Job, work: Work) -> Engine:
    if work.devices:
        return DeviceEngine(job.spec, work.devices, batch_size=work.batch_size)
    return LocalEngine(job.spec.build(work.device), batch_size=work.batch_size)


def describe_caches(caches: dict[str, dict[str, int]]) -> None:
    """Say of each stage how many results were found, and why the others were not."""
    for stage, counts in caches.items():
        say_outcomes(stage, counts)


def say_outcomes(stage: str, counts: Mapping[str, int]) -> None:
    """Say how many results of a stage were cached, and why the others were not."""
    ordered = sorted(counts.items(), key=lambda item: (item[0] != HIT, item[0]))
    console.decide("cache", f"{stage}: " + "; ".join(f"{text} {n}" for text, n in ordered))
