"""The decoders to compare with: the library's own, on our backbone, in ordinary runs."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from camoxpert.config import DECODERS, ModelConfig
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import CamoXpert, build_model

smp = pytest.importorskip("segmentation_models_pytorch")
PEERS = [name for name in DECODERS if name != "moe"]


def network(decoder: str, backbone: str = "tf_efficientnet_lite0") -> CamoXpert:
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, decoder=decoder, pretrained=False)
    return build_model(config, sides=[64])


@pytest.mark.parametrize("decoder", PEERS)
def test_equals_the_library_itself(decoder: str) -> None:
    """With the same weights the library's own network gives the same logits, bit for bit."""
    ours = network(decoder).eval()
    kind = {name.lower(): name for name in ("Unet", "FPN", "DeepLabV3Plus", "UPerNet", "Segformer")}
    theirs = getattr(smp, kind[decoder])("tu-tf_efficientnet_lite0", encoder_weights=None).eval()
    prefixes = {
        "backbone.net.": "encoder.model.",
        "decoder.decoder.": "decoder.",
        "decoder.head.": "segmentation_head.",
    }
    weights = {
        new + name.removeprefix(old): value
        for name, value in ours.state_dict().items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }
    theirs.load_state_dict(weights, strict=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std)
        output = ours(images)
    assert torch.equal(output.logits_B1HW, expected)
    assert output.side_logits == () and output.routing == ()


@pytest.mark.parametrize("decoder", ["unet", "segformer"])
@pytest.mark.parametrize("backbone", ["edgenext_xx_small", "tiny_test"])
def test_backbones_without_a_map_at_stride_2(decoder: str, backbone: str) -> None:
    model = network(decoder, backbone)
    logits = model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).logits_B1HW
    logits.sum().backward()
    assert logits.shape == (2, 1, 64, 64)
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_a_batch_of_one_image_trains() -> None:
    """DeepLabV3+ pools to one value per channel, of which batch norm has no variance."""
    model = network("deeplabv3plus").train()
    model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).logits_B1HW.sum().backward()


def test_dilation_keeps_stride_16() -> None:
    maps = network("deeplabv3plus").backbone(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4, 4]
    plain = network("unet").backbone(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in plain] == [32, 16, 8, 4, 2]


def test_a_backbone_that_cannot_be_dilated_is_refused() -> None:
    with pytest.raises(ConfigError, match="dilat"):
        network("deeplabv3plus", "edgenext_xx_small")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ConfigError, match=r"pip install 'camoxpert\[peers\]'"):
        network("unet", "tiny_test")


def test_our_decoder_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    model = network("moe", "tiny_test")
    assert model.expert_kinds and len(model(torch.zeros(1, 3, 64, 64)).side_logits) == 4


def test_settings_of_experts_do_not_reach_a_peer() -> None:
    config = ModelConfig(backbone="tiny_test", decoder="fpn", pretrained=False)
    more = dataclasses.replace(config, num_experts=12, width=256)
    sizes = {sum(p.numel() for p in build_model(c).parameters()) for c in (config, more)}
    assert len(sizes) == 1
