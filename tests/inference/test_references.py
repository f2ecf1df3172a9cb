"""References of predictions: what is searched for, and what it depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.printed import complained

from camoxpert import load
from camoxpert.cli import main
from camoxpert.config import build_config
from camoxpert.config.guidance import SupportConfig
from camoxpert.data.files.image_io import read_image, read_mask
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.inference.photos import PhotoSpec
from camoxpert.inference.plan import model_digest
from camoxpert.inference.predictor import Predictor
from camoxpert.inference.references import Searching, Target
from camoxpert.models.camoxpert import build_model
from camoxpert.models.support import SupportEncoder


def pair_of(scenes: Path, kind: str, number: int = 0) -> tuple[Path, Path]:
    image = sorted((scenes / "TrainDataset" / "Imgs").glob(f"{kind}_*"))[number]
    return image, scenes / "TrainDataset" / "GT" / f"{image.stem}.png"


@pytest.fixture
def photo(scenes: Path) -> Path:
    return min((scenes / "TestDataset" / "toy" / "Imgs").iterdir())


@pytest.fixture
def predictor(guided_run: Path) -> Predictor:
    return load(guided_run, device="cpu")


def head(folder: Path) -> dict:
    return json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])["settings"]


def test_references_change_what_is_found_and_clearing_them_restores_it(
    predictor: Predictor, scenes: Path, photo: Path
) -> None:
    base = predictor.predict(photo).probability_HW
    predictor.set_references(*pair_of(scenes, "fish"))
    fish = predictor.predict(photo).probability_HW
    predictor.set_references(*pair_of(scenes, "star"))
    star = predictor.predict(photo).probability_HW
    assert not np.array_equal(base, fish) and not np.array_equal(fish, star)
    predictor.clear_references()
    assert np.array_equal(predictor.predict(photo).probability_HW, base)


def test_order_changes_nothing_and_pixels_are_as_good_as_files(
    predictor: Predictor, scenes: Path, photo: Path
) -> None:
    pairs = [pair_of(scenes, "fish", number) for number in range(3)]
    found = []
    for order in (pairs, pairs[::-1]):
        predictor.set_references([image for image, _ in order], [mask for _, mask in order])
        found.append((predictor.target, predictor.predict(photo).probability_HW))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    predictor.set_references(
        [read_image(image) for image, _ in pairs], [read_mask(mask) > 0 for _, mask in pairs]
    )
    assert np.array_equal(predictor.predict(photo).probability_HW, found[0][1])


def test_any_number_of_references_is_taken_and_nothing_says_otherwise(
    predictor: Predictor, scenes: Path, capsys
) -> None:
    """Training shows up to ``data.episodes.shots`` at a time, which is a setting and no limit."""
    pairs = [
        pair_of(scenes, "star", number % 2)
        for number in range(predictor.config.data.episodes.shots + 2)
    ]
    predictor.set_references([image for image, _ in pairs], [mask for _, mask in pairs])
    assert predictor.target is not None and predictor.target.name.startswith(f"{len(pairs)} images")
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "data.episodes.shots" in said and "up to five" not in said
    assert "one to five" not in str(Predictor.set_references.__doc__)


def test_a_remembered_class_needs_no_reference(
    predictor: Predictor, scenes: Path, photo: Path
) -> None:
    base = predictor.predict(photo).probability_HW
    predictor.set_reference_class("fish")
    assert predictor.target is not None and predictor.target.name == "class fish"
    assert not np.array_equal(predictor.predict(photo).probability_HW, base)
    with pytest.raises(ConfigError, match="Did you mean fish"):
        predictor.set_reference_class("fsh")


def test_what_is_no_reference_is_refused(
    predictor: Predictor, scenes: Path, tiny_run: Path
) -> None:
    image, mask = pair_of(scenes, "fish")
    with pytest.raises(ConfigError, match="2 images and 1 mask"):
        predictor.set_references([image, image], [mask])
    with pytest.raises(DataError, match="marks nothing"):
        predictor.set_references(read_image(image), np.zeros((32, 32), np.uint8))
    with pytest.raises(DataError, match="is not a mask"):
        predictor.set_references(read_image(image), np.zeros((32, 32, 3), np.uint8))
    assert predictor.target is None
    with pytest.raises(ConfigError, match="trained without guidance"):
        load(tiny_run, device="cpu").set_references(image, mask)


def test_what_the_model_refuses_is_not_searched_for(predictor: Predictor, tiny_run: Path) -> None:
    predictor.set_reference_class("fish")
    before, features = predictor.target, predictor.network.reference_D
    with pytest.raises(ConfigError, match="has 24 features"):
        predictor.search_for(Target("of another encoder", (0.5,) * 25))
    assert predictor.target is before and predictor.network.reference_D is features
    other = load(tiny_run, device="cpu")
    with pytest.raises(ConfigError, match="trained without guidance"):
        other.search_for(before)
    assert other.target is None
    other.clear_references()


def test_another_encoder_than_that_of_the_training_is_refused(
    predictor: Predictor, scenes: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("CAMOXPERT_CACHE", str(tmp_path))
    assert predictor.network.guidance is not None
    predictor.network.guidance.encoder_sha256.fill_(7)
    with pytest.raises(CheckpointError, match="--support-weights"):
        predictor.set_references(*pair_of(scenes, "fish"))
    assert predictor.target is None and predictor.network.reference_D is None


def test_a_weights_file_named_later_is_used(scenes: Path, tmp_path: Path, monkeypatch) -> None:
    """The file of the training is on another machine, and the first one named is a wrong one."""
    monkeypatch.setenv("CAMOXPERT_CACHE", str(tmp_path / "cache"))
    name, gone = "edgenext_xx_small", str(tmp_path / "gone.pth")
    encoder = SupportEncoder(SupportConfig(name, side=32, pretrained=False))
    right, wrong = tmp_path / "right.pth", tmp_path / "wrong.pth"
    torch.save(encoder.net.state_dict(), right)
    torch.save({key: 2 * value for key, value in encoder.net.state_dict().items()}, wrong)
    support = {"encoder": name, "side": 32, "weights": gone}
    settings = {f"model.support.{key}": value for key, value in support.items()}
    settings |= {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    network = build_model(build_config(settings).model)
    assert network.guidance is not None
    network.guidance.remember({"fish": torch.ones(1, encoder.width)}, encoder.digest)
    model = Searching(network, max_pixels=10**6)
    pairs = [pair_of(scenes, "fish", number) for number in range(4)]
    with pytest.raises(CheckpointError, match=r"--support-weights: There is no file .*gone\.pth"):
        model.set_references(*pairs[0])
    with pytest.raises(CheckpointError, match="with --support-weights"):
        model.set_references(*pairs[0], weights=wrong)
    model.set_references(*pairs[0], weights=right)
    shown = model.target
    # Named once, it is used from then on; one that is refused in between changes nothing.
    model.set_references(*pairs[1])
    with pytest.raises(CheckpointError, match="with --support-weights"):
        model.set_references(*pairs[2], weights=wrong)
    model.set_references(*pairs[2])
    assert shown is not None and model.target != shown
    assert model.support_cache is not None and model.support_cache.stats.total == 3


def test_the_ledger_knows_references_by_content(
    guided_run: Path, scenes: Path, photo: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    fish, mask = pair_of(scenes, "fish", 1)
    other, other_mask = pair_of(scenes, "fish", 2)
    encoded: list[int] = []
    honest = SupportEncoder.encode

    def counted(self: SupportEncoder, images, masks) -> torch.Tensor:
        encoded.append(len(images))
        return honest(self, images, masks)

    monkeypatch.setattr(SupportEncoder, "encode", counted)
    monkeypatch.setenv("CAMOXPERT_CACHE", str(tmp_path / "cache"))
    base = ["predict", str(guided_run), str(photo), "-o", str(tmp_path / "out"), "--save", "map"]
    two = ["--reference", str(fish), str(mask), "--reference", str(other), str(other_mask)]
    assert main([*base, *two]) == 0
    said = capsys.readouterr().out
    assert "0 hits, 2 misses (2 not made yet)" in said and sum(encoded) == 2
    assert head(tmp_path / "out")["reference"].startswith("2 images (sha256 ")
    # Renamed, and in another order: the same references, so everything is there already; and the
    # cache has them.
    moved = tmp_path / "moved.jpg"
    shutil.copy(fish, moved)
    again = ["--reference", str(other), str(other_mask), "--reference", str(moved), str(mask)]
    assert main([*base, *again]) == 0
    said = capsys.readouterr().out
    assert "2 hits, 0 misses" in said and "saved" in said and sum(encoded) == 2
    assert "1 were there already" in said
    # Known references need neither the encoder nor its weights: the checkpoint has their digest.
    monkeypatch.setattr(SupportEncoder, "__init__", None)
    assert main([*base, *again]) == 0
    monkeypatch.undo()
    # Another reference, or none, is another search.
    assert main([*base, *two[:3]]) == 2
    assert "reference 2 images" in " ".join(capsys.readouterr().err.split())
    assert main(base) == 2
    assert "now off" in " ".join(capsys.readouterr().err.split())


def test_flags_that_say_nothing_together_are_refused(
    guided_run: Path, tiny_run: Path, scenes: Path, photo: Path, tmp_path: Path, capsys
) -> None:
    fish, mask = map(str, pair_of(scenes, "fish"))
    base = ["predict", str(guided_run), str(photo), "-o", str(tmp_path / "out")]
    assert main([*base, "--reference", fish, mask, "--reference-class", "fish"]) == 2
    assert main([*base, "--support-weights", "w.pth"]) == 2
    assert main([*base, "--reference", fish, "none.png"]) == 3
    assert "There is no file none.png" in complained(capsys)
    assert main(["predict", str(tiny_run), *base[2:], "--reference", fish, mask]) == 2
    assert "trained without guidance" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_worker_processes_search_for_the_same(
    predictor: Predictor, scenes: Path, tmp_path: Path
) -> None:
    predictor.set_references(*pair_of(scenes, "fish"))
    spec = PhotoSpec(
        checkpoint=str(predictor.checkpoint.path),
        model=model_digest(predictor.checkpoint),
        precision="fp32",
        max_pixels=predictor.max_pixels,
        output=str(tmp_path),
        kinds=("map",),
        threshold=0.5,
        target=predictor.target,
    )
    worker = spec.build("cpu").predictor
    own = predictor.network.reference_D
    assert own is not None and worker.network.reference_D is not None
    assert torch.equal(worker.network.reference_D, own)
    # Without the encoder: workers get features.
    assert worker.support_cache is None
