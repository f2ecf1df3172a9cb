"""Training with a teacher: its maps and their cache, images without masks, and resuming."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.printed import complained
from helpers.runs import TINY_SETTINGS, ending, train_in

from camoxpert.cli import main
from camoxpert.config import build_config, check_conflicts
from camoxpert.data.files.image_io import read_map, write_png
from camoxpert.data.files.manifest import load_train
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import read_json
from camoxpert.inference.predictor import load_predictor
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.runtime.device import Precision
from camoxpert.training import teacher as teachers
from camoxpert.training.prepare import prepare
from camoxpert.training.run import Run
from camoxpert.training.stages import training_loader
from camoxpert.training.step import train_step
from camoxpert.training.teacher import Teacher, find_soft_maps

BASE = {
    **TINY_SETTINGS,
    "train.batch_size": 8,
    "train.epochs": 1,
    "optim.lr": 3e-3,
    "run.tensorboard": False,
}
SHORT = ("--epochs", "1", "--no-test", "--no-report")
FP32 = Precision(None, False, "")


@pytest.fixture
def more(toy_data: Path, tmp_path: Path) -> Path:
    """Return a folder of 8 images without masks."""
    (images,) = (toy_data / "TestDataset").glob("*/Imgs")
    return Path(shutil.copytree(images, tmp_path / "more"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder."""
    monkeypatch.setenv("CAMOXPERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_of(data: Path, **settings: object) -> Run:
    values = {**BASE, "data.roots": [str(data)]}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return prepare(build_config(values))


def maps_of(data: Path, teacher: Path, digest: str = "d", **settings: object):
    """Return the maps of all training images of a data set."""
    values = {**BASE, "data.roots": [str(data)], "data.teacher": str(teacher)}
    return find_soft_maps(build_config(values | settings), load_train([data]), digest=digest)


def weights_of(run: Run) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in run.model.parameters()]


def equal(one: Run, other: Run) -> bool:
    return all(map(torch.equal, weights_of(one), weights_of(other)))


def mask_folder(data: Path, place: Path, suffix: str = "") -> Path:
    """Write the training masks as the maps of a confident teacher that is always right."""
    for pair in load_train([data]).pairs:
        mask = cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE)
        write_png(place / f"{pair.name}{suffix}.png", np.where(mask > 127, 250, 5).astype(np.uint8))
    return place


