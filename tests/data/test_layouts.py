"""Layouts as people keep them: splits, names of folders, flat and nested ones; nothing vanishes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from camoxpert.config import DataConfig
from camoxpert.data.files.headers import require_readable
from camoxpert.data.files.image_io import read_image, write_jpeg, write_png
from camoxpert.data.files.layouts import split_of
from camoxpert.data.files.manifest import (
    Manifest,
    Search,
    find_test_sets,
    load_eval,
    load_train,
    load_training_data,
)
from camoxpert.data.files.roots import distinct_names
from camoxpert.doctor.dataset import examine_data
from camoxpert.errors import DataError


def add(images: Path, masks: Path, *names: str, mask: str = "{}", ending: str = ".png") -> None:
    for name in names:
        pixels = np.full((8, 9, 3), sum(map(ord, name)) % 200, np.uint8)
        write_jpeg(images / f"{name}.jpg", pixels)
        path = masks / f"{mask.format(name)}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        half = np.zeros((8, 9), np.uint8)
        half[:4] = 255
        Image.fromarray(half).save(path)


def names(manifest: Manifest) -> list[str]:
    return [pair.name for pair in manifest.pairs]


SPLITS = {"train": ("a", "b"), "val": ("c",), "test": ("d",)}
WORDS = [
    {"train": "train", "val": "val", "test": "test"},
    {"train": "Training", "val": "Valid", "test": "TESTING"},
    {"train": "train2017", "val": "validation", "test": "test_set"},
]


class TestSplits:
    @pytest.mark.parametrize("words", WORDS)
    @pytest.mark.parametrize(
        ("images", "masks"),
        [
            ("{}/images", "{}/masks"),
            ("images/{}", "masks/{}"),
            ("Images/{}", "GT"),
            ("{}", "{}"),
            ("{}/DATA/Imgs", "{}/DATA/GT"),
        ],
    )
    def test_split_words_are_splits(
        self, tmp_path: Path, words: dict[str, str], images: str, masks: str
    ) -> None:
        for split, stems in SPLITS.items():
            word = words[split]
            add(tmp_path / images.format(word), tmp_path / masks.format(word), *stems)
        data = load_training_data([tmp_path], Search())
        assert data.given is not None and names(data.given) == ["c"]
        assert names(load_train([tmp_path])) == ["a", "b"]
        assert [names(m) for m in find_test_sets([tmp_path]).values()] == [["d"]]
        for split, stems in SPLITS.items():
            (found,) = load_eval(tmp_path, split=split).values()
            assert names(found) == list(stems)

    @pytest.mark.parametrize("word", ["train", "Val", "VALIDATION"])
    def test_another_split_is_never_a_test_set(self, tmp_path: Path, word: str) -> None:
        add(tmp_path / word / "images", tmp_path / word / "masks", "a")
        assert find_test_sets([tmp_path]) == {}
        with pytest.raises(DataError, match=rf"no test split \(found: {split_of(word)}\)"):
            load_eval(tmp_path)
        with pytest.raises(DataError, match="No known data set layout"):
            load_eval(tmp_path, Search(layout="folder of data sets"))

    def test_splits_inside_a_folder_of_data_sets(self, tmp_path: Path) -> None:
        for split, name in (("Train", "a"), ("Test", "b")):
            add(tmp_path / "CAMO" / "Images" / split, tmp_path / "CAMO" / "GT", name)
        add(tmp_path / "NC4K" / "Imgs", tmp_path / "NC4K" / "GT", "c")
        assert {k: names(v) for k, v in load_eval(tmp_path).items()} == {
            "CAMO": ["b"],
            "NC4K": ["c"],
        }

    def test_names_may_repeat_between_splits(self, tmp_path: Path) -> None:
        for split in SPLITS:
            add(tmp_path / split / "images", tmp_path / split / "masks", "0001")
        data = load_training_data([tmp_path], Search())
        keys = [(pair.dataset, pair.name) for pair in data.whole.pairs]
        assert keys == [(tmp_path.name, "0001"), (f"{tmp_path.name}-val", "0001")]

    def test_no_validation_leaves_the_split_out(self, tmp_path: Path) -> None:
        for split, stems in SPLITS.items():
            add(tmp_path / split / "images", tmp_path / split / "masks", *stems)
        data = load_training_data([tmp_path], Search(), validate=False)
        assert names(data.whole) == ["a", "b"] and data.given is None and data.unused == 1

    def test_training_says_which_split_validates(self, train, tmp_path: Path, capsys) -> None:
        for split, stems in SPLITS.items():
            place = tmp_path / "data" / split
            add(place / "images", place / "masks", *stems)
        assert train("--dry-run", data=tmp_path / "data") == 0
        out = capsys.readouterr().out
        assert "2 training and 1 validation images" in out
        assert "the validation split that comes with the data" in out
        assert train("--dry-run", "--val-fraction", "0", data=tmp_path / "data") == 0
        assert "the 1 images of val are not used" in capsys.readouterr().out

    def test_duts(self, tmp_path: Path) -> None:
        for part, name in (("TR", "a"), ("TE", "b")):
            add(tmp_path / f"DUTS-{part}-Image", tmp_path / f"DUTS-{part}-Mask", name)
        assert names(load_train([tmp_path])) == ["a"]
        assert [names(m) for m in load_eval(tmp_path).values()] == [["b"]]

    @pytest.mark.parametrize("others", [("ECSSD",), ("CSSD",), ("CSSD", "ECSSD")])
    def test_beside_duts_a_set_without_a_split_is_not_trained_on(
        self, tmp_path: Path, others: tuple[str, ...]
    ) -> None:
        """Whether its name comes before or after DUTS; what is left out is said."""
        for number, name in enumerate(("DUTS-TR", "DUTS-TE", *others)):
            add(tmp_path / f"{name}-Image", tmp_path / f"{name}-Mask", f"image{number}")
        train = load_train([tmp_path])
        assert names(train) == ["image0"] and {p.dataset for p in train.pairs} == {"DUTS"}
        tests = load_eval(tmp_path)
        assert {name: names(m) for name, m in tests.items()} == {"DUTS": ["image1"]}
        number = "1 image" if len(others) == 1 else "2 images"
        for notes in (train.notes, tests["DUTS"].notes):
            assert f"{number} of {', '.join(others)} without a split are not used" in notes[0]

    def test_sets_without_splits_are_all_used(self, tmp_path: Path) -> None:
        for name in ("CSSD", "ECSSD"):
            add(tmp_path / f"{name}-Image", tmp_path / f"{name}-Mask", name)
        assert names(load_train([tmp_path])) == ["CSSD", "ECSSD"]
        assert list(load_eval(tmp_path)) == ["CSSD", "ECSSD"]


class TestFolders:
    @pytest.mark.parametrize(
        ("images", "masks"),
        [
            ("JPEGImages", "SegmentationClass"),
            ("images", "ground_truth"),
            ("Imgs", "Groundtruth"),
            ("IMAGES", "labels"),
            ("img", "Annotations"),
            (".", "."),
        ],
    )
    def test_other_names(self, tmp_path: Path, images: str, masks: str) -> None:
        add(tmp_path / images, tmp_path / masks, "a", "b")
        assert names(load_train([tmp_path])) == ["a", "b"]

    @pytest.mark.parametrize("mask", ["{}_mask", "mask_{}", "{}-gt", "{}.jpg", "{}_sal_fuse"])
    def test_masks_with_an_affix(self, tmp_path: Path, mask: str) -> None:
        add(tmp_path / "images", tmp_path / "masks", "0001", "0002", "0011", mask=mask)
        found = load_train([tmp_path])
        assert [(p.name, p.mask.stem) for p in found.pairs] == [
            (name, mask.format(name)) for name in ("0001", "0002", "0011")
        ]
        assert f"matched by a rule: {mask.format('NAME')} for NAME" in found.notes[0]

    def test_a_flat_folder_with_named_masks(self, tmp_path: Path) -> None:
        add(tmp_path, tmp_path, "a", "b", mask="{}_mask", ending=".png")
        assert [p.mask.name for p in load_train([tmp_path]).pairs] == ["a_mask.png", "b_mask.png"]

    def test_classes_in_sub_folders(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "1")
        add(tmp_path / "Imgs/cat", tmp_path / "GT/cat", "1")
        found = load_train([tmp_path])
        assert [(p.name, p.group) for p in found.pairs] == [("1", ""), ("cat/1", "cat")]

    def test_classes_over_flat_masks(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs/cat", tmp_path / "GT", "1")
        add(tmp_path / "Imgs/dog", tmp_path / "GT", "2")
        assert names(load_train([tmp_path])) == ["cat/1", "dog/2"]

    def test_camo_coco_reads_camo_and_names_the_rest(self, tmp_path: Path) -> None:
        for part, start in (("Camouflage", 1), ("Non-Camouflage", 5)):
            for split in ("Train", "Test"):
                place = tmp_path / part
                add(place / "Images" / split, place / "GT", f"{split}_{start}")
        found = load_train([tmp_path])
        assert names(found) == ["Train_1"] and found.dataset == "CAMO"
        assert "not read: Non-Camouflage" in found.notes[0]

    def test_what_is_lacking_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "data" / "Imgs").mkdir(parents=True)
        with pytest.raises(DataError, match="Imgs was found, but no folder of masks"):
            load_train([tmp_path / "data"])
        (tmp_path / "data.zip").write_bytes(b"PK")
        with pytest.raises(DataError, match="is an archive: unpack it"):
            load_train([tmp_path / "data.zip"])

    def test_roots_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        for site in ("siteA", "siteB"):
            add(tmp_path / site / "data" / "Imgs", tmp_path / site / "data" / "GT", "1")
        roots = [tmp_path / "siteA" / "data", tmp_path / "siteB" / "data"]
        assert {p.dataset for p in load_train(roots).pairs} == {"siteA-data", "siteB-data"}
        assert list(load_eval(roots)) == ["siteA-data", "siteB-data"]
        assert load_train(roots[:1]).dataset == "data"
        found = examine_data(DataConfig(roots=tuple(map(str, roots))), copies=False)
        assert {facts.pair.dataset for facts in found.facts} == {"siteA-data", "siteB-data"}
        places = [Path("/x/a/d"), Path("/y/a/d"), Path("/y/b/d")]
        assert list(distinct_names(places).values()) == ["x-a-d", "y-a-d", "b-d"]


class TestNothingVanishes:
    @pytest.mark.parametrize(
        ("ending", "kind"),
        [
            *((".jfif", "JPEG"), (".jpe", "JPEG"), (".JPG", "JPEG"), (".gif", "GIF")),
            *((".ppm", "PPM"), (".tga", "TGA"), (".jp2", "JPEG2000"), (".avif", "AVIF")),
        ],
    )
    def test_other_endings_are_read(self, tmp_path: Path, ending: str, kind: str) -> None:
        if kind not in {
            Image.registered_extensions().get(e) for e in Image.registered_extensions()
        }:
            pytest.skip("this Pillow cannot write it")
        add(tmp_path / "Imgs", tmp_path / "GT", "a", "b")
        (tmp_path / "Imgs" / "b.jpg").unlink()
        Image.fromarray(np.full((8, 9, 3), 90, np.uint8)).save(
            tmp_path / "Imgs" / f"b{ending}", format=kind
        )
        found = load_train([tmp_path])
        assert names(found) == ["a", "b"]
        assert read_image(found.pairs[1].image).shape == (8, 9, 3)

    def test_masks_as_gif(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a", ending=".gif")
        assert names(load_train([tmp_path])) == ["a"]

    def test_links_to_nothing_are_faults(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a", "b")
        for path in (tmp_path / "Imgs" / "b.jpg", tmp_path / "GT" / "b.png"):
            path.unlink()
            path.symlink_to("/nowhere/.annex/" + path.name)
        found = load_train([tmp_path])
        assert names(found) == ["a", "b"]
        with pytest.raises(DataError, match=r"b\.jpg is a link to .*annex/b\.jpg.*git annex get"):
            require_readable(found)
        checked = examine_data(DataConfig(roots=(str(tmp_path),)), copies=False)
        assert [row[2:] for row in checked.clean_list] == [("b", "unreadable")]

    def test_pointers_of_git_lfs_are_named(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a")
        (tmp_path / "Imgs" / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(DataError, match="git lfs pull"):
            require_readable(load_train([tmp_path]))

    def test_other_files_are_counted_and_side_files_ignored(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a")
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.jpg"):
            (tmp_path / "Imgs" / name).write_bytes(b"x")
        (tmp_path / "Imgs" / ".ipynb_checkpoints").mkdir()
        (tmp_path / "Imgs" / ".ipynb_checkpoints" / "a-checkpoint.jpg").write_bytes(b"x")
        assert not load_train([tmp_path]).notes
        (tmp_path / "Imgs" / "b.heic").write_bytes(b"x")
        assert "1 file in" in load_train([tmp_path]).notes[0]
        assert ".heic 1 (for example b.heic)" in load_train([tmp_path]).notes[0]

    def test_folders_that_are_not_read_are_named(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a")
        write_png(tmp_path / "extra" / "deep" / "x.png", np.zeros((4, 4), np.uint8))
        write_jpeg(tmp_path / "Imgs" / "preview" / "x.jpg", np.zeros((4, 4, 3), np.uint8))
        notes = " ".join(load_train([tmp_path]).notes)
        assert "not read: extra" in notes and "are not used: preview" in notes

    def test_linked_folders_are_entered_once(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a")
        (tmp_path / "Imgs" / "again").symlink_to(".")
        assert names(load_train([tmp_path])) == ["a"]


class TestOtherSizes:
    @pytest.fixture
    def nc4k(self, tmp_path: Path) -> Path:
        add(tmp_path / "nc4k" / "Imgs", tmp_path / "nc4k" / "GT", *"abcd")
        mask = np.zeros((9, 11), np.uint8)
        mask[:4] = 255
        write_png(tmp_path / "nc4k" / "GT" / "b.png", mask)
        return tmp_path / "nc4k"

    def test_training(self, train, nc4k: Path, capsys) -> None:
        assert train("--dry-run", data=nc4k) == 3
        assert "--resize bilinear" in " ".join(capsys.readouterr().err.split())
        for cache in ("none", "ram"):
            assert train("--dry-run", "--resize", "bilinear", "--cache", cache, data=nc4k) == 0
            out = capsys.readouterr().out
            assert "resize      1 mask of another size" in out and "b (9x8, mask 11x9)" in out

    def test_doctor(self, nc4k: Path) -> None:
        strict = examine_data(DataConfig(roots=(str(nc4k),)), copies=False)
        assert any(f.level == "error" and "b.jpg is 9x8" in f.text for f in strict.findings)
        found = examine_data(DataConfig(roots=(str(nc4k),), resize="bilinear"), copies=False)
        assert not any(f.level == "error" for f in found.findings)
        (said,) = [f for f in found.findings if "another size" in f.text]
        assert [Path(file).name for file in said.files] == ["b.jpg"]

    def test_evaluation(self, tiny_run: Path, nc4k: Path, tmp_path: Path, capsys) -> None:
        from camoxpert.cli import main

        words = ["evaluate", str(tiny_run), "--data", str(nc4k), "-o", str(tmp_path / "out")]
        assert main(words) == 3
        assert main([*words, "--resize", "bilinear"]) == 0
        captured = capsys.readouterr()
        assert "nc4k: 1 mask of another size" in captured.err and "b (9x8" in captured.err


class TestReferring:
    """R2C7K: classes are in the names or in sub-folders; its open images are references."""

    def test_hidden_objects_by_split(self, tmp_path: Path) -> None:
        camo = tmp_path / "R2C7K" / "Camo"
        for split, stems in (("train", ("COD10K-CAM-1-Aquatic-3-Crab-32", "b")), ("test", ("c",))):
            add(camo / split / "Imgs" / "Crab", camo / split / "GT" / "Crab", *stems)
        reference = tmp_path / "R2C7K" / "Ref"
        add(reference / "Images" / "Crab", reference / "Saliency_ICON-R" / "Crab", "1", "2")
        train = load_train([tmp_path / "R2C7K"])
        assert (train.layout, train.dataset) == ("R2C7K", "R2C7K")
        assert names(train) == ["Crab/COD10K-CAM-1-Aquatic-3-Crab-32", "Crab/b"]
        assert [pair.group for pair in train.pairs] == ["Aquatic/Crab", "Crab"]
        assert names(find_test_sets([tmp_path / "R2C7K"])["R2C7K"]) == ["Crab/c"]
        assert any("not read: Ref" in note for note in train.notes) or len(train.notes) == 0
        shown = load_train([reference])
        assert shown.layout == "R2C7K references"
        assert [(pair.name, pair.group) for pair in shown.pairs] == [
            ("Crab/1", "Crab"),
            ("Crab/2", "Crab"),
        ]
