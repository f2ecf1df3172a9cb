"""Every family of timm networks, by shape alone: the meta device has no memory and no time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.backbones import ONE_SIZE, WITHOUT_PADDING, WITHOUT_PYRAMID, families
from timm.models.edgenext import PositionalEncodingFourier

from camoxpert.config import build_config
from camoxpert.errors import ConfigError
from camoxpert.losses import total_loss
from camoxpert.models import backbone as backbone_module
from camoxpert.models.backbone import BACKBONES, STRIDES, TINY, Backbone
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.modalities import Modalities
from camoxpert.models.positions import FourierPositions
from camoxpert.profile.syncs import SyncCounter

# One of a kind: fixed input size, channels-last maps, five levels, windows that divide the map,
# positions of a fixed grid, tokens, hooks, and levels whose modules timm names otherwise.
KINDS = (
    *("swin_s3_tiny_224", "swinv2_tiny_window8_256", "test_maxvit", "hiera_tiny_224"),
    *("test_mambaout", "mvitv2_tiny", "vgg11", "legacy_xception"),
)


def on_meta(backbone: str, *sides: int) -> CamoXpert:
    """Build a small model around a backbone, without memory."""
    values = {"backbone": backbone, "pretrained": False, "width": 16, "num_experts": 2}
    values |= {"dispatch": "dense", "detail_width": 8}
    config = build_config({f"model.{name}": value for name, value in values.items()})
    with torch.device("meta"):
        return build_model(config.model, sides=sides).train()


def check_step(backbone: str, *sides: int) -> None:
    """Build for some sizes and take a step with each: levels, gradients and their split."""
    model = on_meta(backbone, *sides)
    for side in sides:
        maps = model.backbone(torch.zeros(2, 3, side, side, device="meta"))
        assert [m.shape[1] for m in maps] == list(model.backbone.channels)
        # Of a network with a convolution without padding a map may lack a pixel.
        for stride, features in zip(STRIDES, maps, strict=True):
            assert abs(features.shape[2] - side / stride) <= 1
            assert features.shape[2] == features.shape[3]
        laterals = [
            level.lateral(features)
            for level, features in zip(model.decoder.levels, maps, strict=True)
        ]
        torch.stack([lateral.sum() for lateral in laterals]).sum().backward()
        # Processes that train together need a gradient of every parameter.
        assert not [n for n, p in model.backbone.named_parameters() if p.grad is None]
    levels = model.backbone.parameter_levels()
    assert len(levels) == len(STRIDES) and levels[0]
    split = [id(p) for level in levels for p in level]
    assert sorted(split) == sorted(id(p) for p in model.backbone.parameters())
    model.set_gradient_checkpointing(True)


@pytest.mark.parametrize("backbone", KINDS)
def test_each_kind_of_pyramid_trains(backbone: str) -> None:
    check_step(backbone, 64)


@pytest.mark.parametrize("backbone", ["swin_s3_tiny_224", "test_maxvit", "test_mambaout"])
def test_they_train_a_whole_step(backbone: str) -> None:
    values = {"backbone": backbone, "pretrained": False, "width": 16, "num_experts": 2}
    config = build_config({f"model.{name}": value for name, value in values.items()})
    model = build_model(config.model, sides=[64]).train()
    output = model(torch.rand(2, 3, 64, 64))
    mask = (torch.rand(2, 1, 64, 64) > 0.5).float()
    total_loss(output, mask, config.loss).total.backward()
    assert output.logits_B1HW.shape == (2, 1, 64, 64)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_trains_or_is_refused_in_one_paragraph(family: str) -> None:
    backbone = families()[family]
    if family in WITHOUT_PYRAMID:
        with pytest.raises(ConfigError, match="the decoder needs") as refused:
            on_meta(backbone, 352)
        assert "\n" not in str(refused.value)
    elif family in WITHOUT_PADDING:
        with pytest.raises(ConfigError, match="do not cover the whole image"):
            on_meta(backbone, 352)
    elif family in ONE_SIZE:
        with pytest.raises(ConfigError, match=f"Use --img-size {ONE_SIZE[family]}"):
            on_meta(backbone, 352)
        check_step(backbone, ONE_SIZE[family])
    else:
        check_step(backbone, 352)


def test_a_size_that_a_network_cannot_take_is_refused_with_one_that_it_can() -> None:
    with pytest.raises(ConfigError, match=r"cannot take images of 96 px: .*Use --img-size 224"):
        on_meta("efficientformer_l1", 96)
    on_meta("efficientformer_l1", 224)


def test_several_sizes_need_a_network_that_takes_them() -> None:
    with pytest.raises(ConfigError, match="--multi-scale asks for 2 sizes"):
        on_meta("hiera_tiny_224", 64, 96)
    check_step("swin_s3_tiny_224", 64, 96)


def test_channels_last_maps_are_turned() -> None:
    """With values, not shapes alone: the map of channel 1 is that of the network's channel 1."""
    config = build_config({"model.backbone": "test_mambaout", "model.pretrained": False})
    backbone = Backbone(config.model, (64,)).eval()
    image = torch.rand(1, 3, 64, 64)
    own = [backbone.net(image)[level] for level in backbone.levels]
    for ours, theirs in zip(backbone(image), own, strict=True):
        assert torch.equal(ours[0, 1], theirs[0, :, :, 1])


