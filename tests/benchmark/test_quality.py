"""The contest of decoders: fair settings, the best rate for everybody, resumable, intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.printed import complained

from camoxpert.benchmark import quality, quality_report
from camoxpert.benchmark.common import multiply_adds
from camoxpert.cli import main
from camoxpert.config import Config, load_config
from camoxpert.errors import CheckpointError, ConfigError, NumericError, Stopped
from camoxpert.files import read_json
from camoxpert.metrics.statistics import compare_seeds
from camoxpert.models.camoxpert import build_model
from camoxpert.models.cost import decoder_cost, network_cost
from camoxpert.models.decoder import Decoder
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training import session

TINY = ["model.backbone=tiny_test", "model.pretrained=false", "data.img_size=32", "model.width=16"]


def settings(*overrides: str) -> Config:
    return load_config(overrides=[*TINY, *overrides])


class TestCost:
    def test_active_experts_are_a_share_of_all(self) -> None:
        """With one expert the cost is that of E equal ones at top 1; k of E add up linearly."""
        channels = (16, 24, 32, 48)

        def cost(experts: int, top_k: int, *more: str) -> tuple[float, float]:
            config = settings(f"model.num_experts={experts}", f"model.top_k={top_k}", *more).model
            return decoder_cost(channels, config, 32)

        same = "model.experts=hybrid"
        one, two, four = (cost(4, k, same)[0] for k in (1, 2, 4))
        assert two - one == pytest.approx((four - two) / 2)
        assert cost(4, 4, same)[0] == cost(4, 4, same)[1] == cost(4, 1, same)[1]
        # Unlike experts: the mean over all choices, whatever the router prefers.
        active, total = cost(7, 2)
        beside = cost(7, 2)[1] - 3.5 * (2 * (total - active) / 5)
        assert active == pytest.approx(beside + 2 / 7 * (total - beside))
        stacked = cost(4, 1, "model.expert_family=uniform")
        assert stacked[1] > stacked[0] > 0

    @pytest.mark.parametrize("routing", ["lateral", "fused"])
    @pytest.mark.parametrize(
        "more",
        ["model.experts=[]", "model.expert_family=uniform", "model.shared_expert=edge"],
    )
    def test_only_experts_are_left_out(self, routing: str, more: str) -> None:
        """All minus active is what the idle experts take, counted one by one."""
        config = settings("model.num_experts=4", f"model.routing={routing}", more).model
        channels = (16, 24, 32, 48)
        active, total = decoder_cost(channels, config, 64)
        idle = 0.0
        for level, side in zip(Decoder(channels, config).levels, (16, 8, 4, 2), strict=True):
            features = torch.zeros(1, config.width, side, side)
            moe = level.moe.eval()
            idle += sum(multiply_adds(moe.experts[i], features) for i in range(4)) / 2
        assert total - active == pytest.approx(idle, rel=1e-9)

    def test_counting_changes_nothing(self) -> None:
        model = build_model(settings().model).train()
        before = [(level.dispatch, level.router.top_k) for level in model.moe_levels]
        network_cost(model, 32)
        assert model.training
        assert before == [(level.dispatch, level.router.top_k) for level in model.moe_levels]


class TestArms:
    def test_dense_arms_cost_what_they_stand_for(self) -> None:
        moe, active, total = quality.build_arms(
            settings("model.width=32"), ["moe", "dense-active", "dense-total"], {}
        )
        assert active.cost.active == active.cost.total
        assert active.cost.active == pytest.approx(moe.cost.active, rel=0.06)
        assert total.cost.active == pytest.approx(moe.cost.total, rel=0.06)
        # Only the experts differ.
        same = replace(moe.config.model, num_experts=1, top_k=1, experts=("hybrid",))
        dense = active.config.model
        assert dense == replace(same, expert_expansion=dense.expert_expansion)

    def test_dense_arms_are_ours_whatever_decoder_was_asked_for(self) -> None:
        pytest.importorskip("segmentation_models_pytorch")
        (dense,) = quality.build_arms(settings("model.decoder=unet"), ["dense-active"], {})
        assert dense.config.model.decoder == "moe"

    def test_early_stopping_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="same steps"):
            quality.build_arms(settings("train.early_stopping=3"), ["moe"], {})

    def test_own_arm_is_the_settings_with_its_overrides(self) -> None:
        _, wide = quality.build_arms(settings(), ["moe"], {"wide": ["model.width=24"]})
        assert wide.config == settings("model.width=24")

    def test_arms_that_the_backbone_cannot_have_are_left_out(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("segmentation_models_pytorch")
        arms = quality.build_arms(settings(), None, {})
        assert [arm.name for arm in arms] == [
            name for name in quality.ARMS if name != "deeplabv3plus"
        ]
        assert "deeplabv3plus is left out" in capsys.readouterr().out
        with pytest.raises(ConfigError, match="dilat"):
            quality.build_arms(settings(), ["deeplabv3plus"], {})

    @pytest.mark.parametrize(
        ("names", "own", "words"),
        [
            (["unett"], {}, "Did you mean unet"),
            (["moe"], {"unet": []}, "is taken"),
            (["moe"], {"a/b": []}, "not plain"),
            (["moe"], {"wide": ["model.widthh=3"]}, "width"),
        ],
    )
    def test_mistakes(self, names: list[str], own: dict[str, list[str]], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            quality.build_arms(settings(), names, own)


class TestTrial:
    def test_only_rate_seed_and_split_differ(self, tmp_path: Path) -> None:
        config = settings("optim.stage2_lr=1e-5", "data.val_fraction=0.1")
        arm = quality.Arm("moe", config, 0, quality.Cost(0, 0))
        search = quality.Trial(arm, 0.003, 7, final=False).config(tmp_path)
        final = quality.Trial(arm, 0.003, 7, final=True).config(tmp_path)
        assert search.data.val_fraction == quality.SEARCH_FRACTION and not search.run.test
        assert final.data.val_fraction == 0 and final.run.test
        for trial in (search, final):
            assert (trial.optim.lr, trial.optim.stage2_lr, trial.train.seed) == (0.003, None, 7)
            assert trial.model == config.model and trial.loss == config.loss
            assert replace(trial.data, val_fraction=0.1) == config.data


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """Replaces training: the score of a run by its name; None fails, absent is an error."""
    table: dict[str, float | None] = {}

    def run(config: Config) -> None:
        score = table[config.run.name]
        if score is None:
            raise NumericError("ten steps in a row were not finite")
        folder = Path(config.run.dir) / config.run.name
        folder.mkdir(parents=True)
        from camoxpert.config import to_yaml

        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "run.json").write_text('{"status": "finished"}')
        record = {"kind": "validation", "best": True, "scores": {"wFmeasure": score}}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(session, "run", run)
    return table


class TestContest:
    def arm(self) -> quality.Arm:
        return quality.Arm("moe", settings(), 0, quality.Cost(0, 0))

    def test_the_best_rate_in_validation_is_taken(
        self, tmp_path: Path, scored: dict[str, float | None]
    ) -> None:
        scored |= {
            "moe-lr0.001-search-seed1": 0.5,
            "moe-lr0.003-search-seed1": 0.7,
            "moe-lr0.01-search-seed1": None,
            "moe-lr0.003-seed1": 0.0,
            "moe-lr0.003-seed2": 0.0,
        }
        rates = (0.001, 0.003, 0.01)
        (result,) = quality.contest([self.arm()], tmp_path, rates=rates, seeds=(1, 2))
        assert result.rate == 0.003 and not result.at_the_edge
        assert result.search == {0.001: 0.5, 0.003: 0.7, 0.01: None}
        assert [run.name for run in result.runs] == ["moe-lr0.003-seed1", "moe-lr0.003-seed2"]
        # Again: nothing is trained that was finished.
        for name in ("moe-lr0.001-search-seed1", "moe-lr0.003-search-seed1"):
            del scored[name]
        again = quality.contest([self.arm()], tmp_path, rates=rates, seeds=(1, 2))
        assert again == [result]

    def test_the_mean_over_search_seeds_chooses(
        self, tmp_path: Path, scored: dict[str, float | None]
    ) -> None:
        """By the first seed alone it would be 0.01, with 0.001 a coin flip away."""
        by_seed = {0.001: (0.75, 0.6), 0.003: (0.7, 0.8), 0.01: (0.76, 0.5), 0.03: (0.9, None)}
        for rate, (first, second) in by_seed.items():
            scored[f"moe-lr{rate:g}-search-seed1"] = first
            scored[f"moe-lr{rate:g}-search-seed2"] = second
        scored |= {f"moe-lr{rate:g}-seed{seed}": 0.0 for rate in by_seed for seed in (1, 2)}
        few = tuple(by_seed)[:3]
        one = quality.contest([self.arm()], tmp_path / "one", rates=few, seeds=(1, 2))[0]
        assert (one.rate, one.close_rate) == (0.01, 0.001)
        two = quality.contest(
            [self.arm()], tmp_path / "two", rates=tuple(by_seed), seeds=(1, 2), search_seeds=2
        )[0]
        assert (two.rate, two.close_rate, two.at_the_edge) == (0.003, None, False)
        assert two.search == pytest.approx({0.001: 0.675, 0.003: 0.75, 0.01: 0.63, 0.03: None})

    def test_runs_of_another_contest_are_refused_before_any_training(
        self, tmp_path: Path, scored: dict[str, float | None]
    ) -> None:
        scored["moe-lr0.001-seed2"] = 0.0
        quality.contest([self.arm()], tmp_path, rates=(0.001,), seeds=(2,))
        other = quality.Arm("moe", settings("train.epochs=3"), 0, quality.Cost(0, 0))
        with pytest.raises(CheckpointError, match=r"train.epochs: 120 -> 3"):
            quality.contest([other], tmp_path, rates=(0.001,), seeds=(1, 2))

    def test_runs_get_what_is_left_of_the_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A clock that moves an hour at each look: less and less is left, never nothing."""
        hours = iter(range(100))
        monkeypatch.setattr(quality.time, "monotonic", lambda: 3600.0 * next(hours))
        left = []
        monkeypatch.setattr(session, "run", lambda config: left.append(config.train.max_hours))
        asked = quality.Arm("moe", settings("train.max_hours=9"), 0, quality.Cost(0, 0))
        quality.contest([asked], tmp_path, rates=(0.001,), seeds=(1, 2, 3), max_hours=3.5)
        assert left[0] == pytest.approx(2.5) and left[0] > left[1] > left[2] > 0

    def test_a_stop_names_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stopped(config: Config) -> None:
            raise Stopped("in a step")

        monkeypatch.setattr(session, "run", stopped)
        with pytest.raises(Stopped, match=r"moe-lr0.001-seed1; the same command continues"):
            quality.contest([self.arm()], tmp_path, rates=(0.001,), seeds=(1,))


