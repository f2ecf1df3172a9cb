"""Quick runs: a share of the data, fewer batches, a few batches by heart; none passes as a whole
one."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import TINY_SETTINGS, events, records, weights_of
from PIL import Image

from camoxpert.cli import main
from camoxpert.config import build_config, load_config
from camoxpert.data.files.manifest import Manifest, evenly
from camoxpert.data.files.pairing import Pair
from camoxpert.data.samples.sampler import EpochSampler
from camoxpert.errors import ConfigError
from camoxpert.files import read_json
from camoxpert.runs.folder import run_name
from camoxpert.training import overfit, plan
from camoxpert.training.prepare import prepare
from camoxpert.training.quick import stratified
from camoxpert.training.stages import training_loader
from camoxpert.training.validate import validated

WHOLE = "Quick run, not a whole one"


def manifest(counts: dict[str, int]) -> Manifest:
    """Return so many pairs of each class."""
    pairs = [
        Pair(f"{group}-{index}", Path("i"), Path("m"), "d", group)
        for group, number in counts.items()
        for index in range(number)
    ]
    return Manifest(tuple(pairs), "d", "train", "flat")


def only(folder: Path) -> Path:
    (run,) = [path for path in folder.iterdir() if (path / "run.json").is_file()]
    return run


def splits(run: Path) -> dict[str, str]:
    with (run / "samples.csv").open() as file:
        return {row["name"]: row["split"] for row in csv.DictReader(file)}


class TestPart:
    COUNTS = {"crab": 40, "moth": 80, "owl": 40}  # noqa: RUF012

    def test_every_class_and_size_keeps_its_share(self) -> None:
        whole = manifest(self.COUNTS)
        # A quarter of every class is small.
        sizes = [1 + (index % 4 > 0) for index in range(len(whole))]
        kinds = {(p.dataset, p.name): (p.group, s) for p, s in zip(whole.pairs, sizes, strict=True)}
        chosen = stratified(whole, 0.3, 7, sizes)
        found = Counter(kinds[p.dataset, p.name] for p in chosen)
        assert found == {
            ("crab", 1): 3, ("crab", 2): 9, ("moth", 1): 6,
            ("moth", 2): 18, ("owl", 1): 3, ("owl", 2): 9,
        }  # fmt: skip
        assert chosen <= set(whole.pairs), "groups stay as they are"

    def test_the_choice_is_that_of_the_seed(self) -> None:
        whole = manifest(self.COUNTS)
        sizes = [2] * len(whole)
        turned = replace(whole, pairs=whole.pairs[::-1])
        assert stratified(whole, 0.3, 7, sizes) == stratified(turned, 0.3, 7, sizes)
        assert stratified(whole, 0.3, 7, sizes) != stratified(whole, 0.3, 8, sizes)

    def test_copies_stay_together(self) -> None:
        whole = manifest({"owl": 40})
        families = [list(range(start, start + 4)) for start in range(0, 40, 4)]
        chosen = stratified(whole, 0.3, 1, [2] * 40, families)
        inside = [sum(whole.pairs[i] in chosen for i in family) for family in families]
        assert sorted(inside) == [0] * 7 + [4] * 3
        # Control: without families the same share tears them apart.
        torn = stratified(whole, 0.3, 1, [2] * 40)
        assert {sum(whole.pairs[i] in torn for i in family) for family in families} - {0, 4}

    def test_one_family_of_all_is_kept_whole(self) -> None:
        whole = manifest({"owl": 6})
        assert stratified(whole, 0.3, 1, [2] * 6, [list(range(6))]) == set(whole.pairs)

    def test_evenly(self) -> None:
        whole = manifest({"owl": 10})
        names = [pair.name for pair in evenly(whole, 4).pairs]
        assert names == ["owl-0", "owl-2", "owl-5", "owl-7"]
        assert evenly(whole, 10) is whole


class TestFraction:
    def test_a_run_says_what_it_is(self, train: Callable[..., int], tmp_path: Path) -> None:
        words = ["--epochs", "1", "--data-fraction", "0.5"]
        assert train(*words, out=tmp_path / "q") == 0
        assert train("--epochs", "1", out=tmp_path / "w") == 0
        quick, whole = only(tmp_path / "q"), only(tmp_path / "w")
        assert "-quick-data0.5-" in quick.name and "quick" not in whole.name
        assert list(read_json(quick / "run.json")["quick"]) == ["train.quick.data_fraction"]
        assert read_json(whole / "run.json")["quick"] == {}
        assert WHOLE in (quick / "report.html").read_text()
        assert WHOLE not in (whole / "report.html").read_text()
        assert WHOLE in (quick / "model" / "README.md").read_text()
        assert WHOLE not in (whole / "model" / "README.md").read_text()
        before, after = splits(whole), splits(quick)
        assert Counter(before.values()) == {"training": 36, "validation": 4}
        assert Counter(after.values()) == {"training": 18, "left out": 18, "validation": 4}
        held_out = {name for name, split in before.items() if split == "validation"}
        assert held_out == {name for name, split in after.items() if split == "validation"}
        assert (
            read_json(quick / "run.json")["data_hash"] == read_json(whole / "run.json")["data_hash"]
        )
        steps = [max(r["step"] for r in records(run, "validation")) for run in (quick, whole)]
        assert steps == [3, 5]

    def test_a_stopped_run_keeps_its_part(
        self, train: Callable[..., int], stopped: Callable[..., int], tmp_path: Path
    ) -> None:
        words = ["--epochs", "2", "--data-fraction", "0.5", "--no-report", "--no-test"]
        assert stopped(*words, steps=2) == 75
        part = splits(only(tmp_path))
        assert train(*words) == 0
        assert splits(only(tmp_path)) == part
        assert train(*words, out=tmp_path / "once") == 0
        once, twice = (weights_of(only(f)) for f in (tmp_path / "once", tmp_path))
        assert all(torch.equal(once[name], twice[name]) for name in once)

    def test_a_user_s_name_says_it_as_well(self) -> None:
        named = {"run.name": "mine"}
        assert run_name(load_config(flags=named)) == "mine"
        quick = {**named, "train.quick.limit_batches": 3}
        assert run_name(load_config(flags=quick)) == "mine-quick-limit3"


class TestLimit:
    def test_an_epoch_is_the_start_of_a_whole_one(self) -> None:
        few = EpochSampler(20, seed=1, batch_size=4, batches=2)
        every = EpochSampler(20, seed=1, batch_size=4)
        for epoch in (0, 1):
            assert few.order(epoch).tolist() == every.order(epoch)[:8].tolist()
        assert few.order(0).tolist() != few.order(1).tolist()
        assert len(EpochSampler(6, seed=1, batch_size=4, batches=9)) == 6

    def test_training_and_validation_are_short(
        self, train: Callable[..., int], tmp_path: Path
    ) -> None:
        words = ["--epochs", "2", "--limit-batches", "2", "--val-fraction", "0.5", "--no-test"]
        assert train(*words) == 0
        run = only(tmp_path)
        assert [r["step"] for r in records(run, "validation")] == [2, 4]
        assert list(read_json(run / "run.json")["quick"]) == ["train.quick.limit_batches"]

    def test_the_images_validated(self, toy_data: Path) -> None:
        settings = {**TINY_SETTINGS, "data.roots": (str(toy_data),), "data.val_fraction": 0.5}
        settings |= {"train.batch_size": 4, "train.epochs": 1}
        run = prepare(build_config({**settings, "train.quick.limit_batches": 2}))
        assert (len(validated(run)), len(run.data.validation)) == (8, 20)
        assert validated(run) == validated(run)
        assert len(validated(prepare(build_config(settings)))) == 20


class TestByHeart:
    def test_the_same_batches_without_augmentation(
        self, toy_data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "OVERFIT_STEPS", 4)
        settings = {**TINY_SETTINGS, "data.roots": (str(toy_data),), "train.batch_size": 4}
        settings |= {"train.epochs": 2, "data.augment.relight": 0.5, "data.multi_scale": (0.5, 1)}
        run = prepare(build_config({**settings, "train.quick.overfit_batches": 2}))
        assert len(run.data.train) == 8 and run.data.validation.pairs == run.data.train.pairs
        assert run.data.tests == {} and run.plan.stages[0].batches == 4
        loader = training_loader(run, 4, batches=4)
        seen = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            seen += [(tuple(b.names), b.images, b.masks) for b in loader]
        assert len(seen) == 8
        for index in (0, 1):
            first, *others = seen[index::2]
            for names, images, masks in others:
                assert names == first[0]
                assert torch.equal(images, first[1]) and torch.equal(masks, first[2])
        assert seen[0][0] != seen[1][0]
        # Control: a whole run augments.
        whole = training_loader(prepare(build_config({**settings, "data.multi_scale": ()})), 4)
        one = next(b.images for b in whole)
        whole.set_epoch(1)
        assert not any(torch.equal(one, b.images) for b in whole)

    def test_a_sound_run_learns_and_ends_early(
        self, train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(overfit, "NEAR_ZERO", 0.4)
        words = ["--overfit-batches", "1", "--batch-size", "4", "--epochs", "9", "--lr", "3e-3"]
        assert train(*words, "--num-experts", "1", "--top-k", "1") == 0
        run = only(tmp_path)
        assert run.name.split("-")[2:4] == ["quick", "overfit1"]
        assert any("learned by heart" in text for text in events(run))
        found = records(run, "validation")
        assert len(found) < 9 and found[-1]["scores"]["IoU"] > 0.5
        assert WHOLE in (run / "report.html").read_text()
        assert not (run / "evaluation").exists()

    def test_a_stopped_run_keeps_its_batches(
        self,
        train: Callable[..., int],
        stopped: Callable[..., int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(plan, "OVERFIT_STEPS", 4)
        monkeypatch.setattr(overfit, "NEAR_ZERO", 9.0)
        words = ["--overfit-batches", "2", "--batch-size", "4", "--epochs", "2", "--no-report"]
        assert stopped(*words, steps=2) == 75
        part = splits(only(tmp_path))
        assert Counter(part.values()) == {"training": 8, "left out": 32}
        assert train(*words) == 0
        assert splits(only(tmp_path)) == part
        assert len(records(only(tmp_path), "validation")) == 1

    def test_a_fault_is_named(
        self,
        train: Callable[..., int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(plan, "OVERFIT_STEPS", 3)
        words = ["--overfit-batches", "1", "--epochs", "8", "--lr", "2e-6", "--no-report"]
        assert train(*words, "--stage1-epochs", "8", "--batch-size", "2") == 5
        said = " ".join(capsys.readouterr().err.split())
        assert "could not be learned by heart" in said and "--lr 2e-06" in said
        assert "frozen all the time" in said and "hardly moved" in said
        run = only(tmp_path)
        assert read_json(run / "run.json")["status"] == "finished"
        assert len(records(run, "validation")) == 1 + overfit.PATIENCE, "given up early"
        assert any("frozen all the time" in text for text in events(run))

    def test_empty_masks_are_no_success(
        self, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str], train: Callable[..., int],
    ) -> None:  # fmt: skip
        """Nothing is easier to learn than that there is nothing."""
        monkeypatch.setattr(plan, "OVERFIT_STEPS", 3)
        monkeypatch.setattr(overfit, "NEAR_ZERO", 9.0)
        for kind in ("Imgs", "GT"):
            (tmp_path / "data" / "TrainDataset" / kind).mkdir(parents=True)
        for index in range(4):
            image = np.full((32, 32, 3), 40 * index, np.uint8)
            place = tmp_path / "data" / "TrainDataset"
            Image.fromarray(image).save(place / "Imgs" / f"a{index}.jpg")
            Image.fromarray(image[..., 0] * 0).save(place / "GT" / f"a{index}.png")
        words = ["--overfit-batches", "1", "--epochs", "1", "--no-report", "--batch-size", "4"]
        assert train(*words, data=tmp_path / "data", out=tmp_path / "runs") == 5
        assert "all 4 masks are empty" in " ".join(capsys.readouterr().err.split())

    def test_losses_before_a_stop_count(
        self,
        train: Callable[..., int],
        stopped: Callable[..., int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Stopped in the second epoch and continued: given up when an unbroken run is."""
        monkeypatch.setattr(plan, "OVERFIT_STEPS", 3)
        words = ["--overfit-batches", "1", "--epochs", "8", "--lr", "2e-6", "--no-report"]
        words += ["--stage1-epochs", "8", "--batch-size", "2"]
        seen = []
        honest = overfit.Overfit.end_epoch

        def end_epoch(watch: overfit.Overfit) -> str:
            text = honest(watch)
            seen.append(list(watch.losses))
            return text

        monkeypatch.setattr(overfit.Overfit, "end_epoch", end_epoch)
        assert train(*words, out=tmp_path / "whole") == 5
        whole = seen.copy()
        seen.clear()
        assert stopped(*words, steps=5, out=tmp_path / "parts") not in (0, 5)
        assert len(seen) == 1, "stopped within the second epoch"
        assert train(*words, out=tmp_path / "parts") == 5
        assert seen == whole and len(whole[-1]) == 1 + overfit.PATIENCE

    def test_a_loss_that_is_not_a_number_is_no_success(self) -> None:
        watch = overfit.Overfit()
        for _ in range(1 + overfit.PATIENCE):
            assert not watch.reached
            watch.add(float("nan"))
            text = watch.end_epoch()
        assert "not learned" in text and not watch.reached


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.quick.overfit_batches": 1, "train.quick.limit_batches": 2}, "--limit-batches 2"),
        ({"train.quick.overfit_batches": 1, "train.quick.data_fraction": 0.5}, "--data-fraction"),
        ({"train.quick.data_fraction": 0}, "above 0"),
        ({"train.quick.limit_batches": 0}, "at least 1"),
    ],
)
def test_contradictions(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(flags=settings)


def test_a_contest_of_quick_runs_is_refused(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["benchmark", "quality", "--dataset-path", str(toy_data), "-o", str(tmp_path / "q")]
    words += ["--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--arms", "moe"]
    assert main([*words, "--limit-batches", "2"]) == 2
    assert "whole ones" in " ".join(capsys.readouterr().err.split())
