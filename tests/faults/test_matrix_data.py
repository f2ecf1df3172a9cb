"""Unusual files and names: the documented pixels, the right mask or an error with the reason."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from camoxpert.cli import main
from camoxpert.config import DataConfig
from camoxpert.data.files.headers import require_readable
from camoxpert.data.files.image_io import TURNS, probe, read_image, read_mask, read_pair
from camoxpert.data.files.manifest import load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.data.loader import build_loader
from camoxpert.doctor.inspect import inspect_pair
from camoxpert.errors import DataError

HEIGHT, WIDTH = 24, 40
# Dark: a mid-grey picture would look similar when inverted.
PHOTO = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 128, (HEIGHT, WIDTH, 3), dtype=np.uint8), (0, 0), 1
)
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
# Without symmetry: any rotation gives a different picture.
OBJECT = np.zeros((HEIGHT, WIDTH), bool)
OBJECT[3:9, 5:30] = OBJECT[9:20, 5:11] = True
MASK = OBJECT.astype(np.uint8) * 255


def grey3(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, 2).astype(np.uint8)


def with_alpha() -> Image.Image:
    alpha = np.where(OBJECT, 0, 200).astype(np.uint8)
    return Image.fromarray(np.dstack([PHOTO, alpha]))


def animation(path: Path) -> None:
    """Write two pictures, of which the first counts. Named .png: the content decides."""
    first = Image.fromarray(PHOTO).quantize(64)
    first.save(path, format="GIF", save_all=True, append_images=[Image.new("P", first.size)])


QUANTISED = np.asarray(Image.fromarray(PHOTO).quantize(64).convert("RGB"))
# Kind -> (how it is written, the pixels it holds, the largest difference its format allows).
IMAGES: dict[str, tuple[Callable[[Path], object], np.ndarray, int]] = {
    "colour": (lambda p: Image.fromarray(PHOTO).save(p), PHOTO, 0),
    "grey": (lambda p: Image.fromarray(GREY).save(p), grey3(GREY), 0),
    "transparent": (lambda p: with_alpha().save(p), PHOTO, 0),
    "grey with alpha": (lambda p: with_alpha().convert("LA").save(p), grey3(GREY), 0),
    "palette": (lambda p: Image.fromarray(PHOTO).quantize(64).save(p), QUANTISED, 0),
    "16-bit grey": (
        lambda p: Image.fromarray(GREY.astype(np.uint16) * 257).save(p), grey3(GREY), 0),
    "16-bit colour": (
        lambda p: cv2.imwrite(str(p), PHOTO[..., ::-1].astype(np.uint16) * 257), PHOTO, 0),
    "1-bit": (lambda p: Image.fromarray(OBJECT).save(p), grey3(MASK), 0),
    "progressive JPEG named .png": (
        lambda p: Image.fromarray(PHOTO).save(
            p, format="JPEG", quality=98, subsampling=0, progressive=True),
        PHOTO, 16),
    "CMYK": (
        lambda p: Image.fromarray(PHOTO).convert("CMYK").save(
            p, format="JPEG", quality=98, subsampling=0),
        PHOTO, 16),
    "animation": (animation, QUANTISED, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMAGES)
def test_the_pixels_are_those_of_the_rule(kind: str, tmp_path: Path) -> None:
    write, expected, excused = IMAGES[kind]
    write(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= excused
    # Control: neither inverted nor with swapped channels.
    assert np.abs(255 - got.astype(int) - expected).mean() > 20
    if kind in ("colour", "CMYK", "16-bit colour"):
        assert np.abs(got[..., ::-1].astype(int) - expected).mean() > 4


def stored_for(upright: np.ndarray, orientation: int) -> Image.Image:
    """Return the pixels that a camera would store with this tag."""
    picture = Image.fromarray(upright)
    if orientation == 1:
        return picture
    back = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270}
    back |= {turn: start for start, turn in back.items()}
    turn = TURNS[orientation]
    return picture.transpose(back.get(turn, turn))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_every_exif_orientation_lands_under_its_mask(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"i{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = np.where(OBJECT[..., None], PHOTO // 4 + 180, PHOTO // 4).astype(np.uint8)
    options = {"tiffinfo": {0x0112: orientation}} if suffix == ".tif" else {"exif": exif}
    stored_for(photo, orientation).save(
        path, **options, **({"quality": 98} if suffix == ".jpg" else {})
    )
    excused = 30 if suffix == ".jpg" else 0
    assert np.abs(read_image(path).astype(int) - photo).max() <= excused
    # The mask as a viewer shows the image, and the mask as the camera stored it.
    Image.fromarray(MASK).save(tmp_path / "seen.png")
    image, mask = read_pair(path, tmp_path / "seen.png")
    assert np.array_equal(image.mean(2) > 120, mask > 0)
    if orientation >= 5 and suffix != ".tif":
        stored_for(MASK, orientation).save(tmp_path / "stored.png")
        image, mask = read_pair(path, tmp_path / "stored.png")
        assert image.shape[:2] == (WIDTH, HEIGHT)
        assert np.array_equal(image.mean(2) > 120, mask > 0)
    # Both tagged: both are rotated.
    stored_for(MASK, orientation).save(tmp_path / "tagged.png", exif=exif)
    image, mask = read_pair(path, tmp_path / "tagged.png")
    assert np.array_equal(image.mean(2) > 120, mask > 0)


def two_colours(path: Path) -> None:
    """Write a palette image: entry 0 is the object, entry 1 transparent background."""
    picture = Image.fromarray((~OBJECT).astype(np.uint8), mode="P")
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(path, transparency=1)


MASKS: dict[str, Callable[[Path], object]] = {
    "0 and 1": lambda p: Image.fromarray(OBJECT.astype(np.uint8)).save(p),
    "0 and 255": lambda p: Image.fromarray(MASK).save(p),
    "16 bits, 0 and 1": lambda p: Image.fromarray(OBJECT.astype(np.uint16)).save(p),
    "16 bits, 0 and 255": lambda p: Image.fromarray(MASK.astype(np.uint16)).save(p),
    "16 bits, 0 and 65535": lambda p: Image.fromarray(MASK.astype(np.uint16) * 257).save(p),
    "16-bit colour": lambda p: cv2.imwrite(str(p), grey3(MASK).astype(np.uint16)),
    "32-bit TIFF": lambda p: Image.fromarray(MASK.astype(np.int32)).save(p, format="TIFF"),
    "floating-point TIFF": lambda p: Image.fromarray(MASK / np.float32(255)).save(p, format="TIFF"),
    "palette": two_colours,
    "red on black": lambda p: Image.fromarray(np.dstack([MASK, MASK * 0, MASK * 0])).save(p),
    "alpha only, on black": lambda p: Image.fromarray(np.dstack([grey3(MASK * 0), MASK])).save(p),
    "alpha only, on white": lambda p: Image.fromarray(
        np.dstack([grey3(MASK * 0 + 255), MASK])).save(p),
    "grey with alpha": lambda p: Image.fromarray(np.dstack([MASK * 0, MASK]), mode="LA").save(p),
    "JPEG": lambda p: Image.fromarray(MASK).save(p, format="JPEG", quality=60),
    "1 bit": lambda p: Image.fromarray(OBJECT).save(p),
    "faint labels": lambda p: Image.fromarray(OBJECT.astype(np.uint8) * 3).save(p),
}  # fmt: skip


@pytest.mark.parametrize("inverted", [False, True], ids=["as drawn", "inverted"])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_right_or_refused_and_never_empty_by_accident(
    kind: str, inverted: bool, tmp_path: Path, monkeypatch
) -> None:
    if inverted:
        monkeypatch.setitem(globals(), "OBJECT", ~OBJECT)
        monkeypatch.setitem(globals(), "MASK", 255 - MASK)
    MASKS[kind](tmp_path / "m.png")
    got = read_mask(tmp_path / "m.png") > 0
    assert (got != OBJECT).mean() <= (0.02 if kind == "JPEG" else 0)
    assert 0 < got.mean() < 1


@pytest.mark.parametrize("level", [0, 1, 255])
def test_empty_and_full_masks_are_what_they_are(level: int, tmp_path: Path) -> None:
    Image.fromarray(np.full((5, 6), level, np.uint8)).save(tmp_path / "m.png")
    assert (read_mask(tmp_path / "m.png") == (255 if level else 0)).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with four readable pairs."""
    for name in ("Imgs", "GT"):
        (tmp_path / "d" / name).mkdir(parents=True)
    for index in range(4):
        add(tmp_path / "d", f"p{index}")
    return tmp_path / "d"


