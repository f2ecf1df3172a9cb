"""The images of an export: those that the gate scores, and those that calibrate int8."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from camoxpert import console, stop
from camoxpert.config import DataConfig
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.manifest import (
    Manifest,
    Search,
    evenly,
    find_test_sets,
    load_eval,
    load_train,
)
from camoxpert.data.loader import build_eval_loader
from camoxpert.errors import ConfigError, DataError
from camoxpert.export.gate import LEAST_IMAGES, Agreement, Maps, agreement_of
from camoxpert.export.graph import IMAGES, REFERENCE, ExportGraph
from camoxpert.inference.exported import ExportedNetwork
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.runtimes import Runtime
from camoxpert.synthesis.toy import toy_pair

MOST_IMAGES = 200
"""Images that the gate scores at most."""
CALIBRATION_IMAGES = 300
"""Training images whose values set the ranges of int8."""


@dataclass(frozen=True)
class GateImages:
    """The images of the gate.

    Attributes:
        sets: the images.
        source: where they come from, in words.
        real: how many are of data sets; the others were generated.
    """

    sets: tuple[Manifest, ...]
    source: str
    real: int


class Scored:
    """A checkpoint's scores and masks on the images of the gate, to compare files with.

    Args:
        predictor: of the checkpoint.
        images: to score.
        data: how they are read.
    """

    def __init__(self, predictor: Predictor, images: GateImages, data: DataConfig) -> None:
        self.images, self.data = images, data
        self.device = torch.device("cpu")
        self.before = self._maps(predictor.model)

    def agreement(self, runtime: Runtime) -> Agreement:
        """Return how an exported file agrees with the checkpoint."""
        after = self._maps(ExportedNetwork(runtime, self.device))
        return agreement_of(self.before, after, self.images.source)

    def _maps(self, model: nn.Module) -> Maps:
        found = Maps()
        for manifest in self.images.sets:
            found.add(model, manifest, self.data, self.device)
        return found


def data_of(predictor: Predictor) -> DataConfig:
    """Return how the images of a model are read."""
    return DataConfig(img_size=predictor.img_size, max_pixels=predictor.max_pixels)


def gate_images(
    predictor: Predictor, roots: Sequence[str], search: Search, scratch: str
) -> GateImages:
    """Return the images to compare: of the data, filled up with generated ones.

    Args:
        predictor: of the checkpoint.
        roots: see ``real_sets``.
        search: how their pairs are found.
        scratch: folder for generated images.
    """
    return fill_up(real_sets(predictor, roots, search), predictor.img_size, scratch)


def real_sets(predictor: Predictor, roots: Sequence[str], search: Search) -> list[Manifest]:
    """Return at most ``MOST_IMAGES`` images of data sets; nothing is decoded.

    Args:
        predictor: of the checkpoint.
        roots: data sets; empty: the test sets of its run, those of ``--test-data`` among them.
        search: how their pairs are found.
    """
    sets: list[Manifest] = []
    if roots:
        sets = list(load_eval(roots, search).values())
    else:
        data, own = predictor.config.data, _own(predictor, search)
        # Either may have been moved since.
        with contextlib.suppress(DataError):
            sets += find_test_sets(data.roots, own).values()
        if data.test_roots:
            with contextlib.suppress(DataError):
                sets += load_eval(data.test_roots, own).values()
    return share_out(sets, MOST_IMAGES)


def fill_up(chosen: Sequence[Manifest], img_size: int, scratch: str) -> GateImages:
    """Return the images of the gate: those of data sets, and generated ones up to
    ``LEAST_IMAGES``."""
    source = ", ".join(manifest.dataset for manifest in chosen)
    real = sum(map(len, chosen))
    missing = LEAST_IMAGES - real
    if missing > 0:
        made = Path(scratch) / "made"
        generate_images(made, missing, side=max(64, min(img_size, 256)))
        chosen = [*chosen, *find_test_sets([str(made)]).values()]
        source = f"{source} and {missing} generated" if source else "generated"
    return GateImages(tuple(chosen), source, real)


def share_out(sets: Sequence[Manifest], most: int) -> list[Manifest]:
    """Return at most ``most`` images of data sets: as many of each, as far as they go, and evenly
    spread over its classes. Sets that give none are left out."""
    taken = [0] * len(sets)
    left = most
    # The smallest first: what they lack is for the others.
    order = sorted(range(len(sets)), key=lambda index: len(sets[index]))
    for place, index in enumerate(order):
        taken[index] = min(len(sets[index]), left // (len(order) - place))
        left -= taken[index]
    return [evenly(m, number) for m, number in zip(sets, taken, strict=True) if number]


def generate_images(root: Path, number: int, *, side: int) -> None:
    """Write generated camouflage as the test set ``generated``, in scenes of no other set."""
    folder = root / "TestDataset" / "generated"
    for index in range(number):
        image, mask = toy_pair(2**20, index, size=side, difficulty=0.3)
        write_jpeg(folder / "Imgs" / f"generated_{index:03d}.jpg", image, quality=95)
        write_png(folder / "GT" / f"generated_{index:03d}.png", mask)


@dataclass(frozen=True)
class Calibration:
    """Training images whose values set the ranges of int8.

    Attributes:
        inputs: those of the graph by name, for one image each.
        source: data set.
        sha256: of the pixels, as the network sees them.
    """

    inputs: tuple[Mapping[str, NDArray[Any]], ...]
    source: str
    sha256: str

    def fields(self) -> dict[str, Any]:
        """Return what the metadata of a file says of them."""
        return {"images": len(self.inputs), "source": self.source, "sha256": self.sha256}


def calibration_of(
    predictor: Predictor, graph: ExportGraph, roots: Sequence[str], search: Search
) -> Calibration:
    """Return up to 300 training images, evenly from the whole set.

    A guided graph sees each with the references of a class in turn, or with none.

    Args:
        predictor: of the checkpoint.
        graph: to calibrate.
        roots: data sets; empty: the training data of its run.
        search: how pairs are found.

    Raises:
        ConfigError: the training data is not there.
    """
    if not roots:
        roots, search = predictor.config.data.roots, _own(predictor, search)
    try:
        if not roots:
            raise DataError("shared weights do not say what they were trained on")
        manifest = load_train(roots, search)
    except DataError as error:
        raise ConfigError(
            f"int8 is calibrated on training images, and there are none ({error}). Name a data set "
            "like the one the model was trained on: --calibration DIR."
        ) from error
    chosen = evenly(manifest, CALIBRATION_IMAGES)
    digest, inputs = hashlib.sha256(), []
    loader = build_eval_loader(chosen, data_of(predictor), batch_size=1)
    for index, batch in enumerate(console.track(loader, f"read {manifest.dataset}")):
        stop.check()
        array = np.ascontiguousarray(batch.images.numpy())
        digest.update(array.tobytes())
        inputs.append({IMAGES: array, **_told(graph, index)})
    return Calibration(tuple(inputs), manifest.dataset, digest.hexdigest())


def _own(predictor: Predictor, search: Search) -> Search:
    """Return the search as the run found its data."""
    return replace(search, layout=predictor.config.data.layout)


def _told(graph: ExportGraph, index: int) -> dict[str, NDArray[Any]]:
    guidance = graph.network.guidance
    if guidance is None:
        return {}
    known = guidance.prototypes_KD
    row = index % (len(known) + 1)
    features = known[row] if row < len(known) else torch.zeros(guidance.features)
    return {REFERENCE: features.float().cpu().numpy()[None]}
