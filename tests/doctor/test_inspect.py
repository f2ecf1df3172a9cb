"""What the doctor says of one pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camoxpert.data.files.image_io import MAX_PIXELS, write_png
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.inspect import inspect_pair

TALL, SQUARE = (40, 30), (32, 32)


@pytest.mark.parametrize(
    ("size", "orientation", "mask_size", "words"),
    [
        (TALL, 6, (30, 40), "turned by EXIF, as the mask was drawn"),
        (TALL, 6, TALL, "EXIF ignored: the mask fits the stored pixels"),
        (TALL, 3, TALL, "the sizes cannot tell whether the mask was drawn on it so"),
        (SQUARE, 6, SQUARE, "the sizes cannot tell whether the mask was drawn on it so"),
        (TALL, 1, TALL, ""),
    ],
)
def test_what_exif_does_to_a_pair(
    tmp_path: Path, size: tuple[int, int], orientation: int, mask_size: tuple[int, int], words: str
) -> None:
    """ "Both turned" would be wrong: the mask has no tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", exif=exif)
    mask = np.zeros(mask_size, np.uint8)
    mask[4:12, 4:12] = 255
    write_png(tmp_path / "a.png", mask)
    pair = Pair("a", tmp_path / "a.jpg", tmp_path / "a.png", "d", "")
    facts = inspect_pair(pair, "train", max_pixels=MAX_PIXELS)
    assert not facts.faults
    told = [text for text in facts.oddities if "EXIF" in text]
    assert (words in told[0] if words else not told) and len(told) == bool(words)
