"""References: what describes them, what they steer, and that without one nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from camoxpert.config import build_config, check_conflicts
from camoxpert.config.guidance import SupportConfig
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.guidance import Reference, combine
from camoxpert.models.support import SupportEncoder, object_window, support_width
from camoxpert.models.weights import hub_reachable

TINY = "tiny_test"


def small(guided: bool = True, **settings: object) -> CamoXpert:
    torch.manual_seed(0)
    values: dict[str, object] = {
        "model.backbone": TINY,
        "model.pretrained": False,
        "model.width": 16,
        "model.num_experts": 3,
        "model.detail_width": 8,
    }
    if guided:
        values["model.support.encoder"] = TINY
    values |= {f"model.{name}": value for name, value in settings.items()}
    return build_model(build_config(values).model).eval()


def taught(**settings: object) -> CamoXpert:
    """Return a model in which every part of the guidance does something."""
    model = small(**settings)
    assert model.guidance is not None
    for number, parameter in enumerate(model.guidance.parameters()):
        generator = torch.Generator().manual_seed(number)
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def images_of(number: int = 2, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=generator)


def masks_of(number: int = 2, side: int = 64) -> Tensor:
    masks = torch.zeros(number, 1, side, side, dtype=torch.uint8)
    masks[:, :, 10:30, 20:50] = 255
    return masks


def features(number: int, seed: int = 1) -> Tensor:
    return torch.randn(number, 24, generator=torch.Generator().manual_seed(seed))


class TestWithoutReferences:
    def test_the_rest_starts_as_without_guidance(self) -> None:
        plain = small(guided=False)
        after = torch.rand(1)
        guided = small()
        assert torch.equal(after, torch.rand(1)), "the run's random numbers are not touched"
        own = guided.state_dict()
        assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
        assert {name.partition(".")[0] for name in own.keys() - plain.state_dict().keys()} == {
            "guidance"
        }

    @pytest.mark.parametrize("routing", ["lateral", "fused"])
    def test_nothing_changes(self, routing: str) -> None:
        images = images_of()
        expected = small(guided=False, routing=routing)(images).logits_B1HW
        model = small(routing=routing)
        model.search_for(combine(features(2)))
        assert torch.equal(model(images).logits_B1HW, expected), "every part starts at zero"
        model = taught(routing=routing)
        assert torch.equal(model(images).logits_B1HW, expected)
        model.search_for(combine(features(2)))
        assert not torch.equal(model(images).logits_B1HW, expected), "the control"
        model.search_for(None)
        assert torch.equal(model(images).logits_B1HW, expected)

    def test_images_of_a_batch_without_one(self) -> None:
        images = images_of(3)
        expected = small(guided=False)(images)
        junk = torch.full((3, 24), torch.nan)
        junk[1] = combine(features(2))
        output = taught()(images, Reference(junk, torch.tensor([False, True, False])))
        for number in (0, 2):
            assert torch.equal(output.logits_B1HW[number], expected.logits_B1HW[number])
        assert not torch.equal(output.logits_B1HW[1], expected.logits_B1HW[1])
        for own, other in zip(output.routing, expected.routing, strict=True):
            assert torch.equal(own.logits_BE[0], other.logits_BE[0])
            assert not torch.equal(own.logits_BE[1], other.logits_BE[1])


class TestCombine:
    @pytest.mark.parametrize("number", [1, 3, 5])
    def test_the_order_changes_no_bit(self, number: int) -> None:
        shown = 50 * features(number)
        order = torch.randperm(number, generator=torch.Generator().manual_seed(3))
        assert torch.equal(combine(shown), combine(shown[order]))
        assert float(combine(shown).norm()) == pytest.approx(1, abs=1e-6)

    def test_each_counts_the_same(self) -> None:
        one, other = torch.eye(24)[:2]
        torch.testing.assert_close(combine(torch.stack([100 * one, other])), (one + other) / 2**0.5)

    def test_the_model_sees_the_same(self) -> None:
        model, images, shown = taught(), images_of(), features(5)
        logits = []
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [0, 1, 2, 3]):
            model.search_for(combine(shown[order]))
            logits.append(model(images).logits_B1HW)
        assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


class Blocks(nn.Module):
    """Means of 8x8 pixels as a last layer, as a map or as tokens behind one that has no place."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.tokens = tokens

    def forward_features(self, images_NCHW: Tensor) -> Tensor:
        blocks = nn.functional.avg_pool2d(images_NCHW, 8)
        if not self.tokens:
            return blocks
        tokens = blocks.flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(tokens[:, :1], 1e6), tokens], 1)


