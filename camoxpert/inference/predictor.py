"""A trained model ready to use: images in, probability maps at their original size out."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from camoxpert.config import TrainConfig
from camoxpert.data.samples.augment import image_sides
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.inference.aligned import aligned
from camoxpert.inference.batching import BatchSize
from camoxpert.inference.engine import Pipeline
from camoxpert.inference.exported import ExportedNetwork, open_exported
from camoxpert.inference.prediction import Prediction
from camoxpert.inference.references import Searching
from camoxpert.inference.runtimes import is_exported
from camoxpert.inference.score import presence_of
from camoxpert.inference.sources import ImageInput, find_photos, name_of
from camoxpert.inference.stream import Iterated, StreamStages, or_raise
from camoxpert.inference.timing import Timing
from camoxpert.inference.tta import Looked
from camoxpert.inference.values import finite_number, whole_number
from camoxpert.inference.views import ONE_VIEW, ViewOptions, Views, choose_views, prepared
from camoxpert.inference.weights import cast_weights
from camoxpert.models.backbone import BACKBONES
from camoxpert.models.camoxpert import CamoXpert, build_model, require_fit
from camoxpert.models.modalities import all_there_is, require_known
from camoxpert.models.zoom import Zoomed, zoomed_side
from camoxpert.runs.checkpoint import Checkpoint, load_checkpoint, resolve_checkpoint
from camoxpert.runs.hub import hub_name, push
from camoxpert.runs.share import save_shared
from camoxpert.runtime.device import (
    Precision,
    check_architecture,
    choose_device,
    choose_precision,
)

Input = TypeVar("Input", bound=ImageInput)
MOST_SIDE, STRIDE = 8192, 32
"""Largest side of the network's input, and what it is a multiple of."""
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class Predictor(Searching):
    """A model in evaluation mode with its preprocessing; ``camoxpert.load`` makes one.

    Args:
        checkpoint: a verified checkpoint; its EMA weights are used if it has them.
        device: device of the model.
        precision: number format of the forward pass.
        max_pixels: larger images are refused; None: as in training.
        zoom: look at every image at two sizes; see ``models.zoom``.
        exported: the network of an exported file, in place of one built of the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        precision: Precision,
        max_pixels: int | None = None,
        zoom: bool = False,
        exported: ExportedNetwork | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = device
        self.precision = precision
        self.img_size = self.config.data.img_size
        if self.img_size > MOST_SIDE or self.img_size % STRIDE:
            raise CheckpointError(
                f"{checkpoint.path}: its metadata is damaged, or not of this program: "
                f"data.img_size is {self.img_size}; sides are multiples of {STRIDE} of at most "
                f"{MOST_SIDE} px."
            )
        own = self.config.data.max_pixels
        self.max_pixels = own if max_pixels is None else whole_number("max_pixels", max_pixels, 1)
        self.zoom, self.exported = zoom, exported
        built = self._built() if exported is None else exported
        if isinstance(built, CamoXpert):
            cast_weights(built, precision.dtype)
        self.model: CamoXpert | Zoomed | ExportedNetwork = built
        if zoom:
            # Images are read at the larger size.
            larger = zoomed_side(self.img_size)
            network: Any = built  # An exported one stands for ours.
            self.model, self.img_size = Zoomed(network, self.img_size), larger
        self.model.to(device).eval()
        searched: Any = built
        super().__init__(searched, max_pixels=self.max_pixels)

    def _built(self) -> CamoXpert:
        """Return the network of the checkpoint with its weights."""
        sides = image_sides(self.config.data)
        if self.zoom:
            sides = (*sides, zoomed_side(self.img_size))
        weights, path = self.checkpoint.evaluated_weights, self.checkpoint.path
        try:
            beside = self.config.data.beside_rgb
            config = self.checkpoint.model_config
            if path.suffix == ".safetensors":
                # Shared by somebody, who may have written any settings beside them.
                require_fit(config, weights, sides=sides, modalities=beside)
            built = build_model(config, sides=sides, modalities=beside)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except ConfigError as error:
            if not self.zoom:
                raise
            raise ConfigError(f"--zoom looks at images at two sizes. {error}") from error
        try:
            built.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit its own settings: {error}") from error
        return built

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model can be given beside photographs; an exported file takes nothing."""
        return () if self.exported is not None else self.config.data.beside_rgb

    @property
    def has_presence(self) -> bool:
        """Whether the model says how probable it is that an image holds any object."""
        if self.exported is not None:
            return self.exported.about.get("presence") is not None
        return self.checkpoint.model_config.presence == "on"

    @property
    def presence_is_calibrated(self) -> bool:
        """Whether images that neither trained nor chose anything calibrated the presence."""
        if self.exported is not None:
            presence = self.exported.about.get("presence")
            return presence is not None and bool(presence.get("images"))
        fitted_on = self.checkpoint.evaluated_weights.get("presence.calibration.images")
        return fitted_on is not None and int(fitted_on) > 0

    def check_min_presence(self, least: float | None) -> None:
        """Raise ConfigError if a least presence cannot be asked for."""
        if least is None:
            return
        least = finite_number("min_presence", least)
        if not 0 <= least <= 1:
            raise ConfigError(f"--min-presence must be between 0 and 1; {least:g} is not.")
        if not self.has_presence:
            raise ConfigError(
                f"--min-presence {least:g}: {self.checkpoint.path} has no presence head. A model "
                "gets one when it is trained with images without objects: --negatives DIR, or "
                "--noncam include."
            )

    def save_pretrained(self, folder: str | Path, *, licence: str = "", repo: str = "") -> Path:
        """Save the evaluated weights to give away: ``load`` takes the folder.

        Args:
            folder: gets ``model.safetensors``, ``config.json`` and ``README.md``, a model card;
                a model that was saved there before is replaced.
            licence: of these weights, as the Hub writes it, such as ``mit``; "": the one that they
                had, or none.
            repo: ``USER/NAME`` for the commands of the card.

        Returns:
            The folder.

        Raises:
            ConfigError: the folder holds other files of these names, or the model was exported.
            CheckpointError: the folder cannot be written.
        """
        if self.exported is not None:
            raise ConfigError(
                f"{self.checkpoint.path} was exported, and its weights cannot be taken out again. "
                "Share the run or checkpoint that it was exported from."
            )
        place = Path(folder).expanduser()
        return save_shared(place, self.checkpoint, licence=licence, repo=repo)

    def push_to_hub(
        self, name: str, *, private: bool = False, licence: str = "", message: str = ""
    ) -> str:
        """Upload the evaluated weights to the Hugging Face Hub as one commit.

        Args:
            name: ``USER/NAME``, or ``USER/NAME@BRANCH``; both are created where they are missing.
            private: whether a repository that is created is private.
            licence: see ``save_pretrained``.
            message: of the commit.

        Returns:
            The address of its page.

        Raises:
            ConfigError: a wrong name, a repository with the model of another library, or the extra
                ``hub`` is missing.
            CheckpointError: the Hub cannot be reached, or does not let you write.
        """
        target = hub_name(name)
        with tempfile.TemporaryDirectory(prefix="camoxpert-share-") as scratch:
            folder = self.save_pretrained(scratch, licence=licence, repo=target.repo)
            return push(folder, target, private=private, message=message)

    @overload
    def predict(
        self,
        images: ImageInput,
        *,
        threshold: float = ...,
        batch_size: int = ...,
        tile: int | None = ...,
        overlap: float | None = ...,
        tta: str | None = ...,
        min_presence: float | None = ...,
        modalities: Mapping[str, ImageInput] | None = ...,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        images: list[Input] | tuple[Input, ...],
        *,
        threshold: float = ...,
        batch_size: int = ...,
        tile: int | None = ...,
        overlap: float | None = ...,
        tta: str | None = ...,
        min_presence: float | None = ...,
        modalities: Sequence[Mapping[str, ImageInput]] | None = ...,
    ) -> list[Prediction]: ...

    def predict(
        self,
        images: ImageInput | list[Input] | tuple[Input, ...],
        *,
        threshold: float = 0.5,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float | None = None,
        tta: str | None = None,
        min_presence: float | None = None,
        modalities: Mapping[str, ImageInput] | Sequence[Mapping[str, ImageInput]] | None = None,
    ) -> Prediction | list[Prediction]:
        """Find the hidden objects in one image, or in each of a list.

        Args:
            images: a path, uint8 RGB pixels (H, W, 3) or a Pillow image; or a list or tuple of
                these.
            threshold: probability above which a pixel counts as object, 0..1.
            batch_size: images or tiles per forward pass.
            tile, overlap, tta, min_presence: see ``stream``.
            modalities: what other sensors saw of the image, by name: files, or arrays (H, W) of the
                values that were measured (not finite, or 0 in 16 bits: unknown); of a list of
                images one such mapping for each. Any may be missing.

        Returns:
            A Prediction, or a list of them in order.

        Raises:
            DataError: an image cannot be read.
            ConfigError: a value is out of range.
        """
        stream = functools.partial(
            self.stream,
            threshold=threshold,
            batch_size=batch_size,
            tile=tile,
            overlap=overlap,
            tta=tta,
            min_presence=min_presence,
        )
        given: Any = images if isinstance(images, (list, tuple)) else [images]
        if modalities is not None:
            given = aligned(given, modalities)
            require_known([name for one in given for name in one.modalities], self.modalities)
        if isinstance(images, (list, tuple)):
            return list(stream(given))
        (prediction,) = stream(given)
        return dataclasses.replace(prediction, name=name_of(images, "image"))

    def stream(
        self,
        images: str | Path | Iterable[ImageInput],
        *,
        threshold: float = 0.5,
        batch_size: int = 8,
        tile: int | None = None,
        overlap: float | None = None,
        tta: str | None = None,
        min_presence: float | None = None,
    ) -> Iterator[Prediction]:
        """Yield a prediction for each image, in order, with two batches of images in memory.

        The next batch is read during the forward pass of the current one. With the same batch size
        the values equal those of ``camoxpert predict``.

        Args:
            images: any iterable of paths, uint8 RGB pixels and Pillow images, finite or not; or a
                folder, glob or CSV file, as on the command line.
            threshold: probability above which a pixel counts as object, 0..1.
            batch_size: images or tiles per forward pass.
            tile: images larger than this many pixels are also looked at in windows of this size.
            overlap: least share of a window that the next one covers too, 0.25 if unset.
            tta: ``flip``, ``scales`` or ``flip,scales``: mean of the logits of the mirrored image,
                and of three sizes.
            min_presence: maps of images whose presence is lower are 0 everywhere; needs a model
                with the presence head.

        Raises:
            DataError: no image was found; or, during the iteration, an image cannot be read.
            ConfigError: a value is out of range.
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        if not 0 <= finite_number("threshold", threshold) <= 1:
            raise ConfigError(f"threshold must be between 0 and 1; got {threshold:g}.")
        self.check_min_presence(min_presence)
        chosen = find_photos([str(images)]) if isinstance(images, (str, Path)) else images
        attempts = self.attempts(
            chosen,
            threshold=threshold,
            batch_size=batch_size,
            views=self.views(choose_views(tile, overlap, tta)),
            min_presence=min_presence,
        )
        return (or_raise(found) for _, found in attempts)

    def attempts(
        self,
        images: Iterable[Input],
        *,
        threshold: float,
        batch_size: int,
        views: Views | None = None,
        min_presence: float | None = None,
    ) -> Iterator[tuple[Input, Prediction | DataError]]:
        """Yield each image with its prediction, or with the error if it cannot be read.

        Args:
            images, threshold, batch_size, min_presence: see ``stream``.
            views: tiles and augmentation; None: none.
        """
        source = Iterated(images, batch_size)
        stages = StreamStages(
            self.device,
            threshold,
            views or self.views(ONE_VIEW),
            min_presence,
            max_pixels=self.max_pixels,
            modalities=self.modalities,
        )
        with Pipeline(
            stages,
            source,
            batch_size=BatchSize(batch_size),
            timing=Timing(),
            worker="",
            most_chunks=1,
        ) as pipeline:
            for result in pipeline.results():
                for row in result.rows:
                    found = row["found"]
                    if isinstance(found, Prediction):
                        found = dataclasses.replace(found, seconds=row["seconds"]["forward"])
                    yield row["image"], found

    def prepare(self, image_HWC: NDArray[np.uint8]) -> Tensor:
        """Return an RGB uint8 image (H, W, 3) resized to the training size, uint8 (3, S, S)."""
        return prepared(image_HWC, self.img_size)

    def look(self, images_BCHW: Tensor) -> Looked:
        """Return float32 logits of prepared images (B, 3, S, S) on the device, with the presence
        head together with the probabilities (B,) that they hold any object.

        Images may have the planes of the model's modalities as further channels, all 0 for one that
        is missing.
        """
        given: tuple[Any, ...] = (images_BCHW,)
        if images_BCHW.shape[1] > 3:
            seen = all_there_is(images_BCHW[:, 3:])
            given = (images_BCHW[:, :3], None, seen)
        with self.precision.autocast(self.device):
            output = self.model(*given)
        logits: Tensor = output.logits_B1HW.float()
        presence = presence_of(self.model, output)
        return logits if presence is None else (logits, presence)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Return float32 logits (B, 1, h, w) of prepared images (B, 3, S, S) on the device."""
        with self.precision.autocast(self.device):
            output: Tensor = self.model(images_BCHW).logits_B1HW
        return output.float()

    def views(self, options: ViewOptions) -> Views:
        """Return how images become inputs of this model.

        Raises:
            ConfigError: the network does not take inputs of the sides that are asked for.
        """
        views = Views(options, side=self.img_size, logits=self.look)
        name = self.config.model.backbone
        for side in set(views.sides) - {self.img_size} if name not in BACKBONES else ():
            try:
                self.logits(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise ConfigError(
                    f"--tta scales: {name} does not take images of {side} px after training with "
                    f"{self.img_size} px ({reason}). Use --tta flip."
                ) from error
        return views


def load_predictor(
    path: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    max_pixels: int | None = None,
    zoom: bool = False,
    worker: torch.device | None = None,
) -> Predictor:
    """Load a predictor from a checkpoint file, a run folder or a folder of shared weights.

    Args:
        path: where the model is, or ``hf:USER/NAME@REVISION``; or a file that ``export`` wrote.
        device, precision, zoom: as the flags of ``predict``.
        max_pixels: larger images are refused; None: as in training.
        worker: device whose precision is meant, if other processes do the work; None: ``device``.

    Raises:
        CheckpointError: no usable checkpoint at ``path``.
        ConfigError: the device or precision is not available.
    """
    if is_exported(path):
        return _load_exported(
            path, device=device, precision=precision, max_pixels=max_pixels, zoom=zoom
        )
    checkpoint = load_checkpoint(resolve_checkpoint(path))
    where = choose_device(device)
    check_architecture(where)
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision {precision}: use {', '.join(PRECISIONS)}.")
    chosen = choose_precision(TrainConfig(precision=precision), worker or where)
    return Predictor(checkpoint, device=where, precision=chosen, max_pixels=max_pixels, zoom=zoom)


def _load_exported(
    path: Path, *, device: str, precision: str, max_pixels: int | None, zoom: bool
) -> Predictor:
    # A GPU is used where it is asked for: the libraries of most installations have the CPU alone.
    where = choose_device("cpu" if device == "auto" else device)
    checkpoint, network = open_exported(path, where, precision)
    fixed = str(network.about["precision"])
    return Predictor(
        checkpoint,
        device=where,
        precision=Precision(None, False, f"{fixed}: as exported", fixed),
        max_pixels=max_pixels,
        zoom=zoom,
        exported=network,
    )


def load_for(
    path: Path,
    devices: Sequence[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    max_pixels: int | None = None,
    zoom: bool = False,
) -> Predictor:
    """Load the predictor of a job: for worker processes one that only knows the settings.

    Args:
        path: where the model is.
        devices: of the worker processes; empty: this process does the work.
        device, precision, max_pixels, zoom: see ``load_predictor``; the precision is that of the
            first of the devices.
    """
    worker = torch.device(devices[0]) if devices else None
    return load_predictor(
        path,
        device="cpu" if devices else device,
        precision=precision,
        max_pixels=max_pixels,
        zoom=zoom,
        worker=worker,
    )
