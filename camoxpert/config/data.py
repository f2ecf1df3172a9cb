"""The settings of data: where it lies, how it is read and given to training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from camoxpert.config.augment import AugmentConfig
from camoxpert.config.guidance import EpisodeConfig
from camoxpert.config.schema import setting

RGB = "rgb"
"""The photograph among the modalities; it is always there."""


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they reach the model."""

    roots: tuple[str, ...] = setting(
        (), "training data: one or more data set folders or CSV files", flag="--dataset-path"
    )
    test_roots: tuple[str, ...] = setting(
        (),
        "more test sets to score when training ends, beside those that come with the training data",
        flag="--test-data",
    )
    teacher: str = setting(
        "",
        "soft maps to learn from beside the masks: those of an own model (a run, a checkpoint, "
        "shared weights), made once and kept in the cache folder, or a folder of any model's maps",
        flag="--teacher",
    )
    unlabeled: str = setting(
        "",
        "folder of images without masks that join the training; they learn from --teacher alone",
        flag="--unlabeled",
    )
    unlabeled_share: float = setting(
        0.5,
        "share of a batch that --unlabeled may take; an epoch sees each of these images at most "
        "once",
        above=0,
        maximum=0.95,
    )
    synthetic: tuple[str, ...] = setting(
        (),
        "made data that joins the training: one or more data set folders, as `synthesize` writes "
        "them; validation and tests stay real",
        flag="--synthetic",
    )
    synthetic_share: float = setting(
        0.3,
        "share of the images with masks in a batch that --synthetic may take; an epoch sees every "
        "real image once, and each made one at most once",
        flag="--synthetic-share",
        above=0,
        maximum=0.95,
    )
    negatives: tuple[str, ...] = setting(
        (),
        "images without any hidden object that join the training: one or more folders, without "
        "masks; part of them validates and calibrates",
        flag="--negatives",
    )
    negative_share: float = setting(
        0.3,
        "share of the labelled images in a batch that images without an object may take (0.25 to "
        "0.5 serve the presence head); an epoch sees each of them at most once",
        flag="--negative-share",
        above=0,
        maximum=0.95,
    )
    calibration_fraction: float = setting(
        0.05,
        "share of TRAIN, of either kind, set aside to calibrate the presence head after training: "
        "at least 60 images of a kind, but no more than a quarter of them unless this share is "
        "larger; 0: not calibrated",
        minimum=0,
        maximum=0.5,
    )
    modalities: tuple[str, ...] = setting(
        (),
        "what other sensors saw of the same scene, read beside the photographs, for example rgb "
        "depth thermal: folders of these names next to the images, or columns of a CSV",
        flag="--modalities",
    )
    modality_dropout: float = setting(
        0.4,
        "share of the images that training shows as the photograph alone, so that the model also "
        "works without --modalities; the others are shown with all they have, or with a part of it",
        minimum=0.3,
        maximum=1,
    )
    layout: str = setting(
        "auto", "name of a known layout, or auto to recognise it", flag="--layout"
    )
    noncam: str = setting(
        "exclude",
        "COD10K images without a camouflaged object (their masks are black)",
        flag="--noncam",
        choices=("exclude", "include"),
    )
    resize: str = setting(
        "error",
        "a mask of another size than its image: refused, or resized with it (bilinear)",
        flag="--resize",
        choices=("error", "bilinear"),
    )
    clean_list: str = setting(
        "",
        "CSV of images to leave out (columns dataset, split, name), as doctor writes it",
        flag="--clean-list",
    )
    allow_outside: bool = setting(
        False,
        "a CSV may name files outside its own folder; only for a CSV you trust",
        flag="--allow-outside",
    )
    val_fraction: float = setting(
        0.1,
        "share of TRAIN set aside to choose the best checkpoint, unless the data has a validation "
        "split; test sets never choose anything. "
        "0: keep the last",
        flag="--val-fraction",
        minimum=0,
        maximum=0.5,
    )
    splits: str = setting(
        "",
        "splits.json of `crossval`: the images of --fold validate, in place of --val-fraction",
        flag="--splits",
    )
    fold: int | None = setting(
        None, "the fold of --splits that is held out, from 1", flag="--fold", minimum=1
    )
    group_copies: bool = setting(
        True,
        "keep copies of a picture (identical files, or re-encoded, resized, cropped or flipped "
        "ones) on one side of the validation split",
        flag="--group-copies",
    )
    img_size: int = setting(
        352, "side of the square training image, a multiple of 32", flag="--img-size", minimum=32
    )
    num_workers: int | None = setting(
        None, "data worker processes; unset: chosen from the cores", flag="--num-workers", minimum=0
    )
    persistent_workers: bool = setting(True, "keep the workers between epochs")
    start_method: str = setting(
        "auto",
        "how data workers start",
        choices=("auto", "fork", "spawn", "forkserver"),
    )
    worker_timeout: float = setting(
        300.0,
        "seconds without a batch until data workers count as hung and are restarted; 0: never",
        minimum=0,
    )
    unreadable: str = setting(
        "error",
        "unreadable images and masks: an error, or skip: replaced by the next readable pair (left "
        "out in validation)",
        flag="--unreadable",
        choices=("error", "skip"),
    )
    max_unreadable: float = setting(
        0.01,
        "share of the images that may be unreadable under --unreadable skip; one always may",
        minimum=0,
        maximum=1,
    )
    cache: str = setting(
        "auto",
        "where decoded training pairs are kept: on disk, in memory, or nowhere (none)",
        flag="--cache",
        choices=("auto", "none", "ram", "disk"),
    )
    cache_dir: str = setting(
        "",
        "folder of the disk caches; empty: $CAMOXPERT_CACHE, or camoxpert in the user's cache "
        "folder",
        flag="--cache-dir",
    )
    strict_cache: bool = setting(
        False, "a disk cache that is missing or stale is an error", flag="--strict-cache"
    )
    augment_on: str = setting(
        "auto",
        "where samples are augmented: in the data workers (cpu) or in batches on the training "
        "device (device); auto: device on CUDA",
        flag="--augment-on",
        choices=("auto", "cpu", "device"),
    )
    multi_scale: tuple[float, ...] = setting(
        (),
        "training sizes as factors of --img-size, one drawn per batch, for example 0.75 1.0 1.25",
        flag="--multi-scale",
    )
    source_size: int | None = setting(
        None,
        "side to which pairs are decoded before they are augmented; more than the training size "
        "leaves detail to zoom into; unset: the largest training size",
        minimum=32,
    )
    prefetch_factor: int = setting(4, "batches each worker prepares ahead", minimum=1)
    pin_memory: bool = setting(True, "page-locked batches for faster copies (CUDA only)")
    max_pixels: int = setting(
        50_000_000,
        "larger images are refused from their header",
        flag="--max-pixels",
        minimum=1,
    )
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    episodes: EpisodeConfig = dataclasses.field(default_factory=EpisodeConfig)

    @property
    def beside_rgb(self) -> tuple[str, ...]:
        """The modalities beside the photograph, in the order of the model's inputs."""
        return tuple(name for name in self.modalities if name != RGB)
