"""The inference engine on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import camoxpert
from camoxpert.config import build_config, to_dict
from camoxpert.inference.batching import choose_batch_size
from camoxpert.inference.weights import cast_weights
from camoxpert.models.camoxpert import build_model
from camoxpert.runs.checkpoint import FORMAT, Checkpoint
from camoxpert.runs.share import write_shared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = build_config(
        {"model.backbone": "edgenext_xx_small", "model.pretrained": False, "data.img_size": 128}
    )
    folder = tmp_path_factory.mktemp("model")
    weights = build_model(config.model).state_dict()
    values = {"format": FORMAT, "config": to_dict(config), "model": weights}
    write_shared(folder, Checkpoint(folder, config, values))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(24):
        pixels = rng.integers(0, 256, (200 + number, 160, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.png"), pixels)
    return folder


def maps(folder: Path) -> np.ndarray:
    return np.concatenate(
        [cv2.imread(str(p), 0).ravel() for p in sorted((folder / "maps").iterdir())]
    ).astype(int)


def test_the_maps_are_those_of_the_cpu(model: Path, photos: Path, tmp_path: Path) -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    for device in ("cpu", "cuda"):
        predictor = camoxpert.load(model, device=device, precision="fp32")
        result = camoxpert.predict_folder(predictor, photos, tmp_path / device, kinds=["map"])
        assert result.done == 24
    assert np.abs(maps(tmp_path / "cpu") - maps(tmp_path / "cuda")).max() <= 1
    assert result.summary["workers"][0]["peak_memory_bytes"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_cast_once_give_the_same_maps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    settings = {"model.backbone": "edgenext_xx_small", "model.pretrained": False}
    network = build_model(build_config(settings).model).cuda().eval()
    images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8, device="cuda")

    def logits() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cuda", dtype=dtype):
            return network(images).logits_B1HW.float()

    before = logits()
    assert cast_weights(network, dtype) > 20
    assert torch.equal(logits(), before)


def test_a_process_of_its_own_does_the_same(model: Path, photos: Path, tmp_path: Path) -> None:
    for name, devices in (("here", "auto"), ("there", "0")):
        camoxpert.predict_folder(model, photos, tmp_path / name, kinds=["map"], devices=devices)
    assert (maps(tmp_path / "here") == maps(tmp_path / "there")).all()


def test_the_batch_size_fits(model: Path, photos: Path, tmp_path: Path) -> None:
    result = camoxpert.predict_folder(model, photos, tmp_path, kinds=["mask"], batch_size=None)
    worker = result.summary["workers"][0]
    assert worker["batch_size"] >= 8 and "images/s" in worker["batch_size_reason"]


def test_doubling_stops_where_memory_ends() -> None:
    def forward(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 16:
            raise torch.OutOfMemoryError("no room")
        return batch.square().sum((1, 2, 3))

    one = torch.zeros(1, 3, 512, 512, device="cuda")
    size, reason = choose_batch_size(forward, one, torch.device("cuda"))
    assert size <= 16
    assert "do not fit" in reason or "not faster" in reason
