"""Compositions: exact masks, equal bytes for equal seeds, decoys without labels, one camera."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.labels import VOID
from camoxpert.errors import ConfigError, DataError
from camoxpert.synthesis.compose.backgrounds import BackgroundIndex, describe, index_of
from camoxpert.synthesis.compose.cached import Source, backgrounds_of, objects_of
from camoxpert.synthesis.compose.cutting import MARGIN
from camoxpert.synthesis.compose.draw import draw_composition
from camoxpert.synthesis.compose.library import CutPicture, ObjectLibrary, cut_picture, library_of
from camoxpert.synthesis.compose.pipeline import compose_one, read_material
from camoxpert.synthesis.compose.records import (
    Composed,
    ComposeSettings,
    Composition,
    Look,
    Shape,
)
from camoxpert.synthesis.toy import toy_pair

SIDE = 64
PLAIN = ComposeSettings(size=SIDE, edits=0, distractors=0, occluders=0)
Picture = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """Return pictures with an object of a fifth of their area or less."""
    return [toy_pair(7, i, size=SIDE, object_size=(0.1, 0.2)) for i in range(4)]


@pytest.fixture(scope="module")
def objects(pictures: list[Picture]) -> ObjectLibrary:
    return library_of(cut_picture(str(i), *picture) for i, picture in enumerate(pictures))


@pytest.fixture(scope="module")
def plain_backgrounds(pictures: list[Picture]) -> BackgroundIndex:
    """Return the same pictures, described as if they showed no object."""
    return index_of(describe(str(i), image) for i, (image, _) in enumerate(pictures))


@pytest.fixture(scope="module")
def own_backgrounds(pictures: list[Picture]) -> BackgroundIndex:
    return index_of(describe(str(i), *picture) for i, picture in enumerate(pictures))


def compose(
    composition: Composition,
    pictures: list[Picture],
    objects: ObjectLibrary,
    *,
    masks: bool = False,
) -> Composed:
    entry = objects.entries[composition.paste.number]
    cutout = cut_picture("", *pictures[int(entry.name.split("#")[0])]).cutouts[entry.part]
    image, mask = pictures[composition.background]
    texture = pictures[max(composition.distractor_background, 0)][0]
    return compose_one(
        composition,
        cutout.pixels,
        image,
        background_mask=mask if masks else None,
        texture_RGB=texture,
    )


def white_object(*, cut: bool = False) -> tuple[ObjectLibrary, CutPicture]:
    """Return a white disc with a tail on black; ``cut``: the picture's left edge cuts it."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (0 if cut else 30, 32), 16, 255, -1)
    cv2.line(mask, (30, 32), (58, 20), 255, 2)
    image = np.repeat(mask[..., None], 3, 2)
    picture = cut_picture("white", image, mask)
    return library_of([picture]), picture


