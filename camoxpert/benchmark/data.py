"""``benchmark data``: the speed of our loaders against the loader every repository has, and of the
stages.

The baseline is the plain Dataset: decode image and mask of every sample in every epoch, resize,
albumentations' Compose, worker processes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from camoxpert import console
from camoxpert.benchmark.common import (
    Ratio,
    Report,
    heading,
    interleaved,
    milliseconds,
    paired_ratio,
    quartiles,
    show_table,
)
from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data.cache.build import open_cache
from camoxpert.data.cache.reader import CacheReader
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.image_io import probe, read_image, read_mask, read_pair
from camoxpert.data.files.manifest import Manifest, load_train
from camoxpert.data.loader import Batches, LoaderPlan, build_loader, finish
from camoxpert.data.samples.augment import SampleTransform, resize_pair, square_pair
from camoxpert.data.supervise import start_worker
from camoxpert.runtime.device import device_name, wait_for
from camoxpert.synthesis.toy import toy_pair

# How often one epoch of a loader reads the files: a short epoch would measure its start.
REPEATS = 3
# As strong as the defaults, so that both sides do the same work.
AUGMENT = AugmentConfig()


@dataclass(frozen=True)
class Sizes:
    """What is generated and how it is loaded.

    Attributes:
        images: files in the generated set.
        height, width: their size.
        img_size, batch_size, num_workers: as for training; the baseline has at least one worker.
        rounds: timed epochs of each loader, in turns.
    """

    images: int = 96
    height: int = 768
    width: int = 1024
    img_size: int = 352
    batch_size: int = 16
    num_workers: int = 2
    rounds: int = 7


@dataclass(frozen=True)
class Source:
    """The generated set, with the loaders that read it.

    Attributes:
        manifest, cache: of the set.
        sizes: of images and batches.
        device: where device augmentation runs.
    """

    manifest: Manifest
    cache: PixelCache
    sizes: Sizes
    device: torch.device

    @property
    def transform(self) -> SampleTransform:
        """The changes that both sides make."""
        return SampleTransform(img_size=self.sizes.img_size, augment=AUGMENT, seed=0)

    def loader(self, cache: PixelCache | None, workers: int, *, on_device: bool = False) -> Batches:
        """Return our loader."""
        return build_loader(
            self.manifest,
            DataConfig(img_size=self.sizes.img_size, augment=AUGMENT),
            LoaderPlan(workers, 2, cache, on_device, pin_memory=self.device.type == "cuda"),
            batch_size=self.sizes.batch_size,
            seed=0,
        )

    def plain_loader(self, decoder: str, workers: int) -> DataLoader[Any]:
        """Return the baseline."""
        return DataLoader(
            PlainDataset(self.manifest, self.sizes.img_size, decoder),
            batch_size=self.sizes.batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=True,
            worker_init_fn=start_worker,
        )


def run(sizes: Sizes, *, device: torch.device, needed: float | None = None) -> Report:
    """Measure loaders and stages on generated JPEGs, print, and return the JSON file's content.

    Args:
        sizes: of the generated set and its batches.
        device: where device augmentation runs.
        needed: images per second that a measured training step takes; None omits it.
    """
    report = heading(
        "data",
        {
            "images": sizes.images,
            "size": f"{sizes.width}x{sizes.height}",
            "img_size": sizes.img_size,
            "batch_size": sizes.batch_size,
            "num_workers": sizes.num_workers,
            "rounds": sizes.rounds,
            "device": device_name(device),
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "data", sizes.images, sizes.height, sizes.width)
        manifest = load_train([root / "data"])
        data = DataConfig(img_size=sizes.img_size, cache_dir=str(root / "cache"))
        cache = open_cache(manifest, data, mode="disk")
        source = Source(manifest, cache, sizes, device)
        stages = measure_stages(source)
        console.say(
            f"{sizes.images} JPEGs of {sizes.width}x{sizes.height}, {sizes.img_size} px, "
            f"milliseconds per image, one process:"
        )
        show_table([[name, f"{value:.3f}"] for name, value in stages.items()])
        rates, ratios = measure_loaders(source)
    report |= {
        "milliseconds_per_image": stages,
        "images_per_second": rates,
        "over_plain_pil": ratios,
    }
    if needed is not None:
        report["needed_images_per_second"] = needed
        console.say(f"the training step takes {needed:.0f} images/s:")
        show_table([[name, f"{rate / needed:.2f} times as many"] for name, rate in rates.items()])
    return report


def measure_loaders(source: Source) -> tuple[dict[str, float], dict[str, Ratio]]:
    """Time whole epochs of every loader in turns.

    Returns:
        images per second of every loader, and its ratio over the first one.
    """
    manifest = replace(source.manifest, pairs=source.manifest.pairs * REPEATS)
    source = replace(source, manifest=manifest)
    workers = max(1, source.sizes.num_workers)

    def epoch(loader: Batches, *, finished: bool) -> Callable[[], None]:
        def iterate() -> None:
            loader.set_epoch(0)
            for batch in loader:
                if finished:
                    finish(loader, batch, source.device)
            wait_for(source.device)

        return iterate

    def plain_epoch(decoder: str) -> Callable[[], None]:
        loader = source.plain_loader(decoder, workers)

        def iterate() -> None:
            for _ in loader:
                pass

        return iterate

    loaders = {
        f"ours, files, {workers} workers": source.loader(None, workers),
        f"ours, cache, {workers} workers": source.loader(source.cache, workers),
        "ours, cache, no worker": source.loader(source.cache, 0),
        "ours, cache, batch reads": source.loader(source.cache, 0, on_device=True),
    }
    variants = {
        f"plain PIL, {workers} workers": plain_epoch("PIL"),
        f"plain OpenCV, {workers} workers": plain_epoch("OpenCV"),
    }
    variants |= {name: epoch(loader, finished=False) for name, loader in loaders.items()}
    variants["ours, cache, changed on the device"] = epoch(
        loaders["ours, cache, batch reads"], finished=True
    )
    seconds = interleaved(variants, rounds=source.sizes.rounds, description="loaders")
    for loader in loaders.values():
        loader.close()
    first = next(iter(variants))
    rates = {name: 1e3 * len(manifest) / milliseconds(taken) for name, taken in seconds.items()}
    ratios = {name: paired_ratio(seconds[first], taken) for name, taken in seconds.items()}
    rows = [[name, f"{rate:.0f}", quartiles(ratios[name], 1)] for name, rate in rates.items()]
    show_table([["loader", "images/s", "over the first (quartiles)"], *rows])
    return rates, ratios


def measure_stages(source: Source) -> dict[str, float]:
    """Return the milliseconds per image of every stage, in one process and one thread."""
    img_size, device, transform = source.sizes.img_size, source.device, source.transform
    pairs = source.manifest.pairs[: min(source.sizes.batch_size, len(source.manifest))]
    decoded = [read_pair(pair.image, pair.mask) for pair in pairs]
    squares = np.stack([square_pair(image, mask, img_size) for image, mask in decoded])
    compose = plain_pipeline()
    loader = source.loader(source.cache, 0, on_device=True)
    assert isinstance(loader, CacheReader)
    keys = [(0, index, img_size) for index in range(len(pairs))]
    raw = loader.read(keys)

    def on_device() -> None:
        finish(loader, raw, device)
        wait_for(device)

    stages: dict[str, Callable[[], object]] = {
        "read two headers": lambda: [probe(p) for pair in pairs for p in (pair.image, pair.mask)],
        "decode image (PIL)": lambda: [_pil(pair.image, "RGB") for pair in pairs],
        "decode image (ours)": lambda: [read_image(pair.image) for pair in pairs],
        "decode mask (PIL)": lambda: [_pil(pair.mask, "L") for pair in pairs],
        "decode mask (ours, all encodings)": lambda: [read_mask(pair.mask) for pair in pairs],
        "decode image (ours, to the size needed)": lambda: [
            read_image(pair.image, at_least=img_size) for pair in pairs
        ],
        "resize pair": lambda: [resize_pair(image, mask, img_size) for image, mask in decoded],
        "change (albumentations' Compose)": lambda: [
            compose(image=square[..., :3].copy(), mask=square[..., 3].copy()) for square in squares
        ],
        "change (ours on the CPU)": lambda: [
            transform.change(square, epoch=0, index=index) for index, square in enumerate(squares)
        ],
        "read a batch from the cache": lambda: loader.read(keys),
        f"change a batch on {device.type} (ours)": on_device,
    }
    with one_thread():
        seconds = interleaved(stages, rounds=source.sizes.rounds, description="stages")
    return {name: milliseconds(taken) / len(pairs) for name, taken in seconds.items()}


class PlainDataset(Dataset[Any]):
    """What every repository has: every sample is decoded, resized and changed by albumentations."""

    def __init__(self, manifest: Manifest, img_size: int, decoder: str) -> None:
        self.pairs = manifest.pairs
        self.img_size = img_size
        self.decoder = decoder
        self.compose: Any = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image (3, S, S) and mask (1, S, S), uint8."""
        pair = self.pairs[index]
        if self.decoder == "PIL":
            image, mask = _pil(pair.image, "RGB"), _pil(pair.mask, "L")
        else:
            # Not cv2.imread, which ends the process at a path that is not UTF-8.
            image = np.asarray(cv2.imdecode(_bytes_of(pair.image), cv2.IMREAD_COLOR))[..., ::-1]
            mask = np.asarray(cv2.imdecode(_bytes_of(pair.mask), cv2.IMREAD_GRAYSCALE))
        image, mask = resize_pair(image, mask, self.img_size)
        if self.compose is None:
            self.compose = plain_pipeline()
        changed = self.compose(image=image, mask=mask)
        pixels = torch.from_numpy(np.ascontiguousarray(changed["image"].transpose(2, 0, 1)))
        return pixels, torch.from_numpy(changed["mask"])[None]


