"""Score a trained fold on the images it held out, with the weights of its last epoch.

Those images chose nothing about these weights; the best epoch was chosen on them, which makes its
score optimistic. Each fold keeps, in ``out_of_fold/``, all that the summary needs:

::

    final.pt           the evaluated weights (EMA) of the last epoch
    maps/NAME.png      the map of every held-out image, as it was scored
    scores.csv         a row of scores for each image
    scores.json.gz     the same with the histograms, to be joined with those of other folds
    fold.json          what was scored; written last: a fold without it is not finished
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camoxpert import console
from camoxpert.config import Config, DataConfig
from camoxpert.data.files.folds import Splits
from camoxpert.data.files.image_io import write_png
from camoxpert.data.files.labels import split_void
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.unlabeled import NO_IMAGES
from camoxpert.data.loader import build_eval_loader
from camoxpert.data.samples.batches import EvalBatch
from camoxpert.errors import CheckpointError, DataError
from camoxpert.evaluation.presence import PresenceMeter
from camoxpert.files import (
    file_digest,
    leads_outside,
    read_json,
    write_bytes,
    write_json,
    write_rows,
)
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import Item, score
from camoxpert.metrics import Evaluator
from camoxpert.metrics.scoring import Claim, Row
from camoxpert.runs.checkpoint import (
    FORMAT,
    PRESENCE,
    Checkpoint,
    CheckpointValues,
    load_checkpoint,
)
from camoxpert.runs.records import read_records
from camoxpert.runs.store import CheckpointFolder
from camoxpert.runtime.device import choose_device, choose_precision
from camoxpert.training.calibrate import calibrate

OUT_OF_FOLD = "out_of_fold"
FINAL, MAPS = "final.pt", "maps"
TABLE, STATE, MARKER = "scores.csv", "scores.json.gz", "fold.json"
SURE = "sure"
"""Column: how far from undecided the model is where it contradicts the mask, 0..1."""


@dataclass(frozen=True)
class FoldScores:
    """The held-out images of a fold, scored.

    Attributes:
        fold: its number.
        path: its run folder.
        about: content of ``fold.json``.
        evaluator: with the scores.
        sure: image -> ``SURE``.
        probabilities: image -> probability that it holds any object; empty without a presence head.
    """

    fold: int
    path: Path
    about: dict[str, Any]
    evaluator: Evaluator
    sure: dict[str, float]
    probabilities: dict[str, float] = field(default_factory=dict)


def with_datasets(manifest: Manifest, several: bool) -> Manifest:
    """Return a manifest whose names start with those of their data sets, where there are several:
    two data sets may have an image of one name."""
    if not several:
        return manifest
    pairs = tuple(replace(pair, name=f"{pair.dataset}/{pair.name}") for pair in manifest.pairs)
    return replace(manifest, pairs=pairs)


def score_fold(
    run: Path,
    config: Config,
    held_out: Manifest,
    *,
    fold: int,
    splits: Splits,
    empty_gt: str,
    calibration: Manifest = NO_IMAGES,
    stages: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """Score the held-out images of a finished run and write ``out_of_fold/``; then delete the
    checkpoints to continue from, which a finished fold no longer needs.

    Args:
        run: the run folder.
        config: its settings.
        held_out: the images; their names are unique.
        fold, splits: which fold it is.
        empty_gt: how images without an object are scored; see ``Evaluator``.
        calibration: the images that the run set aside to calibrate its presence head.
        stages: (name, what its result depends on) of those before the run, for ``fold.json``.

    Raises:
        CheckpointError: there are no final weights.
        DataError: an image cannot be read, and unreadable ones are not skipped.
        Stopped: a stop was requested; the same call does it again.
    """
    started = time.monotonic()
    folder = run / OUT_OF_FOLD
    checkpoint = final_weights(run)
    device = choose_device(config.train.device)
    precision = choose_precision(config.train, device)
    batch_size, workers = config.train.batch_size or 8, config.data.num_workers or 0
    data = DataConfig(
        img_size=checkpoint.config.data.img_size,
        max_pixels=config.data.max_pixels,
        unreadable=config.data.unreadable,
        modalities=checkpoint.config.data.beside_rgb,
    )
    if not _is_calibrated(checkpoint):
        # That of best.pt holds for the weights of another epoch.
        fit = calibrate(
            checkpoint,
            calibration,
            data,
            batch_size=batch_size,
            num_workers=workers,
            device=device,
            precision=precision,
        )
        if fit is not None:
            step = int(checkpoint.values["state"]["step"])
            CheckpointFolder(folder).save_weights(FINAL, checkpoint.values, step=step)
    predictor = Predictor(checkpoint, device=device, precision=precision)
    evaluator = Evaluator(empty_gt=empty_gt)
    sure: dict[str, float] = {}
    unreadable: list[str] = []
    meter = PresenceMeter()
    loader = build_eval_loader(held_out, data, batch_size=batch_size, num_workers=workers)

    def read() -> Iterator[EvalBatch]:
        for batch in console.track(loader, f"images held out by fold {fold}"):
            unreadable.extend(f"{name} ({reason})" for name, reason in batch.unreadable)
            yield batch

    def seen(item: Item, prediction: Callable[[], NDArray[np.uint8]], row: Row) -> None:
        map_HW = prediction()
        sure[item.name] = _sure(map_HW, item.mask)
        path = folder / MAPS / f"{item.name}.png"
        if leads_outside(folder, path):
            raise DataError(f"The map of {item.name} would be written outside {folder}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, map_HW)

    score(
        predictor.model,
        read(),
        device=device,
        evaluator=evaluator,
        groups={pair.name: pair.group for pair in held_out.pairs},
        precision=predictor.precision,
        seen=seen,
        judged=meter.add,
    )
    rows = [{**row, SURE: sure[row["name"]]} for row in evaluator.rows()]
    write_rows(folder / TABLE, rows)
    presence = dict(meter.probabilities())
    _write_state(folder / STATE, evaluator, {SURE: sure, "presence": presence})
    state = checkpoint.values["state"]
    about = {
        "fold": fold,
        "splits": splits.digest,
        "images": len(held_out),
        "unreadable": unreadable,
        "scores": evaluator.results() if evaluator.num_images else {},
        "empty_gt": empty_gt,
        "stages": [{"name": name, "facts": facts} for name, facts in stages],
        "epoch": state["epoch"],
        "step": state["step"],
        "best": _best_epoch(run),
        "weights": file_digest(folder / FINAL),
        "state": file_digest(folder / STATE),
        "seconds": time.monotonic() - started,
    }
    write_json(folder / MARKER, about)
    for file in (run / "checkpoints").glob("step_*.pt"):
        file.unlink()


def final_weights(run: Path) -> Checkpoint:
    """Return the evaluated weights of a finished run's last epoch, kept in a file of their own.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    path = run / OUT_OF_FOLD / FINAL
    if path.is_file():
        return load_checkpoint(path)
    newest, problems = CheckpointFolder(run / "checkpoints").newest()
    if newest is None:
        raise CheckpointError(
            f"{run} is finished and has no weights of its last epoch. Remove the folder: the same "
            f"command trains the fold again."
        )
    for problem in problems:
        console.warn(problem)
    values: CheckpointValues = {
        "format": FORMAT,
        "config": newest.values["config"],
        "data_hash": newest.values["data_hash"],
        "model": newest.evaluated_weights,
        "ema": None,
        "state": newest.values["state"],
        "scores": {},
    }
    (run / OUT_OF_FOLD).mkdir(exist_ok=True)
    CheckpointFolder(path.parent).save_weights(FINAL, values, step=values["state"]["step"])
    return load_checkpoint(path)


