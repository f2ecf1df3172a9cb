"""Batch norm on a map of one value per channel: the last short batch of one image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from camoxpert.config import build_config
from camoxpert.models.camoxpert import build_model


def model_of(backbone: str):
    torch.manual_seed(0)
    values = {"backbone": backbone, "pretrained": False, "width": 16, "num_experts": 2}
    return build_model(build_config({f"model.{k}": v for k, v in values.items()}).model).train()


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0"])
def test_one_image_of_32_px_trains_with_running_statistics(backbone: str) -> None:
    model = model_of(backbone)
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), int(m.num_batches_tracked)) for m in norms]
    model(torch.rand(1, 3, 32, 32)).logits_B1HW.sum().backward()
    assert all(m.training for m in norms), "back in training mode"
    kept = [torch.equal(m.running_mean, mean) for m, (mean, _) in zip(norms, before, strict=True)]
    assert any(kept) and not all(kept), "only maps of one value leave the statistics"
    assert all(p.grad is not None for p in model.backbone.parameters())
    # With two images every layer has a variance again.
    model(torch.rand(2, 3, 32, 32)).logits_B1HW.sum().backward()
    tracked = [int(m.num_batches_tracked) for m in norms]
    assert tracked == [
        count + (1 if stayed else 2) for (_, count), stayed in zip(before, kept, strict=True)
    ]


def test_a_last_batch_of_one_image_neither_fails_nor_is_dropped(train, tmp_path) -> None:
    words = ("--backbone", "resnet10t", "--batch-size", "5", "--epochs", "1", "--run-name", "r")
    words += ("--stage1-epochs", "0", "--no-test", "--no-report", "run.log_every=1")
    assert train(*words) == 0  # 36 images: seven batches of five and one of one
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert text.count('"kind": "train"') == 8