def plain_pipeline() -> Any:
    """Return albumentations' Compose with the strengths of AUGMENT, as documented there."""
    import albumentations as A

    a = AUGMENT
    return A.Compose(
        [
            A.HorizontalFlip(p=a.hflip),
            A.Affine(
                scale=(1 - a.scale, 1 + a.scale),
                rotate=(-a.rotate, a.rotate),
                translate_percent=(-a.translate, a.translate),
                border_mode=cv2.BORDER_REFLECT_101,
                p=1.0,
            ),
            A.ColorJitter(
                brightness=a.brightness,
                contrast=a.contrast,
                saturation=a.saturation,
                hue=a.hue,
                p=0.8,
            ),
            A.GaussianBlur(blur_limit=(3, 5), p=a.blur),
            A.GaussNoise(std_range=(0.01, 0.05), p=a.noise),
        ]
    )


def write_images(root: Path, count: int, height: int, width: int) -> None:
    """Write generated pairs: JPEGs as detailed as photographs, and PNG masks."""
    for name in ("Imgs", "GT"):
        (root / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        image, mask = toy_pair(0, index, size=192, difficulty=0.5)
        large = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        large += generator.integers(-12, 13, large.shape, dtype=np.int16)
        pixels = np.clip(large, 0, 255).astype(np.uint8)
        cv2.imwrite(str(root / "Imgs" / f"{index:04d}.jpg"), pixels[..., ::-1])
        grown = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(root / "GT" / f"{index:04d}.png"), grown)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit OpenCV and torch to one thread: stages are compared per core."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


def _bytes_of(path: Path) -> npt.NDArray[np.uint8]:
    return np.fromfile(path, np.uint8)


def _pil(path: Path, mode: str) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert(mode))
