"""Score maps in worker processes, stop halfway, and keep scores in a ledger."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from helpers.maps import CAMO, evaluate, listing, pair, write
from helpers.printed import complained

from camoxpert import stop
from camoxpert.cli import main
from camoxpert.errors import Stopped
from camoxpert.evaluation import ledger
from camoxpert.evaluation.maps.evaluate import evaluate_maps
from camoxpert.evaluation.maps.find import MapTask, PairOptions, find_maps
from camoxpert.evaluation.maps.masks import find_masks
from camoxpert.evaluation.maps.score import MapOptions, choose_map_workers, score_task
from camoxpert.evaluation.output import OutputFolder
from camoxpert.metrics import RESULT_KEYS


class TestWorkers:
    def test_processes_give_the_same_bits(self, world: Path) -> None:
        sets = find_masks([world / "data"])
        (task, *_) = find_maps([world / "maps/good"], sets, PairOptions())
        many = MapTask(
            "m", "d", tuple(
                type(job)(f"{job.name}-{i}", job.map, job.mask, None, job.group)
                for i in range(8) for job in task.jobs
            ),
        )  # fmt: skip
        options = MapOptions(keys=RESULT_KEYS)
        single = score_task(many, options, num_workers=0)
        double = score_task(many, options, num_workers=2)
        assert repr(single.results()) == repr(double.results())
        assert single.rows() == double.rows() and single.data_hash() == double.data_hash()
        assert double.num_images == len(many.jobs)

    def test_the_number_of_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choose_map_workers(3) == 3 and choose_map_workers(0) == 0
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
        assert choose_map_workers(None) == 8
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
        assert choose_map_workers(None) == 0

    def test_stopped_it_leaves_nothing(self, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sets = find_masks([world / "data"])
        tasks = find_maps([world / "maps"], sets, PairOptions())
        seen: list[int] = []

        def code() -> int:
            seen.append(1)
            return 143 if len(seen) >= 4 else 0

        before = listing(world)
        with stop.watch() as asked:
            monkeypatch.setattr(asked, "code", code)
            with pytest.raises(Stopped, match="SIGTERM"), OutputFolder(world / "out") as folder:
                evaluate_maps(tasks, MapOptions(gallery=2), num_workers=0, output=folder)
        assert listing(world) == before

    def test_workers_end_with_their_parent(self, world: Path, tmp_path: Path) -> None:
        root = Path(__file__).parents[2]
        code = (
            "import os, signal, time\n"
            "from concurrent.futures import ProcessPoolExecutor\n"
            "import multiprocessing\n"
            "from camoxpert.evaluation.maps.score import _start_worker\n"
            "if __name__ == '__main__':\n"
            "    context = multiprocessing.get_context('spawn')\n"
            "    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker)\n"
            "    print(pool.submit(os.getpid).result(), flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        script = tmp_path / "parent.py"
        script.write_text(code)
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, check=False
        )
        worker = int(done.stdout)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert done.returncode == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)

    def test_ctrl_c_leaves_no_table(self, world: Path) -> None:
        for index in range(100, 1500):
            name = f"camo_{index}.png"
            os.link(world / "data/CAMO/GT/camo_50.png", world / "data/CAMO/GT" / name)
            os.link(world / "maps/good/CAMO/camo_50.png", world / "maps/good/CAMO" / name)
        root = Path(__file__).parents[2]
        before = listing(world)
        process = subprocess.Popen(
            [sys.executable, str(root / "train_ultimate.py"), "evaluate", *CAMO,
             "--num-workers", "2", "--ledger", "scores.jsonl"],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while listing(world) == before and time.monotonic() < deadline:
            time.sleep(0.05)  # until the unfinished folder exists
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "Traceback" not in said and "Stopped (Ctrl-C)" in said
        assert listing(world) == before


class TestLedger:
    def test_rows_come_together_in_one_table(self, world: Path, capsys) -> None:
        words = ("--gt", "data", "--ledger", "led.jsonl", "--no-intervals", "--gallery", "0")
        assert evaluate("--predictions", "maps/good", *words) == 0
        assert evaluate("--predictions", "maps/bad", *words) == 0
        assert evaluate("--predictions", "maps/bad", *words, "--method", "renamed") == 0
        capsys.readouterr()
        assert main(["report", "led.jsonl", "--dataset", "CAMO", "--measures", "Smeasure"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[1] for line in lines[2:]] == ["good", "bad", "renamed"]
        row = json.loads(Path("led.jsonl").read_text().splitlines()[0])
        assert {"time", "version", "commit", "protocol", "data_hash", "scores"} <= set(row)
        for form in ("markdown", "latex", "csv"):
            assert main(["report", "led.jsonl", "--format", form]) == 0
            assert "good" in capsys.readouterr().out

    def test_other_masks_are_not_mixed(self, world: Path, capsys) -> None:
        words = ("--gt", "data/CAMO", "--ledger", "led.jsonl", "--no-intervals")
        assert evaluate("--predictions", "maps/good", *words) == 0
        write(world / "data/CAMO/GT/camo_50.png", 255 - pair(50, 1)[1])
        assert evaluate("--predictions", "maps/bad", *words) == 0
        assert main(["report", "led.jsonl"]) == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "cannot be compared in one table" in said and "data hash" in said
        assert main(["report", "led.jsonl", "--method", "good"]) == 0
        # The newest row of a method counts, so scoring it again removes the conflict.
        assert evaluate("--predictions", "maps/good", *words) == 0
        assert main(["report", "led.jsonl"]) == 0

    def test_other_protocols_are_not_mixed(self, world: Path, capsys) -> None:
        words = ("--gt", "data/CAMO", "--ledger", "led.jsonl", "--no-intervals")
        assert evaluate("--predictions", "maps/good", *words) == 0
        assert evaluate("--predictions", "maps/bad", *words, "--protocol", "raw") == 0
        assert main(["report", "led.jsonl"]) == 3
        assert "another --protocol" in complained(capsys)

    def test_resized_maps_are_marked(self, world: Path, capsys) -> None:
        words = ("--gt", "data/CAMO", "--ledger", "led.jsonl", "--no-intervals")
        assert evaluate("--predictions", "maps/good", *words) == 0
        for path in (world / "maps/bad/CAMO").iterdir():
            write(path, cv2.resize(cv2.imread(str(path), 0), (24, 18)))
        assert evaluate("--predictions", "maps/bad", *words, "--resize", "bilinear") == 0
        capsys.readouterr()
        assert main(["report", "led.jsonl"]) == 0
        assert "bad (resized)" in capsys.readouterr().out

    def test_torn_and_foreign_files(self, world: Path, capsys) -> None:
        words = (*CAMO, "--ledger", "led.jsonl", "--no-intervals", "--gallery", "0")
        assert evaluate(*words) == 0
        whole = Path("led.jsonl").read_text()
        Path("led.jsonl").write_text(whole + whole[: len(whole) // 2])
        assert evaluate(*words) == 0
        assert len(ledger.read_ledger(Path("led.jsonl"))) == 2
        Path("other.txt").write_text("hello\n")
        assert evaluate(*CAMO, "--ledger", "other.txt") == 3
        assert Path("other.txt").read_text() == "hello\n"
        Path("led.jsonl").write_text(whole + '{"ti')
        assert len(ledger.read_ledger(Path("led.jsonl"))) == 1
        assert evaluate(*CAMO, "--ledger", "other.txt/led.jsonl") == 3
        Path("null.jsonl").write_text(whole.replace('"num_images": 6', '"num_images": null'))
        assert main(["report", "null.jsonl"]) == 3
        Path("half.jsonl").write_text('{"method": "x"}\n')
        assert main(["report", "half.jsonl"]) == 3
        assert "it needs method, dataset" in complained(capsys)

    def test_a_checkpoint_goes_into_the_same_ledger(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        """A model and its saved maps are scored on the same images and masks."""
        monkeypatch.chdir(tmp_path)
        words = ["--ledger", "led.jsonl", "--gallery", "0", "--no-intervals"]
        assert main(["evaluate", str(tiny_run), "--data", str(toy_data), "-o", "out", *words]) == 0
        test = toy_data / "TestDataset" / "toy"
        assert main(["predict", str(tiny_run), str(test / "Imgs"), "-o", "p", "--save", "map"]) == 0
        maps = ["--predictions", "p/maps", "--gt", str(test / "GT"), "--method", "saved"]
        assert evaluate(*maps, *words) == 0
        capsys.readouterr()
        assert main(["report", "led.jsonl", "--format", "csv"]) == 0
        first, second = csv.DictReader(capsys.readouterr().out.splitlines())
        assert float(first["Smeasure"]) == pytest.approx(float(second["Smeasure"]), abs=1e-4)
