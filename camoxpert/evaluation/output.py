"""The output folder of an evaluation: written completely or not at all, never over other files.

Results are kept by method and data set: a later evaluation into the same folder replaces those it
scores again and keeps the others.

::

    scores.json                     results, comparisons, gallery, command, versions, files
    scores.csv, scores.md, scores.tex
    per_image/METHOD/DATASET.csv    a row of scores for each image
    curves/DATASET.png              precision over recall, F and E over thresholds
    images/DATASET_best_1.jpg       and worst, and disputed where there are several methods, and
                                    false_alarm and missed where some images have no object
    robustness.csv, .md, .tex       with --corruptions: scores and retention
    robustness/DATASET.png, .jpg    retention over severity, and what the corruptions look like
    presence.csv, .md, .tex         with images without an object: presence and false masks
    presence/DATASET.png            reliability curve of the presence
    index.html                      all of it on one page
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from camoxpert import console, stop
from camoxpert.errors import ConfigError, DataError
from camoxpert.evaluation.options import ScoringOptions
from camoxpert.evaluation.results import Scored, compare_all
from camoxpert.evaluation.tables import (
    write_curves,
    write_presence,
    write_robustness,
    write_tables,
)
from camoxpert.files import (
    leads_outside,
    lock,
    read_json,
    require_writable,
    why_unwritable,
    write_json,
    write_rows,
)
from camoxpert.pages.evaluation import write_evaluation_page
from camoxpert.runs.info import versions
from camoxpert.runs.scores import (
    ComparisonEntry,
    EarlierScores,
    GalleryEntry,
    ResultEntry,
    ScoresFile,
    holds_results,
)
from camoxpert.text import file_names

UNFINISHED = ".evaluation-"
"""How the names of unfinished folders, and of the lock, begin."""
MARKER = "scores.json"
"""Lists, under "files", what an evaluation wrote; only those files may be replaced."""


class OutputFolder:
    """Collects files in an unfinished folder and moves them to the final one at the end.

    The unfinished folder is on the same disk as the final one: inside it if that exists (it may be
    a mount point), else beside it. It is deleted unless ``finish`` was called.

    Args:
        target: final folder. It may exist if it is empty or holds an earlier evaluation, which is
            then merged with this one. None: the first free name of ``evaluation``, ``evaluation-2``
            ... in the working directory.
        scoring: how images will be scored.

    Raises:
        ConfigError: the target is a file, holds other files, or scores by another protocol, or it
            cannot be written.
    """

    def __init__(self, target: Path | None, scoring: ScoringOptions | None = None) -> None:
        self.target = target
        self._held = contextlib.ExitStack()
        self._replaces = target is not None and target.is_dir()
        if target is not None and target.exists() and not target.is_dir():
            raise ConfigError(f"--output {target} is a file. Name another folder with -o.")
        self._old = _own_files(target) if target is not None and self._replaces else []
        self.earlier = _earlier(target) if target is not None and self._old else {}
        if MARKER in self._old and not self.earlier:
            # Its results would be lost without a word.
            raise ConfigError(
                f"{target}/{MARKER} is damaged, so its results cannot be kept beside new ones. "
                f"Name another folder with -o, or remove {target}."
            )
        if scoring is not None:
            _require_same_protocol(self.earlier, scoring, target)
        place = target if target is not None and self._replaces else _parent(target)
        self._made: list[Path] = []
        try:
            require_writable(place)
            self._made = [p for p in (place, *place.parents) if not p.exists()]
            place.mkdir(parents=True, exist_ok=True)
            self.unfinished = Path(tempfile.mkdtemp(dir=place, prefix=UNFINISHED))
        except OSError as error:
            raise ConfigError(
                f"The results cannot be written to {target or place}: {why_unwritable(error)}. "
                "Name another folder with -o."
            ) from error

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()
        if self.unfinished.exists() and not isinstance(error, _NotMovedError):
            shutil.rmtree(self.unfinished, ignore_errors=True)
            for folder in self._made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def files(self) -> list[str]:
        """Return the files written so far, relative to the folder, sorted."""
        root = self.unfinished
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def read_again(self) -> None:
        """Read what the folder holds by now, and lock it until the end: another evaluation may have
        ended in it since this one began."""
        if self.target is None:
            return
        if not self.target.exists():
            # Two evaluations may begin before either has made the folder.
            self._made.insert(0, self.target)
            self.target.mkdir(exist_ok=True)
        self._replaces = True
        path = self.target / f"{UNFINISHED}lock"
        self._held.enter_context(lock(path))
        # Removed while it is held: whoever waits opens the file again.
        self._held.callback(path.unlink, missing_ok=True)
        self._old = _own_files(self.target)
        self.earlier = _earlier(self.target) if self._old else {}

    def picture_names(self, datasets: Iterable[str]) -> dict[str, str]:
        """Return a file name without ending for each data set, which none of the earlier has."""
        earlier = [entry["dataset"] for entry in self.earlier.get("results", ())]
        return file_names([*earlier, *datasets])

    def keep(self, name: str, new_name: str = "") -> bool:
        """Keep a file of the earlier evaluation, by its relative name; False if it is not there, or
        if this evaluation has written a file of its new name.

        A symlink is not followed: it could bring any file into the results.
        """
        if self.target is None or name not in self._old:
            return False
        source, place = self.target / name, self.unfinished / (new_name or name)
        if source.is_symlink() or not source.is_file() or place.exists():
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        return True

    def finish(self) -> Path:
        """Move everything to the final folder and return it.

        Raises:
            DataError: a file could not be moved; the results are kept, and the message says where.
        """
        try:
            with stop.current().deferred():
                return self._put_in_place()
        except OSError as error:
            raise _NotMovedError(
                f"The results are complete but could not be moved to their folder: {error}. They "
                f"are in {self.unfinished}."
            ) from error

    def _put_in_place(self) -> Path:
        if self.target is not None and self._replaces:
            return self._replace(self.target)
        # mkdtemp makes private folders; others should be able to read the results.
        self.unfinished.chmod(0o755)
        if self.target is not None:
            self.unfinished.rename(self.target)
            return self.target
        return self._rename_to_free_name()

    def _rename_to_free_name(self) -> Path:
        number = 1
        while True:
            target = Path("evaluation" if number == 1 else f"evaluation-{number}")
            # Renaming onto an empty folder succeeds, so mkdir decides which process gets the name.
            try:
                target.mkdir()
            except FileExistsError:
                number += 1
                continue
            self.unfinished.rename(target)
            return target

    def _replace(self, target: Path) -> Path:
        """Put the new files over the old ones. ``scores.json`` always names all that are ours."""
        new = self.files()
        for name in new:
            place = target / name
            foreign = (place.exists() or place.is_symlink()) and name not in self._old
            if foreign or leads_outside(target, place):
                raise OSError(f"{place} already exists or leads out of {target}")
        if self.earlier:
            files = sorted({*self._old, *new})
            write_json(target / MARKER, {**self.earlier, "files": files})
        # The list of results last: until then the earlier one is whole.
        for name in sorted(new, key=lambda name: name == MARKER):
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (self.unfinished / name).replace(place)
        stale = [name for name in self._old if name not in new]
        for name in stale:
            (target / name).unlink(missing_ok=True)
        for folder in sorted({(target / name).parent for name in stale}, reverse=True):
            while folder != target and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
                folder = folder.parent
        shutil.rmtree(self.unfinished)
        return target


@contextmanager
def written_to(
    target: str | Path | None, scoring: ScoringOptions | None = None
) -> Iterator[OutputFolder | None]:
    """Open an output folder for the block and finish it at the end; None writes nothing."""
    if target is None:
        yield None
        return
    with OutputFolder(Path(target).expanduser(), scoring) as folder:
        yield folder
        folder.finish()


class _NotMovedError(DataError):
    """The results are complete, but could not be moved to their folder."""


def _own_files(target: Path) -> list[str]:
    """Return the files of the earlier evaluation in ``target``; [] if it is empty."""
    present = [p for p in target.iterdir() if not p.name.startswith(UNFINISHED)]
    if not present:
        return []
    if _is_old_layout(present):
        return [path.name for path in present]
    try:
        listed = json.loads((target / MARKER).read_text(encoding="utf-8"))["files"]
        names = [str(name) for name in listed]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--output {target} holds other files ({present[0].name} ...). Name a new or empty "
            "folder, or that of an earlier evaluation."
        ) from None
    root = os.path.abspath(target)
    for name in names:
        # A list that was tampered with must not reach files outside.
        if not os.path.abspath(target / name).startswith(root + os.sep):
            raise ConfigError(
                f"{target / MARKER} names a file outside its folder: {name}. Name another folder."
            )
        if leads_outside(target, target / name):
            raise ConfigError(
                f"--output {target}: {Path(name).parent} is a symlink. Name another folder."
            )
    return names


def _earlier(target: Path) -> EarlierScores:
    """Return the content of ``scores.json`` if it lists results; else {}: nothing can be kept."""
    content = read_json(target / MARKER)
    return content if holds_results(content) else {}


def _require_same_protocol(
    earlier: EarlierScores, scoring: ScoringOptions, target: Path | None
) -> None:
    """Raise ConfigError if the folder's scores cannot stand beside the new ones."""
    for entry in earlier.get("results", ()):
        for flag, there, asked in (
            ("protocol", entry["protocol"], scoring.protocol),
            ("empty-gt", entry["empty_gt"], scoring.empty_gt),
        ):
            if there != asked:
                raise ConfigError(
                    f"{target} holds scores with --{flag} {there}, and these "
                    f"will be with {asked}: one table cannot show both. Name another folder with "
                    "-o."
                )