class TestMaps:
    def test_two_sizes_are_averaged_as_probabilities(self, tiny_run: Path) -> None:
        checkpoint = load_checkpoint(tiny_run / "checkpoints" / "best.pt")
        teacher = Teacher(checkpoint, torch.device("cpu"), FP32)
        assert teacher.sides == (32, 64)  # 1.5 x 32 = 48, rounded to a multiple of 32
        torch.manual_seed(0)
        images = [torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in (32, 64)]
        found = teacher.probabilities(images, 40)
        predictor = load_predictor(tiny_run, device="cpu", precision="fp32")
        with torch.inference_mode():
            logits = [predictor.model(at_size).logits_B1HW for at_size in images]
        expected = sum(
            F.interpolate(x, size=(40, 40), mode="bilinear", align_corners=False).sigmoid()
            for x in logits
        )
        torch.testing.assert_close(found, expected[:, 0] / 2)

    def test_they_are_made_once_and_only_where_missing(
        self, tiny_run: Path, toy_data: Path, own_cache: Path, monkeypatch, capsys
    ) -> None:
        passes = []
        honest = teachers.probability_maps
        monkeypatch.setattr(
            teachers, "probability_maps", lambda *a, **o: passes.append(1) or honest(*a, **o)
        )
        soft = maps_of(toy_data, tiny_run)
        # 40 images in tens of four, at two sizes.
        assert len(passes) == 20 and len(soft.paths) == 40
        said = capsys.readouterr().out
        assert "miss: 40 of 40 maps" in said and "at 32 and 64 px" in said
        files = sorted(own_cache.glob("teacher-*/*.png"))
        assert len(files) == 40 and read_map(files[0]).shape == (32, 32)
        before = {path: path.stat().st_mtime_ns for path in files}
        assert maps_of(toy_data, tiny_run) == soft
        assert len(passes) == 20 and "hit: " in capsys.readouterr().out
        # A map that was lost is made again, and is the same.
        kept = files[0].read_bytes()
        files[0].unlink()
        files[1].write_bytes(b"")
        maps_of(toy_data, tiny_run)
        assert "miss: 2 of 40 maps" in capsys.readouterr().out and len(passes) == 22
        assert files[0].read_bytes() == kept
        assert sum(path.stat().st_mtime_ns == before[path] for path in files) == 38
        # The control: another teacher, size or image has maps of its own.
        maps_of(toy_data, tiny_run, digest="other")
        assert len(passes) == 42
        maps_of(toy_data, tiny_run, **{"data.img_size": 64})
        assert len(passes) == 62

    def test_moved_images_find_their_maps(
        self, tiny_run: Path, toy_data: Path, own_cache: Path, tmp_path: Path, capsys
    ) -> None:
        maps_of(toy_data, tiny_run)
        elsewhere = shutil.copytree(toy_data, tmp_path / "copy")
        capsys.readouterr()
        maps_of(elsewhere, tiny_run)
        assert "hit: " in capsys.readouterr().out

    def test_an_unreadable_image_has_none_under_skip(
        self, tiny_run: Path, toy_data: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        data = shutil.copytree(toy_data, tmp_path / "broken")
        pair = load_train([data]).pairs[5]
        whole = pair.image.read_bytes()
        # The header and the end are whole: only decoding finds it.
        middle = len(whole) // 2
        pair.image.write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :])
        with pytest.raises(DataError, match=pair.name):
            maps_of(data, tiny_run)
        maps_of(data, tiny_run, **{"data.unreadable": "skip"})
        assert len(list(own_cache.glob("teacher-*/*.png"))) == 39
        run = run_of(data, data__teacher=str(tiny_run), data__unreadable="skip", data__cache="none")
        batches = list(training_loader(run, 8))
        assert all(len(batch.soft) == len(batch.names) for batch in batches)

    def test_strict_cache_makes_none(self, tiny_run: Path, toy_data: Path, own_cache: Path) -> None:
        with pytest.raises(DataError, match=r"--strict-cache: .*miss: 40 of 40 maps"):
            maps_of(toy_data, tiny_run, **{"data.strict_cache": True})

    @pytest.mark.parametrize("suffix", ["", "_sal"])
    def test_a_folder_of_maps_is_matched_by_name(
        self, suffix: str, toy_data: Path, own_cache: Path, tmp_path: Path, capsys
    ) -> None:
        folder = mask_folder(toy_data, tmp_path / "maps", suffix)
        soft = maps_of(toy_data, folder)
        assert ("matched by a rule" in capsys.readouterr().out) == bool(suffix)
        for pair in load_train([toy_data]).pairs:
            map_HW = soft.read(soft.paths[pair.dataset, pair.name])
            mask = cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE)
            inside = cv2.resize(mask, (32, 32), interpolation=cv2.INTER_AREA)
            assert ((map_HW > 127) == (inside > 127)).mean() > 0.98

    def test_an_image_without_a_map_is_named(
        self, toy_data: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        folder = mask_folder(toy_data, tmp_path / "maps")
        lost = sorted(folder.iterdir())[3]
        lost.unlink()
        with pytest.raises(DataError, match=f"1 of 40 training images have no map .*{lost.stem}"):
            maps_of(toy_data, folder)

    def test_a_folder_of_something_else_is_named(
        self, toy_data: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="holds neither a checkpoint nor maps"):
            maps_of(toy_data, tmp_path / "empty")
        with pytest.raises(DataError, match="--teacher: There is no file or folder"):
            maps_of(toy_data, tmp_path / "nothing", digest="")

    def test_what_predict_wrote_is_a_teacher(
        self, tiny_run: Path, toy_data: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        images = toy_data / "TrainDataset" / "Imgs"
        assert main(["predict", str(tiny_run), str(images), "-o", str(tmp_path / "out")]) == 0
        assert len(maps_of(toy_data, tmp_path / "out").paths) == 40


class TestTraining:
    @pytest.mark.parametrize("where", ["cpu", "device"])
    def test_weight_0_changes_no_bit(
        self, where: str, toy_data: Path, own_cache: Path, tmp_path: Path
    ) -> None:
        folder = mask_folder(toy_data, tmp_path / "maps")
        runs = {}
        for name, settings in {
            "none": {},
            "off": {"data__teacher": str(folder), "loss__teacher": 0.0},
            "on": {"data__teacher": str(folder)},
        }.items():
            runs[name] = run_of(toy_data, data__augment_on=where, **settings)
            train_in(runs[name], tmp_path / name)
        assert equal(runs["none"], runs["off"])
        assert not equal(runs["none"], runs["on"])

    def test_images_without_masks_learn_from_the_teacher_alone(
        self, tiny_run: Path, toy_data: Path, more: Path, own_cache: Path
    ) -> None:
        run = run_of(toy_data, data__teacher=str(tiny_run), data__unlabeled=str(more))
        assert len(run.data.unlabeled) == 8
        number = len(run.data.train) + 8
        assert run.data.images_per_epoch() == number == run.data.images_per_epoch(2) * 2
        assert run.plan.steps == -(-number // 8)
        loader = training_loader(run, number)
        (batch,) = list(loader)
        assert int(batch.unlabeled.sum()) == 8
        chosen = batch.unlabeled.nonzero()[:, 0].tolist()
        only = batch.__class__(
            batch.images[chosen],
            batch.masks[chosen],
            [batch.names[i] for i in chosen],
            [batch.sizes[i] for i in chosen],
            chosen,
            void=True,
            soft=batch.soft[chosen],
            unlabeled=batch.unlabeled[chosen],
        )
        run.config = build_config({**BASE, "data.roots": [str(toy_data)], "loss.balance": 0.0})
        values = train_step(run, [only])
        assert float(values["mask"]) == float(values["side"]) == 0
        assert float(values["teacher"]) > 0 and float(values["grad_norm"]) > 0

    def test_they_are_counted(
        self, train: Callable[..., int], tiny_run: Path, more: Path, tmp_path: Path, capsys
    ) -> None:
        words = ("--teacher", str(tiny_run), "--unlabeled", str(more), "data.unlabeled_share=0.1")
        assert train(*SHORT, *words, "--run-name", "r", "--dry-run") == 0
        said = capsys.readouterr().out
        assert (
            "8 images without masks" in said and "an epoch sees 4 of them, 10% of a batch" in said
        )
        assert train(*SHORT, *words, "--run-name", "r") == 0
        info = read_json(tmp_path / "r" / "run.json")
        images = info["images"]
        assert (images["training"], images["validation"], images["unlabeled"]) == (36, 4, 8)
        assert any("8 images without masks" in line for line in info["decisions"])
        assert "data.teacher" in info["files"]
        rows = (tmp_path / "r" / "samples.csv").read_text().splitlines()
        assert sum(row.startswith("unlabeled,") for row in rows) == 8

    def test_they_need_a_teacher(self) -> None:
        with pytest.raises(ConfigError, match=r"--unlabeled more: .* there is no --teacher"):
            check_conflicts(build_config({"data.unlabeled": "more"}))
        with pytest.raises(ConfigError, match=r"loss\.teacher is 0"):
            asked = {"data.unlabeled": "more", "data.teacher": "x", "loss.teacher": 0.0}
            check_conflicts(build_config(asked))
        check_conflicts(build_config({"data.unlabeled": "more", "data.teacher": "x"}))


class TestResume:
    @pytest.mark.parametrize("where", ["cpu", "device"])
    def test_it_ends_bit_for_bit_where_it_would_have_ended(
        self,
        where: str,
        train: Callable[..., int],
        stopped: Callable[..., int],
        tiny_run: Path,
        more: Path,
        tmp_path: Path,
    ) -> None:
        words = (
            *(*SHORT, "--teacher", str(tiny_run), "--unlabeled", str(more)),
            *("--run-name", "r", "--augment-on", where),
        )
        assert train(*words, out=tmp_path / "whole") == 0
        # In the middle of the first epoch.
        assert stopped(*words, steps=3, out=tmp_path / "parts") == 75
        assert train(*words, out=tmp_path / "parts") == 0
        assert ending(tmp_path / "whole" / "r") == ending(tmp_path / "parts" / "r")
        if where == "cpu":
            # The control: without the images it learns something else.
            alone = tuple(word for word in words if word not in ("--unlabeled", str(more)))
            assert train(*alone, out=tmp_path / "alone") == 0
            assert ending(tmp_path / "whole" / "r") != ending(tmp_path / "alone" / "r")

    def test_another_teacher_is_refused(
        self,
        train: Callable[..., int],
        stopped: Callable[..., int],
        tiny_run: Path,
        toy_data: Path,
        tmp_path: Path,
        capsys,
    ) -> None:
        words = (*SHORT, "--run-name", "r", "--teacher")
        assert stopped(*words, str(tiny_run)) == 75
        folder = mask_folder(toy_data, tmp_path / "maps")
        capsys.readouterr()
        assert train(*words, str(folder)) == 4
        assert "data.teacher" in capsys.readouterr().err
        assert train(*SHORT, "--run-name", "r") == 4
        # The control: a copy of the teacher is the same teacher, and its maps are enough.
        copy = shutil.copytree(tiny_run, tmp_path / "copy")
        assert stopped(*words, str(copy)) == 75
        shutil.rmtree(copy)
        assert train(*words, str(copy)) == 0
        assert "is gone" in capsys.readouterr().out

    def test_changed_maps_are_another_teacher(
        self,
        stopped: Callable[..., int],
        train: Callable[..., int],
        toy_data: Path,
        tmp_path: Path,
        capsys,
    ) -> None:
        folder = mask_folder(toy_data, tmp_path / "maps")
        words = (*SHORT, "--run-name", "r", "--teacher", str(folder))
        assert stopped(*words) == 75
        first = sorted(folder.iterdir())[0]
        write_png(first, 255 - read_map(first))
        capsys.readouterr()
        assert train(*words) == 4
        assert "has other content now" in complained(capsys)

    def test_other_images_without_masks_are_refused_and_moved_ones_are_not(
        self,
        stopped: Callable[..., int],
        train: Callable[..., int],
        tiny_run: Path,
        more: Path,
        tmp_path: Path,
        capsys,
    ) -> None:
        words = (*SHORT, "--run-name", "r", "--teacher", str(tiny_run), "--unlabeled")
        assert stopped(*words, str(more)) == 75
        (tmp_path / "other").mkdir()
        moved = more.rename(tmp_path / "other" / "more")
        assert stopped(*words, str(moved)) == 75
        lost = sorted(moved.iterdir())[0]
        kept = lost.read_bytes()
        lost.unlink()
        capsys.readouterr()
        assert train(*words, str(moved)) == 4
        said = capsys.readouterr().err
        assert "The training data changed" in said and "1 missing" in said
        assert train(*SHORT, "--run-name", "r", "--teacher", str(tiny_run)) == 4
        lost.write_bytes(kept)
        assert train(*words, str(moved)) == 0
