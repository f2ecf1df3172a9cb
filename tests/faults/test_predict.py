"""kill -9 of predict at any time: the same command ends as one that was not disturbed."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.ledger import same_work
from helpers.runs import KILLED, Runner

from camoxpert.inference.ledger import LEDGER
from camoxpert.inference.products import TABLE

PHOTOS = 120
DAMAGED = ("p007", "p063")
KILLS = int(os.environ.get("CAMOXPERT_KILLS", "1"))
"""Kills of processes of a run with several; each takes some ten seconds."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for number in range(PHOTOS):
        size = int(rng.integers(40, 160)), int(rng.integers(40, 160)), 3
        cv2.imwrite(str(folder / f"p{number:03d}.jpg"), rng.integers(0, 256, size, dtype=np.uint8))
    for name in DAMAGED:
        (folder / f"{name}.jpg").write_bytes(b"not a picture")
    return folder


def words(run: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return ["predict", str(run), str(photos), "-o", str(out), "--batch-size", "4", *more]


def tried_again(row: dict[str, Any]) -> bool:
    return row.get("item") in DAMAGED and row["attempt"] > 1


def ending(out: Path) -> dict[str, Any]:
    """Return everything in a folder of results but measured times and names of workers."""
    rows = [json.loads(line) for line in (out / LEDGER).read_text().splitlines()]
    with (out / TABLE).open() as file:
        table = [line[:-1] for line in csv.reader(file)]
    files = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in (LEDGER, TABLE, "predict.json")
    }
    return {"ledger": [same_work(row) for row in rows], "table": table, "files": files}


@pytest.fixture(scope="module")
def undisturbed(runner: Runner, tiny_run: Path, photos: Path, tmp_path_factory):
    """Return what a run that nobody disturbs leaves, and how long it takes."""
    out = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    assert runner.run(words(tiny_run, photos, out)) == [3], runner.said()
    found = ending(out)
    names = [row["item"] for row in found["ledger"] if "item" in row]
    assert names == [f"p{number:03d}" for number in range(PHOTOS)]
    assert [row["item"] for row in found["ledger"] if row.get("status") == "failed"] == [*DAMAGED]
    assert len(found["files"]) == 4 * (PHOTOS - len(DAMAGED)) + 1
    return found, time.monotonic() - started


def test_twenty_kills_change_nothing(
    runner: Runner, tiny_run: Path, photos: Path, tmp_path: Path, undisturbed
) -> None:
    expected, seconds = undisturbed
    chance = random.Random(5)
    kills = runs = 0
    while kills < 20:
        assert runs < 30, f"{kills} kills in {runs} runs: they are over too soon"
        out = tmp_path / str(runs)
        while True:
            kill = [chance.uniform(0.02, 0.6 * seconds), signal.SIGKILL, None]
            (code,) = runner.run(words(tiny_run, photos, out), signals=[kill])
            assert code in (KILLED, 3), runner.said()
            if code == 3:
                # On a busy machine the undisturbed run may have been slower than these.
                seconds *= 0.8
                break
            kills += 1
        found = ending(out)
        # A kill behind the last image: the next call tries damaged files again, as every call does.
        found["ledger"] = [row for row in found["ledger"] if not tried_again(row)]
        assert found == expected
        runs += 1


def test_a_lost_row_is_noticed(runner, tiny_run, photos, tmp_path: Path, undisturbed) -> None:
    """The comparison above can fail, and the next call repairs what it is allowed to."""
    expected, _ = undisturbed
    out = tmp_path / "out"
    assert runner.run(words(tiny_run, photos, out)) == [3]
    path = out / LEDGER
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"p050"' not in line))
    assert ending(out) != expected
    shutil.copy(out / "maps" / "p000.png", out / "maps" / "p050.png")
    # It might be anybody's picture.
    assert runner.run(words(tiny_run, photos, out)) == [2]
    assert "p050.png is there already, and no predictions.jsonl" in runner.said()
    for path in out.rglob("p050.*"):
        path.unlink()
    assert runner.run(words(tiny_run, photos, out)) == [3]
    found = ending(out)
    assert found["table"] == expected["table"] and found["files"] == expected["files"]


def children(parent: int) -> list[int]:
    """Return the worker processes of a command."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == parent and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


@pytest.fixture(scope="module")
def by_two(tiny_run: Path, photos: Path, tmp_path_factory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("two")
    done = subprocess.run(command(tiny_run, photos, out), capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "the model was loaded 2 times" in done.stdout
    return ending(out)


def command(run: Path, photos: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "camoxpert", *words(run, photos, out, "--devices", "cpu,cpu")]


def test_two_processes_do_what_one_does(undisturbed, by_two) -> None:
    """Bit for bit, because each has one thread, as the one process here."""
    assert by_two == undisturbed[0]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    "victims", ["worker", pytest.param("parent", marks=pytest.mark.exhaustive), "both"]
)
def test_kills_of_several_processes(
    tiny_run: Path, photos: Path, tmp_path: Path, by_two, victims: str
) -> None:
    chance = random.Random(victims)
    for number in range(KILLS):
        out = tmp_path / str(number)
        process = subprocess.Popen(
            command(tiny_run, photos, out), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        rows = chance.randrange(0, PHOTOS - 30)
        while process.poll() is None and lines(out / LEDGER) < rows:
            time.sleep(0.005)
        workers = children(process.pid)
        assert workers
        killed = {"worker": [], "parent": [process.pid], "both": [process.pid]}[victims]
        killed += workers[:1] if victims != "parent" else []
        for victim in killed:
            os.kill(victim, signal.SIGKILL)
        _, said = process.communicate()
        if victims == "worker":
            assert process.returncode == 3 and b"ended: SIGKILL" in said, said
        else:
            assert process.returncode == KILLED
            # Workers end with their parent, and nobody waits for a lock that a dead one holds.
            deadline = time.monotonic() + 10
            while any(Path(f"/proc/{pid}").exists() for pid in workers):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            done = subprocess.run(command(tiny_run, photos, out), capture_output=True)
            assert done.returncode == 3, done.stderr
        assert ending(out) == by_two


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
