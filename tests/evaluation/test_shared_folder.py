"""Several evaluations in one folder: what is kept, replaced, refused and warned of."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.maps import CAMO, evaluate, listing, summary, write

from camoxpert.evaluation.maps import evaluate as evaluate_module
from camoxpert.metrics import Evaluator


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_an_earlier_evaluation_is_replaced_pair_by_pair(world: Path) -> None:
    """Method and data set decide: what is scored again is replaced, the rest stays."""
    (world / "out").mkdir(mode=0o2775)
    mode = (world / "out").stat().st_mode
    assert evaluate("--predictions", "maps", "--gt", "data", "-o", "out") == 0
    before, tables = summary("out"), contents(world / "out/per_image")
    (world / "out/images/mine.txt").write_text("x")
    assert evaluate(*CAMO, "-o", "out", "--gallery", "0") == 0
    after = summary("out")
    pairs = [(r["method"], r["dataset"]) for r in before["results"]]
    assert [(r["method"], r["dataset"]) for r in after["results"]] == pairs
    assert contents(world / "out/per_image") == tables
    # Pictures of the data set that was scored again are those of this call: none.
    kept = {entry["dataset"] for entry in before["gallery"]} - {"CAMO"}
    assert {entry["dataset"] for entry in after["gallery"]} == kept
    assert (world / "out/images/mine.txt").is_file()
    assert all((world / "out" / entry["panel"]).is_file() for entry in after["gallery"])
    # Comparisons with the method that was scored again are gone, the others stay.
    assert [c for c in before["comparisons"] if c["dataset"] != "CAMO"] == after["comparisons"]
    assert (world / "out").stat().st_mode == mode
    every = {p.relative_to(world / "out").as_posix() for p in (world / "out").rglob("*.*")}
    assert every - {"images/mine.txt"} == set(after["files"])


def test_methods_of_several_calls_stand_in_one_table(world: Path, capsys) -> None:
    names = sorted(listing(world / "maps"))
    for name in names:
        arguments = ["--predictions", f"maps/{name}/CAMO", "--gt", "data/CAMO"]
        assert evaluate(*arguments, "--method", name, "-o", "out") == 0
    together = summary("out")
    assert evaluate("--predictions", "maps", "--gt", "data/CAMO", "-o", "at_once") == 0
    at_once = {r["method"]: r["scores"] for r in summary("at_once")["results"]}
    assert {r["method"]: r["scores"] for r in together["results"]} == at_once
    page = Path("out/index.html").read_text()
    table = Path("out/scores.md").read_text()
    assert all(f"{name}" in table and name in page for name in names)
    assert len(listing(world / "out/per_image")) == len(names)


@pytest.mark.parametrize("before", [[], ["earlier"]])
def test_an_evaluation_that_ends_meanwhile_is_kept(
    world: Path, monkeypatch, before: list[str]
) -> None:
    """Two calls at a time into one folder, which may not exist yet: both results stand in it."""
    for method in before:
        assert evaluate(*CAMO, "--method", method, "-o", "out") == 0
    score = evaluate_module.score_task

    def slow(*arguments: object, **options: object) -> Evaluator:
        monkeypatch.setattr(evaluate_module, "score_task", score)
        assert evaluate(*CAMO, "--method", "meanwhile", "-o", "out") == 0
        return score(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "score_task", slow)
    assert evaluate(*CAMO, "--method", "own", "-o", "out") == 0
    methods = [result["method"] for result in summary("out")["results"]]
    assert methods == [*before, "meanwhile", "own"]
    assert not [name for name in listing(world) | listing(world / "out") if name[0] == "."]


def test_a_damaged_summary_is_refused_before_the_work(world: Path, monkeypatch, capsys) -> None:
    assert evaluate(*CAMO, "-o", "out", "--gallery", "0") == 0
    content = summary("out")
    del content["results"][0]["curves"]
    Path("out/scores.json").write_text(json.dumps(content))
    before = contents(world / "out")
    monkeypatch.setattr(evaluate_module, "score_task", None)
    assert evaluate(*CAMO, "--method", "other", "-o", "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "out/scores.json is damaged" in said and "-o" in said
    assert contents(world / "out") == before


def test_earlier_pictures_that_are_gone_or_links_are_left_out(world: Path) -> None:
    """A link in somebody else's folder must not bring another file into the results."""
    words = ("--gallery", "2", "--no-intervals", "-o", "out")
    assert evaluate(*CAMO, *words) == 0
    gone, linked, *rest = (entry["panel"] for entry in summary("out")["gallery"])
    Path("secret").write_bytes(b"precious")
    Path("out", gone).unlink()
    Path("out", linked).unlink()
    Path("out", linked).symlink_to(world / "secret")
    cod = ("--predictions", "maps/good/COD10K", "--gt", "data/COD10K/GT")
    assert evaluate(*cod, *words) == 0
    panels = [entry["panel"] for entry in summary("out")["gallery"]]
    assert panels[: len(rest)] == rest and not {gone, linked} & set(panels)
    assert not [p for p in Path("out").rglob("*.*") if b"precious" in p.read_bytes()]


