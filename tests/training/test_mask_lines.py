"""The start of a training says what is odd about the masks; doctor says it about all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from camoxpert.config import build_config
from camoxpert.doctor.dataset import examine_data
from camoxpert.runtime.processes import World
from camoxpert.training.data import MASKS_LOOKED_AT, find_data

Y, X = np.mgrid[:48, :64]
BODY = (Y - 24) ** 2 + (X - 30) ** 2 < 100
GROWN = cv2.dilate(BODY.view(np.uint8), np.ones((3, 3), np.uint8)) > 0
LEVELS: dict[str, np.ndarray] = {
    "plain": np.where(BODY, 255, 0),
    "inverted": np.where(BODY, 0, 255),
    "empty": np.zeros((48, 64)),
    "full": np.full((48, 64), 255),
    "void": np.where(BODY, 1, np.where(GROWN, 255, 0)),
}
SAYS = {
    "inverted": "look inverted: the object, white (255), surrounds the image",
    "empty": "are empty: nothing is marked as object",
    "full": "mark every pixel as object",
    "void": "masks looked at have unlabelled pixels",
}


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., str]:
    def make(*kinds: str) -> str:
        generator = np.random.default_rng(0)
        for index, kind in enumerate(kinds):
            image = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            for folder, pixels in (("Imgs", image), ("GT", LEVELS[kind].astype(np.uint8))):
                path = tmp_path / "data" / folder / f"{index:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        return str(tmp_path / "data")

    return make


def said(root: str, capsys: pytest.CaptureFixture[str]) -> str:
    config = build_config(
        {"data.roots": [root], "data.img_size": 32, "data.cache": "none", "data.num_workers": 0}
    )
    find_data(config, World(), write=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", SAYS)
def test_train_says_what_is_odd_about_the_masks(
    dataset: Callable[..., str], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    text = said(dataset(*[kind] * 6), capsys)
    line = next(line for line in text.splitlines() if SAYS[kind] in line)
    assert line.startswith("void" if kind == "void" else "warning")
    assert " of " in line and "looked at" in line
    for other, words in SAYS.items():
        assert (words in text) == (other == kind)


def test_sound_masks_need_no_line_and_few_odd_ones_no_warning(
    dataset: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(dataset(*["plain"] * 8, *["empty"] * 3), capsys)
    # Told apart as images without an object, whose masks are meant.
    assert "3 of 11 training images have no object" in text
    assert not any(words in text for words in SAYS.values()) and "warning" not in text


def test_few_masks_are_read(
    dataset: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from camoxpert.training import data

    read: list[Path] = []
    real = data.read_mask_as

    def counted(path: Path, **options: int) -> tuple[np.ndarray, str]:
        read.append(path)
        return real(path, **options)

    monkeypatch.setattr(data, "read_mask_as", counted)
    said(dataset(*["plain"] * 40), capsys)
    assert len(read) <= MASKS_LOOKED_AT


def test_doctor_counts_void_and_names_masks_of_white_alone(dataset: Callable[..., str]) -> None:
    root = dataset("void", "void", "void", "plain", "void", "void")
    data = build_config({"data.roots": [root]}).data
    texts = [finding.text for finding in examine_data(data, copies=False).findings]
    counted = next(text for text in texts if "unlabelled pixels" in text)
    assert "5 of 6 masks" in counted
    assert any("1 masks beside them have no label but white" in text for text in texts)
    assert any("label map with void 5, 0/255 1" in text for text in texts)


def test_void_is_no_object_for_doctor(dataset: Callable[..., str]) -> None:
    root = dataset("void", "void", "plain")
    facts = examine_data(build_config({"data.roots": [root]}).data, copies=False).facts
    assert facts[0].share == pytest.approx(BODY.sum() / (~GROWN | BODY).sum())
    assert facts[0].void == pytest.approx((GROWN & ~BODY).mean())
    assert facts[2].share == pytest.approx(BODY.mean()) and facts[2].void == 0
