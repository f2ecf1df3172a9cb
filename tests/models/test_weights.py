"""``--weights FILE`` in the forms that people have: places, prefixes, official names."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from camoxpert.config import build_config
from camoxpert.errors import CheckpointError
from camoxpert.models.backbone import Backbone
from camoxpert.models.weights import best_fit

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def resnet() -> State:
    import timm

    torch.manual_seed(3)
    return timm.create_model("resnet10t", pretrained=False).state_dict()


def built(path: Path, backbone: str = "resnet10t") -> Backbone:
    return Backbone(
        build_config({"model.backbone": backbone, "model.weights": str(path)}).model,
    )


def taken(backbone: Backbone, source: State, name: str) -> bool:
    """Return whether a tensor of timm's full network is in the backbone under its own name."""
    own = backbone.net.state_dict()
    spelled = [name, name.replace(".", "_", 1), f"model.{name}"]
    return torch.equal(own[next(n for n in spelled if n in own)], source[name])


PLACES: dict[str, Any] = {
    "bare": lambda s: s,
    **{
        key: lambda s, key=key: {key: s, "epoch": 3, "args": argparse.Namespace(lr=1)}
        for key in (
            *("state_dict", "model", "model_state_dict", "net", "model_ema", "params"),
            *("teacher", "student", "state_dict_ema", "params_ema", "generator"),
        )
    },
    "nested": lambda s: {"checkpoint": {"models": {"seg": s}}},
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_the_state_dict_lies(place: str, resnet: State, tmp_path: Path) -> None:
    torch.save(PLACES[place](resnet), tmp_path / "w.pth")
    assert taken(built(tmp_path / "w.pth"), resnet, "layer3.0.conv1.weight")


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "_orig_mod.module.", "module.model.", "model.module."),
        *("model.encoder.", "encoder.backbone.", "encoder_q.", "backbone.", "net."),
        *("a.b.c.d.", "image_encoder.trunk."),
    ],
)
def test_whatever_the_prefix(prefix: str, resnet: State, tmp_path: Path) -> None:
    more = {"decode_head.conv.weight": torch.ones(1, 4, 1, 1), "step": torch.tensor(1)}
    state = {prefix + name: tensor for name, tensor in resnet.items()} | more
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    assert taken(built(tmp_path / "w.ckpt"), resnet, "layer1.0.bn2.running_var")


def test_averaged_weights_are_preferred(resnet: State, tmp_path: Path) -> None:
    plain = {name: torch.zeros_like(tensor) for name, tensor in resnet.items()}
    torch.save({"model": plain, "model_ema": resnet}, tmp_path / "w.pth")
    assert taken(built(tmp_path / "w.pth"), resnet, "conv1.0.weight")


def test_the_suffix_is_read_in_any_case(resnet: State, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in resnet.items()}, tmp_path / "w.SAFETENSORS")
    assert taken(built(tmp_path / "w.SAFETENSORS"), resnet, "conv1.0.weight")


def official_pvt(name: str) -> str:
    """Return the name that a parameter of timm's PVTv2 has in the authors' files."""
    name = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", name)
    name = name.replace("patch_embed.", "patch_embed1.")
    return name.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")


@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_official_names_are_translated_by_timm(prefix: str, tmp_path: Path) -> None:
    import timm

    torch.manual_seed(4)
    source = timm.create_model("pvt_v2_b0", pretrained=False).state_dict()
    state = {prefix + official_pvt(name): tensor for name, tensor in source.items()}
    torch.save({"model": state}, tmp_path / "pvt.pth")
    name = "stages.2.blocks.0.mlp.dwconv.weight"
    assert taken(built(tmp_path / "pvt.pth", "pvt_v2_b0"), source, name)


def test_networks_inside_another_module_are_filled(tmp_path: Path) -> None:
    """FeatureGetterNet keeps the network under ``model.``, with the norm of the classifier gone."""
    import timm

    source = timm.create_model("mvitv2_tiny", pretrained=False).state_dict()
    config = build_config({"model.backbone": "mvitv2_tiny", "model.pretrained": False})
    backbone = Backbone(config.model)
    assert best_fit(backbone.net, source, name="mvitv2_tiny").complete


def test_names_of_both_sides_are_in_the_error(resnet: State, tmp_path: Path) -> None:
    other = {f"encoder.{n.replace('layer', 'part')}": t for n, t in resnet.items()}
    torch.save({"net": other}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as refused:
        built(tmp_path / "w.pth")
    text = str(refused.value)
    assert "are missing (layer1.0.conv1.weight" in text and " more)" in text
    assert "The file also has" in text and "part1.0.conv1.weight" in text
    assert len(text) < 600 and "\n" not in text
    other = dict(resnet) | {"conv1.0.weight": torch.zeros(7, 3, 3, 3)}
    torch.save(other, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"\(7, 3, 3, 3\) in the file, \(24, 3, 3, 3\) here"):
        built(tmp_path / "w.pth")


def test_a_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"Conv2d.*save its state_dict") as refused:
        built(tmp_path / "whole.pth")
    assert "\x1b" not in str(refused.value) and "weights_only=False" not in str(refused.value)


def test_an_own_checkpoint_gives_its_backbone_and_says_what_is_left(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("checkpoints/best.pt", "model/model.safetensors"):
        built(tiny_run / file, "tiny_test")
        said = " ".join(capsys.readouterr().out.split())
        assert "whole CamoXpert model" in said and "of its decoder are not used" in said
        assert f"--init-from {tiny_run / file}" in said
    last = max((tiny_run / "checkpoints").glob("step_*.pt"))
    source = torch.load(last, weights_only=True)["ema"]["weights"]
    own = built(last, "tiny_test").net.state_dict()
    assert all(torch.equal(own[name], source[f"backbone.net.{name}"]) for name in own)
