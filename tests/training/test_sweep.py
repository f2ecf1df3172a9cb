"""The search of settings: spaces, trials that die, several processes, pruning, no test set."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.pages import active_parts
from helpers.runs import events, records
from helpers.sweep import SPACE

from camoxpert.cli import main
from camoxpert.config import Config, get_setting, load_config, to_yaml
from camoxpert.errors import CheckpointError, ConfigError, NumericError, Stopped
from camoxpert.files import read_json, read_jsonl, write_json
from camoxpert.runs.folder import run_name
from camoxpert.runs.records import read_info
from camoxpert.training import session, validate
from camoxpert.training.sweep import results, search
from camoxpert.training.sweep.space import Dimension, read_space
from camoxpert.training.sweep.study import Book

pytest.importorskip("optuna")

BASE = {"optim.lr": 1e-3, "model.num_experts": 3, "train.epochs": 4}


class Training:
    """Stands for ``session.run``: the score of a trial is best at a rate of 3e-3."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, dict[str, Any]]] = []
        self.faults: dict[int, BaseException] = {}

    def __call__(self, config: Config, **_: Any) -> None:
        drawn = {path: get_setting(config, path) for path in ("optim.lr", "model.top_k")}
        self.runs.append((config.run.name, drawn))
        assert not config.run.test
        folder = Path(config.run.dir) / run_name(config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        if fault := self.faults.pop(len(self.runs), None):
            raise fault
        top = self.score(drawn["optim.lr"])
        lines = []
        for epoch in range(1, config.train.epochs + 1):
            scores = {config.train.select: top * epoch / config.train.epochs}
            lines.append({"kind": "validation", "epoch": epoch, "scores": scores, "best": True})
            ended = [listen(epoch, *scores.values()) for listen in validate._listeners]
            if any(ended):
                lines.append({"kind": "event", "text": ended[0]})
                break
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(folder / "run.json", {"status": "finished"})

    @staticmethod
    def score(rate: float) -> float:
        return 1 - abs(math.log10(rate / 3e-3)) / 4


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    fake = Training()
    monkeypatch.setattr(session, "run", fake)
    return fake


@pytest.fixture
def opened(space: Callable[[str], Path], tmp_path: Path) -> Callable[..., search.Sweep]:
    """Return a function that opens the sweep of a folder."""
    spaces: dict[
        str, tuple[Dimension, ...]
    ] = {}  # read once: processes that share a sweep never rewrite the file

    def call(trials: int = 6, text: str = SPACE, **settings: Any) -> search.Sweep:
        if text not in spaces:
            spaces[text] = read_space(space(text))
        config = load_config(flags=BASE | settings)
        return search.open_sweep(config, spaces[text], tmp_path / "sweep", trials)

    return call


Opened = Callable[..., search.Sweep]


class TestSearch:
    def test_the_best_is_a_file_for_train(
        self, opened: Opened, training: Training, tmp_path: Path
    ) -> None:
        sweep = opened(8, **{"train.quick.data_fraction": 0.5, "data.roots": ("toys",)})
        assert search.search(sweep) == 8
        results.write_results(sweep)
        assert training.runs[0][1] == {"optim.lr": 1e-3, "model.top_k": 2}, "first, as it is"
        complete = sweep.book.trials("COMPLETE")
        best = max(
            (drawn for _, drawn in training.runs), key=lambda d: training.score(d["optim.lr"])
        )
        assert max(trial.value for trial in complete) == pytest.approx(
            training.score(best["optim.lr"])
        )
        config = load_config(file=sweep.folder / results.BEST)
        assert {path: get_setting(config, path) for path in best} == best
        assert config.data.roots == ("toys",) and config.model.num_experts == 3
        assert config.train.quick.data_fraction == 1 and config.run.test and not config.run.name
        assert "quick runs; this is a whole one" in (sweep.folder / results.BEST).read_text()
        with (sweep.folder / results.TABLE).open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 8 and float(rows[0]["optim.lr"]) == best["optim.lr"]
        assert best["optim.lr"] != 1e-3 and len({row["optim.lr"] for row in rows}) == 8
        assert results.table_text(sweep).splitlines()[1].split()[0] == rows[0]["trial"]

    @pytest.mark.parametrize(
        ("halves", "score"), [({}, 0.6), ({"rgb": 0.2}, 0.4), ({"guided": 0.8, "rgb": 0.2}, 0.5)]
    )
    def test_a_trial_has_the_score_that_chose_its_weights(
        self,
        opened: Opened,
        monkeypatch: pytest.MonkeyPatch,
        halves: dict[str, float],
        score: float,
    ) -> None:
        """Of a model with other modalities: the mean with photographs alone."""

        def run(config: Config, **_: Any) -> None:
            folder = Path(config.run.dir) / run_name(config)
            folder.mkdir(parents=True)
            record = {"kind": "validation", "epoch": 1, "best": True, "scores": {"Smeasure": 0.6}}
            record |= {half: {"Smeasure": value} for half, value in halves.items()}
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
            write_json(folder / "run.json", {"status": "finished"})

        monkeypatch.setattr(session, "run", run)
        sweep = opened(1, **{"train.select": "Smeasure"})
        search.search(sweep)
        (trial,) = sweep.book.trials("COMPLETE")
        assert trial.value == pytest.approx(score) == trial.user_attrs["score"]

    def test_lower_is_better_for_mae(self, opened: Opened, training: Training) -> None:
        sweep = opened(5, **{"train.select": "MAE"})
        search.search(sweep)
        scores = [trial.user_attrs["score"] for trial in results.ranked(sweep)
                  if trial.state.name == "COMPLETE"]  # fmt: skip
        assert scores == sorted(scores)

    def test_bad_trials_are_pruned_and_never_win(self, opened: Opened, training: Training) -> None:
        sweep = opened(14)
        search.search(sweep)
        pruned = sweep.book.trials("PRUNED")
        assert pruned and len(sweep.book.trials("COMPLETE")) >= 4
        for trial in pruned:
            lines = read_jsonl(sweep.path_of(trial.number) / "metrics.jsonl")
            assert lines[-1]["text"].startswith(search.PRUNED) and len(lines) < 5
            assert trial.user_attrs["reason"] == lines[-1]["text"]
        ranks = [trial.state.name for trial in results.ranked(sweep)]
        assert ranks == sorted(ranks), "complete ones first"
        scores = {
            trial.number: training.score(trial.params["optim.lr"]) for trial in sweep.book.trials()
        }
        best = results.ranked(sweep)[0]
        assert scores[best.number] == max(scores.values())

    def test_the_same_command_continues(self, opened: Opened, training: Training) -> None:
        training.faults[3] = Stopped("deadline")
        with pytest.raises(Stopped, match="Stopped in trial 2"):
            search.search(opened(4))
        assert len(opened(4).book.trials("RUNNING")) == 1
        search.search(opened(4))
        names = [name for name, _ in training.runs]
        assert names == [f"trial-{n:04d}" for n in (0, 1, 2, 2, 3)]
        assert training.runs[2][1] == training.runs[3][1], "with what it had drawn"
        assert search.search(opened(4)) == 0 and len(training.runs) == 5
        assert search.search(opened(6)) == 2, "more trials on top"

    def test_a_run_that_finished_before_its_process_died_is_not_trained_again(
        self, opened: Opened, training: Training, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(search, "_finish", die)
            with pytest.raises(KeyboardInterrupt):
                search.search(opened(1))
        search.search(opened(1))
        assert len(training.runs) == 1 and len(opened(1).book.trials("COMPLETE")) == 1

    def test_a_trial_that_cannot_be_continued_is_repeated(
        self, opened: Opened, training: Training
    ) -> None:
        training.faults |= {2: Stopped("deadline"), 3: CheckpointError("damaged")}
        with pytest.raises(Stopped):
            search.search(opened(3))
        search.search(opened(3))
        numbers = [int(name.removeprefix("trial-")) for name, _ in training.runs]
        assert numbers == [0, 1, 1, 2, 3]
        assert training.runs[1][1] == training.runs[3][1], "the same values, in another trial"
        states = Counter(trial.state.name for trial in opened(3).book.trials())
        assert states == {"COMPLETE": 3, "FAIL": 1}

    def test_a_trial_that_diverges_loses(self, opened: Opened, training: Training) -> None:
        training.faults |= {1: NumericError("not finite"), 2: ConfigError("out of memory")}
        sweep = opened(5)
        search.search(sweep)
        failed = {t.number: t.user_attrs["reason"] for t in sweep.book.trials("PRUNED")
                  if "score" not in t.user_attrs}  # fmt: skip
        assert failed == {0: "not finite", 1: "out of memory"}
        assert results.ranked(sweep)[-1].number in failed

    def test_values_that_contradict_each_other_lose(
        self, opened: Opened, training: Training
    ) -> None:
        sweep = opened(6, "model.top_k: {low: 1, high: 6}\n")
        search.search(sweep)
        reasons = [t.user_attrs["reason"] for t in sweep.book.trials("PRUNED")]
        assert any("more than --num-experts" in text for text in reasons)
        assert all(drawn["model.top_k"] <= 3 for _, drawn in training.runs)

    def test_where_nothing_can_be_trained_it_ends(self, opened: Opened, training: Training) -> None:
        training.faults |= {n: ConfigError("no such backbone") for n in range(1, 9)}
        with pytest.raises(ConfigError, match="no such backbone"):
            search.search(opened(9))
        assert len(training.runs) == search.HOPELESS

    def test_other_settings_need_another_folder(self, opened: Opened, training: Training) -> None:
        search.search(opened(1))
        for change in ({"model.width": 64}, {"text": SPACE + "optim.scheduler: [cosine, poly]"}):
            with pytest.raises(CheckpointError, match="other settings"):
                opened(2, **change)
        opened(2, **{"data.num_workers": 3})  # how fast, not what


class TestProcesses:
    def test_only_a_dead_process_s_trial_is_taken_over(self, opened: Opened) -> None:
        books = [opened(3).book for _ in range(2)]
        alive, other = books[0].claim(3), books[1].claim(3)
        assert alive is not None and other is not None and (alive.number, other.number) == (0, 1)
        alive.lock.release()  # as the kernel does when a process dies
        taken = books[1].claim(3)
        assert taken is not None and taken.adopted and taken.number == 0
        assert taken.drawn == alive.drawn
        last = books[0].claim(3)
        assert last is not None and last.number == 2 and not last.adopted
        assert books[1].claim(3) is None
        for claim in (other, taken, last):
            claim.lock.release()

    def test_a_process_that_died_while_it_drew(self, opened: Opened) -> None:
        sweep = opened(2)
        sweep.book.study.ask()
        claim = sweep.book.claim(2)
        assert claim is not None and claim.number == 1
        assert [trial.state.name for trial in sweep.book.trials()] == ["FAIL", "RUNNING"]
        claim.lock.release()

    def test_several_share_a_sweep(self, opened: Opened, training: Training) -> None:
        fork = multiprocessing.get_context("fork")

        def work() -> None:
            search.search(opened(9))

        opened(9)
        workers = [fork.Process(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        trials = opened(9).book.trials()
        assert [t.state.name for t in trials if t.state.name in ("RUNNING", "FAIL")] == []
        assert len(trials) == 9 and len({t.params["optim.lr"] for t in trials}) == 9


TINY = (
    *("--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--batch-size", "8"),
    *("--num-experts", "3", "--num-workers", "0", "--no-tensorboard", "--no-report"),
    *("model.width=16", "model.detail_width=8"),
)


def test_real_trials_are_runs_that_score_no_test_set(
    toy_data: Path, tmp_path: Path, space: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from camoxpert.evaluation import model

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a test set was scored")

    out = tmp_path / "sweep"
    words = [
        "sweep",
        "--space",
        str(space()),
        "--dataset-path",
        str(toy_data),
        *TINY,
        "-o",
        str(out),
    ]
    words += ["--epochs", "2", "--limit-batches", "1", "--lr", "1e-3"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "evaluate_run", never)
        assert main([*words, "--trials", "2"]) == 0
    said = capsys.readouterr().out
    assert "best        camoxpert train --config" in said
    runs = sorted((out / "trials").iterdir())
    assert [run.name for run in runs] == [f"trial-{n:04d}-quick-limit1" for n in (0, 1)]
    for run in runs:
        assert read_json(run / "run.json")["status"] == "finished"
        assert not (run / "evaluation").exists() and (run / "checkpoints" / "best.pt").is_file()
        assert not list((run / "checkpoints").glob("step_*.pt"))
        assert len(records(run, "validation")) == 2
    page = (out / results.PAGE).read_text()
    assert active_parts(page) == [] and "no test set was scored" in page
    assert "are quick runs" in page and "optim.lr" in page
    assert main(["train", "--config", str(out / results.BEST), "--print-config"]) == 0
    assert main([*words, "--trials", "2"]) == 0 and "training:" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_whose_process_is_killed_continues_its_trial(
    toy_data: Path, tmp_path: Path, space: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    words = [
        "sweep",
        "--space",
        str(space()),
        "--dataset-path",
        str(toy_data),
        *TINY,
        "-o",
        str(out),
    ]
    words += ["--epochs", "4", "--trials", "2", "--device", "cpu", "--lr", "1e-3"]
    first = subprocess.Popen(
        [sys.executable, "-m", "camoxpert", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = out / "trials" / "trial-0000" / "metrics.jsonl"
    while first.poll() is None and not (
        log.is_file() and len(records(log.parent, "validation")) > 1
    ):
        time.sleep(0.05)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert read_json(log.parent / "run.json")["status"] == "running"
    assert main(words) == 0
    said = capsys.readouterr()
    assert "trial 0 [0/2]: continues" in said.err and "trial 1 [1/2]: training" in said.err
    assert sorted(path.name for path in (out / "trials").iterdir()) == ["trial-0000", "trial-0001"]
    assert [r["epoch"] for r in records(log.parent, "validation")] == [1, 2, 3, 4]


def test_a_listener_ends_a_run(train: Callable[..., int], tmp_path: Path) -> None:
    heard: list[tuple[int, float]] = []

    def listen(epoch: int, score: float) -> str:
        heard.append((epoch, score))
        return "enough" if epoch == 2 else ""

    with validate.heard_by(listen):
        assert train("--epochs", "5", "--run-name", "r", "--no-test", "--no-report") == 0
    scored = records(tmp_path / "r", "validation")
    assert heard == [(r["epoch"], pytest.approx(r["scores"]["wFmeasure"])) for r in scored]
    assert len(scored) == 2 and "enough" in events(tmp_path / "r")
    assert not validate._listeners


def test_a_run_that_was_ended_does_not_train_on_after_a_stop(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped between the epoch that ended it and its last word."""
    words = ("--epochs", "4", "--run-name", "r", "--no-test", "--no-report", "--stage1-epochs", "0")
    with monkeypatch.context() as patch:
        patch.setattr(session, "share_and_score", lambda *_: (_ for _ in ()).throw(Stopped("x")))
        with validate.heard_by(lambda epoch, score: "enough" if epoch == 2 else ""):
            assert train(*words) != 0
    assert read_info(tmp_path / "r")["status"] != "finished"
    assert train(*words) == 0
    assert len(records(tmp_path / "r", "validation")) == 2
    assert read_info(tmp_path / "r")["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--val-fraction", "0"], 2, "Test sets must not choose"),
        (["--overfit-batches", "1"], 2, "choose nothing"),
        (["--folds", "5"], 2, "validation split"),
        (["--trials", "0"], 2, "at least 1"),
    ],
)
def test_refused(
    toy_data: Path, tmp_path: Path, space: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, says: str,
) -> None:  # fmt: skip
    base = ["sweep", "--space", str(space()), "--dataset-path", str(toy_data), *TINY]
    assert main([*base, "-o", str(tmp_path / "s"), *words]) == code
    assert says in " ".join(capsys.readouterr().err.split())


def test_torchrun_is_refused(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="once per device"):
        opened()


def test_without_optuna_the_command_that_installs_it_is_named(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "camoxpert\[sweep\]"'):
        opened()


def test_the_book_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    dims = (Dimension("optim.lr", (), 1e-4, 1e-2, True, False),)

    def drawn(name: str, seed: int) -> list[float]:
        (tmp_path / name).mkdir()
        book = Book(tmp_path / name, dims, higher_is_better=True, epochs=4, seed=seed, start={})
        rates = []
        for _ in range(3):
            claim = book.claim(3)
            assert claim is not None
            rates.append(claim.drawn["optim.lr"])
            book.complete(claim.number, Training.score(rates[-1]))
            claim.lock.release()
        return rates

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)
    # Seeds of optuna end at 2 ** 32.
    assert drawn("d", 12345) != drawn("e", 2**40)
