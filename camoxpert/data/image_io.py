"""Reading and writing images and masks: strict, bounded, and under one orientation policy.

A file is checked from its header before anything is decoded; a damaged file is an error that names
it,
never a grey block or an all-zero mask.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from camoxpert.errors import DataError

MAX_PIXELS = 50_000_000
# Our own limit is checked from the header; Pillow's warning would only repeat it.
Image.MAX_IMAGE_PIXELS = None
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class ImageHeader:
    """What a file says about itself before it is decoded.

    Attributes:
        width, height: stored size in pixels, before any EXIF rotation.
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
    """Read a file's header.

    Raises:
        DataError: missing, empty, not an image, or larger than ``max_pixels``.
    """
    with _open(Path(path), max_pixels) as image:
        return _header(image)


def read_image(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, apply_orientation: bool = True
) -> np.ndarray:
    """Decode an image to RGB.

    Grey, palette, CMYK, 16-bit and transparent images are converted; transparency is dropped, not
    blended. A truncated file is an error.

    Args:
        path: the file; its format is found by content.
        max_pixels: larger images are refused from their header.
        apply_orientation: turn the image upright by its EXIF tag.

    Returns:
        uint8 (H, W, 3).

    Raises:
        DataError: unreadable, damaged or too large.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        fast = image.format == "JPEG" and image.mode in ("RGB", "L")
        if fast and (not apply_orientation or _header(image).orientation == 1):
            pixels = _decode_jpeg(path)
            if pixels is not None:
                return pixels
        return _as_rgb(_upright(_load(image, path), apply_orientation))


def read_mask(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, apply_orientation: bool = True
) -> np.ndarray:
    """Decode a binary mask, whatever it is stored as.

    Understood: two levels of any kind (0/1, 0/255, 16-bit, palette, 1-bit), masks in the alpha
        channel
    only, and masks blurred by JPEG or antialiasing (most pixels near the two ends, cut above 128).

    Returns:
        uint8 (H, W), 0 and 255.

    Raises:
        DataError: unreadable, or not a mask (a grey photograph, say).
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        picture = _upright(_load(image, path), apply_orientation)
        return _binary(_mask_levels(picture), path)


def read_pair(
    image_path: str | Path, mask_path: str | Path, *, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, np.ndarray]:
    """Read an image and its mask so that their pixels correspond.

    EXIF turns both. Cameras tag images, drawing tools rarely tag masks: where the turned shapes
    differ
    and the stored ones agree, the mask was drawn on the stored pixels and neither is turned.

    Returns:
        image uint8 (H, W, 3), mask uint8 (H, W) with 0 and 255.

    Raises:
        DataError: unreadable, or of different sizes.
    """
    heads = [probe(path, max_pixels=max_pixels) for path in (image_path, mask_path)]
    turn = pair_orientation(*heads, image_path=Path(image_path), mask_path=Path(mask_path))
    return (
        read_image(image_path, max_pixels=max_pixels, apply_orientation=turn),
        read_mask(mask_path, max_pixels=max_pixels, apply_orientation=turn),
    )


