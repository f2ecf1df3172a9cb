"""What lies in the folder of made images already, and which sources give them."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.printed import complained
from PIL import Image
from synthesis.test_relight_command import files_of, rows_of
from synthesis.test_relight_command import make as make_many

from camoxpert.cli import main
from camoxpert.data.files import image_io
from camoxpert.data.files.manifest import load_train
from camoxpert.synthesis.compose.cached import Source, backgrounds_of
from camoxpert.synthesis.lightsource import read_depth
from camoxpert.synthesis.records import PAIRS
from camoxpert.synthesis.toy import generate_toy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "toys"
    generate_toy(root, num_train=3, num_test=2, size=96, difficulty=0.3, seed=4)
    return root


def make(data: Path, out: Path, *words: str) -> int:
    return make_many(data, out, "--per-image", "1", *words)


def flat(data: Path, root: Path) -> Path:
    """Copy the training images as a layout without splits."""
    shutil.copytree(data / "TrainDataset" / "Imgs", root / "Imgs")
    shutil.copytree(data / "TrainDataset" / "GT", root / "GT")
    return root


def compose(*words: str | Path, out: Path) -> int:
    base = ["synthesize", "compose", "-o", str(out), "--num-samples", "2", "--no-page"]
    return main([*base, *map(str, words)])


class TestFolder:
    def test_a_data_set_of_another_layout_is_not_hidden(self, data, tmp_path: Path, capsys) -> None:
        """Beside TrainDataset/ its own images would not be read any more."""
        own = flat(data, tmp_path / "own")
        before = sorted(own.rglob("[!.]*"))
        for out in (own, own / "Imgs"):
            assert make(own, out) == 2
            assert "Made images are not put among others" in complained(capsys)
        assert sorted(own.rglob("[!.]*")) == before
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        assert make(own, tmp_path / "out") == 0, "notes are no data"

    def test_another_format_leaves_nothing_of_the_first(self, data: Path, tmp_path: Path) -> None:
        for form in ("jpg", "png", "jpg"):
            assert make(data, tmp_path / "out", "--format", form, "--overwrite") == 0
            endings = {Path(name).suffix for name in files_of(tmp_path / "out") if "Imgs" in name}
            assert endings == {f".{form}"}
            assert len(load_train([tmp_path / "out"])) == 3

    def test_images_whose_sources_are_not_given_any_more_are_named(
        self, data: Path, tmp_path: Path, capsys
    ) -> None:
        clean, out = tmp_path / "clean.csv", tmp_path / "out"
        assert make(data, out) == 0
        assert "still holds" not in capsys.readouterr().err
        pair = load_train([data]).pairs[0]
        with clean.open("w", newline="") as file:
            rows = [("dataset", "split", "name", "reason"), (pair.dataset, "train", pair.name, "x")]
            csv.writer(file).writerows(rows)
        assert make(data, out, "--clean-list", str(clean)) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert f"{out} still holds 1 image of an earlier call" in said and f"{pair.name}_r1" in said

    def test_a_source_that_fails_now_leaves_no_image_without_a_row(
        self, data: Path, tmp_path: Path
    ) -> None:
        own, out = tmp_path / "own", tmp_path / "out"
        shutil.copytree(data, own)
        assert make(own, out) == 0
        mask = load_train([own]).pairs[0].mask
        cv2.imwrite(str(mask), np.zeros_like(cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)))
        assert make(own, out) == 3
        made = {Path(name).stem for name in files_of(out)}
        assert len(made) == 2
        with (out / PAIRS).open() as file:
            assert {Path(row["image"]).stem for row in csv.DictReader(file)} == made

    @pytest.mark.parametrize("kind", ["toy", "relight", "compose", "counterfactual"])
    def test_a_negative_seed(self, data: Path, tmp_path: Path, capsys, kind: str) -> None:
        place = [str(tmp_path / "out")] if kind == "toy" else ["--dataset-path", str(data)]
        place += [] if kind == "toy" else ["-o", str(tmp_path / "out")]
        assert main(["synthesize", kind, *place, "--seed", "-1"]) == 2
        assert "a seed is 0 or more" in complained(capsys)


class TestSources:
    def test_two_roots_with_the_same_names_take_their_own_maps(
        self, data: Path, tmp_path: Path, capsys
    ) -> None:
        names = [p.stem for p in sorted((data / "TrainDataset" / "Imgs").iterdir())]
        roots = [flat(data, tmp_path / name) for name in ("here", "there")]
        maps, size = tmp_path / "maps", cv2.imread(str(next((roots[0] / "GT").iterdir()))).shape[:2]
        for number, root in enumerate(roots):
            for name in names:
                pixels = np.zeros(size, np.uint8)
                pixels[8:30, 5 + 10 * number : 25 + 10 * number] = 255
                (maps / root.name).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(maps / root.name / f"{name}.png"), pixels)
        words = ("--mask-source", str(maps), str(roots[1]))
        base = [
            "synthesize",
            "relight",
            "-o",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--no-page",
        ]
        asked = [*base, "--dataset-path", str(roots[0]), words[2], *words[:2]]
        assert main(asked) == 0
        for number, root in enumerate(roots):
            made = tmp_path / "out" / "TrainDataset" / "GT" / root.name
            for path in made.iterdir():
                columns = np.flatnonzero(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).any(0))
                assert columns[0] == 5 + 10 * number, "not those of the other root"
        # Control: maps of one root do not stand for those of the other.
        alone = [*asked[:3], str(tmp_path / "no"), *asked[4:-1], str(maps / "here")]
        capsys.readouterr()
        assert main(alone) == 3
        assert "have no map" in complained(capsys)

    def test_test_images_of_any_list_are_kept_out_of_all(
        self, data: Path, tmp_path: Path, capsys
    ) -> None:
        """The test set of the objects' data guards the backgrounds, too."""
        tested = min((data / "TestDataset").rglob("Imgs/*"))
        grounds = tmp_path / "grounds"
        grounds.mkdir()
        Image.open(tested).convert("RGB").save(grounds / "other.jpg", quality=88)
        words = ("--dataset-path", data, "--backgrounds", grounds)
        assert compose(*words, out=tmp_path / "out") == 3
        assert "other.jpg" in complained(capsys)
        assert compose(*words, "--allow-test-sources", out=tmp_path / "out") == 0
        assert all("other.jpg" in row["test_source"] for row in rows_of(tmp_path / "out")[1:])

    def test_folders_of_the_same_name_are_told_apart(self, data: Path, tmp_path: Path) -> None:
        images = data / "TrainDataset" / "Imgs"
        grounds = [Path(shutil.copytree(images, tmp_path / s / "photos")) for s in ("a", "b")]
        words = ("--dataset-path", data, "--backgrounds", *grounds)
        assert compose(*words, out=tmp_path / "out") == 0
        # Control: the same folder twice is a mistake.
        assert compose(*words[:3], grounds[0], grounds[0], out=tmp_path / "no") == 3

    def test_a_mark_is_not_lost_where_a_second_list_names_the_file(self) -> None:
        from camoxpert.synthesis.composed import _all_files, _Pictures
        from camoxpert.synthesis.composing import SourceFile

        leak, plain = SourceFile("a", "", "a copy"), SourceFile("a", "", "")
        for lists in ([leak, plain], [plain, leak]):
            files = _all_files(*(_Pictures(files={"x": known}) for known in lists))
            assert files["x"].leak == "a copy"

    def test_a_damaged_cut_out_is_left_out_and_named(self, data, tmp_path: Path, capsys) -> None:
        cut = tmp_path / "cut"
        cut.mkdir()
        pixels = np.full((24, 24, 4), 200, np.uint8)
        pixels[:6, :, 3] = pixels[:, 18:, 3] = 0
        for name in "abc":
            Image.fromarray(pixels).save(cut / f"{name}.png")
        whole = (cut / "b.png").read_bytes()
        (cut / "b.png").write_bytes(whole[: len(whole) - 40])
        grounds = data / "TrainDataset" / "Imgs"
        words = ("--cutouts", cut, "--backgrounds", grounds)
        assert compose(*words, out=tmp_path / "out") == 3
        said = capsys.readouterr()
        assert "b.png" in said.err and "2 images made" in said.out

    def test_max_pixels_holds_in_both_directions(
        self, data: Path, tmp_path: Path, capsys, monkeypatch
    ) -> None:
        words = ("--dataset-path", data, "--max-pixels", "5000")
        assert compose(*words, out=tmp_path / "a") == 3
        assert "--max-pixels" in complained(capsys)
        # What the user allows is read, even where the usual limit is lower.
        for read in (image_io.probe, image_io.read_image, image_io.read_mask, image_io.read_pair):
            monkeypatch.setitem(read.__kwdefaults__, "max_pixels", 5000)
        assert compose(*words[:3], "10000", out=tmp_path / "b") == 0

    def test_the_size_of_a_background_is_that_of_its_pixels(self, tmp_path: Path) -> None:
        """A mask of the stored pixels: the rotation in the EXIF is applied to neither."""
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
        mask = np.zeros((60, 90), np.uint8)
        mask[20:40, 30:60] = 255
        Image.fromarray(mask).save(tmp_path / "a.png")
        found = {}
        for name, file in (("stored", tmp_path / "a.png"), ("turned", "")):
            index, _ = backgrounds_of([Source("a", str(tmp_path / "a.jpg"), str(file))])
            found[name] = index.entries[0].height, index.entries[0].width
        assert found == {"stored": (60, 90), "turned": (90, 60)}


