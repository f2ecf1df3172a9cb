"""COCO and labelme: run lengths against pycocotools' own, outlines drawn again, stops."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from camoxpert.cli import main
from camoxpert.errors import ConfigError
from camoxpert.inference.annotations import (
    COCO,
    begin_coco,
    encode_counts,
    join_coco,
    run_lengths,
    save_annotations,
)
from camoxpert.inference.ledger import LEDGER
from camoxpert.inference.prediction import Prediction


def decode(text: str, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of compressed counts, after rleFrString of the COCO API."""
    counts: list[int] = []
    place = 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(text[place]) - 48
            value |= (bits & 0x1F) << 5 * shift
            more, place, shift = bool(bits & 0x20), place + 1, shift + 1
            if not more and bits & 0x10:
                value |= -1 << 5 * shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
    flat = np.repeat(np.arange(len(counts)) % 2, counts)
    return flat.reshape(size[1], size[0]).T.astype(bool)


def found(mask: np.ndarray, name: str = "sub/a") -> Prediction:
    return Prediction(name, np.zeros((*mask.shape, 3), np.uint8), mask.astype(np.float32), 0.0)


def squares() -> np.ndarray:
    mask = np.zeros((40, 50), bool)
    mask[3:12, 5:20] = mask[20:36, 28:47] = True
    mask[24:30, 34:40] = False
    return mask


def test_run_lengths_go_down_the_columns() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], bool)
    assert run_lengths(mask).tolist() == [2, 3, 1]
    assert run_lengths(~mask).tolist() == [0, 2, 3, 1]
    assert run_lengths(np.zeros((2, 2), bool)).tolist() == [4]


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([2, 3, 1], "231"),
        ([0, 1], "01"),
        ([6], "6"),
        ([9, 9, 9, 9, 13, 9, 9, 9, 13], "999040L04"),
        ([2, 1, 1, 1, 2, 1, 2, 1, 2, 1, 1, 1, 3, 1, 1, 1], "2110100000O020N0"),
    ],
)
def test_counts_are_those_of_pycocotools(lengths: list[int], text: str) -> None:
    assert encode_counts(np.array(lengths)) == text


def test_any_mask_comes_back() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < p for h, w, p in ((1, 1, 1), (7, 5, 0.5), (90, 130, 0.02))]
    for mask in (*masks, squares(), np.zeros((9, 4), bool), np.ones((3000, 700), bool)):
        text = encode_counts(run_lengths(mask))
        assert np.array_equal(decode(text, mask.shape), mask)
    assert not np.array_equal(decode(encode_counts(run_lengths(squares())), (40, 50)), ~squares())


def test_coco_is_one_annotation_for_an_image_with_an_object(tmp_path: Path) -> None:
    for name, mask in (("sub/a", squares()), ("b", np.zeros((6, 7), bool))):
        save_annotations(found(mask, name), tmp_path, ["coco"], Path(f"/in/{name}.jpg"))
    rows = [{"item": "b", "kinds": ["coco"]}, {"item": "x"}, {"item": "sub/a", "kinds": ["coco"]}]
    join_coco(tmp_path, rows)
    value = json.loads((tmp_path / COCO).read_text())
    assert value["images"] == [
        {"id": 1, "file_name": "b.jpg", "height": 6, "width": 7},
        {"id": 2, "file_name": "sub/a.jpg", "height": 40, "width": 50},
    ]
    (annotation,) = value["annotations"]
    segmentation = annotation.pop("segmentation")
    assert np.array_equal(decode(segmentation["counts"], segmentation["size"]), squares())
    assert annotation == {
        "id": 1, "image_id": 2, "category_id": 1, "area": int(squares().sum()),
        "bbox": [5, 3, 42, 33], "iscrowd": 0, "score": 1.0,
    }  # fmt: skip
    assert value["categories"] == [{"id": 1, "name": "object"}]
    join_coco(tmp_path, [])
    assert json.loads((tmp_path / COCO).read_text())["images"] == []


def test_outlines_drawn_again_are_the_mask_without_its_holes(tmp_path: Path) -> None:
    mask = squares()
    mask[39, 0] = True
    save_annotations(found(mask), tmp_path, ["labelme"], tmp_path / "photos" / "a.jpg")
    value = json.loads((tmp_path / "labelme" / "sub" / "a.json").read_text())
    assert value["imagePath"] == "../../photos/a.jpg" and value["imageData"] is None
    assert (value["imageHeight"], value["imageWidth"]) == (40, 50) and value["version"]
    drawn = np.zeros(mask.shape, np.uint8)
    for shape in value["shapes"]:
        assert shape["shape_type"] == "polygon" and shape["group_id"] == 1
        cv2.fillPoly(drawn, [np.array(shape["points"], np.int32)], 1)
    filled = squares()
    filled[24:30, 34:40] = True
    assert len(value["shapes"]) == 2, "a single pixel is no polygon"
    assert np.array_equal(drawn.astype(bool), filled)


def test_a_call_that_changes_something_leaves_no_old_coco(tmp_path: Path) -> None:
    join_coco(tmp_path, [])
    assert not begin_coco(tmp_path, wanted=True, changes=False)
    assert not begin_coco(tmp_path, wanted=False, changes=False)
    assert begin_coco(tmp_path, wanted=False, changes=True) and not (tmp_path / COCO).exists()
    assert begin_coco(tmp_path, wanted=True, changes=False)
    assert not begin_coco(tmp_path, wanted=False, changes=True)


def test_pictures_alone_are_saved_by_a_prediction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown picture 'coco'"):
        found(squares()).save(tmp_path, ["coco"])


def test_a_stopped_call_ends_with_the_same_bytes(
    tiny_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for n in range(6):
        pixels = rng.integers(0, 256, (20 + n, 30, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"p{n}.png"), pixels)
    monkeypatch.chdir(tmp_path)
    words = ["predict", str(tiny_run), "photos", "--save", "coco", "labelme", "mask"]
    words += ["--batch-size", "2", "--threshold", "0.2", "-o"]
    assert main([*words, "whole"]) == 0
    # As after a stop: two chunks of three, and no coco.json.
    assert main([*words, "parts", "--limit", "4"]) == 0
    (tmp_path / "parts" / COCO).unlink()
    assert main([*words, "parts"]) == 0
    trees = [
        {
            p.relative_to(out): p.read_bytes()
            for p in Path(out).rglob("*.json")
            if p.stem != "predict"
        }
        for out in ("whole", "parts")
    ]
    assert trees[0] == trees[1] and len(trees[0]) == 13
    assert len(json.loads((tmp_path / "parts" / COCO).read_text())["images"]) == 6
    assert (tmp_path / "parts" / LEDGER).is_file()
    # Nothing to do: only what is missing is joined again.
    before = (tmp_path / "parts" / COCO).stat().st_mtime_ns
    assert main([*words, "parts"]) == 0
    assert (tmp_path / "parts" / COCO).stat().st_mtime_ns == before
    (tmp_path / "parts" / COCO).write_text('{"images": []}')
    assert main([*words, "parts"]) == 3
    assert "was not written by `predict`" in " ".join(capsys.readouterr().err.split())
