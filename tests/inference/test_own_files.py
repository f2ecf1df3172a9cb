"""``predict`` beside the user's own files: none is replaced, and nothing is lost between calls."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.printed import complained

import camoxpert
from camoxpert.cli import main
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.errors import DataError
from camoxpert.inference.annotations import COCO
from camoxpert.inference.local import LocalEngine

Predict = Callable[..., int]


@pytest.fixture
def photos(toy_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_data / "TestDataset" / "toy" / "Imgs", tmp_path / "photos"))


@pytest.fixture
def predict(tiny_run: Path) -> Predict:
    def call(*words: str | Path) -> int:
        return main(["predict", str(tiny_run), *map(str, words)])

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir())


class TestPhotos:
    def test_masks_of_the_user_are_kept_whatever_was_written_before(
        self, predict: Predict, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        mine = out / "masks" / f"{names(photos)[0]}.png"
        write_png(mine, np.full((9, 9), 255, np.uint8))
        before = mine.read_bytes()
        assert predict(photos, "-o", out) == 2
        assert predict(photos, "-o", out, "--save", "map") == 0
        assert predict(photos, "-o", out) == 2
        assert "is there already, and no predictions.jsonl" in complained(capsys)
        assert predict(photos, "-o", out, "--save", "mask") == 2
        assert mine.read_bytes() == before
        assert predict(photos, "-o", out, "--save", "map") == 0, "what is known is no obstacle"
        mine.unlink()
        assert predict(photos, "-o", out) == 0
        assert predict(photos, "-o", out, "--save", "mask") == 0

    @pytest.mark.parametrize("more", [(), ("--overwrite",)])
    def test_an_input_is_not_written_over(
        self, predict: Predict, photos: Path, tmp_path: Path, capsys, more: tuple[str, ...]
    ) -> None:
        out = tmp_path / "out"
        assert predict(photos, "-o", out, "--save", "map") == 0
        image = out / "maps" / "mine.png"
        write_png(image, np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
        before = image.read_bytes()
        assert predict(image, "-o", out, "--save", "map", *more) in (2, 3)
        capsys.readouterr()
        own = Path(shutil.copy(image, out / "maps" / "own.png"))
        assert predict(own, "-o", out, "--save", "map", *more) != 0
        assert image.read_bytes() == own.read_bytes() == before

    def test_a_photo_that_is_damaged_later_is_tried_again(
        self, predict: Predict, photos: Path, tmp_path: Path
    ) -> None:
        """Its pictures of before are there, and its row says that it failed."""
        out = tmp_path / "out"
        first = min(photos.iterdir())
        whole = first.read_bytes()
        assert predict(photos, "-o", out) == 0
        first.write_bytes(whole[:200])
        for _ in range(3):
            assert predict(photos, "-o", out) == 3
        first.write_bytes(whole)
        assert predict(photos, "-o", out) == 0

    def test_a_side_too_long_for_a_jpeg_is_one_row(
        self, predict: Predict, photos: Path, tmp_path: Path, capsys
    ) -> None:
        write_png(photos / "long.png", np.zeros((20, 66_000), np.uint8))
        assert predict(photos, "-o", tmp_path / "out") == 3
        said = complained(capsys)
        assert "long.png" in said and "Leave overlay out" in said
        assert len(names(tmp_path / "out" / "masks")) == len(names(photos)) - 1
        assert predict(photos, "-o", tmp_path / "b", "--save", "map", "mask") == 0


class TestParts:
    def test_what_is_left_is_done_whenever_the_parts_begin(
        self, predict: Predict, photos: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"

        def parts(*more: str) -> None:
            for part in ("1/2", "2/2"):
                assert predict(photos, "-o", out, "--shard", part, *more) == 0
            assert main(["predict", "--merge", "-o", str(out)]) == 0

        parts()
        shutil.rmtree(out / "masks")
        parts()
        assert names(out / "masks") == names(photos)
        mask = next((out / "masks").iterdir())
        mask.write_bytes(b"no")
        parts("--overwrite")
        assert mask.read_bytes() != b"no"

    def test_a_limited_part_is_not_merged(
        self, predict: Predict, photos: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        assert predict(photos, "-o", out, "--shard", "1/1", "--limit", "1") == 0
        assert main(["predict", "--merge", "-o", str(out)]) == 3
        assert "not finished" in complained(capsys)
        assert predict(photos, "-o", out, "--shard", "1/1") == 0
        assert main(["predict", "--merge", "-o", str(out)]) == 0


class TestCoco:
    def test_a_stopped_call_does_not_lose_it(
        self, predict: Predict, photos: Path, tmp_path: Path, monkeypatch
    ) -> None:
        out = tmp_path / "out"
        assert predict(photos, "-o", out, "--save", "coco") == 0
        whole = json.loads((out / COCO).read_text())
        with monkeypatch.context() as patch:

            def stopped(*_: object) -> None:
                raise camoxpert.CamoXpertError("stopped")

            patch.setattr(LocalEngine, "results", stopped)
            assert predict(photos, "-o", out, "--save", "mask") != 0
        assert predict(photos, "-o", out, "--save", "mask") == 0
        assert json.loads((out / COCO).read_text())["images"] == whole["images"]

    def test_parts_leave_it_to_the_merge(
        self, predict: Predict, photos: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert predict(photos, "-o", out, "--save", "coco") == 0
        before = (out / COCO).read_bytes()
        for number in range(2):
            shutil.copy(next(photos.iterdir()), photos / f"new{number}.jpg")
        for part in ("1/2", "2/2"):
            assert predict(photos, "-o", out, "--save", "coco", "--shard", part) == 0
            assert (out / COCO).read_bytes() == before
        assert main(["predict", "--merge", "-o", str(out)]) == 0
        assert len(json.loads((out / COCO).read_text())["images"]) == len(names(photos))


def test_the_api_takes_a_home_and_refuses_videos(
    tiny_run: Path, photos: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = camoxpert.load(tiny_run)
    image = next(photos.iterdir())
    assert (
        model.predict(f"~/photos/{image.name}").probability_HW
        == model.predict(image).probability_HW
    ).all()
    (tmp_path / "clip.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match="is a video"):
        camoxpert.predict_folder(model, [tmp_path / "clip.mp4", photos], tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestVideos:
    @pytest.fixture
    def clip(self, tmp_path: Path) -> Path:
        pytest.importorskip("av", reason='pip install "camoxpert[video]"')
        from inference.test_video import write_clip

        return write_clip(tmp_path / "data" / "videos" / "clip.mp4", frames=3)

    def test_the_input_is_not_written_over(self, predict: Predict, clip: Path, capsys) -> None:
        before = clip.read_bytes()
        for more in ((), ("--overwrite",)):
            assert predict(clip, "-o", clip.parents[1], "--save", "video", *more) == 2
            assert "is the input" in complained(capsys)
        assert clip.read_bytes() == before

    @pytest.mark.parametrize("damaged", [False, True])
    def test_frames_of_the_user_are_neither_replaced_nor_removed(
        self, predict: Predict, clip: Path, capsys, damaged: bool
    ) -> None:
        out = clip.parents[1]
        mine = [out / "masks" / "clip" / f"{n:06d}.png" for n in (1, 9)]
        mine += [out / "timestamps" / "clip.csv"]
        for path in mine:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"mine")
        if damaged:
            clip.write_bytes(clip.read_bytes()[:900])
        before = clip.read_bytes()
        assert predict(clip, "-o", out, "--save", "map") == 2
        assert "is there already" in complained(capsys)
        assert all(path.read_bytes() == b"mine" for path in mine) and clip.read_bytes() == before

    def test_photos_are_not_put_among_frames(
        self, predict: Predict, clip: Path, tmp_path: Path, capsys
    ) -> None:
        out = tmp_path / "out"
        assert predict(clip, "-o", out, "--save", "mask") == 0
        frames = tmp_path / "frames"
        write_jpeg(frames / "clip" / "000001.jpg", np.zeros((48, 48, 3), np.uint8))
        before = (out / "masks" / "clip" / "000001.png").read_bytes()
        assert predict(frames, "-o", out, "--save", "mask") == 3
        assert "holds the frames of a video in clip/" in complained(capsys)
        assert (out / "masks" / "clip" / "000001.png").read_bytes() == before
        assert predict(clip, "-o", out, "--save", "mask") == 0

    def test_a_path_that_cannot_be_read_is_a_row(
        self, predict: Predict, clip: Path, tmp_path: Path, monkeypatch, capsys
    ) -> None:
        (tmp_path / "data" / "folder.mp4").mkdir()
        listing = "\n".join([str(tmp_path / "data" / "folder.mp4"), str(clip)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listing.encode())))
        assert predict("-", "-o", tmp_path / "out", "--save", "mask") == 3
        assert "folder.mp4" in complained(capsys)
        assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 3

    def test_videos_that_were_written_are_not_predicted_again(
        self, predict: Predict, clip: Path, capsys
    ) -> None:
        out = clip.parents[1] / "out"
        assert predict(clip, "-o", out, "--save", "video") == 0
        for _ in range(2):
            assert predict(clip.parents[1] / "**" / "*.mp4", "-o", out, "--save", "video") == 0
            # The one that was named, and the same one below the folder of the glob.
            found = {p.relative_to(out).as_posix() for p in (out / "videos").rglob("*.mp4")}
            assert found == {"videos/clip.mp4", "videos/videos/clip.mp4"}
