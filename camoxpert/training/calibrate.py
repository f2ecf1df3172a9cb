"""Calibrate the presence head of a run's best weights on images that it has never used."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from camoxpert import console, stop
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.loader import build_eval_loader
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.score import chunks, forward_batch, modalities_of
from camoxpert.runs.checkpoint import (
    BEST,
    PRESENCE,
    Checkpoint,
    facts_of,
    read_index,
)
from camoxpert.runs.info import update_run_json
from camoxpert.runs.records import FitRecord
from camoxpert.runs.store import CheckpointFolder
from camoxpert.runtime.device import Precision
from camoxpert.training.run import Run

STEEPEST = 100.0
"""Bounds of the factor on logits, 1 / STEEPEST to STEEPEST."""
SMOOTHING = 0.1
"""Images of the other kind that are added to each kind in thought, so that no target is 1 or 0."""
FACTOR_SIGMA, BIAS_SIGMA = 0.5, 5.0
"""Spread of the prior around the head as it was trained: factor 1 and bias 0."""


@dataclass(frozen=True)
class Fit:
    """A calibration and what it is worth.

    Attributes:
        temperature, bias: ``sigmoid(logit / temperature + bias)``.
        objects, empty: images of either kind it was fitted on.
        before, after: mean log loss on them, in nats, both kinds counting alike.
    """

    temperature: float
    bias: float
    objects: int
    empty: int
    before: float
    after: float

    def record(self) -> FitRecord:
        """Return it as ``run.json`` holds it."""
        return {
            "temperature": self.temperature,
            "bias": self.bias,
            "objects": self.objects,
            "empty": self.empty,
            "before": self.before,
            "after": self.after,
        }


def fit_calibration(logits_N: NDArray[np.float64], labels_N: NDArray[np.float64]) -> Fit:
    """Fit temperature and bias: the most probable ones, given a prior around the head as it is.

    Both kinds count alike however many images each has, so the probabilities hold where as many
    images have an object as have none. Logits that separate the kinds would drive a fit of maximum
    likelihood to infinity; the prior and targets that are slightly less than sure prevent it.
    Platt's own targets, a whole image more of either kind, are too cautious for few images and
    kinds that hardly overlap: docs/presence.md has the measurements.

    Args:
        logits_N: presence logits.
        labels_N: 1 for images with an object, else 0; both occur.

    Source: Platt, Probabilistic Outputs for Support Vector Machines, 1999; Newton's method as in
    Lin, Lin and Weng, 2007.
    """
    present_N = labels_N > 0.5
    objects, empty = int(present_N.sum()), int((~present_N).sum())
    weights_N = len(labels_N) / 2 / np.where(present_N, objects, empty)
    targets_N = np.where(
        present_N, 1 - SMOOTHING / (objects + 2 * SMOOTHING), SMOOTHING / (empty + 2 * SMOOTHING)
    )
    inputs_NK = np.stack([logits_N, np.ones_like(logits_N)], 1)
    centre_K, sigma_K = np.array([1.0, 0.0]), np.array([FACTOR_SIGMA, BIAS_SIGMA])
    slope, bias = _most_probable(inputs_NK, targets_N, weights_N, centre_K, sigma_K)
    factor = float(np.clip(slope, 1 / STEEPEST, STEEPEST))
    if factor != slope:
        # A head that knows nothing, or the opposite, is flattened to one half.
        alone = inputs_NK[:, 1:], targets_N, weights_N, centre_K[1:], sigma_K[1:]
        (bias,) = _most_probable(*alone, offsets_N=factor * logits_N)
    return Fit(
        1 / factor,
        float(bias),
        objects,
        empty,
        _log_loss(logits_N, labels_N, weights_N),
        _log_loss(factor * logits_N + bias, labels_N, weights_N),
    )


def _most_probable(
    inputs_NK: NDArray[np.float64],
    targets_N: NDArray[np.float64],
    weights_N: NDArray[np.float64],
    centre_K: NDArray[np.float64],
    sigma_K: NDArray[np.float64],
    offsets_N: NDArray[np.float64] | float = 0.0,
) -> NDArray[np.float64]:
    """Return the coefficients (K,) of a weighted logistic regression with a normal prior, by
    Newton's method from the centre of the prior."""

    def loss(found_K: NDArray[np.float64]) -> float:
        logits_N = inputs_NK @ found_K + offsets_N
        prior = float(np.square((found_K - centre_K) / sigma_K).sum()) / 2
        return len(targets_N) * _log_loss(logits_N, targets_N, weights_N) + prior

    found_K = centre_K
    for _ in range(100):
        probs_N = _sigmoid(inputs_NK @ found_K + offsets_N)
        gradient = inputs_NK.T @ (weights_N * (probs_N - targets_N))
        gradient = gradient + (found_K - centre_K) / sigma_K**2
        spread_N = weights_N * probs_N * (1 - probs_N)
        curvature = (inputs_NK * spread_N[:, None]).T @ inputs_NK + np.diag(sigma_K**-2)
        step_K, value, length = np.linalg.solve(curvature, gradient), loss(found_K), 1.0
        # Halved until it helps: far from the optimum a full step overshoots.
        while length > 1e-6 and loss(found_K - length * step_K) > value:
            length /= 2
        found_K = found_K - length * step_K
        if float(np.abs(length * step_K).max()) < 1e-9:
            break
    return found_K


