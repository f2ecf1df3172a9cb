"""The ledger: what counts after a kill, what order it ends in, what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.ledger import same_work

from camoxpert.errors import DataError
from camoxpert.inference.ledger import (
    FAILED,
    LEDGER,
    OK,
    Ledger,
    Source,
    as_fields,
    open_ledger,
)
from camoxpert.inference.plan import Settings, make_plan
from camoxpert.inference.products import TABLE
from camoxpert.inference.sources import Photo

KINDS = ("map", "mask")
HEAD = {"model": "abc", "threshold": 0.5}


def row(name: str, attempt: int = 1, **fields: Any) -> dict[str, Any]:
    known = {"source": f"/in/{name}", "size": 3, "mtime_ns": 4, "ctime_ns": 5, "digest": "d"}
    values = {"height": 2, "width": 3, "object_fraction": 0.5, "confidence": 0.75}
    end = {"kinds": ["mask"], "seconds": {"forward": 0.25}, "worker": "cpu"}
    return {"item": name, "status": "ok", "attempt": attempt} | known | values | end | fields


def failed(name: str, attempt: int = 1) -> dict[str, Any]:
    gone = {"source": None, "size": None, "mtime_ns": None, "ctime_ns": None}
    return {"item": name, "status": "failed", "attempt": attempt, **gone, "reason": "damaged"}


def started(folder: Path, *chunks: list[dict[str, Any]]) -> Ledger:
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder, KINDS)
    ledger.restart(HEAD)
    for chunk in chunks:
        ledger.append(chunk)
    return ledger


def items(folder: Path) -> list[str]:
    return [
        entry["item"]
        for entry in map(json.loads, (folder / LEDGER).read_text().splitlines())
        if "item" in entry
    ]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    ledger = started(tmp_path, [row("a"), failed("b")], [row("sub/c", kinds=["map", "mask"])])
    again = Ledger(tmp_path, KINDS)
    for found in (ledger, again):
        assert found.earlier == HEAD and found.made == ["a", "sub/c"]
        assert [found.index.status(name) for name in ("a", "b", "x")] == [OK, FAILED, 0]
        assert found.index.has_kinds("a") == {"mask"}
        assert found.index.has_kinds("sub/c") == {"map", "mask"}
        assert found.index.stamp("a") == Source("elsewhere", 3, 4, 5).stamp != 0
        assert found.index.stamp("b") == 0
        assert found.row("b")["reason"] == "damaged"
        assert not found.finished


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_chunk_that_a_kill_cut_short_does_not_count(tmp_path: Path, share: float) -> None:
    ledger = started(tmp_path, [row("a")])
    path = tmp_path / LEDGER
    start = path.stat().st_size
    ledger.append([row("b"), row("c")])
    whole = path.read_bytes()
    path.write_bytes(whole[: start + int(share * (len(whole) - start))])
    again = Ledger(tmp_path, KINDS)
    assert again.made == ["a"]
    again.append([row("b"), row("c")])
    assert path.read_bytes() == whole


def test_a_ledger_without_a_whole_chunk_knows_the_settings(tmp_path: Path) -> None:
    started(tmp_path, [row("a")])
    path = tmp_path / LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    again = Ledger(tmp_path, KINDS)
    assert again.earlier == HEAD and not again.made
    path.write_bytes(whole[:5])
    assert Ledger(tmp_path, KINDS).earlier is None


def test_rows_end_in_the_order_of_the_items(tmp_path: Path) -> None:
    ledger = started(tmp_path, [row("c"), row("d")], [row("other")], [row("a"), failed("b")])
    ledger.finish(["a", "b", "c", "d"], complete=True)
    assert items(tmp_path) == ["a", "b", "other", "c", "d"]
    table = (tmp_path / TABLE).read_text().splitlines()
    assert table[1] == "a,2,3,0.500000,0.7500,0.2500"
    assert [line.split(",")[0] for line in table[1:]] == ["a", "other", "c", "d"]
    again = Ledger(tmp_path, KINDS)
    assert again.finished and again.row("c")["item"] == "c" and ledger.row("c")["item"] == "c"
    assert again.made == ["a", "other", "c", "d"]


def test_two_ways_to_the_same_end_are_the_same_bytes(tmp_path: Path) -> None:
    one = started(tmp_path / "one", [row("a"), row("b")], [row("c")])
    one.finish(["a", "b", "c"], complete=True)
    other = started(tmp_path / "other", [row("c")])
    del other
    again = Ledger(tmp_path / "other", KINDS)
    again.append([row("a"), row("b")])
    again.finish(["a", "b", "c"], complete=True)
    for name in (LEDGER, TABLE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_every_attempt_stays(tmp_path: Path) -> None:
    ledger = started(tmp_path, [failed("a"), row("b")], [failed("a", 2)], [row("a", 3)])
    ledger.finish(["a", "b"], complete=True)
    assert items(tmp_path) == ["a", "a", "a", "b"]
    assert Ledger(tmp_path, KINDS).index.attempts("a") == 3
    assert Ledger(tmp_path, KINDS).index.status("a") == OK


def test_other_settings_end_what_was_said_before(tmp_path: Path) -> None:
    ledger = started(tmp_path, [row("a")])
    ledger.restart({"model": "new"})
    # Before a row: from now on files may be replaced, and "a" may be one of them.
    between = Ledger(tmp_path, KINDS)
    assert between.made == [] and between.earlier == {"model": "new"}
    ledger.append([row("b")])
    again = Ledger(tmp_path, KINDS)
    assert again.made == ["b"] and again.earlier == {"model": "new"}
    again.finish(["b"], complete=True)
    assert items(tmp_path) == ["b"]


def test_a_damaged_line_costs_one_item(tmp_path: Path) -> None:
    started(tmp_path, [row("a"), row("b"), row("c")])
    path = tmp_path / LEDGER
    path.write_text(path.read_text().replace('"item": "b"', '"item": b'))
    assert Ledger(tmp_path, KINDS).made == ["a", "c"]


def test_an_unfinished_call_is_known(tmp_path: Path) -> None:
    ledger = started(tmp_path, [row("a")])
    ledger.finish(["a", "b"], complete=False)
    assert not Ledger(tmp_path, KINDS).finished
    assert (tmp_path / TABLE).read_text().count("\n") == 2
    ledger.append([row("b")])
    ledger.finish(["a", "b"], complete=True)
    assert Ledger(tmp_path, KINDS).finished


def test_names_that_are_not_text(tmp_path: Path) -> None:
    name = b"\xbe\xdd".decode("utf-8", "surrogateescape")
    ledger = started(tmp_path, [row(name)])
    ledger.finish([name], complete=True)
    assert Ledger(tmp_path, KINDS).made == [name]
    assert b"\xbe\xdd," in (tmp_path / TABLE).read_bytes()


def test_another_call_is_kept_out(tmp_path: Path) -> None:
    # In this process the lock would be given twice.
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path\n"
        "from camoxpert.inference.ledger import open_ledger\n"
        "with open_ledger(Path(sys.argv[1]), ('map',)): pass"
    )
    with open_ledger(tmp_path, KINDS):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
        )
    assert done.returncode == 1 and "Another process is working on" in done.stderr


def test_another_table_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / TABLE).write_text("name,score\n")
    with pytest.raises(DataError, match="not a table of `predict`"), open_ledger(tmp_path, KINDS):
        pass
    assert (tmp_path / TABLE).read_text() == "name,score\n"


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    ledger = started(tmp_path, [row("a")])

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("camoxpert.inference.ledger.append_here", full)
    with pytest.raises(DataError, match="No space left on device"):
        ledger.append([row("b")])
    assert not ledger.index.status("b")


def test_what_two_runs_may_differ_in() -> None:
    one, other = row("a"), row("a", seconds={"forward": 9.0}, worker="cuda:1")
    assert one != other and same_work(one) == same_work(other)
    assert same_work(one) != same_work(row("a", digest="e"))


def test_a_photo_that_changed_while_it_was_read_is_done_again(tmp_path: Path) -> None:
    """Its row has a result and no known file; the others are not touched."""
    photo = tmp_path / "a.jpg"
    photo.write_bytes(b"new")
    settings = Settings("abc", "best.pt", 32, "fp32", 0.5)
    ledger = Ledger(tmp_path / "out", KINDS)
    (tmp_path / "out").mkdir()
    ledger.restart(settings.fields())
    ledger.append([row("a", **as_fields(None)), row("b")])
    plan = make_plan(ledger, settings, [Photo(photo, "a")], ["mask"], overwrite=False)
    assert [item.name for item in plan.todo] == ["a"] and plan.replaced == 1
