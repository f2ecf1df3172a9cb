"""Windows of large images, their weights, the pass over the whole image, and augmentation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import camoxpert
from camoxpert.cli import main
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference import tiles, views
from camoxpert.inference.photos import PhotoSpec
from camoxpert.inference.plan import Settings, model_digest
from camoxpert.inference.predictor import load_predictor
from camoxpert.inference.score import enlarged
from camoxpert.inference.tiles import Grid, blended, joined, line_weights, make_grid, stride
from camoxpert.inference.tta import averaged, mirrored_too, parse_tta, sides_of
from camoxpert.inference.views import ViewOptions, Views, choose_views, prepared

Network = Callable[[Tensor], Tensor]


def grey(pixels_HW: np.ndarray) -> np.ndarray:
    return np.repeat(pixels_HW.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def brightness(images_BCHW: Tensor) -> Tensor:
    """A network that returns its input."""
    return images_BCHW.float().mean(1, keepdim=True)


def run(looks: Views, image_HWC: np.ndarray) -> Tensor:
    """Return the logits that become the map of an image."""
    outputs = [looks.logits(one[None])[0] for one in looks.inputs(image_HWC)]
    grid = make_grid(image_HWC.shape[:2], looks.options.tile or 10**9, looks.options.overlap or 0)
    assert grid is not None
    return joined(grid, blended(grid, outputs[1:]), outputs[0])


class TestGrid:
    def test_by_hand(self) -> None:
        # 22 pixels, windows of 10 every 8 at most: three, 6 apart; one row, because 10 fit.
        assert make_grid((10, 22), 10, 0.2) == Grid((10, 22), (10, 10), (0,), (0, 6, 12))
        assert make_grid((4, 12), 10, 0.0) == Grid((4, 12), (4, 10), (0,), (0, 2))
        assert make_grid((10, 10), 10, 0.5) is None
        assert stride(1000, 0.9) == 100 and stride(1024, 0.25) == 768

    @pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.89])
    def test_windows_cover_the_image_evenly_and_stay_inside(self, overlap: float) -> None:
        for length in (33, 40, 63, 64, 65, 100, 257):
            grid = make_grid((length, 300), 32, overlap)
            assert grid is not None and grid.window == (32, 32)
            for starts, size in ((grid.tops, length), (grid.lefts, 300)):
                steps = np.diff(starts)
                assert starts[0] == 0 and starts[-1] + 32 == size
                assert steps.max() <= stride(32, overlap) and np.ptp(steps) <= 1 < len(starts)

    def test_crops_are_row_by_row(self) -> None:
        image = np.arange(4 * 6).reshape(4, 6, 1).astype(np.uint8)
        grid = make_grid((4, 6), 3, 0.0)
        assert grid is not None and len(grid) == 4
        assert [int(crop[0, 0, 0]) for crop in grid.crops(image)] == [0, 3, 6, 9]


class TestWeights:
    def test_by_hand(self) -> None:
        # Both pixels of a window of two are as far from its middle.
        first, second = line_weights(3, 2, (0, 1))
        assert first.tolist() == [1, 0.5] and second.tolist() == [0.5, 1]

    def test_they_add_up_to_one_and_vanish_at_the_edge_of_a_window(self) -> None:
        weights = line_weights(112, 64, (0, 48))
        total = torch.zeros(112)
        total[:64] += weights[0]
        total[48:] += weights[1]
        assert torch.allclose(total, torch.ones(112)) and total[:48].equal(torch.ones(48))
        assert 0 < weights[1][0] < 0.03 and weights[0][48:].diff().max() < 0

    def test_equal_windows_give_that_map(self) -> None:
        rng = np.random.default_rng(0)
        image = grey(rng.integers(0, 256, (50, 90)))
        grid = make_grid((50, 90), 32, 0.25)
        assert grid is not None
        found = [brightness(prepared(crop, 32)[None])[0] for crop in grid.crops(image)]
        assert torch.allclose(blended(grid, found), torch.from_numpy(image[..., 0]).float())

    def test_a_field_that_is_constant_stays_constant(self) -> None:
        looks = Views(choose_views(64, 0.4), side=32, logits=brightness)
        found = run(looks, grey(np.full((150, 101), 77)))
        assert torch.allclose(found, torch.full((150, 101), 77.0), atol=1e-4)


def by_contrast(images_BCHW: Tensor) -> Tensor:
    """A network that judges brightness within what it sees, so that windows disagree."""
    x = brightness(images_BCHW)
    return 3 * (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)


def uniform(length: int, window: int, starts: Sequence[int]) -> list[Tensor]:
    number = np.zeros(length)
    for start in starts:
        number[start : start + window] += 1
    return [torch.from_numpy(1 / number[start : start + window]).float() for start in starts]


def steps_at_borders(looks: Views, seeds: int = 6) -> float:
    """Return the mean step between neighbours at the borders of windows, relative to elsewhere."""
    found = np.zeros((2, 2))
    for seed in range(seeds):
        noise = np.random.default_rng(seed).normal(0, 1, (240, 280))
        smooth = cv2.GaussianBlur(noise, (0, 0), 6)
        image = grey(128 + 40 * smooth / smooth.std())
        logits = run(looks, image)
        grid = make_grid(image.shape[:2], 64, looks.options.overlap or 0)
        assert grid is not None
        for axis, starts in enumerate((grid.tops, grid.lefts)):
            steps = logits.diff(dim=axis).abs().mean(1 - axis).numpy()
            border = np.zeros(len(steps), bool)
            border[[start - 1 for start in starts[1:]]] = True
            border[[start + 63 for start in starts[:-1]]] = True
            found += [
                [steps[border].sum(), border.sum()], [steps[~border].sum(), (~border).sum()]
            ]  # fmt: skip
    at_borders, elsewhere = found[:, 0] / found[:, 1]
    return float(at_borders / elsewhere)


class TestSeams:
    @pytest.mark.parametrize("overlap", [0.25, 0.5])
    def test_borders_of_tiles_cannot_be_seen(self, overlap: float) -> None:
        looks = Views(choose_views(64, overlap), side=32, logits=by_contrast)
        assert steps_at_borders(looks) <= 1.05

    def test_the_measure_sees_the_seams_of_equal_weights(self, monkeypatch) -> None:
        monkeypatch.setattr(tiles, "line_weights", uniform)
        looks = Views(choose_views(64, 0.25), side=32, logits=by_contrast)
        assert steps_at_borders(looks, 2) > 1.5


def what_differs(images_BCHW: Tensor) -> Tensor:
    """A network for which an object is what differs from most of what it sees."""
    x = brightness(images_BCHW)
    usual = x.flatten(1).median(1).values[:, None, None, None]
    return 8 * torch.tanh(((x - usual).abs() - 20) / 8)


class TestWholeImage:
    """Objects of two kinds: large ones that fill windows, small ones that shrinking erases."""

    def scene(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        large, small = np.zeros((2, 512, 512), bool)
        large[64:320, 64:320] = True
        for row, column in rng.integers((390, 8), (500, 500), (12, 2)):
            small[row : row + 4, column : column + 4] = True
        pixels = rng.normal(128, 3, (512, 512))
        return grey(pixels + 60 * (large | small)), large, small

    def scores(self, logits: Tensor, large: np.ndarray, small: np.ndarray) -> tuple[float, float]:
        mask, low = (logits > 0).numpy(), np.arange(512)[:, None] > 360
        pairs = ((mask & ~low, large), (mask & low, small))
        one, other = (float((m & t).sum() / (m | t).sum()) for m, t in pairs)
        return one, other

    def test_large_and_small_objects_are_found(self) -> None:
        image, large, small = self.scene()
        looks = Views(choose_views(128), side=64, logits=what_differs)
        outputs = [looks.logits(one[None])[0] for one in looks.inputs(image)]
        grid = make_grid((512, 512), 128, 0.25)
        assert grid is not None
        tiled = blended(grid, outputs[1:])
        whole = tiles._resized(outputs[0], (512, 512))
        # Each alone misses one kind, and a mean of both loses most of the small ones.
        one, other = self.scores(tiled, large, small)
        assert one < 0.5 and other > 0.7
        one, other = self.scores(whole, large, small)
        assert one > 0.95 and other == 0
        assert self.scores((tiled + whole) / 2, large, small)[1] < 0.4
        found = self.scores(joined(grid, tiled, outputs[0]), large, small)
        assert found[0] > 0.95 and found[1] > 0.7

    def test_by_hand(self) -> None:
        grid = make_grid((64, 96), 32, 0.25)
        assert grid is not None
        whole = torch.full((1, 32, 32), 2.0)
        # Where both agree nothing changes; a difference that is the same everywhere is made up.
        detail = torch.full((64, 96), 2.0)
        assert torch.allclose(joined(grid, detail.clone(), whole), detail)
        assert torch.allclose(joined(grid, torch.zeros(64, 96), whole), detail)

    def test_what_tiles_see_finer_than_a_window_is_kept(self) -> None:
        grid = make_grid((128, 128), 64, 0.25)
        assert grid is not None
        none = torch.full((1, 32, 32), -5.0)
        for sure, kept in ((5.0, True), (2.5, True), (1.5, False)):
            dot = torch.full((128, 128), -5.0)
            dot[60:66, 60:66] = sure
            found = joined(grid, dot.clone(), none)
            # Three quarters of the tiles, one of the whole image; the mean hardly changes.
            assert torch.allclose(found, 0.75 * dot - 1.25, atol=0.2)
            assert bool((found > 0).any()) == kept and (not kept or torch.equal(found > 0, dot > 0))


class TestAugmentation:
    def test_words(self) -> None:
        assert parse_tta(None) == parse_tta("") == ()
        assert parse_tta("scales, flip") == ("flip", "scales") == parse_tta("flip,scales,flip")
        with pytest.raises(ConfigError, match=r"'flips' is unknown\. Did you mean flip"):
            parse_tta("scales,flips")

    def test_sides(self) -> None:
        assert sides_of(352, ("flip",)) == (352,)
        assert sides_of(352, ("scales",)) == (256, 352, 448)
        assert sides_of(64, ("scales",)) == (32, 64, 96)
        assert sides_of(32, ("scales",)) == (32, 64)

    def test_a_mirrored_image_has_the_mirrored_result(self) -> None:
        weight = torch.randn(1, 3, 3, 3, generator=torch.Generator().manual_seed(0))

        def network(x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(x.float(), weight, padding=1)

        images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1))
        found = mirrored_too(network, images)
        assert torch.equal(mirrored_too(network, images.flip(-1)).flip(-1), found)
        assert not torch.equal(network(images.flip(-1)).flip(-1), network(images))
        # A network that mirrors well has the same logits, to the last bit.
        assert torch.equal(mirrored_too(brightness, images), brightness(images))

    def test_means_by_hand(self) -> None:
        small, large = torch.full((1, 1, 1), 4.0), torch.tensor([[[0.0, 2], [4, 6]]])
        assert averaged([small, large]).tolist() == [[[2, 3], [4, 5]]]
        assert averaged([small]) is small

    def test_every_part_is_seen_at_every_size(self) -> None:
        looks = Views(choose_views(64, 0, "flip,scales"), side=64, logits=brightness)
        inputs = looks.inputs(grey(np.full((64, 128), 9)))
        assert [one.shape[-1] for one in inputs] == [32, 64, 96] * 3
        outputs = [looks.logits(one[None])[0] for one in inputs]
        expected = torch.full((64, 128), 9.0).sigmoid()
        assert torch.allclose(looks.probability(outputs, (64, 128)), expected)

    def test_the_cost_is_said(self, capsys) -> None:
        Views(choose_views(1024, tta="flip,scales"), side=352, logits=brightness).decide()
        said = capsys.readouterr().out
        # 5 x 4 windows and the whole; 2 x (256^2 + 352^2 + 448^2) / 352^2.
        assert "126 forward passes for 4000 x 3000 pixels" in said
        assert "mirrored, at 256, 352, 448 px: 6 forward passes instead of 1, 6.3 times" in said
        Views(ViewOptions(), side=352, logits=brightness).decide()
        assert capsys.readouterr().out == ""


class TestViews:
    def test_an_image_not_larger_than_a_tile_is_one_input(self) -> None:
        image = grey(np.random.default_rng(0).integers(0, 256, (64, 50)))
        looks = Views(choose_views(64), side=32, logits=by_contrast)
        (only,) = looks.inputs(image)
        assert torch.equal(only, prepared(image, 32))
        logits = by_contrast(only[None])[0]
        assert torch.equal(looks.probability([logits], (64, 50)), enlarged(logits, (64, 50)))

    def test_ranges(self) -> None:
        assert choose_views() == ViewOptions(None, None, None)
        assert choose_views(64, tta="scales,flip") == ViewOptions(64, 0.25, "flip,scales")
        for overlap in (-0.1, 0.9, 2):
            with pytest.raises(ConfigError, match=r"--overlap must be at least 0"):
                choose_views(64, overlap)
        with pytest.raises(ConfigError, match="--overlap must be a number; got nan"):
            choose_views(64, float("nan"))
        with pytest.raises(ConfigError, match="give both"):
            choose_views(overlap=0.5)
        for tile in (-1, 0, 63):
            with pytest.raises(ConfigError, match=f"64 px; {tile} is not"):
                Views(choose_views(tile), side=64, logits=brightness)

    def test_a_large_photo_takes_little_memory(self) -> None:
        looks = Views(choose_views(1024), side=352, logits=brightness)
        image = np.zeros((3000, 4000, 3), np.uint8)
        inputs = looks.inputs(image)
        assert len(inputs) == 21
        held = looks.held_bytes(inputs, (3000, 4000))
        # Inputs of one byte and logits of four; the map and the context added to it.
        assert held == 21 * 352**2 * (3 + 4) + 2 * 4 * image[..., 0].size
        assert held + image.nbytes < 200e6

    def test_too_many_tiles_are_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(views, "MOST_BYTES", 10_000)
        looks = Views(choose_views(32, 0.5), side=32, logits=brightness)
        with pytest.raises(DataError, match="96 x 64 pixels makes 15 tiles"):
            looks.inputs(grey(np.zeros((64, 96))))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of photos, of which two are larger than 64 pixels."""
    folder = tmp_path / "photos"
    (folder / "small").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"a": (80, 100), "b": (64, 64), "c": (30, 130), "small/d": (64, 41), "small/e": (9, 9)}
    for name, size in sizes.items():
        noise = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), size[::-1])
        cv2.imwrite(str(folder / f"{name}.png"), noise)
    return folder


