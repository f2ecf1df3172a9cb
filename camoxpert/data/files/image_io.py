"""Read and write images and masks: strict, with a size limit and one orientation policy.

A file's header is checked before anything is decoded; a damaged file is an error that names
it, never a grey block or an all-zero mask.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from camoxpert.data.files.jpeg import decode_jpeg, require_sound_jpeg
from camoxpert.data.files.masks import StoredLevels, binary_mask, encoding_of, stored_levels
from camoxpert.data.files.png import png_exif, require_checksums
from camoxpert.errors import DataError
from camoxpert.files import why_missing, write_bytes

MAX_PIXELS = 50_000_000
UNLIMITED = 1 << 62
"""``max_pixels`` of files whose size was judged before, or that are our own."""
# Our own limit is checked from the header; Pillow's warning would only repeat it.
Image.MAX_IMAGE_PIXELS = None
ORIENTATION_TAG = 0x0112
# EXIF orientation -> how to turn the stored pixels upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageHeader:
    """What is known about a file from its header.

    Attributes:
        width, height: stored size in pixels, before any EXIF rotation (TIFF: after it).
        format: JPEG, PNG ... by content, not by file name.
        mode: Pillow's colour mode.
        orientation: EXIF orientation, 1 (upright) to 8.
    """

    width: int
    height: int
    format: str
    mode: str
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) after the EXIF rotation."""
        turned = self.orientation >= 5
        return (self.width, self.height) if turned else (self.height, self.width)


