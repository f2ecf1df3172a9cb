"""Copies are found by content, however the file was changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.doctor import copies as duplicates
from camoxpert.doctor.copies import (
    COPY,
    Fingerprint,
    candidates,
    find_copies,
    fingerprint,
    fingerprints,
    similarity,
)
from camoxpert.synthesis.toy import toy_pair

SHARED = Path(__file__).parents[3] / "shared" / "data"


def picture(index: int, size: int = 128) -> np.ndarray:
    return toy_pair(11, index, size=size, difficulty=0.6)[0]


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)


def crop(image: np.ndarray, top: float, left: float, height: float, width: float) -> np.ndarray:
    h, w = image.shape[:2]
    y, x = round(top * (1 - height) * h), round(left * (1 - width) * w)
    return np.ascontiguousarray(image[y : y + round(height * h), x : x + round(width * w)])


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "re-encoded": lambda image: jpeg(image, 40),
    "smaller": lambda image: jpeg(cv2.resize(image, None, fx=0.5, fy=0.5), 85),
    "larger": lambda image: jpeg(cv2.resize(image, None, fx=1.5, fy=1.5), 85),
    "squeezed": lambda image: cv2.resize(image, (96, 160)),
    "darker": lambda image: (image * 0.6 + 10).astype(np.uint8),
    "corner": lambda image: jpeg(crop(image, 0.0, 1.0, 0.82, 0.82), 85),
    "middle": lambda image: jpeg(crop(image, 0.5, 0.4, 0.9, 0.9), 85),
    "narrow": lambda image: cv2.resize(crop(image, 0.3, 0.7, 0.82, 1.0), (128, 128)),
    "mirrored": lambda image: jpeg(image[:, ::-1].copy(), 80),
    "upside down": lambda image: jpeg(image[::-1].copy(), 80),
    "turned": lambda image: image[::-1, ::-1].copy(),
    "mirrored and cropped": lambda image: crop(image[:, ::-1], 1.0, 0.2, 0.88, 0.88),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_copy_is_found_among_others(change) -> None:
    images = [picture(index) for index in range(40)]
    images += [CHANGES[change](images[index]) for index in range(10)]
    found = find_copies([fingerprint(image) for image in images])
    pairs = {(match.a, match.b) for match in found}
    assert len(pairs & {(index, 40 + index) for index in range(10)}) >= 9
    assert not {pair for pair in pairs if pair[1] < 40}, "no false pair among the originals"
    assert all(COPY <= match.similarity <= 1.001 for match in found)


def test_what_was_done_is_said() -> None:
    images = [picture(index) for index in range(12)]
    images += [
        images[0][:, ::-1].copy(),
        crop(images[1], 0.5, 0.5, 0.85, 0.85),
        jpeg(images[2], 50),
    ]
    how = {m.a: m.how for m in find_copies([fingerprint(i) for i in images])}
    assert how[0] == "flipped left-right"
    assert how[1].startswith("cropped to 7")
    assert how[2] == "re-encoded or resized"


def test_light_and_contrast_do_not_count_and_structure_does() -> None:
    a = fingerprint(picture(1))
    assert similarity(a, fingerprint((picture(1) * 0.5).astype(np.uint8)), 0)[0] > 0.9
    assert similarity(a, fingerprint(picture(2)), 0)[0] < 0.5
    flat = fingerprint(np.full((64, 64, 3), 90, np.uint8))
    assert similarity(flat, fingerprint(np.full((64, 64, 3), 200, np.uint8)), 0)[0] < COPY


def test_few_pictures() -> None:
    assert find_copies([]) == []
    assert find_copies([fingerprint(picture(0))]) == []
    assert find_copies([None, fingerprint(picture(0)), None]) == []
    both = [fingerprint(picture(0)), None, fingerprint(picture(0))]
    assert [(m.a, m.b) for m in find_copies(both)] == [(0, 2)]
    assert candidates([]) == []


def test_unreadable_files_are_left_out(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    (tmp_path / "b.png").write_bytes(b"")
    prints = fingerprints([tmp_path / "a.png", tmp_path / "b.png"])
    assert isinstance(prints[0], Fingerprint) and prints[1] is None


def test_memory_stays_bounded(monkeypatch) -> None:
    """The product of all pictures with all windows is computed in parts, with the same result."""
    monkeypatch.setattr(duplicates, "LIKELY", -1.0)
    prints = [fingerprint(picture(index, size=48)) for index in range(12)]
    whole = candidates(prints)
    assert len(whole) >= 12
    monkeypatch.setattr(duplicates, "PRODUCT_SIZE", 19 * 12 * 5)
    assert set(candidates(prints)) == set(whole)


def test_unlikely_pictures_are_not_compared(monkeypatch) -> None:
    """The number of comparisons follows the number of look-alikes, not that of pictures."""
    compared = []
    honest = similarity
    monkeypatch.setattr(
        duplicates, "similarity", lambda *words: compared.append(1) or honest(*words)
    )
    images = [picture(index) for index in range(60)]
    prints = [fingerprint(image) for image in [*images, jpeg(images[7], 50)]]
    assert [(match.a, match.b) for match in find_copies(prints)] == [(7, 60)]
    assert len(compared) < 20
    compared.clear()
    monkeypatch.setattr(duplicates, "LIKELY", -1.0)
    find_copies(prints)
    assert len(compared) > 400, "the control: two for every picture and flip"


@pytest.mark.skipif(not SHARED.exists(), reason="the shared images are missing")
def test_real_and_generated_images_with_planted_copies() -> None:
    """At least 95 % of the planted copies, at most one false pair in 1 000 images."""
    generator = np.random.default_rng(0)
    files = sorted(SHARED.glob("*/**/Imgs/*.jpg")) + sorted(SHARED.glob("textures/*.jpg"))
    files = files[::4]
    images = [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]
    images += [picture(index) for index in range(500 - len(images))]
    planted = {}
    for number, source in enumerate(generator.permutation(len(images))[:60].tolist()):
        change = list(CHANGES.values())[number % len(CHANGES)]
        planted[source] = len(images)
        images.append(change(images[source]))
    found = find_copies([fingerprint(image) for image in images])
    pairs = {(match.a, match.b) for match in found}
    expected = set(planted.items())
    assert len(pairs & expected) >= 0.95 * len(expected)
    # The steel set has one true pair of copies within its training images, one across the split.
    assert len({pair for pair in pairs - expected if pair[1] < 500}) <= 1
