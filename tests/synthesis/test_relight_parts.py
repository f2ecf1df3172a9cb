"""The parts of relighting against formulas worked by hand, OpenCV and a ray march."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from camoxpert.benchmark.relight_serial import march, serial_linear, serial_retinex
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.synthesis.relight.albedo import multi_scale_retinex
from camoxpert.synthesis.relight.blur import blur, cell_of
from camoxpert.synthesis.relight.colour import light_colour, luminance, to_linear, to_srgb
from camoxpert.synthesis.relight.depth import load_depth_model
from camoxpert.synthesis.relight.draw import DAYLIGHT, PATTERN_NAMES, Light
from camoxpert.synthesis.relight.height import height_from_depth, height_from_mask
from camoxpert.synthesis.relight.light import slopes, to_numbers
from camoxpert.synthesis.relight.patterns import nearness, pattern_light
from camoxpert.synthesis.relight.recombine import expose
from camoxpert.synthesis.relight.shadows import cast_shadows, soften
from camoxpert.synthesis.toy import toy_pair


def photo(height: int, width: int) -> torch.Tensor:
    image, _ = toy_pair(1, 2, size=max(height, width))
    pixels = torch.from_numpy(image[:height, :width].copy()).permute(2, 0, 1)
    return pixels[None].contiguous()


class TestColour:
    def test_all_levels_return(self) -> None:
        levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        assert torch.equal(to_srgb(to_linear(levels)), levels)
        assert to_linear(levels).flatten()[[0, 255]].tolist() == [0, 1]
        assert abs(float(to_linear(levels).flatten()[128]) - 0.21586) < 1e-5

    def test_daylight_is_white_and_luminance_stays_one(self) -> None:
        assert light_colour(DAYLIGHT) == pytest.approx((1, 1, 1), abs=1e-12)
        for kelvin in (2500, 3900, 5000, 9000):
            colour = torch.tensor(light_colour(kelvin)).view(1, 3, 1, 1)
            assert float(luminance(colour)) == pytest.approx(1, abs=1e-6)
            warm = kelvin < DAYLIGHT
            assert (colour[0, 0] > 1) == warm and (colour[0, 2] < 1) == warm

    def test_brightening_never_leaves_the_range(self) -> None:
        x, factor = torch.rand(1000), torch.rand(1000) * 5
        y = expose(x, factor)
        assert y.min() >= 0 and y.max() <= 1
        assert torch.equal(expose(x, torch.ones(1000)), x)
        dim = factor <= 1
        assert torch.allclose(y[dim], (x * factor)[dim])
        # By hand: 2 * 0.5 / (1 + 1 * 0.5).
        assert float(expose(torch.tensor(0.5), torch.tensor(2.0))) == pytest.approx(2 / 3)


class TestBlur:
    @pytest.mark.parametrize("sigma", [0.7, 2.0, 6.5, 12.0, 40.0])
    @pytest.mark.parametrize("shape", [(128, 128), (101, 75)])
    def test_agrees_with_opencv(self, sigma: float, shape: tuple[int, int]) -> None:
        grey = to_linear(photo(*shape))[:, :1]
        ours = blur(grey, sigma)[0, 0].numpy()
        theirs = cv2.GaussianBlur(
            grey[0, 0].double().numpy(), (0, 0), sigma, borderType=cv2.BORDER_REFLECT
        )
        # OpenCV cuts its kernel off at four sigmas.
        assert np.abs(ours - theirs).max() < 2.5e-3
        narrower = cv2.GaussianBlur(
            grey[0, 0].double().numpy(), (0, 0), 0.9 * sigma, borderType=cv2.BORDER_REFLECT
        )
        assert np.abs(narrower - theirs).max() > 2 * np.abs(ours - theirs).max()

    def test_keeps_a_constant(self) -> None:
        flat = torch.full((2, 3, 70, 90), 0.3)
        for sigma in (1, 5, 17, 60):
            assert torch.allclose(blur(flat, sigma), flat, atol=1e-6)
        assert blur(flat, 0.1) is flat

    def test_cells_grow_with_the_width(self) -> None:
        assert [cell_of(s) for s in (1, 5.9, 6, 15, 80, 250)] == [1, 1, 2, 4, 16, 64]


def test_retinex_agrees_with_gaussians() -> None:
    image = photo(256, 256)
    ours = multi_scale_retinex(to_linear(image))[0].permute(1, 2, 0).numpy()
    theirs = serial_retinex(serial_linear(image[0].permute(1, 2, 0).numpy()))
    span = theirs.max() - theirs.min()
    assert np.abs(ours - theirs).max() < 1e-3 * span


class TestHeight:
    def test_a_long_limb_is_half_a_cylinder(self) -> None:
        masks = torch.zeros(1, 1, 128, 128)
        masks[..., 44:84, :] = 1
        heights = height_from_mask(masks) * 128
        top = float(heights[0, 0, 63:65, 64].mean())
        # Few sweeps: a tenth or two too high.
        assert 20 <= top < 24
        # A third of the radius from the outline: sqrt(1 - (2/3)^2) of it.
        assert float(heights[0, 0, 50, 64]) == pytest.approx(0.745 * top, rel=0.1)
        assert heights[masks == 0].abs().max() == 0
        # An object that the image cuts goes on beyond it.
        assert float(heights[0, 0, 63, 0]) == pytest.approx(float(heights[0, 0, 63, 64]), rel=0.02)

    def test_thin_parts_are_low(self) -> None:
        masks = torch.zeros(1, 1, 128, 128)
        masks[..., 20:70, 40:90] = 1
        masks[..., 70:120, 62:68] = 1
        heights = height_from_mask(masks)[0, 0] * 128
        assert heights[45, 65] > 4 * heights[100, 65] > 0

    def test_depth_has_no_unit_and_a_slanted_ground_no_height(self) -> None:
        masks = torch.zeros(1, 1, 96, 96)
        masks[..., 30:60, 30:60] = 1
        body = height_from_mask(masks)
        ground = torch.linspace(0, 3, 96).expand(1, 1, 96, 96)
        heights = height_from_depth(ground + 5 * body, masks)
        again = height_from_depth(100 + 7 * (ground + 5 * body), masks)
        assert torch.allclose(heights, again, atol=2e-3)
        assert float(heights.sum()) == pytest.approx(float(body.sum()), rel=1e-3)
        inner = (slice(None), slice(None), slice(35, 55), slice(35, 55))
        assert (heights - body)[inner].abs().max() < 0.25 * body.max()
        assert heights[masks == 0].abs().max() == 0


def numbers_of(*azimuths: float) -> torch.Tensor:
    return torch.deg2rad(torch.tensor(azimuths))


class TestShadows:
    @pytest.mark.parametrize(("azimuth", "side"), [(180.0, "right"), (90.0, "below")])
    def test_a_block_casts_its_height_over_the_slope(self, azimuth: float, side: str) -> None:
        heights = torch.zeros(1, 1, 80, 80)
        heights[..., 30:50, 30:50] = 12
        visible, _ = cast_shadows(
            heights, heights, numbers_of(azimuth), torch.tensor([0.8]), torch.tensor([1e-3])
        )
        dark = (visible[0, 0] < 0.5) & (heights[0, 0] == 0)
        line = dark[40] if side == "right" else dark[:, 40]
        # 12 / 0.8 = 15 pixels from the far edge of the block, and none before it.
        assert abs(int(line[50:].sum()) - 15) <= 1 and not line[:30].any()
        assert visible[0, 0, 32:48, 32:48].min() > 0.99

    def test_agrees_with_a_ray_march(self) -> None:
        overlaps = []
        for index, azimuth in enumerate((0.3, 1.4, 2.9, 5.1)):
            _, mask = toy_pair(2, index, size=192)
            heights = height_from_mask(torch.from_numpy(mask)[None, None] / 255) * 192 * 1.5
            args = torch.tensor([azimuth]), torch.tensor([0.5]), torch.tensor([1e-3])
            ours = cast_shadows(heights, heights, *args)[0][0, 0].numpy() < 0.5
            theirs = march(heights[0, 0].double().numpy(), azimuth, 0.5, 1e-3)[0] < 0.5
            overlaps.append((ours & theirs).sum() / (ours | theirs).sum())
            other = march(heights[0, 0].double().numpy(), azimuth + 0.3, 0.5, 1e-3)[0] < 0.5
            assert (ours & other).sum() / (ours | other).sum() < 0.95
        assert np.mean(overlaps) > 0.97 and min(overlaps) > 0.94

    def test_penumbras_grow_with_the_distance_and_with_the_light(self) -> None:
        heights = torch.zeros(1, 1, 160, 160)
        heights[..., 20:140, 20:24] = 30
        args = numbers_of(180.0), torch.tensor([0.5])

        def widths(radius: float) -> tuple[float, list[float]]:
            visible, penumbra = cast_shadows(heights, heights, *args, torch.tensor([radius]))
            row = soften(visible, penumbra)[0, 0, 80]
            partly = ((row > 0.05) & (row < 0.95)).sum()
            return float(partly), penumbra[0, 0, 80, [26, 50, 70]].tolist()

        hard, _ = widths(0.01)
        soft, along = widths(0.15)
        assert soft > 3 * hard
        assert along[0] < along[1] < along[2] and along[2] == pytest.approx(0.15 * 47, rel=0.1)

    def test_no_object_no_shadow(self) -> None:
        flat = torch.zeros(2, 1, 40, 60)
        visible, _ = cast_shadows(
            flat, flat, numbers_of(10.0, 200.0), torch.full((2,), 0.3), torch.full((2,), 0.2)
        )
        assert visible.min() == 1

    def test_slopes_of_a_plane(self) -> None:
        y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
        dx, dy = slopes((2 * x - 3 * y)[None])
        inner = slice(1, -1)
        assert torch.allclose(dx[0, inner, inner], torch.tensor(2.0))
        assert torch.allclose(dy[0, inner, inner], torch.tensor(-3.0))


class TestPatterns:
    def test_every_pattern_has_light_and_shadow(self) -> None:
        lights = [Light(pattern=name, pattern_seed=4) for name in ("", *PATTERN_NAMES)]
        shift = torch.zeros(4, 2, 96, 96)
        passed = pattern_light(lights, to_numbers(lights, shift), shift)
        assert passed is not None and passed.min() >= 0 and passed.max() <= 1
        assert passed[0].min() == 1
        for name, one in zip(PATTERN_NAMES, passed[1:], strict=True):
            assert 0.1 < float((one < 0.2).float().mean()) < 0.7, name
            assert 0.2 < float((one > 0.8).float().mean()) < 0.9, name

    def test_they_bend_over_raised_surfaces(self) -> None:
        lights = [Light(pattern="blinds")]
        shift = torch.zeros(1, 2, 64, 64)
        flat = pattern_light(lights, to_numbers(lights, shift), shift)
        shift[:, 1, :, 32:] = 3
        bent = pattern_light(lights, to_numbers(lights, shift), shift)
        assert flat is not None and bent is not None
        assert torch.equal(flat[..., :32], bent[..., :32])
        assert torch.allclose(flat[..., 3:, 32:], bent[..., :-3, 32:], atol=1e-5)

    def test_they_end_beside_the_object(self) -> None:
        masks = torch.zeros(1, 200, 200)
        masks[:, 90:110, 90:110] = 1
        near = nearness(masks, torch.tensor([[[0.5]]]))
        assert near[0, 100, 100] == 1 and near[0, 91, 91] > 0.9
        assert near[0, 10, 10] == near[0, 100, 5] == 0
        assert pattern_light([Light()], {}, torch.zeros(1, 2, 8, 8)) is None


class TestDepth:
    def folder(self, path: Path, kind: str = "depth_anything", width: int = 384) -> Path:
        settings = {"model_type": kind, "backbone_config": {"hidden_size": width}}
        (path / "config.json").write_text(json.dumps(settings))
        return path

    def test_a_missing_extra_is_named(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ConfigError, match=r'pip install "camoxpert\[depth\]"'):
            load_depth_model(self.folder(tmp_path), torch.device("cpu"))

    def test_another_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no readable config\.json"):
            load_depth_model(tmp_path, torch.device("cpu"))
        with pytest.raises(ConfigError, match="not depth_anything"):
            load_depth_model(self.folder(tmp_path, "bert"), torch.device("cpu"))

    def test_the_network_sees_whole_patches_and_licences_are_said(
        self, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        seen = []

        class Network(torch.nn.Module):
            def forward(self, pixel_values: torch.Tensor) -> types.SimpleNamespace:
                seen.append(pixel_values.shape)
                return types.SimpleNamespace(predicted_depth=pixel_values.mean(1))

        def from_pretrained(folder: Path, *, local_files_only: bool) -> Network:
            assert local_files_only
            if (folder / "broken").exists():
                raise OSError("no weights")
            return Network()

        fake = types.SimpleNamespace(
            AutoModelForDepthEstimation=types.SimpleNamespace(from_pretrained=from_pretrained)
        )
        monkeypatch.setitem(sys.modules, "transformers", fake)
        model = load_depth_model(self.folder(tmp_path), torch.device("cpu"))
        assert "Apache-2.0" in capsys.readouterr().out
        images = photo(60, 90)
        depth = model.depths(images)
        assert depth.shape == (1, 1, 60, 90) and seen == [(1, 3, 518, 784)]
        grey = images.float().mean(1)
        assert np.corrcoef(depth.flatten(), grey.flatten())[0, 1] > 0.95
        load_depth_model(self.folder(tmp_path, width=1024), torch.device("cpu"))
        assert "not the Small network" in "".join(capsys.readouterr())
        (tmp_path / "broken").touch()
        with pytest.raises(CheckpointError, match="no weights"):
            load_depth_model(tmp_path, torch.device("cpu"))
