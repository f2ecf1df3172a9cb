"""Training with references: classes, episodes, what a checkpoint holds, and resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.printed import complained
from helpers.runs import TINY_SETTINGS, ending, records

from camoxpert.config import build_config
from camoxpert.config.guidance import EpisodeConfig
from camoxpert.data.files.classes import object_classes
from camoxpert.data.files.image_io import read_image, read_mask, write_png
from camoxpert.data.files.manifest import load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.data.samples.batches import Batch
from camoxpert.data.samples.episodes import Episodes, episodes_of
from camoxpert.errors import DataError
from camoxpert.files import read_json
from camoxpert.inference.predictor import load_predictor
from camoxpert.models.guidance import combine
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.runs.identity import file_hashes
from camoxpert.synthesis.toy_scenes import generate_scenes
from camoxpert.training.guide import Guide
from camoxpert.training.prepare import prepare
from camoxpert.training.run import Run
from camoxpert.training.stages import training_loader
from camoxpert.training.step import train_step

GUIDED = ("--support-encoder", "tiny_test", "model.support.side=32")
SHORT = ("--epochs", "1", "--no-test", "--no-report")
SETTINGS = {
    **TINY_SETTINGS,
    "train.batch_size": 8,
    "train.epochs": 1,
    "run.tensorboard": False,
    "data.val_fraction": 0.0,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 20 scenes with two objects each, as 40 pairs with the class in their names."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    generate_scenes(root, num_train=40, num_test=4, size=32, difficulty=0.2, seed=0)
    return root


def run_of(data: Path, **settings: object) -> Run:
    values = {**SETTINGS, "data.roots": [str(data)]}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return prepare(build_config(values))


def guided_run(data: Path, **settings: object) -> Run:
    return run_of(data, model__support__encoder="tiny_test", model__support__side=32, **settings)


def pair(name: str, group: str, dataset: str = "d") -> Pair:
    return Pair(name, Path(name), Path(name), dataset, group)


def test_classes_by_names_folders_and_tables(tmp_path: Path) -> None:
    pairs = [
        pair("COD10K-CAM-1-Aquatic-3-Crab-32", "Aquatic/Crab"),
        pair("COD10K-CAM-5-Other-69-Other-5055", "Other/Other"),
        pair("COD10K-NonCAM-3-Flying-1515", "NonCAM"),
        pair("crab/1", "Crab", "folders"),
        pair("fish/1", "Fish", "folders"),
        pair("7", "", "folders"),
        pair("train_102061", "train", "folders"),
        pair("img_3", "img", "folders"),
        # What all images of a data set are called is no class.
        pair("camourflage_00001", "camourflage", "CAMO"),
        pair("camourflage_00002", "camourflage", "CAMO"),
        # Unless it is a class elsewhere.
        pair("crab_1", "Crab", "crabs"),
    ]
    assert object_classes(pairs) == ["Crab", "", "", "Crab", "Fish", *[""] * 5, "Crab"]
    # A table may have one class only, and it may be called as people like.
    told = [replace(pair(str(n), "polyp", "table"), told=True) for n in range(2)]
    assert object_classes(told) == ["polyp"] * 2


def test_camo_and_cod10k_in_one_folder() -> None:
    """As the training set of the field is distributed."""
    pairs = [
        *(pair(f"{word}_00012", word, "TrainDataset") for word in ("camourflage", "Camouflage")),
        *(pair(f"COD10K-CAM-1-Aquatic-3-Crab-{n}", "Aquatic/Crab", "TrainDataset") for n in "12"),
        pair("COD10K-CAM-2-Terrestrial-30-Grasshopper-1903", "Terrestrial/Grasshopper"),
    ]
    assert object_classes(pairs) == ["", "", "Crab", "Crab", ""]
    pairs[-1] = replace(pairs[-1], dataset="TrainDataset")
    assert object_classes(pairs) == ["", "", "Crab", "Crab", "Grasshopper"]


def test_images_that_show_no_object_are_of_no_class() -> None:
    """Their masks are the images themselves, or black; and a word that only they bring in does not
    make a class of what all others are called."""
    barks = [pair(f"bark_{n}", "bark") for n in range(2)]
    crabs = [pair(f"crab_{n}", "crab") for n in range(2)]
    for without in (
        [replace(one, empty=True, told=True) for one in barks],
        [replace(one, labeled=False) for one in barks],
    ):
        assert object_classes([*crabs, *without]) == [""] * 4
        fish = pair("fish_1", "fish")
        assert object_classes([*crabs, *without, fish]) == ["crab", "crab", "", "", "fish"]
    assert object_classes([*crabs, *barks]) == ["crab", "crab", "bark", "bark"], "the control"


class TestEpisodes:
    @staticmethod
    def episodes(seed: int = 3, dropout: float = 0.5, shots: int = 5) -> Episodes:
        # Images 0 to 8 are references themselves; 9 is not, and 10 has no class.
        classes = ["a"] * 6 + ["b"] * 2 + ["c", "a", ""]
        config = EpisodeConfig(dropout=dropout, shots=shots)
        return episodes_of(classes, classes[:9], [*range(9), -1, -1], config, seed=seed)

    def test_a_pure_function(self) -> None:
        one, same, other = self.episodes(), self.episodes(), self.episodes(seed=4)
        keys = [(epoch, index) for epoch in range(20) for index in range(11)]
        drawn = [one.draw(epoch=e, index=i) for e, i in keys]
        assert drawn == [same.draw(epoch=e, index=i) for e, i in keys]
        assert drawn != [other.draw(epoch=e, index=i) for e, i in keys], "the control"
        assert drawn[: 11 * 10] != drawn[11 * 10 :], "epochs differ"

    def test_others_of_the_class_and_never_itself(self) -> None:
        episodes = self.episodes(dropout=0.0)
        for epoch in range(30):
            for index in range(6):
                rows = episodes.draw(epoch=epoch, index=index)
                assert 1 <= len(rows) <= 5 and len(set(rows)) == len(rows)
                assert set(rows) <= set(range(6)) - {index}
            assert episodes.draw(epoch=epoch, index=6) == [7]
            assert set(episodes.draw(epoch=epoch, index=9)) <= set(range(6))
            # Alone in its class, and without one.
            assert episodes.draw(epoch=epoch, index=8) == []
            assert episodes.draw(epoch=epoch, index=10) == []
        assert episodes.shown == 9

    def test_dropout_and_shots_are_shares(self) -> None:
        drawn = [len(self.episodes().draw(epoch=e, index=0)) for e in range(600)]
        assert 260 <= drawn.count(0) <= 340
        assert all(40 <= drawn.count(number) <= 80 for number in range(1, 6))
        assert {len(self.episodes(shots=2).draw(epoch=e, index=0)) for e in range(50)} == {0, 1, 2}
        assert not any(self.episodes(dropout=1.0).draw(epoch=e, index=0) for e in range(50))


class TestGuide:
    def test_a_batch_gets_the_features_of_its_references(self, scenes: Path) -> None:
        run = guided_run(scenes)
        guide = run.guide
        assert guide is not None and run.model.guidance is not None
        assert guide.episodes.shown == 40
        batch = next(iter(training_loader(run, 8)))
        assert isinstance(batch, Batch)
        shown = guide.reference(batch, 2)
        for row, index in enumerate(batch.indices):
            rows = guide.episodes.draw(epoch=2, index=index)
            assert bool(shown.present_B[row]) == bool(rows)
            expected = combine(guide.features_ND[rows]) if rows else torch.zeros(24)
            assert torch.equal(shown.features_BD[row], expected)
            assert all(guide.names[r].split("_")[0] == batch.names[row].split("_")[0] for r in rows)
        replaced = replace(batch, names=["another", *batch.names[1:]])
        assert not guide.reference(replaced, 2).present_B[0], "an unreadable image was replaced"
        assert run.model.guidance.classes == tuple(sorted(guide.episodes.members))
        assert run.evaluated_model.guidance.classes == run.model.guidance.classes

    def test_never_shown_is_never_guided(self, scenes: Path) -> None:
        """All that is not guidance learns the same, to the last bit."""
        # The norm that clips is summed over more tensors, in another order.
        free = {"optim__clip_grad_norm": 0.0}
        runs = [run_of(scenes, **free), guided_run(scenes, data__episodes__dropout=1.0, **free)]
        runs.append(guided_run(scenes, data__episodes__dropout=0.0, **free))
        for run in runs:
            for batch in list(training_loader(run, 8))[:2]:
                run.optimizer.param_groups[0]["lr"] = 1e-2
                train_step(run, [batch])
        plain, never, always = (run.model.state_dict() for run in runs)
        assert all(torch.equal(never[name], value) for name, value in plain.items())
        assert not all(torch.equal(always[name], value) for name, value in plain.items())

    def test_empty_masks_are_no_references(self, scenes: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(scenes, tmp_path / "data"))
        empty = load_train([data]).pairs[0]
        write_png(empty.mask, np.zeros((32, 32), np.uint8))
        run = guided_run(data)
        assert run.guide is not None
        assert run.guide.episodes.shown == 39 and run.guide.facts["references"] == 39
        assert run.guide.features_ND.isfinite().all(1).sum() == 39

    @pytest.mark.parametrize("setting", ["data__negatives", "data__unlabeled"])
    def test_images_without_a_mask_are_neither_references_nor_shown_any(
        self, scenes: Path, tmp_path: Path, setting: str
    ) -> None:
        """Their names may well end in a number, or say a class."""
        more = tmp_path / "more"
        more.mkdir()
        images = sorted((scenes / "TrainDataset" / "Imgs").iterdir())
        for number, name in enumerate(("bark_90", "bark_91", "fish_92")):
            image = read_image(images[number])
            write_png(more / f"{name}.png", np.ascontiguousarray(image[::-1]))
        settings: dict[str, object] = {setting: [str(more)]}
        if setting == "data__unlabeled":
            soft = tmp_path / "soft"
            soft.mkdir()
            for path in [*images, *more.iterdir()]:
                write_png(soft / f"{path.stem}.png", np.full((32, 32), 128, np.uint8))
            settings = {setting: str(more), "data__teacher": str(soft)}
        run = guided_run(scenes, **settings)
        assert run.guide is not None and len(run.data.trained) == 43
        assert run.guide.episodes.shown == run.guide.facts["references"] == 40
        assert run.guide.episodes.classes[40:] == ("", "", "")

    def test_references_of_other_data(self, scenes: Path, tmp_path: Path) -> None:
        other = tmp_path / "open"
        for folder in ("Imgs", "GT"):
            place = other / folder / "fish"
            place.mkdir(parents=True)
            for path in sorted((scenes / "TrainDataset" / folder).glob("fish_*"))[:3]:
                # Mirrored: copies of training images are no more references.
                pixels = (read_image if folder == "Imgs" else read_mask)(path)
                write_png(place / f"{path.stem}.png", np.ascontiguousarray(pixels[:, ::-1]))
        plain, more = guided_run(scenes), guided_run(scenes, data__episodes__references=str(other))
        assert plain.guide is not None and more.guide is not None
        assert len(more.guide.features_ND) == len(plain.guide.features_ND) + 3
        added = {
            name: len(rows) - len(plain.guide.episodes.members[name])
            for name, rows in more.guide.episodes.members.items()
        }
        assert added["fish"] == sum(added.values()) == 3
        # Another content of the folder is another run.
        before = more.files["data.episodes.references"]
        for path in [*other.rglob("fish_*.*")]:
            path.rename(path.with_name(path.name.replace("fish", "cow")))
        assert file_hashes(more.asked)["data.episodes.references"] != before
        with pytest.raises(DataError, match=r"--reference-data .* of a class of the training"):
            guided_run(scenes, data__episodes__references=str(other))

    def test_other_data_that_holds_images_of_the_run(
        self, scenes: Path, tmp_path: Path, capsys
    ) -> None:
        """Nothing is shown with itself, and nothing that measures the run teaches it."""
        plain = guided_run(scenes, data__val_fraction=0.2)
        train, validation, tests = plain.data.train, plain.data.validation, plain.data.tests["toy"]
        pairs = [*train.pairs[:3], *validation.pairs[:2], tests.pairs[0]]
        other = tmp_path / "open"
        for pair in pairs:
            kind = pair.name.split("_")[0]
            for path, folder in ((pair.image, "Imgs"), (pair.mask, "GT")):
                (other / folder).mkdir(parents=True, exist_ok=True)
                # Under names that tell nothing of where they are from.
                name = f"{kind}_{9000 + len(list((other / folder).iterdir()))}{path.suffix}"
                shutil.copy(path, other / folder / name)
        settings = {"data__val_fraction": 0.2, "data__episodes__references": str(other)}
        capsys.readouterr()
        run = guided_run(scenes, **settings)
        assert (
            f"6 of 6 references in {other} are not used: 3 trained on anyway, 3 images for "
            "validation, calibration or tests"
        ) in capsys.readouterr().out
        assert plain.guide is not None and run.guide is not None
        assert torch.equal(run.guide.features_ND, plain.guide.features_ND)
        assert run.guide.by_class().keys() == plain.guide.by_class().keys()
        # The control: any other image is used.
        image = next((other / "Imgs").iterdir())
        write_png(image.with_suffix(".png"), np.ascontiguousarray(read_image(image)[::-1]))
        if image.suffix != ".png":
            image.unlink()
        run = guided_run(scenes, **settings)
        assert run.guide is not None
        assert len(run.guide.features_ND) == len(plain.guide.features_ND) + 1

    def test_data_without_classes_is_refused(self, scenes: Path, tmp_path: Path) -> None:
        for pair in load_train([scenes]).pairs[:8]:
            for path, folder in ((pair.image, "Imgs"), (pair.mask, "GT")):
                place = tmp_path / "data" / folder / f"camourflage_{pair.name[-5:]}{path.suffix}"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
        with pytest.raises(DataError, match="no training image tells the class"):
            guided_run(tmp_path / "data")


class TestCommand:
    def test_what_a_run_keeps_and_says(
        self, train: Callable[..., int], scenes: Path, tmp_path: Path, capsys
    ) -> None:
        words = (*SHORT, *GUIDED, "--run-name", "r", "--cache-dir", str(tmp_path / "cache"))
        assert train(*words, "--dry-run", data=scenes) == 0
        assert "training would describe 36 references first" in capsys.readouterr().out
        assert train(*words, data=scenes) == 0
        said = capsys.readouterr().out
        assert "tiny_test describes references (24 features, 32 px); 36 of 36" in said
        assert "shown with 1 to 5 of them, 50% of the time with none" in said
        assert (
            "validation also shows 4 of 4 images the mean" in said and "with references wF" in said
        )
        (scored,) = records(tmp_path / "r", "validation")
        assert scored["guided"].keys() == scored["scores"].keys()
        assert scored["guided"] != scored["scores"]
        info = read_json(tmp_path / "r" / "run.json")["guidance"]
        assert info["encoder"]["encoder"] == "tiny_test" and info["references"] == 36
        assert info["cache"]["hits"] == 0
        checkpoint = load_checkpoint(tmp_path / "r" / "checkpoints" / "best.pt")
        names = checkpoint.evaluated_weights.keys()
        assert "guidance.encoder_sha256" in names
        assert not any("net." in name for name in names if name.startswith("guidance"))
        assert train(*words[:-4], "--run-name", "again", *words[-2:], data=scenes) == 0
        assert "36 hits, 0 misses" in capsys.readouterr().out

    def test_shared_weights_know_their_classes(
        self, train: Callable[..., int], scenes: Path, tmp_path: Path
    ) -> None:
        assert train(*SHORT, *GUIDED, "--run-name", "r", data=scenes) == 0
        model = load_predictor(tmp_path / "r" / "model", device="cpu")
        known = load_predictor(tmp_path / "r", device="cpu")
        image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        for one in (model, known):
            one.set_reference_class("fish")
        assert torch.equal(model.logits(image), known.logits(image))
        settings = load_checkpoint(tmp_path / "r" / "model" / "model.safetensors").config
        assert settings.model.support.weights == "" and settings.model.support.encoder

    def test_a_stopped_run_continues_bit_for_bit(
        self,
        train: Callable[..., int],
        stopped: Callable[..., int],
        scenes: Path,
        tmp_path: Path,
    ) -> None:
        words = ("--epochs", "2", "--no-test", "--no-report", *GUIDED, "--run-name", "r")
        assert train(*words, data=scenes, out=tmp_path / "whole") == 0
        assert stopped(*words, data=scenes, out=tmp_path / "parts", steps=3) == 75
        assert train(*words, data=scenes, out=tmp_path / "parts") == 0
        assert ending(tmp_path / "whole" / "r") == ending(tmp_path / "parts" / "r")

    def test_another_encoder_continues_nothing(
        self, train: Callable[..., int], stopped: Callable[..., int], scenes: Path, capsys
    ) -> None:
        words = (*SHORT, "--run-name", "r", "--support-encoder", "tiny_test")
        assert stopped(*words, "model.support.side=32", data=scenes, steps=1) == 75
        assert train(*words, "model.support.side=64", data=scenes) == 4
        assert "model.support.side: 32 -> 64" in complained(capsys)


def test_a_guide_that_was_trained_with_other_weights_is_refused(scenes: Path) -> None:
    from camoxpert.errors import CheckpointError

    run = guided_run(scenes)
    guide, guidance = run.guide, run.model.guidance
    assert isinstance(guide, Guide) and guidance is not None
    centre = guidance.centre_D.clone()
    changed = replace(guide, features_ND=guide.features_ND + 1)
    changed.teach(guidance, restored=True)
    assert torch.equal(guidance.centre_D, centre), "what the weights were trained with stays"
    with pytest.raises(CheckpointError, match="another support encoder"):
        replace(guide, digest="ab" * 32).teach(guidance, restored=True)
