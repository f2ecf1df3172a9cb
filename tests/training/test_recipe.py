"""What a run decides for the settings that the user left open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from camoxpert.cli import main
from camoxpert.config import AugmentConfig, build_config, load_config, to_dict
from camoxpert.data.samples.augment import SampleTransform
from camoxpert.errors import ConfigError
from camoxpert.files import read_json
from camoxpert.synthesis.toy import generate_toy, toy_pair
from camoxpert.training.recipe import (
    GOVERNED,
    PRESETS,
    choose_recipe,
    recipe_of_older_version,
)

# 16 images a step by default: 150 images and 120 epochs are 120 x 10 steps.
CASES = [
    (150, 20, "tiny"),
    (150, 120, "standard"),
    (700, 120, "standard"),
    (4040, 120, "full"),
    (4040, 3, "tiny"),
]


@pytest.mark.parametrize(("images", "epochs", "name"), CASES)
def test_auto_goes_by_the_number_of_steps(images: int, epochs: int, name: str) -> None:
    asked = build_config({"train.epochs": epochs})
    recipe = choose_recipe(asked, images)
    preset = PRESETS[name]
    assert recipe.reason.startswith(f"{name} (about {epochs * -(-images // 16)} optimizer steps)")
    assert recipe.config.optim.lr == preset.lr
    assert recipe.config.optim.backbone_lr_scale == preset.backbone
    assert recipe.config.train.stage1_epochs == 0
    assert recipe.config.data.augment.strength == preset.strength


def test_the_effective_batch_counts_processes_and_accumulation() -> None:
    asked = build_config({"train.batch_size": 4, "train.accumulation_steps": 2, "train.epochs": 1})
    for processes in (1, 2, 4):
        steps = 800 // (8 * processes)
        assert f"about {steps} opt" in choose_recipe(asked, 800, processes=processes).reason


def test_without_weights_the_rate_is_that_from_scratch() -> None:
    asked = build_config({"model.pretrained": False, "train.preset": "full"})
    optim = choose_recipe(asked, 10).config.optim
    assert (optim.lr, optim.backbone_lr_scale) == (PRESETS["full"].lr_from_scratch, 1)


def test_what_the_user_set_wins() -> None:
    own = {
        "optim.lr": 0.0123,
        "optim.backbone_lr_scale": 0.7,
        "train.stage1_epochs": 3,
        "data.augment.strength": 0.25,
    }
    recipe = choose_recipe(build_config({**own, "train.preset": "full"}), 10)
    assert recipe.values == own
    assert recipe.reason.count("as asked") == 5
    # Nothing else changes.
    assert to_dict(recipe.config) == to_dict(build_config({**own, "train.preset": "full"}))


def test_rates_of_stage_2_without_a_stage_1_are_said() -> None:
    own = {"optim.lr": 1e-3, "optim.stage2_lr": 1e-5, "train.stage2_batch_size": 2}
    said = choose_recipe(build_config(own), 10).reason
    assert "everything takes --stage2-lr 1e-05 in place of --lr and --stage2-batch-size 2" in said
    with_stage1 = choose_recipe(build_config({**own, "train.stage1_epochs": 3}), 10)
    assert "stage2" not in with_stage1.reason


def test_settings_that_contradict_the_preset_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--min-lr 0.1 is above --lr 0.0055"):
        choose_recipe(build_config({"optim.min_lr": 0.1, "train.preset": "tiny"}), 10)


def test_an_own_strength_of_augmentation_is_not_weakened() -> None:
    asked = build_config({"data.augment.rotate": 45.0, "train.preset": "tiny"})
    assert PRESETS["tiny"].strength < 1
    assert choose_recipe(asked, 10).config.data.augment.strength == 1
    # The flips are not governed.
    flips = build_config({"data.augment.vflip": 0.5, "train.preset": "tiny"})
    assert choose_recipe(flips, 10).config.data.augment.strength == PRESETS["tiny"].strength


def test_a_continued_run_keeps_its_recipe() -> None:
    kept = {
        "optim.lr": 0.007,
        "optim.backbone_lr_scale": 0.2,
        "train.stage1_epochs": 1,
        "data.augment.strength": 0.5,
    }
    recipe = choose_recipe(build_config({}), 4040, kept=kept)
    assert recipe.values == kept and "as the stopped run had it" in recipe.reason
    # A new explicit value still wins.
    recipe = choose_recipe(build_config({"optim.lr": 0.001}), 4040, kept=kept)
    assert recipe.values == {**kept, "optim.lr": 0.001}


def test_runs_of_the_version_before_presets_go_on_as_they_were() -> None:
    old = recipe_of_older_version(build_config({"optim.lr": 2.5e-4, "train.epochs": 40}))
    assert old == {
        "optim.lr": 2.5e-4,
        "optim.backbone_lr_scale": 0.1,
        "train.stage1_epochs": 10,
        "data.augment.strength": 1.0,
    }
    scratch = build_config({"model.pretrained": False})
    assert recipe_of_older_version(scratch)["train.stage1_epochs"] == 0


def test_strength_scales_all_but_the_flips() -> None:
    image, mask = toy_pair(0, 0, size=64)

    def samples(augment: AugmentConfig) -> list[np.ndarray]:
        change = SampleTransform(img_size=64, augment=augment, seed=1)
        return [change(image, mask, epoch=0, index=index)[0] for index in range(12)]

    still = samples(AugmentConfig(strength=0.0))
    assert all(np.array_equal(s, image) or np.array_equal(s, image[:, ::-1]) for s in still)
    assert {np.array_equal(s, image) for s in still} == {True, False}
    half = AugmentConfig(strength=0.5, rotate=30.0)
    same = AugmentConfig(
        rotate=15.0, scale=0.1, translate=0.04, brightness=0.1, contrast=0.1, saturation=0.1,
        hue=0.01, blur=0.025, noise=0.025,
    )  # fmt: skip
    assert all(map(np.array_equal, samples(half), samples(same)))
    for unset, full in zip(
        samples(AugmentConfig()), samples(AugmentConfig(strength=1.0)), strict=True
    ):
        assert np.array_equal(unset, full)


def test_a_run_says_and_records_its_recipe_but_saves_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved unset, so that the same command continues a run even where the preset changed."""
    generate_toy(tmp_path / "data", num_train=6, num_test=0, size=32)
    command = [
        *["train", "--dataset-path", str(tmp_path / "data"), "--checkpoint-dir", str(tmp_path)],
        *["--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--num-workers", "0"],
        *["--batch-size", "2", "--cache", "none", "--no-report", "--no-tensorboard"],
        *["--run-name", "r", "--num-experts", "2", "model.width=16", "--device", "cpu"],
    ]
    assert main([*command, "--epochs", "1"]) == 0
    assert "recipe      tiny (about 3 optimizer steps): lr 0.003" in capsys.readouterr().out
    info = read_json(tmp_path / "r" / "run.json")
    assert set(info["recipe"]) == set(GOVERNED) and info["recipe"]["optim.lr"] == 0.003
    assert load_config(file=tmp_path / "r" / "config.yaml").optim.lr is None
    # More epochs: the rate stays, and says why.
    more = [*command, "--epochs", "2", "--resume", str(tmp_path / "r")]
    assert main(more) == 0
    printed = capsys.readouterr().out
    assert "tiny (as the stopped run had it): lr 0.003" in printed
    assert "train.epochs: 1 -> 2" in printed and "optim.lr" not in printed
