"""What predict takes for a photo, and what it says about everything else."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from camoxpert.cli import main
from camoxpert.data.files.listing import (
    OUTPUT_COLUMNS,
    OUTPUT_FOLDERS,
    OUTPUT_RECORD,
    OUTPUT_SUMMARY,
    OUTPUT_TABLE,
)
from camoxpert.errors import ConfigError, DataError
from camoxpert.inference.ledger import LEDGER
from camoxpert.inference.photos import SUMMARY
from camoxpert.inference.prediction import FOLDERS
from camoxpert.inference.products import COLUMNS, TABLE
from camoxpert.inference.sources import Photo, find_photos, keep_apart, look_for_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        cv2.imwrite(str(folder / name), np.full((20, 24, 3), 90, np.uint8))
    return folder


def names(*inputs: object, **options: Path) -> list[str]:
    return [photo.name for photo in look_for_photos([str(i) for i in inputs], **options).photos]


def test_the_names_of_results_are_those_of_the_listing() -> None:
    # Folders of videos hold no images, and may be the user's.
    assert tuple(f for kind, f in FOLDERS.items() if kind != "video") == OUTPUT_FOLDERS
    assert (LEDGER, TABLE, SUMMARY) == (OUTPUT_RECORD, OUTPUT_TABLE, OUTPUT_SUMMARY)
    assert ",".join(COLUMNS).encode().startswith(OUTPUT_COLUMNS)


@pytest.mark.parametrize("place", ["out", "sub/out", "."])
def test_results_are_not_predicted_again(tiny_run: Path, photos: Path, capsys, place: str) -> None:
    words = ["predict", str(tiny_run), str(photos), "-o", str(photos / place)]
    assert main(words) == 0
    assert "2 images predicted" in capsys.readouterr().out
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "0 images predicted, 2 were there already" in captured.out
    assert "Results of predict are not predicted again" in captured.err
    # Nor by a later call with another output, or a glob.
    assert main([*words[:-1], str(photos / "later")]) == 0
    assert "2 images predicted;" in capsys.readouterr().out
    assert names(photos / "**" / "*.*") == ["a", "sub/b"]
    assert (photos / place / OUTPUT_TABLE).is_file()


def test_names_that_differ_in_the_ending_keep_it(photos: Path) -> None:
    for name in ("a.png", "a.jpg.png", "sub/b.PNG", "sub/c.png"):
        cv2.imwrite(str(photos / name), np.zeros((8, 9, 3), np.uint8))
    # a.jpg takes the name that a.jpg.png would have had.
    wanted = {"a.jpg", "a.png", "a.jpg.png", "sub/b.jpg", "sub/b.PNG", "sub/c"}
    assert set(names(photos)) == wanted
    files = sorted(path for path in photos.rglob("*.*"))
    found = [keep_apart([Photo(p, str(p.with_suffix(""))) for p in some])
             for some in (files, files[::-1])]  # fmt: skip
    assert found[0] == found[1][::-1]
    for order in (files, files[::-1]):
        assert set(names(*order)) == {name.rpartition("/")[2] for name in wanted}
    assert names(photos / "a.jpg") == ["a"], "an ending that tells nothing is left out"


def test_what_shares_a_name_with_its_ending_is_refused(photos: Path) -> None:
    cv2.imwrite(str(photos / "b.jpg"), np.zeros((8, 9, 3), np.uint8))
    for order in (("b.jpg", "sub/b.jpg"), ("sub/b.jpg", "b.jpg")):
        with pytest.raises(DataError, match=r"would both be written as 'b\.jpg'.*sub-folders"):
            names(*(photos / name for name in order))
    assert names(photos / "b.jpg", photos / "sub" / ".." / "b.jpg") == ["b"]
    assert names(photos / "**" / "b.jpg") == ["b", "sub/b"]


def test_globs_are_named_below_their_fixed_part(photos: Path, monkeypatch) -> None:
    monkeypatch.chdir(photos.parent)
    assert names("**/*.jpg") == ["photos/a", "photos/sub/b"]
    assert names("photos/**/b*") == ["sub/b"] == names(photos / "**" / "b.jpg")
    assert names("photos/s*/**/*.jpg") == ["sub/b"]
    assert names("photos/sub/**/*.jpg") == ["b"] == names("photos/*/*.jpg")
    with pytest.raises(DataError, match=r"'a\*\*\.jpg' is not a pattern"):
        names("a**.jpg")


def test_other_files_are_counted(photos: Path) -> None:
    for name in ("._a.jpg", "Thumbs.db", ".DS_Store", "notes.txt", "raw.heic"):
        (photos / name).write_bytes(b"x")
    (photos / ".ipynb_checkpoints").mkdir()
    (photos / ".ipynb_checkpoints" / "a-checkpoint.jpg").write_bytes(b"x")
    found = look_for_photos([str(photos)])
    assert [photo.name for photo in found.photos] == ["a", "sub/b"]
    assert len(found.notes) == 1 and "2 files" in found.notes[0] and ".heic 1" in found.notes[0]
    assert ".txt 1" in look_for_photos([str(photos / "*")]).notes[-1]


def test_other_endings_and_linked_folders(photos: Path, tmp_path: Path) -> None:
    for ending, kind in ((".jfif", "JPEG"), (".gif", "GIF"), (".tga", "TGA"), (".ppm", "PPM")):
        Image.new("RGB", (9, 8)).save(photos / f"{kind}{ending}", format=kind)
    (tmp_path / "elsewhere").mkdir()
    cv2.imwrite(str(tmp_path / "elsewhere" / "c.jpg"), np.zeros((8, 9, 3), np.uint8))
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(".")
    assert names(photos) == ["GIF", "JPEG", "PPM", "TGA", "a", "linked/c", "sub/b"]


def test_a_link_to_nothing_is_a_photo_that_cannot_be_read(
    tiny_run: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "folder.jpg").mkdir()
    assert main(["predict", str(tiny_run), str(photos), "-o", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    assert "2 images predicted" in captured.out
    assert "is a link to nowhere.jpg, which does not exist" in " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://x.org/a.jpg", "https://x.org/a.jpg is a URL"),
        ("photos/aa.jpg", r"There is no file or folder .*Did you mean photos/a\.jpg\?"),
        ("nowhere/a.jpg", "There is no folder nowhere either"),
        ("photos/*.gif", "No file matches 'photos/"),
        ("clip.mp4", "is a video"),
        ("set.zip", "is an archive"),
        ("empty", "No image found in 'empty'"),
    ],
)
def test_each_has_its_own_sentence(photos: Path, monkeypatch, text: str, says: str) -> None:
    monkeypatch.chdir(photos.parent)
    Path("clip.mp4").write_bytes(b"x")
    Path("set.zip").write_bytes(b"x")
    Path("empty").mkdir()
    with pytest.raises(DataError, match=says):
        find_photos([text])


def test_a_large_photo_needs_a_higher_limit(
    tiny_run: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    words = ["predict", str(tiny_run), str(photos), "-o", str(tmp_path / "out"), "--save", "mask"]
    assert main([*words, "--max-pixels", "100"]) == 3
    assert "--max-pixels" in capsys.readouterr().err
    assert main([*words, "--max-pixels", "480"]) == 0


def test_home_folders(photos: Path, tiny_run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(photos.parent))
    words = ["predict", str(tiny_run), "~/photos", "--output=~/out", "--save", "mask"]
    assert main(words) == 0
    assert (photos.parent / "out" / "masks" / "a.png").is_file()


def test_names_that_are_not_utf8(tiny_run: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xca\xfd")
    photos.rename(folder)
    (folder / "a.jpg").rename(folder / os.fsdecode(b"\xbe\xdd.jpg"))
    words = ["predict", str(tiny_run), str(folder), "-o", str(folder / "out"), "--save", "mask"]
    assert main(words) == 0
    assert b"\xbe\xdd," in (folder / "out" / OUTPUT_TABLE).read_bytes()


class Piped(io.TextIOWrapper):
    """Standard input with given bytes."""

    def __init__(self, data: bytes, *, keyboard: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self.isatty = lambda: keyboard  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "data",
    [
        b"photos/a.jpg\nphotos/sub/b.jpg\nphotos/gone.jpg\n",
        b"\xef\xbb\xbf./photos/a.jpg\r\n\r\nphotos/sub/b.jpg\r\nphotos/gone.jpg",
        b"photos/a.jpg\0photos/sub/b.jpg\0photos/gone.jpg\0",
    ],
)
def test_names_on_standard_input(photos: Path, monkeypatch, data: bytes) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr("sys.stdin", Piped(data))
    assert names("-") == ["photos/a", "photos/sub/b", "photos/gone"]


def test_names_with_line_breaks_and_from_elsewhere(photos: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", Piped(b"/x/two\nlines.jpg\0../y/c.d.jpg\0"))
    assert names("-") == ["x/two\nlines", "y/c.d"]


def test_standard_input_that_names_nothing(monkeypatch) -> None:
    for data, says in ((b"\n \n", "names no image"), (b"a.jpg\n/\n", "name 2: '/' cannot be")):
        monkeypatch.setattr("sys.stdin", Piped(data))
        with pytest.raises(DataError, match=says):
            names("-")
    monkeypatch.setattr("sys.stdin", Piped(b"", keyboard=True))
    with pytest.raises(ConfigError, match="which is a keyboard here"):
        names("-")


def test_missing_files_of_lists_are_rows(
    tiny_run: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    table = photos / "list.csv"
    table.write_text("name;Photo\n1;a.jpg\n2;gone.jpg\n3;sub/b.jpg\n")
    words = ["predict", "-o", str(tmp_path / "out"), "--save", "mask", "--column", "photo"]
    assert main([*words, str(tiny_run), str(table)]) == 3
    captured = capsys.readouterr()
    assert "2 images predicted" in captured.out and "gone.jpg" in captured.err
    rows = [json.loads(line) for line in (tmp_path / "out" / LEDGER).read_text().splitlines()]
    assert [r["status"] for r in rows if "item" in r] == ["ok", "failed", "ok"]
    assert main([*words, str(tiny_run), str(photos)]) == 2
    assert "no input is one" in " ".join(capsys.readouterr().err.split())


class TestParquet:
    @pytest.fixture
    def written(self, photos: Path):
        pyarrow = pytest.importorskip("pyarrow", reason='pip install "camoxpert[parquet]"')
        from pyarrow import parquet

        def write(name: str = "list.parquet", **columns: list[object]) -> Path:
            parquet.write_table(pyarrow.table(columns), photos / name, row_group_size=2)
            return photos / name

        return write

    def test_only_the_column_is_read(self, written, monkeypatch) -> None:
        table = written(Photo=["a.jpg", "sub/b.jpg", "gone.jpg"], other=[1, 2, 3])
        from pyarrow import parquet

        asked = []
        honest = parquet.ParquetFile.iter_batches

        def iter_batches(self, *words, columns, **options):
            asked.append(columns)
            return honest(self, *words, columns=columns, **options)

        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", iter_batches)
        found = look_for_photos([str(table)], column="photo").photos
        assert [photo.name for photo in found] == ["a", "sub/b", "gone"] and asked == [["Photo"]]
        assert found[1].path == table.parent / "sub" / "b.jpg"

    def test_what_cannot_be_read(self, written, photos: Path, tmp_path: Path) -> None:
        for columns, says in (
            ({"images": ["a.jpg"]}, "no column 'image'. Did you mean images?"),
            ({"image": [1]}, "holds int64, not text"),
            ({"image": ["a.jpg", None]}, "row 2: the cell 'image' is empty"),
            ({"image": ["../x.jpg"]}, "row 1: .* may not lead out of it"),
        ):
            with pytest.raises(DataError, match=says):
                names(written(**columns))
        (photos / "bad.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DataError, match="cannot be read as a Parquet file"):
            names(photos / "bad.parquet")
        (photos / "out.jpg").symlink_to(tmp_path / "elsewhere.jpg")
        with pytest.raises(DataError, match="not a path inside the table's folder"):
            names(written(image=["out.jpg"]))

    def test_without_pyarrow(self, photos: Path, monkeypatch) -> None:
        (photos / "list.parquet").write_bytes(b"x")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match=r'pip install "camoxpert\[parquet\]"'):
            names(photos / "list.parquet")
