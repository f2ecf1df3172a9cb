"""What a model learned from is found in its records, wherever it lies and however it is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.printed import complained

from camoxpert.config import Config, load_config, to_dict
from camoxpert.crossval.divide import divide, find_pool
from camoxpert.crossval.seen import require_nothing_seen
from camoxpert.data.files.folds import SPLITS, write_splits
from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import DataError
from camoxpert.runs.checkpoint import FORMAT
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training.split import write_samples


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "easy"
    generate_toy(root, num_train=8, num_test=1, size=32, difficulty=0.1, seed=0)
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "other"
    generate_toy(root, num_train=8, num_test=1, size=32, difficulty=0.4, seed=5)
    return root


def config_of(*roots: Path, **flags: object) -> Config:
    more = {name.replace("__", "."): value for name, value in flags.items()}
    return load_config(flags={"data.roots": [str(root) for root in roots], **more})


def part(manifest: Manifest, start: int, stop: int | None = None) -> Manifest:
    return replace(manifest, pairs=manifest.pairs[start:stop])


def trained(run: Path, config: Config, *, split: bool = True, left_out: bool = False) -> Path:
    """Write what a run leaves: a checkpoint, and which image was trained on. The last three images
    are those of validation, or left out by a quick run."""
    (run / "checkpoints").mkdir(parents=True)
    pool = find_pool(config)
    if split:
        nothing = part(pool, 0, 0)
        beside = [part(pool, -3), nothing] if not left_out else [nothing, part(pool, -3)]
        rows = dict(zip(("validation", "left_out"), beside, strict=True))
        write_samples(run, part(pool, 0, -3), **rows)
    values = {"format": FORMAT, "config": to_dict(config), "model": {}, "data_hash": "0" * 64}
    torch.save(values, run / "checkpoints" / "best.pt")
    return run


def refused(config: Config, flag: str, words: str = "") -> None:
    with pytest.raises(DataError, match=f"(?s)^{flag} .*was trained on these images .*{words}"):
        require_nothing_seen([config], find_pool(config))


def said(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    require_nothing_seen([config], find_pool(config))
    return " ".join(capsys.readouterr().err.split())


class TestStart:
    @pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/best.pt"])
    @pytest.mark.parametrize("flag", ["--init-from", "--teacher"])
    def test_more_data_than_the_divided(
        self, data: Path, other: Path, tmp_path: Path, name: str, flag: str
    ) -> None:
        """The hash of its data is another one, and it trained on the divided images."""
        run = trained(tmp_path / "run", config_of(data, other))
        path = {"--init-from": "model__init_from", "--teacher": "data__teacher"}[flag]
        refused(config_of(data, **{path: str(run / name)}), flag, "8 of 8 images: ")

    def test_other_data_is_warned_of(
        self, data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = trained(tmp_path / "run", config_of(other))
        words = said(config_of(data, model__init_from=str(run)), capsys)
        assert "none of its images has the name and the size of one here" in words
        assert "8 images" in words and "too good" in words
        assert said(config_of(data), capsys) == ""

    def test_the_same_images_in_another_folder(
        self, data: Path, other: Path, tmp_path: Path
    ) -> None:
        moved = shutil.copytree(data, tmp_path / "renamed")
        run = trained(tmp_path / "run", config_of(moved, other))
        shutil.rmtree(moved)
        refused(config_of(data, model__init_from=str(run)), "--init-from", "8 of 8 images: ")

    def test_images_that_were_renamed(self, data: Path, tmp_path: Path) -> None:
        moved = Path(shutil.copytree(data, tmp_path / "renamed"))
        for path in sorted((moved / "TrainDataset").rglob("*.*")):
            path.rename(path.with_name(f"new-{path.name}"))
        run = trained(tmp_path / "run", config_of(moved))
        shutil.rmtree(moved)
        refused(config_of(data, model__init_from=str(run)), "--init-from", "8 of 8 images: ")

    def test_images_that_a_quick_run_left_out(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It saw five of eight images; a study of the other three may start from it."""
        run = trained(tmp_path / "run", config_of(data), left_out=True)
        config = config_of(data, model__init_from=str(run))
        with pytest.raises(DataError, match="5 of 8 images"):
            require_nothing_seen([config], find_pool(config))
        require_nothing_seen([config], part(find_pool(config), -3))
        assert "too good" in complained(capsys)

    def test_numbered_images_of_one_size_each(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Of another data set: equal names and sizes say nothing where all sizes are equal."""
        folders = [tmp_path / name for name in ("one", "two")]
        for folder in folders:
            shutil.copytree(data, folder)
            for path in (folder / "TrainDataset").rglob("*.*"):
                path.write_bytes(path.read_bytes().ljust(9999, b"\0"))
        run = trained(tmp_path / "run", config_of(folders[0]))
        words = said(config_of(folders[1], model__init_from=str(run)), capsys)
        assert "none of its images" in words

    def test_a_checkpoint_without_its_run(
        self, data: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its settings name the folders; without them nothing is known, and that is said."""
        for roots, name in (((data, other), "same"), ((other,), "apart")):
            run = trained(tmp_path / name, config_of(*roots), split=False)
            shutil.move(str(run / "checkpoints" / "best.pt"), tmp_path / f"{name}.pt")
        refused(
            config_of(data, model__init_from=str(tmp_path / "same.pt")), "--init-from", "data in"
        )
        words = said(config_of(data, model__init_from=str(tmp_path / "apart.pt")), capsys)
        assert "what it was trained on is not recorded" in words

    def test_weights_of_a_backbone_are_warned_of(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"stem.weight": torch.zeros(1)}, tmp_path / "backbone.pt")
        words = said(config_of(data, model__weights=str(tmp_path / "backbone.pt")), capsys)
        assert "--weights" in words and "is not recorded" in words


