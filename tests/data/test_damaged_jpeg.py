"""A JPEG that is damaged in its middle, with an intact end marker, is an error that names it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from camoxpert.config import build_config
from camoxpert.data.cache.build import open_cache
from camoxpert.data.files import jpeg
from camoxpert.data.files.image_io import read_image, read_mask, read_pair
from camoxpert.data.files.manifest import Search, load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.inspect import inspect_pair
from camoxpert.errors import DataError

Damage = Callable[[bytes], bytes]
needs_warnings = pytest.mark.skipif(
    not jpeg.hears_warnings(), reason="simplejpeg, which hears libjpeg's warnings, is not installed"
)


def photo(side: int = 96) -> np.ndarray:
    noise = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture: np.ndarray = cv2.GaussianBlur(noise, (0, 0), 1.5)
    return picture


def encoded(picture: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


def hole(filling: bytes) -> Damage:
    def damage(data: bytes) -> bytes:
        start = len(data) // 2
        return data[:start] + filling + data[start + len(filling) :]

    return damage


def zero_tail(data: bytes) -> bytes:
    """An interrupted download into a file of the full size."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2 - 2) + data[-2:]


def without_last_scans(data: bytes) -> bytes:
    """A progressive file that ends between two scans."""
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    return data[: starts[len(starts) // 2]] + data[-2:]


RANDOM = np.random.default_rng(5).integers(0, 256, 400, dtype=np.uint8).tobytes()
BY_STRUCTURE: dict[str, tuple[dict[str, object], Damage]] = {
    "zeros to the end": ({}, zero_tail),
    "zeros": ({}, hole(bytes(200))),
    "ones": ({}, hole(b"\xff" * 200)),
    "zeros, fitted tables": ({"optimize": True}, hole(bytes(200))),
    "missing scans": ({"progressive": True}, without_last_scans),
}
BY_WARNING: dict[str, tuple[dict[str, object], Damage]] = {
    "random bytes": ({}, hole(RANDOM)),
    "random bytes, progressive": ({"progressive": True}, hole(RANDOM)),
    "zeros to the end, progressive": ({"progressive": True}, zero_tail),
    "a missing stretch": ({}, lambda data: data[:2000] + data[2300:]),
}
KINDS = [*BY_STRUCTURE, *(pytest.param(kind, marks=needs_warnings) for kind in BY_WARNING)]


def damaged(path: Path, kind: str) -> Path:
    options, damage = (BY_STRUCTURE | BY_WARNING)[kind]
    data = damage(encoded(photo(), **options))
    assert data.endswith(jpeg.END)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_for_every_reader(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path / "i.jpg", kind)
    Image.fromarray(np.eye(96, dtype=np.uint8) * 255).save(tmp_path / "m.png")
    readers: list[Callable[[], object]] = [
        lambda: read_image(path),
        lambda: read_image(path, at_least=32),
        lambda: read_image(path, strict=True),
        lambda: read_mask(path),
        lambda: read_pair(path, tmp_path / "m.png"),
    ]
    for read in readers:
        with pytest.raises(DataError, match=r"i\.jpg is damaged or cut short"):
            read()
    facts = inspect_pair(Pair("i", path, tmp_path / "m.png", "d", ""), "all")
    assert len(facts.faults) == 1 and "i.jpg is damaged" in facts.faults[0]


@pytest.mark.parametrize("kind", ["zeros", "missing scans"])
def test_the_decoders_alone_are_content(tmp_path: Path, kind: str) -> None:
    """The reason for the check; the picture that they give is wrong."""
    path = damaged(tmp_path / "i.jpg", kind)
    sound = np.asarray(Image.open(io.BytesIO(encoded(photo(), **BY_STRUCTURE[kind][0]))))
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    with Image.open(path) as image:
        image.load()
    assert np.abs(pixels.astype(int) - sound).max() > 16


@pytest.mark.parametrize("kind", BY_STRUCTURE)
def test_holes_are_found_without_simplejpeg(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    with pytest.raises(DataError, match="damaged"):
        read_image(damaged(tmp_path / "i.jpg", kind))


SOUND: dict[str, tuple[np.ndarray, dict[str, object]]] = {
    "plain": (photo(), {}),
    "grey": (photo()[..., 0], {}),
    "progressive": (photo(), {"progressive": True}),
    "grey, progressive": (photo()[..., 0], {"progressive": True}),
    "fitted tables": (photo(), {"optimize": True}),
    "restart markers": (photo(), {"restart_marker_rows": 1}),
    "full colour": (photo(), {"subsampling": 0}),
    "black": (np.zeros((400, 400, 3), np.uint8), {}),
    "black, fitted tables": (np.zeros((800, 800), np.uint8), {"optimize": True}),
    "black, progressive": (np.zeros((800, 800), np.uint8), {"progressive": True}),
    "a mask": (np.pad(np.full((200, 200), 255, np.uint8), 300), {"optimize": True}),
    "one pixel": (photo()[:1, :1], {}),
    "odd": (photo()[:31, :17], {}),
}


@pytest.mark.parametrize("kind", SOUND)
@pytest.mark.parametrize("at_least", [None, 8])
def test_sound_files_give_the_pixels_of_opencv(
    tmp_path: Path, kind: str, at_least: int | None
) -> None:
    picture, options = SOUND[kind]
    path = tmp_path / "i.jpg"
    path.write_bytes(encoded(picture, **options))
    ours = read_image(path, at_least=at_least)
    reduction = 1
    if at_least is not None:
        allowed = (n for n in (2, 4, 8) if min(picture.shape[:2]) // n >= at_least)
        reduction = max(allowed, default=1)
    flags = cv2.IMREAD_COLOR_RGB | jpeg.REDUCED[reduction]
    theirs = cv2.imdecode(np.fromfile(path, np.uint8), flags)
    assert np.array_equal(ours, theirs)
    assert read_image(path, strict=True).shape[:2] == picture.shape[:2]


def test_zeros_elsewhere_are_no_hole(tmp_path: Path) -> None:
    """In a comment, behind the end marker, and as padding before it."""
    data = encoded(photo(), comment=bytes(300))
    path = tmp_path / "i.jpg"
    for variant in (data, data + bytes(300), data + bytes(300) + jpeg.END):
        path.write_bytes(variant)
        assert read_image(path).shape == (96, 96, 3)
    path.write_bytes(data[:-2] + bytes(4) + data[-2:])
    assert read_image(path).shape == (96, 96, 3)


def test_turned_and_cmyk_files_are_checked(tmp_path: Path) -> None:
    """Pillow decodes these."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "i.jpg"
    cmyk = io.BytesIO()
    Image.fromarray(photo()).convert("CMYK").save(cmyk, "JPEG")
    for data in (encoded(photo(), exif=exif.tobytes()), cmyk.getvalue()):
        path.write_bytes(data)
        read_image(path)
        path.write_bytes(zero_tail(data))
        with pytest.raises(DataError, match="damaged"):
            read_image(path)


def test_the_cache_names_a_damaged_file(tmp_path: Path) -> None:
    for folder in ("Imgs", "GT"):
        (tmp_path / "d" / folder).mkdir(parents=True)
    for name in "abc":
        (tmp_path / "d" / "Imgs" / f"{name}.jpg").write_bytes(encoded(photo()))
        Image.fromarray(np.eye(96, dtype=np.uint8) * 255).save(tmp_path / "d/GT" / f"{name}.png")
    damaged(tmp_path / "d" / "Imgs" / "b.jpg", "zeros to the end")
    data = build_config({"data.img_size": 64}).data
    with pytest.raises(DataError, match=r"1 files cannot be decoded:\n.*b\.jpg is damaged"):
        open_cache(load_train([str(tmp_path / "d")], Search()), data, mode="ram")


def test_any_damage_ends_in_a_data_error(tmp_path: Path) -> None:
    """Markers at the end of a file, tables cut short: the checks of the structure do not crash."""
    generator = np.random.default_rng(0)
    sound = [encoded(photo(), **options) for options in ({}, {"progressive": True})]
    path = tmp_path / "a.jpg"
    refused = 0
    for number in range(400):
        data = bytearray(sound[number // 4 % 2])
        place = int(generator.integers(2, len(data)))
        if number % 4 == 0:
            data[place:] = b"\xff\xda\xff\xd9"
        elif number % 4 == 1:
            data[place:] = b"\xff\xd9"
        elif number % 4 == 2:
            data[int(generator.integers(2, 200))] = int(generator.choice([0, 255, 0xDA, 0xC4]))
        else:
            del data[place : place + int(generator.integers(1, 60))]
        path.write_bytes(bytes(data))
        try:
            read_image(path)
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 200, "most are refused, and nothing else is raised"


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_a_sound_cmyk_file_is_read_whatever_its_subsampling(
    tmp_path: Path, subsampling: int
) -> None:
    """simplejpeg cannot name that of these files, which says nothing about their pixels."""
    picture = Image.fromarray(photo()).convert("CMYK")
    picture.save(tmp_path / "a.jpg", quality=92, subsampling=subsampling)
    found = read_image(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.abs(found.astype(int) - expected).max() <= 1
