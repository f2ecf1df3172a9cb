"""Scenes with two hidden objects, and the pairs that ask for one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from camoxpert.cli import main
from camoxpert.data.files.image_io import read_mask
from camoxpert.data.files.manifest import load_eval
from camoxpert.synthesis.toy_scenes import KINDS, PAIRS, toy_scene


def test_a_scene_has_two_separate_objects_of_different_kinds() -> None:
    seen: Counter[str] = Counter()
    for index in range(2 * len(PAIRS)):
        image, masks = toy_scene(3, index, size=64)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        first, second = (mask > 0 for mask in masks.values())
        assert 0.01 < first.mean() < 0.15 and 0.01 < second.mean() < 0.15
        assert not (first & second).any()
        seen.update(list(masks))
    # Every kind is asked for equally often.
    assert seen == dict.fromkeys(KINDS, 8)


def test_a_scene_is_a_function_of_its_arguments() -> None:
    again = [toy_scene(1, 4, size=32, difficulty=0.3) for _ in range(2)]
    assert np.array_equal(again[0][0], again[1][0])
    assert not np.array_equal(again[0][0], toy_scene(2, 4, size=32, difficulty=0.3)[0])
    # The difficulty changes neither outlines nor places.
    harder = toy_scene(1, 4, size=32, difficulty=0.9)
    for kind, mask in again[0][1].items():
        assert np.array_equal(mask, harder[1][kind])


def test_both_objects_are_hidden_alike() -> None:
    """The mean colour of an object is that of its surroundings, whatever its kind."""
    gaps = {kind: [] for kind in KINDS}
    for index in range(40):
        image, masks = toy_scene(0, index, size=64, difficulty=1.0)
        ground = image[(sum(masks.values()) == 0)].mean(0)
        for kind, mask in masks.items():
            gaps[kind].append(np.abs(image[mask > 0].mean(0) - ground).max())
    assert max(float(np.mean(values)) for values in gaps.values()) < 12


def test_each_scene_becomes_two_pairs_with_the_kind_in_the_name(tmp_path: Path) -> None:
    words = ["--referring", "--train", "4", "--test", "3", "--size", "32"]
    assert main(["synthesize", "toy", str(tmp_path / "data"), *words]) == 0
    (pairs,) = (m.pairs for m in load_eval([tmp_path / "data"], split="train").values())
    assert len(pairs) == 4
    by_scene: dict[str, list] = {}
    for pair in pairs:
        by_scene.setdefault(pair.name.split("_")[1], []).append(pair)
    for first, second in by_scene.values():
        assert {first.group, second.group} <= set(KINDS) and first.group != second.group
        assert first.image.read_bytes() == second.image.read_bytes()
        assert not (read_mask(first.mask) & read_mask(second.mask)).any()
    (tests,) = (m.pairs for m in load_eval([tmp_path / "data"]).values())
    assert len(tests) == 3
    # No scene is in both splits.
    assert not {pair.name.split("_")[1] for pair in tests} & by_scene.keys()


def test_an_object_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--referring", "--object-size", "0.01", "0.02"]
    assert main(["synthesize", "toy", str(tmp_path / "data"), *words]) == 2
    assert "--referring draws two" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="at least 32"):
        toy_scene(0, 0, size=16)
