"""Training with made images: mixed per batch, counted, kept apart from what is measured with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.runs import ending

from camoxpert.config import DataConfig, build_config, check_conflicts
from camoxpert.data.cache.build import open_cache
from camoxpert.data.files.labels import VOID
from camoxpert.data.files.made import find_made
from camoxpert.data.files.manifest import Manifest, Search, load_train
from camoxpert.data.files.mixing import mix, mix_of
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.provenance import Finder
from camoxpert.data.files.unlabeled import find_unlabeled, joined
from camoxpert.data.loader import LoaderPlan, build_loader, finish
from camoxpert.data.samples.batches import Batch
from camoxpert.data.samples.sampler import (
    MADE_STREAM,
    UNLABELED_STREAM,
    EpochSampler,
    Mixed,
)
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import read_json
from camoxpert.synthesis.toy import generate_toy

SHORT = ("--epochs", "1", "--no-test", "--no-report", "--run-name", "r")


def provenance(folder: Path, sources: Sequence[Path]) -> None:
    """Write what the images of a made data set were made from, one source each."""
    images = sorted((folder / "TrainDataset" / "Imgs").iterdir())
    rows = [
        {
            "image": str(image.relative_to(folder)),
            "sources": [{"role": "image", "path": str(source)}],
        }
        for image, source in zip(images, sources, strict=False)
    ]
    (folder / "provenance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "relit"
    generate_toy(root, num_train=20, num_test=4, size=48, difficulty=0.1, seed=9)
    return root


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    """Return a made data set of 20 pairs, with a test set that is not read."""
    return Path(shutil.copytree(made_once, tmp_path / "relit"))


def images_of(data: Path, split: str = "TrainDataset") -> list[Path]:
    return sorted((data / split).rglob("*.jpg"))


class TestMixing:
    @staticmethod
    def sampler(seed: int = 2, **options: int) -> EpochSampler:
        mixed = (Mixed(50, 15, MADE_STREAM), Mixed(100, 15, UNLABELED_STREAM))
        return EpochSampler(35, seed=seed, mixed=mixed, **options)

    def test_an_epoch_by_hand(self) -> None:
        data = DataConfig(synthetic_share=0.3, unlabeled_share=0.5)
        # 70 real images: 30 made ones are 30 % of 100, and 100 without masks half of 200.
        found = mix(data, real=70, made=500, unlabeled=500)
        assert (found.made_seen, found.unlabeled_seen) == (30, 100)
        assert found.made_share == 0.3 and found.per_process(1) == 200
        assert found.per_process(3) == 24 + 10 + 34
        assert mix(data, real=70, made=12, unlabeled=0).made_seen == 12
        assert mix(data, real=70, made=0, unlabeled=0).per_process(1) == 70

    def test_every_batch_has_its_share_and_every_real_image_comes_once(self) -> None:
        order = list(self.sampler().indices())
        assert len(order) == 65 and sorted(i for i in order if i < 35) == list(range(35))
        assert all(order.count(index) == 1 for index in order)
        for size in (8, 13):
            for start in range(0, 65 - size, size):
                part = order[start : start + size]
                real, made = sum(i < 35 for i in part), sum(35 <= i < 85 for i in part)
                assert abs(made - size * 15 / 65) <= 1.5 and abs(real - size * 35 / 65) <= 2

    def test_a_function_of_seed_and_epoch_alone(self) -> None:
        def order(epoch: int, batch: int = 0, seed: int = 2) -> list[int]:
            sampler = self.sampler(seed, batch_size=5)
            sampler.seek(epoch, batch)
            return list(sampler.indices())

        assert order(3) == order(3) and order(3, 4) == order(3)[20:]
        drawn = {frozenset(i for i in order(epoch) if 35 <= i < 85) for epoch in range(4)}
        assert len(drawn) == 4 and order(3) != order(3, seed=4)

    def test_real_images_keep_their_order(self) -> None:
        plain = list(EpochSampler(35, seed=2).indices())
        assert [index for index in self.sampler().indices() if index < 35] == plain


@pytest.mark.parametrize("way", ["files", "device", "cache", "reader"])
def test_every_way_of_reading_mixes_the_same(
    way: str, toy_data: Path, made: Path, tmp_path: Path
) -> None:
    (without_masks,) = (toy_data / "TestDataset").glob("*/Imgs")
    manifest = joined(
        load_train([toy_data]), find_made([made], Search()), find_unlabeled(without_masks)
    )
    data = DataConfig(img_size=32, unlabeled_share=0.1, cache_dir=str(tmp_path / "cache"))
    assert mix_of(manifest, data).made_seen == 17
    cached = way in ("cache", "reader")
    cache = open_cache(manifest, data, mode="disk") if cached else None
    plan = LoaderPlan(cache=cache, on_device=way in ("device", "reader"))
    loader = build_loader(manifest, data, plan, batch_size=9, seed=1)
    found: list[Batch] = [finish(loader, batch, torch.device("cpu")) for batch in loader]
    loader.close()
    indices = [index for batch in found for index in batch.indices]
    assert len(indices) == 63 and sum(40 <= index < 60 for index in indices) == 17
    for batch in found:
        # Made images have masks: only those without one are void.
        for index, mask in zip(batch.indices, batch.masks, strict=True):
            assert bool((mask == VOID).all()) == (index >= 60)


class TestRun:
    def test_they_are_counted_and_measure_nothing(
        self, train: Callable[..., int], toy_data: Path, made: Path, tmp_path: Path, capsys
    ) -> None:
        provenance(made, images_of(toy_data)[:0])
        words = ("--synthetic", str(made), "--synthetic-share", "0.25", *SHORT)
        assert train(*words, "--dry-run") == 0
        said = capsys.readouterr().out
        assert "20 made images in" in said and "an epoch sees 12 of them, 25% of the" in said
        assert "20 of 20 made images are in no provenance.jsonl" in said
        assert train(*words) == 0
        info = read_json(tmp_path / "r" / "run.json")
        assert info["images"] == {
            "training": 36, "validation": 4, "synthetic": 20, "synthetic_per_epoch": 12,
            "unlabeled": 0,
        }  # fmt: skip
        assert any("20 made images" in line for line in info["decisions"])
        rows = (tmp_path / "r" / "samples.csv").read_text().splitlines()
        assert sum(row.startswith("synthetic,synthetic relit,") for row in rows) == 20
        assert not any(row.startswith("validation,synthetic") for row in rows)
        from camoxpert.pages.report import write_report

        page = write_report(tmp_path / "r").read_text()
        assert "36 real and 12 of 20 made training images an epoch (25% made)" in page

    def test_too_few_are_said(
        self, train: Callable[..., int], made: Path, tmp_path: Path, capsys
    ) -> None:
        words = ("--synthetic", str(made), "--synthetic-share", "0.9", *SHORT, "--dry-run")
        assert train(*words) == 0
        assert "an epoch sees 20 of them, 36% of the images with masks in a batch, all there are " \
            "(--synthetic-share 0.9)" in capsys.readouterr().out  # fmt: skip

    def test_a_stopped_run_ends_bit_for_bit_where_it_would_have_ended(
        self,
        train: Callable[..., int],
        stopped: Callable[..., int],
        made: Path,
        tmp_path: Path,
        capsys,
    ) -> None:
        words = (*SHORT, "data.augment.relight=0.3", "data.augment.compose=0.3", "--synthetic")
        assert train(*words, str(made), out=tmp_path / "whole") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "30% of the images in another light" in said
        assert "30% with an object of another training image" in said
        assert stopped(*words, str(made), steps=3, out=tmp_path / "parts") == 75
        # In other workers, and with the data in another place.
        other = shutil.move(made, tmp_path / "elsewhere" / "relit")
        assert train(*words, str(other), "--num-workers", "2", out=tmp_path / "parts") == 0
        assert ending(tmp_path / "whole" / "r") == ending(tmp_path / "parts" / "r")
        # The control: without the images it learns something else.
        assert train(*words[:-1], out=tmp_path / "alone") == 0
        assert ending(tmp_path / "whole" / "r") != ending(tmp_path / "alone" / "r")

    def test_other_made_images_are_changed_data(
        self, train: Callable[..., int], stopped: Callable[..., int], made: Path, capsys
    ) -> None:
        words = (*SHORT, "--synthetic", str(made))
        assert stopped(*words) == 75
        for folder, ending_ in (("Imgs", "jpg"), ("GT", "png")):
            sorted((made / "TrainDataset" / folder).glob(f"*.{ending_}"))[0].unlink()
        capsys.readouterr()
        assert train(*words) == 4
        assert "The training data changed" in " ".join(capsys.readouterr().err.split())
        assert train(*words, "--synthetic-share", "0.2") == 4
        assert "data.synthetic_share" in capsys.readouterr().err


class TestLeaks:
    def test_test_images_are_refused_by_name(
        self, train: Callable[..., int], toy_data: Path, made: Path, capsys
    ) -> None:
        tested = images_of(toy_data, "TestDataset")
        provenance(made, [images_of(toy_data)[0], tested[0], tested[3]])
        assert train(*SHORT, "--synthetic", str(made), "--dry-run") == 3
        said = " ".join(capsys.readouterr().err.split())
        names = [path.stem for path in images_of(made)]
        assert "2 of 20 made images come from test images" in said and "Make the data again" in said
        assert f"{names[1]} (from {tested[0].name}, test set toy), {names[2]}" in said

    def test_real_images_are_not_made_ones(
        self, train: Callable[..., int], toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        copy = shutil.copytree(toy_data, tmp_path / "copy")
        for folder in (toy_data, copy):
            assert train(*SHORT, "--synthetic", str(folder), "--dry-run") == 3
            said = " ".join(capsys.readouterr().err.split())
            assert "36 of 40 images are real training images of this run" in said

    def test_test_sets_of_another_place_count(
        self, train: Callable[..., int], toy_data: Path, made: Path, tmp_path: Path, capsys
    ) -> None:
        generate_toy(tmp_path / "more", num_train=1, num_test=2, size=48, seed=5)
        provenance(made, images_of(tmp_path / "more", "TestDataset"))
        words = (*SHORT, "--synthetic", str(made), "--dry-run")
        # The control: without that test set nothing is measured with these images.
        assert train(*words) == 0
        assert train(*words, "--test-data", str(tmp_path / "more")) == 3

    def test_validation_images_leave_theirs_out(
        self, train: Callable[..., int], toy_data: Path, made: Path, tmp_path: Path, capsys
    ) -> None:
        provenance(made, images_of(toy_data)[::2])
        assert train(*SHORT, "--synthetic", str(made)) == 0
        said = " ".join(capsys.readouterr().out.split())
        rows = (tmp_path / "r" / "samples.csv").read_text().splitlines()
        validated = {row.split(",")[2] for row in rows if row.startswith("validation,")}
        origin = dict(zip(images_of(made), images_of(toy_data)[::2], strict=True))
        left_out = {own.stem for own, source in origin.items() if source.stem in validated}
        kept = {row.split(",")[2] for row in rows if row.startswith("synthetic,")}
        assert left_out and kept == {own.stem for own in origin} - left_out
        assert f"{len(left_out)} of 20 made images come from validation images" in said
        assert all(name in said for name in left_out)

    def test_moved_and_copied_sources_are_found(self, toy_data: Path, tmp_path: Path) -> None:
        def manifest(paths: Sequence[Path]) -> Manifest:
            return Manifest(tuple(Pair(p.stem, p, p, "d", "") for p in paths), "d", "test", "x")

        tested = images_of(toy_data, "TestDataset")
        here = Path("/d/TestDataset/toy/Imgs/a.jpg"), Path("/d/TrainDataset/Imgs/a.jpg")
        finder = Finder({"test": manifest([*tested, here[0]]), "training": manifest([here[1]])})

        def part(source: Path | str) -> str | None:
            found = finder.find(Path(source))
            return None if found is None else found.part

        assert part(tested[0]) == "test" and part(here[1]) == "training"
        # The same name in both: the folders decide, and where they do not, the careful answer.
        assert part("/gone/TestDataset/toy/Imgs/a.jpg") == "test"
        assert part("/gone/TrainDataset/Imgs/a.jpg") == "training"
        assert part("/gone/Imgs/a.jpg") == "test"
        assert part("/gone/other/a.jpg") is None
        copy = Path(shutil.copy(tested[1], tmp_path))
        assert part(copy) == "test"
        copy.write_bytes(b"something else of this name")
        finder = Finder({"test": manifest(tested)})
        assert part(copy) is None

    def test_sources_of_a_data_set_encoded_anew_are_found(
        self, toy_data: Path, tmp_path: Path
    ) -> None:
        """The source is still there, and the run has the same picture in other bytes."""
        held_out, other = images_of(toy_data)[:2]
        pair = Pair(held_out.stem, held_out, held_out, "d", "")
        finder = Finder({"validation": Manifest((pair,), "d", "val", "x")})
        picture = cv2.imread(str(held_out))
        larger = cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
        for name, pixels in ((held_out.name, picture), (f"{held_out.stem}.png", larger)):
            source = tmp_path / name
            assert cv2.imwrite(str(source), pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
            found = finder.find(source)
            assert found is not None and found.part == "validation"
        # The controls: another picture of this name, and this picture by another name.
        (tmp_path / "more").mkdir()
        shutil.copy(other, tmp_path / "more" / held_out.name)
        shutil.copy(held_out, tmp_path / "more" / "renamed.jpg")
        assert finder.find(tmp_path / "more" / held_out.name) is None
        assert finder.find(tmp_path / "more" / "renamed.jpg") is None


def test_what_contradicts_itself_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--synthetic-share 0.5 is for made data"):
        check_conflicts(build_config({"data.synthetic_share": 0.5}))
    check_conflicts(build_config({"data.synthetic_share": 0.5, "data.synthetic": [str(made)]}))
    with pytest.raises(DataError, match=r"--synthetic: No known data set layout"):
        find_made([tmp_path / "relit" / "TrainDataset" / "Imgs"], Search())
    found = find_made([made], Search())
    assert len(found) == 20 and all(pair.made and pair.labeled for pair in found.pairs)
    assert np.unique([pair.dataset for pair in found.pairs]).tolist() == ["synthetic relit"]