def test_equal_seeds_give_equal_bytes(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    settings = replace(ComposeSettings(size=SIDE), difficulty=(0.5, 0.8), candidates=3)
    made = [
        [
            compose(
                draw_composition(seed, index, settings, objects, plain_backgrounds),
                pictures,
                objects,
            )
            for index in range(4)
        ]
        for seed in (1, 1, 2)
    ]
    for first, again, other in zip(*made, strict=True):
        assert first.encoded == again.encoded and (first.mask == again.mask).all()
        assert first.encoded != other.encoded
    assert len({one.encoded for one in made[0]}) == 4


def test_every_object_is_used_before_any_is_used_again(
    objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    drawn = [
        draw_composition(3, index, PLAIN, objects, plain_backgrounds).paste.number
        for index in range(2 * len(objects))
    ]
    for part in (drawn[: len(objects)], drawn[len(objects) :]):
        assert sorted(part) == list(range(len(objects)))


@pytest.mark.parametrize("occluders", [0.0, 1.0])
def test_the_mask_is_where_the_painted_object_covers_more_than_half(occluders: float) -> None:
    objects, picture = white_object()
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    backgrounds = index_of([describe("black", black)])
    settings = replace(
        PLAIN, occluders=occluders, colour=(0, 0), gradient=0, object_size=(0.05, 0.2)
    )
    for index in range(12):
        composition = draw_composition(1, index, settings, objects, backgrounds)
        # White on black: what is painted is the visible share of the object itself.
        made = compose_one(composition, picture.cutouts[0].pixels, black, camera=False)
        painted = made.image[..., 0]
        certain = np.abs(painted.astype(int) - 127.5) > 1
        assert ((painted > 127) == (made.mask == 255))[certain].all()
        assert ((made.alpha > 127) == (made.mask == 255)).all()
        assert (
            certain.mean() > 0.99
            and (made.mask == 255).any()
            and set(np.unique(made.mask)) <= {0, 255}
        )


def test_an_occluder_is_background_and_half_of_the_object_stays_visible() -> None:
    objects, picture = white_object()
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    settings = replace(PLAIN, occluders=1, object_size=(0.1, 0.2), colour=(0, 0), gradient=0)
    backgrounds = index_of([describe("black", black)])
    hidden = 0
    for index in range(12):
        composition = draw_composition(1, index, settings, objects, backgrounds)
        with_, without = (
            compose_one(c, picture.cutouts[0].pixels, black, camera=False)
            for c in (composition, replace(composition, occluders=()))
        )
        covered = (without.mask == 255) & (with_.image[..., 0] < 100)
        assert not with_.mask[covered].any()
        assert 0.5 <= with_.visible <= 1
        assert with_.visible == pytest.approx((with_.mask > 0).sum() / (without.mask > 0).sum())
        hidden += int(covered.sum())
    assert hidden > 100


def test_an_edit_leaves_traces_and_no_object(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    for index in range(6):
        composition = draw_composition(
            1, index, replace(PLAIN, edits=1), objects, plain_backgrounds
        )
        made = compose(composition, pictures, objects)
        assert composition.kind == "edit" and not made.mask.any() and not made.alpha.any()
        assert made.difficulty is None and made.visible == 0
        # The same composition with an object has one.
        assert compose(replace(composition, kind="object"), pictures, objects).mask.any()


def test_an_edit_changes_pixels_within_its_outline_only() -> None:
    objects, picture = white_object()
    image, _ = toy_pair(3, 1, size=SIDE)
    settings = replace(PLAIN, edits=1, crop=(1, 1))
    composition = draw_composition(1, 0, settings, objects, index_of([describe("toy", image)]))
    cutout = picture.cutouts[0].pixels
    made = compose_one(composition, cutout, image, camera=False)
    outline = compose_one(replace(composition, kind="object"), cutout, image, camera=False).alpha
    changed = (made.image != image).any(2)
    assert changed[outline > 127].mean() > 0.5
    assert not changed[outline == 0].any()


def test_a_distractor_is_salient_and_labelled_background(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    seen = 0
    for index in range(6):
        settings = replace(PLAIN, distractors=1)
        composition = draw_composition(1, index, settings, objects, plain_backgrounds)
        assert composition.distractor is not None and composition.distractor_background >= 0
        made = compose(composition, pictures, objects)
        without = compose(replace(composition, distractor=None), pictures, objects)
        assert (made.mask == without.mask).all()
        far = cv2.dilate(made.mask, np.ones((25, 25), np.uint8)) == 0
        seen += int((np.abs(made.image.astype(int) - without.image).max(2) > 40)[far].sum())
    assert seen > 100


def test_background_objects_stay_objects(
    pictures: list[Picture], objects: ObjectLibrary, own_backgrounds: BackgroundIndex
) -> None:
    kept = 0
    for index in range(12):
        settings = replace(PLAIN, others="keep", crop=(1, 1), distractors=1)
        composition = draw_composition(1, index, settings, objects, own_backgrounds)
        composition = replace(composition, distractor=None)
        made = compose(composition, pictures, objects, masks=True)
        own = pictures[composition.background][1] == 255
        assert (made.mask[own] == 255).all()
        assert (made.mask == np.where(own | (made.alpha > 127), 255, 0)).all()
        assert made.others == int((own & (made.alpha <= 127)).sum())
        kept += made.others
    assert kept > 0


@pytest.mark.parametrize("others", ["avoid", "keep"])
def test_an_edit_shows_no_object_at_all(
    others: str, objects: ObjectLibrary, pictures: list[Picture]
) -> None:
    image = np.concatenate([pictures[0][0], pictures[1][0]], 1)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[10:30, 4:20] = 255
    settings = replace(PLAIN, others=others, edits=1)
    index = index_of([describe("left", image, mask)])
    for number in range(4):
        composition = draw_composition(1, number, settings, objects, index)
        left, top, right, bottom = composition.crop
        assert composition.kind == "edit" and not mask[top:bottom, left:right].any()
        assert min(right - left, bottom - top) >= SIDE // 2
    # Where there is no room without one, it is no edit.
    mask[::16] = 255
    index = index_of([describe("full", image, mask)])
    assert draw_composition(1, 0, settings, objects, index).kind == "object"


def test_what_stands_before_an_object_of_the_background_hides_it(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    settings = replace(PLAIN, occluders=1, distractors=1, crop=(1, 1), object_size=(0.1, 0.2))
    hidden = {"occluders": 0, "distractor": 0}
    for index in range(6):
        composition = draw_composition(1, index, settings, objects, plain_backgrounds)
        image = pictures[composition.background][0]
        full = np.full((SIDE, SIDE), 255, np.uint8)
        entry = objects.entries[composition.paste.number]
        cutout = cut_picture("", *pictures[int(entry.name)]).cutouts[entry.part].pixels
        bare, behind, before = (
            compose_one(c, cutout, image, background_mask=full, camera=False)
            for c in (
                replace(composition, occluders=(), distractor=None),
                replace(composition, occluders=()),
                replace(composition, distractor=None),
            )
        )
        assert (bare.mask == 255).all()
        for name, made in (("distractor", behind), ("occluders", before)):
            away = made.mask == 0
            # What hides an object has changed the picture there.
            assert not away.any() or (made.image != bare.image).any(2)[away].mean() > 0.9
            hidden[name] += int(away.sum())
    assert min(hidden.values()) > 100


def test_a_part_without_objects_is_preferred(
    pictures: list[Picture], objects: ObjectLibrary
) -> None:
    """The object lies at the left; the right two thirds are free."""
    image = np.concatenate([pictures[0][0], pictures[1][0], pictures[2][0]], 1)
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[20:40, 4:20] = 255
    mask[50, 190] = VOID
    backgrounds = index_of([describe("wide", image, mask)])
    for index in range(6):
        composition = draw_composition(1, index, PLAIN, objects, backgrounds)
        left, top, right, bottom = composition.crop
        assert not mask[top:bottom, left:right].any()
        # Nothing of it is wasted: the shown part has at least half of the background's height.
        assert min(right - left, bottom - top) >= SIDE // 2


def test_void_of_the_background_stays_void(objects: ObjectLibrary, pictures: list[Picture]) -> None:
    image = pictures[0][0]
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[4:10, 4:60] = VOID
    settings = replace(PLAIN, others="keep", crop=(1, 1), object_size=(0.02, 0.05))
    composition = draw_composition(1, 0, settings, objects, index_of([describe("v", image, mask)]))
    composition = replace(composition, background=0)
    entry = objects.entries[composition.paste.number]
    cutout = cut_picture("", *pictures[int(entry.name)]).cutouts[0].pixels
    made = compose_one(composition, cutout, image, background_mask=mask)
    assert (made.mask[(mask == VOID) & (made.alpha <= 127)] == VOID).all()
    assert (made.mask == VOID).sum() > 200


def test_noise_is_the_same_on_object_and_background() -> None:
    objects, picture = white_object()
    grey = np.full((SIDE, SIDE, 3), 90, np.uint8)
    flat = picture.cutouts[0].pixels.copy()
    flat[..., :3] = 150
    settings = replace(PLAIN, noise=(6, 6), jpeg=(100, 100), object_size=(0.2, 0.25), colour=(0, 0))
    index = index_of([describe("grey", grey)])
    inside, outside = [], []
    for number in range(4):
        composition = draw_composition(1, number, replace(settings, gradient=0), objects, index)
        made = compose_one(composition, flat, grey)
        values = made.image.astype(float)
        inside.append(values[made.alpha == 255] - 150)
        outside.append(values[made.alpha == 0] - 90)
    first, second = np.concatenate(inside), np.concatenate(outside)
    assert first.std() == pytest.approx(second.std(), rel=0.05)
    # Compression at half resolution for colours leaves about two thirds of it.
    assert 3 < first.std() < 6
    assert abs(first.mean()) < 1 and abs(second.mean()) < 1


def test_the_file_holds_the_pixels_of_the_image(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    made = compose(draw_composition(1, 0, PLAIN, objects, plain_backgrounds), pictures, objects)
    decoded = cv2.imdecode(np.frombuffer(made.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert (decoded == made.image).all()


def test_an_object_cut_by_its_picture_lies_at_that_edge() -> None:
    objects, picture = white_object(cut=True)
    assert objects.entries[0].sides == (True, False, False, False)
    black = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    backgrounds = index_of([describe("black", black)])
    mirrored = 0
    for index in range(8):
        size = (0.02, 0.03) if index % 2 else (0.1, 0.2)
        settings = replace(PLAIN, colour=(0, 0), gradient=0, object_size=size)
        composition = draw_composition(1, index, settings, objects, backgrounds)
        made = compose_one(composition, picture.cutouts[0].pixels, black, camera=False)
        edge = made.mask[:, -1 if composition.paste.flip else 0] == 255
        other = made.mask[:, 0 if composition.paste.flip else -1] == 255
        assert composition.paste.angle == 0 and edge.sum() >= 3 and not other.any()
        # The box of the object begins a quarter of a pixel outside of the picture.
        paste = composition.paste
        half = (objects.entries[0].width / 2 - MARGIN) * paste.scale
        begins = made.mask.shape[1] - 1 - paste.x - half if paste.flip else paste.x - half
        assert begins == pytest.approx(-0.75, abs=0.01)
        # No soft edge where the picture ends.
        rows = np.flatnonzero(edge)
        assert made.alpha[rows[3:-3], -1 if composition.paste.flip else 0].min() > 250
        mirrored += composition.paste.flip
    assert 0 < mirrored < 8


def test_the_candidate_nearest_to_the_target_is_kept(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    settings = replace(PLAIN, difficulty=(0.3, 0.9), candidates=4, noise=(0, 0))
    several = 0
    for index in range(6):
        composition = draw_composition(1, index, settings, objects, plain_backgrounds)
        assert composition.target is not None and 0.3 <= composition.target <= 0.9
        chosen = compose(composition, pictures, objects)
        misses = []
        for look in composition.looks:
            entry = objects.entries[composition.paste.number]
            cutout = cut_picture("", *pictures[int(entry.name)]).cutouts[0].pixels
            one = compose_one(
                replace(composition, looks=(look,)),
                cutout,
                pictures[composition.background][0],
                camera=False,
            )
            assert one.difficulty is not None
            misses.append(abs(one.difficulty - composition.target))
        assert chosen.look == int(np.argmin(misses))
        several += chosen.look > 0
    assert several > 0


def test_an_object_that_nobody_could_see_is_fitted_in_more_weakly() -> None:
    """A disc darker than its background, which full transfer makes vanish."""
    image = np.full((SIDE, SIDE, 3), 130, np.uint8)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (32, 32), 14, 255, -1)
    picture = cut_picture("disc", image // 2, mask)
    settings = replace(PLAIN, colour=(1, 1), gradient=0, angle=0, noise=(0, 0), jpeg=(100, 100))
    composition = draw_composition(
        1, 0, settings, library_of([picture]), index_of([describe("flat", image)])
    )
    cutout = picture.cutouts[0].pixels
    made = compose_one(composition, cutout, image)
    assert made.weakened > 0 and made.difficulty is not None
    # A target above the limit says that this is wanted.
    wanted = compose_one(replace(composition, target=1.0), cutout, image)
    assert wanted.weakened == 0 and wanted.difficulty is not None
    assert wanted.difficulty > 0.88 and wanted.difficulty > made.difficulty


def test_a_composition_can_be_written_down(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    settings = ComposeSettings(size=SIDE, occluders=1, distractors=1, difficulty=(0.5,))
    composition = draw_composition(1, 2, settings, objects, plain_backgrounds)
    row = composition.row() | compose(composition, pictures, objects).row()
    again = json.loads(json.dumps(row))
    assert again["paste"]["name"] == composition.paste.name and again["target"] == 0.5
    assert Look(**again["looks"][0]) == composition.looks[0]
    assert Shape(**again["occluders"][0]) == composition.occluders[0]


def test_large_photographs_are_decoded_smaller_to_the_same_picture(tmp_path: Path) -> None:
    image, mask = (
        cv2.resize(part, (640, 640), interpolation=cv2.INTER_NEAREST)
        for part in toy_pair(4, 2, size=80, object_size=(0.05, 0.1))
    )
    files = tmp_path / "big.jpg", tmp_path / "big.png"
    write_jpeg(files[0], image, quality=97)
    write_png(files[1], mask)
    source = Source("big", *map(str, files))
    (objects, _), (backgrounds, _) = objects_of([source]), backgrounds_of([source])
    assert (backgrounds.entries[0].height, backgrounds.entries[0].width) == (640, 640)
    settings = replace(PLAIN, others="keep", crop=(1, 1))
    composition = draw_composition(1, 3, settings, objects, backgrounds)
    material = read_material(composition, objects, backgrounds)
    assert material.background_RGB.shape[0] < 640
    made, full = (
        compose_one(composition, material.object_RGBA, one, background_mask=other, camera=False)
        for one, other in ((material.background_RGB, material.background_mask), (image, mask))
    )
    assert made.mask.shape == (SIDE, SIDE) and made.others > 50
    assert (made.mask != full.mask).mean() < 0.01
    assert np.abs(made.image.astype(int) - full.image).mean() < 3


def test_without_objects_or_places_the_reason_is_named(
    pictures: list[Picture], objects: ObjectLibrary, plain_backgrounds: BackgroundIndex
) -> None:
    speck = np.zeros((SIDE, SIDE), np.uint8)
    speck[3:6, 3:6] = 255
    none = library_of([cut_picture("speck", pictures[0][0], speck)])
    with pytest.raises(DataError, match="no object to paste: 1 objects under 400 pixels"):
        draw_composition(1, 0, PLAIN, none, plain_backgrounds)
    full = index_of([describe("full", pictures[0][0], np.full((SIDE, SIDE), 255, np.uint8))])
    with pytest.raises(DataError, match="None of the 1 backgrounds"):
        draw_composition(1, 0, PLAIN, objects, full)


@pytest.mark.parametrize(
    "wrong",
    [{"jpeg": (90, 80)}, {"colour": (0.5, 1.5)}, {"edits": 2}, {"size": 8}, {"others": "hide"}],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        ComposeSettings(**wrong)
    value = next(iter(wrong.values()))
    assert str(value[-1] if isinstance(value, tuple) else value) in str(raised.value)
