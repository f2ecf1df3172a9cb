"""Runs compared: intervals by hand, what differs, and warnings where scores do not compare."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pages import active_parts

from camoxpert.cli import main
from camoxpert.config import load_config, to_yaml
from camoxpert.files import write_json, write_rows
from camoxpert.metrics.statistics import compare_seeds
from camoxpert.pages.compared import group_runs, read_runs
from camoxpert.pages.comparison import PAIRED, compare_runs, comparison_text, write_comparison
from camoxpert.runs.log import RunLog

IMAGES = [f"image {index}" for index in range(30)]
SCORES = np.random.default_rng(0).uniform(0.3, 0.9, len(IMAGES))

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that writes the folder of a made-up run."""

    def run(
        name: str,
        scores: np.ndarray | None = SCORES,
        *,
        settings: dict[str, Any] | None = None,
        validated: tuple[str, ...] = ("v1", "v2"),
        test: dict[str, Any] | None = None,
        **info: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(load_config(flags=settings or {})))
        known = {"status": "finished", "data_hash": "abc", "device": "cpu", "parameters": 2e6}
        known |= {"recipe": {"optim.lr": 0.003}, "phases": {"training": 120.0}}
        write_json(folder / "run.json", {**known, **info})
        rows = [{"split": "validation", "dataset": "d", "name": n} for n in validated]
        write_rows(folder / "samples.csv", rows, ("split", "dataset", "name"))
        log = RunLog(folder)
        for epoch in (1, 2):
            scored = {key: 0.1 * epoch for key in PAIRED}
            values = {"stage": 1, "weights": "ema", "scores": scored, "best": epoch == 2}
            log.write({"kind": "validation", "step": 10 * epoch, "epoch": epoch, **values})
            speed = {"images_per_second": 10.0 * epoch, "loss": 1.0 / epoch, "data_wait": 0.25}
            log.write({"kind": "train", "step": 10 * epoch, "epoch": epoch, **speed})
        log.close()
        if scores is not None:
            # MAE falls where the others rise.
            columns = {key: 1 - scores if key == "MAE" else scores for key in PAIRED}
            table = [
                {"name": image, **{key: column[index] for key, column in columns.items()}}
                for index, image in enumerate(IMAGES)
            ]
            table.append({"name": "left out", **dict.fromkeys(PAIRED, "")})
            write_rows(folder / "evaluation" / "per_image" / folder.name / "toy.csv", table)
            result = {"dataset": "toy", "method": folder.name, "num_images": len(IMAGES)}
            result |= {"data_hash": "t", "protocol": "pysod", "empty_gt": "pysod", **(test or {})}
            result["scores"] = {key: float(column.mean()) for key, column in columns.items()}
            write_json(folder / "evaluation" / "scores.json", {"results": [result]})
        return folder

    return run


def test_a_constant_gap_has_an_interval_of_no_width(make: Make) -> None:
    paths = [make("base"), make("other", SCORES + 0.01, settings={"optim.lr": 0.01})]
    (part, validation) = compare_runs(paths).sets
    assert part.name == "toy" and part.images == "30" and validation.name.startswith("validation")
    ((label, line),) = part.gaps
    assert label == "other"
    assert [gap.text for gap in line[:3]] == ["+0.010 (+0.010 to +0.010)*"] * 3
    assert line[3].text == "-0.010 (-0.010 to -0.010)*"
    assert [gap.verdict for gap in line] == ["better"] * 4
    best = [cells[0].best for _, _, cells in part.rows]
    assert best == [False, True]
    # Control: the same scores differ in nothing.
    same = compare_runs([paths[0], make("same", settings={"optim.lr": 0.02})]).sets[0].gaps
    assert [gap.text for gap in same[0][1]] == ["+0.000 (+0.000 to +0.000) "] * 4


def test_noise_is_no_finding(make: Make) -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, len(IMAGES))
    paths = [
        make("base"),
        make("other", SCORES + noise - noise.mean(), settings={"optim.lr": 1e-2}),
    ]
    ((_, line),) = compare_runs(paths).sets[0].gaps
    assert [gap.verdict for gap in line] == [""] * 4 and "*" not in line[0].text


def test_seeds_of_one_setting_are_taken_together(make: Make) -> None:
    """Images alone would call the gap of .01 sure; the seeds of a setting are .08 apart."""
    rows = {
        seed: [SCORES + shift for shift in shifts]
        for seed, shifts in ((1, (0.0, 0.01)), (2, (0.08, 0.09)), (3, (0.04, 0.05)))
    }
    paths = [make(f"a-seed{s}", own[0], settings={"train.seed": s}) for s, own in rows.items()]
    paths += [
        make(f"b-seed{s}", own[1], settings={"train.seed": s, "optim.lr": 0.01})
        for s, own in rows.items()
    ]
    page = compare_runs(paths)
    part = page.sets[0]
    assert [(label, number) for label, number, _ in part.rows] == [
        ("a (3 runs)", "3"),
        ("b (3 runs)", "3"),
    ]
    assert "seeds and images" in part.note
    ((_, line),) = part.gaps
    order = np.argsort(IMAGES)
    a_SN, b_SN = (np.stack([own[i][order] for own in rows.values()]) for i in (0, 1))
    low, high = compare_seeds(b_SN, a_SN)
    assert line[0].text == f"+0.010 ({low:+.3f} to {high:+.3f}) " and high - low > 0.05
    assert not any("seeds" in sentence for sentence in page.warnings)
    assert part.rows[0][2][1].hint == f"{SCORES.mean():.3f} to {SCORES.mean() + 0.08:.3f}"
    # Control: one seed of each, and the interval has no width.
    single = compare_runs([paths[0], paths[3]])
    assert single.sets[0].gaps[0][1][0].verdict == "better"
    assert any("little of other seeds" in sentence for sentence in single.warnings)