def _is_old_layout(present: Sequence[Path]) -> bool:
    """Return whether these are the files that releases up to 0.1 wrote for a checkpoint.

    That is DATASET.json, DATASET.csv and DATASET.png, and tables of all scores.
    """
    datasets = {path.stem for path in present if path.suffix == ".json"}
    known = {f"{stem}{end}" for stem in datasets for end in (".json", ".csv", ".png")}
    known |= {"scores.csv", "scores.md", "scores.tex"}
    return bool(datasets) and MARKER not in known and {p.name for p in present} <= known


def _parent(target: Path | None) -> Path:
    return Path() if target is None else Path(os.path.abspath(target)).parent


def write_evaluation(
    output: OutputFolder,
    scored: Sequence[Scored],
    gallery: Sequence[GalleryEntry],
    *,
    intervals: bool,
    command: Sequence[str],
) -> None:
    """Write everything into ``output`` except the gallery's pictures, which are already there.

    Args:
        output: the unfinished folder.
        scored: one entry per method and data set.
        gallery: entries of the pictures.
        intervals: also compare the methods in pairs.
        command: the command line, for the page.
    """
    comparisons = compare_all(scored) if intervals else []
    entries = [item.result.to_dict() for item in scored]
    output.read_again()
    kept = _kept(output.earlier, entries)
    keys = list(dict.fromkeys(key for entry in kept.results for key in entry["scores"]))
    folder = output.unfinished
    # Names of the earlier evaluation come first: its files keep their names.
    methods = file_names(entry["method"] for entry in kept.results)
    datasets = file_names(entry["dataset"] for entry in kept.results)

    def table_of(method: str, dataset: str) -> str:
        return f"per_image/{methods[method]}/{datasets[dataset]}.csv"

    _keep_tables(output, table_of)
    for place, entry in enumerate(kept.results):
        kept.results[place] = _with_picture(output, entry)
    pictures = [entry for entry in kept.gallery if output.keep(str(entry["panel"]))]
    for item in scored:
        name = table_of(item.result.method, item.result.dataset)
        write_rows(folder / name, item.table())
    curves = write_curves(folder / "curves", kept.results, datasets)
    # Tables group rows by data set; a method that came later has its rows behind all others.
    order = list(datasets)
    grouped = sorted(kept.results, key=lambda entry: order.index(entry["dataset"]))
    write_tables(folder, grouped, keys)
    write_robustness(folder, kept.results, keys, datasets)
    write_presence(folder, kept.results, datasets)
    summary: ScoresFile = {
        "command": list(command),
        "versions": versions(),
        "results": kept.results,
        "comparisons": [*kept.comparisons, *comparisons],
        "gallery": [*pictures, *gallery],
    }
    write_evaluation_page(folder / "index.html", summary, keys, curves)
    write_json(folder / MARKER, {**summary, "files": sorted([*output.files(), MARKER])})


