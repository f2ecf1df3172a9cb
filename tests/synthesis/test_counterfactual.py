"""``synthesize counterfactual``: what is taken out, what stays, and how it is filled."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.cli import main
from camoxpert.data.files.image_io import read_image, read_mask, read_pair, write_jpeg, write_png
from camoxpert.data.files.manifest import load_train
from camoxpert.synthesis import erase as erasing_module
from camoxpert.synthesis import reading
from camoxpert.synthesis.compose.blending import ring_around
from camoxpert.synthesis.erase import NARROWEST, _Filler, erase, moved_away, widened
from camoxpert.synthesis.toy import generate_toy, toy_pair


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray]:
    """Return a picture of fine texture on a slope of light, and an object in it."""
    rng = np.random.default_rng(0)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (96, 128)).astype(np.float32), (0, 0), 1.0)
    light = np.linspace(80, 150, 128)[None, :, None] + np.zeros((96, 1, 3))
    image = light + 25 * grain[..., None] / grain.std()
    mask = np.zeros((96, 128), bool)
    mask[36:60, 20:44] = True
    image[mask] = (250, 20, 20)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _energy(image: np.ndarray, where: np.ndarray) -> float:
    fine = image.astype(np.float32) - cv2.GaussianBlur(image, (0, 0), 2.0)
    return float(np.square(fine[where]).mean())


def test_texture_is_copied_and_light_continues(scene) -> None:
    image, mask = scene
    found = erase(image, mask, mask, np.random.default_rng(1))
    assert (found.hole & mask).sum() == mask.sum() and found.smooth == 0
    far = cv2.dilate(found.hole.view(np.uint8), np.ones((9, 9), np.uint8)) == 0
    assert np.array_equal(found.image[far], image[far]), "the rest stays as it is"
    inner = cv2.erode(mask.view(np.uint8), np.ones((5, 5), np.uint8)) > 0
    # As sharp as the background; diffusion, the control, leaves a smooth patch.
    background = _energy(image, far)
    assert 0.6 * background < _energy(found.image, inner) < 1.5 * background
    blurred = cv2.inpaint(image, found.hole.view(np.uint8), 3, cv2.INPAINT_TELEA)
    assert _energy(blurred, inner) < 0.3 * background
    # Nothing red is left, and the light is that of the place.
    expected = np.linspace(80, 150, 128)[20:44].mean()
    assert abs(float(found.image[mask].mean()) - expected) < 12
    assert found.image[mask][:, 0].max() < 225


def test_equal_draws_give_equal_pictures_and_others_differ(scene) -> None:
    image, mask = scene
    one, same, other = (erase(image, mask, mask, np.random.default_rng(s)) for s in (1, 1, 5))
    assert np.array_equal(one.image, same.image)
    assert not np.array_equal(one.image, other.image)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_shift_is_that_of_a_plain_search(seed: int) -> None:
    """At borders, where a part of the rim has no counterpart, and beside barred pixels."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (400, 300, 3)).astype(np.uint8)
    part, barred = np.zeros((400, 300), bool), np.zeros((400, 300), bool)
    top, left = (0, 7) if seed % 2 else (150, 120)
    part[top : top + 30, left : left + 40] = True
    part[top : top + 8, left : left + 9] = False
    barred[rng.integers(0, 400, 40), rng.integers(0, 300, 40)] = True
    filler = _Filler(image, part, barred | part, rng)
    reach = round(np.ceil(1 / filler.scale))
    assert reach > 1
    coarse = [(200.4, 30.0), (365.6, 200.2), (2.0, 220.0), (-150.0, 60.0)][seed % 4]
    rim = ring_around(part, NARROWEST) & ~part
    best, least = None, np.inf
    for dy in range(round(coarse[0]) - reach, round(coarse[0]) + reach + 1):
        for dx in range(round(coarse[1]) - reach, round(coarse[1]) + reach + 1):
            y, x = np.nonzero(part)
            y, x = y + dy, x + dx
            if min(y.min(), x.min()) < 0 or y.max() > 399 or x.max() > 299:
                continue
            if filler.barred[y, x].any():
                continue
            pairs = [(a, b) for a, b in np.argwhere(rim) if 0 <= a + dy < 400 and 0 <= b + dx < 300]
            a, b = np.array(pairs).T
            error = np.square(filler.pixels[a + dy, b + dx] - filler.pixels[a, b]).mean()
            if error < least:
                best, least = (dy, dx), error
    assert filler._refined(part, coarse) == best
    if seed in (0, 1, 4, 5):
        assert best is not None


def test_too_much_is_refused(scene) -> None:
    image, _ = scene
    mask = np.ones(image.shape[:2], bool)
    mask[:10] = False
    with pytest.raises(ValueError, match="would be taken out"):
        erase(image, mask, mask, np.random.default_rng(0))
    assert moved_away(mask, mask, np.random.default_rng(0)) is None


def test_a_large_hole_is_filled_part_by_part() -> None:
    image, _ = toy_pair(0, 1, size=64)
    mask = np.zeros((64, 64), bool)
    mask[8:52, 8:52] = True
    found = erase(image, mask, mask, np.random.default_rng(0))
    assert found.parts > 1 and found.image.shape == image.shape


