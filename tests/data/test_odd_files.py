"""Broken and odd files: each is named, none silently kills a worker or becomes an empty mask."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from camoxpert.config import AugmentConfig, DataConfig
from camoxpert.data.files.manifest import load_train
from camoxpert.data.loader import LoaderPlan, build_loader
from camoxpert.doctor.inspect import inspect_pair
from camoxpert.errors import DataError
from camoxpert.synthesis.toy import generate_toy

SIZE = 48
TRUTH = np.zeros((SIZE, SIZE), np.uint8)
TRUTH[10:30, 14:40] = 255
PHOTO = (
    np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
)

Write = Callable[[Path, Path], tuple[Path, Path]]


def image_as(save: Callable[[Path], object], suffix: str = ".jpg") -> Write:
    def write(image: Path, mask: Path) -> tuple[Path, Path]:
        path = image.with_suffix(suffix)
        save(path)
        Image.fromarray(TRUTH).save(mask)
        return path, mask

    return write


def mask_as(save: Callable[[Path], object], suffix: str = ".png") -> Write:
    def write(image: Path, mask: Path) -> tuple[Path, Path]:
        path = mask.with_suffix(suffix)
        Image.fromarray(PHOTO).save(image)
        save(path)
        return image, path

    return write


def cut(share: float, *, png: bool = False) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        Image.fromarray(PHOTO).save(path, format="PNG" if png else "JPEG")
        data = path.read_bytes()
        path.write_bytes(data[: round(len(data) * share)])

    return save


def bad_checksum(path: Path) -> None:
    Image.fromarray(PHOTO).save(path)
    data = bytearray(path.read_bytes())
    where = data.index(b"IDAT")
    data[where + 12] ^= 0xFF
    path.write_bytes(data)


def bomb(path: Path) -> None:
    """Write a small file whose header says 20 000 x 20 000 pixels."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    pixels = b"IDAT" + zlib.compress(b"\0" * 1000)
    body += struct.pack(">I", len(pixels) - 4) + pixels + struct.pack(">I", zlib.crc32(pixels))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def palette_mask(path: Path) -> None:
    picture = Image.fromarray((TRUTH > 0).astype(np.uint8), mode="P")
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(path)


def alpha_mask(path: Path) -> None:
    Image.fromarray(np.dstack([np.zeros((SIZE, SIZE, 3), np.uint8), TRUTH])).save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(PHOTO[::-1, ::-1].copy()).save(path, exif=exif)


FAULTS: dict[str, tuple[Write, str]] = {
    "image cut in the middle": (image_as(cut(0.5)), "cut short|damaged|Truncated"),
    "image cut near its end": (image_as(cut(0.95)), "cut short|damaged"),
    "PNG cut in the middle": (image_as(cut(0.5, png=True), ".png"), "cut short|damaged"),
    "PNG with a wrong checksum": (image_as(bad_checksum, ".png"), "damaged|cannot be read"),
    "empty file": (image_as(lambda p: p.write_bytes(b"")), r"empty \(0 bytes\)"),
    "web page named .jpg": (image_as(lambda p: p.write_text("<!DOCTYPE html>")), "a web page"),
    "text named .jpg": (image_as(lambda p: p.write_text("hello")), "not an image"),
    "decompression bomb": (image_as(bomb, ".png"), "more than the limit"),
    "image of another size": (
        image_as(lambda p: Image.fromarray(PHOTO[:40]).save(p)), "must have the size of its image",
    ),
    "mask off by one": (
        mask_as(lambda p: Image.fromarray(TRUTH[1:]).save(p)), "must have the size of its image",
    ),
    "transposed pair": (
        mask_as(lambda p: Image.fromarray(TRUTH[:, :30].copy()).save(p)), "must have the size",
    ),
    "photograph as mask": (
        mask_as(lambda p: Image.fromarray(np.tile(np.arange(SIZE, dtype=np.uint8) * 5, (SIZE, 1)))
                .save(p)), "not a binary mask",
    ),
    "mask cut in the middle": (mask_as(cut(0.4, png=True)), "cut short|damaged"),
    "label map": (
        mask_as(lambda p: Image.fromarray(np.where(TRUTH > 0, 90, 30).astype(np.uint8)).save(p)),
        "background must be 0",
    ),
    "mask that is a web page": (mask_as(lambda p: p.write_text("<html>")), "a web page"),
}  # fmt: skip