def probe(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Return a file's header; decode nothing.

    Raises:
        DataError: missing, empty, not an image, or larger than ``max_pixels``.
    """
    with _open(Path(path), max_pixels) as image:
        return _header(image, Path(path))


def read_image(
    path: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    apply_orientation: bool = True,
    at_least: int | None = None,
    strict: bool = False,
) -> np.ndarray:
    """Decode an image to RGB.

    Grey, palette, CMYK, 16-bit and transparent images are converted; transparency is dropped, not
    blended. A truncated file is an error.

    Args:
        path: the file; its format is found by content.
        max_pixels: larger images are refused from their header.
        apply_orientation: turn the image upright by its EXIF tag.
        at_least: the caller will shrink the image to this side: a JPEG may be decoded to a half, a
            quarter or an eighth of its size, as long as no side gets shorter than that. The decoder
            averages, as shrinking would.
        strict: use the strictest decoder, which is slower.

    Returns:
        uint8 (H, W, 3); smaller by a power of two where ``at_least`` allows it.

    Raises:
        DataError: unreadable, damaged or too large.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        orientation = _header(image, path).orientation if apply_orientation else 1
        quick = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1
        if quick and not strict:
            reduction = _reduction(min(image.size), at_least)
            try:
                pixels = decode_jpeg(path, image.size, reduction)
            except ValueError as error:
                raise _damaged(path, error) from error
            if pixels is not None:
                return pixels
        return _as_rgb(_upright(_load(image, path), orientation))


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of a Pillow image upright, uint8 RGB (H, W, 3), as ``read_image`` does."""
    # As a file is read: Pillow turns a TIFF as it loads it, and its header then has no tag.
    orientation = _orientation(image, None)
    image.load()
    return _as_rgb(_upright(image, orientation))


def read_mask(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, apply_orientation: bool = True
) -> np.ndarray:
    """Decode a binary mask, however it is stored.

    Understood: 0 and any other level (0/1, 0/255, 16-bit, 1-bit), label maps (every label is
    object; unlabelled pixels, as PASCAL VOC marks them, are void), palettes, masks in the alpha
    channel only, and masks blurred by JPEG or antialiasing (most pixels near the two ends, cut
    above 128). The rules are in ``masks.py`` and ``labels.py``.

    Returns:
        uint8 (H, W), 0 and 255; ``labels.VOID`` where a label map has no label.

    Raises:
        DataError: unreadable, or not a mask (for example a grey photograph).
    """
    return _read_mask(Path(path), max_pixels, apply_orientation)[0]


def read_mask_as(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, apply_orientation: bool = True
) -> tuple[np.ndarray, str]:
    """Decode a binary mask as ``read_mask`` does, and name how the file stores it."""
    mask, loaded = _read_mask(Path(path), max_pixels, apply_orientation)
    return mask, encoding_of(loaded, Path(path))


def _read_mask(
    path: Path, max_pixels: int, apply_orientation: bool
) -> tuple[np.ndarray, Image.Image]:
    with _open(path, max_pixels) as image:
        orientation = _header(image, path).orientation if apply_orientation else 1
        loaded = _load(image, path)
        mask = binary_mask(loaded, path)
        return np.ascontiguousarray(_upright(Image.fromarray(mask), orientation)), loaded


def read_levels(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> StoredLevels:
    """Decode a mask's levels as they are stored; neither EXIF nor the mask rules are applied.

    Raises:
        DataError: unreadable or larger than ``max_pixels``.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        return stored_levels(_load(image, path), path)


def read_map(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a prediction map: grey levels, however they are stored; EXIF is ignored.

    Understood: 8-bit grey, 1-bit, grey palettes, colour with three equal channels, and 16-bit grey
    (cut to its upper 8 bits). An opaque alpha channel is ignored.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: unreadable, larger than ``max_pixels``, in colour or transparent.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        picture = _load(image, path)
        if picture.mode in ("L", "1"):
            return np.asarray(picture.convert("L"))
        if picture.mode.startswith("I"):
            values = np.asarray(picture)
            if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
                raise DataError(
                    f"The map {path} holds values outside 16 bits. Save it as 8-bit grey."
                )
            if 0 < values.max(initial=0) <= 255:
                raise DataError(
                    f"The map {path} has 16 bits a pixel but no value above 255: its scale is "
                    "unclear. Save it with 8 bits."
                )
            return (values >> 8).astype(np.uint8)
        if picture.mode.startswith("F"):
            raise DataError(f"The map {path} is in floating point. Save it as 8-bit grey.")
        planes = np.asarray(picture.convert("RGBA"))
    if (planes[..., 3] != 255).any():
        raise DataError(
            f"The map {path} has transparent pixels: is it a cut-out? Save the map as 8-bit grey."
        )
    if (planes[..., :1] != planes[..., 1:3]).any():
        raise DataError(
            f"The map {path} is in colour: is it a photograph or an overlay? Save the map as 8-bit "
            "grey."
        )
    return np.ascontiguousarray(planes[..., 0])


def read_values(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode the values of a picture with one channel as they are stored, upright.

    Understood: 8-bit and 16-bit grey, 32-bit integers and floating point, 1-bit, grey palettes, and
    8-bit colour with three equal channels. An opaque alpha channel is ignored.

    Returns:
        (H, W), uint8, uint16, int32 or float32.

    Raises:
        DataError: unreadable, larger than ``max_pixels``, in colour or transparent.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        orientation = _header(image, path).orientation
        picture = _upright(_load(image, path), orientation)
        if picture.mode.startswith(("I", "F")):
            values = np.asarray(picture)
            return values.astype(values.dtype.newbyteorder("="))
        if picture.mode in ("L", "1"):
            return np.asarray(picture.convert("L"))
        planes = np.asarray(picture.convert("RGBA"))
    if (planes[..., 3] != 255).any() or (planes[..., :1] != planes[..., 1:3]).any():
        raise DataError(
            f"{path} is in colour or transparent, and one value for each pixel was expected. Save "
            "what the sensor measured in one channel of 8 or 16 bits, not a picture of it in false "
            "colours."
        )
    return np.ascontiguousarray(planes[..., 0])


def read_pair(
    image_path: str | Path,
    mask_path: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
    any_size: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask so that their pixels correspond.

    EXIF turns both. Cameras tag images, drawing tools rarely tag masks: where the turned shapes
    differ and the stored ones agree, the mask was drawn on the stored pixels and neither is turned.
    With ``any_size`` the sizes may differ: both show the whole picture.

    Returns:
        image uint8 (H, W, 3), mask uint8 (H, W) with 0 and 255; with ``at_least`` the image may be
        smaller than its mask by a power of two (see ``read_image``).

    Raises:
        DataError: unreadable, or of different sizes.
    """
    heads = [probe(path, max_pixels=max_pixels) for path in (image_path, mask_path)]
    turn = pair_orientation(
        *heads, image_path=Path(image_path), mask_path=Path(mask_path), any_size=any_size
    )
    return (
        read_image(image_path, max_pixels=max_pixels, apply_orientation=turn, at_least=at_least),
        read_mask(mask_path, max_pixels=max_pixels, apply_orientation=turn),
    )


def pair_orientation(
    image: ImageHeader,
    mask: ImageHeader,
    *,
    image_path: Path,
    mask_path: Path,
    any_size: bool = False,
) -> bool:
    """Return whether to apply EXIF to a pair.

    Raises:
        DataError: the sizes differ either way, and ``any_size`` does not allow it.
    """
    if image.upright == mask.upright:
        return True
    if (image.height, image.width) == (mask.height, mask.width):
        return False
    if any_size:
        # Whichever makes the shapes more alike.
        stored = _unlike((image.height, image.width), (mask.height, mask.width))
        return _unlike(image.upright, mask.upright) <= stored
    raise DataError(
        f"{image_path} is {image.width}x{image.height} pixels but its mask {mask_path} is "
        f"{mask.width}x{mask.height}. A mask must have the size of its image; --resize bilinear "
        f"accepts another."
    )


def _unlike(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Return how far the aspect ratios of two sizes are apart, from 0."""
    return abs(math.log(first[0] * second[1] / (first[1] * second[0])))


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4) as PNG, atomically."""
    write_encoded(path, encode(array, ".png"))


def write_jpeg(path: str | Path, array: np.ndarray, *, quality: int = 92) -> None:
    """Write uint8 grey (H, W) or RGB (H, W, 3) as JPEG, atomically."""
    write_encoded(path, encode(array, ".jpg", quality=quality))


def write_encoded(path: str | Path, data: bytes) -> None:
    """Write the bytes of an image file, atomically.

    Raises:
        DataError: they cannot be written.
    """
    try:
        write_bytes(Path(path), data)
    except OSError as error:
        raise DataError(f"{path} could not be written: {error}.") from error


def encode(array: np.ndarray, suffix: str, *, quality: int = 92) -> bytes:
    """Return a file's bytes: uint8 grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4).

    Args:
        array: the pixels.
        suffix: .png or .jpg.
        quality: of a JPEG.

    Raises:
        DataError: it cannot be encoded.
    """
    if array.ndim == 3:
        code = cv2.COLOR_RGB2BGR if array.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        array = cv2.cvtColor(array, code)
    # OpenCV's own options for PNG: naming a compression level switches its fast strategy off, which
    # takes twice as long and saves a fifth of the bytes of a cut-out.
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if suffix == ".jpg" else []
    done, data = cv2.imencode(suffix, np.ascontiguousarray(array), options)
    if not done:
        raise DataError(f"An image of shape {array.shape} could not be encoded as {suffix}.")
    return data.tobytes()


def _open(path: Path, max_pixels: int) -> Image.Image:
    if not path.is_file():
        raise DataError(why_missing(path, "file"))
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Copy or download it again.")
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            raise DataError(
                f"{path} is a pointer of Git LFS, not the image. Fetch it with `git lfs pull`."
            ) from None
        kind = "a web page" if start.startswith((b"<!doctype", b"<html")) else "not an image"
        raise DataError(f"{path} is {kind}, despite its name. Download it again.") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        image.close()
        raise DataError(
            f"{path} has {size} pixels, more than the limit of {max_pixels}. It was not decoded. "
            "Shrink it, or raise the limit with --max-pixels."
        )
    return image


def _header(image: Image.Image, path: Path) -> ImageHeader:
    """Return the header of an opened image; call it before the pixels are loaded."""
    orientation = _orientation(image, path)
    return ImageHeader(image.width, image.height, image.format or "", image.mode, orientation)


def _orientation(image: Image.Image, path: Path | None) -> int:
    """Return the turn that an image needs, 1 to 8 as in EXIF; 1 where the tag makes no sense.

    Args:
        image: opened.
        path: its file, whose late EXIF block a PNG's header is asked for; None: Pillow's own way.
    """
    # Pillow turns TIFFs itself and reports the turned size.
    if image.format == "TIFF":
        return 1
    try:
        # Pillow's PNG reader would decode the whole picture here, in search of a late EXIF block.
        exif = image.getexif() if path is None else Image.Image.getexif(image)
        if path is not None and image.format == "PNG" and not exif:
            exif = png_exif(path)
        orientation = int(exif.get(ORIENTATION_TAG, 1))
    except (OSError, ValueError, TypeError, SyntaxError, struct.error):
        # The pixels can be sound even if the EXIF block is broken.
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _load(image: Image.Image, path: Path) -> Image.Image:
    try:
        if image.format == "PNG":
            require_checksums(path)
        mode = image.mode
        image.load()
        if image.format in ("JPEG", "MPO"):
            require_sound_jpeg(path, mode)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise _damaged(path, error) from error
    return image


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged or cut short: {error}. Copy it again.")


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(TURNS[orientation])


def _reduction(shorter: int, at_least: int | None) -> int:
    """Return 1, 2, 4 or 8: how much smaller a JPEG may be decoded."""
    if at_least is None:
        return 1
    return max(n for n in (1, 2, 4, 8) if n == 1 or shorter // n >= at_least)


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        highest = values.max(initial=0)
        # Floating-point pictures run from 0 to 1, unless they contain larger values.
        top = 65535.0 if highest > 255 else 1.0 if image.mode == "F" and highest <= 1 else 255.0
        grey = (np.clip(values / top, 0, 1) * 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def require_whole(path: Path, header: ImageHeader) -> None:
    """Raise DataError if a file is truncated; read its last bytes, decode only in doubt."""
    ends = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
    end = ends.get(header.format)
    if end is None:
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        if end in file.read():
            return
    with _open(path, header.width * header.height) as image:
        _load(image, path)