def pair_orientation(
    image: ImageHeader, mask: ImageHeader, *, image_path: Path, mask_path: Path
) -> bool:
    """Whether to apply EXIF to a pair; raises DataError where no reading makes the sizes agree."""
    if image.upright == mask.upright:
        return True
    if (image.height, image.width) == (mask.height, mask.width):
        return False
    raise DataError(
        f"{image_path} is {image.width}x{image.height} pixels but its mask {mask_path} is "
        f"{mask.width}x{mask.height}. A mask must have the size of its image."
    )


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4) as PNG, whole or not at all."""
    _write(Path(path), array, ".png", [cv2.IMWRITE_PNG_COMPRESSION, 3])


def write_jpeg(path: str | Path, array: np.ndarray, *, quality: int = 92) -> None:
    """Write uint8 grey (H, W) or RGB (H, W, 3) as JPEG, whole or not at all."""
    _write(Path(path), array, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def _open(path: Path, max_pixels: int) -> Image.Image:
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Copy or download it again.")
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
        kind = "a web page" if start.startswith((b"<!doctype", b"<html")) else "not an image"
        raise DataError(f"{path} is {kind}, whatever its name says. Download it again.") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        image.close()
        raise DataError(
            f"{path} claims {size} pixels, more than the limit of {max_pixels} (data.max_pixels). "
            "It was not decoded."
        )
    return image


def _header(image: Image.Image) -> ImageHeader:
    try:
        orientation = int(image.getexif().get(ORIENTATION_TAG, 1))
    except (OSError, ValueError, TypeError, SyntaxError):
        # A broken EXIF block is no reason to refuse sound pixels.
        orientation = 1
    orientation = orientation if 1 <= orientation <= 8 else 1
    return ImageHeader(image.width, image.height, image.format or "", image.mode, orientation)


def _load(image: Image.Image, path: Path) -> Image.Image:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise DataError(f"{path} is damaged or cut short: {error}. Copy it again.") from error
    return image


def _upright(image: Image.Image, apply: bool) -> Image.Image:
    if not apply or _header(image).orientation == 1:
        return image
    return ImageOps.exif_transpose(image)


def _decode_jpeg(path: Path) -> np.ndarray | None:
    """Decode with OpenCV, twice as fast as Pillow; None where the file's end is not a JPEG's end.

    OpenCV fills what a cut-off file lacks with grey and says nothing, so the end marker is looked
    for.
    Some writers append bytes after it: then Pillow, which checks, decides.
    """
    data = np.fromfile(path, np.uint8)
    if data[-2:].tobytes() != b"\xff\xd9":
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: np.ndarray | None = cv2.imdecode(data, flags)
    return pixels


def _as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        grey = (np.clip(values / top, 0, 1) * 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))


def _mask_levels(image: Image.Image) -> np.ndarray:
    """Return the channel that holds the mask, any integer type (H, W)."""
    if image.mode == "P":
        indices = np.asarray(image)
        # Palette masks: index 0 is the background, whatever colour it is shown in.
        return (indices > 0).astype(np.uint8) if len(np.unique(indices)) <= 2 else indices
    if image.mode in ("RGBA", "LA", "PA"):
        planes = np.asarray(image.convert("RGBA"))
        colour, alpha = planes[..., :3].max(axis=2), planes[..., 3]
        return alpha if colour.min() == colour.max() else colour
    if image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
        return np.asarray(image)
    return np.asarray(image.convert("RGB")).max(axis=2)


def _binary(levels: np.ndarray, path: Path) -> np.ndarray:
    """Turn mask levels into 0 and 255, or say why they are no mask."""
    values = np.unique(levels)
    if levels.dtype == bool:
        return levels.astype(np.uint8) * np.uint8(255)
    if len(values) == 1:
        full = values[0] > 0
        return np.full(levels.shape, 255 if full else 0, np.uint8)
    if len(values) == 2:
        if values[0] != 0 and values[1] not in (255, 65535):
            raise DataError(
                f"The mask {path} has the values {values[0]} and {values[1]}; background must be 0."
            )
        return np.where(levels == values[1], np.uint8(255), np.uint8(0))
    top = 65535 if values[-1] > 255 else 255
    low, high = levels < top * 0.25, levels > top * 0.75
    # Blur from JPEG or antialiasing touches outlines only; a photograph is grey all over.
    between = 1.0 - (low.mean() + high.mean())
    if between > 0.1 or not high.any():
        shown = ", ".join(str(v) for v in values[:6])
        raise DataError(
            f"{path} is not a binary mask: {len(values)} values ({shown} ...), {between:.0%} of "
            f"the "
            "pixels are neither dark nor bright. Is it a photograph or a label map? Masks hold 0 "
            "and "
            "255, or 0 and 1."
        )
    return np.where(levels > top * (128 / 255), np.uint8(255), np.uint8(0))


def _write(path: Path, array: np.ndarray, suffix: str, options: list[int]) -> None:
    if array.ndim == 3:
        code = cv2.COLOR_RGB2BGR if array.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        array = cv2.cvtColor(array, code)
    done, data = cv2.imencode(suffix, array, options)
    if not done:
        raise DataError(f"{path} could not be encoded.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.tobytes())
        # mkstemp makes private files; results are meant to be read by others.
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} could not be written: {error}.") from error


def require_whole(path: Path, header: ImageHeader) -> None:
    """Raise DataError for a file that was cut short; reads its last bytes, decodes only in
    doubt."""
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
