"""The pictures of the documentation: small, all shown, and what the tool makes today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from camoxpert.data.files.image_io import encode, read_image, write_png

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "tools" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown() -> set[Path]:
    """Return the pictures that README and the pages show."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    return {
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }


def test_every_picture_is_shown_and_there(tool: ModuleType) -> None:
    made = {IMAGES / name for name in [*tool.GENERATED, "demo.jpg", "report.jpg", "serve.jpg"]}
    ours = {path for path in shown() if path.parent == IMAGES}
    assert made <= ours and all(path.is_file() for path in shown())


def test_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in IMAGES.iterdir()}
    assert max(sizes.values()) < 200_000 and sum(sizes.values()) < 1_500_000, sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "corruptions", "relight", "compose", "counterfactual"])
def test_a_generated_picture_is_what_the_tool_makes(tool: ModuleType, name: str) -> None:
    """Pixels may differ a little between versions of OpenCV; another scene differs by 20 levels."""
    now = tool.GENERATED[f"{name}.jpg"]()
    then = read_image(IMAGES / f"{name}.jpg")
    assert now.shape == then.shape
    packed = np.frombuffer(encode(now, ".jpg", quality=80), np.uint8)
    assert packed.size < 200_000
    assert np.abs(now.astype(int) - then).mean() < 8


def test_the_demos_picture_goes_from_worst_to_best(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, masks = tmp_path / "data" / "TestDataset" / "toy", tmp_path / "predictions" / "masks"
    for folder in (truth / "Imgs", truth / "GT", masks):
        folder.mkdir(parents=True)
    true = np.zeros((32, 32), np.uint8)
    true[:, :20] = 255
    for index in range(11):
        found = np.zeros((32, 32), np.uint8)
        found[:, : 20 - 2 * index] = 255
        write_png(truth / "Imgs" / f"{index}.png", np.full((32, 32, 3), 10 * index, np.uint8))
        write_png(truth / "GT" / f"{index}.png", true)
        write_png(masks / f"{index}.png", found)
    picture = tool.predictions(tmp_path)
    assert "IoU: 0.00, 0.20, 0.40, 0.60, 0.80, 1.00" in capsys.readouterr().out
    assert picture.shape == (3 * 144 + 2 * tool.GAP, 6 * 144 + 5 * tool.GAP, 3)
    left, right = picture[70, 70], picture[70, -70]
    assert (left == 100).all() and (right == 0).all()
