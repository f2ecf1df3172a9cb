"""Overlays, cut-outs and panels."""

from __future__ import annotations

import numpy as np
import pytest

from camoxpert.data.files.labels import VOID
from camoxpert.pages import pictures


def test_overlay_tints_inside_only() -> None:
    image = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 255
    drawn = pictures.overlay(image, mask, colour=(200, 0, 0), alpha=0.5)
    assert drawn[10, 10].tolist() == [150, 50, 50]
    assert (drawn[:4] == 100).all() and drawn[5, 10].tolist() == [200, 0, 0]
    assert (image == 100).all()


def test_comparison_has_three_colours() -> None:
    image = np.zeros((30, 30, 3), np.uint8)
    truth, predicted = np.zeros((30, 30), bool), np.zeros((30, 30), bool)
    truth[5:25, 2:18] = True
    predicted[5:25, 12:28] = True
    picture = pictures.compare(image, predicted, truth)
    assert picture[15, 15].argmax() == 1  # both: green
    assert picture[15, 24].argmax() == 0  # false alarm: red
    assert picture[15, 6].argmax() == 2  # missed: blue


def test_cutout_carries_the_probability() -> None:
    cut = pictures.cutout(np.zeros((2, 2, 3), np.uint8), np.array([[0, 0.5], [1, 0.25]]))
    assert cut[..., 3].tolist() == [[0, 128], [255, 64]]


@pytest.mark.parametrize("size", [(40, 60), (300, 20), (10, 400)])
def test_panel_has_four_pictures_of_one_height(size: tuple[int, int]) -> None:
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2] = 255
    picture = pictures.panel(np.zeros((*size, 3), np.uint8), mask, mask / 255.0, height=100)
    assert picture.shape[0] == 120 and (picture.shape[1] + 2) % 4 == 0


def test_what_nobody_labelled_is_no_false_alarm() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4], mask[:, 4:6] = 255, VOID
    found = np.zeros((8, 8), np.float32)
    found[:, :6] = 1
    shown = pictures.panel(image, mask, found, height=64)
    assert not _shows(shown, pictures.FALSE_POSITIVE)
    several = pictures.comparison_panel(
        image, mask == 255, {"a": found > 0.5}, void_HW=mask == VOID, height=64
    )
    assert not _shows(several, pictures.FALSE_POSITIVE)
    # Control: without void the same prediction is too large.
    mask[mask == VOID] = 0
    assert _shows(pictures.panel(image, mask, found, height=64), pictures.FALSE_POSITIVE)
    several = pictures.comparison_panel(image, mask == 255, {"a": found > 0.5}, height=64)
    assert _shows(several, pictures.FALSE_POSITIVE)


def _shows(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Return whether pixels are much more of a tint's first channel than of the others."""
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    assert colour[0] > max(colour[1:])
    return bool(((red - green > 40) & (red - blue > 40)).any())
