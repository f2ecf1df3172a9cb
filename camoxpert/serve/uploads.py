"""Keep a file that somebody sent until it is decoded, and decode it: known formats only, limits
before decoding, no path in a message."""

from __future__ import annotations

import threading
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

import numpy as np
from numpy.typing import NDArray

from camoxpert.data.files.image_io import probe, read_image
from camoxpert.data.files.jpeg import START_OF_SCAN, segments
from camoxpert.errors import DataError
from camoxpert.serve.answers import Fault
from camoxpert.serve.worker import closing

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""Pillow knows more, of which some start other programs (EPS) or are rarely tested."""
MOST_SCANS = 64
"""Scans of a progressive JPEG: cameras and editors write about ten. A decoder goes over the whole
picture for each, and a few bytes are enough for one: 20 MB of them take hours."""
MOST_SEGMENTS = 10_000
"""Markers of a JPEG; those that restart the decoder within a scan do not count."""


class Uploads:
    """The folder of files that were sent and not decoded yet.

    Args:
        folder: one that only this process's user can enter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._closed = False

    def create(self) -> IO[bytes]:
        """Return a new file, open for writing, under a name that nobody sent.

        Raises:
            Fault: the server is closing.
            OSError: the file cannot be created.
        """
        with self._lock:
            if self._closed:
                raise closing()
            return NamedTemporaryFile(dir=self.folder, delete=False)

    def close(self) -> None:
        """Create no further files: the folder can be removed."""
        with self._lock:
            self._closed = True


def read_upload(path: Path, *, max_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels as ``predict`` reads them, uint8 RGB (H, W, 3), upright; delete the file.

    Args:
        path: the file that was sent, under a name of ours; afterwards it is deleted, also where it
            cannot be used.
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
    finally:
        path.unlink(missing_ok=True)
    return pixels


def has_many_scans(data: bytes) -> bool:
    """Return whether a JPEG has more than MOST_SCANS scans or MOST_SEGMENTS segments."""
    scans = 0
    for number, (kind, _, _) in enumerate(segments(data)):
        scans += kind == START_OF_SCAN
        if scans > MOST_SCANS or number >= MOST_SEGMENTS:
            return True
    return False
