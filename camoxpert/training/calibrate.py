"""Calibrate the presence head of a run's best weights on images that it has never used."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from camoxpert import console, stop
from camoxpert.data.loader import build_eval_loader
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import chunks, forward_batch, modalities_of
from camoxpert.runs.checkpoint import BEST, PRESENCE, load_checkpoint, read_index
from camoxpert.runs.info import update_run_json
from camoxpert.runs.store import CheckpointFolder
from camoxpert.training.run import Run

STEEPEST = 100.0
"""Bounds of the factor on logits, 1 / STEEPEST to STEEPEST."""


@dataclass(frozen=True)
class Fit:
    """A calibration and what it is worth.

    Attributes:
        temperature, bias: ``sigmoid(logit / temperature + bias)``.
        objects, empty: images of either kind it was fitted on.
        before, after: mean log loss on them, in nats.
    """

    temperature: float
    bias: float
    objects: int
    empty: int
    before: float
    after: float


def fit_calibration(logits_N: NDArray[np.float64], labels_N: NDArray[np.float64]) -> Fit:
    """Fit temperature and bias by maximum likelihood, with Platt's targets.

    The targets are (n+ + 1) / (n+ + 2) and 1 / (n- + 2) instead of 1 and 0: logits that separate
    the two kinds would otherwise be driven to infinity.

    Args:
        logits_N: presence logits.
        labels_N: 1 for images with an object, else 0; both occur.

    Source: Platt, Probabilistic Outputs for Support Vector Machines, 1999; Newton's method as in
    Lin, Lin and Weng, 2007.
    """
    objects, empty = int(labels_N.sum()), int((1 - labels_N).sum())
    targets = np.where(labels_N > 0.5, (objects + 1) / (objects + 2), 1 / (empty + 2))
    scale = max(float(np.abs(logits_N).mean()), 1e-6)
    ones = np.ones_like(logits_N)
    slope, bias = _maximum(np.stack([logits_N / scale, ones], 1), targets)
    factor = float(np.clip(slope / scale, 1 / STEEPEST, STEEPEST))
    if factor != slope / scale:
        # A head that knows nothing, or the opposite, is flattened to the share of objects.
        (bias,) = _maximum(ones[:, None], targets, factor * logits_N)
    return Fit(
        1 / factor,
        float(bias),
        objects,
        empty,
        _log_loss(logits_N, labels_N),
        _log_loss(factor * logits_N + bias, labels_N),
    )


def _maximum(
    inputs_NK: NDArray[np.float64],
    targets_N: NDArray[np.float64],
    offsets_N: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.float64]:
    """Return the weights (K,) of a logistic regression, by Newton's method."""
    weights = np.zeros(inputs_NK.shape[1])
    for _ in range(100):
        logits = inputs_NK @ weights + offsets_N
        probs = _sigmoid(logits)
        gradient = inputs_NK.T @ (probs - targets_N)
        curvature = (inputs_NK * (probs * (1 - probs))[:, None]).T @ inputs_NK
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        value, length = _log_loss(logits, targets_N), 1.0
        # Halved until it helps: far from the optimum a full step overshoots.
        while length > 1e-6:
            if _log_loss(inputs_NK @ (weights - length * step) + offsets_N, targets_N) <= value:
                break
            length /= 2
        weights = weights - length * step
        if float(np.abs(length * step).max()) < 1e-9:
            break
    return weights


def _sigmoid(logits_N: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logits_N))


def _log_loss(logits_N: NDArray[np.float64], targets_N: NDArray[np.float64]) -> float:
    return float(np.mean(np.logaddexp(0, logits_N) - targets_N * logits_N))


@torch.inference_mode()
def presence_logits(run: Run, predictor: Predictor) -> tuple[list[float], list[bool]]:
    """Return the presence logits of the calibration images, and whether each has an object.

    Raises:
        Stopped: the command was asked to stop.
    """
    loader = build_eval_loader(
        run.data.calibration,
        # A broken image must not keep a trained run from finishing.
        replace(run.config.data, unreadable="skip"),
        batch_size=run.plan.stages[-1].batch_size,
        num_workers=run.data.loading.num_workers,
    )
    logits: list[float] = []
    labels: list[bool] = []
    size = forward_batch(run.device)
    for items in chunks(loader, size):
        stop.check()
        filled = [*items, *[items[-1]] * (size - len(items))]
        images = torch.stack([item.image for item in filled]).to(run.device)
        with predictor.precision.autocast(run.device):
            seen = modalities_of(filled, run.device)
            output = predictor.model(images, *(() if seen is None else (None, seen)))
        logits += output.presence_logit_B.float().cpu().tolist()[: len(items)]
        labels += [bool((item.mask == 255).any()) for item in items]
    return logits, labels


def calibrate_best(run: Run) -> Fit | None:
    """Calibrate ``best.pt`` of a run and write it again; None where there is nothing to do.

    Raises:
        CheckpointError: it cannot be read or written.
        Stopped: the command was asked to stop; the same command calibrates.
    """
    store = CheckpointFolder(run.folder / "checkpoints")
    checkpoint = load_checkpoint(store.folder / BEST)
    if checkpoint.model_config.presence == "off" or not len(run.data.calibration):
        return None
    with run.log.phase("calibration"):
        predictor = Predictor(checkpoint, device=run.device, precision=run.precision)
        logits, labels = presence_logits(run, predictor)
        if len(set(labels)) < 2:
            console.warn("presence is not calibrated: too few images could be read for it")
            return None
        fit = fit_calibration(np.array(logits), np.array(labels, np.float64))
        weights = checkpoint.values["model"]
        for name, value in (
            ("temperature", fit.temperature),
            ("bias", fit.bias),
            ("images", len(labels)),
        ):
            weights[f"{PRESENCE}calibration.{name}"].fill_(value)
        entry = next((e for e in read_index(store.folder) if e["file"] == BEST), {})
        known = ("file", "step", "bytes", "sha256", "pending")
        about = {name: value for name, value in entry.items() if name not in known}
        step = int(checkpoint.values["state"]["step"])
        store.save_best(checkpoint.values, step=step, about=about)
    update_run_json(run.folder, presence=asdict(fit))
    console.say(
        f"presence    calibrated on {fit.objects} images with an object and {fit.empty} without: "
        f"temperature {fit.temperature:.2f}, bias {fit.bias:+.2f}; log loss {fit.before:.3f} -> "
        f"{fit.after:.3f}"
    )
    return fit
