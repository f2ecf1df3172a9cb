"""CSV files as spreadsheets and other systems write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from camoxpert.data.files.csv_paths import read_table
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.manifest import Search, load_eval, load_train, load_training_data
from camoxpert.errors import DataError
from camoxpert.inference.sources import find_photos

NAMES = ("a", "b")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*NAMES, "c d"):
        write_jpeg(tmp_path / "i" / f"{name}.jpg", np.zeros((8, 9, 3), np.uint8))
        write_png(tmp_path / "m" / f"{name}.png", np.full((8, 9), 255, np.uint8))
    return tmp_path


def rows(separator: str = ",", *, head: str = "image{}mask", end: str = "\n") -> str:
    lines = [head.format(separator), *(f"i/{n}.jpg{separator}m/{n}.png" for n in NAMES)]
    return end.join(lines) + end


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", rows(";")),
        ("a.tsv", rows("\t")),
        ("a.csv", rows(", ")),
        ("a.csv", rows(head=" Image{}MASK ")),
        ("a.csv", rows().replace("/", "\\")),
        ("a.csv", rows(end="\r\n").encode("utf-8-sig")),
        ("a.csv", rows(end="\r")),
        ("a.csv", rows(end="\n\n")),
        ("a.csv", rows("\t").encode("utf-16")),
        ("a.csv", "\n" + rows()),
        ("a.csv", ("sep=;\r\n" + rows(";", end="\r\n")).encode("utf-8-sig")),
        ("a.csv", ("sep=\t\r\n" + rows("\t", end="\r\n")).encode("utf-16")),
        ("a.csv", '"sep=,"\n' + rows()),
        ("a.csv", 'image,mask\n"i/a.jpg","m/a.png"\n"i/b.jpg", "m/b.png"\n'),
    ],
)
def test_every_common_form_is_read(root: Path, name: str, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (root / name).write_bytes(data)
    assert [pair.name for pair in load_train([root / name]).pairs] == ["i/a", "i/b"]
    assert [photo.name for photo in find_photos([str(root / name)])] == ["i/a", "i/b"]


def test_split_words_in_any_case(root: Path) -> None:
    lines = [
        f"i/{n}.jpg,m/{n}.png,{s}" for n, s in (("a", "Training"), ("b", "VAL"), ("c d", "Test"))
    ]
    (root / "a.csv").write_text("image,mask,split\n" + "\n".join(lines))
    data = load_training_data([root / "a.csv"], Search())
    assert data.given is not None
    assert [p.name for p in data.whole.pairs] == ["i/a", "i/b"]
    assert [p.name for p in data.given.pairs] == ["i/b"]
    assert [p.name for p in load_eval(root / "a.csv")["a"].pairs] == ["i/c d"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("image,mask\ni/a.jpg,\n", r"line 2: the cell 'mask' is empty"),
        ("image,mask\n\n\ni/a.jpg\n", r"line 4: the cell 'mask' is empty"),
        ("image,mask\ni/a.jpg,m/a.png\n,m/b.png\n", r"line 3: the cell 'image' is empty"),
        ("image;mask\ni/a.jpg;m/a.png;x\n", r"line 2: 3 cells, but the first line names 2"),
        ("image,masks\ni/a.jpg,m/a.png\n", r"no column 'mask'\. Did you mean masks\?"),
        ("image,mask,split\ni/a.jpg,m/a.png,dev\n", r"line 2: split must be train, val or test"),
        (
            "image,mask\ni/a.jpg,m/a.png\ni/a.jpg,m/b.png\n",
            r"line 3: i/a\.jpg is already in line 2",
        ),
        ("image,mask\ni/a.jpg,m/x.png\n", r"line 2: There is no file or folder .*Did you mean"),
        ("image,mask\n", "has no rows"),
    ],
)
def test_faults_name_the_line_and_the_cell(root: Path, content: str, says: str) -> None:
    (root / "a.csv").write_text(content)
    with pytest.raises(DataError, match=says):
        load_train([root / "a.csv"])


def test_a_backslash_in_a_file_name_stays(root: Path) -> None:
    (root / "i" / "a.jpg").rename(root / "i\\a.jpg")
    (root / "a.csv").write_text("image,mask\ni\\a.jpg,m/a.png\n")
    assert load_train([root / "a.csv"]).pairs[0].image.name == "i\\a.jpg"


def test_names_that_are_not_utf8_come_back_as_written(root: Path) -> None:
    (root / "a.csv").write_bytes(b"name\n\xca\xfd\n")
    assert read_table(root / "a.csv", ("name",), errors="surrogateescape") == [
        (2, {"name": "\udcca\udcfd"})
    ]


def test_a_line_of_excel_s_does_not_change_the_numbers_of_lines(root: Path) -> None:
    (root / "a.csv").write_text("sep=,\n" + rows() + "i/gone.jpg,m/a.png\n")
    assert [line for line, _ in read_table(root / "a.csv", ("image", "mask"))] == [3, 4, 5]