def _keep_tables(output: OutputFolder, table_of: Callable[[str, str], str]) -> None:
    """Keep the earlier tables of images, under names that may be others now."""
    earlier = output.earlier.get("results", ())
    methods = file_names(entry["method"] for entry in earlier)
    datasets = file_names(entry["dataset"] for entry in earlier)
    for entry in earlier:
        name = f"per_image/{methods[entry['method']]}/{datasets[entry['dataset']]}.csv"
        with contextlib.suppress(KeyError):
            # A KeyError: nothing of this method or data set stays.
            output.keep(name, table_of(entry["method"], entry["dataset"]))


def _with_picture(output: OutputFolder, entry: ResultEntry) -> ResultEntry:
    """Keep an earlier result's picture of corruptions, or return the result without one."""
    robustness = entry.get("robustness")
    if not robustness or not robustness["picture"]:
        return entry
    picture = robustness["picture"]
    # Another method's picture of the same images may already be there.
    if output.keep(picture) or picture in output.files():
        return entry
    return {**entry, "robustness": {**robustness, "picture": ""}}


class _Kept(NamedTuple):
    """What stands in the folder after this evaluation.

    ``results`` are all, earlier ones in their places; the others are those of the earlier
    evaluation that stay.
    """

    results: list[ResultEntry]
    comparisons: list[ComparisonEntry]
    gallery: list[GalleryEntry]


