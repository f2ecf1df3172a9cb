"""``evaluate --corruptions``: retention in one command, whatever the batches and the order."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pages import active_parts
from helpers.printed import complained

import camoxpert
from camoxpert.cli import main
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import load_eval
from camoxpert.data.loader import build_corrupted_loader, build_eval_loader
from camoxpert.data.samples import datasets
from camoxpert.data.samples.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from camoxpert.errors import ConfigError
from camoxpert.evaluation import model as evaluation
from camoxpert.evaluation.options import ScoringOptions, choose_corruptions
from camoxpert.evaluation.robustness import compare_with_clean
from camoxpert.inference import predictor as loading
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import ratio_intervals
from camoxpert.pages.retention import RETENTION_FORMATS

SMALL = ("--corruptions", "noise", "fog", "--severity", "5", "1")


@pytest.fixture(scope="module")
def scored(tiny_run: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of an evaluation with two corruptions at two severities."""
    out = tmp_path_factory.mktemp("robust") / "out"
    words = ["evaluate", str(tiny_run), "--data", str(toy_data), "-o", str(out), "--gallery", "0"]
    assert main([*words, *SMALL, "--batch-size", "3"]) == 0
    return out


class TestChoice:
    def test_names_and_severities(self) -> None:
        everything = choose_corruptions(["all"])
        assert everything is not None
        assert everything.names == tuple(CORRUPTIONS) and everything.severities == SEVERITIES
        some = choose_corruptions(["jpeg,noise", "noise"], [5, 1, 1])
        assert some is not None and some.names == ("noise", "jpeg") and some.severities == (1, 5)
        assert choose_corruptions([]) is None

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--corruptions", "fogg"], "unknown corruption 'fogg'. Did you mean fog? Known: all"),
            (["--corruptions", "fog", "--severity", "6"], "--severity must be in 1..5; got 6"),
            (["--severity", "3"], "--severity belongs to --corruptions"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, words: list[str], text: str, capsys) -> None:
        assert main(["evaluate", str(tmp_path), *words]) == 2
        assert text in " ".join(capsys.readouterr().err.split())

    def test_maps_have_no_corruptions(self, tmp_path: Path, capsys) -> None:
        words = ["--predictions", str(tmp_path), "--gt", str(tmp_path), "--corruptions", "all"]
        assert main(["evaluate", *words]) == 2
        assert "--corruptions belongs to a checkpoint" in complained(capsys)


class TestLoader:
    def test_versions_do_not_depend_on_batches_or_workers(self, toy_data: Path) -> None:
        manifest = load_eval(toy_data)["toy"]
        data = DataConfig(img_size=32, start_method="fork")
        versions = [(name, severity) for name in CORRUPTIONS for severity in (1, 5)]

        def read(batch_size: int, num_workers: int = 0) -> dict[str, list[torch.Tensor]]:
            loader = build_corrupted_loader(
                manifest, data, versions, seed=0, batch_size=batch_size, num_workers=num_workers
            )
            found: dict[str, list[torch.Tensor]] = {}
            for batches in loader:
                for batch in batches:
                    for name, image in zip(batch.names, batch.images, strict=True):
                        found.setdefault(name, []).append(image)
            return found

        whole = read(8)
        for other in (read(1), read(3, 2)):
            assert whole.keys() == other.keys()
            assert all(torch.equal(torch.stack(whole[n]), torch.stack(other[n])) for n in whole)
        # By the function itself, from the clean loader's image; the masks are the clean ones.
        for batch in build_eval_loader(manifest, data, batch_size=8):
            for name, image in zip(batch.names, batch.images, strict=True):
                pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
                for (kind, severity), found in zip(versions, whole[name], strict=True):
                    expected = corrupt(pixels, kind, severity, seed=0, key=name)
                    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
            (changed,) = build_corrupted_loader(manifest, data, [("fog", 5)], seed=0, batch_size=8)
            for before, after in zip(batch.full_masks, changed[0].full_masks, strict=True):
                assert np.array_equal(before, after)

    def test_unreadable_images_are_left_out_of_every_version(
        self, toy_data: Path, tmp_path: Path
    ) -> None:
        source = toy_data / "TestDataset" / "toy"
        for folder in ("Imgs", "GT"):
            (tmp_path / folder).mkdir()
            for path in (source / folder).iterdir():
                (tmp_path / folder / path.name).write_bytes(path.read_bytes())
        broken = min((tmp_path / "Imgs").iterdir())
        broken.write_bytes(broken.read_bytes()[:200])
        (manifest,) = load_eval(tmp_path).values()
        data = DataConfig(img_size=32, unreadable="skip")
        loader = build_corrupted_loader(
            manifest, data, [("fog", 1), ("fog", 5)], seed=0, batch_size=8
        )
        (batches,) = list(loader)
        assert [len(batch.names) for batch in batches] == [7, 7]
        assert all(len(batch.unreadable) == 1 for batch in batches)


