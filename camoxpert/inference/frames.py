"""Read the frames of a video and write a video, with PyAV: in order, with their times, strictly."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import Empty, Full, Queue
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camoxpert import stop
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.engine import Chunk

CHUNKS_AHEAD = 2
"""Chunks of decoded frames that wait for the device."""
MISSING_SECONDS = 0.5
"""A video that ends this long before the length that its header estimates is truncated."""
POLL_SECONDS = 0.2
CODEC = "libx264"
QUALITY = "16"
"""Constant rate factor of videos that are written: nearly without loss."""


def load_av() -> ModuleType:
    """Return PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            'Videos are read with PyAV, which is not installed: pip install "camoxpert[video]".'
        ) from error
    module: ModuleType = av
    return module


class BadVideo(DataError):
    """A video that cannot be read to its end: its row says so, and the others go on."""


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        name: of its pictures.
        number: in the video, from 1.
        pts: time stamp in units of the video's time base; None: the file has none.
        seconds: the time stamp in seconds; None without one.
        picture: PyAV's frame, not converted yet.
    """

    name: str
    number: int
    pts: int | None
    seconds: float | None
    picture: Any

    def pixels(self) -> NDArray[np.uint8]:
        """Return the frame upright, uint8 RGB (H, W, 3)."""
        pixels = self.picture.to_ndarray(format="rgb24")
        turns = round(getattr(self.picture, "rotation", 0) / 90) % 4
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


class VideoFile:
    """The frames of a video file, decoded once, in order.

    Anything that a decoder would paper over is an error: a damaged frame, fewer frames or seconds
    than the header says.

    Args:
        path: the file.
        max_pixels: videos with larger frames are refused.

    Attributes:
        rate: frames per second, on average.
        time_base: seconds of a unit of time stamps.
    """

    def __init__(self, path: Path, *, max_pixels: int) -> None:
        self.path = path
        self._av = load_av()
        try:
            self._container = self._av.open(str(path))
        except (self._av.FFmpegError, OSError) as error:
            raise BadVideo(
                f"{path} cannot be read as a video: {error.strerror or error}."
            ) from error
        streams = self._container.streams.video
        if not streams:
            self.close()
            raise BadVideo(f"{path} has no pictures, only sound or text.")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            self.close()
            raise BadVideo(f"{path} holds pictures of a codec that cannot be decoded here.")
        self._stream.thread_type = "AUTO"
        self.rate = self._stream.average_rate or Fraction(25)
        self.time_base = self._stream.time_base
        pixels = self._stream.width * self._stream.height
        if pixels > max_pixels:
            self.close()
            raise BadVideo(
                f"{path} has frames of {pixels} pixels, over the limit of {max_pixels}. "
                "--max-pixels raises it."
            )

    def expected(self, every: int) -> int | None:
        """Return how many frames ``frames`` will yield, if the header says it."""
        return -(-self._stream.frames // every) or None

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, name: str, every: int) -> Iterator[Frame]:
        """Yield every ``every``-th frame, from the first; check all of them.

        Args:
            name: of the video; frames are called ``name/000001`` by their numbers.

        Raises:
            BadVideo: damaged or truncated.
        """
        number = packets = 0
        end = 0.0
        try:
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
                if packet.size and packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                for picture in packet.decode():
                    number += 1
                    if picture.is_corrupt:
                        raise BadVideo(self._damaged(f"frame {number} is damaged"))
                    if (number - 1) % every == 0:
                        pts = picture.pts
                        seconds = None if pts is None else float(pts * self.time_base)
                        yield Frame(f"{name}/{number:06d}", number, pts, seconds, picture)
        except (self._av.FFmpegError, OSError) as error:
            reason = f"after frame {number}: {error.strerror or error}"
            raise BadVideo(self._damaged(reason)) from error
        self._require_whole(number, packets, end)

    def _require_whole(self, number: int, packets: int, end: float) -> None:
        expected = self._stream.frames
        if not number:
            raise BadVideo(self._damaged("it has no frame"))
        length, tolerance = self._declared_seconds()
        found = end - float((self._stream.start_time or 0) * self.time_base)
        # Of a film that was cut without encoding it anew (an edit list) the header counts all
        # frames and says how long the rest is.
        whole = length is not None and found >= length - float(Fraction(1, 2) / self.rate)
        if packets < expected and not whole:
            raise BadVideo(self._damaged(f"it ends after {packets} of {expected} frames"))
        if not expected and length is not None and found < length - tolerance:
            raise BadVideo(self._damaged(f"it ends after {found:.1f} of {length:.1f} seconds"))

    def _declared_seconds(self) -> tuple[float | None, float]:
        """Return how long the pictures last by the header, None if it does not say, and how far
        that may be off."""
        try:
            # Matroska and WebM: of this stream.
            hours, minutes, seconds = self._stream.metadata["DURATION"].split(":")
            exact = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            return exact, max(float(Fraction(3, 2) / self.rate), 0.05)
        except (KeyError, ValueError):
            pass
        if self._stream.duration:
            return float(self._stream.duration * self.time_base), MISSING_SECONDS
        # Of a file with sound the sound may be the longer part.
        alone = len(self._container.streams) == 1 and self._container.duration
        return self._container.duration / 1e6 if alone else None, MISSING_SECONDS

    def _damaged(self, reason: str) -> str:
        return (
            f"{self.path} is damaged or truncated: {reason}. If it plays, repair it first: ffmpeg "
            f"-i {self.path.name} repaired.mp4."
        )


class FrameChunks:
    """Decodes a video ahead in a thread and hands out its frames as chunks.

    Chunks are full except for the last, whatever the pace, so that batches are the same in every
    run.

    Args:
        frames: of the video; closed at the end.
        size: frames of a chunk.
    """

    def __init__(self, frames: Iterator[Frame], size: int) -> None:
        self._frames, self._size = frames, size
        self._queue: Queue[Chunk | Exception | None] = Queue(CHUNKS_AHEAD)
        self._left = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._decode, daemon=True, name="decode")
        self._thread.start()

    def take(self, *, wait: bool) -> Chunk | None:
        """Return the next frames; see ``engine.ChunkSource``.

        Raises:
            BadVideo: the video is damaged there.
        """
        while not self._ended:
            # Signals reach a thread that waits in slices.
            stop.check()
            try:
                found = self._queue.get(timeout=POLL_SECONDS) if wait else self._queue.get_nowait()
            except Empty:
                if wait:
                    continue
                return None
            self._ended = not isinstance(found, Chunk)
            if isinstance(found, Exception):
                raise found
            return found
        return None

    def close(self) -> None:
        """End the thread."""
        self._left.set()
        self._thread.join()

    def _decode(self) -> None:
        number, batch = 0, []
        try:
            for frame in self._frames:
                batch.append(frame)
                if len(batch) == self._size:
                    if not self._put(Chunk(number, tuple(batch))):
                        return
                    number, batch = number + 1, []
            if batch:
                self._put(Chunk(number, tuple(batch)))
            self._put(None)
        except BadVideo as error:
            self._put(error)
        except Exception as error:
            self._put(BadVideo(f"it cannot be read: {type(error).__name__}: {error}"))

    def _put(self, found: Chunk | Exception | None) -> bool:
        """Wait for a place in the queue; return whether anybody still wants it."""
        while not self._left.is_set():
            try:
                self._queue.put(found, timeout=POLL_SECONDS)
            except Full:
                continue
            return True
        return False


class VideoWriter:
    """Writes pictures as an MP4 (H.264) with given time stamps.

    Args:
        path: the file, under a temporary name.
        rate: frames per second, on average.
        time_base: seconds of a unit of time stamps.
    """

    def __init__(self, path: Path, *, rate: Fraction, time_base: Fraction) -> None:
        self.path = path
        self._av = load_av()
        self._container = self._av.open(str(path), "w", format="mp4")
        # As many threads everywhere: the bytes depend on it.
        options = {"crf": QUALITY, "threads": "2"}
        try:
            self._stream = self._container.add_stream(CODEC, rate=rate, options=options)
        except (self._av.FFmpegError, ValueError) as error:
            self._container.close()
            path.unlink(missing_ok=True)
            raise ConfigError(
                f"--save video: this PyAV has no encoder {CODEC} ({error}). Install the wheel of "
                "PyPI, or write frames (--save mask)."
            ) from error
        self._stream.pix_fmt = "yuv420p"
        self._time_base = time_base
        self._step = max(1, round(1 / (rate * time_base)))
        self._last: int | None = None
        self._first: int | None = None
        self._size: tuple[int, int] | None = None
        self.written = 0

    def add(self, pixels: NDArray[np.uint8], pts: int | None) -> None:
        """Encode a picture, uint8 RGB (H, W, 3); odd sides get one more column or row.

        Raises:
            BadVideo: it has another size than the first.
            DataError: it cannot be written.
        """
        height, width = pixels.shape[:2]
        if self._size is None:
            self._size = (height, width)
            self._stream.height, self._stream.width = height + height % 2, width + width % 2
            self._stream.codec_context.time_base = self._time_base
        if self._size != (height, width):
            raise BadVideo(
                f"the size of its frames changes from {self._size[1]}x{self._size[0]} to "
                f"{width}x{height}; write frames (--save mask) instead of a video"
            )
        even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(even, format="rgb24")
        frame.time_base, frame.pts = self._time_base, self._next_pts(pts)
        self._encode(frame)

    def _next_pts(self, pts: int | None) -> int:
        """Return a time stamp after the last one, from 0."""
        if self._last is None:
            self._first, self._last = pts, 0
        elif pts is not None and self._first is not None and pts - self._first > self._last:
            self._last = pts - self._first
        else:
            self._last += self._step
        return self._last

    def finish(self, expected: int) -> None:
        """Write what is left and close the file.

        Raises:
            DataError: it has not as many frames as were given.
        """
        self._encode(None)
        self._container.close()
        if self.written != expected:
            raise DataError(f"{self.path} got {self.written} of {expected} frames.")

    def discard(self) -> None:
        """Close the file, finished or not."""
        # Closing writes the index; an encoder without a frame, or a full disk, fails there again.
        with suppress(self._av.FFmpegError, OSError, ValueError):
            self._container.close()

    def _encode(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self.written += 1
                self._container.mux(packet)
        except self._av.FFmpegError as error:
            reason = error.strerror or error
            raise DataError(f"{self.path} could not be written: {reason}.") from error


def smoothing_weight(value: float) -> float:
    """Return the weight of the past of ``--smooth``.

    Raises:
        ConfigError: it is not in 0..1, 1 excluded.
    """
    if not (math.isfinite(value) and 0 <= value < 1):
        raise ConfigError(
            f"--smooth must be at least 0 (off) and below 1; {value:g} is not. 0.5 weighs a frame "
            "as much as all before it."
        )
    return value