def pictures(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.suffix in (".png", ".jpg")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


TILED = ("--tile", "64", "--overlap", "0.5", "--tta", "scales,flip")


class TestPredict:
    def test_photos_not_larger_than_a_tile_are_untouched(
        self, tiny_run: Path, photos: Path, tmp_path: Path
    ) -> None:
        """Bit for bit where the batches are the same, and always with one input at a time."""
        for folder, size in ((photos / "small", "8"), (photos, "1")):
            plain, tiled = tmp_path / f"plain-{size}", tmp_path / f"tiled-{size}"
            words = ["predict", str(tiny_run), str(folder), "--save", "map", "--batch-size", size]
            assert main([*words, "-o", str(plain)]) == 0
            assert main([*words, "-o", str(tiled), *TILED[:4]]) == 0
            before, after = pictures(plain), pictures(tiled)
            larger = {"maps/a.png", "maps/c.png"} & before.keys()
            assert {name for name in before if before[name] != after[name]} == larger

    def test_the_api_gives_the_same_bytes(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        words = ["predict", str(tiny_run), str(photos), "-o", str(tmp_path / "cli")]
        assert main([*words, *TILED]) == 0
        assert "tiles" in capsys.readouterr().out
        model = camoxpert.load(tiny_run, device="cpu")
        for found in model.stream(photos, tile=64, overlap=0.5, tta="flip,scales"):
            found.save(tmp_path / "api")
        assert pictures(tmp_path / "api") == pictures(tmp_path / "cli")
        settings = json.loads((tmp_path / "cli" / "predict.json").read_text())["settings"]
        assert (settings["tile"], settings["overlap"], settings["tta"]) == (64, 0.5, "flip,scales")
        image = photos / "a.png"
        single = model.predict(image, tile=64)
        assert single.size == (80, 100)
        for other in (model.predict(image), model.predict(image, tile=64, tta="flip")):
            assert np.abs(single.probability_HW - other.probability_HW).max() > 1e-6
        (listed,) = model.predict([image], tile=64)
        assert np.array_equal(single.probability_HW, listed.probability_HW)

    def test_worker_processes_get_the_settings(self, tiny_run: Path, tmp_path: Path) -> None:
        predictor = load_predictor(tiny_run)
        chosen = choose_views(64, 0.5, "flip")
        spec = PhotoSpec(
            checkpoint=str(predictor.checkpoint.path), model=model_digest(predictor.checkpoint),
            precision="fp32", max_pixels=10**6, output=str(tmp_path), kinds=("map",),
            threshold=0.5, views=chosen,
        )  # fmt: skip
        assert spec.build("cpu").views.options == chosen

    def test_the_largest_input_is_measured(self, tiny_run: Path, tmp_path: Path) -> None:
        """The batch size is chosen by memory."""
        predictor = load_predictor(tiny_run)
        stages = camoxpert.inference.photos.PhotoStages(
            predictor, tmp_path, ("map",), 0.5, choose_views(tta="scales")
        )
        assert stages.example().shape == (1, 3, 64, 64)

    def test_results_of_other_tiles_are_refused(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        words = ["predict", str(tiny_run), str(photos), "-o", str(out), "--save", "map"]
        assert main(words) == 0
        before = pictures(out)
        assert main([*words, *TILED]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "--tile off, now 64; --overlap off, now 0.5; --tta off, now flip,scales" in said
        assert pictures(out) == before
        assert main([*words, *TILED, "--overwrite"]) == 0
        assert pictures(out) != before
        assert main([*words, *TILED[:3], "0.25", *TILED[4:]]) == 2
        assert "--overlap 0.5, now 0.25" in " ".join(capsys.readouterr().err.split())
        assert main([*words, *TILED[:4], "--tta", "flip,scales"]) == 0
        assert "5 were there already" in capsys.readouterr().out

    def test_results_of_a_version_without_tiles_are_kept(self) -> None:
        old = {"model": "m", "checkpoint": "c", "img_size": 32, "precision": "fp32"}
        now = Settings(**old, threshold=0.5)
        assert now.differences(old | {"threshold": 0.5}) == []

    @pytest.mark.parametrize(
        ("more", "text"),
        [
            (("--tile", "16"), "--tile must be at least the side of the network's input, 32 px"),
            (("--tile", "-5"), "-5 is not"),
            (("--tile", "64", "--overlap", "0.9"), "less than 0.9; 0.9 is not"),
            (("--overlap", "0.5"), "give both"),
            (("--tta", "scale"), "Did you mean scales?"),
        ],
    )
    def test_mistakes_are_said_before_anything_is_written(
        self, tiny_run: Path, photos: Path, tmp_path: Path, capsys, more: tuple[str, ...], text: str
    ) -> None:
        out = tmp_path / "out"
        assert main(["predict", str(tiny_run), str(photos), "-o", str(out), *more]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
        assert not out.exists()

    def test_a_network_for_one_size_is_named(self, tiny_run: Path, monkeypatch) -> None:
        predictor = load_predictor(tiny_run)
        monkeypatch.setattr("camoxpert.inference.predictor.BACKBONES", {})
        logits = type(predictor).logits

        def refuses(self: object, images: Tensor) -> Tensor:
            if images.shape[-1] != 32:
                raise AssertionError("built for 32\nand more")
            return logits(self, images)

        monkeypatch.setattr(type(predictor), "logits", refuses)
        with pytest.raises(ConfigError, match=r"64 px after .* \(built for 32\)\. Use --tta flip"):
            predictor.views(choose_views(tta="flip,scales"))
        predictor.views(choose_views(tta="flip"))