READ: dict[str, Write] = {
    "grey image": image_as(lambda p: Image.fromarray(PHOTO[..., 0].copy()).save(p)),
    "CMYK image": image_as(lambda p: Image.fromarray(PHOTO).convert("CMYK").save(p)),
    "progressive JPEG": image_as(lambda p: Image.fromarray(PHOTO).save(p, progressive=True)),
    "transparent image": image_as(lambda p: Image.fromarray(PHOTO).convert("RGBA").save(p), ".png"),
    "palette image": image_as(lambda p: Image.fromarray(PHOTO).quantize(32).save(p), ".png"),
    "16-bit image": image_as(
        lambda p: Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257).save(p), ".png"
    ),
    "1-bit image": image_as(lambda p: Image.fromarray(PHOTO[..., 0] > 127).save(p), ".png"),
    "PNG named .jpg": image_as(lambda p: Image.fromarray(PHOTO).save(p, format="PNG")),
    "image turned by EXIF": image_as(turned),
    "0/1 mask": mask_as(lambda p: Image.fromarray(TRUTH // 255).save(p)),
    "1-bit mask": mask_as(lambda p: Image.fromarray(TRUTH > 0).save(p)),
    "16-bit mask of 0 and 255": mask_as(lambda p: Image.fromarray(TRUTH.astype(np.uint16)).save(p)),
    "palette mask": mask_as(palette_mask),
    "mask in alpha only": mask_as(alpha_mask),
    "colour mask": mask_as(lambda p: Image.fromarray(np.dstack([TRUTH] * 3)).save(p)),
    "JPEG mask": mask_as(lambda p: Image.fromarray(TRUTH).save(p, quality=90), ".jpg"),
    "blurred outline": mask_as(
        lambda p: Image.fromarray(cv2.GaussianBlur(TRUTH, (3, 3), 0)).save(p)
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain data set of three good pairs; tests add an odd one."""
    generate_toy(tmp_path / "toy", num_train=3, num_test=0, size=SIZE, seed=0)
    (tmp_path / "toy" / "TrainDataset").rename(tmp_path / "data")
    return tmp_path / "data"


def add(folder: Path, write: Write) -> tuple[Path, Path]:
    return write(folder / "Imgs" / "odd.jpg", folder / "GT" / "odd.png")


def batches(folder: Path, workers: int) -> dict[str, np.ndarray]:
    augment = AugmentConfig(hflip=0, rotate=0, scale=0, translate=0)
    loader = build_loader(
        load_train([folder]),
        DataConfig(img_size=SIZE, augment=augment, max_pixels=10**6),
        LoaderPlan(workers),
        batch_size=2,
        seed=0,
    )
    try:
        loader.set_epoch(0)
        return {
            name: mask.numpy()[0]
            for batch in loader
            for name, mask in zip(batch.names, batch.masks, strict=True)
        }
    finally:
        loader.close()


def test_there_are_at_least_25_kinds() -> None:
    assert len(FAULTS) + len(READ) >= 25


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_file_is_named(folder: Path, kind) -> None:
    write, words = FAULTS[kind]
    image, mask = add(folder, write)
    culprit = mask if write.__qualname__.startswith("mask_as") else image
    pair = next(p for p in load_train([folder]).pairs if p.name == "odd")
    facts = inspect_pair(pair, "train", max_pixels=10**6)
    assert len(facts.faults) >= 1
    with pytest.raises(DataError, match=words) as caught:
        batches(folder, 0)
    assert "odd" in str(caught.value) and culprit.parent.name in str(caught.value)


@pytest.mark.parametrize("kind", ["image cut in the middle", "photograph as mask", "empty file"])
def test_a_worker_hands_the_fault_over(folder: Path, kind) -> None:
    write, words = FAULTS[kind]
    add(folder, write)
    with pytest.raises(DataError, match=words) as caught:
        batches(folder, 1)
    assert "odd" in str(caught.value) and "worker died" not in str(caught.value)


@pytest.mark.parametrize("kind", READ)
def test_an_odd_file_is_read_for_what_it_is(folder: Path, kind) -> None:
    add(folder, READ[kind])
    pair = next(p for p in load_train([folder]).pairs if p.name == "odd")
    facts = inspect_pair(pair, "train", max_pixels=10**6)
    assert not facts.faults and facts.size == (SIZE, SIZE)
    mask = batches(folder, 0)["odd"]
    assert (mask != TRUTH).mean() < 0.03, "the object is where it was drawn"
    assert mask.any()


def test_encodings_are_told_apart(folder: Path) -> None:
    found = {}
    for kind in READ:
        if "mask" in kind or "outline" in kind:
            for path in (*folder.glob("*/odd.*"),):
                path.unlink()
            add(folder, READ[kind])
            pair = next(p for p in load_train([folder]).pairs if p.name == "odd")
            found[kind] = inspect_pair(pair, "train").encoding
    assert found == {
        "0/1 mask": "0/1",
        "1-bit mask": "1-bit",
        "16-bit mask of 0 and 255": "16-bit",
        "palette mask": "palette",
        "mask in alpha only": "alpha",
        "colour mask": "0/255 in colour",
        "JPEG mask": "JPEG",
        "blurred outline": "grey outline",
    }
