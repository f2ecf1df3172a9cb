"""Decode JPEGs so that damage in the middle of a file is an error.

libjpeg fills what it cannot decode with grey or with shifted blocks, and only warns; OpenCV and
Pillow drop the warning. simplejpeg, a thin layer on libjpeg-turbo, raises it. It gives the pixels
of OpenCV, in no more time. Where it is not installed, the structure of the file is still checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

END = b"\xff\xd9"
# OpenCV's flags for "colour at 1/n" imply BGR; these do not.
REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
START_OF_SCAN, HUFFMAN_TABLES = 0xDA, 0xC4
BASELINE, PROGRESSIVE = (0xC0, 0xC1), 0xC2
END_OF_IMAGE = 0xD9
# Markers without a length; those that restart the decoder within a scan are not segments.
LONE = (0xD8, 0x01)
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# More zero or fill bytes in a row than any sound scan has: a hole in the file.
HOLE = 32
ZEROS, FILL = bytes(HOLE), b"\xff" * HOLE
# Of all symbols: the rest of the block is zero.
END_OF_BLOCK = 0
# Warnings about headers.
HARMLESS = (
    *("Warning: unknown JFIF", "Unknown Adobe", "Invalid SOS", "Corrupt JPEG data: bad ICC"),
    # Of simplejpeg: it knows the usual ones alone, and has not looked at the pixels yet.
    "Could not determine subsampling level",
)
MOST_PADDING = 16
PADDING = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")


def hears_warnings() -> bool:
    """Return whether libjpeg's warnings are heard, which needs simplejpeg."""
    return simplejpeg is not None


def decode_jpeg(path: Path, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """Decode a grey or colour JPEG to RGB, uint8 (H, W, 3), as it is stored.

    Args:
        path: the file.
        size: (width, height) of its header.
        reduction: 1, 2, 4 or 8, the factor by which the result is smaller.

    Returns:
        The pixels, or None if Pillow should decode the file: without the end marker in its place
        (Pillow tells a truncated file from one with bytes after the marker), or with more pixels
        than OpenCV may decode.

    Raises:
        ValueError: the file is damaged.
    """
    data = path.read_bytes()
    if not data.endswith(END):
        return None
    _require_whole_scans(data)
    if simplejpeg is not None:
        width, height = (-(-side // reduction) for side in size)
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
            if pixels.shape[:2] == (height, width):
                return np.asarray(pixels)
        except ValueError as error:
            _require_harmless(str(error), data)
    flags = cv2.IMREAD_COLOR_RGB | REDUCED[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        decoded: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        # More pixels than OPENCV_IO_MAX_IMAGE_PIXELS: Pillow only obeys data.max_pixels.
        return None
    return decoded


def require_sound_jpeg(path: Path, mode: str) -> None:
    """Raise ValueError if a JPEG that Pillow decoded is damaged.

    Args:
        path: the file.
        mode: Pillow's colour mode of it.
    """
    data = path.read_bytes()
    _require_whole_scans(data)
    if simplejpeg is not None:
        space = {"CMYK": "CMYK", "L": "GRAY"}.get(mode, "RGB")
        try:
            # At an eighth of the size: the damage is in the coefficients.
            simplejpeg.decode_jpeg(data, space, min_height=1, min_width=1)
        except ValueError as error:
            _require_harmless(str(error), data)


def _require_harmless(warning: str, data: bytes) -> None:
    """Raise ValueError if libjpeg's warning is about the pixels.

    Warnings about headers are harmless, as are a few bytes of padding before the end.
    """
    padding = PADDING.fullmatch(warning)
    number = int(padding[1]) if padding and data.endswith(END) else 0
    if 0 < number <= MOST_PADDING and not data[-2 - number : -2].strip(b"\0\xff"):
        return
    # simplejpeg's own function may be named first.
    if not warning.rpartition("(): ")[2].startswith(HARMLESS):
        raise ValueError(warning)


def _require_whole_scans(data: bytes) -> None:
    """Raise ValueError if the coded pixels have a hole of zeros or of ones, or scans are missing.

    A hole may end where the decoder happens to be in step again, and then libjpeg is content, as it
    is with a file that ends between two scans.
    """
    place = 0
    table: int | None = None
    baseline = False
    components = b""
    for kind, start, end in segments(data):
        baseline |= kind in BASELINE
        if kind in (*BASELINE, PROGRESSIVE):
            components = data[start + 6 : end : 3]
        if kind == HUFFMAN_TABLES and table is None:
            table = _first_symbol(data[start:end])
        if kind == START_OF_SCAN:
            if len(data) <= start:
                raise ValueError("its first scan has no header")
            place = end
            if not baseline or data[start] < len(components):
                _require_all_scans(data, components, progressive=not baseline)
            break
    if not place:
        return
    found = data.find(FILL, place)
    # In a flat picture with fitted tables, zeros may stand for empty blocks. Refinement scans of
    # progressive files hold plain bits.
    if found < 0 and baseline and table != END_OF_BLOCK:
        found = data.find(ZEROS, place)
    # Behind the end of the first picture anything may follow.
    finished = data.find(END, place)
    if 0 <= found < finished:
        what = "zeros" if data[found] == 0 else "0xff"
        raise ValueError(f"from byte {found} on it holds {what} where the pixels should be")


def _require_all_scans(data: bytes, components: bytes, *, progressive: bool) -> None:
    """Raise ValueError if a component or some of its bits are in no scan.

    Args:
        data: the file; what lies behind the end of its image does not count.
        components: their identifiers.
        progressive: coefficients come in bands, and their low bits later.
    """
    # Component -> the lowest bit that arrived, of every coefficient.
    lowest = {component: [99] * (64 if progressive else 1) for component in components}
    for kind, place, _ in segments(data):
        if kind != START_OF_SCAN or len(data) <= place:
            continue
        number = data[place]
        start = place + 1 + 2 * number
        if number > len(components) or len(data) < start + 3:
            continue
        first, last, bits = data[start], min(data[start + 1], 63), data[start + 2] & 15
        band = range(first, last + 1) if progressive else range(1)
        for component in data[place + 1 : start : 2]:
            for coefficient in band if component in lowest else ():
                lowest[component][coefficient] = bits if progressive else 0
    if any(bit for bits in lowest.values() for bit in bits):
        raise ValueError("its last scans are missing")


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of every segment of a JPEG up to the end of its image.

    ``start`` and ``end`` enclose what follows the length; the coded pixels of a scan lie between
    its segment and the next. As a decoder does, the walk skips what lies inside a segment, such as
    a thumbnail with an end of its own, and bytes between segments that are no marker. Behind the
    end of the image anything may follow: phones append videos.
    """
    place = 2
    while (found := MARKER.search(data, place)) is not None:
        kind, place = data[found.start() + 1], found.end()
        if kind == END_OF_IMAGE:
            return
        start = place
        if kind not in LONE:
            start += 2
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
        yield kind, start, place


def _first_symbol(tables: bytes) -> int | None:
    """Return what a code of zero bits means in the AC table 0; None if it is not there."""
    place = 0
    while place + 17 <= len(tables):
        number = sum(tables[place + 1 : place + 17])
        if tables[place] == 0x10 and number and place + 17 < len(tables):
            return tables[place + 17]
        place += 17 + number
    return None
