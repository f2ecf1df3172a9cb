"""What other sensors saw: a photograph alone stays as it is, what is missing adds nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from camoxpert.config import build_config
from camoxpert.errors import ConfigError
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.modalities import Modalities, all_there_is, require_known
from camoxpert.models.support import weights_digest
from camoxpert.models.zoom import Zoomed

NAMES = ("depth", "thermal")
TINY = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 16,
    "model.num_experts": 3,
    "model.detail_width": 8,
}


def small(names: tuple[str, ...] = NAMES, **settings: object) -> CamoXpert:
    torch.manual_seed(0)
    values = TINY | {f"model.{name}": value for name, value in settings.items()}
    return build_model(build_config(values).model, modalities=names).eval()


def taught(**settings: object) -> CamoXpert:
    """Return a model in which every part of its modalities does something."""
    model = small(**settings)
    assert model.modalities is not None
    for number, parameter in enumerate(model.modalities.parameters()):
        generator = torch.Generator().manual_seed(number)
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def images_of(number: int = 3, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=generator)


def planes_of(number: int = 3, side: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (number, len(NAMES), side, side)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


def without(seen: Modalities, *lacking: str) -> Modalities:
    keep = torch.tensor([True, *(name not in lacking for name in NAMES)])
    return seen.shown(keep.expand(len(seen.rgb_B), -1))


class TestPhotographAlone:
    @pytest.mark.parametrize("routing", ["lateral", "fused"])
    def test_same_weights_same_output_bit_for_bit(self, routing: str) -> None:
        plain = small((), routing=routing)
        after = torch.rand(1)
        model = small(routing=routing)
        assert torch.equal(after, torch.rand(1)), "the run's random numbers are not touched"
        own = model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
        added = {name.partition(".")[0] for name in own.keys() - plain.state_dict().keys()}
        assert added == {"modalities"}
        expected = plain(images_of()).logits_B1HW
        assert torch.equal(model(images_of()).logits_B1HW, expected)
        # Trained: given nothing, or planes that are all missing, it is still the base model.
        model = taught(routing=routing)
        base = nn.ModuleDict({"b": model.backbone, "d": model.decoder})
        control = nn.ModuleDict({"b": plain.backbone, "d": plain.decoder})
        assert weights_digest(base) == weights_digest(control)
        assert torch.equal(model(images_of()).logits_B1HW, expected)
        nothing = all_there_is(torch.zeros_like(planes_of()))
        output = model(images_of(), modalities=nothing)
        assert torch.equal(output.logits_B1HW, expected)
        everything = model(images_of(), modalities=all_there_is(planes_of()))
        assert not torch.allclose(everything.logits_B1HW, expected), "the control"

    def test_at_first_planes_change_nothing(self) -> None:
        model = small()
        output = model(images_of(), modalities=all_there_is(planes_of()))
        assert torch.equal(output.logits_B1HW, model(images_of()).logits_B1HW)


def test_a_missing_modality_adds_exactly_nothing() -> None:
    """Whatever lies in its plane; and no image changes what another one gets."""
    model, seen = taught(), all_there_is(planes_of())
    garbage = seen.planes_BMHW.clone()
    garbage[:, 1] = 255 - garbage[:, 1]
    lacking = without(seen, "thermal")
    expected = model(images_of(), modalities=lacking).logits_B1HW
    odd = model(images_of(), modalities=lacking._replace(planes_BMHW=garbage)).logits_B1HW
    assert torch.equal(odd, expected)
    emptied = seen.planes_BMHW.clone()
    emptied[:, 1] = 0
    assert torch.equal(model(images_of(), modalities=all_there_is(emptied)).logits_B1HW, expected)
    # One image with all, beside one with the photograph alone.
    mixed = seen._replace(present_BM=torch.tensor([[True, True], [False, False], [True, False]]))
    found = model(images_of(), modalities=mixed).logits_B1HW
    torch.testing.assert_close(found[1:2], model(images_of()[1:2]).logits_B1HW)
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("zoom", [False, True])
def test_every_subset_predicts_and_differs(zoom: bool) -> None:
    model: nn.Module = taught()
    if zoom:
        model = Zoomed(model, 32)  # type: ignore[arg-type]  # our network
    seen = all_there_is(planes_of())
    found = []
    for chosen in itertools.product([True, False], repeat=3):
        if any(chosen):
            shown = seen.shown(torch.tensor(chosen).expand(3, -1))
            output = model(images_of(), modalities=shown)
            assert torch.isfinite(output.logits_B1HW).all()
            found.append(output.logits_B1HW)
    assert len(found) == 7
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other)


def test_without_its_photograph_an_image_is_not_looked_at() -> None:
    model, seen = taught(), all_there_is(planes_of())
    blind = seen.shown(torch.tensor([False, True, True]).expand(3, -1))
    first = model(images_of(), modalities=blind).logits_B1HW
    assert torch.equal(model(255 - images_of(), modalities=blind).logits_B1HW, first)
    # An image of which nothing would be left keeps its photograph.
    nothing = seen.shown(torch.zeros(3, 3, dtype=torch.bool))
    assert nothing.rgb_B.all() and not nothing.present_BM.any()


def test_what_there_is_reaches_the_routers() -> None:
    """Experts may specialise by modality: the same features, another choice."""
    model = small()
    assert model.modalities is not None
    seen = all_there_is(planes_of())
    plain = model(images_of(), modalities=seen).routing
    for router in model.modalities.routers:
        nn.init.normal_(router.weight, std=30)  # type: ignore[arg-type]  # of a Linear
    both = model(images_of(), modalities=seen).routing
    one = model(images_of(), modalities=without(seen, "depth")).routing
    alone = model(images_of(), modalities=without(seen, *NAMES)).routing
    for a, b in ((plain, both), (both, one)):
        assert any(not torch.equal(x.logits_BE, y.logits_BE) for x, y in zip(a, b, strict=True))
    assert all(
        torch.equal(x.logits_BE, y.logits_BE)
        for x, y in zip(alone, model(images_of()).routing, strict=True)
    )


def test_every_parameter_gets_a_gradient() -> None:
    model = taught().train()
    loss = model(images_of(), modalities=all_there_is(planes_of())).logits_B1HW.square().mean()
    loss.backward()
    assert model.modalities is not None
    idle = [
        name
        for name, parameter in model.modalities.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum()
    ]
    assert not idle


def test_resized_planes_do_not_blend_with_the_unknown() -> None:
    planes = torch.full((1, 1, 64, 64), 200, dtype=torch.uint8)
    planes[..., :32] = 0
    small_BMHW = all_there_is(planes).resized((32, 32)).planes_BMHW
    assert set(small_BMHW.unique().tolist()) == {0, 200}


def test_unknown_names_get_a_paragraph() -> None:
    require_known(("depth",), NAMES)
    with pytest.raises(ConfigError, match=r"photographs alone.*--modalities rgb depth"):
        require_known(("depth",), ())
    with pytest.raises(ConfigError, match=r"Did you mean thermal\?.*depth, thermal"):
        require_known(("termal",), NAMES)
