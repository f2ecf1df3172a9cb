"""Layouts, pairing and splits: every file found is used or reported."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from camoxpert.config import DataConfig
from camoxpert.data.files.headers import require_readable
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.layouts import class_of
from camoxpert.data.files.manifest import (
    Manifest,
    Search,
    concat,
    find_test_sets,
    load_eval,
    load_train,
)
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.split import split_validation
from camoxpert.doctor.dataset import examine_data
from camoxpert.errors import ConfigError, DataError

REAL = Path(__file__).parents[3] / "shared" / "data"
CRAB = "COD10K-CAM-1-Aquatic-3-Crab-32"
CAT = "COD10K-CAM-2-Terrestrial-23-Cat-1506"
SHORT = "COD10K-NonCAM-3-Flying-1515"
LONG = "COD10K-NonCAM-5-Background-5-Vegetation-4854"


def add(images: Path, masks: Path, *names: str, mask_names: tuple[str, ...] = ()) -> None:
    for name, mask in zip(names, mask_names or names, strict=True):
        write_jpeg(images / f"{name}.jpg", np.zeros((8, 9, 3), np.uint8))
        write_png(masks / f"{mask}.png", np.full((8, 9), 255, np.uint8))


def names(manifest: Manifest) -> list[str]:
    return [pair.name for pair in manifest.pairs]


class TestLayouts:
    @pytest.mark.parametrize("inner", ["", "COD10K-v3"])
    @pytest.mark.parametrize("masks", ["GT_Object", "Mask"])
    def test_cod10k(self, tmp_path: Path, inner: str, masks: str) -> None:
        root = tmp_path / inner
        add(root / "Train" / "Image", root / "Train" / masks, CRAB, SHORT, LONG)
        add(root / "Test" / "Image", root / "Test" / masks, CAT)
        (root / "Info").mkdir()
        train = load_train([tmp_path])
        assert names(train) == [CRAB] and train.excluded == 2 and train.layout == "COD10K-v3"
        assert "2 images without a camouflaged object" in train.notes[0]
        assert len(load_train([tmp_path], Search(noncam="include"))) == 3
        assert {k: names(v) for k, v in find_test_sets([tmp_path]).items()} == {"COD10K": [CAT]}

    @pytest.mark.parametrize("flat", [True, False])
    def test_camo(self, tmp_path: Path, flat: bool) -> None:
        for split, name in (("Train", "camourflage_00001"), ("Test", "camourflage_00002")):
            masks = tmp_path / "GT" if flat else tmp_path / "GT" / split
            add(tmp_path / "Images" / split, masks, name)
        assert names(load_train([tmp_path])) == ["camourflage_00001"]
        assert names(find_test_sets([tmp_path])["CAMO"]) == ["camourflage_00002"]
        assert not load_train([tmp_path]).notes

    def test_train_and_test_dataset(self, tmp_path: Path) -> None:
        add(tmp_path / "TrainDataset" / "Imgs", tmp_path / "TrainDataset" / "GT", "a", "b")
        for name in ("CAMO", "NC4K"):
            add(
                tmp_path / "TestDataset" / name / "Imgs",
                tmp_path / "TestDataset" / name / "GT",
                "c",
            )
        assert names(load_train([tmp_path])) == ["a", "b"]
        assert set(find_test_sets([tmp_path])) == {"CAMO", "NC4K"}
        assert set(load_eval(tmp_path / "TestDataset")) == {"CAMO", "NC4K"}
        assert list(load_eval(tmp_path / "TestDataset" / "CAMO")) == ["CAMO"]

    def test_chameleon_of_the_authors(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "masks", "animal-1", mask_names=("mask-1",))
        assert load_eval(tmp_path)[tmp_path.name].pairs[0].mask.name == "mask-1.png"

    @pytest.mark.parametrize(
        ("images", "masks"), [("Imgs", "GT"), ("images", "masks"), ("im", "gt")]
    )
    def test_plain_folders(self, tmp_path: Path, images: str, masks: str) -> None:
        add(tmp_path / images, tmp_path / masks, "a")
        assert names(load_train([tmp_path])) == ["a"]
        assert find_test_sets([tmp_path]) == {}
        assert load_eval(tmp_path)[tmp_path.name].split == "all"

    def test_duts(self, tmp_path: Path) -> None:
        add(tmp_path / "DUTS-TR-Image", tmp_path / "DUTS-TR-Mask", "a")
        assert names(load_train([tmp_path])) == ["a"]

    def test_several_roots(self, tmp_path: Path) -> None:
        for root in ("x", "y"):
            add(tmp_path / root / "Imgs", tmp_path / root / "GT", "a")
        both = load_train([tmp_path / "x", tmp_path / "y"])
        assert [(p.dataset, p.name) for p in both.pairs] == [("x", "a"), ("y", "a")]
        with pytest.raises(DataError, match="given twice"):
            load_train([tmp_path / "x", tmp_path / "x"])

    def test_csv(self, tmp_path: Path) -> None:
        add(tmp_path / "i", tmp_path / "m", "a", "b", "c")
        rows = [
            f"i/{n}.jpg,m/{n}.png,{s},{c}"
            for n, s, c in (("a", "train", "cat"), ("b", "test", "dog"))
        ]
        table = tmp_path / "pairs.csv"
        table.write_text("image,mask,split,class\n" + "\n".join(rows))
        train = load_train([table])
        assert names(train) == ["i/a"] and train.pairs[0].group == "cat"
        assert names(find_test_sets([table])["pairs"]) == ["i/b"]

    def test_rows_without_a_split_beside_others_are_named(self, tmp_path: Path) -> None:
        add(tmp_path / "i", tmp_path / "m", *"abcd")
        table = tmp_path / "pairs.csv"
        for splits, left_out in ((("train", "test", "", "all"), 2), (("", "", "", ""), 0)):
            rows = [f"i/{n}.jpg,m/{n}.png,{s}" for n, s in zip("abcd", splits, strict=True)]
            table.write_text("image,mask,split\n" + "\n".join(rows))
            notes = " ".join(load_train([table]).notes)
            said = "2 images of pairs without a split are not used, because others have one"
            assert (said in notes) is bool(left_out)
            found = examine_data(DataConfig(roots=(str(table),)), copies=False)
            assert [f.level for f in found.findings if said in f.text] == ["warning"] * (
                left_out // 2
            )

    def test_a_group_in_several_splits_is_named(self, tmp_path: Path) -> None:
        add(tmp_path / "i", tmp_path / "m", *"abcd")
        table = tmp_path / "pairs.csv"
        rows = [
            f"i/{n}.jpg,m/{n}.png,{s},{g}"
            for n, s, g in zip("abcd", ("train", "val", "train", "test"), "xxyz", strict=True)
        ]
        table.write_text("image,mask,split,group\n" + "\n".join(rows))
        assert "1 group (x) is in more than one split" in " ".join(load_train([table]).notes)
        table.write_text(table.read_text().replace("val,x", "val,w"))
        assert "more than one split" not in " ".join(load_train([table]).notes)

    @pytest.mark.parametrize("bad", ["../secret.png", "/etc/passwd"])
    def test_csv_stays_in_its_folder(self, tmp_path: Path, bad: str) -> None:
        add(tmp_path / "i", tmp_path / "i", "a")
        (tmp_path / "pairs.csv").write_text(f"image,mask\ni/a.jpg,{bad}\n")
        with pytest.raises(DataError, match=r"line 2.*not a path inside"):
            load_train([tmp_path / "pairs.csv"])


class TestMistakes:
    def test_bad_paths(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file or folder"):
            load_train([tmp_path / "nowhere"])
        (tmp_path / "stuff").mkdir()
        with pytest.raises(DataError, match=r"No known data set layout.*it holds: stuff"):
            load_train([tmp_path])
        with pytest.raises(ConfigError, match="known layouts"):
            load_train([tmp_path], Search(layout="COD11K"))

    def test_missing_masks_are_counted_and_named(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a", "b", "c")
        (tmp_path / "GT" / "b.png").rename(tmp_path / "GT" / "bb.png")
        with pytest.raises(DataError, match=r"1 of 3 images have no mask.*: b\. .*example bb"):
            load_train([tmp_path])

    def test_extra_masks_are_said(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a", "b")
        (tmp_path / "Imgs" / "b.jpg").unlink()
        assert "1 masks have no image (b)" in load_train([tmp_path]).notes[0]

    def test_doubled_stems(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", "a")
        write_png(tmp_path / "Imgs" / "a.png", np.zeros((8, 9, 3), np.uint8))
        with pytest.raises(DataError, match="same name"):
            load_train([tmp_path])

    def test_accents_and_capitals_of_endings(self, tmp_path: Path) -> None:
        composed = unicodedata.normalize("NFC", "caf\u00e9")
        add(tmp_path / "Imgs", tmp_path / "GT", composed)
        image = tmp_path / "Imgs" / f"{composed}.jpg"
        image.rename(image.with_name(unicodedata.normalize("NFD", composed) + ".JPG"))
        assert names(load_train([tmp_path])) == [composed]

    def test_faulty_files_are_listed_together(self, tmp_path: Path) -> None:
        add(tmp_path / "Imgs", tmp_path / "GT", *"abcdef")
        (tmp_path / "Imgs" / "b.jpg").write_bytes(b"")
        data = (tmp_path / "Imgs" / "c.jpg").read_bytes()
        (tmp_path / "Imgs" / "c.jpg").write_bytes(data[: len(data) // 2])
        write_png(tmp_path / "GT" / "d.png", np.zeros((8, 8), np.uint8))
        with pytest.raises(DataError) as caught:
            require_readable(load_train([tmp_path]))
        text = str(caught.value)
        assert text.startswith("3 of 6 pairs")
        assert all(name in text for name in ("b.jpg", "c.jpg", "d.jpg")) and "a.jpg" not in text


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (CRAB, "Aquatic/Crab"),
        (CAT, "Terrestrial/Cat"),
        (SHORT, "NonCAM"),
        (LONG, "NonCAM"),
        ("In_12", "In"),
        ("animal-7", "animal"),
        ("DSC-2024-11", ""),
        ("12345", ""),
    ],
)
def test_classes_in_names(name: str, group: str) -> None:
    assert class_of(name) == group


def manifest_of(*counts: tuple[str, int]) -> Manifest:
    pairs = [
        Pair(f"{group}_{i}", Path(f"{group}{i}.jpg"), Path(f"{group}{i}.png"), "set", group)
        for group, count in counts
        for i in range(count)
    ]
    return Manifest(tuple(pairs), "set", "train", "test")


class TestValidationSplit:
    def test_every_class_gives_its_share(self) -> None:
        train, validation = split_validation(manifest_of(("a", 50), ("b", 30), ("c", 20)), 0.1, 0)
        assert Counter(p.group for p in validation.pairs) == {"a": 5, "b": 3, "c": 2}
        assert not set(train.pairs) & set(validation.pairs) and len(train) == 90

    def test_the_order_on_disk_does_not_matter_and_the_seed_does(self) -> None:
        manifest = manifest_of(("a", 20), ("b", 20))
        mixed = list(manifest.pairs)
        random.Random(1).shuffle(mixed)
        _, first = split_validation(manifest, 0.2, 7)
        _, second = split_validation(replace(manifest, pairs=tuple(mixed)), 0.2, 7)
        _, other = split_validation(manifest, 0.2, 8)
        assert set(first.pairs) == set(second.pairs) != set(other.pairs)

    @pytest.mark.parametrize(
        ("count", "fraction", "expected"), [(40, 0, 0), (3, 0.1, 1), (1, 0.1, 0), (69, 0.1, 7)]
    )
    def test_sizes(self, count: int, fraction: float, expected: int) -> None:
        manifest = concat([manifest_of(*((f"c{i}", 1) for i in range(count)))])
        train, validation = split_validation(manifest, fraction, 0)
        assert (len(train), len(validation)) == (count - expected, expected)

    @pytest.mark.parametrize("seed", range(5))
    def test_a_family_is_never_split(self, seed: int) -> None:
        manifest = manifest_of(("a", 60), ("b", 40))
        families = [[i, i + 30] for i in range(20)] + [[60, 61, 62, 55]]
        _, alone = split_validation(manifest, 0.2, seed)
        train, validation = split_validation(manifest, 0.2, seed, families)
        place = {pair: "train" for pair in train.pairs} | {p: "val" for p in validation.pairs}
        parts = [{place[manifest.pairs[i]] for i in family} for family in families]
        assert all(len(part) == 1 for part in parts)
        assert 18 <= len(validation) <= 20 and len(train) + len(validation) == 100
        # Control: without the families some are split.
        chosen = set(alone.pairs)
        assert any(len({manifest.pairs[i] in chosen for i in f}) == 2 for f in families)

    def test_without_families_nothing_changes(self) -> None:
        """The split of data without copies is that of earlier versions."""
        manifest = manifest_of(("a", 25), ("b", 13), ("c", 2))
        _, validation = split_validation(manifest, 0.1, 3)
        digest = hashlib.sha256(" ".join(names(validation)).encode()).hexdigest()[:12]
        assert digest == "824aa2ffb291"

    def test_large_families(self) -> None:
        """Frames of videos: every clip is a family."""
        manifest = manifest_of(("a", 40))
        clips = [list(range(start, start + 10)) for start in range(0, 40, 10)]
        train, validation = split_validation(manifest, 0.1, 0, clips)
        assert (len(train), len(validation)) == (30, 10), "the smallest one, whole"
        train, validation = split_validation(manifest, 0.1, 0, [list(range(40))])
        assert (len(train), len(validation)) == (40, 0), "nothing can be set aside"


def test_the_hash_follows_content_not_place(tmp_path: Path) -> None:
    for root in ("x", "y"):
        add(tmp_path / root / "data" / "Imgs", tmp_path / root / "data" / "GT", "a", "b")
    first, second = (load_train([tmp_path / root / "data"]).content_hash() for root in ("x", "y"))
    assert first == second
    write_jpeg(tmp_path / "y" / "data" / "Imgs" / "a.jpg", np.zeros((80, 90, 3), np.uint8))
    assert load_train([tmp_path / "y" / "data"]).content_hash() != first


@pytest.mark.skipif(not (REAL / "steel").is_dir(), reason="the real images are missing")
def test_real_images() -> None:
    train = load_train([REAL / "steel"])
    assert len(train) == 720
    assert Counter(p.group for p in train.pairs) == {"In": 240, "Pa": 240, "Sc": 240}
    require_readable(train)
    assert {k: len(v) for k, v in find_test_sets([REAL / "steel"]).items()} == {"steel": 180}


def test_a_csv_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("image,mask\nkäfer.jpg,käfer.png\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a CSV in UTF-8"):
        load_train([tmp_path / "list.csv"])
