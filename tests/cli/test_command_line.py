"""The front door: every flag parses and is effective, mistakes end in one paragraph and a code."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import camoxpert
from camoxpert import console
from camoxpert.cli import COMMANDS, KINDS, Parser, command_parser, main, no_overrides, overview
from camoxpert.cli.train import add_arguments
from camoxpert.config import Config, get_setting
from camoxpert.config.flags import read_config

ROOT = Path(__file__).parents[2]

SEED_COMMANDS = {
    "balanced": "train --dataset-path /kaggle/input/cod10k-dataset/COD10K-v3 --checkpoint-dir "
    "/kaggle/working/checkpoints --backbone edgenext_base --num-experts 7 --batch-size 32 "
    "--accumulation-steps 4 --img-size 352 --epochs 120 --lr 0.00025 --stage1-epochs 30 "
    "--num-workers 8 --deep-supervision --use-ema --gradient-checkpointing",
    "max_speed": "train --dataset-path /kaggle/input/cod10k-dataset/COD10K-v3 --checkpoint-dir "
    "/kaggle/working/checkpoints --backbone edgenext_base --num-experts 7 --batch-size 48 "
    "--accumulation-steps 3 --img-size 320 --epochs 120 --lr 0.00025 --stage1-epochs 30 "
    "--num-workers 12 --deep-supervision --use-ema --compile",
    "memory": "train --dataset-path /kaggle/input/cod10k-dataset/COD10K-v3 --checkpoint-dir "
    "/kaggle/working/checkpoints --backbone edgenext_base --num-experts 7 --batch-size 16 "
    "--accumulation-steps 8 --img-size 352 --epochs 120 --lr 0.00025 --stage1-epochs 30 "
    "--gradient-checkpointing --deep-supervision --use-ema",
}

# Every flag of `train` that users type, with a value and where it must arrive.
FLAGS = [
    ("--dataset-path a b", "data.roots", ("a", "b")),
    ("--checkpoint-dir out", "run.dir", "out"),
    ("--backbone resnet18", "model.backbone", "resnet18"),
    ("--num-experts 5", "model.num_experts", 5),
    ("--top-k 3", "model.top_k", 3),
    ("--batch-size 8", "train.batch_size", 8),
    ("--accumulation-steps 3", "train.accumulation_steps", 3),
    ("--img-size 320", "data.img_size", 320),
    ("--epochs 7", "train.epochs", 7),
    ("--stage1-epochs 2", "train.stage1_epochs", 2),
    ("--lr 3e-4", "optim.lr", 3e-4),
    ("--weight-decay 0.05", "optim.weight_decay", 0.05),
    ("--num-workers 0", "data.num_workers", 0),
    ("--deep-supervision", "loss.deep_supervision", True),
    ("--no-deep-supervision", "loss.deep_supervision", False),
    ("--use-ema", "train.use_ema", True),
    ("--no-use-ema", "train.use_ema", False),
    ("--ema-decay 0.99", "train.ema_decay", 0.99),
    ("--gradient-checkpointing", "train.gradient_checkpointing", "on"),
    ("--gradient-checkpointing off", "train.gradient_checkpointing", "off"),
    ("--gradient-checkpointing auto", "train.gradient_checkpointing", "auto"),
    ("--compile", "train.compile", True),
    ("--no-amp", "train.precision", "fp32"),
    ("--scheduler poly", "optim.scheduler", "poly"),
    ("--min-lr 1e-7", "optim.min_lr", 1e-7),
    ("--warmup-epochs 2.5", "optim.warmup_epochs", 2.5),
    ("--stage2-lr 1e-5", "optim.stage2_lr", 1e-5),
    ("--stage2-batch-size 4", "train.stage2_batch_size", 4),
    ("--progressive-unfreeze", "train.progressive_unfreeze", True),
    ("--resume never", "train.resume", "never"),
    ("--resume-from runs/x", "train.resume", "runs/x"),
    ("--skip-stage1", "train.stage1_epochs", 0),
    ("--device cpu", "train.device", "cpu"),
    ("--seed 7", "train.seed", 7),
    ("--no-pretrained", "model.pretrained", False),
    ("--weights w.pth", "model.weights", "w.pth"),
    ("--max-hours 11.5", "train.max_hours", 11.5),
    ("--noncam include", "data.noncam", "include"),
    ("--run-name 007", "run.name", "007"),
    ("--precision bf16", "train.precision", "bf16"),
    ("--dispatch loop", "model.dispatch", "loop"),
]


def parse(text: str) -> Config:
    parser = Parser(prog="camoxpert train")
    add_arguments(parser)
    options, rest = parser.parse_checked(text.split())
    return read_config(options, rest)


@pytest.mark.parametrize(("typed", "path", "value"), FLAGS, ids=[f[0] for f in FLAGS])
def test_every_flag_arrives(typed: str, path: str, value: object) -> None:
    config = parse(typed)
    assert get_setting(config, path) == value
    negatives = ("--deep-supervision", "--use-ema", "--gradient-checkpointing auto")
    assert config != Config() or typed in negatives


@pytest.mark.parametrize(("name", "command"), SEED_COMMANDS.items())
def test_the_seed_commands_are_accepted_as_typed(name: str, command: str) -> None:
    config = parse(command.removeprefix("train "))
    recipe = parse(f"--config {ROOT / 'configs' / name}.yaml")
    for path in (
        "train.batch_size",
        "train.accumulation_steps",
        "data.img_size",
        "train.stage1_epochs",
        "train.epochs",
        "optim.lr",
        "model.num_experts",
        "train.compile",
    ):
        assert get_setting(config, path) == get_setting(recipe, path), path


def test_overrides_behind_the_list_of_folders_are_not_folders() -> None:
    config = parse("--dataset-path a b optim.lr=1e-3 --epochs 3 train.seed=4")
    assert config.data.roots == ("a", "b")
    assert (config.optim.lr, config.train.seed, config.train.epochs) == (1e-3, 4, 3)


def test_flags_win_over_the_file_and_overrides_over_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("train: {epochs: 5, batch_size: 5, accumulation_steps: 5}")
    config = parse(f"--config {file} --epochs 6 --batch-size 6 train.batch_size=7")
    train = config.train
    assert (train.accumulation_steps, train.epochs, train.batch_size) == (5, 6, 7)


@pytest.mark.parametrize(
    ("typed", "code", "says"),
    [
        (["trian"], 2, "Did you mean train"),
        (["train", "--lrr", "3"], 2, "Did you mean --lr"),
        (["train", "--epoch", "3"], 2, "Did you mean --epochs"),
        (["train", "--dataset-path", "x", "optim.lrr=3"], 2, "Did you mean optim.lr"),
        (["train", "--lr", "fast"], 2, "optim.lr must be a number"),
        (["train", "--top-k", "9"], 2, "Lower --top-k"),
        (["train", "--scheduler", "cosin"], 2, "Did you mean cosine"),
        (["train"], 2, "--dataset-path"),
        (["train", "--config", "none.yaml"], 2, "There is no file none.yaml"),
        (["train", "--dataset-path", "/no/such/folder"], 3, "There is no file or folder"),
        (["evaluate", "/no/such/run"], 4, "There is no checkpoint"),
        (["predict", "x"], 2, "required"),
        (["report", "/no/such/run"], 4, "neither a run folder"),
        (["synthesize", "toy", "x", "--difficulty", "2"], 2, "between 0 and 1"),
    ],
)
def test_a_mistake_is_one_paragraph_and_a_code(typed, code, says, capsys) -> None:
    assert main(typed) == code
    captured = capsys.readouterr()
    message = " ".join(captured.err.split())
    assert says in message
    assert "Traceback" not in captured.err and "\n\n" not in captured.err.strip()


def test_debug_shows_the_traceback() -> None:
    from camoxpert.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["train", "--lrr", "--debug"])


@pytest.mark.parametrize("typed", [["--help"], ["train", "--help"], ["train", "--lrr", "3"]])
def test_help_and_typos_import_nothing_heavy(typed: list[str]) -> None:
    """They answer at once because nothing heavy is imported: that can be counted, time cannot."""
    code = (
        "import sys; from camoxpert.cli import main\n"
        f"try: main({typed!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch','numpy','timm','cv2','albumentations','matplotlib'} & set(sys.modules)\n"
        "sys.exit(len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_front_door_is_the_same_program(tmp_path: Path) -> None:
    script = subprocess.run(
        [sys.executable, str(ROOT / "train_ultimate.py"), "train", "--lrr"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert script.returncode == 2 and "Did you mean --lr" in script.stderr


def test_print_config_reads_back(capsys, tmp_path: Path) -> None:
    assert main(["train", "--lr", "3e-4", "--print-config"]) == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(f"--config {file}").optim.lr == 3e-4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("words", [*((name,) for name in COMMANDS), *KINDS], ids=" ".join)
def test_the_examples_of_the_help_can_be_pasted(words, capsys, monkeypatch) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    text = capsys.readouterr().out.replace("\\\n", " ")
    command = KINDS[words][0] if words in KINDS else words[0]
    start = f"  camoxpert {' '.join(words)} "
    examples = [line for line in text.splitlines() if line.startswith(start)]
    assert len(examples) >= 2
    received = []

    def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
        received.append(typed)
        settings = command in ("train", "crossval", "profile", "quality")
        read_config(options, rest) if settings else no_overrides(rest)
        return 0

    monkeypatch.setattr(f"camoxpert.cli.{command}.run", run)
    assert [main(shlex.split(example)[1:]) for example in examples] == [0] * len(examples)
    assert len(received) == len(examples)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("predict x y -o z --precision fp8", "train.precision (--precision) must be one of"),
        ("evaluate x --noncam inclusive", "Did you mean include?"),
        ("doctor x --val-fraction 0.9", "data.val_fraction (--val-fraction) must be at most 0.5"),
        ("doctor x --max-pixels 0", "data.max_pixels (--max-pixels) must be at least 1"),
        ("benchmark train --img-size big", "data.img_size must be a whole number"),
    ],
)
def test_flags_of_other_commands_are_checked_as_those_of_train(typed, says, capsys) -> None:
    assert main(typed.split()) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_before_anything_is_130(monkeypatch, capsys) -> None:
    def interrupted(typed: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("camoxpert.cli.run_command", interrupted)
    assert main(["train"]) == 130
    assert "Ctrl-C" in capsys.readouterr().err


def test_every_setting_with_a_flag_is_in_the_help() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = parser.format_help()
    assert all(flag.split()[0] in text for flag, _, _ in FLAGS)


class TestNoStreams:
    """A daemon, pythonw or ``2>&-``: there is nowhere to print, and every command works."""

    def run(self, words: str, closed: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
        code = "import sys; from camoxpert.cli import main; sys.exit(main(sys.argv[1:]))"
        command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {words} {closed}"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    @pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
    def test_a_command_works_and_writes_its_files_alone(self, closed: str, tmp_path: Path) -> None:
        words = "synthesize toy data --train 2 --test 0 --size 32"
        done = self.run(words, closed, tmp_path)
        assert done.returncode == 0
        assert len(list((tmp_path / "data").rglob("*.png"))) == 2

    def test_an_error_has_its_code_and_does_not_reach_stdout(self, tmp_path: Path) -> None:
        done = self.run("train --epochz 3", "2>&-", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")

    def test_without_the_command_line(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(sys, "stderr", None)
        console.note("a remark")
        assert list(console.track(range(2), "work")) == [0, 1]
        with console.TrainingBar(total=1, epoch=1, epochs=1) as bar:
            bar.update(loss=None, gpu="", memory=None, data_wait=None)
        assert capsys.readouterr().out == ""


def test_the_overview_names_every_command_and_kind_once() -> None:
    text = overview()
    first = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(first) == sorted([*COMMANDS, *(kind for _, kind in KINDS)])
    assert max(map(len, text.splitlines())) <= 100


def test_a_command_in_no_group_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "sing", "sing a song")
    assert re.search(r"^more:\n  sing +sing a song$", overview(), re.MULTILINE)


def test_the_version_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"camoxpert {camoxpert.__version__}\n"


def test_an_unknown_command_says_where_they_are_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["trian"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Did you mean train?" in said and "`camoxpert --help` says what each does." in said


@pytest.mark.parametrize(
    "typed, says",
    [
        (["--verison"], "Did you mean --version? The command comes first"),
        (["--dataset-path", "x"], "--dataset-path stands before any command. The command comes"),
        (["synthesize", "relit", "x"], "Did you mean relight? `camoxpert synthesize --help`"),
        (["evaluate", "a", "--protocol", "rwa"], "Did you mean raw?"),
        (["help", "trian"], "Unknown command 'trian'. Did you mean train?"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest(
    typed: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_help_of_a_command_in_either_order(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for typed in (["help", "serve"], ["serve", "--help"]):
        with pytest.raises(SystemExit):
            main(typed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "--port" in texts[0]


def test_a_list_of_names_in_a_command_without_settings() -> None:
    """It was a tuple, to which argparse could add nothing: a traceback."""
    parser, _, _ = command_parser(["doctor"])
    for typed, names in (
        ([], []),
        (["--modalities", "rgb", "depth"], ["rgb", "depth"]),
    ):
        options, _ = parser.parse_checked(["data", *typed])
        assert options.modalities == names
    assert parser.parse_checked(["data"])[0].modalities == []
