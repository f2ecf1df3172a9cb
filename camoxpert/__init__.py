"""CamoXpert: mixture-of-experts segmentation of camouflaged objects.

::

    import camoxpert

    model = camoxpert.load("runs/beetle")
    prediction = model.predict("photo.jpg")
    prediction.save("out")

Errors are raised as exceptions from ``camoxpert.errors``. Importing this package imports neither
torch nor numpy; the first call does.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from camoxpert.config import Config
    from camoxpert.errors import (
        CamoXpertError,
        CheckpointError,
        ConfigError,
        DataError,
        NumericError,
    )
    from camoxpert.evaluation.results import EvaluationResult
    from camoxpert.inference.photos import BatchResult
    from camoxpert.inference.prediction import Prediction
    from camoxpert.inference.predictor import Predictor
    from camoxpert.training.session import Result

__all__ = [
    "BatchResult",
    "CamoXpertError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EvaluationResult",
    "NumericError",
    "Prediction",
    "Predictor",
    "Result",
    "__version__",
    "evaluate",
    "load",
    "predict_folder",
    "score_maps",
    "train",
]
__version__ = "0.2.0"

# A second limit behind data.max_pixels, which another decoder checks from the header. It is set
# here because OpenCV reads it on import, and several modules import OpenCV.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "200000000")

_PLACES = {
    "BatchResult": "inference.photos",
    "EvaluationResult": "evaluation.results",
    "Prediction": "inference.prediction",
    "Predictor": "inference.predictor",
    "Result": "training.session",
    **dict.fromkeys(
        ("CamoXpertError", "CheckpointError", "ConfigError", "DataError", "NumericError"), "errors"
    ),
}
"""Name -> module that defines it, imported when the name is first used."""


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(
    model: str | Path, *, device: str = "auto", precision: str = "auto", zoom: bool = False
) -> Predictor:
    """Load a trained model.

    Args:
        model: a run folder (its best weights), a checkpoint file, a folder of shared weights, a
            file of ``camoxpert export``, or ``hf:USER/NAME@REVISION``: on the Hugging Face Hub.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: number format of the forward pass: auto, fp32, bf16 or fp16.
        zoom: look at every image at two sizes, as ``camoxpert predict --zoom`` does.

    Raises:
        CheckpointError: no usable checkpoint at ``model``.
        ConfigError: the device or precision is not available.
    """
    from pathlib import Path

    from camoxpert.runtime.host import wait_passively

    wait_passively()
    from camoxpert.inference.predictor import load_predictor

    return load_predictor(Path(model).expanduser(), device=device, precision=precision, zoom=zoom)


def predict_folder(
    model: Predictor | str | Path,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    kinds: Sequence[str] = ("map", "mask", "cutout", "overlay"),
    threshold: float = 0.5,
    min_presence: float | None = None,
    batch_size: int | None = 8,
    devices: str = "auto",
    overwrite: bool = False,
    limit: int | None = None,
    modalities: Mapping[str, str | Path] | None = None,
) -> BatchResult:
    """Predict files, folders and globs into a folder, as ``camoxpert predict`` does.

    A call that was stopped or killed is finished by the same call; see docs/predict.md.

    Args:
        model: a loaded model, or a path that ``load`` takes.
        inputs: images, folders, globs or CSV files.
        output: folder of pictures, ledger and table.
        kinds: pictures to write: map, mask, cutout, overlay.
        threshold: probability above which a pixel counts as object, 0..1.
        min_presence: maps of images that hold an object with a lower probability are empty; needs a
            model with the presence head.
        batch_size: images per forward pass; None chooses.
        devices: auto: the model's device, in this process; all, or a list such as ``0,1`` or
            ``cpu,cpu``: a process for each. A script that uses them needs an
            ``if __name__ == "__main__"`` block.
        overwrite: predict photos again that have results.
        limit: predict at most this many.
        modalities: name -> folder of what another sensor saw of the images, of models that were
            trained with it; an image without a file is predicted from the rest.

    Returns:
        Counts, the images that failed with their reasons, and where the time went.

    Raises:
        ConfigError: a wrong option, or results of other settings in ``output``.
        DataError: no image was found, or ``output`` cannot be written.
    """
    from pathlib import Path

    from camoxpert.errors import DataError
    from camoxpert.inference.aligned import with_files
    from camoxpert.inference.devices import choose_devices
    from camoxpert.inference.photos import PhotoOptions, predict_photos
    from camoxpert.inference.predictor import load_for
    from camoxpert.inference.sources import look_for_photos
    from camoxpert.models.modalities import require_known
    from camoxpert.runtime.host import wait_passively

    wait_passively()
    given = [inputs] if isinstance(inputs, (str, Path)) else inputs
    place = Path(output).expanduser()
    options = PhotoOptions(
        kinds=tuple(kinds),
        batch_size=batch_size,
        threshold=threshold,
        min_presence=min_presence,
        overwrite=overwrite,
        devices=choose_devices(devices),
        limit=limit,
        modalities=tuple(sorted(modalities or ())),
    )
    found = look_for_photos([str(Path(path).expanduser()) for path in given], output=place)
    if found.videos:
        raise DataError(
            f"{found.videos[0].path} is a video: `camoxpert predict` predicts those, and this "
            "function images alone."
        )
    predictor = (
        load_for(Path(model).expanduser(), options.devices)
        if isinstance(model, (str, Path))
        else model
    )
    require_known(options.modalities, predictor.modalities)
    photos = found.photos
    if modalities:
        folders = {name: Path(path).expanduser() for name, path in modalities.items()}
        photos, _ = with_files(photos, folders)
    return predict_photos(predictor, photos, place, options)


def train(config: Config | Mapping[str, Any] | str | Path | None = None, **settings: Any) -> Result:
    """Train a model, score it and write its report, as ``camoxpert train`` does.

    Examples:
        >>> camoxpert.train("configs/demo.yaml", dataset_path="data/toy", epochs=2)
        >>> camoxpert.train(data__roots=["data/toy"], model={"num_experts": 3}, optim__lr=3e-4)

    Args:
        config: YAML file, settings tree or nested mapping; None: the defaults.
        **settings: overrides of ``config``: names of flags (``epochs``), dotted names with ``__``
            for the dots (``train__epochs``), or groups (``train={"epochs": 2}``).

    Returns:
        ``path``, the run folder, and ``scores`` of the best weights: data set -> measure -> value.

    Raises:
        ConfigError: an unknown setting (with the nearest name), a wrong value, or a conflict.
        DataError, CheckpointError, NumericError: as on the command line.
    """
    from camoxpert.config.keywords import config_from_keywords
    from camoxpert.runtime.host import wait_passively

    wait_passively()
    chosen = config_from_keywords(config, settings)
    from camoxpert.training.session import run

    return run(chosen)


def evaluate(
    model: Predictor | str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    layout: str = "auto",
    split: str = "test",
    noncam: str = "exclude",
    resize: str = "error",
    protocol: str = "pysod",
    empty_gt: str = "pysod",
    intervals: bool = True,
    gallery: int = 6,
    batch_size: int = 8,
    num_workers: int = 0,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (),
    shots: Sequence[int] = (),
) -> list[EvaluationResult]:
    """Score a model on data sets, as ``camoxpert evaluate`` does.

    Args:
        model: a loaded model, or a path that ``load`` takes.
        data: one or more data sets; empty: the test sets of the model's run.
        output: folder for tables, curves, pictures and a page; None writes nothing.
        layout: name of a known layout of data sets, or auto.
        split: test, val or train, where a data set has splits.
        noncam: exclude or include COD10K images without a camouflaged object.
        resize: for masks of another size than their image: error or bilinear.
        protocol: pysod stretches every map to 0..1 first, as the field does; raw does not.
        empty_gt: images without an object: pysod, correct or skip (see docs/evaluation.md).
        intervals: also compute 95 % confidence intervals.
        gallery: number of best and of worst images to write as pictures.
        batch_size, num_workers: how the data is read; they do not change the scores.
        corruptions: also score corrupted images: names, or ``all``; see ``result.robustness``.
        severities: of the corruptions, 1 to 5; empty: all five.
        shots: also score a guided model with these numbers of references, those of the run's
            training; see ``result.shots``.

    Returns:
        One result per data set; ``result.scores["Smeasure"]`` is a fraction.

    Raises:
        CheckpointError, DataError, ConfigError: as on the command line.
    """
    from pathlib import Path

    from camoxpert.data.files.manifest import Search
    from camoxpert.evaluation.model import evaluate_model, find_sets
    from camoxpert.evaluation.options import ScoringOptions, choose_corruptions, choose_shots
    from camoxpert.evaluation.output import written_to
    from camoxpert.inference.values import one_of

    one_of("noncam", noncam, ("exclude", "include"))
    one_of("resize", resize, ("error", "bilinear"))
    asked = choose_corruptions(
        [corruptions] if isinstance(corruptions, str) else corruptions, severities
    )
    paths = [data] if isinstance(data, (str, Path)) else data
    paths = [Path(path).expanduser() for path in paths]
    options = ScoringOptions(
        protocol=protocol, empty_gt=empty_gt, intervals=intervals, gallery=gallery
    )
    with written_to(output, options) as folder:
        predictor = load(model) if isinstance(model, (str, Path)) else model
        sets = find_sets(
            predictor, paths, Search(layout, noncam, any_size=resize == "bilinear"), split=split
        )
        return evaluate_model(
            predictor,
            sets,
            options,
            batch_size=batch_size,
            num_workers=num_workers,
            corruptions=asked,
            shots=choose_shots(shots),
            output=folder,
            command=("evaluate",),
        )


def score_maps(
    predictions: str | Path | Sequence[str | Path],
    gt: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    images: Sequence[str | Path] = (),
    measures: Sequence[str] = ("default",),
    noncam: str = "exclude",
    allow_missing: bool = False,
    allow_extra: bool = False,
    map_suffix: str | None = None,
    resize: str = "error",
    gt_threshold: int | None = None,
    protocol: str = "pysod",
    empty_gt: str = "pysod",
    intervals: bool = True,
    gallery: int = 6,
    num_workers: int = 0,
) -> list[EvaluationResult]:
    """Score any model's prediction maps, as ``camoxpert evaluate --predictions`` does.

    Args:
        predictions: folders of maps, folders with one folder per data set, or folders with one
            folder per method.
        gt: folders of masks, folders of such folders, or data sets.
        output: folder for tables, comparisons, curves, pictures and a page; None writes nothing.
        images: folders of the images to show in the pictures, one for each ``gt``.
        measures: default, fast, all, or names of measures.
        noncam: exclude or include COD10K images without a camouflaged object.
        allow_missing, allow_extra: leave out masks without a map, maps without a mask.
        map_suffix: what map names have behind the image's name; None: found by rule.
        resize: for maps of another size than their mask: error or bilinear.
        gt_threshold: accept grey masks; levels above it (of 255) are object.
        protocol, empty_gt, intervals, gallery: see ``evaluate``.
        num_workers: worker processes; a script that uses them needs an
            ``if __name__ == "__main__"`` block.

    Returns:
        One result per method and data set.

    Raises:
        DataError: maps and masks do not match, or cannot be read; all errors are listed.
        ConfigError: an unknown measure or option.
    """
    from pathlib import Path

    from camoxpert.evaluation.maps.evaluate import evaluate_maps
    from camoxpert.evaluation.maps.find import PairOptions, find_tasks
    from camoxpert.evaluation.maps.score import MapOptions
    from camoxpert.evaluation.options import choose_measures
    from camoxpert.evaluation.output import written_to
    from camoxpert.inference.values import one_of

    one_of("noncam", noncam, ("exclude", "include"))
    one_of("resize", resize, ("error", "bilinear"))
    maps, masks = (
        [Path(path).expanduser() for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        for paths in (predictions, gt)
    )
    pairing = PairOptions(noncam, allow_missing, allow_extra, map_suffix=map_suffix)
    options = MapOptions(
        protocol=protocol,
        empty_gt=empty_gt,
        keys=choose_measures(measures),
        intervals=intervals,
        gallery=gallery,
        resize=resize,
        gt_threshold=gt_threshold,
    )
    with written_to(output, options) as folder:
        tasks = find_tasks(
            maps, masks, pairing, images=[Path(path).expanduser() for path in images]
        )
        return evaluate_maps(
            tasks, options, num_workers=num_workers, output=folder, command=("evaluate",)
        )
