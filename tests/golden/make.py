"""Made the files of this folder, once, with release 0.1. They are never made again.

A later format gets files of its own beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from camoxpert.config import build_config
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import FORMAT, Checkpoint
from camoxpert.runs.share import write_shared
from camoxpert.runs.store import CheckpointFolder
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training.checkpoints import snapshot
from camoxpert.training.prepare import prepare
from camoxpert.training.run import TrainState
from camoxpert.training.stages import training_loader
from camoxpert.training.step import train_step

SETTINGS = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 8,
    "model.detail_width": 8,
    "model.num_experts": 2,
    "model.top_k": 1,
    "data.img_size": 32,
    "data.num_workers": 0,
    "data.cache": "none",
    "data.val_fraction": 0.0,
    "train.batch_size": 4,
    "train.epochs": 3,
    "train.device": "cpu",
    "run.tensorboard": False,
}


def main(scratch: Path) -> None:
    """Train three steps, save, and write down what the averaged weights say."""
    assert FORMAT == 1
    here = Path(__file__).parent
    generate_toy(scratch, num_train=8, num_test=0, size=32, difficulty=0.1, seed=0)
    config = build_config({**SETTINGS, "data.roots": [str(scratch)]})
    run = prepare(config)
    loader = training_loader(run, 4)
    loader.set_epoch(0)
    batches = list(loader)
    for number in range(3):
        train_step(run, [batches[number % 2]])
    run.state = TrainState(step=3, epoch=1, position=8, images=12, best=0.25, best_epoch=1)
    values = snapshot(run)
    values["config"]["data"]["roots"] = []
    path = CheckpointFolder(scratch / "checkpoints").save(values, step=3)
    (here / "format_1_step.pt").write_bytes(path.read_bytes())
    saved = Checkpoint(path, config, values)
    write_shared(scratch / "shared", saved)
    shared = (scratch / "shared" / "model.safetensors").read_bytes()
    (here / "format_1.safetensors").write_bytes(shared)
    model = build_model(config.model).eval()
    model.load_state_dict(saved.evaluated_weights)
    image = torch.arange(3 * 32 * 32).remainder(251).reshape(1, 3, 32, 32).to(torch.uint8)
    with torch.no_grad():
        logits = model(image).logits_B1HW[0, 0, ::8, ::8]
    (here / "format_1.json").write_text(json.dumps({"logits": logits.tolist()}, indent=1) + "\n")


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
