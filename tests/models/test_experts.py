"""Every expert computes what its name promises."""

import pytest
import torch

from camoxpert.models.experts import (
    EXPERTS,
    ContrastExpert,
    EdgeExpert,
    FrequencyExpert,
    TextureExpert,
    expert_kinds,
)
from camoxpert.models.layers import local_mean


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 16, 1, 1), (3, 16, 5, 7), (0, 16, 4, 4)])
def test_shape_and_gradient(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    expert = EXPERTS[kind](16, 8)
    x = torch.randn(shape, requires_grad=True)
    y = expert(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    # Also the zero-sample call gives every parameter a gradient (of zero): DDP needs it.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in expert.parameters())


@pytest.mark.parametrize("kind", EXPERTS)
def test_samples_do_not_see_each_other(kind: str) -> None:
    torch.manual_seed(0)
    expert = EXPERTS[kind](16, 16).eval()
    x = torch.randn(3, 16, 8, 8)
    torch.testing.assert_close(expert(x)[1:2], expert(x[1:2]), rtol=1e-4, atol=1e-5)


def test_edge_expert_measures_slopes() -> None:
    expert = EdgeExpert(4, 4)
    ramp = torch.arange(8.0).expand(1, 4, 8, 8)
    magnitude, laplacian = expert.edges(ramp)
    # A ramp of 1 per pixel: the Sobel response is 1 inside, and a plane has no curvature.
    torch.testing.assert_close(magnitude[..., 1:-1], torch.ones(1, 4, 8, 6), atol=1e-3, rtol=0)
    torch.testing.assert_close(laplacian[..., 1:-1], torch.zeros(1, 4, 8, 6))
    flat_magnitude, flat_laplacian = expert.edges(torch.full((1, 4, 8, 8), 7.0))
    assert flat_magnitude.max() < 2e-3 and flat_laplacian.abs().max() == 0
    assert torch.allclose(expert.edges(ramp.transpose(2, 3))[0], magnitude.transpose(2, 3))


def test_edge_operators_are_fixed() -> None:
    expert = EdgeExpert(4, 4)
    learned = {name for name, _ in expert.named_parameters()}
    assert {"sobel_hw", "laplacian_hw"} <= {name for name, _ in expert.named_buffers()}
    assert not learned & {"sobel_hw", "laplacian_hw"}


def test_frequency_bands_add_up_and_separate() -> None:
    expert = FrequencyExpert(4, 4)
    x = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(sum(expert.split(x)), x)
    constant = torch.full((1, 4, 16, 16), 3.0)
    low, middle, high = expert.split(constant)
    torch.testing.assert_close(low, constant)
    assert middle.abs().max() < 1e-5 and high.abs().max() < 1e-5
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    low, middle, high = (
        band[..., 4:-4, 4:-4] for band in expert.split(checkerboard.expand(1, 4, 16, 16))
    )
    assert high.square().mean() > 0.99 and low.square().mean() < 1e-3


def test_contrast_is_zero_on_flat_areas_and_positive_at_a_spot() -> None:
    expert = ContrastExpert(4, 4)
    assert all(d.abs().max() < 1e-6 for d in expert.differences(torch.ones(1, 4, 9, 9)))
    spot = torch.zeros(1, 4, 15, 15)
    spot[..., 7, 7] = 9.0
    # The 3x3 mean at the spot is 9/9 = 1, the 7x7 mean 9/49.
    three, seven, _ = expert.differences(spot)
    assert float(three[0, 0, 7, 7]) == pytest.approx(8.0)
    assert float(seven[0, 0, 7, 7]) == pytest.approx(9 - 9 / 49)


def test_texture_statistics_tell_rough_from_smooth() -> None:
    rough = (torch.arange(12)[:, None] + torch.arange(12)) % 2 * 2.0 - 1
    mean = local_mean(rough[None, None], 5)
    deviation = local_mean((rough - mean).square(), 5).sqrt()
    assert deviation[0, 0, 4:8, 4:8].min() > 0.9
    assert TextureExpert(8, 8).filters[2].dilation == (4, 4)


def test_local_mean_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])[None, None]
    mean = local_mean(x, 3)[0, 0]
    assert mean[1, 1] == 5.0
    assert mean[0, 0] == (1 + 2 + 4 + 5) / 4


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_bf16_gradient_of_the_dilated_filters_is_sound() -> None:
    """oneDNN reads uninitialised memory for channels-last inputs: see TextureExpert.forward."""
    torch.manual_seed(0)
    expert = TextureExpert(32, 32)
    x = torch.randn(4, 32, 32, 32)
    expert(x).square().mean().backward()
    exact = expert.filters[2].weight.grad.clone()
    for _ in range(10):
        junk = [torch.full((32, 1, 3, 3), 1e30) for _ in range(50)]
        del junk
        expert.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = expert(x)
        y.float().square().mean().backward()
        assert (expert.filters[2].weight.grad - exact).abs().max() < 0.1 * exact.abs().max() + 1e-3


def test_expert_kinds_repeat_in_order() -> None:
    assert expert_kinds(3, ("edge", "texture")) == ("edge", "texture", "edge")
    assert len(set(expert_kinds(7))) == 7
