"""Relight and compose training images while they are read: ``data.augment.relight``, ``.compose``.

The pictures are those of the run, at the size to which they were decoded. Both come before all
other augmentation: they change the scene, which is photographed afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from torch import Tensor

from camoxpert.errors import DataError
from camoxpert.synthesis.compose.backgrounds import describe, index_of
from camoxpert.synthesis.compose.draw import draw_composition
from camoxpert.synthesis.compose.library import cut_picture, library_of, list_objects
from camoxpert.synthesis.compose.pipeline import compose_one
from camoxpert.synthesis.compose.records import ComposeSettings, Composition, Shape
from camoxpert.synthesis.relight.draw import RelightSettings, draw_light
from camoxpert.synthesis.relight.pipeline import relight

OBJECT = 255
LIGHTS = RelightSettings()
COMPOSITIONS = ComposeSettings(others="keep", crop=(1.0, 1.0))
LEAST_SHARE, LEAST_PIXELS = 0.003, 48
"""Smallest object that is pasted, as a share of the image and in pixels: at 352 px, 372."""


@dataclass(frozen=True)
class OnlineScenes:
    """Makes new scenes of training images; see ``data.samples.scenes.Scenes``.

    Attributes:
        light: from what lights are drawn.
        composition: from what compositions are drawn; its ``size`` is that of the images.
    """

    light: RelightSettings = LIGHTS
    composition: ComposeSettings = COMPOSITIONS

    def compose(self, pixels: np.ndarray, guest: np.ndarray, seed: int) -> np.ndarray:
        """Paste an object of another image where the image resembles it.

        The image itself is returned where the other has no object to paste, or every part of it
        shows an object already.

        Args:
            pixels, guest: uint8 (S, S, 4), RGB and mask; they are not changed.
            seed: everything is drawn from it.

        Returns:
            uint8 (S, S, 4); the mask holds the pasted object and what remains visible of those
            that the image had.
        """
        image, mask = np.ascontiguousarray(pixels[..., :3]), cv2.extractChannel(pixels, 3)
        side = len(image)
        giver = cut_picture("guest", np.ascontiguousarray(guest[..., :3]), guest[..., 3])
        smallest = max(LEAST_PIXELS, round(LEAST_SHARE * side**2))
        objects = library_of([list_objects(giver, smallest=smallest)])
        backgrounds = index_of([describe("host", image, mask)])
        settings = replace(self.composition, size=side)
        try:
            drawn = draw_composition(seed, 0, settings, objects, backgrounds)
        except DataError:
            return pixels
        cutout = giver.cutouts[objects.entries[drawn.paste.number].part]
        made = compose_one(
            whole_picture(drawn, side), cutout.pixels, image, background_mask=mask, camera=False
        )
        return np.dstack([made.image, made.mask])

    def relight(self, pixels_BHWC: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return images in a new light; masks and what lies outside of shadows stay as they are.

        Args:
            pixels_BHWC: uint8 (B, S, S, 4), RGB and mask, on any device.
            seeds: of the lights.
        """
        planes = pixels_BHWC.permute(0, 3, 1, 2)
        # Void pixels are not known to show an object.
        masks = (planes[:, 3:] == OBJECT).to(torch.uint8) * OBJECT
        lights = [draw_light(seed, 0, self.light) for seed in seeds]
        relit = relight(planes[:, :3].contiguous(), masks, lights).images_B3HW
        return torch.cat([relit, planes[:, 3:]], 1).permute(0, 2, 3, 1)


def whole_picture(drawn: Composition, side: int) -> Composition:
    """Return a composition that shows its whole background, a square, instead of a part of it."""
    left, top, _, _ = drawn.crop

    def moved(shape: Shape) -> Shape:
        return replace(shape, x=shape.x + left, y=shape.y + top)

    paste = replace(drawn.paste, x=drawn.paste.x + left, y=drawn.paste.y + top)
    return replace(
        drawn,
        crop=(0, 0, side, side),
        height=side,
        width=side,
        paste=paste,
        occluders=tuple(map(moved, drawn.occluders)),
        distractor=None if drawn.distractor is None else moved(drawn.distractor),
        clones=tuple((x * drawn.width / side, y * drawn.height / side) for x, y in drawn.clones),
    )
