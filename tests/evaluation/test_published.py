"""The field's benchmark in one command: the real layouts, and published rows beside the scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from camoxpert.cli import main
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.evaluation.published import PUBLISHED, official_name, published_rows
from camoxpert.pages.tables import text_table
from camoxpert.synthesis.toy import toy_pair

ROOT = Path(__file__).parents[2]
TINY = ["--no-pretrained", "--backbone", "tiny_test", "--img-size", "32", "model.width=16"]


def put(image: Path, mask: Path, index: int, *, empty: bool = False) -> None:
    pixels, object_mask = toy_pair(0, index, size=32)
    write_jpeg(image, pixels, quality=90)
    write_png(mask, object_mask * (not empty))


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """COD10K-v3, CAMO, NC4K and CHAMELEON with a few generated images in their own layouts."""
    number = 0
    for split, images in (("Train", 8), ("Test", 4)):
        for index in range(images):
            empty = index % 4 == 3
            kind = "NonCAM-3-Flying" if empty else "CAM-1-Aquatic-1-BatFish"
            folder = tmp_path / "COD10K-v3" / split
            name = f"COD10K-{kind}-{index}"
            put(folder / "Image" / f"{name}.jpg", folder / "GT_Object" / f"{name}.png", number,
                empty=empty)  # fmt: skip
            number += 1
    for split, images in (("Train", 4), ("Test", 2)):
        for _ in range(images):
            folder, name = tmp_path / "CAMO-V.1.0-CVIU2019", f"camourflage_{number:05d}"
            put(folder / "Images" / split / f"{name}.jpg", folder / "GT" / f"{name}.png", number)
            number += 1
    for dataset in ("NC4K", "CHAMELEON"):
        for index in range(2):
            folder = tmp_path / dataset
            image, mask = folder / "Imgs" / f"a-{index}.jpg", folder / "GT" / f"a-{index}.png"
            put(image, mask, number)
            number += 1
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_runs_dry_on_the_real_layouts(
    benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "configs" / "cod10k.yaml"
    first = recipe.read_text().splitlines()[0]
    arguments = first.split("train_ultimate.py ")[1].split()
    arguments[arguments.index("configs/cod10k.yaml")] = str(recipe)
    assert main([*arguments, *TINY, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "9 training and 1 validation images (COD10K-v3, CAMO-V.1.0)" in printed
    assert "test sets   COD10K 3, CAMO 2, NC4K 2, CHAMELEON 2" in printed
    assert "cannot be compared" not in printed


def test_training_on_a_test_set_is_warned_of(
    benchmark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dataset-path", "COD10K-v3", "NC4K", *TINY, "--dry-run"]) == 0
    assert "NC4K is a test set in this field" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("roots", "code", "words"),
    [(["NC5K"], 3, "folder NC5K. Did you mean NC4K"), (["COD10K-v3"], 3, "already a test set")],
)
def test_mistakes(
    benchmark: Path, roots: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--dataset-path", "COD10K-v3", "--test-data", *roots, *TINY, "--dry-run"]
    assert main(command) == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_only_whole_official_test_sets_are_compared() -> None:
    assert official_name("COD10K", 2026) == "COD10K"
    assert official_name("TE-COD10K", 2026) == "COD10K"
    assert official_name("COD10K", 2000) is None
    assert official_name("mine", 2026) is None
    assert official_name("CAMO", 250) == "CAMO"


def test_rows_stand_beside_the_scores_and_are_marked() -> None:
    scores = {"Smeasure": 0.5, "wFmeasure": 0.4, "MAE": 0.1, "IoU": 0.3}
    ours = SimpleNamespace(dataset="CAMO", num_images=250)
    rows = published_rows([ours, ours, SimpleNamespace(dataset="CAMO", num_images=9)])  # type: ignore[list-item]
    assert len(rows) == len(PUBLISHED)
    own = {"dataset": "CAMO", "method": "ours", "num_images": 250, "scores": scores}
    table = text_table([own, *rows], tuple(scores))
    line = next(line for line in table.splitlines() if "PRNet" in line)
    # What a paper does not give is a dash.
    assert line.split("published: PRNet, 12.7 M, 10.2 GMACs")[1].split() == [
        *("250", "0.872", "-", "0.050", "-")
    ]
    assert all(set(values) == {"COD10K", "NC4K", "CAMO"} for values in PUBLISHED.values())
