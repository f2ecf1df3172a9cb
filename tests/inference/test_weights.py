"""Weights that are cast once give the maps of weights that autocast casts in every pass."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.backbones import WITHOUT_PYRAMID, families
from torch import Tensor, nn

from camoxpert.config import build_config
from camoxpert.errors import ConfigError
from camoxpert.inference.weights import cast_weights
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.profile.syncs import SyncCounter


def build(settings: dict[str, Any], side: int = 64, *, spread: bool = True) -> CamoXpert:
    torch.manual_seed(0)
    values = {"model.backbone": "edgenext_xx_small", "model.pretrained": False, "model.width": 16}
    model = build_model(build_config(values | settings).model, sides=[side]).eval()
    # Where normalisation of initial weights hides the input, all outputs would be equal.
    for layer in model.modules():
        if spread and isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.2)
    return model


@torch.inference_mode()
def logits(model: CamoXpert, dtype: torch.dtype | None, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
        return model(images).logits_B1HW


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"model.expert_family": "uniform"},
        {"model.dispatch": "loop"},
        {"model.presence": "on"},
        {"model.routing_grid": 2},
        {"model.backbone": "tf_efficientnet_lite0"},
        {"model.backbone": "pvt_v2_b0"},
        {"model.backbone": "test_nfnet"},
        {"model.support.encoder": "tiny_test", "model.support.pretrained": False},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "default",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_maps_stay_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(settings)
    before = logits(model, dtype)
    exact = logits(model, None)
    assert cast_weights(model, dtype) > 20
    assert torch.equal(logits(model, dtype), before)
    assert before.std() > 0 and not torch.equal(before.float(), exact.float())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(set(families()) - WITHOUT_PYRAMID))
def test_the_maps_of_every_family_stay(family: str) -> None:
    for side in (64, 224, 256):
        values = {"model.num_experts": 2, "model.backbone": families()[family]}
        try:
            # Deep ones would overflow.
            model = build(values, side, spread=False)
        except ConfigError:
            continue
        before = logits(model, torch.bfloat16, side)
        assert cast_weights(model, torch.bfloat16) > 20
        assert torch.equal(logits(model, torch.bfloat16, side), before)
        return
    pytest.fail(f"{family} takes none of the sizes")


def test_a_fifth_of_the_operators_is_saved() -> None:
    model = build({})
    with SyncCounter() as before:
        logits(model, torch.bfloat16)
    cast_weights(model, torch.bfloat16)
    with SyncCounter() as after:
        logits(model, torch.bfloat16)
    assert after.operators < 0.85 * before.operators


def test_routers_and_layers_that_compute_with_their_weights_keep_them() -> None:
    model = build({"model.backbone": "test_nfnet"})
    assert cast_weights(model, None) == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())
    cast_weights(model, torch.bfloat16)
    kept = [n for n, m in model.named_modules() if "router" in n or "ScaledStd" in type(m).__name__]
    assert {name.partition(".")[0] for name in kept} == {"backbone", "decoder"}
    modules = dict(model.named_modules())
    assert all(p.dtype == torch.float32 for name in kept for p in modules[name].parameters())
