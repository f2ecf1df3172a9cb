"""The doctor finds faults of environment and data, and decides whether training can start."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.printed import complained

from camoxpert.cli import main
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import (
    Search,
    find_test_sets,
    load_train,
    read_clean_list,
)
from camoxpert.data.files.split import split_validation
from camoxpert.doctor import dataset as doctor_data
from camoxpert.doctor import environment
from camoxpert.doctor.dataset import examine_data, write_clean_list
from camoxpert.doctor.environment import check_environment
from camoxpert.errors import DataError
from camoxpert.synthesis.toy import generate_toy


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generate_toy(tmp_path / "data", num_train=20, num_test=6, size=64, seed=0)
    return tmp_path / "data"


def examined(*roots: Path, copies: bool = True, **options: object):
    data = DataConfig(roots=tuple(map(str, roots)), max_pixels=10**6, **options)
    return examine_data(data, copies=copies)


def said(found, level: str) -> str:
    return "\n".join(f"{f.check}: {f.text} {f.files}" for f in found.findings if f.level == level)


def train_files(data: Path, index: int) -> tuple[Path, Path]:
    pair = load_train([data]).pairs[index]
    return pair.image, pair.mask


def test_sound_data_has_nothing_but_notes(data: Path) -> None:
    found = examined(data)
    assert {finding.level for finding in found.findings} == {"note"}
    assert len(found.facts) == 26 and not found.clean_list
    notes = said(found, "note")
    assert "26 pairs are sound" in notes and "masks are stored as 0/255 20" in notes
    assert "No re-encoded, resized, cropped or flipped copies found among 26 images" in notes
    assert found.layouts == [
        "data train: 20 pairs (TrainDataset/TestDataset)",
        "toy test: 6 pairs (TrainDataset/TestDataset)",
    ]


def test_every_fault_is_listed_not_only_the_first(data: Path) -> None:
    train_files(data, 2)[0].write_bytes(b"")
    _, mask = train_files(data, 5)
    mask.write_bytes(mask.read_bytes()[:100])
    train_files(data, 7)[1].unlink()
    (data / "TrainDataset" / "GT" / "stray.png").write_bytes(mask.read_bytes())
    found = examined(data)
    errors = said(found, "error")
    assert "is empty (0 bytes)" in errors and "damaged or cut short" in errors
    assert "data train: images without a mask: 1" in errors
    warnings = said(found, "warning")
    assert "masks without an image: 1" in warnings and "stray" in warnings
    assert {row[3] for row in found.clean_list} == {"unreadable"} and len(found.clean_list) == 2


def test_masks_that_mean_something_else(data: Path) -> None:
    for pair in load_train([data]).pairs:
        mask = cv2.imread(str(pair.mask), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(pair.mask), 255 - mask)
    for index, pair in enumerate(next(iter(find_test_sets([data]).values())).pairs):
        if index < 2:
            cv2.imwrite(str(pair.mask), np.zeros((64, 64), np.uint8))
        elif index == 2:
            cv2.imwrite(str(pair.mask), np.full((64, 64), 255, np.uint8))
    found = examined(data)
    assert "They look inverted" in said(found, "error")
    warnings = said(found, "warning")
    assert "toy test: empty masks: 2" in warnings
    assert "toy test: masks that mark every pixel: 1" in warnings


def test_copies_across_the_splits_go_to_the_clean_list(data: Path, tmp_path: Path) -> None:
    test = next(iter(find_test_sets([data]).values())).pairs
    image, mask = train_files(data, 3)
    picture = cv2.imread(str(test[0].image))
    cv2.imwrite(str(image), picture[:, ::-1])
    shutil.copy(test[0].mask, mask)
    inner, inner_mask = train_files(data, 8)
    other, other_mask = train_files(data, 11)
    shutil.copy(inner, other)
    shutil.copy(inner_mask, other_mask)
    found = examined(data, val_fraction=0.0)
    warnings = said(found, "warning")
    assert "across test and training" in warnings and "flipped left-right" in warnings
    assert "within training" in warnings
    assert {row[2] for row in found.clean_list} == {image.stem, other.stem}
    assert all(row[1] == "train" for row in found.clean_list), "test sets stay as they are"

    path = tmp_path / "clean.csv"
    write_clean_list(path, found.clean_list)
    clean = read_clean_list(path)
    kept = load_train([data], Search(clean=clean))
    assert len(kept) == 18 and image.stem not in {pair.name for pair in kept.pairs}
    assert "2 images left out by the clean list" in kept.notes[-1]
    assert len(next(iter(find_test_sets([data], Search(clean=clean)).values()))) == 6
    again = examined(data, copies=False, val_fraction=0.0)
    assert "identical" not in said(again, "note") and "the same file" in said(again, "warning")


@pytest.mark.parametrize("copies", [True, False])
def test_no_copy_of_a_test_image_stays_in_training(data: Path, tmp_path: Path, copies) -> None:
    """A family of copies that is larger than the number of candidates of a picture."""
    test = next(iter(find_test_sets([data]).values())).pairs[0]
    planted = [train_files(data, index) for index in range(2, 9)]
    picture = cv2.imread(str(test.image))
    for quality, (image, mask) in enumerate(planted):
        if copies:
            cv2.imwrite(str(image), picture, [cv2.IMWRITE_JPEG_QUALITY, 60 + 5 * quality])
        else:
            shutil.copy(test.image, image)
        shutil.copy(test.mask, mask)
    found = examined(data, copies=copies, val_fraction=0.0)
    assert {row[2] for row in found.clean_list} == {image.stem for image, _ in planted}
    path = tmp_path / "clean.csv"
    write_clean_list(path, found.clean_list)
    kept = load_train([data], Search(clean=read_clean_list(path)))
    assert len(kept) == 13


def test_what_training_would_refuse_is_an_error(data: Path, tmp_path: Path) -> None:
    assert "in more than one of the given folders" in said(examined(data, data), "error")
    shutil.rmtree(data / "TrainDataset" / "Imgs")
    (data / "TrainDataset" / "Imgs").mkdir()
    assert "holds no images" in said(examined(data), "error")
    shutil.rmtree(data / "TrainDataset")
    found = examined(data)
    assert not said(found, "error") and "nothing to train on" in said(found, "warning")


def test_a_csv_with_one_split(data: Path) -> None:
    pair = load_train([data]).pairs[0]
    other = load_train([data]).pairs[1]
    rows = [f"{p.image.relative_to(data)},{p.mask.relative_to(data)},train" for p in (pair, other)]
    (data / "list.csv").write_text("\n".join(["image,mask,split", *rows]))
    found = examined(data / "list.csv")
    assert len(found.facts) == 2 and not said(found, "error")


def test_pictures_are_kept_for_the_sheet_only(data: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor_data, "SHEET_PICTURES", 3)
    found = examined(data)
    kept = [facts for facts in found.facts if facts.thumb is not None]
    assert [facts.split for facts in kept] == ["train"] * 3 + ["test"] * 3


def test_a_copy_between_training_and_validation(data: Path) -> None:
    whole = load_train([data])
    train, validation = split_validation(whole, 0.2, 42)
    shutil.copy(validation.pairs[0].image, train.pairs[0].image)
    found = examined(data, val_fraction=0.2, group_copies=False)
    assert "across training and validation" in said(found, "warning")
    assert [row[2] for row in found.clean_list] == [train.pairs[0].name]
    # By default training keeps the two on one side.
    found = examined(data, val_fraction=0.2)
    assert "1 pair of copies within training" in said(found, "warning")


def test_a_folder_without_a_data_set(tmp_path: Path) -> None:
    assert "There is no file or folder" in said(examined(tmp_path / "nowhere"), "error")
    (tmp_path / "empty").mkdir()
    assert "No known data set layout" in said(examined(tmp_path / "empty"), "error")


def test_a_csv(data: Path) -> None:
    pairs = load_train([data]).pairs[:4]
    rows = ["image,mask,split"]
    rows += [
        f"{p.image.relative_to(data)},{p.mask.relative_to(data)},{'test' if i else 'train'}"
        for i, p in enumerate(pairs)
    ]
    (data / "list.csv").write_text("\n".join(rows))
    found = examined(data / "list.csv")
    assert sorted(facts.split for facts in found.facts) == ["test", "test", "test", "train"]


def test_the_command(data: Path, tmp_path: Path, capsys) -> None:
    out, clean = tmp_path / "out", tmp_path / "clean.csv"
    assert main(["doctor", str(data), "-o", str(out), "--clean-list", str(clean)]) == 0
    printed = capsys.readouterr().out
    assert "ready to train" in printed and "A training step works on" in printed
    page = (out / "doctor.html").read_text()
    assert "Ready to train" in page and page.count("data:image/jpeg;base64") == 2
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert list(csv.reader(clean.open())) == [["dataset", "split", "name", "reason"]]
    rows = list(csv.DictReader((out / "pairs.csv").open()))
    assert len(rows) == 26 and 0 < float(rows[0]["object_share"]) < 0.5
    assert json.loads((out / "findings.json").read_text())["findings"]
    assert len(list(out.glob("contact_sheet_*.jpg"))) == 2


def test_the_exit_code_says_not_to_start(data: Path, tmp_path: Path, capsys) -> None:
    train_files(data, 0)[0].write_bytes(b"<html>")
    assert main(["doctor", str(data), "-o", str(tmp_path / "out"), "--no-copies"]) == 3
    assert "training should not start" in capsys.readouterr().out
    assert "Training should not start" in (tmp_path / "out" / "doctor.html").read_text()
    assert main(["doctor", "--val-fraction", "2"]) == 2
    assert main(["doctor", "--clean-list", str(tmp_path / "x.csv")]) == 2
    assert main(["doctor"]) == 0, "the environment alone"


def test_names_of_files_cannot_write_the_page(data: Path, tmp_path: Path) -> None:
    image, mask = train_files(data, 0)
    image.rename(image.with_name("<b>&'.jpg"))
    mask.rename(mask.with_name("<b>&'.png"))
    image.with_name("<b>&'.jpg").write_bytes(b"")
    assert main(["doctor", str(data), "-o", str(tmp_path / "out"), "--no-copies"]) == 3
    assert "<b>&'" not in (tmp_path / "out" / "doctor.html").read_text()


class TestEnvironment:
    def test_it_names_what_is_here(self) -> None:
        text = "\n".join(f.text for f in check_environment())
        assert "torch" in text and "usable cores" in text and "GB free" in text

    def test_a_gpu_that_pytorch_does_not_see(self, monkeypatch) -> None:
        import torch

        monkeypatch.setattr(environment, "_driver_devices", lambda: ["Tesla T4", "Tesla T4"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        found = {f.level: f.text for f in check_environment() if f.check == "devices"}
        assert "reports 2 GPUs" in found["warning"] and "CUDA_VISIBLE_DEVICES" in found["warning"]
        levels = {f.level for f in check_environment("cuda") if f.check == "devices"}
        assert "error" in levels

    def test_little_shared_memory_and_disk(self, monkeypatch) -> None:
        monkeypatch.setattr(environment, "free_shared_memory", lambda: 64 << 20)
        monkeypatch.setattr(environment, "SMALL_DISK", 1 << 60)
        warnings = [f.text for f in check_environment() if f.level == "warning"]
        assert any("/dev/shm has 67 MB free" in text for text in warnings)
        assert sum("GB free" in text for text in warnings) == 2


def test_training_takes_the_clean_list(train, toy_data: Path, tmp_path: Path, capsys) -> None:
    name = load_train([toy_data]).pairs[0]
    path = tmp_path / "clean.csv"
    write_clean_list(path, [(name.dataset, "train", name.name, "by hand")])
    assert train("--clean-list", str(path), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "1 images left out by the clean list" in printed and "stored as 0/255" in printed
    assert train("--clean-list", str(tmp_path / "no.csv"), "--dry-run") == 3
    path.write_text(f"dataset,split,name\n{name.dataset},train,nobody\n")
    assert train("--clean-list", str(path), "--dry-run") == 0
    assert "1 of 1 rows of the clean list name no image here" in capsys.readouterr().out
    every = [(p.dataset, "train", p.name, "all") for p in load_train([toy_data]).pairs]
    write_clean_list(path, every)
    assert train("--clean-list", str(path), "--dry-run") == 3
    assert "leaves no training images" in complained(capsys)
    path.write_bytes(b"\xff\xd8\xff\xe0 a picture\n")
    assert train("--clean-list", str(path), "--dry-run") == 3
    assert "needs the columns" in " ".join(capsys.readouterr().err.split())
    odd = ("data", "train", "k\udce4fer", "a name that is not UTF-8")
    write_clean_list(path, [odd])
    assert read_clean_list(path) == {odd[:3]: odd[3]}
    path.write_text("file\na\n")
    with pytest.raises(DataError, match="needs the columns"):
        read_clean_list(path)


def test_training_warns_of_identical_images_across_splits(train, data: Path, capsys) -> None:
    test = next(iter(find_test_sets([data]).values())).pairs[0]
    shutil.copy(test.image, train_files(data, 0)[0])
    assert train("--dry-run", data=data) == 0
    assert "identical images in different splits: 1" in capsys.readouterr().out


def test_evaluation_takes_the_clean_list(tiny_run: Path, toy_data: Path, tmp_path, capsys) -> None:
    test = next(iter(find_test_sets([toy_data]).values())).pairs[0]
    path = tmp_path / "clean.csv"
    write_clean_list(path, [(test.dataset, "test", test.name, "by hand")])
    words = ["--clean-list", str(path), "-o", str(tmp_path / "scores")]
    assert main(["evaluate", str(tiny_run), *words]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("toy"))
    assert row.split()[2] == "7", "one of eight is left out"


class TestOutput:
    """The doctor replaces its own tables and nothing else."""

    def test_the_data_s_own_table_is_kept(self, data: Path, tmp_path: Path, capsys) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        for name in ("pairs.csv", "mine.csv"):
            rows = [("image", "mask"), *(map(str, train_files(data, n)) for n in range(4))]
            with (folder / name).open("w", newline="") as file:
                csv.writer(file).writerows(rows)
        before = (folder / "pairs.csv").read_bytes()
        words = ("doctor", str(folder / "mine.csv"), "--val-fraction", "0")
        assert main([*words, "-o", str(folder)]) == 2
        assert "pairs.csv exists, and it is not a table that this command wrote" in complained(
            capsys
        )
        for name in ("pairs.csv", "mine.csv"):
            assert (
                main([*words, "-o", str(tmp_path / "a"), "--clean-list", str(folder / name)]) == 2
            )
            assert (folder / name).read_bytes() == before

    def test_its_own_are_replaced(self, data: Path, tmp_path: Path, capsys) -> None:
        clean = tmp_path / "clean.csv"
        words = ("doctor", str(data), "-o", str(tmp_path / "out"), "--clean-list", str(clean))
        first = main([*words])
        (tmp_path / "out" / "pairs.csv").write_bytes(
            (tmp_path / "out" / "pairs.csv").read_bytes().splitlines(keepends=True)[0]
        )
        assert main([*words]) == first != 2
        assert len((tmp_path / "out" / "pairs.csv").read_text().splitlines()) == 27
