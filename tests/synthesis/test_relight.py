"""Relighting: what it must not change, what it must, and that it does not depend on the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from camoxpert.benchmark.relight_serial import serial_relight
from camoxpert.errors import ConfigError
from camoxpert.synthesis.relight.draw import (
    LIMITS,
    NEUTRAL,
    PATTERN_NAMES,
    Light,
    RelightSettings,
    draw_light,
)
from camoxpert.synthesis.relight.pipeline import STAGES, relight, relit_linear
from camoxpert.synthesis.toy import toy_pair

PATTERNED = RelightSettings(pattern_probability=0.7)


def pairs(count: int, size: int = 64) -> tuple[Tensor, Tensor]:
    made = [toy_pair(3, index, size=size) for index in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in made])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([mask for _, mask in made]))[:, None]
    return images.contiguous(), masks


def drawn(count: int, settings: RelightSettings = PATTERNED) -> list[Light]:
    return [draw_light(5, index, settings) for index in range(count)]


def test_neutral_light_changes_nothing() -> None:
    images, masks = pairs(3)
    # Every level, black and white among them.
    images[0] = torch.arange(64 * 64).remainder(256).to(torch.uint8).view(64, 64)
    linear = relit_linear(images, masks, [NEUTRAL] * 3)
    result = relight(images, masks, [NEUTRAL] * 3)
    assert torch.equal(result.images_B3HW, images)
    assert not result.changed_B1HW.any()
    srgb = torch.where(linear < 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert (255 * srgb - images).abs().max() < 0.05
    # The test can fail.
    assert relight(images, masks, drawn(3)).changed_B1HW.any()


def test_without_shadows_only_the_object_changes_and_masks_never_do() -> None:
    images, masks = pairs(4)
    before = masks.clone()
    lights = drawn(4)
    bare = [replace(light, shadow=0.0, pattern="") for light in lights]
    changed = relight(images, masks, bare).changed_B1HW
    assert not (changed & (masks == 0)).any()
    # Nearly all of it: a level may round to itself.
    assert (changed & (masks > 0)).sum() > 0.9 * (masks > 0).sum()
    shadowed = relight(images, masks, lights)
    assert (shadowed.changed_B1HW & (masks == 0)).any()
    assert torch.equal(masks, before)


def test_changed_says_which_pixels_differ() -> None:
    images, masks = pairs(2)
    result = relight(images, masks, drawn(2))
    differs = (result.images_B3HW != images).any(1, keepdim=True)
    assert torch.equal(result.changed_B1HW, differs)


def test_an_image_does_not_depend_on_its_batch() -> None:
    images, masks = pairs(16, size=48)
    lights = drawn(16)
    assert {light.pattern for light in lights} == {"", *PATTERN_NAMES}
    together = relit_linear(images, masks, lights)
    alone = torch.cat(
        [relit_linear(images[i : i + 1], masks[i : i + 1], lights[i : i + 1]) for i in range(16)]
    )
    assert (together - alone).abs().max() < 1e-5
    whole = relight(images, masks, lights).images_B3HW
    single = relight(images[7:8], masks[7:8], lights[7:8]).images_B3HW
    assert torch.equal(whole[7:8], single)


def test_equal_seeds_give_equal_bytes() -> None:
    images, masks = pairs(2)
    first, again = (relight(images, masks, drawn(2)).images_B3HW for _ in range(2))
    assert torch.equal(first, again)
    other = [draw_light(6, index, PATTERNED) for index in range(2)]
    assert not torch.equal(first, relight(images, masks, other).images_B3HW)


READERS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__")


def test_the_host_never_waits_for_the_device(monkeypatch) -> None:
    images, masks = pairs(2, size=32)
    lights = drawn(2)

    def read(*_: object) -> None:
        raise AssertionError("reads a value from the device")

    for name in READERS:
        monkeypatch.setattr(torch.Tensor, name, read)
    linear = relit_linear(images, masks, lights)
    with pytest.raises(AssertionError, match="reads a value"):
        bool(linear.sum() > 0)


def test_the_serial_script_gives_the_same_picture() -> None:
    # An odd size, so that cells at the border are narrower than the others.
    images, masks = pairs(3, size=97)
    lights = drawn(3)
    ours = relight(images, masks, lights).images_B3HW.permute(0, 2, 3, 1).numpy()
    for own, image, mask, light in zip(ours, images, masks, lights, strict=True):
        theirs = serial_relight(image.permute(1, 2, 0).numpy(), mask[0].numpy(), light)
        apart = np.abs(own.astype(int) - theirs)
        assert apart.mean() < 0.2 and (apart > 4).mean() < 0.01
        moved = np.abs(own.astype(int) - image.permute(1, 2, 0).numpy())
        assert moved.mean() > 5 * apart.mean()


def test_given_heights_and_albedos_are_used() -> None:
    from camoxpert.synthesis.relight.albedo import albedo
    from camoxpert.synthesis.relight.colour import to_linear
    from camoxpert.synthesis.relight.height import height_from_mask

    images, masks = pairs(2)
    lights = drawn(2)
    own = relight(images, masks, lights).images_B3HW.int()
    heights = height_from_mask((masks > 127).float())
    albedos = albedo(to_linear(images))
    same = relight(images, masks, lights, heights_B1HW=heights, albedos_B3HW=albedos)
    # The albedo alone says less about the light in black pixels.
    assert (same.images_B3HW.int() - own).abs().float().mean() < 0.1
    flat = relight(images, masks, lights, heights_B1HW=torch.zeros_like(heights)).images_B3HW
    assert (flat.int() - own).abs().float().mean() > 0.3


def test_stages_are_timed_and_nothing_else_changes() -> None:
    images, masks = pairs(2)
    seconds: dict[str, float] = {}
    timed = relight(images, masks, drawn(2), seconds=seconds).images_B3HW
    assert tuple(seconds) == STAGES and min(seconds.values()) > 0
    assert torch.equal(timed, relight(images, masks, drawn(2)).images_B3HW)


@pytest.mark.parametrize("shape", [(33, 80), (80, 33)])
def test_images_without_an_object_and_of_any_shape(shape: tuple[int, int]) -> None:
    images = torch.full((2, 3, *shape), 90, dtype=torch.uint8)
    masks = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    lights = [replace(light, pattern="") for light in drawn(2)]
    assert not relight(images, masks, lights).changed_B1HW.any()
    masks += 255
    result = relight(images, masks, drawn(2)).images_B3HW
    assert result.shape == images.shape and result.float().std() > 0


def test_wrong_shapes_are_refused() -> None:
    images, masks = pairs(2)
    for bad in ((images.float(), masks, drawn(2)), (images, masks[:, 0], drawn(2)),
                (images, masks, drawn(1))):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be|need masks"):
            relight(*bad)


class TestDraw:
    def test_is_pure_and_differs_by_seed_and_index(self) -> None:
        assert draw_light(1, 2) == draw_light(1, 2)
        assert len({draw_light(s, i) for s in range(3) for i in range(3)}) == 9
        assert draw_light(-1, 2**40) == draw_light(-1, 2**40)

    def test_goes_to_json_and_back(self) -> None:
        light = draw_light(1, 2, PATTERNED)
        assert Light.from_record(json.loads(json.dumps(light.to_record()))) == light
        assert Light.from_record({"azimuth": 90}) == NEUTRAL

    @pytest.mark.parametrize(
        ("record", "words"),
        [({"azimut": 1.0}, "Did you mean azimuth"), ({"key": "x"}, "type float"),
         ({"pattern": "blind"}, "blinds")],
    )  # fmt: skip
    def test_a_wrong_record_is_refused(self, record: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            Light.from_record(record)

    def test_stays_in_its_ranges(self) -> None:
        settings = RelightSettings()
        for index in range(200):
            light = draw_light(0, index, settings)
            for name in LIMITS:
                low, high = getattr(settings, name)
                value = getattr(light, name)
                unused = name == "pattern_strength" and not light.pattern
                assert unused or low - 1e-6 <= value <= high + 1e-6, name

    def test_one_range_changes_one_number(self) -> None:
        one = draw_light(0, 3, RelightSettings(elevation=(30, 31)))
        other = draw_light(0, 3)
        assert replace(one, elevation=other.elevation) == other and one != other

    def test_without_strength_it_changes_nothing(self) -> None:
        images, masks = pairs(2)
        lights = drawn(2, RelightSettings(strength=0.0, pattern_probability=1.0))
        assert not relight(images, masks, lights).changed_B1HW.any()

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"key": (0.8, 0.2)}, "key"),
            ({"strength": 2.0}, "strength"),
            ({"patterns": ("leafs",)}, "Did you mean leaves"),
            ({"patterns": ()}, "none is named"),
            ({"pattern_probability": -0.1}, "probability"),
            ({"shadow": (0.5,)}, "two numbers"),
        ],
    )
    def test_wrong_settings_are_refused(self, values: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            RelightSettings(**values)  # type: ignore[arg-type]


def sphere_scene() -> tuple[Tensor, Tensor]:
    """Return a grey image with a grey disc in the middle."""
    y, x = torch.meshgrid(torch.arange(96) - 47.5, torch.arange(96) - 47.5, indexing="ij")
    masks = ((x.square() + y.square()).sqrt() < 18).to(torch.uint8)[None, None] * 255
    return torch.full((1, 3, 96, 96), 120, dtype=torch.uint8), masks


@pytest.mark.parametrize("azimuth", [0.0, 90.0, 180.0, 270.0, 37.0])
def test_the_lit_side_faces_the_light_and_the_shadow_lies_behind(azimuth: float) -> None:
    images, masks = sphere_scene()
    light = Light(azimuth=azimuth, elevation=35.0, key=0.8, relief=1.0, shadow=0.9)
    result = relight(images, masks, [light]).images_B3HW[0, 0].float()
    toward = torch.tensor([math.cos(math.radians(azimuth)), -math.sin(math.radians(azimuth))])

    def at(distance: float) -> float:
        x, y = (47.5 + distance * toward).round().int().tolist()
        return float(result[y, x])

    assert at(13) > 130 > 110 > at(-13)
    assert at(-22) < 100 and at(22) == 120


def luminance_of(lights: Sequence[Light]) -> Tensor:
    images, masks = sphere_scene()
    # Grey images stay grey in any light.
    images[:, 2] = 110
    count = len(lights)
    linear = relit_linear(images.expand(count, -1, -1, -1), masks.expand(count, -1, -1, -1), lights)
    return linear[..., 47, 47]


def test_warm_light_is_warm_and_exposure_counts_in_stops() -> None:
    base = Light(key=0.6, elevation=80.0)
    lights = [base, replace(base, temperature=4000.0), replace(base, exposure=-1.0)]
    plain, warm, dark = luminance_of(lights)
    assert warm[0] / warm[2] > 1.15 * plain[0] / plain[2]
    assert torch.allclose(dark, plain / 2, rtol=1e-4)
