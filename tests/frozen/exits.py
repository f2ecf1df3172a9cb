"""Good and bad command lines, and how each of them ends."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from camoxpert.cli import main

WORDS = 8
TRAIN = "train --dataset-path {tmp}/toy --checkpoint-dir {tmp}/runs --device cpu"
TINY = "--backbone tiny_test --no-pretrained --img-size 32 --batch-size 2 --num-workers 0"
# {tmp} is the folder that ``prepare`` fills.
LINES = {
    "nothing": "",
    "help": "--help",
    "help of a command": "train --help",
    "settings": "train --print-config",
    "dry run": f"{TRAIN} {TINY} --dry-run",
    "synthesize": "synthesize toy {tmp}/fresh --train 2 --test 1 --size 32",
    "score maps": "evaluate --predictions {maps} --gt {maps} --num-workers 0 -o {tmp}/scores",
    "unknown command": "trian",
    "unknown flag": f"{TRAIN} --batchsize 4",
    "no flag like it": f"{TRAIN} --zzzzz",
    "flag without value": "train --epochs",
    "no data": "train",
    "missing data": "train --dataset-path {tmp}/nowhere",
    "empty data": "train --dataset-path {tmp}/empty --device cpu",
    "odd image size": f"{TRAIN} --img-size 100",
    "small image size": f"{TRAIN} --img-size 16",
    "image size in words": f"{TRAIN} --img-size large",
    "no batch": f"{TRAIN} --batch-size 0",
    "unknown choice": f"{TRAIN} --scheduler cosinus",
    "unknown backbone": f"{TRAIN} --backbone edgenext_bass --no-pretrained",
    "more chosen than there are": f"{TRAIN} --num-experts 2 --top-k 3",
    "unknown setting": f"{TRAIN} optim.lrr=0.1",
    "not an override": f"{TRAIN} --lr 0.1 fast",
    "resume of nothing": f"{TRAIN} {TINY} --resume {{tmp}}/nowhere",
    "resume from a text": f"{TRAIN} {TINY} --resume {{tmp}}/text.pt",
    "missing settings file": f"{TRAIN} --config {{tmp}}/nowhere.yaml",
    "broken settings file": f"{TRAIN} --config {{tmp}}/broken.yaml",
    "resolver": f"{TRAIN} --config {{tmp}}/resolver.yaml",
    "alias": f"{TRAIN} --config {{tmp}}/alias.yaml",
    "unknown setting in a file": f"{TRAIN} --config {{tmp}}/unknown.yaml",
    "missing device": f"{TRAIN.replace('cpu', 'cuda:99')} {TINY}",
    "evaluate nothing": "evaluate",
    "evaluate both": "evaluate {tmp}/run --predictions {tmp}/empty --gt {tmp}/empty",
    "maps without masks": "evaluate --predictions {tmp}/empty",
    "flag of the other kind": "evaluate {tmp}/run --measures all",
    "missing evaluation data": "evaluate {tmp}/run --data {tmp}/nowhere",
    "no maps": "evaluate --predictions {tmp}/empty --gt {maps} -o {tmp}/scores",
    "evaluate nothing there": "evaluate {tmp}/nowhere --device cpu",
    "predict with nothing": "predict {tmp}/nowhere {image} -o {tmp}/maps --device cpu",
    "predict with a text": "predict {tmp}/text.pt {image} -o {tmp}/maps --device cpu",
    "predict no image": "predict {tmp}/text.pt {tmp}/nowhere.jpg -o {tmp}/maps",
    "predict without output": "predict {tmp}/text.pt {image}",
    "threshold": "predict {tmp}/text.pt {image} -o {tmp}/maps --threshold 2",
    "serve nothing there": "serve {tmp}/nowhere --port 0 --device cpu",
    "serve on no port": "serve {tmp}/text.pt --port 99999",
    "serve elsewhere": "serve {tmp}/text.pt --host 192.0.2.1",
    "synthesize over something": "synthesize toy {tmp}/toy",
    "synthesize something else": "synthesize real {tmp}/new",
    "relight": "synthesize relight --dataset-path {tmp}/toy -o {tmp}/relit --per-image 1",
    "relight nothing": "synthesize relight -o {tmp}/relit",
    "relight without output": "synthesize relight --csv {tmp}/toy",
    "relight missing data": "synthesize relight --dataset-path {tmp}/nowhere -o {tmp}/relit",
    "compose": "synthesize compose --dataset-path {tmp}/toy -o {tmp}/made --num-samples 2",
    "compose out of range": "synthesize compose --csv {tmp}/toy -o {tmp}/made --noise 4 1",
    "kind after flags": "synthesize --train 4 relight {tmp}/relit",
    "difficulty": "synthesize toy {tmp}/new --difficulty 2",
    "report of no run": "report {tmp}/empty",
    "report of no ledger": "report {tmp}/text.pt",
    "report of several that are no runs": "report {tmp}/empty {tmp}/toy",
    "sweep without a space": "sweep --dataset-path {tmp}/toy",
    "sweep of a missing space": "sweep --space {tmp}/nowhere.yaml --dataset-path {tmp}/toy",
    "doctor of nothing": "doctor {tmp}/nowhere --device cpu -o {tmp}/doctor",
    "doctor's fraction": "doctor {tmp}/toy --val-fraction 0.9",
    "benchmark": "benchmark speed",
    "benchmark rounds": "benchmark moe --rounds 0",
    "profile": "profile --dataset-path {tmp}/toy --steps 0",
    "profile without data": "profile",
}
FILES = {
    "broken.yaml": "optim: [1",
    "resolver.yaml": "run: {name: '${oc.env:HOME}'}",
    "alias.yaml": "a: &a [1]\nb: *a",
    "unknown.yaml": "optim: {lerning_rate: 1}",
    "text.pt": "not weights",
}


def prepare(folder: Path) -> None:
    """Make the files that the command lines name."""
    ending(f"synthesize toy {folder}/toy --train 4 --test 2 --size 32 --difficulty 0.1".split())
    (folder / "empty").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)


def ending(words: list[str]) -> tuple[int, str]:
    """Return exit code and stderr of a command line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as left:
            # argparse leaves so after --help.
            code = int(left.code or 0)
    return code, said.getvalue()


def run(line: str, folder: Path) -> dict[str, Any]:
    """Return how a command line of the table ends, without what only this machine says."""
    image = next((folder / "toy" / "TrainDataset" / "Imgs").glob("*.jpg"))
    maps = str(next((folder / "toy" / "TestDataset").glob("*/GT")))
    words = [word.format(tmp=folder, maps=maps, image=image) for word in line.split()]
    before = Path.cwd()
    # What a command writes by default belongs into the scratch folder, too.
    os.chdir(folder)
    try:
        with mock.patch("torch.cuda.is_available", return_value=False):
            code, text = ending(words)
    finally:
        os.chdir(before)
    text = text.replace(str(folder), "<tmp>").replace(torch.__version__, "<torch>")
    return {"code": code, "stderr": " ".join(text.split()[:WORDS])}


def collect(folder: Path) -> dict[str, Any]:
    prepare(folder)
    return {name: run(line, folder) for name, line in LINES.items()}
