"""Where an export may write is decided before its work, and nothing of others is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.printed import complained

from camoxpert.cli import main
from camoxpert.data.files.manifest import USUAL
from camoxpert.errors import ConfigError, DataError
from camoxpert.export.images import fill_up, real_sets
from camoxpert.export.job import ExportOptions, export_model
from camoxpert.export.target import (
    OF_AN_EXPORT,
    check_replaceable,
    digests_of,
    files_of,
    format_of,
    report_of,
)
from camoxpert.export.write import move_into_place
from camoxpert.files import read_json, write_json
from camoxpert.inference.predictor import load_predictor


def put(target: Path, text: str = "new") -> None:
    """Write what an export writes, with the text in place of a model."""
    scratch = target.parent / "scratch"
    scratch.mkdir(exist_ok=True, parents=True)
    made = scratch / f"model{target.suffix.lower()}"
    for number, file in enumerate(files_of(made)):
        file.write_text(f"{text} {number}")
    about = dict.fromkeys(OF_AN_EXPORT, 1)
    move_into_place(made, target, {**about, "files": digests_of(made, target)})


@pytest.mark.parametrize(
    ("name", "wanted", "found"),
    [
        ("m.onnx", None, "onnx"),
        ("m.XML", None, "openvino"),
        ("m.Pt2", "torch", "torch"),
        ("m.v1.onnx", "onnx", "onnx"),
    ],
)
def test_names_that_say_the_format(name: str, wanted: str | None, found: str) -> None:
    assert format_of(Path(name), wanted) == found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("m", None), ("m.bin", None), (".onnx", None), ("m.xml", "onnx"), ("m", "torch")],
)
def test_other_names_are_refused_before_the_model_is_looked_for(
    name: str, wanted: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "nowhere", "-o", str(tmp_path / name)]
    assert main([*words, *(["--format", wanted] if wanted else [])]) == 2
    assert "ends in" in (text := complained(capsys)) or "does not say the format" in text
    assert "nowhere" not in text


@pytest.mark.parametrize("name", ["m.onnx", "m.XML", "m.xml", "m.PT2"])
def test_files_of_an_earlier_export_are_replaced(name: str, tmp_path: Path) -> None:
    target = tmp_path / "new" / name
    put(target, "old")
    check_replaceable(target)
    put(target)
    check_replaceable(target)
    assert [f.read_text() for f in files_of(target)] == [
        f"new {n}" for n in range(len(files_of(target)))
    ]
    written = {file.name for file in (*files_of(target), report_of(target))}
    assert {p.name for p in target.parent.iterdir()} == {*written, "scratch"}


@pytest.mark.parametrize("foreign", ["m.xml", "m.bin", "m.xml.json"])
@pytest.mark.parametrize("kind", ["alone", "after", "folder", "link"])
def test_nothing_of_others_is_replaced(
    foreign: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, file = tmp_path / "m.xml", tmp_path / foreign
    if kind == "after":
        put(target)
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        file.symlink_to("nothing")
    else:
        file.write_text('{"of": "another program"}')
    assert main(["export", "nowhere", "-o", str(target)]) == 2
    text = complained(capsys)
    if (foreign, kind) == ("m.xml", "folder"):
        assert "is a folder; give a file" in text
    else:
        # Without the report nothing says that the model is ours.
        named = "m.xml" if (foreign, kind) == ("m.xml.json", "after") else foreign
        assert f"would replace {tmp_path / named}, which this program did not write" in text
    with pytest.raises(ConfigError, match="Nothing was started"):
        export_model(Path("nowhere"), target, ExportOptions("openvino"))
    if kind in ("alone", "after"):
        assert file.read_text() == '{"of": "another program"}'


def test_a_file_beside_that_no_export_writes_is_none_of_its_business(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_text("of another model")
    check_replaceable(tmp_path / "m.onnx")
    with pytest.raises(ConfigError):
        check_replaceable(tmp_path / "m.xml")


def test_exports_of_0_2_0_named_no_hashes_and_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    put(target)
    about = read_json(report_of(target))
    del about["files"]
    write_json(report_of(target), about)
    check_replaceable(target)
    del about["checkpoint_sha256"]
    write_json(report_of(target), about)
    with pytest.raises(ConfigError):
        check_replaceable(target)


def test_pruning_and_int8_ask_for_images_before_any_are_made(
    tiny_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("work was done")

    for work in ("fill_up", "count_usage", "write_graph"):
        monkeypatch.setattr(f"camoxpert.export.job.{work}", never)
    target, data = tmp_path / "m.onnx", (str(toy_data),)
    with pytest.raises(ConfigError, match=r"50 images .*; 8 can be had"):
        export_model(tiny_run, target, ExportOptions(prune=True, data=data))
    missing = ExportOptions(precision="int8", calibration=(str(tmp_path / "none"),))
    with pytest.raises((ConfigError, DataError), match="--calibration DIR"):
        export_model(tiny_run, target, missing)
    # Without either the work begins.
    with pytest.raises(AssertionError, match="work was done"):
        export_model(tiny_run, target, ExportOptions(data=data))


def test_images_of_data_sets_are_filled_up(tiny_run: Path, toy_data: Path, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_run, device="cpu")
    real = real_sets(predictor, [str(toy_data)], USUAL)
    found = fill_up(real, 32, str(tmp_path))
    assert (found.real, [len(m) for m in found.sets]) == (8, [8, 42])
    assert found.source == "toy and 42 generated"