class TestNumbers:
    def test_unknown_depths_are_far_away(self, tmp_path: Path) -> None:
        levels = np.linspace(1, 5, 48 * 48, dtype=np.float32).reshape(48, 48)
        holes = levels.copy()
        holes[3, 4], holes[5, 6], holes[7, 8] = np.nan, np.inf, -np.inf
        for name, values in (("whole", levels), ("holes", holes), ("empty", levels * np.nan)):
            Image.fromarray(values).save(tmp_path / f"{name}.tif")
        found = read_depth(tmp_path / "holes.tif", (48, 48))
        whole = read_depth(tmp_path / "whole.tif", (48, 48))
        known = np.isfinite(holes)
        assert np.array_equal(found[known], whole[known]) and (found[~known] == 1).all()
        with pytest.raises(Exception, match="single value"):
            read_depth(tmp_path / "empty.tif", (48, 48))

    def test_the_smallest_images_are_lit(self, tmp_path: Path) -> None:
        generate_toy(tmp_path / "small", num_train=2, num_test=0, size=32, difficulty=0.1, seed=1)
        for path in (tmp_path / "small" / "TrainDataset").rglob("*.*"):
            kind = cv2.INTER_NEAREST if "GT" in path.parts else cv2.INTER_AREA
            cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (18, 18), interpolation=kind))
        assert make(tmp_path / "small", tmp_path / "out") == 0
        made = [cv2.imread(str(p)) for p in (tmp_path / "out/TrainDataset/Imgs").iterdir()]
        assert len(made) == 2 and all(image.std() > 5 for image in made)