class TestCompareSeeds:
    def test_by_hand(self) -> None:
        """One seed, one image: nothing varies. Two constant images: nothing varies either."""
        assert compare_seeds(np.array([[0.7]]), np.array([[0.5]])) == pytest.approx((0.2, 0.2))
        a, b = np.full((3, 5), 0.6), np.full((2, 5), 0.5)
        assert compare_seeds(a, b) == pytest.approx((0.1, 0.1))

    def test_seeds_widen_the_interval(self) -> None:
        """Three seeds that differ by 0.1 and equal images: an interval over images alone is a
        point, in truth another seed may be worse."""
        rng = np.random.default_rng(0)
        image_N = rng.uniform(0.2, 0.9, 200)
        a_SN = image_N + np.array([[0.10], [0.0], [-0.04]])
        b_SN = image_N + np.array([[0.03], [0.0], [-0.03]])
        low, high = compare_seeds(a_SN, b_SN)
        assert low < 0 < high
        pooled = (a_SN - b_SN).mean(0)
        assert pooled.std() < 1e-12 and pooled.mean() > 0

    def test_covers_the_truth(self) -> None:
        """Equal methods: 95 % intervals over 5 seeds exclude 0 in few of 200 experiments."""
        rng = np.random.default_rng(1)
        wrong = 0
        for repetition in range(200):
            image_N = rng.normal(0.6, 0.2, 40)
            a, b = (
                image_N + rng.normal(0, 0.03, (5, 1)) + rng.normal(0, 0.1, (5, 40)) for _ in "ab"
            )
            low, high = compare_seeds(a, b, resamples=200, seed=repetition)
            wrong += not low <= 0 <= high
        assert wrong <= 28  # 14 %: five seeds are few, as the docstring says

    def test_unequal_images(self) -> None:
        with pytest.raises(ValueError, match="cannot be compared"):
            compare_seeds(np.zeros((2, 3)), np.zeros((2, 4)))