def _is_calibrated(checkpoint: Checkpoint) -> bool:
    """Return whether the presence head of weights is calibrated; False for those without one."""
    images = checkpoint.values["model"].get(f"{PRESENCE}calibration.images")
    return images is not None and bool(images > 0)


def is_scored(run: Path) -> bool:
    """Return whether a fold is trained and scored."""
    return bool(read_json(run / OUT_OF_FOLD / MARKER))


def read_fold(run: Path) -> FoldScores:
    """Read what ``score_fold`` wrote.

    Raises:
        DataError: it is missing or damaged.
    """
    folder = run / OUT_OF_FOLD
    about = read_json(folder / MARKER)
    try:
        if file_digest(folder / STATE) != about["state"]:
            raise ValueError(f"{STATE} differs from what was written (sha256)")
        values = json.loads(gzip.decompress((folder / STATE).read_bytes()))
        more = values.pop("more")
        values["counts"] = np.array(values["counts"], np.int64).reshape(-1, 2, 256)
        values["claims"] = [Claim(*claim) for claim in values["claims"]]
        values["skipped"] = {
            name: (digest, Claim(*claim)) for name, (digest, claim) in values["skipped"].items()
        }
        evaluator = Evaluator(empty_gt=values["empty_gt"], keys=values["keys"])
        evaluator.load_state_dict(values)
        number = int(about["fold"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The scores in {folder} cannot be used ({type(error).__name__}: {error}). Remove "
            f"{folder / MARKER}: the same command scores the fold again."
        ) from error
    return FoldScores(number, run, about, evaluator, more[SURE], more["presence"])


def _write_state(path: Path, evaluator: Evaluator, more: dict[str, Any]) -> None:
    values = evaluator.state_dict()
    values["counts"] = values["counts"].tolist()
    text = json.dumps({**values, "more": more}, default=_plain)
    # No time in the file: equal scores are equal bytes.
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def _plain(value: Any) -> Any:
    """Return a numpy scalar as Python's."""
    return value.item()


def _sure(map_HW: NDArray[np.uint8], mask_HW: NDArray[np.uint8]) -> float:
    """Return how far from undecided the map is, in the mean, where it contradicts the mask, 0..1.

    Sure and wrong at once is how an image with a wrong mask looks to a model that never saw it.
    """
    mask, void = split_void(mask_HW)
    wrong = (map_HW > 127) != mask
    if void is not None:
        wrong &= ~void
    if not wrong.any():
        return 0.0
    return float(np.abs(map_HW[wrong].astype(np.float64) * (2 / 255) - 1).mean())


def _best_epoch(run: Path) -> dict[str, Any]:
    """Return the epoch that validation chose, with its scores; {} where nothing was validated."""
    best = read_records(run / "metrics.jsonl").best
    return {} if best is None else {"epoch": best["epoch"], "scores": best["scores"]}
