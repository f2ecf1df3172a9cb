"""Training with images without an object: mixed per batch, split, calibrated, kept from leaking."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import ending

from camoxpert.config import DataConfig, build_config, check_conflicts
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.made import NO_MADE
from camoxpert.data.files.manifest import Manifest, Search, TrainingData, load_train
from camoxpert.data.files.mixing import mix_of
from camoxpert.data.files.negatives import empty_pairs, find_negatives, marked
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.unlabeled import joined
from camoxpert.data.loader import LoaderPlan, build_loader, finish
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import read_json
from camoxpert.inference.predictor import load_predictor
from camoxpert.metrics.presence import probability_measures
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.runtime.processes import World
from camoxpert.synthesis.toy import generate_toy, toy_pair
from camoxpert.training.calibrate import fit_calibration
from camoxpert.training.data import find_data
from camoxpert.training.negatives import (
    Kinds,
    find_kinds,
    set_calibration_aside,
    with_negatives,
)
from camoxpert.training.split import decide_split
from camoxpert.training.step import clip

SHORT = ("--epochs", "1", "--no-test", "--no-report", "--run-name", "r")


@pytest.fixture(scope="module")
def negatives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("without")
    generate_toy(root, num_train=1, num_test=0, size=48, difficulty=0.1, num_negatives=32, seed=3)
    return root / "Negatives"


def test_a_toy_scene_without_its_object_is_the_same_scene() -> None:
    image, mask = toy_pair(0, 3, size=48)
    empty, nothing = toy_pair(0, 3, size=48, empty=True)
    far = ~(mask > 0)
    far[1:-1, 1:-1] &= far[:-2, 1:-1] & far[2:, 1:-1] & far[1:-1, :-2] & far[1:-1, 2:]
    assert not nothing.any() and (image[mask > 0] != empty[mask > 0]).any()
    assert np.abs(image[far].astype(int) - empty[far]).mean() < 2


class TestFiles:
    def test_black_masks_and_noncam_names_are_found_and_others_are_not(self, tmp_path) -> None:
        for folder, name, mask in (
            ("GT", "black", np.zeros((40, 40), np.uint8)),
            ("GT", "COD10K-NonCAM-5-Background-5-Vegetation-4854", np.zeros((40, 40), np.uint8)),
            ("GT", "object", np.pad(np.full((1, 1), 255, np.uint8), 20)[:40, :40]),
        ):
            write_jpeg(tmp_path / "Imgs" / f"{name}.jpg", toy_pair(0, 0, size=40)[0])
            write_png(tmp_path / folder / f"{name}.png", mask)
        pairs = load_train([tmp_path], Search(noncam="include")).pairs
        found = {pair.name for pair in empty_pairs(pairs)}
        assert found == {"black", "COD10K-NonCAM-5-Background-5-Vegetation-4854"}
        # Those of four channels, which deflate shortens to less.
        large = np.zeros((3000, 4000, 4), np.uint8)
        large[..., 3] = 255
        write_png(tmp_path / "GT" / "black.png", large)
        write_jpeg(tmp_path / "Imgs" / "black.jpg", large[..., :3])
        pairs = load_train([tmp_path], Search(noncam="include")).pairs
        assert (tmp_path / "GT" / "black.png").stat().st_size > 4096 + 12_000_000 // 400
        assert "black" in {pair.name for pair in empty_pairs(pairs)}
        # Uncompressed masks are looked at as well.
        from PIL import Image

        Image.fromarray(np.zeros((200, 200), np.uint8)).save(tmp_path / "GT" / "object.bmp")
        (tmp_path / "GT" / "object.png").unlink()
        pairs = load_train([tmp_path], Search(noncam="include")).pairs
        assert "object" in {pair.name for pair in empty_pairs(pairs)}

    def test_folders_are_named_and_their_mistakes_told(self, negatives, tmp_path) -> None:
        found = find_negatives([negatives])
        assert len(found) == 32 and all(p.empty and p.mask == p.image for p in found.pairs)
        assert found.pairs[0].name.startswith("Negatives/")
        for folders, text in (
            ([negatives, negatives], "given twice"),
            ([tmp_path / "no"], "--negatives: There is no"),
            ([tmp_path], "holds no images"),
        ):
            with pytest.raises(DataError, match=text):
                find_negatives(folders)


class TestMixing:
    def test_every_batch_has_its_share_in_any_process_and_worker(self, toy_data, negatives) -> None:
        manifest = joined(load_train([toy_data]), find_negatives([negatives]))
        data = build_config({"data.img_size": 32, "data.negative_share": 0.25}).data
        mixed = mix_of(manifest, data)
        # 40 with an object: a third as many without.
        assert (mixed.real, mixed.negatives, mixed.negatives_seen) == (40, 32, 13)
        seen = {}
        for workers in (0, 1):
            loader = build_loader(
                manifest, data, LoaderPlan(num_workers=workers), batch_size=8, seed=1
            )
            loader.set_epoch(1)
            batches = [finish(loader, batch, torch.device("cpu")) for batch in loader]
            seen[workers] = [name for batch in batches for name in batch.names]
            shares = [sum(n.startswith("Negatives/") for n in b.names) for b in batches[:-1]]
            assert set(shares) <= {1, 2, 3}
            for batch in batches:
                for name, mask in zip(batch.names, batch.masks, strict=True):
                    if name.startswith("Negatives/"):
                        assert not mask.any()
        assert seen[0] == seen[1] and max(Counter(seen[0]).values()) == 1

    def test_black_masks_in_the_data_are_mixed_alike(self, toy_data) -> None:
        manifest = load_train([toy_data])
        told = marked(manifest, frozenset(manifest.pairs[::2]))
        assert mix_of(manifest, DataConfig()).negatives == 0
        assert mix_of(told, DataConfig()).negatives == 20


class TestRun:
    def test_head_split_calibration_and_resuming(
        self,
        train: Callable[..., int],
        stopped: Callable[..., int],
        negatives: Path,
        tmp_path: Path,
        capsys,
    ) -> None:
        words = (*SHORT, "--negative-share", "0.4", "--negatives")
        assert train(*words, str(negatives), out=tmp_path / "whole") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "presence on: 32 of 72 training images have no object" in said
        assert "are set aside: they neither train nor choose" in said
        assert "fewer than 60 images of a kind calibrate the presence head" in said
        assert "presence calibrated on" in said
        run = tmp_path / "whole" / "r"
        rows = [line.split(",") for line in (run / "samples.csv").read_text().splitlines()[1:]]
        kinds = Counter((row[0], row[1].split()[0]) for row in rows)
        parts = ("training", "validation", "calibration")
        assert sum(kinds.values()) == 72
        assert set(kinds) == {(part, kind) for part in parts for kind in ("toy0", "negatives")}
        info = read_json(run / "run.json")
        assert info["images"]["calibration"] == sum(kinds["calibration", k] for _, k in kinds) / 3
        fit = info["presence"]
        assert fit["objects"] and fit["empty"] and fit["after"] <= fit["before"] + 0.01
        for place in (run, run / "model"):
            calibration = load_predictor(place, device="cpu").model.presence.calibration
            assert calibration.temperature.item() == pytest.approx(fit["temperature"], rel=1e-5)
            assert int(calibration.images) == fit["objects"] + fit["empty"]
        best = load_checkpoint(run / "checkpoints" / "best.pt")
        assert best.config.model.presence == "auto" and best.model_config.presence == "on"
        # Stopped, and continued with its data elsewhere, in other workers.
        assert stopped(*words, str(negatives), steps=3, out=tmp_path / "parts") == 75
        other = shutil.copytree(negatives, tmp_path / "elsewhere" / "Negatives")
        more = ("--cache", "ram")
        assert train(*words, str(other), *more, out=tmp_path / "parts") == 0
        assert ending(run) == ending(tmp_path / "parts" / "r")
        assert read_json(tmp_path / "parts" / "r" / "run.json")["presence"] == fit

    def test_the_head_does_not_shorten_the_steps_of_the_masks(self) -> None:
        values = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
        norms = []
        for presence in ("on", "off"):
            torch.manual_seed(0)
            model = build_model(build_config(values | {"model.presence": presence}).model)
            for name, parameter in model.named_parameters():
                size = 1e3 if name.startswith("presence.") else 1.0
                parameter.grad = torch.full_like(parameter, size)
            norm, finite = clip(model, 0.5)
            assert finite
            gradients = [p.grad for n, p in model.named_parameters() if "presence" not in n]
            norms.append((norm, torch.cat([g.flatten() for g in gradients])))
        assert torch.equal(norms[0][0], norms[1][0]) and torch.equal(norms[0][1], norms[1][1])
        model = build_model(build_config(values | {"model.presence": "on"}).model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model.presence.leave.bias.grad.fill_(float("nan"))
        assert not clip(model, 0.5)[1], "a step that is not finite is skipped as a whole"

    def test_auto_is_off_without_and_on_is_refused(
        self, train: Callable[..., int], toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        assert train(*SHORT, "--dry-run") == 0
        assert "presence" not in capsys.readouterr().out
        assert train(*SHORT, "--dry-run", "--presence", "on") == 3
        assert "no image without an object" in " ".join(capsys.readouterr().err.split())
        with pytest.raises(ConfigError, match="--negative-share"):
            check_conflicts(build_config({"data.negative_share": 0.4, "model.presence": "off"}))

    def test_leaks_are_refused(
        self, train: Callable[..., int], toy_data: Path, negatives: Path, tmp_path: Path, capsys
    ) -> None:
        for split, text in (
            ("TrainDataset", "a training image with an object"),
            ("TestDataset/toy", "an image of the test set toy"),
        ):
            folder = shutil.copytree(negatives, tmp_path / split.replace("/", "-"))
            image = sorted((toy_data / split / "Imgs").iterdir())[0]
            shutil.copy(image, folder / "other_name.jpg")
            assert train(*SHORT, "--dry-run", "--negatives", str(folder)) == 3
            said = " ".join(capsys.readouterr().err.split())
            assert f"other_name.jpg: the same file is {text}" in said


class TestKinds:
    def test_a_given_validation_split_gets_its_share(self, toy_data, negatives) -> None:
        whole = load_train([toy_data])
        given = replace(whole, pairs=whole.pairs[:6], split="validation")
        config = build_config({"data.negatives": [str(negatives)], "data.val_fraction": 0.25})
        found = with_negatives(TrainingData(whole, given), config)
        assert len(found.whole) == 72 and found.given is not None
        assert sum(pair.empty for pair in found.given.pairs) == 8
        train, validation = decide_split(found, config, {})
        assert (len(train), len(validation)) == (72 - 14, 14)

    def test_copies_stay_together_beside_a_validation_split(
        self, toy_data: Path, negatives: Path, tmp_path: Path
    ) -> None:
        scenes = sorted(negatives.iterdir())[:5]
        for number, scene in enumerate(scenes):
            for copy in range(4):
                shutil.copy(scene, tmp_path / f"n{number}_{copy}{scene.suffix}")
        whole = load_train([toy_data])
        given = replace(whole, pairs=whole.pairs[:4])
        config = build_config({"data.negatives": [str(tmp_path)], "data.val_fraction": 0.3})
        found = with_negatives(TrainingData(whole, given), config)
        assert found.given is not None
        validated = Counter(pair.name[:2] for pair in found.given.pairs if pair.empty)
        assert validated and set(validated.values()) == {4}

    def test_auto_needs_some_and_the_stopped_run_decides(self, toy_data) -> None:
        whole = load_train([toy_data])

        def kinds(black: int, presence: str = "auto", kept: str | None = None) -> Kinds:
            config = build_config({"model.presence": presence})
            known = marked(whole, frozenset(whole.pairs[:black]))
            return find_kinds(TrainingData(known), NO_MADE, config, kept)

        assert [kinds(n).head for n in (0, 3, 8, 20, 40)] == [False, False, True, True, False]
        assert kinds(3).apart and "needs" in kinds(3).reason and not kinds(0).apart
        assert kinds(3, kept="off").apart, "continued, they are told apart as before"
        assert kinds(3, "on").head and not kinds(20, "off").apart
        assert not kinds(20, kept="off").head and kinds(3, kept="on").head
        with pytest.raises(DataError, match="there is nothing to learn to find"):
            kinds(40, "on")

    @pytest.mark.parametrize("number", [1, 3, 24])
    def test_black_masks_and_a_folder_are_the_same(
        self, toy_data: Path, negatives: Path, tmp_path: Path, number: int, capsys
    ) -> None:
        """The same images with black masks and as ``--negatives``: share, parts, words."""
        folder = tmp_path / "Negatives"
        whole = shutil.copytree(toy_data / "TrainDataset", tmp_path / "d" / "TrainDataset")
        for image in sorted(negatives.iterdir())[:number]:
            folder.mkdir(exist_ok=True)
            shutil.copy(image, folder)
            shutil.copy(image, whole / "Imgs" / f"empty_{image.name}")
            write_png(whole / "GT" / f"empty_{image.stem}.png", np.zeros((48, 48), np.uint8))
        ways = [
            {"data.roots": [str(tmp_path / "d")]},
            {"data.roots": [str(toy_data)], "data.negatives": [str(folder)]},
        ]
        seen = []
        for way in ways:
            # Which copies fit into a part depends on their names, which differ.
            data = find_data(build_config(way | {"data.group_copies": False}), World())
            parts = {
                "training": data.train, "validation": data.validation, "apart": data.negatives,
                "calibration": data.calibration,
            }  # fmt: skip
            kinds = {
                name: Counter(pair.empty for pair in part.pairs) for name, part in parts.items()
            }
            lines = [
                line
                for line in capsys.readouterr().out.splitlines()
                if line.split()[0] in ("data", "presence", "negatives", "calibration", "masks")
            ]
            seen.append((kinds, data.mix, data.recipe.config.model.presence, lines))
        assert seen[0][:3] == seen[1][:3] and seen[0][1].negatives
        assert [" ".join(line.split()) for line in seen[0][3]] == [
            " ".join(line.split()) for line in seen[1][3]
        ]

    def test_contradictions_of_black_masks_are_told(
        self, toy_data: Path, tmp_path: Path, train: Callable[..., int], capsys
    ) -> None:
        whole = shutil.copytree(toy_data / "TrainDataset", tmp_path / "d" / "TrainDataset")
        image = sorted((whole / "Imgs").iterdir())[0]
        shutil.copy(image, whole / "Imgs" / f"other{image.suffix}")
        write_png(whole / "GT" / "other.png", np.zeros((48, 48), np.uint8))
        assert train(*SHORT, "--dry-run", "--dataset-path", str(tmp_path / "d")) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "1 image with a black mask is in the training data with an object as well" in said

    def test_both_kinds_are_set_aside_and_stay_so(self, toy_data, negatives) -> None:
        config = build_config({"data.negatives": [str(negatives)]})
        found = with_negatives(TrainingData(load_train([toy_data])), config)
        rest, aside = set_calibration_aside(found.whole, found.whole, NO_MADE, config, {})
        assert Counter(pair.empty for pair in aside.pairs) == {False: 10, True: 8}
        assert not set(rest.pairs) & set(aside.pairs)
        kept = {(p.dataset, p.name): "calibration" for p in aside.pairs}
        kept |= {(p.dataset, p.name): "training" for p in rest.pairs}
        again = set_calibration_aside(found.whole, found.whole, NO_MADE, config, kept)
        assert [part.pairs for part in again] == [rest.pairs, aside.pairs]
        off = build_config({"data.calibration_fraction": 0.0})
        assert not len(set_calibration_aside(found.whole, found.whole, NO_MADE, off, {})[1])

    @pytest.mark.parametrize(
        ("number", "fraction", "aside"),
        [(2000, 0.05, 100), (400, 0.05, 60), (100, 0.05, 25), (100, 0.4, 40), (3, 0.05, 0)],
    )
    def test_how_many_calibrate(self, number: int, fraction: float, aside: int) -> None:
        """5 %, at least 60, at most a quarter unless more was asked for; each kind by itself."""
        place = Path("none")
        pairs = [
            Pair(f"{n}", place, place, "d", "", empty=n < number) for n in range(number + 2000)
        ]
        whole = Manifest(tuple(pairs), "d", "training", "")
        config = build_config({"data.group_copies": False, "data.calibration_fraction": fraction})
        rest, found = set_calibration_aside(whole, whole, NO_MADE, config, {})
        if aside:
            kinds = Counter(pair.empty for pair in found.pairs)
            assert kinds == {True: aside, False: max(100, round(fraction * 2000))}
        assert len(rest) + len(found) == number + 2000 and bool(len(found)) == bool(aside)


class TestFit:
    def test_it_finds_what_made_the_labels(self) -> None:
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 4, 20_000)
        labels = (rng.random(20_000) < _sigmoid(logits / 2.5 - 0.7)).astype(float)
        fit = fit_calibration(logits, labels)
        assert fit.temperature == pytest.approx(2.5, rel=0.05)
        # Both kinds count alike: the share of objects among these images is taken out.
        share = labels.mean()
        assert share < 0.45
        assert fit.bias == pytest.approx(-0.7 - np.log(share / (1 - share)), abs=0.06)
        assert fit.after < fit.before - 0.02
        assert fit.objects + fit.empty == 20_000

    def test_by_hand(self) -> None:
        """Logits of one value say nothing: half and half, whatever the share of objects."""
        fit = fit_calibration(np.zeros(8), np.array([1.0] * 6 + [0] * 2))
        # Targets 6.1 / 6.2 and 0.1 / 2.2, each kind a half.
        mean = (6.1 / 6.2 + 0.1 / 2.2) / 2
        assert fit.temperature == 1
        assert fit.bias == pytest.approx(np.log(mean / (1 - mean)), rel=0.05)
        assert fit.before == pytest.approx(np.log(2))

    def test_the_share_of_the_images_set_aside_changes_nothing(self) -> None:
        rng = np.random.default_rng(1)
        objects, empty = rng.normal(2, 2, 4000), rng.normal(-1, 1, 4000)
        fits = [
            fit_calibration(np.r_[objects, empty[:n]], np.r_[np.ones(4000), np.zeros(n)])
            for n in (4000, 400)
        ]
        assert fits[0].temperature == pytest.approx(fits[1].temperature, rel=0.1)
        assert fits[0].bias == pytest.approx(fits[1].bias, abs=0.2)

    def test_kinds_that_are_apart_stay_finite_and_noise_becomes_one_half(self) -> None:
        apart = fit_calibration(np.array([-3.0, -2, 2, 3]), np.array([0.0, 0, 1, 1]))
        assert 0.5 <= apart.temperature <= 2 and abs(apart.bias) < 0.1
        # Two images of either kind are no reason to be surer than the head is.
        assert _sigmoid(3 / apart.temperature + apart.bias) < 0.985
        wrong = fit_calibration(np.array([3.0, 2, -2, -3] * 5), np.array([0.0, 0, 1, 1] * 5))
        assert wrong.temperature == pytest.approx(100)
        assert _sigmoid(3 / wrong.temperature + wrong.bias) == pytest.approx(0.5, abs=0.02)

    @pytest.mark.parametrize("over", [1.0, 2.0])
    def test_few_images_that_hardly_overlap_do_not_make_it_timid(self, over: float) -> None:
        """Platt's targets of 32 images are .97 and .03 where the truth is nearly 1 and 0: an error
        of .04 to .05 for these logits. Without a prior it is .035; chance alone gives .019."""
        errors = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            labels = np.tile([1.0, 0.0], 832)
            # AUROC .98: the logarithm of the odds is normal, 8.4 apart.
            odds = rng.normal(np.where(labels > 0.5, 4.22, -4.22), 2.9)
            logits = over * odds + 1
            fit = fit_calibration(logits[:64], labels[:64])
            probability = _sigmoid(logits[64:] / fit.temperature + fit.bias)
            errors.append(probability_measures(probability, labels[64:] > 0.5)["ECE"])
        assert np.mean(errors) < 0.034


def _sigmoid(logits):
    return 1 / (1 + np.exp(-logits))