def test_resized_maps_beside_others_are_warned_of(world: Path, capsys) -> None:
    assert evaluate(*CAMO, "-o", "out", "--gallery", "0") == 0
    for path in (world / "maps/bad/CAMO").iterdir():
        write(path, np.zeros((18, 24), np.uint8))
    words = ("--predictions", "maps/bad/CAMO", "--gt", "data/CAMO", "--gallery", "0")
    assert evaluate(*words, "--method", "bad", "--resize", "bilinear", "-o", "out") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the maps of bad were resized, those of good were not" in said


def test_rows_of_one_data_set_stand_together(world: Path) -> None:
    both = ("--gallery", "0", "--no-intervals", "-o", "out")
    assert evaluate("--predictions", "maps/good", "--gt", "data", *both) == 0
    words = ("--predictions", "maps/bad/CAMO", "--gt", "data/CAMO", "--method", "bad")
    assert evaluate(*words, *both) == 0
    with Path("out/scores.csv").open() as file:
        rows = [(row["dataset"], row["method"]) for row in csv.DictReader(file)]
    assert rows == [("CAMO", "good"), ("CAMO", "bad"), ("COD10K", "good")]
    assert Path("out/scores.tex").read_text().count(r"\midrule") == 2


def test_scores_by_another_protocol_are_not_mixed(world: Path, capsys) -> None:
    assert evaluate(*CAMO, "-o", "out") == 0
    before = contents(world / "out")
    assert evaluate(*CAMO, "-o", "out", "--protocol", "raw") == 2
    assert "--protocol pysod" in " ".join(capsys.readouterr().err.split())
    assert contents(world / "out") == before


def test_other_images_under_one_name_are_warned_of(world: Path, capsys) -> None:
    names = sorted(listing(world / "maps"))
    first, second = (["--predictions", f"maps/{name}/CAMO"] for name in names[:2])
    assert evaluate(*first, "--gt", "data/CAMO", "--method", "a", "-o", "out") == 0
    victim = sorted(Path("data/CAMO/GT").iterdir())[0]
    victim.unlink()
    arguments = ["--gt", "data/CAMO", "--method", "b", "-o", "out", "--allow-extra"]
    assert evaluate(*second, *arguments) == 0
    assert "not comparable" in " ".join(capsys.readouterr().err.split())


def test_a_stop_between_two_files_loses_nothing(world: Path, monkeypatch) -> None:
    """Killed at any rename, the folder is still an evaluation that can be evaluated into."""
    everything = ("--predictions", "maps", "--gt", "data", "-o", "out")
    assert evaluate(*everything) == 0
    renamed = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if self.suffix == ".png":
            raise KeyboardInterrupt
        return renamed(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    assert evaluate(*everything) == 130
    monkeypatch.undo()
    monkeypatch.chdir(world)
    assert len(summary("out")["results"]) == 4
    assert evaluate(*everything) == 0
    left = {p.relative_to(world / "out").as_posix() for p in (world / "out").rglob("*.*")}
    assert {name for name in left if not name.startswith(".evaluation")} == set(
        summary("out")["files"]
    )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named_before_the_work(
    world: Path, capsys, monkeypatch, number: int
) -> None:
    def fails(*arguments: object, **options: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkdtemp", fails)
    monkeypatch.setattr("camoxpert.evaluation.maps.evaluate.score_task", pytest.fail)
    assert evaluate(*CAMO, "-o", "out") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert os.strerror(number) in message and "with -o" in message
