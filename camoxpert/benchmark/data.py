"""``benchmark data``: how fast samples come, ours against the loader every repository has, by
stage.

The baseline is the plain Dataset: decode image and mask of every sample in every epoch, resize,
albumentations' Compose, worker processes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from camoxpert.benchmark.common import heading, interleaved, milliseconds, paired_ratio
from camoxpert.benchmark.moe import device_name
from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.console import bar
from camoxpert.data.cache.build import open_cache
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.image_io import probe, read_image, read_mask, read_pair
from camoxpert.data.files.manifest import Manifest, load_train
from camoxpert.data.loader import Batches, LoaderPlan, build_loader, finish
from camoxpert.data.samples.augment import SampleTransform, resize_pair, square_pair
from camoxpert.data.supervise import start_worker
from camoxpert.synthesis.toy import toy_pair

# Times that an epoch of the loaders goes through the files: a short one would time its start.
REPEATS = 3
# As strong as the defaults, so that both sides do the same work.
AUGMENT = AugmentConfig()


def run(
    *,
    device: torch.device,
    images: int = 96,
    height: int = 768,
    width: int = 1024,
    img_size: int = 352,
    batch_size: int = 16,
    num_workers: int = 2,
    rounds: int = 7,
    needed: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure loaders and stages on generated JPEGs; return the content of the JSON file.

    Args:
        device: where device augmentation runs.
        images: files in the generated set.
        height, width: their size.
        img_size, batch_size, num_workers: as for training; the baseline has at least one worker.
        rounds: timed epochs of each loader, in turns.
        needed: images per second that a measured training step takes; None leaves it out.
        say: prints a line.
    """
    settings = {
        "images": images,
        "size": f"{width}x{height}",
        "img_size": img_size,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "rounds": rounds,
        "device": device_name(device),
    }
    result = heading("data", settings)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "data", images, height, width)
        manifest = load_train([root / "data"])
        data = DataConfig(img_size=img_size, augment=AUGMENT, cache_dir=str(root / "cache"))
        cache = open_cache(manifest, data, mode="disk")
        stages = measure_stages(manifest, cache, img_size, batch_size, device, rounds)
        result["milliseconds_per_image"] = stages
        say(
            f"{images} JPEGs of {width}x{height}, {img_size} px, milliseconds per image, one "
            f"process:"
        )
        for name, value in stages.items():
            say(f"  {name:<42}{value:8.3f}")
        rates = measure_loaders(
            manifest, cache, img_size, batch_size, num_workers, device, rounds, say
        )
    result |= rates
    if needed is not None:
        result["needed_images_per_second"] = needed
        say(f"the training step takes {needed:.0f} images/s:")
        for name, rate in rates["images_per_second"].items():
            say(f"  {name:<42}{rate / needed:8.2f} times as many")
    return result


def measure_loaders(
    manifest: Manifest,
    cache: PixelCache,
    img_size: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time whole epochs of every loader in turns."""
    manifest = replace(manifest, pairs=manifest.pairs * REPEATS)
    data = DataConfig(img_size=img_size, augment=AUGMENT)
    workers = max(1, num_workers)

    def ours(cache: PixelCache | None, workers: int, *, on_device: bool = False) -> Batches:
        return build_loader(
            manifest,
            data,
            LoaderPlan(workers, 2, cache, on_device, pin_memory=device.type == "cuda"),
            batch_size=batch_size,
            seed=0,
        )

    def epoch(loader: Batches, *, finished: bool) -> Callable[[], None]:
        def iterate() -> None:
            loader.set_epoch(0)
            for batch in loader:
                if finished:
                    finish(loader, batch, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return iterate

    def plain(decoder: str) -> Callable[[], None]:
        loader = DataLoader(
            PlainDataset(manifest, img_size, decoder),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            persistent_workers=True,
            worker_init_fn=lambda worker: start_worker(worker),
        )

        def iterate() -> None:
            for _ in loader:
                pass

        return iterate

    loaders = {
        f"ours, files, {workers} workers": ours(None, workers),
        f"ours, cache, {workers} workers": ours(cache, workers),
        "ours, cache, no worker": ours(cache, 0),
        "ours, cache, batch reads": ours(cache, 0, on_device=True),
    }
    variants = {
        f"plain PIL, {workers} workers": plain("PIL"),
        f"plain OpenCV, {workers} workers": plain("OpenCV"),
    }
    variants |= {name: epoch(loader, finished=False) for name, loader in loaders.items()}
    variants["ours, cache, changed on the device"] = epoch(
        loaders["ours, cache, batch reads"], finished=True
    )
    with bar(None, description="loaders", total=rounds) as progress:
        seconds = interleaved(variants, rounds=rounds, done=progress.update)
    for loader in loaders.values():
        loader.close()
    count = len(manifest)
    first = next(iter(variants))
    rates = {name: 1e3 * count / milliseconds(taken) for name, taken in seconds.items()}
    ratios = {name: paired_ratio(seconds[first], taken) for name, taken in seconds.items()}
    say(f"{'loader':<42}{'images/s':>10}{'over the first (quartiles)':>32}")
    for name, rate in rates.items():
        ratio = ratios[name]
        shown = f"{ratio['ratio']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f})"
        say(f"  {name:<42}{rate:8.0f}{shown:>32}")
    return {"images_per_second": rates, "over_plain_pil": ratios}


def measure_stages(
    manifest: Manifest,
    cache: PixelCache,
    img_size: int,
    batch_size: int,
    device: torch.device,
    rounds: int,
) -> dict[str, float]:
    """Return the milliseconds per image of every stage, in one process and one thread."""
    pairs = manifest.pairs[: min(batch_size, len(manifest))]
    decoded = [read_pair(pair.image, pair.mask) for pair in pairs]
    squares = np.stack([square_pair(image, mask, img_size) for image, mask in decoded])
    transform = SampleTransform(img_size=img_size, augment=AUGMENT, seed=0)
    compose = plain_pipeline()
    loader = build_loader(
        manifest,
        DataConfig(img_size=img_size, augment=AUGMENT),
        LoaderPlan(cache=cache, on_device=True),
        batch_size=len(pairs),
        seed=0,
    )
    keys = [(0, index, img_size) for index in range(len(pairs))]
    raw = loader.read(keys)  # type: ignore[union-attr]

    def on_device() -> None:
        finish(loader, raw, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

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
        "read a batch from the cache": lambda: loader.read(keys),  # type: ignore[union-attr]
        f"change a batch on {device.type} (ours)": on_device,
    }
    with one_thread():
        seconds = interleaved(stages, rounds=rounds)
    return {name: milliseconds(taken) / len(pairs) for name, taken in seconds.items()}


class PlainDataset(Dataset[Any]):
    """What every repository has: decode, resize, albumentations' Compose, for every sample anew."""

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
            image = np.asarray(cv2.imread(str(pair.image)))[..., ::-1]
            mask = np.asarray(cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE))
        image, mask = resize_pair(image, mask, self.img_size)
        if self.compose is None:
            self.compose = plain_pipeline()
        changed = self.compose(image=image, mask=mask)
        pixels = torch.from_numpy(np.ascontiguousarray(changed["image"].transpose(2, 0, 1)))
        return pixels, torch.from_numpy(changed["mask"])[None]


def plain_pipeline() -> Any:
    """Return albumentations' Compose with the strengths of AUGMENT, as its documentation writes
    it."""
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
    """Write generated pairs: JPEGs with the detail of photographs, and PNG masks."""
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
    """Keep OpenCV and torch to one thread: stages are compared per core."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


def _pil(path: Path, mode: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert(mode))