class TestRetention:
    def test_by_hand(self) -> None:
        """Twelve images found whole, then half of them or none; retention follows."""
        mask = np.zeros((8, 8), np.uint8)
        mask[2:6, 2:6] = 255
        names = [f"{i}" for i in range(12)]

        def found(share: float) -> Evaluator:
            evaluator = ScoringOptions(protocol="raw").evaluator()
            for index, name in enumerate(names):
                evaluator.add(name, mask if index < share * 12 else np.zeros_like(mask), mask)
            return evaluator

        corrupted = {("fog", 1): found(1), ("fog", 3): found(0.5), ("blur", 1): found(0.25)}
        corrupted["blur", 3] = found(0)
        result = compare_with_clean(found(1), corrupted, measure="IoU", seed=0, intervals=True)
        kept = {(e.corruption, e.severity): e.retention["IoU"] for e in result.scores}
        expected = {("fog", 1): 1.0, ("fog", 3): 0.5, ("blur", 1): 0.25, ("blur", 3): 0.0}
        assert kept == pytest.approx(expected) and result.severities == (1, 3)
        assert "MAE" in result.scores[0].scores and "MAE" not in result.scores[0].retention
        assert result.means == pytest.approx({"fog": 0.75, "blur": 0.125, "mean": 0.4375})
        assert result.intervals.keys() == result.means.keys()
        for name, (low, high) in result.intervals.items():
            assert low <= result.means[name] <= high and high - low > 0.05

    def test_a_clean_score_of_zero_has_no_retention(self) -> None:
        mask = np.zeros((8, 8), np.uint8)
        mask[2:6, 2:6] = 255
        nothing = ScoringOptions(protocol="raw").evaluator()
        nothing.add("a", np.zeros_like(mask), mask)
        result = compare_with_clean(
            nothing, {("fog", 1): nothing}, measure="IoU", seed=0, intervals=True
        )
        assert result.means == {} and "IoU" not in result.scores[0].retention
        entry = {
            "dataset": "d",
            "method": "m",
            "scores": nothing.results(),
            "robustness": {
                **vars(result),
                "scores": [vars(score) for score in result.scores],
            },
        }
        for form, write in RETENTION_FORMATS.items():
            assert "fog" in write([entry], ("IoU",)), form

    def test_ratio_intervals(self) -> None:
        base = np.linspace(0.5, 1, 40)
        (same, half) = ratio_intervals(np.stack([base, base / 2], 1), base)
        assert same == pytest.approx((1, 1)) and half == pytest.approx((0.5, 0.5))
        noisy = np.random.default_rng(0).permutation(base)
        ((low, high),) = ratio_intervals(noisy[:, None], base)
        assert 0.8 < low < 1 < high < 1.2
        assert ratio_intervals(noisy[:, None], base) == [(low, high)]