@pytest.fixture
def reduced_precision() -> Iterator[Callable[[], list[str]]]:
    """Allow TF32 everywhere; return the function that reads the settings."""
    backends: Any = torch.backends
    places = [
        *(backends.cuda.matmul, backends.cudnn.conv),
        *(backends.mkldnn.matmul, backends.mkldnn.conv),
    ]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32"
    yield lambda: [place.fp32_precision for place in places]
    for place, mode in zip(places, before, strict=True):
        place.fp32_precision = mode


class TestEncoder:
    @pytest.mark.parametrize("tokens", [False, True])
    def test_the_mean_of_covered_tokens_by_hand(self, tokens: bool) -> None:
        encoder = SupportEncoder(SupportConfig(TINY, side=48))
        encoder.net, encoder.prefix = Blocks(tokens), int(tokens)
        # The window around 40 pixels has 48, as the side: nothing is resized. What is outside of
        # the object does not count.
        image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
        mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        image[:, 12:52, 12:52], mask[:, 12:52, 12:52] = 0, 255
        image[0, 12:52, 12:52] = 255
        image[1, 12:52, 12:22] = 255
        found = encoder.encode(image[None], mask[None])
        # Blocks at the border are covered in half, or in a quarter in the corners, and filled with
        # the mean colour, 0: they are weighted by that share once more.
        line = torch.tensor([0.5, 1, 1, 1, 1, 0.5])
        cover = line[:, None] * line
        green = torch.tensor([0.5, 0.75, 0, 0, 0, 0])[None] * line[:, None]
        red = (1 - encoder.mean[0, 0]) / encoder.std[0, 0] * cover
        zero = -encoder.mean[0, 1] / encoder.std[0, 1]
        one = (1 - encoder.mean[0, 1]) / encoder.std[0, 1]
        expected = [(red * cover).sum(), ((one * green + zero * (cover - green)) * cover).sum()]
        torch.testing.assert_close(
            found[0, :2], torch.stack([value.flatten()[0] for value in expected]) / cover.sum()
        )

    def test_a_small_object_is_enlarged(self) -> None:
        image = images_of(1)[0]
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[:, 60:62, 1:3] = True
        window, marked = object_window(image, mask, 32)
        assert window.shape == (3, 32, 32) and marked.shape == (1, 32, 32)
        # 4 of the 256 pixels of the smallest window, which is moved into the image.
        assert float(marked.mean()) == pytest.approx(4 / 256, rel=1e-4)
        assert float(marked[0, 24:28, 2:6].mean()) > 0.5

    def test_references_do_not_depend_on_each_other(self) -> None:
        encoder = SupportEncoder(SupportConfig(TINY))
        images, masks = images_of(3), masks_of(3)
        together = encoder.encode(images, masks)
        torch.testing.assert_close(together[1:2], encoder.encode(images[1:2], masks[1:2]))
        # Values of a mask: 0 and 1, 0 and 255, bool; images in 0..1.
        for mask in (masks // 255, masks > 0, (masks > 0).float()):
            assert torch.equal(encoder.encode(images, mask), together)
        torch.testing.assert_close(encoder.encode(images / 255, masks), together)
        assert encoder.encode([], []).shape == (0, 24)

    def test_a_mask_without_an_object_is_refused(self) -> None:
        encoder = SupportEncoder(SupportConfig(TINY))
        with pytest.raises(DataError, match="marks nothing"):
            encoder.encode(images_of(), torch.zeros(2, 1, 64, 64))
        with pytest.raises(DataError, match=r"of its size"):
            encoder.encode(images_of(), masks_of(side=32))

    def test_it_computes_in_full_precision_whatever_the_settings_are(
        self, reduced_precision: Callable[[], list[str]]
    ) -> None:
        """Features are kept and compared: TF32 of a training run, or of cuDNN's default, and bf16
        of a CPU must not be in them."""
        seen: list[list[str]] = []

        class Asked(Blocks):
            def forward_features(self, images_NCHW: Tensor) -> Tensor:
                seen.append(reduced_precision())
                if len(seen) == 2:
                    raise ArithmeticError
                return super().forward_features(images_NCHW)

        encoder = SupportEncoder(SupportConfig(TINY))
        encoder.net = Asked(tokens=False)
        encoder.encode(images_of(), masks_of())
        assert seen == [["ieee"] * 4] and reduced_precision() == ["tf32"] * 4
        with pytest.raises(ArithmeticError):
            encoder.encode(images_of(), masks_of())
        assert reduced_precision() == ["tf32"] * 4

    def test_the_digest_is_that_of_all_that_features_depend_on(self) -> None:
        first = SupportEncoder(SupportConfig(TINY))
        assert first.digest == SupportEncoder(SupportConfig(TINY)).digest
        assert first.digest != SupportEncoder(SupportConfig(TINY, side=96)).digest
        other = SupportEncoder(SupportConfig(TINY))
        with torch.no_grad():
            next(other.parameters())[0] += 1e-3
        assert first.digest != other.digest and first.facts.side == other.facts.side

    def test_it_is_frozen_and_no_part_of_the_model(self) -> None:
        model = small()
        names = list(model.state_dict())
        encoder = SupportEncoder(SupportConfig(TINY))
        assert encoder.frozen and not encoder.training and not encoder.train().training
        shown = encoder.encode(images_of(), masks_of())
        assert not shown.requires_grad
        model.search_for(combine(shown))
        assert list(model.state_dict()) == names, "what is searched for is not saved"

    def test_tokens_of_a_vit_at_another_size(self) -> None:
        config = SupportConfig("vit_tiny_patch16_224", side=32, pretrained=False)
        encoder = SupportEncoder(config)
        found = encoder.encode(images_of(1), masks_of(1))
        assert found.shape == (1, support_width(config)) and found.isfinite().all()

    def test_names_and_weights_that_cannot_be_had(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from huggingface_hub import constants

        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # refuses connections
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert not hub_reachable()
        with pytest.raises(ConfigError, match="--support-weights FILE"):
            SupportEncoder(SupportConfig("edgenext_xx_small"))
        with pytest.raises(ConfigError, match=r"--support-encoder: .* mean edgenext_xx_small"):
            SupportEncoder(SupportConfig("edgenext_xx_smal"))
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
        (tmp_path / "torn.pth").write_bytes(b"PK")
        torch.save({}, tmp_path / "empty.pth")
        for file, words in (
            ("other.pth", r"does not fit this support encoder .* of another support encoder\?"),
            ("none.pth", "There is no file"),
            ("torn.pth", "cannot be read as weights"),
            ("empty.pth", "holds no state dict"),
        ):
            with pytest.raises(CheckpointError, match=f"^--support-weights: .*{words}") as refused:
                SupportEncoder(SupportConfig("edgenext_xx_small", str(tmp_path / file)))
            for other in (" --weights", "backbone"):
                assert other not in str(refused.value), "of the network that was asked for"


class TestModel:
    def test_a_model_without_guidance_takes_no_references(self) -> None:
        model = small(guided=False)
        with pytest.raises(ConfigError, match="--support-encoder NAME"):
            model.search_for(combine(features(1)))
        model.search_for(None)
        for shape in ((0,), (25,), (1, 24), (0, 24)):
            guided = small()
            with pytest.raises(ConfigError, match=r"has 24 features.* got \("):
                guided.search_for(torch.zeros(shape))
            assert guided.reference_D is None

    def test_classes_are_remembered_in_the_weights(self) -> None:
        model = taught()
        assert model.guidance is not None
        shown = {"Crab": features(3), "Fish": features(2, 2)}
        digest = SupportEncoder(SupportConfig(TINY)).digest
        model.guidance.standardise(shown)
        model.guidance.remember(shown, digest)
        other = small()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert other.guidance is not None
        assert other.guidance.classes == ("Crab", "Fish")
        assert other.guidance.encoder_digest == digest
        other.search_for(other.guidance.prototype("Fish"))
        model.search_for(combine(shown["Fish"]))
        images = images_of()
        assert torch.equal(other(images).logits_B1HW, model(images).logits_B1HW)
        with pytest.raises(ConfigError, match=r"'Crabb'\. Did you mean Crab"):
            other.guidance.prototype("Crabb")

    def test_regions_of_an_image_share_its_reference(self) -> None:
        images = images_of(2)
        shown = Reference(features(2), torch.tensor([True, False]))
        plain = small(guided=False, routing_grid=2)(images).routing[-1].logits_BE
        routed = taught(routing_grid=2)(images, shown).routing[-1].logits_BE
        assert torch.equal(routed[4:], plain[4:]) and not (routed[:4] == plain[:4]).any()

    def test_a_decoder_without_experts_is_guided_as_well(self) -> None:
        pytest.importorskip("segmentation_models_pytorch")
        images = images_of(2)
        model = taught(decoder="unet")
        plain = model(images).logits_B1HW
        assert torch.equal(plain, small(guided=False, decoder="unet")(images).logits_B1HW)
        model.search_for(combine(features(1)))
        assert not torch.equal(model(images).logits_B1HW, plain)

    def test_recomputed_activations_give_the_same_gradients(self) -> None:
        shown = Reference(features(2), torch.tensor([True, False]))
        gradients = []
        for enabled in (False, True):
            model = taught().train()
            model.set_gradient_checkpointing(enabled)
            model(images_of(), shown).logits_B1HW.square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(gradients[1])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def test_every_parameter_has_a_gradient_where_no_image_has_a_reference(self) -> None:
        """Or the gradients of several processes could not be exchanged."""
        model = taught().train()
        nothing = Reference(features(2), torch.tensor([False, False]))
        output = model(images_of(), nothing)
        sides = sum(side.mean() for side in output.side_logits)
        routed = sum(r.probs_BE[:, 0].mean() for r in output.routing)
        (output.logits_B1HW.mean() + sides + routed).backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        assert model.guidance is not None
        assert all(not p.grad.any() for p in model.guidance.parameters() if p.grad is not None)

    def test_it_compiles_as_one_graph(self) -> None:
        torch._dynamo.reset()
        guidance = taught(expert_family="uniform").guidance
        assert guidance is not None
        shown = Reference(features(2), torch.tensor([True, False]))
        maps = [torch.rand(2, channels, 4, 4) for channels in (16, 24, 32, 48)]
        expected = guidance(maps, shown)
        guidance.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(guidance(maps, shown), expected)
        torch._dynamo.reset()

    def test_half_precision(self) -> None:
        model = taught()
        model.search_for(combine(features(3)))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images_of())
        assert output.logits_B1HW.isfinite().all()
        assert output.routing[0].logits_BE.dtype == torch.float32


def test_settings_that_mean_nothing_without_an_encoder() -> None:
    for values, words in (
        ({"model.support.weights": "a.pth"}, "--support-weights is for"),
        ({"model.support.side": 64}, "model.support is for"),
        ({"data.episodes.shots": 3}, "data.episodes is about"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_conflicts(build_config(values))
