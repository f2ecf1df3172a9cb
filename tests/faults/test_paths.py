"""Paths in untrusted tables and symlinks in results folders: nothing is read or written outside;
pictures that claim to be huge are not decoded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.maps import evaluate, write
from helpers.pages import active_parts

from camoxpert.cli import main
from camoxpert.config import Config, to_dict
from camoxpert.errors import DataError
from camoxpert.files import append_here, leads_outside, read_jsonl
from camoxpert.inference.prediction import PICTURES, output_path
from camoxpert.inference.sources import find_photos
from camoxpert.runs.checkpoint import FORMAT
from camoxpert.runs.log import RunLog
from camoxpert.runs.store import CheckpointFolder

ROOT = Path(__file__).parents[2]
OUTSIDE = ("../secret/{}", "{absolute}", "link.{end}", "folder/{}", "in/../../secret/{}")


@pytest.fixture
def place(toy_data: Path, tmp_path: Path) -> Path:
    """Return a folder with one pair, symlinks that lead out of it, and a pair outside."""
    test = toy_data / "TestDataset" / "toy"
    image, mask = sorted((test / "Imgs").iterdir())[0], sorted((test / "GT").iterdir())[0]
    for name in ("place/in", "secret"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(image, tmp_path / name / "a.jpg")
        shutil.copy(mask, tmp_path / name / "a.png")
    for end in ("jpg", "png"):
        (tmp_path / "place" / f"link.{end}").symlink_to(tmp_path / "secret" / f"a.{end}")
    (tmp_path / "place" / "folder").symlink_to(tmp_path / "secret")
    return tmp_path / "place"


def table(place: Path, image: str, mask: str = "in/a.png") -> str:
    path = place / "list.csv"
    path.write_text(f"image,mask\n{image},{mask}\n")
    return str(path)


def spelled(form: str, place: Path, end: str) -> str:
    name = f"a.{end}"
    return form.format(name, absolute=place.parent / "secret" / name, end=end)


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file with its content, symlinks with their targets."""
    return {
        str(p.relative_to(folder)): str(p.readlink()).encode() if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


@pytest.mark.parametrize("form", OUTSIDE)
def test_a_table_names_nothing_outside_its_folder(
    form: str, train, tiny_run: Path, place: Path, tmp_path: Path, capsys
) -> None:
    out, run = str(tmp_path / "out"), str(tiny_run)
    for end in ("jpg", "png"):
        outside = spelled(form, place, end)
        listed = table(place, outside) if end == "jpg" else table(place, "in/a.jpg", outside)
        assert train(data=Path(listed)) == 3
        assert main(["evaluate", run, "--data", listed, "-o", f"{out}/scores"]) == 3
        assert main(["doctor", listed, "-o", f"{out}/page", "--no-copies"]) == 3
        if end == "jpg":
            assert main(["predict", run, listed, "-o", f"{out}/maps"]) == 3
        captured = capsys.readouterr()
        said = " ".join((captured.out + captured.err).split())
        assert said.count("may not lead out of it") >= 3 and "--allow-outside" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("form", OUTSIDE)
def test_allowed_it_is_read_and_results_stay_where_they_belong(
    form: str, tiny_run: Path, place: Path, tmp_path: Path
) -> None:
    listed = table(place, *(spelled(form, place, end) for end in ("jpg", "png")))
    before = {name: tree(tmp_path / name) for name in ("place", "secret")}
    allowed, run = "--allow-outside", str(tiny_run)
    photos = find_photos([listed], allow_outside=True)
    assert [photo.path for photo in photos] == [tmp_path / "secret" / "a.jpg"]
    assert main(["predict", run, listed, "-o", str(tmp_path / "out"), allowed]) == 0
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    # And the table, the ledger with its lock, and the summary.
    assert len(made) == len(PICTURES) + 4
    assert all(path.resolve().is_relative_to(tmp_path / "out") for path in made)
    words = [allowed, "--gallery", "1", "--no-intervals"]
    assert main(["evaluate", run, "--data", listed, "-o", str(tmp_path / "e"), *words]) == 0
    assert {name: tree(tmp_path / name) for name in before} == before
    assert {p.name for p in tmp_path.iterdir()} == {"place", "secret", "out", "e"}


def test_the_doctor_takes_an_allowed_table(place: Path, tmp_path: Path, capsys) -> None:
    listed = table(place, "link.jpg", "link.png")
    main(["doctor", listed, "-o", str(tmp_path / "d"), "--no-copies", "--allow-outside"])
    assert "may not lead out of it" not in capsys.readouterr().out


def test_training_takes_an_allowed_table(train, place: Path) -> None:
    for index in range(4):
        for end in ("jpg", "png"):
            shutil.copy(place / "in" / f"a.{end}", place.parent / "secret" / f"b{index}.{end}")
    rows = "".join(f"../secret/b{i}.jpg,../secret/b{i}.png\n" for i in range(4))
    (place / "list.csv").write_text("image,mask\n" + rows)
    assert train("--dry-run", "--allow-outside", data=place / "list.csv") == 0


@pytest.mark.parametrize("row", ["", ".", "in/..", "a\\..\\..\\b.jpg", "circle.jpg"])
def test_rows_that_are_no_path_are_an_error(row: str, place: Path) -> None:
    (place / "circle.jpg").symlink_to("circle.jpg")
    if "\\" in row:
        # Just an odd name on this system, but a path out of the folder on another.
        (place / row).write_bytes((place / "in" / "a.jpg").read_bytes())
        (photo,) = find_photos([table(place, row)])
        made = output_path(place.parent / "out", "map", photo.name)
        assert made.parent == place.parent / "out" / "maps"
        return
    (place / "list.csv").write_text(f'image,mask\n"{row}",\n')
    if row == "circle.jpg":
        (place / "list.csv").write_text("image,mask\na\0b.jpg,\n")
    with pytest.raises(DataError, match=r"list.csv"):
        find_photos([str(place / "list.csv")])


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "x/../../../b"])
def test_no_name_leads_out_of_the_results(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="outside"):
        output_path(tmp_path / "out", "map", name)
    assert output_path(tmp_path / "out", "map", "a/b").name == "b.png"