def add(folder: Path, name: str, mask_name: str | None = None, mask: np.ndarray = MASK) -> None:
    Image.fromarray(PHOTO).save(folder / "Imgs" / f"{name}.jpg")
    Image.fromarray(mask).save(folder / "GT" / f"{mask_name or name}.png")


@pytest.mark.parametrize(
    "mask",
    [MASK.T, MASK[:-1], MASK[:, :-1], np.pad(MASK, ((0, 1), (0, 0))), MASK[:12, :20]],
    ids=["transposed", "a row short", "a column short", "a row more", "half"],
)
def test_a_mask_of_another_size_is_refused_by_all(folder: Path, mask: np.ndarray) -> None:
    add(folder, "odd", mask=np.ascontiguousarray(mask))
    manifest = load_train([folder])
    with pytest.raises(DataError, match=r"1 of 5 pairs[^$]*odd[^$]*must have the size"):
        require_readable(manifest)
    with pytest.raises(DataError, match="must have the size of its image"):
        read_pair(folder / "Imgs" / "odd.jpg", folder / "GT" / "odd.png")
    odd = next(pair for pair in manifest.pairs if pair.name == "odd")
    assert "must have the size" in inspect_pair(odd, "train").faults[0]


@pytest.mark.parametrize(
    ("image", "mask"),
    [("odd", "odd_mask"), ("odd", "odd "), ("odd.jpg", "odd"), ("é", "e")],
)
def test_names_that_do_not_match_are_counted_and_named(folder: Path, image: str, mask: str) -> None:
    add(folder, image, mask)
    with pytest.raises(DataError, match=r"1 of 5 images have no mask") as caught:
        load_train([folder])
    assert image in str(caught.value) and "1 masks have no image" in str(caught.value)