def _sigmoid(logits_N: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -logits_N))


def _log_loss(
    logits_N: NDArray[np.float64], targets_N: NDArray[np.float64], weights_N: NDArray[np.float64]
) -> float:
    return float(np.mean(weights_N * (np.logaddexp(0, logits_N) - targets_N * logits_N)))


@torch.inference_mode()
def presence_logits(
    predictor: Predictor, images: Manifest, data: DataConfig, *, batch_size: int, num_workers: int
) -> tuple[list[float], list[bool]]:
    """Return the presence logits of images, and whether each has an object.

    Images without one of which some pixels are unlabelled are left out: it is not known.

    Raises:
        Stopped: the command was asked to stop.
    """
    loader = build_eval_loader(
        images,
        # A broken image must not keep a trained run from finishing.
        replace(data, unreadable="skip"),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    logits: list[float] = []
    labels: list[bool] = []
    device = predictor.device
    size = forward_batch(device)
    for items in chunks(loader, size):
        stop.check()
        filled = [*items, *[items[-1]] * (size - len(items))]
        pixels = torch.stack([item.image for item in filled]).to(device)
        with predictor.precision.autocast(device):
            seen = modalities_of(filled, device)
            output = predictor.model(pixels, *(() if seen is None else (None, seen)))
        found = output.presence_logit_B.float().cpu().tolist()
        for item, logit in zip(items, found, strict=False):
            label = bool((item.mask == 255).any())
            if label or not item.mask.any():
                logits.append(logit)
                labels.append(label)
    return logits, labels


def calibrate(
    checkpoint: Checkpoint,
    images: Manifest,
    data: DataConfig,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    precision: Precision,
) -> Fit | None:
    """Fit the presence head of a checkpoint to images and set it in ``checkpoint.values["model"]``;
    return None where there is no head, or nothing to fit it on.

    Args:
        checkpoint: evaluated weights without an EMA beside them, whose head is not calibrated yet.
        images: of both kinds, none of which was trained on or chose anything.
        data: how they are read.
        batch_size, num_workers: of reading.
        device, precision: of the forward passes.

    Raises:
        Stopped: the command was asked to stop.
    """
    if checkpoint.model_config.presence == "off" or not len(images):
        return None
    predictor = Predictor(checkpoint, device=device, precision=precision)
    logits, labels = presence_logits(
        predictor, images, data, batch_size=batch_size, num_workers=num_workers
    )
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
    return fit


def calibrate_best(run: Run, checkpoint: Checkpoint) -> Fit | None:
    """Calibrate ``best.pt`` of a run and write it again; None where there is nothing to do.

    Args:
        run: that finished.
        checkpoint: its ``best.pt``, as read; it holds the calibration afterwards.

    Raises:
        CheckpointError: it cannot be written.
        Stopped: the command was asked to stop; the same command calibrates.
    """
    store = CheckpointFolder(run.folder / "checkpoints")
    if checkpoint.model_config.presence == "off" or not len(run.data.calibration):
        return None
    with run.log.phase("calibration"):
        fit = calibrate(
            checkpoint,
            run.data.calibration,
            run.config.data,
            batch_size=run.plan.stages[-1].batch_size,
            num_workers=run.data.loading.num_workers,
            device=run.device,
            precision=run.precision,
        )
        if fit is None:
            return None
        entry = next((e for e in read_index(store.folder) if e["file"] == BEST), None)
        about = None if entry is None else facts_of(entry)
        step = int(checkpoint.values["state"]["step"])
        store.save_best(checkpoint.values, step=step, about=about)
    update_run_json(run.folder, presence=fit.record())
    console.say(
        f"presence    calibrated on {fit.objects} images with an object and {fit.empty} without: "
        f"temperature {fit.temperature:.2f}, bias {fit.bias:+.2f}; log loss {fit.before:.3f} -> "
        f"{fit.after:.3f}"
    )
    return fit
