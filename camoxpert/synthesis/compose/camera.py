"""Take the picture: the same noise and compression for everything in it."""

from __future__ import annotations

import cv2
import numpy as np

from camoxpert.errors import DataError


def add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of this deviation in grey levels; uint8 (H, W, 3) in and out."""
    if sigma <= 0:
        return image
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise *= np.float32(sigma)
    noise += image
    return np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def compress(image: np.ndarray, quality: int) -> tuple[np.ndarray, bytes]:
    """Return a picture as it is after JPEG, and the file; uint8 (H, W, 3) RGB."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise DataError(f"OpenCV could not encode a picture of {image.shape[1]}x{image.shape[0]}.")
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return np.ascontiguousarray(decoded[..., ::-1]), data.tobytes()