def test_names_that_match_in_spite_of_their_spelling(folder: Path) -> None:
    accents = unicodedata.normalize("NFD", "käfer")
    add(folder, accents, unicodedata.normalize("NFC", "käfer"))
    add(folder, "with some spaces")
    (folder / "Imgs" / "with some spaces.jpg").rename(folder / "Imgs" / "with some spaces.JPG")
    assert len(load_train([folder])) == 6
    # Case is ignored where that gives every image its mask.
    add(folder, "Odd", "odd")
    manifest = load_train([folder])
    assert len(manifest) == 7 and "case" in " ".join(manifest.notes)


@pytest.mark.parametrize("kind", ["Imgs", "GT"])
def test_two_files_of_one_name_are_refused(folder: Path, kind: str) -> None:
    source = next((folder / kind).glob("p1.*"))
    (folder / kind / f"p1{'.jpg' if kind == 'GT' else '.png'}").write_bytes(source.read_bytes())
    with pytest.raises(DataError, match="have the same name"):
        load_train([folder])
    assert main(["doctor", str(folder), "-o", str(folder.parent / "out"), "--no-copies"]) == 3


SIZES = [(1, 1), (1, 700), (700, 1), (2, 3), (33, 31)]


@pytest.mark.parametrize("size", SIZES)
def test_tiny_and_extreme_pictures_train_and_predict(
    size: tuple[int, int], tiny_run: Path, tmp_path: Path
) -> None:
    mask = np.zeros(size, np.uint8)
    mask[0, 0] = 255
    Image.fromarray(np.full((*size, 3), 120, np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    pair = Pair("i", tmp_path / "i.png", tmp_path / "m.png", "d", "")
    assert inspect_pair(pair, "train").faults == []
    (tmp_path / "d" / "Imgs").mkdir(parents=True)
    (tmp_path / "d" / "GT").mkdir()
    pair.image.rename(tmp_path / "d" / "Imgs" / "i.png")
    pair.mask.rename(tmp_path / "d" / "GT" / "i.png")
    loader = build_loader(
        load_train([tmp_path / "d"]),
        DataConfig(img_size=32),
        batch_size=1,
        seed=0,
    )
    loader.set_epoch(0)
    (batch,) = list(loader)
    assert batch.images.shape == (1, 3, 32, 32) and batch.masks.shape[-2:] == (32, 32)
    loader.close()
    out = tmp_path / "out"
    words = [str(tiny_run), str(tmp_path / "d" / "Imgs"), "-o", str(out)]
    assert main(["predict", *words]) == 0
    head = probe(out / "maps" / "i.png")
    assert (head.height, head.width) == size
    words = [
        str(tiny_run),
        "--data",
        str(tmp_path / "d"),
        "-o",
        str(tmp_path / "e"),
        "--gallery",
        "1",
    ]
    assert main(["evaluate", *words]) == 0
