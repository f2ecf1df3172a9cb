"""Parts of one job: who does what, and how the parts become the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.ledger import same_work
from helpers.printed import complained
from inference.test_ledger import KINDS, failed, items, row, started

from camoxpert.cli import main
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.ledger import LEDGER, Ledger
from camoxpert.inference.products import TABLE
from camoxpert.inference.shards import Shard, choose_shard, merge


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, Shard(3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, Shard(1, 2)),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4",
             "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            Shard(3, 4),
        ),
    ],
)  # fmt: skip
def test_parts_by_the_variables_of_a_launcher(environment: dict[str, str], found: Shard) -> None:
    assert choose_shard("auto", environment) == found


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(ConfigError, match="give number and count"):
        choose_shard(text)


def test_no_launcher() -> None:
    with pytest.raises(ConfigError, match="there are none"):
        choose_shard("auto", {})


def test_every_item_is_in_one_part() -> None:
    everything = list(range(11))
    parts = [Shard(n, 4).part(everything) for n in (1, 2, 3, 4)]
    assert sorted(n for part in parts for n in part) == everything
    assert max(map(len, parts)) - min(map(len, parts)) == 1


def part(folder: Path, number: int, of: int, *rows: dict, finished: bool = True) -> None:
    ledger = Ledger(folder, KINDS, name=Shard(number, of).ledger, table=None)
    ledger.restart({"model": "abc", "threshold": 0.5, "checkpoint": f"/node{number}/best.pt"})
    ledger.append(list(rows))
    ledger.finish([entry["item"] for entry in rows], complete=finished)


def test_the_whole_is_in_the_order_of_the_items(tmp_path: Path) -> None:
    part(tmp_path, 1, 3, row("a"), row("d"))
    part(tmp_path, 2, 3, row("b"), failed("e"))
    part(tmp_path, 3, 3, row("c"))
    assert merge(tmp_path, KINDS) == (4, [("e", "damaged")])
    assert items(tmp_path) == ["a", "b", "c", "d", "e"]
    assert [path.name for path in tmp_path.glob("predictions*.jsonl")] == [LEDGER]
    assert (tmp_path / TABLE).read_text().count("\n") == 5
    assert Ledger(tmp_path, KINDS).finished


def test_later_parts_are_added_to_the_whole(tmp_path: Path) -> None:
    whole = started(tmp_path, [row("a"), row("z")])
    whole.finish(["a", "z"], complete=True)
    part(tmp_path, 1, 1, row("b"))
    merge(tmp_path, KINDS)
    assert items(tmp_path) == ["a", "z", "b"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "missing: 2/2"),
        ("unfinished", "predictions.2-of-2.jsonl: not finished"),
        ("settings", "made with other settings than predictions.1-of-2.jsonl"),
        ("divisions", "of several divisions: 2, 3"),
        ("none", "no ledger of a part"),
    ],
)
def test_what_cannot_be_merged(tmp_path: Path, fault: str, says: str) -> None:
    if fault != "none":
        part(tmp_path, 1, 2, row("a"))
    if fault in ("unfinished", "divisions"):
        part(tmp_path, 2, 2, row("b"), finished=fault != "unfinished")
    if fault == "divisions":
        part(tmp_path, 1, 3, row("c"))
    if fault == "settings":
        ledger = Ledger(tmp_path, KINDS, name=Shard(2, 2).ledger, table=None)
        ledger.restart({"model": "other", "threshold": 0.5})
        ledger.append([row("b")])
        ledger.finish(["b"], complete=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    with pytest.raises(DataError, match=says):
        merge(tmp_path, KINDS)
    after = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert before == after


def test_parts_end_as_the_undivided_job(
    tiny_run: Path, toy_data: Path, tmp_path: Path, capsys
) -> None:
    photos = str(toy_data / "TestDataset" / "toy" / "Imgs")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ["predict", str(tiny_run), photos, "--batch-size", "1", "-o"]
    assert main([*words, str(whole)]) == 0
    assert main([*words, str(parts), "--shard", "1/2"]) == 0
    assert main(["predict", "--merge", "-o", str(parts)]) == 3
    assert "missing: 2/2" in " ".join(capsys.readouterr().err.split())
    assert main([*words, str(parts), "--shard", "2/2"]) == 0
    assert main(["predict", "--merge", "-o", str(parts)]) == 0
    assert "8 images in" in capsys.readouterr().out
    for kind in ("maps", "masks", "cutouts", "overlays"):
        for path in (whole / kind).iterdir():
            assert (parts / kind / path.name).read_bytes() == path.read_bytes()
    one, other = (
        [same_work(entry) for entry in Ledger(folder, ("map", "mask", "cutout", "overlay")).rows()]
        for folder in (whole, parts)
    )
    assert one == other
    # A repeated job finds everything done.
    assert main([*words, str(parts), "--shard", "1/2"]) == 0
    assert "0 images predicted, 4 were there already" in capsys.readouterr().out
    assert main([*words, str(parts), "--shard", "2/2"]) == 0
    assert main(["predict", "--merge", "-o", str(parts)]) == 0, "parts with nothing to do are done"
    assert "8 images in" in capsys.readouterr().out


def test_merge_takes_nothing_else(tmp_path: Path, capsys) -> None:
    assert main(["predict", "run", "--merge", "-o", str(tmp_path)]) == 2
    assert "takes only -o" in complained(capsys)
