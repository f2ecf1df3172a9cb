"""Decode a file that somebody sent: known formats only, limits before decoding, no path in a
message."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from camoxpert.data.files.image_io import probe, read_image
from camoxpert.errors import DataError
from camoxpert.serve.answers import Fault

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow knows more, of which some start other programs (EPS) or are rarely tested."""
MOST_SCANS = 64
"""Scans of a progressive JPEG: cameras and editors write about ten. A decoder goes over the whole
picture for each, and a few bytes are enough for one: 20 MB of them take hours."""
MOST_SEGMENTS = 10_000
"""Markers of a JPEG; those that restart the decoder within a scan do not count."""
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
START, END, SCAN, LONE = 0xD8, 0xD9, 0xDA, 0x01


def read_upload(path: Path, *, max_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels as ``predict`` reads them, uint8 RGB (H, W, 3), upright.

    Args:
        path: the file that was sent, under a name of ours.
        max_pixels: larger images are refused from their header.

    Raises:
        Fault: it is not an image, too large or damaged.
    """
    try:
        header = probe(path, max_pixels=max_pixels)
        if header.format not in FORMATS:
            raise Fault(422, f"The file is not one of {', '.join(FORMATS)}. Convert it.")
        if header.format in ("JPEG", "MPO") and has_many_scans(path.read_bytes()):
            raise Fault(
                422, f"The JPEG has more than {MOST_SCANS} scans. Save it again in an editor."
            )
        pixels: NDArray[np.uint8] = read_image(path, max_pixels=max_pixels)
    except DataError as error:
        # The file came without a name.
        text = str(error).replace(str(path), "The file").replace(", despite its name", "")
        raise Fault(422, text) from None
    except (MemoryError, Fault):
        raise
    except Exception:
        # Decoders meet files made to break them, and raise all kinds of errors.
        raise Fault(422, "The file is damaged: it cannot be decoded.") from None
    return pixels


def has_many_scans(data: bytes) -> bool:
    """Return whether a JPEG has more than MOST_SCANS scans, or parts without end.

    What lies inside a segment is skipped, such as a thumbnail with an end of its own; phones append
    videos behind the end of the picture, which hold any bytes.
    """
    scans, place = 0, 2
    for _ in range(MOST_SEGMENTS):
        found = MARKER.search(data, place)
        if found is None or data[found.start() + 1] == END:
            return False
        kind, place = data[found.start() + 1], found.end()
        if kind not in (START, LONE):
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
        scans += kind == SCAN
        if scans > MOST_SCANS:
            return True
    return True
