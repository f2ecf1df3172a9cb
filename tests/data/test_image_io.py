"""Images and masks of every kind give the right pixels or an error that names the file."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from camoxpert.data.files.image_io import (
    probe,
    read_image,
    read_mask,
    read_pair,
    require_whole,
    rgb_pixels,
    write_jpeg,
    write_png,
)
from camoxpert.errors import DataError


@pytest.fixture
def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    return cv2.GaussianBlur(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), (0, 0), 2)


@pytest.fixture
def shape() -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[8:30, 10:25] = True
    return mask


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


def test_round_trips(tmp_path: Path, picture: np.ndarray) -> None:
    write_png(tmp_path / "deep" / "a.png", picture)
    assert np.array_equal(read_image(tmp_path / "deep" / "a.png"), picture)
    write_jpeg(tmp_path / "a.jpg", picture)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - picture).mean() < 4
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, picture: np.ndarray, mode: str) -> None:
    image = Image.fromarray(picture)
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(grey)
    else:
        image = image.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    assert pixels.std() > 5


def test_the_content_counts_not_the_name(tmp_path: Path, picture: np.ndarray) -> None:
    write_png(tmp_path / "a.png", picture)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert probe(tmp_path / "a.jpg").format == "PNG"
    assert np.array_equal(read_image(tmp_path / "a.jpg"), picture)


def png_bomb(path: Path, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (side // 8 + 1) * 100, 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "html", "text", "half", "most", "png", "bomb"]
)
def test_damaged_files_are_named(tmp_path: Path, picture: np.ndarray, kind: str) -> None:
    path = tmp_path / ("a.png" if kind == "png" else "a.jpg")
    if kind == "png":
        write_png(path, picture)
    elif kind != "missing":
        write_jpeg(path, picture)
    data = path.read_bytes() if path.exists() else b""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "html":
        path.write_text("<!DOCTYPE html><html>404</html>")
    elif kind == "text":
        path.write_text("not a picture at all")
    elif kind in ("half", "png"):
        path.write_bytes(data[: len(data) // 2])
    elif kind == "most":
        path.write_bytes(data[: int(len(data) * 0.95)])
    elif kind == "bomb":
        png_bomb(path, 20_000)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert path.name in str(caught.value)
    assert caught.value.exit_code == 3
    says = {"html": "web page", "bomb": "20000x20000", "empty": "0 bytes"}.get(kind, "")
    assert says in str(caught.value)


def test_opencv_alone_would_have_accepted_a_cut_jpeg(tmp_path: Path, picture: np.ndarray) -> None:
    """The reason to check the end marker."""
    write_jpeg(tmp_path / "a.jpg", picture)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: int(len(data) * 0.95)])
    assert cv2.imread(str(tmp_path / "a.jpg")) is not None


def test_bytes_behind_the_end_are_harmless(tmp_path: Path, picture: np.ndarray) -> None:
    write_jpeg(tmp_path / "a.jpg", picture)
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"camera notes")
    assert read_image(tmp_path / "a.jpg").shape == (40, 60, 3)
    require_whole(tmp_path / "a.jpg", probe(tmp_path / "a.jpg"))


class TestMasks:
    @pytest.mark.parametrize("histogram", [(256, 1), (256,)], ids=["OpenCV 4", "OpenCV 5"])
    @pytest.mark.parametrize(
        "kind",
        ["255", "01", "16bit", "16bit255", "1bit", "palette", "rgb", "alpha", "jpg", "soft"],
    )
    def test_every_encoding_gives_the_same_mask(
        self, tmp_path: Path, shape, kind: str, histogram: tuple[int, ...], monkeypatch
    ) -> None:
        # OpenCV 4 returns a histogram as a column, OpenCV 5 as a row of one axis.
        count = cv2.calcHist
        monkeypatch.setattr(cv2, "calcHist", lambda *given: count(*given).reshape(histogram))
        on = shape.astype(np.uint8)
        path = tmp_path / ("m.jpg" if kind == "jpg" else "m.png")
        images = {
            "255": lambda: Image.fromarray(on * 255),
            "01": lambda: Image.fromarray(on),
            "16bit": lambda: Image.fromarray(on.astype(np.uint16) * 65535),
            "16bit255": lambda: Image.fromarray(on.astype(np.uint16) * 255),
            "1bit": lambda: Image.fromarray(shape),
            "rgb": lambda: Image.fromarray(np.repeat(on[..., None] * 255, 3, 2)),
            "alpha": lambda: Image.fromarray(
                np.dstack([np.zeros((40, 60, 3), np.uint8), on * 255])
            ),
            "jpg": lambda: Image.fromarray(on * 255),
            "soft": lambda: Image.fromarray(cv2.GaussianBlur(on * 255, (3, 3), 0.5)),
        }
        if kind == "palette":
            image = Image.fromarray(on).convert("P")
            image.putpalette([0, 0, 0, 128, 0, 0] + [0] * (254 * 3))
        else:
            image = images[kind]()
        image.save(path)
        mask = read_mask(path)
        assert set(np.unique(mask)) == {0, 255}
        assert ((mask > 0) != shape).mean() < (0.01 if kind in ("jpg", "soft") else 1e-9)

    @pytest.mark.parametrize(("value", "expected"), [(0, 0), (255, 255), (1, 255)])
    def test_constant_masks(self, tmp_path: Path, value: int, expected: int) -> None:
        Image.fromarray(np.full((4, 5), value, np.uint8)).save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png"), np.full((4, 5), expected))

    def test_a_photograph_is_not_a_mask(self, tmp_path: Path, picture: np.ndarray) -> None:
        Image.fromarray(picture).convert("L").save(tmp_path / "m.png")
        with pytest.raises(DataError, match="not a binary mask"):
            read_mask(tmp_path / "m.png")

    def test_labels_without_a_background_are_refused(self, tmp_path: Path, shape) -> None:
        Image.fromarray(shape.astype(np.uint8) + 1).save(tmp_path / "m.png")
        with pytest.raises(DataError, match="background must be 0"):
            read_mask(tmp_path / "m.png")


class TestPairs:
    def test_exif_turns_both_or_neither(self, tmp_path: Path, picture: np.ndarray, shape) -> None:
        Image.fromarray(picture).save(tmp_path / "i.jpg", exif=exif(6), quality=95)
        # Drawn on the stored pixels: neither is turned.
        Image.fromarray(shape).save(tmp_path / "stored.png")
        image, mask = read_pair(tmp_path / "i.jpg", tmp_path / "stored.png")
        assert image.shape[:2] == mask.shape == (40, 60)
        assert np.abs(image.astype(int) - picture).mean() < 5
        # Drawn on what a viewer shows: the image is turned.
        Image.fromarray(np.rot90(shape, -1)).save(tmp_path / "turned.png")
        image, mask = read_pair(tmp_path / "i.jpg", tmp_path / "turned.png")
        assert image.shape[:2] == mask.shape == (60, 40)
        assert np.abs(image.astype(int) - np.rot90(picture, -1)).mean() < 5

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_fast_and_slow_decoding_agree(self, tmp_path: Path, picture, orientation: int) -> None:
        path = tmp_path / "i.jpg"
        Image.fromarray(picture).save(path, exif=exif(orientation), quality=95)
        upright = read_image(path)
        height, width = probe(path).upright
        assert upright.shape == (height, width, 3)
        stored = read_image(path, apply_orientation=False)
        assert stored.shape == (40, 60, 3)
        if orientation == 3:
            assert np.abs(upright.astype(int) - stored[::-1, ::-1]).max() <= 2

    def test_other_sizes_are_an_error(self, tmp_path: Path, picture: np.ndarray, shape) -> None:
        write_png(tmp_path / "i.png", picture)
        Image.fromarray(shape[:-1]).save(tmp_path / "m.png")
        with pytest.raises(DataError, match=r"60x40 pixels but its mask .* 60x39"):
            read_pair(tmp_path / "i.png", tmp_path / "m.png")

    @pytest.mark.parametrize("orientation", [1, 3, 6])
    def test_tiff_headers_report_what_the_reader_gives(
        self, tmp_path: Path, picture: np.ndarray, shape, orientation: int
    ) -> None:
        """Pillow turns TIFFs itself; turning them again would misplace the mask."""
        path = tmp_path / "i.tif"
        Image.fromarray(picture).save(path, tiffinfo={0x0112: orientation})
        image = read_image(path)
        assert image.shape[:2] == probe(path).upright
        turned = np.rot90(shape, {1: 0, 3: 2, 6: -1}[orientation])
        Image.fromarray(turned).save(tmp_path / "m.png")
        paired, mask = read_pair(path, tmp_path / "m.png")
        assert np.array_equal(paired, np.rot90(picture, {1: 0, 3: 2, 6: -1}[orientation]))
        assert np.array_equal(mask > 0, turned)

    def test_png_exif_behind_the_pixels_counts(self, tmp_path: Path, picture: np.ndarray) -> None:
        plain, late = tmp_path / "plain.png", tmp_path / "late.png"
        Image.fromarray(picture).save(plain)
        data = plain.read_bytes()
        block = exif(6).removeprefix(b"Exif\x00\x00")
        body = b"eXIf" + block
        chunk = struct.pack(">I", len(block)) + body + struct.pack(">I", zlib.crc32(body))
        late.write_bytes(data[:-12] + chunk + data[-12:])
        assert probe(late).orientation == 6
        assert np.array_equal(read_image(late), np.rot90(picture, -1))
        assert np.array_equal(read_image(plain), picture)


class TestMaskRules:
    def test_sixteen_bit_colour_masks_keep_their_low_byte(self, tmp_path: Path, shape) -> None:
        """Pillow keeps only the high byte: a mask of 0 and 255 would become black."""
        planes = np.repeat(shape[..., None].astype(np.uint16) * 255, 3, 2)
        cv2.imwrite(str(tmp_path / "m.png"), planes)
        assert not np.asarray(Image.open(tmp_path / "m.png")).any()
        assert np.array_equal(read_mask(tmp_path / "m.png") > 0, shape)

    def test_a_grey_palette_is_read_by_its_greys(self, tmp_path: Path, shape) -> None:
        image = Image.fromarray((~shape).astype(np.uint8)).convert("P")
        image.putpalette([255, 255, 255, 0, 0, 0] + [0] * (254 * 3))
        image.save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png") > 0, shape)

    @pytest.mark.parametrize("level", [38, 128, 200])
    def test_nought_and_any_other_level_is_a_mask(self, tmp_path: Path, shape, level: int) -> None:
        Image.fromarray(shape.astype(np.uint8) * np.uint8(level)).save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png") > 0, shape)

    @pytest.mark.parametrize("level", [77, 254])
    def test_one_level_that_could_mean_anything_is_refused(
        self, tmp_path: Path, level: int
    ) -> None:
        Image.fromarray(np.full((5, 6), level, np.uint8)).save(tmp_path / "m.png")
        if level == 254:
            assert read_mask(tmp_path / "m.png").all()  # white, except for rounding in a JPEG
        else:
            with pytest.raises(DataError, match="background must be 0"):
                read_mask(tmp_path / "m.png")

    def test_colours_of_one_strength_are_refused(self, tmp_path: Path, shape) -> None:
        planes = np.zeros((*shape.shape, 3), np.uint8)
        planes[shape, 0] = planes[~shape, 1] = 255
        Image.fromarray(planes).save(tmp_path / "m.png")
        with pytest.raises(DataError, match="several colours of equal strength"):
            read_mask(tmp_path / "m.png")


class TestReducedDecoding:
    def write(self, path: Path, width: int, height: int) -> None:
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)

    @pytest.mark.parametrize(
        ("at_least", "shape"),
        [(None, (120, 200)), (61, (120, 200)), (60, (60, 100)), (30, (30, 50)), (1, (15, 25))],
    )
    def test_never_shorter_than_asked(self, tmp_path: Path, at_least, shape) -> None:
        self.write(tmp_path / "a.jpg", 200, 120)
        assert read_image(tmp_path / "a.jpg", at_least=at_least).shape[:2] == shape

    def test_the_picture_is_the_same(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.jpg", 256, 192)
        whole = read_image(tmp_path / "a.jpg")
        half = read_image(tmp_path / "a.jpg", at_least=96)
        shrunk = cv2.resize(whole, (128, 96), interpolation=cv2.INTER_AREA)
        assert np.abs(half.astype(int) - shrunk).mean() < 2
        # Control: the channels are in the same order.
        assert np.abs(half[..., ::-1].astype(int) - shrunk).mean() > 20

    def test_other_formats_are_decoded_whole(self, tmp_path: Path) -> None:
        Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png", at_least=8).shape == (64, 64, 3)


@pytest.mark.parametrize("suffix", [".tif", ".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 9])
def test_a_pillow_image_is_turned_as_its_file_is(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    """Pillow turns TIFFs itself as it loads them, and tags may say nonsense."""
    stored = np.arange(40 * 50 * 3, dtype=np.uint32).reshape(40, 50, 3).astype(np.uint8)
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 95} if suffix == ".jpg" else {}))
    expected = read_image(path)
    assert expected.shape[:2] == ((50, 40) if orientation == 6 else (40, 50))
    with Image.open(path) as image:
        given = rgb_pixels(image)
    assert given.shape == expected.shape
    # JPEGs are decoded by two libraries.
    assert np.abs(given.astype(int) - expected).mean() < 2