class TestCommand:
    def test_everything_is_written(self, scored: Path) -> None:
        (result,) = json.loads((scored / "scores.json").read_text())["results"]
        found = result["robustness"]
        assert found["measure"] == "wFmeasure" and found["severities"] == [1, 5]
        pairs = [(entry["corruption"], entry["severity"]) for entry in found["scores"]]
        assert pairs == [("noise", 1), ("noise", 5), ("fog", 1), ("fog", 5)]
        for entry in found["scores"]:
            for key, kept in entry["retention"].items():
                assert kept == pytest.approx(entry["scores"][key] / result["scores"][key])
        assert found["means"].keys() == found["intervals"].keys() == {"noise", "fog", "mean"}
        for name in ("robustness.csv", "robustness.md", "robustness.tex"):
            assert "fog" in (scored / name).read_text()
        assert (scored / "robustness" / "toy.png").read_bytes()[:4] == b"\x89PNG"
        assert (scored / found["picture"]).read_bytes()[:2] == b"\xff\xd8"
        rows = list(csv.DictReader(io.StringIO((scored / "robustness.csv").read_text())))
        assert [row["corruption"] for row in rows] == ["clean", "noise", "noise", "fog", "fog"]
        assert float(rows[0]["Smeasure"]) == result["scores"]["Smeasure"]
        assert float(rows[2]["wFmeasure_kept"]) == found["scores"][1]["retention"]["wFmeasure"]
        page = (scored / "index.html").read_text()
        assert "Under corruption" in page and "severity 5" in page and not active_parts(page)
        listed = json.loads((scored / "scores.json").read_text())["files"]
        assert {"robustness.csv", "robustness/toy.png", "robustness/toy.jpg"} <= set(listed)

    def test_the_model_is_loaded_and_the_clean_images_are_scored_once(
        self, scored: Path, tiny_run: Path, toy_data: Path, monkeypatch
    ) -> None:
        """Images are decoded once per corruption, and clean scores are those without the flag."""
        loads, reads = [], []
        honest, reader = loading.load_predictor, datasets.read_files
        monkeypatch.setattr(
            loading, "load_predictor", lambda *w, **k: loads.append(1) or honest(*w, **k)
        )
        monkeypatch.setattr(
            datasets, "read_files", lambda *w, **k: reads.append(1) or reader(*w, **k)
        )
        (result,) = camoxpert.evaluate(
            str(tiny_run), toy_data, corruptions="noise,fog", severities=[1, 5], intervals=False
        )
        assert len(loads) == 1 and len(reads) == 8 * (1 + 2)
        (before,) = json.loads((scored / "scores.json").read_text())["results"]
        assert result.scores == before["scores"]
        assert result.robustness is not None and result.robustness.intervals == {}
        # Another batch size, the same numbers.
        means = [entry.scores for entry in result.robustness.scores]
        assert means == [entry["scores"] for entry in before["robustness"]["scores"]]
        (clean,) = camoxpert.evaluate(str(tiny_run), toy_data, intervals=False)
        assert clean.robustness is None and "robustness" not in clean.to_dict()
        assert clean.scores == result.scores

    def test_what_is_printed(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        monkeypatch.setattr(evaluation, "write_evaluation", lambda *words, **options: None)
        base = ["evaluate", str(tiny_run), "--data", str(toy_data), "--gallery", "0"]
        base += ["--no-intervals"]
        words = ["--corruptions", "contrast", "--severity", "2"]
        said = {}
        for form in ("text", "json", "csv", "markdown", "latex"):
            assert main([*base, *words, "--format", form, "-o", str(tmp_path / form)]) == 0
            said[form] = capsys.readouterr()
        assert "1 corruption at severity 2: 8 images are scored 1 time" in said["text"].err
        assert "tiny on toy, wFmeasure" in said["text"].out and "contrast" in said["text"].out
        content = json.loads(said["json"].out)
        assert content["scores"]["toy"]["IoU"] >= 0
        assert content["robustness"]["toy"]["scores"][0]["corruption"] == "contrast"
        rows = list(csv.DictReader(io.StringIO(said["csv"].out)))
        assert [row["corruption"] for row in rows] == ["clean", "contrast"]
        assert "| contrast |" in said["markdown"].out and "contrast &" in said["latex"].out

    def test_python_names_the_mistake(self, tiny_run: Path) -> None:
        with pytest.raises(ConfigError, match="unknown corruption"):
            camoxpert.evaluate(str(tiny_run), corruptions=["rain"])
