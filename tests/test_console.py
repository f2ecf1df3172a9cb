"""Progress on a terminal and in a log file."""

from __future__ import annotations

import time

from camoxpert import console
from camoxpert.console import TrainingBar


def test_it_reads_as_users_know_it(monkeypatch) -> None:
    bar = TrainingBar(total=3000, epoch=1, epochs=30, live=False)
    bar.update(1350, loss=1.234, gpu="gpu=87%", memory=12_300_000_000, data_wait=0.031)
    text = bar.text()
    assert text.startswith("Epoch 1/30: 45%|####")
    assert "| 1350/3000 [" in text
    assert text.endswith("loss=1.2340, gpu=87%, mem=12.3G, data=3%]")
    bar.close()


def test_unknown_numbers_are_left_out() -> None:
    bar = TrainingBar(total=4, epoch=2, epochs=2, stage="stage 2", initial=1, live=False)
    bar.update(loss=None, gpu="gpu=n/a", memory=None, data_wait=None)
    assert bar.text().startswith("Epoch 2/2 (stage 2): 50%|#####")
    assert bar.text().endswith(", gpu=n/a]")
    bar.close()


def test_a_log_file_gets_lines_not_carriage_returns(capsys) -> None:
    with TrainingBar(total=50, epoch=1, epochs=1, live=False) as bar:
        for _ in range(50):
            bar.update(loss=1.0, gpu="gpu=n/a", memory=None, data_wait=0.0)
    err = capsys.readouterr().err
    assert "\r" not in err and err.count("\n") == 1 and "50/50" in err


def test_progress_in_a_log_file_is_lines_and_nothing_for_short_work(monkeypatch, capsys) -> None:
    assert list(console.track(range(3), "short")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "LOG_EVERY_SECONDS", 0.02)
    with console.progress("long", total=20) as bar:
        for _ in range(20):
            time.sleep(0.01)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("long: ") for line in lines)
