"""New scenes from training images: another light, and objects of other images.

A scene is changed before it is photographed, so before all other augmentation, at the size to which
pairs were decoded. Objects are pasted on the host, where the other image is read; light is changed
where the sample is augmented. Both are drawn with the sample, so that every back end, any number of
workers and a resumed run make the same scenes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from camoxpert.data.samples.draw import Draw
from camoxpert.runtime.device import upload

OBJECT = 255
AT_ONCE = 16
"""Images that are relit together: each takes some 30 MB at 352 px, beside those of a step."""


class Scenes(Protocol):
    """Makes scenes. It is passed in: what makes them is built on this room."""

    def compose(self, pixels: np.ndarray, guest: np.ndarray, seed: int) -> np.ndarray:
        """Return uint8 (S, S, 4), RGB and mask, with an object of ``guest`` in it."""

    def relight(self, pixels_BHWC: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return uint8 (B, S, S, 4), RGB and mask, in new lights; masks stay as they are."""


def guest_of(sample: Draw, place: int, givers: int) -> int | None:
    """Return the position of the image that gives an object to that at ``place``, or None.

    Args:
        sample: the draw of the image that gets it.
        place: its position.
        givers: number of images that give objects; they are the first ones.
    """
    if sample.guest is None or givers < 2:
        return None
    chosen = int(sample.guest * givers)
    return chosen if chosen != place else (chosen + 1) % givers


def relit_one(pixels: np.ndarray, sample: Draw, scenes: Scenes | None) -> np.ndarray:
    """Return a pair, uint8 (S, S, 4), in the light of its draw."""
    if sample.light is None or scenes is None or not (pixels[..., 3] == OBJECT).any():
        return pixels
    with _one_thread():
        # A copy: pixels from a cache cannot be written to, and torch warns of that.
        whole = torch.from_numpy(pixels.copy())[None]
        return scenes.relight(whole, [sample.light])[0].numpy()


def relit(
    pixels_BHWC: Tensor,
    draws: Sequence[Draw],
    scenes: Scenes | None,
    unlabeled: Sequence[bool] | None = None,
) -> Tensor:
    """Return a batch, uint8 (B, S, S, 4), in the light of its draws; the host does not wait.

    Args:
        pixels_BHWC: RGB and mask.
        draws: one per image.
        scenes: what makes them; None leaves all as they are.
        unlabeled: which images have no mask: no object is known in them.
    """
    lights = {
        i: sample.light
        for i, sample in enumerate(draws)
        if sample.light is not None and not (unlabeled and unlabeled[i])
    }
    if scenes is None or not lights:
        return pixels_BHWC
    chosen, changed = list(lights), pixels_BHWC.clone()
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        rows = upload(np.array(part), pixels_BHWC).long()
        made = scenes.relight(pixels_BHWC.index_select(0, rows), [lights[i] for i in part])
        changed.index_copy_(0, rows, made)
    return changed


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as a data worker does: sums over several threads differ in their last bits."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
