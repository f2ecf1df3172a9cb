"""Videos: order, times, damage, smoothing, stops; clips of 64 px that PyAV writes itself."""

from __future__ import annotations

import csv
import json
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from camoxpert.cli import main
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.frames import BadVideo, FrameChunks, VideoFile, load_av, smoothing_weight
from camoxpert.inference.ledger import LEDGER
from camoxpert.inference.products import TABLE
from camoxpert.inference.sources import Photo, find_photos, look_for_photos
from camoxpert.inference.video import FrameStages, VideoOptions, VideoRun

av = pytest.importorskip("av", reason='pip install "camoxpert[video]"')
LIMIT = 10**6


def write_clip(
    path: Path, frames: int = 20, *, size: tuple[int, int] = (64, 64), gap: int = 0, **options: str
) -> Path:
    """Write a clip whose n-th frame has the grey value 10 n; ``gap`` ticks more after the 10th."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        codec = {".avi": "mpeg4"}.get(path.suffix, "libx264")
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for n in range(frames):
            pixels = np.full((*size, 3), 10 * n, np.uint8)
            pixels[:8, :8] = np.random.default_rng(n).integers(0, 255, (8, 8, 3))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = n + gap * (n >= 10), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def numbers(path: Path, every: int = 1) -> list[int]:
    file = VideoFile(path, max_pixels=LIMIT)
    try:
        return [frame.number for frame in file.frames("clip", every)]
    finally:
        file.close()


class GreyModel:
    """Logits are the mean grey value in 0..1, minus 0.5, times 8."""

    has_presence = False

    def __init__(self) -> None:
        self.device, self.img_size, self.max_pixels = torch.device("cpu"), 16, LIMIT
        self.passes: list[int] = []

    def prepare(self, image_HWC: np.ndarray) -> Tensor:
        return torch.from_numpy(cv2.resize(image_HWC, (16, 16)).transpose(2, 0, 1).copy())

    def look(self, images: Tensor) -> Tensor:
        self.passes.append(len(images))
        return 8 * (images.float().mean(1, keepdim=True)[..., 12:, 12:] / 255 - 0.5)


def predict(clip: Path, out: Path, *kinds: str, name: str = "clip", size: int = 4, **options):
    run = VideoRun(GreyModel(), out, kinds, 0.5, VideoOptions(**options), batch_size=size)
    (row,) = run.rows([Photo(clip, name)])
    return row


def times(out: Path, name: str = "clip") -> list[dict[str, str]]:
    with (out / "timestamps" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def frame_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_frame_has_its_picture_and_its_time(tmp_path: Path) -> None:
    row = predict(write_clip(tmp_path / "c.mp4", gap=5), tmp_path, "mask", "overlay")
    assert (
        row["status"] == "ok"
        and row["pictures"] == 20
        and (row["height"], row["width"]) == (64, 64)
    )
    names = [f"{n:06d}" for n in range(1, 21)]
    assert frame_names(tmp_path / "masks" / "clip") == [f"{n}.png" for n in names]
    assert frame_names(tmp_path / "overlays" / "clip") == [f"{n}.jpg" for n in names]
    seconds = [float(line["seconds"]) for line in times(tmp_path)]
    assert seconds == pytest.approx([(n + 5 * (n >= 10)) / 10 for n in range(20)])
    # Frames brighter than the middle are object: 10 n > 127.5.
    fractions = [float(line["object_fraction"]) for line in times(tmp_path)]
    assert [fraction > 0.5 for fraction in fractions] == [n >= 13 for n in range(20)]


def test_every_nth_frame_keeps_its_number(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mkv")
    assert predict(clip, tmp_path, "mask", every=7)["pictures"] == 3
    assert [line["frame"] for line in times(tmp_path)] == ["1", "8", "15"]
    assert frame_names(tmp_path / "masks" / "clip") == ["000001.png", "000008.png", "000015.png"]


@pytest.mark.parametrize(("every", "shows"), [(1, "mask"), (3, "overlay")])
def test_a_video_has_as_many_frames_as_were_predicted(
    tmp_path: Path, every: int, shows: str
) -> None:
    clip = write_clip(tmp_path / "c.mp4", size=(64, 66), gap=5)
    row = predict(clip, tmp_path, "video", every=every, shows=shows)
    assert row["shows"] == shows and not (tmp_path / "masks").exists()
    written = tmp_path / "videos" / "clip.mp4"
    assert len(numbers(written)) == row["pictures"] == len(range(0, 20, every))
    file = VideoFile(written, max_pixels=LIMIT)
    frames = list(file.frames("x", 1))
    file.close()
    assert [f.seconds for f in frames] == pytest.approx(
        [float(t["seconds"]) for t in times(tmp_path)]
    )
    if shows == "mask":
        white = [bool(frame.pixels()[32, 32].mean() > 127) for frame in frames]
        assert white == [n >= 13 for n in range(20)]
    # The same bytes again.
    before = written.read_bytes()
    predict(clip, tmp_path, "video", every=every, shows=shows)
    assert written.read_bytes() == before
    assert frame_names(tmp_path / "videos") == ["clip.mp4"]


@pytest.mark.parametrize("name", ["c.mp4", "c.mkv", "c.avi"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_video_is_a_row_and_its_frames_do_not_count(
    tmp_path: Path, name: str, share: float
) -> None:
    options = {"movflags": "faststart"} if name == "c.mp4" else {}
    clip = write_clip(tmp_path / name, **options)
    assert numbers(clip) == list(range(1, 21)), "the control"
    row = predict(cut(clip, share), tmp_path, "mask", "video", size=2)
    assert row["status"] == "failed" and str(clip) in row["reason"]
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != clip]
    assert left == []


def test_a_damaged_video_is_a_row(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mkv")
    data = bytearray(clip.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 150] = np.random.default_rng(0).integers(0, 255, 150, np.uint8).tobytes()
    clip.write_bytes(data)
    assert "damaged or truncated" in predict(clip, tmp_path, "mask")["reason"]


@pytest.mark.parametrize("content", [b"", b"not a video"])
def test_what_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.mp4").write_bytes(content)
    assert "cannot be read as a video" in predict(tmp_path / "c.mp4", tmp_path, "mask")["reason"]
    assert "No such file" in predict(tmp_path / "gone.mp4", tmp_path, "mask")["reason"]
    with pytest.raises(BadVideo, match="over the limit of 100"):
        VideoFile(write_clip(tmp_path / "d.mp4", 2), max_pixels=100)


def test_chunks_are_full_whatever_the_pace_and_memory_is_bounded(tmp_path: Path) -> None:
    file = VideoFile(write_clip(tmp_path / "c.mp4"), max_pixels=LIMIT)
    decoded = []

    def frames():
        for frame in file.frames("c", 1):
            decoded.append(frame.number)
            yield frame

    chunks = FrameChunks(frames(), 3)
    taken = [chunks.take(wait=True)]
    # One with the reader, two that wait, one that is being collected.
    assert max(decoded) <= 12
    while (chunk := chunks.take(wait=True)) is not None:
        taken.append(chunk)
    assert [len(chunk.items) for chunk in taken] == [3] * 6 + [2]
    assert chunks.take(wait=False) is None
    chunks.close()
    file.close()
    left = FrameChunks(iter([]), 3)
    left.close()


@pytest.mark.parametrize("size", [1, 3, 20])
def test_smoothing_is_the_average_over_time_whatever_the_batches(tmp_path: Path, size: int) -> None:
    options = VideoOptions(smooth=0.75)
    stages = FrameStages(GreyModel(), tmp_path, ["mask"], 0.5, options)
    values = torch.rand(20) * 255
    images = values.to(torch.uint8)[:, None, None, None].expand(20, 3, 16, 16)
    plain = GreyModel().look(images)
    for _ in range(2):
        # A second video begins without the past of the first.
        stages.restart()
        found = torch.cat([stages.forward(part) for part in images.split(size)])
    wanted = [plain[0]]
    for one in plain[1:]:
        wanted.append(0.75 * wanted[-1] + 0.25 * one)
    assert torch.allclose(found, torch.stack(wanted), atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_smoothing_delays_what_appears(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "c.mp4")
    predict(clip, tmp_path, "mask", smooth=0.5)
    seen = [line["frame"] for line in times(tmp_path) if float(line["object_fraction"]) > 0.5]
    assert seen[0] in ("15", "16")
    for value in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="below 1"):
            smoothing_weight(value)


def test_a_video_that_was_interrupted_begins_again(tmp_path: Path, monkeypatch) -> None:
    clip, kinds = write_clip(tmp_path / "c.mp4"), ("mask", "video")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    predict(clip, whole, *kinds, smooth=0.5)
    honest = FrameStages.finish

    def full(self, frame, sample, outputs):
        if frame.number == 9:
            raise DataError("No space left on device.")
        return honest(self, frame, sample, outputs)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="No space left"):
        patch.setattr(FrameStages, "finish", full)
        predict(clip, parts, *kinds, smooth=0.5)
    assert len(frame_names(parts / "masks" / "clip")) >= 4
    assert frame_names(parts / "timestamps") == frame_names(parts / "videos") == []
    predict(clip, parts, *kinds, smooth=0.5)
    trees = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (whole, parts)
    ]
    assert trees[0] == trees[1] and len(trees[0]) == 22


def test_an_encoder_that_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("camoxpert.inference.frames.CODEC", "no_such_codec")
    with pytest.raises(ConfigError, match="no encoder no_such_codec"):
        predict(write_clip(tmp_path / "c.mp4"), tmp_path, "video")
    assert frame_names(tmp_path / "videos") == []


def test_names_of_videos_and_of_the_folders_beside_them(tmp_path: Path) -> None:
    write_clip(tmp_path / "in" / "clip.mp4", 2)
    (tmp_path / "in" / "clip").mkdir()
    for name in ("clip/000001.jpg", "a.jpg"):
        cv2.imwrite(str(tmp_path / "in" / name), np.zeros((8, 8, 3), np.uint8))
    found = look_for_photos([str(tmp_path / "in" / "**" / "*.*")])
    assert [photo.name for photo in found.photos] == ["a", "clip/000001"]
    assert [video.name for video in found.videos] == ["clip.mp4"]
    # A folder is searched for images alone, and says so.
    inside = look_for_photos([str(tmp_path / "in")])
    assert not inside.videos and ".mp4 1" in inside.notes[0]
    with pytest.raises(DataError, match="is a video"):
        find_photos([str(tmp_path / "in" / "clip.mp4")])


def test_without_av(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r'pip install "camoxpert\[video\]"'):
        load_av()


def test_a_frame_is_turned_upright() -> None:
    from camoxpert.inference.frames import Frame

    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    picture = SimpleNamespace(to_ndarray=lambda format: pixels, rotation=90)
    assert np.array_equal(Frame("x", 1, 0, 0.0, picture).pixels(), np.rot90(pixels))


def test_the_command_repeats_whole_videos_only(tiny_run: Path, tmp_path: Path, capsys) -> None:
    good, bad = write_clip(tmp_path / "good.mp4"), cut(write_clip(tmp_path / "bad.avi"), 0.5)
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((20, 20, 3), np.uint8))
    out = tmp_path / "out"
    inputs = [str(path) for path in (tmp_path / "photo.png", good, bad)]
    words = ["predict", str(tiny_run), *inputs, "-o", str(out), "--save", "mask", "coco"]
    assert main(words) == 3
    captured = capsys.readouterr()
    assert "2 inputs predicted" in captured.out and "bad.avi" in captured.err
    assert "videos get no coco" in captured.err
    rows = [json.loads(line) for line in (out / LEDGER).read_text().splitlines()]
    assert [(r["item"], r["status"]) for r in rows if "item" in r] == [
        ("photo", "ok"), ("good", "ok"), ("bad", "failed"),
    ]  # fmt: skip
    assert (out / TABLE).read_text().splitlines()[2].startswith("good,64,64,")
    table = (out / "timestamps" / "good.csv").read_bytes()
    # What is there counts; a picture that is gone brings the video back from its first frame.
    one = ["predict", str(tiny_run), str(good), "-o", str(out), "--save", "mask"]
    assert main(one) == 0
    assert "0 inputs predicted, 1 were there already" in capsys.readouterr().out
    (out / "masks" / "good" / "000007.png").unlink()
    (out / "masks" / "good" / "000021.png").write_bytes(b"of a longer video")
    assert main(one) == 0
    assert "1 inputs predicted" in capsys.readouterr().out
    assert len(frame_names(out / "masks" / "good")) == 20
    assert (out / "timestamps" / "good.csv").read_bytes() == table
    assert main([*one, "--smooth", "0.5"]) == 2
    assert "--smooth 0.0, now 0.5" in " ".join(capsys.readouterr().err.split())
    assert main([*one, "--smooth", "0.5", "--overwrite"]) == 0
    assert main([*one, "--devices", "cpu,cpu"]) == 2
    assert "in one process" in " ".join(capsys.readouterr().err.split())
    assert main(["predict", str(tiny_run), inputs[0], "-o", str(out), "--every", "2"]) == 2