class TestLinksAmongResults:
    def test_predict_replaces_linked_files(
        self, tiny_run: Path, place: Path, tmp_path: Path
    ) -> None:
        out, victim = tmp_path / "out", tmp_path / "victim"
        victim.write_text("precious")
        for path in (out / "maps" / "a.png", out / "masks" / "a.png", out / "results.csv"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(victim)
        words = ["predict", str(tiny_run), str(place / "in" / "a.jpg"), "-o", str(out)]
        assert main(words) == 0
        assert victim.read_text() == "precious"
        assert not [path for path in out.rglob("*") if path.is_symlink()]
        assert "a," in (out / "results.csv").read_text()
        assert cv2.imread(str(out / "maps" / "a.png"), cv2.IMREAD_GRAYSCALE) is not None

    def test_predict_refuses_linked_folders(
        self, tiny_run: Path, place: Path, tmp_path: Path, capsys
    ) -> None:
        out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
        elsewhere.mkdir()
        out.mkdir()
        (out / "masks").symlink_to(elsewhere)
        words = ["predict", str(tiny_run), str(place / "in" / "a.jpg"), "-o", str(out)]
        assert main(words) == 3
        assert "is a symlink or leads out" in " ".join(capsys.readouterr().err.split())
        assert not list(elsewhere.iterdir())
        # The results folder itself may be a symlink: the user named it.
        (tmp_path / "named").symlink_to(elsewhere)
        assert main([*words[:-1], str(tmp_path / "named")]) == 0
        assert (elsewhere / "maps" / "a.png").is_file()

    def test_evaluate_replaces_files_and_refuses_folders(
        self, tiny_run: Path, toy_data: Path, tmp_path: Path, capsys
    ) -> None:
        out, victim, elsewhere = tmp_path / "out", tmp_path / "victim", tmp_path / "elsewhere"
        victim.write_text("precious")
        elsewhere.mkdir()
        words = ["evaluate", str(tiny_run), "--data", str(toy_data), "--gallery", "1"]
        words += ["--no-intervals", "-o"]
        assert main([*words, str(out)]) == 0
        names = [path for path in out.rglob("*") if path.is_file() and path.name != "scores.json"]
        for path in names:
            path.unlink()
            path.symlink_to(victim)
        assert len(names) >= 7 and main([*words, str(out)]) == 0
        assert victim.read_text() == "precious"
        assert not [path for path in out.rglob("*") if path.is_symlink()]
        for linked in ("per_image", "images"):
            (out / linked).rename(tmp_path / linked)
            (out / linked).symlink_to(elsewhere)
            assert main([*words, str(out)]) == 2
            assert "is a symlink" in " ".join(capsys.readouterr().err.split())
            (out / linked).unlink()
            (tmp_path / linked).rename(out / linked)
        run = tmp_path / "run"
        shutil.copytree(tiny_run, run)
        shutil.rmtree(run / "evaluation")
        (run / "evaluation").symlink_to(elsewhere)
        assert main(["evaluate", str(run), "--data", str(toy_data)]) == 3
        assert "is a symlink that leads out" in " ".join(capsys.readouterr().err.split())
        assert not list(elsewhere.iterdir())

    def test_maps_are_scored_into_no_linked_folder(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        mask = np.zeros((16, 16), np.uint8)
        mask[4:9, 4:9] = 255
        for name in ("maps/a.png", "gt/a.png"):
            write(tmp_path / name, mask)
        words = ("--predictions", "maps", "--gt", "gt", "-o", "out", "--no-intervals")
        assert evaluate(*words) == 0
        (listed,) = (tmp_path / "out" / "per_image").glob("*/*.csv")
        elsewhere = tmp_path / "elsewhere"
        listed.parent.rename(elsewhere)
        listed.parent.symlink_to(elsewhere)
        before = tree(elsewhere)
        assert before and evaluate(*words) == 2
        assert tree(elsewhere) == before, "neither written nor, as of an earlier call, deleted"

    def test_checkpoints_and_records_replace_links(self, tmp_path: Path) -> None:
        victim = tmp_path / "victim"
        victim.write_text("precious")
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        for name in ("best.pt", "best.pt.tmp", "index.json", "index.json.tmp", "step_00000001.pt"):
            (folder / name).symlink_to(victim)
        values = {"format": FORMAT, "config": to_dict(Config()), "model": {"w": torch.zeros(2)}}
        kept = CheckpointFolder(folder)
        kept.save_best(values, step=1)
        kept.save(values, step=1)
        (tmp_path / "metrics.jsonl").symlink_to(victim)
        log = RunLog(tmp_path, tensorboard=False)
        log.write({"step": 1})
        log.truncate_after(1)
        log.close()
        assert victim.read_text() == "precious"
        assert not [path for path in folder.iterdir() if path.is_symlink()]
        assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]

    def test_the_helpers_by_hand(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/")
        assert leads_outside(tmp_path, tmp_path / "link" / "x")
        assert leads_outside(tmp_path, tmp_path / ".." / "x")
        assert not leads_outside(tmp_path, tmp_path / "link")
        assert not leads_outside(tmp_path, tmp_path / "new" / "x")
        (tmp_path / "log").symlink_to(tmp_path / "victim")
        for text in ("a\n", "b\n"):
            with append_here(tmp_path / "log") as file:
                file.write(text)
        assert (tmp_path / "log").read_text() == "a\nb\n" and not (tmp_path / "victim").exists()


def test_pages_show_hostile_file_names_as_text(tmp_path: Path, monkeypatch) -> None:
    """File names hold no slash, so no closing tag, but browsers run an unclosed one."""
    monkeypatch.chdir(tmp_path)
    names = ('"><img src=x onerror=alert(1)>', "<script>alert(1)<", "'onmouseover='alert(1)")
    mask = np.zeros((24, 24), np.uint8)
    mask[4:14, 4:14] = 255
    for index, name in enumerate(names):
        write(tmp_path / "d" / "GT" / f"{name}.png", mask)
        write(tmp_path / "d" / "Imgs" / f"{name}.jpg", np.dstack([mask + index] * 3))
        write(tmp_path / "<img src=x onerror=alert(2)>" / f"{name}.png", mask)
    words = ("--predictions", "<img src=x onerror=alert(2)>", "--gt", "d/GT", "-o", "e")
    assert evaluate(*words, "--images", "d/Imgs") == 0
    (tmp_path / "d" / "Imgs" / f"{names[0]}.jpg").write_bytes(b"broken")
    main(["doctor", "d", "-o", "doctor"])
    for page in ("e/index.html", "doctor/doctor.html"):
        text = (tmp_path / page).read_text()
        assert active_parts(text) == []
        assert "onerror=alert(1)&gt;" in text


CHILD = """
import os, resource, sys, zlib, struct
from pathlib import Path
from camoxpert.data.files import image_io
from camoxpert.errors import DataError
import cv2, numpy as np

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

# A sound file: 20 000 x 20 000 pixels of one bit, all black.
side, deflate = 20_000, zlib.compressobj(9)
rows = b"".join(deflate.compress(b"\\0" * 2501 * 100) for _ in range(200)) + deflate.flush()
path = Path(sys.argv[1])
header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
path.write_bytes(b"\\x89PNG\\r\\n\\x1a\\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
assert path.stat().st_size < 60_000
small = Path(sys.argv[1] + ".jpg")
image_io.write_jpeg(small, np.full((64, 64, 3), 90, np.uint8))
image_io.read_image(small)
if sys.argv[2] == "second line":
    # The JPEG is more than OpenCV may decode here, not more than max_pixels: Pillow decodes it.
    assert image_io.read_image(small).shape == (64, 64, 3)
    try:
        cv2.imread(str(small))
    except cv2.error:
        sys.exit(0)
    sys.exit(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (room, room))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (image_io.probe, image_io.read_image, image_io.read_mask, image_io.read_mask_as,
             image_io.read_levels, image_io.read_map):
    try:
        read(path)
    except DataError as error:
        assert "20000x20000" in str(error) and "not decoded" in str(error)
    else:
        sys.exit(f"{read.__name__} took it")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 16 * 1024, grown
try:
    cv2.imread(str(path))
except cv2.error as error:
    assert "OPENCV_IO_MAX_IMAGE_PIXELS" in str(error) or "pixels" in str(error).lower(), error
else:
    sys.exit("OpenCV has no limit of its own")
# Control: without the look at the header it would not have fitted.
try:
    image_io.read_image(path, max_pixels=10**9)
except (MemoryError, DataError):
    sys.exit(0)
sys.exit("the control fitted")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
@pytest.mark.parametrize("case", ["a small file of 400 million pixels", "second line"])
def test_a_huge_picture_is_refused_before_it_takes_memory(case: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OPENCV_IO_MAX_IMAGE_PIXELS", None)
    if case == "second line":
        environment["OPENCV_IO_MAX_IMAGE_PIXELS"] = "1000"
    words = [sys.executable, "-c", CHILD, str(tmp_path / "bomb.png"), case]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