@pytest.mark.slow
def test_a_whole_contest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real runs, table, picture and JSON; the second call trains nothing."""
    generate_toy(tmp_path / "data", num_train=8, num_test=4, size=32)
    command = [
        *["benchmark", "quality", "--dataset-path", str(tmp_path / "data"), "--epochs", "1"],
        *["--batch-size", "4", "--num-workers", "0", "--cache", "none", "--device", "cpu"],
        *["-o", str(tmp_path / "out"), "--arms", "moe", "--arm", "wide", "model.width=24"],
        *["--rates", "1e-3", "--seeds", "2", "--rounds", "1", *TINY, "model.num_experts=2"],
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "wide: " in printed and "moe better by" in printed and "Epoch" not in printed
    report = read_json(tmp_path / "out" / "quality.json")
    moe, wide = report["arms"]
    assert moe["sets"]["toy"]["difference"] == {}
    gap = wide["sets"]["toy"]["difference"]["wFmeasure"]
    means = [arm["sets"]["toy"]["mean"]["wFmeasure"] for arm in (moe, wide)]
    assert gap["value"] == pytest.approx(means[0] - means[1])
    assert gap["low"] <= gap["value"] <= gap["high"]
    # The mean of the images is the score that the run reported itself.
    run = tmp_path / "out" / "runs" / "moe-lr0.001-seed42" / "evaluation" / "scores.json"
    assert moe["sets"]["toy"]["seeds"]["wFmeasure"][0] == pytest.approx(
        read_json(run)["results"][0]["scores"]["wFmeasure"]
    )
    assert wide["costs"]["parameters"] > moe["costs"]["parameters"]
    assert (tmp_path / "out" / "pareto-toy.png").read_bytes()[:4] == b"\x89PNG"
    assert "| wide |" in (tmp_path / "out" / "quality.md").read_text()
    runs = sorted((tmp_path / "out" / "runs").rglob("*.pt"))
    assert {path.name for path in runs} == {"best.pt"}
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 4


def test_a_rate_that_was_chosen_by_chance_is_told() -> None:
    entry: dict[str, Any] = {"arm": "unet", "at_the_edge": False, "close_rate": 0.01}
    entry["sets"] = {"toy": {"seeds": {"wFmeasure": [0.1, 0.2, 0.3]}}}
    lines = quality_report.notes([entry])
    assert "Nearly as good in validation as the rate that was taken: unet (0.01)." in lines[-1]
    assert len(quality_report.notes([entry | {"close_rate": None}])) == len(lines) - 1


def test_a_run_without_test_set_is_named(tmp_path: Path) -> None:
    arm = quality.Arm("moe", settings(), 0, quality.Cost(0, 0))
    result = quality.ArmResult(arm, {}, 0.001, (tmp_path,))
    with pytest.raises(quality_report.DataError, match="no test set"):
        quality_report.summarise([result], {})


def test_without_names_all_arms_take_part_that_the_backbone_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    arms: list[str] = []

    def contest(contestants: list[quality.Arm], *arguments: object, **options: object) -> None:
        arms.extend(arm.name for arm in contestants)
        raise ConfigError("that is enough")

    monkeypatch.setattr(quality, "contest", contest)
    (tmp_path / "data").mkdir()
    words = ["--dataset-path", str(tmp_path / "data"), "-o", str(tmp_path / "out"), *TINY]
    assert main(["benchmark", "quality", *words, "--arm", "wide", "model.width=24"]) == 2
    assert arms == [name for name in quality.ARMS if name != "deeplabv3plus"] + ["wide"]
    assert "deeplabv3plus is left out" in capsys.readouterr().out


def test_quality_has_flags_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "-o", "x.json", "quality"]) == 2
    assert "right behind" in complained(capsys)