def test_a_background_in_shreds_is_refused_instead_of_filled_for_hours(monkeypatch) -> None:
    image = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    bars = np.zeros((200, 200), bool)
    bars[::17] = True
    monkeypatch.setattr(erasing_module, "MOST_PARTS", 8)
    with pytest.raises(ValueError, match="too small to be copied from"):
        erase(image, bars, bars, np.random.default_rng(1))


def test_what_is_diffused_depends_on_its_surroundings_alone(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 255, (160, 200, 3), np.uint8), (0, 0), 3)
    part = np.zeros((160, 200), bool)
    part[70:77, 90:98] = True
    found = []
    for around in (erasing_module.AROUND, 1000):
        monkeypatch.setattr(erasing_module, "AROUND", around)
        filler = _Filler(image, part, part, rng)
        filler._diffuse(part)
        found.append(filler.pixels[part])
    assert np.array_equal(*found)


@pytest.mark.parametrize("seed", range(5))
def test_the_moved_shape_has_room_and_its_size(scene, seed: int) -> None:
    _, mask = scene
    found = moved_away(mask, mask, np.random.default_rng(seed))
    assert found is not None and found.sum() == mask.sum()
    assert not (widened(found) & mask).any()
    # Where only less fits, it is smaller.
    taken = np.ones_like(mask)
    taken[2:26, 60:84] = False
    smaller = moved_away(mask, taken, np.random.default_rng(seed))
    assert smaller is not None and 0 < smaller.sum() < mask.sum()
    assert not (smaller & taken).any()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("erased")
    generate_toy(root / "toys", num_train=4, num_test=1, size=48, difficulty=0.3, seed=4)
    assert _make(root / "toys", root / "made", "--page") == 0
    return root / "toys", root / "made"


def _make(data: Path, out: Path, *words: str) -> int:
    base = ["synthesize", "counterfactual", "--dataset-path", str(data), "-o", str(out)]
    return main([*base, *words, *(() if "--page" in words else ("--no-page",))])


def test_pairs_of_removed_and_control(made) -> None:
    data, out = made
    real = {pair.name: read_pair(pair.image, pair.mask) for pair in load_train([data]).pairs}
    found = {pair.name: read_pair(pair.image, pair.mask) for pair in load_train([out]).pairs}
    assert set(found) == {f"{name}_{made}" for name in real for made in ("removed", "control")}
    for name, (image, mask) in real.items():
        (removed, nothing), (control, kept) = found[f"{name}_removed"], found[f"{name}_control"]
        inside = mask == 255
        assert not nothing.any() and np.array_equal(kept, mask)
        gone, left = (
            np.abs(picture.astype(int) - image)[inside].mean() for picture in (removed, control)
        )
        assert gone > 3 * left, "the control keeps the object"
    rows = [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()[1:]]
    assert {row["kind"] for row in rows} == {"counterfactual"} and len(rows) == 8
    areas = {row["image"]: row["parameters"]["erased_fraction"] for row in rows}
    for name in real:
        ours = [areas[f"TrainDataset/Imgs/{name}_{kind}.jpg"] for kind in ("removed", "control")]
        assert 0.3 < ours[1] / ours[0] < 1.3
    assert "part of the background taken out" in (out / "synthesis.html").read_text()


def test_the_same_bytes_whatever_the_batch_and_no_work_twice(made, tmp_path, capsys) -> None:
    data, out = made
    assert _make(data, tmp_path / "again", "--batch-size", "1") == 0
    for path in sorted((out / "TrainDataset").rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(out)).read_bytes() == path.read_bytes()
    capsys.readouterr()
    assert _make(data, tmp_path / "again") == 0
    assert "0 images made, 8 were there already" in " ".join(capsys.readouterr().out.split())
    assert _make(data, tmp_path / "again", "--seed", "3") == 2


def test_a_source_is_read_once_for_both_of_its_images(made, tmp_path, monkeypatch) -> None:
    read = []

    def counted(image: Path, *rest, **more):
        read.append(image)
        return read_pair(image, *rest, **more)

    monkeypatch.setattr(reading, "read_pair", counted)
    assert _make(made[0], tmp_path / "out") == 0
    assert len(read) == len(set(read)) == 4


def test_sources_without_room_are_named(tmp_path: Path, capsys) -> None:
    image, mask = toy_pair(0, 0, size=48)
    for name, found in (("full", np.full_like(mask, 255)), ("none", np.zeros_like(mask))):
        write_jpeg(tmp_path / "data" / "Imgs" / f"{name}.jpg", image)
        write_png(tmp_path / "data" / "GT" / f"{name}.png", found)
    assert _make(tmp_path / "data", tmp_path / "out") == 3
    said = " ".join(capsys.readouterr().err.split())
    assert "would be taken out" in said and "no room for the object's shape" in said
    assert "shows no object" in said
    assert read_mask(tmp_path / "data" / "GT" / "none.png").max() == 0
    assert read_image(tmp_path / "data" / "Imgs" / "full.jpg").shape == (48, 48, 3)
