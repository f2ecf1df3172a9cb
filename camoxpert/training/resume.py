"""Changes between a stopped run and the one that continues it: settings, batching and data.

Changes that would make it a different run are refused.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from camoxpert.config import Config
from camoxpert.errors import CheckpointError
from camoxpert.runs.checkpoint import Checkpoint
from camoxpert.runs.identity import PLACES, setting_differences
from camoxpert.training.batching import Batching
from camoxpert.training.checkpoints import images_per_step
from camoxpert.training.run import Run
from camoxpert.training.rundata import RunData
from camoxpert.training.split import SAMPLES

# Settings that decide what the weights mean or which samples are used.
FIXED = ("model.", "data.", "train.seed", "train.quick.")


@dataclass(frozen=True)
class Changes:
    """Changes since the run was stopped.

    Attributes:
        lines: one line per change, for the user.
        data: whether the training data changed; the epoch in progress then restarts.
    """

    lines: tuple[str, ...] = ()
    data: bool = False


def changes_since(checkpoint: Checkpoint, run: Run, folder: Path) -> Changes:
    """Return what changed between a checkpoint and the run that continues it.

    Args:
        checkpoint: the stopped run's.
        run: the prepared run that continues it.
        folder: the stopped run's.

    Raises:
        CheckpointError: the changes would make it a different run.
    """
    before = checkpoint.values.get("files") or {}
    lines = setting_changes(checkpoint.config, run.asked, before=before, now=run.files)
    lines += batching_changes(checkpoint, run.batching, images_per_step(run))
    if checkpoint.values.get("data_hash") == run.data.data_hash:
        return Changes(tuple(lines))
    changes = data_changes(folder, run.data)
    detail = f" ({changes})" if changes else ""
    if not run.config.train.allow_data_change:
        raise CheckpointError(
            f"The training data changed since {checkpoint.path} was written{detail}: the order of "
            f"samples and the validation split would no longer be the same. Restore the data, "
            f"continue with --allow-data-change, or start a new run with --resume never."
        )
    epoch = checkpoint.values["state"]["epoch"] + 1
    lines.append(f"the training data{detail}; epoch {epoch} restarts, as allowed")
    return Changes(tuple(lines), data=True)


def setting_changes(
    old: Config,
    new: Config,
    *,
    before: Mapping[str, str] | None = None,
    now: Mapping[str, str] | None = None,
) -> list[str]:
    """List settings that differ from those of the run being continued.

    Args:
        old, new: settings.
        before, now: hashes of the files that they name.

    Raises:
        CheckpointError: one of them decides what the weights mean or which samples are used.
    """
    changed = setting_differences(old, new, before=before or {}, now=now or {})
    refused = [path for path in changed if path.startswith(FIXED) and path not in PLACES]
    # The lists of data and of images to leave out are compared by what they select.
    refused = [path for path in refused if path != "data.clean_list" or path in (before or {})]
    if refused:
        lines = "; ".join(changed.values())
        raise CheckpointError(
            f"The stopped run cannot be continued with these settings: {lines}. Use the "
            f"settings it was started with, or --resume never for a new run."
        )
    return list(changed.values())


def refuse_if_trained(checkpoint: Checkpoint, run: Run, changes: Changes) -> None:
    """Raise CheckpointError if a finished run has no epoch left for changed settings."""
    if checkpoint.values["state"]["epoch"] >= run.plan.epochs:
        raise CheckpointError(
            f"The run of {checkpoint.path} is finished, and no epoch is left for other settings "
            f"({'; '.join(changes.lines)}). Raise --epochs, or start a new run with --resume never."
        )


def batching_changes(
    checkpoint: Checkpoint, batching: Batching, effective: Mapping[str, int]
) -> list[str]:
    """List the changes of how steps are taken.

    Args:
        checkpoint: the stopped run's.
        batching: the current one.
        effective: images per step now, by stage.

    Raises:
        CheckpointError: a step would take a different number of images.
    """
    before = checkpoint.values.get("batch")
    if before is None:
        return []
    for stage, images in before["effective"].items():
        if effective.get(stage, images) != images:
            raise CheckpointError(
                f"The stopped run took {images} images per optimizer step and this one would take "
                f"{effective[stage]} ({stage}). Keep the product of --batch-size (or "
                f"--stage2-batch-size), --accumulation-steps and processes, or start a new run "
                f"with --resume never."
            )
    if before["processes"] == batching.processes:
        return []
    return [
        f"processes: {before['processes']} -> {batching.processes}; {batching.size} images x "
        f"{batching.steps} on each, {batching.effective} per step as before"
    ]


def data_changes(run_dir: Path, data: RunData) -> str:
    """Describe how the data differs from ``samples.csv``; "" if that cannot be read."""
    try:
        with (run_dir / SAMPLES).open(encoding="utf-8", errors="surrogateescape") as file:
            before = {
                (row["dataset"], row["name"]): (int(row["image_bytes"]), int(row["mask_bytes"]))
                for row in csv.DictReader(file)
            }
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        # TypeError: a line without all its columns.
        return ""
    now = {
        key: sizes
        for part in (
            *(*data.real_and_made(), data.validation),
            *(data.calibration, data.unlabeled, data.left_out),
        )
        for key, sizes in part.files().items()
    }
    kinds = {
        "missing": sorted(before.keys() - now.keys()),
        "new": sorted(now.keys() - before.keys()),
        "of another size": sorted(k for k in before.keys() & now.keys() if before[k] != now[k]),
    }
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(name for _, name in keys[:3])}"
        + (", ..." if len(keys) > 3 else "")
        for kind, keys in kinds.items()
        if keys
    )
