"""Which stopped run a command continues, what starts from an own model, and what a refusal
leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SPECIALISTS

from camoxpert.files import read_json
from camoxpert.runs.checkpoint import load_checkpoint

SHORT = ("--epochs", "2", "--no-test", "--no-report")


def runs_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if (p / "run.json").is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of all files, but for the empty lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_spellings_of_a_path_are_one_run(
    stopped, train, toy_data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_data, "res")
    Path("linked").symlink_to("res")
    out = tmp_path / "out"
    assert stopped(*SHORT, data="res/", out=out) == 75
    for spelled in ("res", "./res", "linked", str(tmp_path / "res"), "res/../res//"):
        assert stopped(*SHORT, data=spelled, out=out) == 75
        assert len(runs_in(out)) == 1, spelled


def test_moved_data_continue_and_other_data_do_not(
    stopped, train, toy_data: Path, tmp_path: Path, capsys
) -> None:
    first, second, out = tmp_path / "a" / "toy", tmp_path / "b" / "toy", tmp_path / "out"
    shutil.copytree(toy_data, first)
    assert stopped(*SHORT, data=first, out=out) == 75
    second.parent.mkdir()
    first.rename(second)
    capsys.readouterr()
    assert train(*SHORT, data=second, out=out) == 0
    said = capsys.readouterr().out
    assert len(runs_in(out)) == 1 and "resumed" in said and "data.roots" in said
    # The control: other data with the same settings are another run.
    assert stopped(*SHORT, "--seed", "3", data=second, out=out) == 75
    third = tmp_path / "c" / "toy"
    shutil.copytree(second, third)
    mask = next((third / "TrainDataset").rglob("*.png"))
    mask.write_bytes(mask.read_bytes() + b"\0")
    before = runs_in(out)
    stopped(*SHORT, "--seed", "3", data=third, out=out)
    assert len(runs_in(out)) == len(before) + 1


def test_weights_are_compared_by_content_and_not_needed_again(
    stopped, train, tiny_run: Path, tmp_path: Path, capsys
) -> None:
    out, file = tmp_path / "out", tmp_path / "w.pt"
    shutil.copy(tiny_run / "checkpoints" / "best.pt", file)
    words = (*SHORT, "--weights")
    assert stopped(*words, str(file), out=out) == 75
    (name,) = runs_in(out)
    assert "model.weights" in read_json(out / name / "run.json")["files"]
    moved = tmp_path / "moved.pt"
    shutil.copy(file, moved)
    assert stopped(*words, str(moved), out=out) == 75
    assert runs_in(out) == [name]
    moved.unlink()
    assert stopped(*words, str(moved), out=out) == 75, "the checkpoint has the weights"
    assert runs_in(out) == [name]
    values = torch.load(file, weights_only=True)
    values["model"] = {key: tensor + 1 for key, tensor in values["model"].items()}
    torch.save(values, file)
    capsys.readouterr()
    stopped(*words, str(file), out=out)
    assert len(runs_in(out)) == 2, "other content under the same name is another run"
    assert "started from another model.weights" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["", "checkpoints/best.pt", "model", "model/model.safetensors"])
def test_init_from_takes_all_of_an_own_model(
    place: str, stopped, tiny_run: Path, tmp_path: Path, capsys
) -> None:
    words = (*SHORT, *SPECIALISTS, "--run-name", "r", "--lr", "1e-9", "optim.min_lr=0")
    assert stopped(*words, "--init-from", str(tiny_run / place)) == 75
    said = capsys.readouterr().out
    step = next((tmp_path / "r" / "checkpoints").glob("step_*.pt"))
    source = load_checkpoint(tiny_run / "checkpoints" / "best.pt").evaluated_weights
    own = load_checkpoint(step).values["model"]
    assert f"{len(own)} of {len(own)} tensors from" in said and "new here" not in said
    assert own.keys() == source.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, source[name], rtol=0, atol=1e-4)


def test_init_from_is_not_needed_after_the_first_checkpoint_and_names_the_run(
    stopped, train, tiny_run: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_run, source)
    assert stopped(*SHORT, "--init-from", str(source), out=out) == 75
    assert stopped(*SHORT, out=out) == 75
    assert len(runs_in(out)) == 2, "part of what is trained"
    shutil.rmtree(source)
    assert train(*SHORT, "--init-from", str(source), out=out) == 0
    assert len(runs_in(out)) == 2


def test_init_from_matches_experts_by_kind_and_lists_the_others(
    train, tiny_run: Path, capsys
) -> None:
    words = ("--dry-run", "--init-from", str(tiny_run))
    assert train(*words, *SPECIALISTS, "model.experts=[edge, texture, hybrid]") == 0
    said, _, taken = capsys.readouterr().out.partition("taken: ")
    assert "experts.0" in said and "experts.1" not in said, "texture and hybrid moved; edge is new"
    assert "experts.1" in taken and "experts.0" not in taken
    assert train(*words, "--expert-family", "uniform") == 0
    assert "decoder.levels.0.moe.experts" in capsys.readouterr().out
    assert train(*words, "model.width=24", "--backbone", "resnet10t") == 0
    said = capsys.readouterr().out
    assert "backbone (" in said and "its backbone is tiny_test" in said
    assert train(*words, "--weights", "w.pt") == 2
    assert train("--dry-run", "--init-from", "nowhere") == 4
    assert "--init-from: There is no checkpoint" in " ".join(capsys.readouterr().err.split())


class TestARefusalChangesNothing:
    """Every file of the run that is not continued keeps its bytes."""

    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (("--num-experts", "4"), 4),
            (("--seed", "9"), 4),
            (("optim.weight_decay=0.5",), 4),
            (("--batch-size", "4"), 4),
            (("--weights", "BEST"), 4),
            (("--init-from", "BEST"), 4),
            (("--backbone", "edgenext_bass"), 2),
            (("--multi-scale", "0.1"), 2),
        ],
    )
    def test_settings_of_a_finished_run(
        self, words, code, train, tiny_run: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "tiny"
        shutil.copytree(tiny_run, run)
        before = contents(run)
        words = [str(run / "checkpoints" / "best.pt") if w == "BEST" else w for w in words]
        base = ("--epochs", "2", "--stage1-epochs", "1", "--lr", "3e-3", "--resume", str(run))
        assert train(*base, *words) == code
        assert contents(run) == before
        assert [p.name for p in tmp_path.iterdir()] == ["tiny"]

    def test_data_and_space(
        self, stopped, train, toy_data: Path, tmp_path: Path, monkeypatch
    ) -> None:
        data = tmp_path / "data"
        shutil.copytree(toy_data, data)
        words = (*SHORT, "--run-name", "r")
        assert stopped(*words, data=data, out=tmp_path / "out") == 75
        run = tmp_path / "out" / "r"
        (run / "checkpoints" / "step_9.pt.tmp").write_bytes(b"half")
        before = contents(run)
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            none = usage._replace(free=0) if hasattr(usage, "_replace") else usage
            patch.setattr("camoxpert.runs.store.shutil.disk_usage", lambda _: none)
            patch.setattr("camoxpert.training.checkpoints.checkpoint_bytes", lambda _: 1 << 60)
            assert train(*words, data=data, out=tmp_path / "out") == 4
        assert contents(run) == before
        mask = next(data.rglob("*.png"))
        os.truncate(mask, mask.stat().st_size)
        mask.write_bytes(mask.read_bytes() + b"\0")
        assert train(*words, data=data, out=tmp_path / "out") == 4
        assert contents(run) == before