def test_what_makes_a_setting(make: Make) -> None:
    paths = [
        make("x/one", settings={"train.seed": 1, "data.roots": ("here",)}),
        make("y/one", settings={"train.seed": 2, "data.roots": ("there",)}),
        make("other-data", data_hash="def"),
        make("other-rate", settings={"optim.lr": 0.01}),
    ]
    runs = read_runs(paths)
    assert [run.name for run in runs] == ["x/one", "y/one", "other-data", "other-rate"]
    assert [len(setting.runs) for setting in group_runs(runs)] == [2, 1, 1]


def test_settings_that_differ_and_speed(make: Make) -> None:
    paths = [make("base"), make("other", settings={"optim.lr": 0.01, "run.log_every": 7})]
    page = compare_runs(paths)
    assert page.settings.head == ["", "optim.lr"]
    assert page.settings.lines == [["base", "0.003 (preset)"], ["other", "0.01"]]
    assert page.speed.lines[0][1:4] == ["20.0", "2.0", "-"] and page.speed.lines[0][5] == "25%"
    shown = comparison_text(page)
    assert "against base" in shown and "0.003 (preset)" in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_hash": "def"}, "different data"),
        ({"status": "stopped"}, "Not finished: other"),
        ({"quick": {"train.quick.limit_batches": "at most 2 batches"}}, "other is a quick run"),
        ({"device": "cuda:0"}, "different devices: cpu, cuda:0"),
        ({"validated": ("v1", "v3")}, "different images"),
        ({"test": {"data_hash": "u"}}, "other images or masks"),
        ({"test": {"protocol": "raw"}}, "another protocol"),
        ({"test": {"dataset": "toy2"}}, "toy was not scored by other"),
        ({"scores": None}, "toy was not scored by other"),
        ({"settings": {"train.select": "IoU"}}, "chosen by different measures"),
    ],
)
def test_runs_that_do_not_compare(make: Make, change: dict[str, Any], words: str) -> None:
    base = make("base")
    page = compare_runs([base, make("other", **change)])
    assert any(words in sentence for sentence in page.warnings), page.warnings
    if "test" in change or "scores" in change:
        assert not any(part.gaps for part in page.sets)
    settings = {"optim.lr": 0.01}
    clean = compare_runs([base, make("clean", settings=settings)])
    assert not any(words in sentence for sentence in clean.warnings)


def test_the_page_loads_and_runs_nothing(make: Make, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    paths = [make("base"), make("other", settings={"optim.lr": 0.01}, device=evil)]
    page = write_comparison(compare_runs(paths, lead=[evil]), tmp_path / "c.html").read_text()
    assert active_parts(page) == [] and "&lt;script&gt;" in page
    for title in ("toy (30 images)", "Settings that differ", "Learning curves", "Speed and size"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png;base64,") == 2


def test_damaged_folders_become_a_page(make: Make, tmp_path: Path) -> None:
    paths = [make("base"), make("other")]
    (paths[1] / "config.yaml").write_text("optim: [")
    (paths[1] / "run.json").write_text("{")
    (paths[1] / "metrics.jsonl").write_text("{")
    (paths[1] / "evaluation" / "per_image" / "other" / "toy.csv").write_bytes(b"name\0")
    page = write_comparison(compare_runs(paths), tmp_path / "c.html").read_text()
    assert "Not finished: other." in page


def test_real_runs_on_the_command_line(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_run, copy)
    text = (copy / "config.yaml").read_text().replace("weight_decay: 0.0001", "weight_decay: 0.05")
    (copy / "config.yaml").write_text(text)
    page = tmp_path / "page.html"
    assert main(["report", str(tiny_run), str(copy), "-o", str(page)]) == 0
    said = capsys.readouterr().out
    assert "+0.000 (+0.000 to +0.000)" in said and "0.05" in said and str(page) in said
    assert "optim.weight_decay" in page.read_text()
    with next((copy / "evaluation" / "per_image").glob("*/*.csv")).open() as file:
        assert len(list(csv.DictReader(file))) == 8
    # One run alone still has its own page.
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["{run}", "{run}"], 2, "given twice"),
        (["{run}", "{empty}"], 4, "not a run folder"),
        (["{run}", "{empty}/missing"], 4, "There is no"),
        (["{run}", "{other}", "--measures", "IoU"], 2, "is of a ledger"),
    ],
)
def test_mistakes(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, says: str,
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    places = {"run": make("run"), "other": make("other"), "empty": tmp_path / "empty"}
    assert main(["report", *(word.format(**places) for word in words)]) == code
    assert says in " ".join(capsys.readouterr().err.split())