def _kept(earlier: EarlierScores, entries: Sequence[ResultEntry]) -> _Kept:
    """Merge results with those of the earlier evaluation, by method and data set.

    Results of the same method with other weights are stale and left out, with a remark.
    """
    new = {(entry["method"], entry["dataset"]): entry for entry in entries}
    weights = {entry["method"]: entry.get("weights") for entry in entries}
    results, gone = [], set()
    for old in earlier.get("results", ()):
        pair = (old["method"], old["dataset"])
        if pair in new:
            if new[pair]["data_hash"] != old.get("data_hash"):
                console.note(
                    f"The earlier scores of {old['method']} on {old['dataset']} were those of "
                    "other images: they are replaced."
                )
            results.append(new.pop(pair))
            gone.add(pair)
        elif old["method"] in weights and old.get("weights") != weights[old["method"]]:
            gone.add(pair)
            console.note(
                f"The earlier scores of {old['method']} on {old['dataset']} were those of other "
                "weights: they are left out."
            )
        else:
            results.append(old)
            _note_other_images(old, entries)
    results += new.values()
    scored_again = {entry["dataset"] for entry in entries} | {dataset for _, dataset in gone}
    return _Kept(
        results,
        [
            pair
            for pair in earlier.get("comparisons", ())
            if not {(pair["a"], pair["dataset"]), (pair["b"], pair["dataset"])} & gone
        ],
        [entry for entry in earlier.get("gallery", ()) if entry["dataset"] not in scored_again],
    )


def _note_other_images(old: ResultEntry, entries: Sequence[ResultEntry]) -> None:
    for entry in entries:
        if entry["dataset"] != old["dataset"]:
            continue
        resized = [each.get("resize") == "bilinear" for each in (old, entry)]
        if resized[0] != resized[1]:
            console.warn(
                f"{old['dataset']}: the maps of {(old, entry)[resized[1]]['method']} were resized, "
                f"those of {(entry, old)[resized[1]]['method']} were not; their scores in this "
                "table are not comparable"
            )
        if entry["data_hash"] != old.get("data_hash"):
            console.warn(
                f"{old['dataset']}: {old['method']} was scored on other images or masks than "
                f"{entry['method']}; their scores in this table are not comparable"
            )
