"""Parts of compositions: cutting, searching, colours, the membrane, the difficulty, the cache."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.labels import VOID
from camoxpert.errors import DataError
from camoxpert.synthesis.compose.backgrounds import describe, index_of, nearest_places
from camoxpert.synthesis.compose.blending import blended, focus, membrane, scene_of, surroundings
from camoxpert.synthesis.compose.cached import Source, backgrounds_of, objects_of
from camoxpert.synthesis.compose.camera import add_noise
from camoxpert.synthesis.compose.colour import colour_map
from camoxpert.synthesis.compose.cutting import (
    MARGIN,
    clean_edge,
    cut_objects,
    read_cutout,
    split_objects,
)
from camoxpert.synthesis.compose.describe import object_features
from camoxpert.synthesis.compose.difficulty import difficulty
from camoxpert.synthesis.compose.reading import resized_mask
from camoxpert.synthesis.compose.records import Look
from camoxpert.synthesis.toy import toy_pair

SIDE = 64


def striped(colour: tuple[int, int, int], *, along: int = 0) -> np.ndarray:
    """Return stripes of a colour and black, horizontal or (along=1) vertical."""
    wave = (np.sin(np.arange(SIDE) * 0.8) + 1) / 2
    plane = np.broadcast_to(wave[:, None] if along == 0 else wave[None], (SIDE, SIDE))
    return (plane[..., None] * np.array(colour)).astype(np.uint8)


def disc(radius: int = 14, *, x: int = 32, y: int = 32) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (x, y), radius, 255, -1)
    return mask


# Cutting


def test_parts_near_each_other_are_one_object_and_distant_ones_are_not() -> None:
    mask = np.zeros((200, 300), bool)
    mask[50:90, 20:60] = True
    mask[50:90, 62:90] = True  # behind a branch of two pixels
    mask[50:90, 150:190] = True
    mask[130:133, 148:151] = True  # a crumb, nearer to the second
    parts = split_objects(mask)
    assert [int(part.sum()) for part in parts] == [40 * 40 + 40 * 28, 40 * 40 + 9]
    assert (np.sum(parts, 0) == mask).all()
    assert split_objects(np.zeros((9, 9), bool)) == []


def test_a_cut_out_covers_the_mask_it_was_cut_by() -> None:
    image, mask = toy_pair(1, 3, size=SIDE, object_size=(0.1, 0.2))
    (cutout,) = cut_objects(image, mask)
    rows, columns = np.nonzero(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    inner = cutout.pixels[MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert ((inner[..., 3] > 127) == (box == 255)).mean() > 0.99
    assert cutout.sides == (False,) * 4


def test_nothing_of_the_old_background_is_left_at_the_edge() -> None:
    """A red disc on blue, whose outermost pixels are mixed: none of them may stay bluish."""
    mask = disc()
    share = cv2.GaussianBlur(mask.astype(np.float32) / 255, (0, 0), 0.7)[..., None]
    image = np.rint(share * [200, 20, 20] + (1 - share) * [20, 20, 200]).astype(np.uint8)
    (mixed,), (cleaned,) = (
        [cutout.pixels for cutout in cutouts]
        for cutouts in (cut_objects(image, mask, rim=0), cut_objects(image, mask))
    )
    visible = cleaned[..., 3] > 0
    assert cleaned[visible][:, 2].max() < 40
    assert mixed[visible][:, 2].max() > 80
    solid = mask == 255
    inside = cv2.erode(mask, np.ones((7, 7), np.uint8)) > 0
    assert (clean_edge(image, solid)[inside] == image[inside]).all()


def test_thin_limbs_keep_their_colours() -> None:
    mask = disc()
    mask[10, 32:60] = 255
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[mask == 255] = (0, 200, 0)
    image[10, 50:60] = (200, 0, 0)
    assert (clean_edge(image, mask == 255)[10, 50:60] == (200, 0, 0)).all()


def test_rgba_pictures_are_cut_outs_and_others_are_refused(tmp_path: Path) -> None:
    image, mask = toy_pair(1, 3, size=SIDE)
    write_png(tmp_path / "good.png", np.dstack([image, mask]))
    write_png(tmp_path / "plain.png", image)
    write_png(tmp_path / "empty.png", np.dstack([image, mask * 0]))
    assert (read_cutout(tmp_path / "good.png").pixels[..., 3] > 127).sum() == (mask > 0).sum()
    with pytest.raises(DataError, match="has no transparency"):
        read_cutout(tmp_path / "plain.png")
    with pytest.raises(DataError, match="transparent everywhere"):
        read_cutout(tmp_path / "empty.png")


def test_a_smaller_mask_holds_what_covers_more_than_half_of_a_pixel() -> None:
    mask = np.zeros((2, 8), np.uint8)
    mask[:, 0:2], mask[0, 2:4], mask[1, 2], mask[0, 4:6] = 255, 255, 255, 255
    mask[1, 7] = VOID
    assert resized_mask(mask, (1, 4)).tolist() == [[255, 255, 0, VOID]]


# Searching


@pytest.mark.parametrize("wanted", ["green", "grey", "upright"])
def test_the_background_that_resembles_the_object_is_found(wanted: str) -> None:
    looks = {
        "green": striped((60, 200, 60)),
        "grey": np.full((SIDE, SIDE, 3), 128, np.uint8),
        "upright": striped((60, 200, 60), along=1),
    }
    # At most half of each is striped, so that the search must also find the place.
    pictures = {name: np.concatenate([np.full_like(p, 20), p], 1) for name, p in looks.items()}
    index = index_of(describe(name, picture) for name, picture in pictures.items())
    (cutout,) = cut_objects(looks[wanted], disc())
    features = object_features(cutout.pixels, SIDE)
    best, *others = nearest_places(index, features, size=1, choices=3)
    assert index.entries[best.background].name == wanted
    assert best.left >= 16 and best.distance < 0.5 * others[0].distance
    # Of the least similar ones, none is it.
    last = nearest_places(index, features, size=1, choices=1, skip=2)
    assert index.entries[last[0].background].name != wanted


def test_no_window_touches_an_object() -> None:
    image, mask = toy_pair(1, 3, size=SIDE)
    single = np.zeros_like(mask)
    single[37, 21] = 1
    for taken in (mask, single):
        windows = describe("", image, taken).windows
        cell = SIDE / 16
        for size, top, left, _ in windows:
            side = (3, 5, 8, 12)[size]
            rows = slice(int(top * cell), int((top + side) * cell))
            assert not taken[rows, int(left * cell) : int((left + side) * cell)].any()
        assert 0 < len(windows) < len(describe("", image).windows)


def test_a_search_looks_in_one_background_or_at_an_edge() -> None:
    pictures = [toy_pair(1, i, size=SIDE)[0] for i in range(3)]
    index = index_of(describe(str(i), picture) for i, picture in enumerate(pictures))
    features = object_features(cut_objects(pictures[0], disc())[0].pixels, SIDE)
    only = nearest_places(index, features, size=0, choices=5, background=2)
    assert [place.background for place in only] == [2]
    edge = nearest_places(
        index, features, size=0, choices=5, sides=(False, False, True, False), trim=False
    )
    assert len(edge) == 3 and all(place.left + place.side == 16 for place in edge)


# Colours and blending


def test_full_strength_gives_the_statistics_of_the_surroundings() -> None:
    rng = np.random.default_rng(0)
    mixing = np.array([[0.05, 0.02, 0.02], [0, 0.05, 0.01], [0, 0, 0.05]])
    own = (rng.normal(size=(2000, 3)) * 0.05 + [0.3, 0.6, 0.3]).astype(np.float32)
    other = (rng.normal(size=(3000, 3)) @ mixing + [0.6, 0.4, 0.2]).astype(np.float32)
    for strength in (0.0, 0.5, 1.0):
        matrix, offset = colour_map(own, other, strength)
        moved = own @ matrix.T + offset
        expected = (1 - strength) * own.mean(0) + strength * other.mean(0)
        np.testing.assert_allclose(moved.mean(0), expected, atol=1e-4)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(other.T), atol=3e-4)
    assert np.abs(np.cov(own.T) - np.cov(other.T)).max() > 1e-3


def test_the_membrane_solves_laplaces_equation() -> None:
    y, x = np.mgrid[:80, :100]
    inside = (y - 40) ** 2 / 900 + (x - 50) ** 2 / 1600 < 1
    # A linear function is harmonic: known on the outline, it is the membrane.
    values = np.dstack([x / 100, y / 80]).astype(np.float32)
    error = np.abs(membrane(values, inside) - values)[inside]
    assert error.mean() < 0.02 and error.max() < 0.06
    # Linear in the values: one membrane serves every colour map.
    both = membrane(2 * values + 1, inside)
    np.testing.assert_allclose(both, 2 * membrane(values, inside) + 1, atol=1e-3)


def test_blending_keeps_the_background_and_meets_it_at_the_outline() -> None:
    alpha = cv2.GaussianBlur(disc().astype(np.float32) / 255, (0, 0), 0.8)
    view = np.full((SIDE, SIDE, 3), 0.3, np.float32)
    view[:, 32:] = 0.7
    pixels = np.full((SIDE, SIDE, 3), 0.9, np.float32)
    around = view[surroundings(alpha > 0.5)]
    scene = scene_of(view, pixels, alpha, around, gradient=True)
    plain = blended(scene, Look(0, 0))
    assert (plain[alpha == 0] == view[alpha == 0]).all()
    np.testing.assert_allclose(plain[32, 32], 0.9, atol=1e-6)
    poisson = blended(scene, Look(0, 1))
    assert np.abs(poisson[32, 20] - 0.3).max() < 0.05 and np.abs(poisson[32, 44] - 0.7).max() < 0.05


def test_a_sharp_object_is_put_out_of_focus_where_its_background_is() -> None:
    rng = np.random.default_rng(1)
    sharp = np.repeat(rng.random((SIDE, SIDE, 1), np.float32), 3, 2)
    soft = cv2.GaussianBlur(sharp, (0, 0), 2)
    alpha = disc().astype(np.float32) / 255
    around = surroundings(alpha > 0.5)
    sharp_scene, soft_scene = (np.rint(image * 255).astype(np.uint8) for image in (sharp, soft))
    assert focus(soft_scene, around, sharp, alpha) >= 1.3
    assert focus(sharp_scene, around, sharp, alpha) == 0
    assert focus(sharp_scene, around, soft, alpha) == 0


# The difficulty


def test_difficulty_by_hand() -> None:
    mask = disc(20)
    grey = np.full((SIDE, SIDE, 3), 100, np.uint8)
    assert difficulty(grey, mask) == 1
    # Half of the object is white: L differs with a divergence of 0.311 bits, a and b do not, and
    # the gradient is left out of the sum by hand: it cannot lower the score.
    image = grey.copy()
    image[(mask > 0) & (np.mgrid[:SIDE, :SIDE][1] < 32)] = 255
    half = 1 - np.sqrt(0.311 / 4)
    assert half - 0.2 < difficulty(image, mask) <= half + 0.02
    image[mask > 0] = (255, 0, 0)
    assert difficulty(image, mask) < 0.15
    with pytest.raises(ValueError, match="needs an object"):
        difficulty(grey, mask * 0)


def test_chance_does_not_make_small_objects_easy() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    small, large = (difficulty(noise, disc(radius)) for radius in (5, 20))
    assert small > 0.8 and large > 0.9


def test_difficulty_rises_with_the_strength_of_the_colour_transfer() -> None:
    background, _ = toy_pair(5, 0, size=SIDE, difficulty=0)
    other, _ = toy_pair(5, 1, size=SIDE, difficulty=0)
    other = 255 - other
    alpha = disc(16).astype(np.float32) / 255
    view, pixels = (image.astype(np.float32) / 255 for image in (background, other))
    around = view[surroundings(alpha > 0.5)]
    scene = scene_of(view, pixels, alpha, around, gradient=False)
    scores = [
        difficulty(np.rint(blended(scene, Look(s, 0)) * 255).astype(np.uint8), alpha > 0.5)
        for s in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.1


# The camera


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy = add_noise(grey, 5.0, np.random.default_rng(0)).astype(float) - 128
    assert noisy.std() == pytest.approx(5, rel=0.02) and abs(noisy.mean()) < 0.05
    assert abs(np.corrcoef(noisy[:, :-1].ravel(), noisy[:, 1:].ravel())[0, 1]) < 0.01
    assert add_noise(grey, 0, np.random.default_rng(0)) is grey


# The cache


def test_only_what_changed_is_described_again(tmp_path: Path) -> None:
    sources = []
    for number in range(3):
        image, mask = toy_pair(1, number, size=SIDE, object_size=(0.1, 0.2))
        files = tmp_path / f"{number}.jpg", tmp_path / f"{number}.png"
        write_jpeg(files[0], image)
        write_png(files[1], mask)
        sources.append(Source(str(number), *map(str, files)))
    cache = tmp_path / "cache"
    fresh, verdict = objects_of(sources)
    assert verdict == "miss: no cache folder was given"
    first, miss = objects_of(sources, cache)
    index, _ = backgrounds_of(sources, cache)
    again, hit = objects_of(sources, cache)
    index_again, hit_too = backgrounds_of(sources, cache)
    assert miss == "miss: nothing was described yet" and hit == hit_too == "hit"
    assert fresh.entries == first.entries == again.entries and len(again) == 3
    assert (fresh.features == again.features).all()
    assert index.entries == index_again.entries
    assert (index.features == index_again.features).all()
    assert (index.windows == index_again.windows).all()

    other, _ = toy_pair(9, 1, size=SIDE)
    write_jpeg(tmp_path / "1.jpg", other, quality=80)
    changed, stale = objects_of(sources, cache)
    assert stale == "stale: 1 of 3 pictures are new or were changed"
    assert (changed.features == first.features).all(1).tolist() == [True, False, True]

    data = (cache / "objects.npz").read_bytes()
    (cache / "objects.npz").write_bytes(data[: len(data) // 2])
    rebuilt, corrupt = objects_of(sources, cache)
    assert corrupt.startswith("corrupt: ") and rebuilt.entries == changed.entries