class TestWhatCameBefore:
    def test_a_model_that_started_from_one(self, data: Path, other: Path, tmp_path: Path) -> None:
        first = trained(tmp_path / "first", config_of(data))
        taught = trained(tmp_path / "taught", config_of(other, data__teacher=str(first)))
        last = trained(tmp_path / "last", config_of(other, model__init_from=str(taught)))
        config = config_of(data, model__init_from=str(last))
        refused(config, "--init-from", "")
        with pytest.raises(DataError, match=r"which started from .*taught.*taught by .*first"):
            require_nothing_seen([config], find_pool(config))

    def test_a_start_of_itself_ends(self, data: Path, other: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        trained(run, config_of(other, model__init_from=str(run)))
        require_nothing_seen([c := config_of(data, model__init_from=str(run))], find_pool(c))

    def test_a_stage_in_the_cache(self, data: Path, tmp_path: Path) -> None:
        """Its file lies far from the run that says what it saw."""
        run = trained(tmp_path / "run", config_of(data))
        kept = tmp_path / "cache" / "stages" / "key"
        kept.mkdir(parents=True)
        shutil.move(str(run / "checkpoints" / "best.pt"), kept / "best.pt")
        (kept / "stage.json").write_text(json.dumps({"run": str(run)}))
        refused(config_of(data, model__init_from=str(kept)), "--init-from", "8 of 8")

    def test_images_made_from_held_out_ones(self, data: Path, other: Path, tmp_path: Path) -> None:
        made = Path(shutil.copytree(other, tmp_path / "made"))
        image = sorted((data / "TrainDataset" / "Imgs").iterdir())[0]
        row = {"image": "x.png", "sources": [{"path": str(image)}]}
        (made / "provenance.jsonl").write_text(json.dumps(row))
        run = trained(tmp_path / "run", config_of(other, data__synthetic=[str(made)]))
        refused(config_of(data, model__init_from=str(run)), "--init-from", "made from 1 of them")


class TestMaps:
    def test_maps_of_other_folds(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The model behind the map of a training image saw what is held out here."""
        config = config_of(data)
        maps = tmp_path / "cv" / "maps" / "repeat-1"
        maps.mkdir(parents=True)
        splits = divide(find_pool(config), config.data, folds=2, write=False)
        write_splits(tmp_path / "cv" / SPLITS, splits)
        refused(config_of(data, data__teacher=str(maps)), "--teacher", "8 of 8 images")
        (tmp_path / "cv" / SPLITS).unlink()
        assert "not recorded" in said(config_of(data, data__teacher=str(maps)), capsys)
