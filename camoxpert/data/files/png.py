"""Read the parts of a PNG that Pillow ignores: late EXIF chunks, checksums, 16-bit colour."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from camoxpert.errors import DataError

SIGNATURE_BYTES = 8
CHECKSUM_BYTES = 4


def png_exif(path: Path) -> Image.Exif:
    """Return the EXIF data, which may come after the pixels; decode nothing."""
    exif = Image.Exif()
    with path.open("rb") as file:
        file.seek(SIGNATURE_BYTES)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                exif.load(b"Exif\x00\x00" + file.read(length))
                break
            file.seek(length + CHECKSUM_BYTES, os.SEEK_CUR)
    return exif


def require_checksums(path: Path) -> None:
    """Raise ValueError if the pixels of a PNG do not match their checksums.

    Pillow does not check them: a third of all wrong bytes in a small mask would go unnoticed.
    """
    data = memoryview(path.read_bytes())
    place = SIGNATURE_BYTES
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        # Lower-case chunks are metadata; Pillow itself notices truncated chunks.
        if kind[:1].isupper() and end + CHECKSUM_BYTES <= len(data):
            (expected,) = struct.unpack_from(">I", data, end)
            if zlib.crc32(data[place + 4 : end]) != expected:
                raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} is wrong")
        place = end + CHECKSUM_BYTES


def wide_planes(path: Path) -> np.ndarray | None:
    """Return the channels of a 16-bit colour PNG, RGB or RGBA order, or None for other files.

    Pillow keeps only the high byte, so a mask of 0 and 255 (or 1) would become black.

    Raises:
        DataError: the file has 16 bits and cannot be decoded.
    """
    data = np.fromfile(path, np.uint8)
    depth, colour_type = (int(value) for value in data[24:26])
    if depth != 16 or colour_type not in (2, 4, 6):
        return None
    try:
        planes = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        # More pixels than OPENCV_IO_MAX_IMAGE_PIXELS.
        planes = None
    if planes is None or planes.ndim != 3:
        raise DataError(f"The 16-bit mask {path} cannot be decoded. Save it with 8 bits.")
    order = [2, 1, 0] if planes.shape[2] == 3 else [2, 1, 0, 3]
    return np.ascontiguousarray(planes[..., order])