def test_networks_that_take_any_size_are_built_as_before() -> None:
    """Their parameters must not depend on the size: runs of earlier versions continue."""
    plain, sized = on_meta("mvitv2_tiny"), on_meta("mvitv2_tiny", 96)
    shapes = [{n: p.shape for n, p in m.state_dict().items()} for m in (plain, sized)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("shape", [(2, 22, 22), (1, 1, 1), (3, 7, 13)])
def test_position_encodings_are_those_of_timm(shape) -> None:
    theirs = PositionalEncodingFourier(hidden_dim=32, dim=88)
    ours = FourierPositions(theirs)
    expected, found = theirs(shape), ours(shape)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    # Beyond the first row and column it is not constant: the comparison says something.
    assert shape == (1, 1, 1) or not torch.equal(found[:, :, -1, -1], found[:, :, 0, 0])


def step_without_values(settings: dict[str, Any]) -> SyncCounter:
    """Take a training step on torch's `meta` device and count what comes from the host."""
    values = {"model.pretrained": False, "model.width": 32, "model.dispatch": "dense"}
    config = build_config(values | settings)
    model = build_model(config.model).to("meta").train()
    images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="meta")
    masks = torch.empty(2, 1, 64, 64, device="meta")
    # The router switches autocast off, which the meta device does not know.
    without = mock.patch("torch.autocast", lambda *_, **__: nullcontext())
    with without, SyncCounter() as counter:
        loss, _ = total_loss(
            model(images), masks, config.loss, empty_alone=model.presence is not None
        )
        loss.backward()
    return counter


@pytest.mark.parametrize(
    "settings",
    [
        *({"model.backbone": name} for name in BACKBONES if name != TINY),
        {"model.backbone": "edgenext_xx_small", "model.expert_family": "uniform"},
        {"model.backbone": "edgenext_xx_small", "model.presence": "on"},
        {"model.backbone": TINY, "model.routing_grid": 2},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_no_step_brings_anything_from_the_host(settings) -> None:
    """A copy from the host waits for a GPU; there, torch counts it in tests/gpu."""
    counter = step_without_values(settings)
    assert counter.syncs == 0, counter.places


def test_what_timm_brings_from_the_host_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(backbone_module, "keep_positions_on_device", lambda net: None)
    assert step_without_values({"model.backbone": "edgenext_xx_small"}).syncs == 1


@pytest.mark.parametrize("backbone", ["inception_v3", "inception_v4"])
def test_maps_that_do_not_cover_the_image_are_refused(backbone: str) -> None:
    """Their strides are right by name, and their convolutions have no padding."""
    with pytest.raises(ConfigError, match="do not cover the whole image"):
        on_meta(backbone, 352)


def test_sensors_of_a_map_that_lacks_a_pixel() -> None:
    """Their stems give maps of exactly a quarter of the image; legacy_xception lacks one pixel."""
    values = {"backbone": TINY, "pretrained": False, "width": 16, "num_experts": 2}
    config = build_config({f"model.{name}": value for name, value in values.items()})
    model = build_model(config.model, modalities=("depth",))
    seen = Modalities(torch.ones(2, 1, 64, 64), torch.ones(2, 1).bool(), torch.ones(2).bool())
    maps = list(model.backbone(torch.zeros(2, 3, 64, 64)))
    maps[0] = maps[0][..., :-1, :-1]
    assert model.modalities is not None
    added, _ = model.modalities(maps, seen)
    assert [m.shape for m in added] == [m.shape for m in maps]
