"""``synthesize relight`` from the command line: what it writes, resumes, refuses and says."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from helpers.ledger import same_work
from helpers.pages import active_parts

from camoxpert.cli import main
from camoxpert.data.files.image_io import encode, read_image, read_pair
from camoxpert.data.files.labels import VOID
from camoxpert.data.files.manifest import load_train
from camoxpert.data.files.masks import binary_mask
from camoxpert.synthesis.records import (
    LEDGER,
    PAGE,
    PAIRS,
    PROVENANCE,
    QUALITY,
    Head,
    encode_mask,
)
from camoxpert.synthesis.relight.draw import Light
from camoxpert.synthesis.relight.pipeline import relight
from camoxpert.synthesis.timetable import stage_rows, warm_up
from camoxpert.synthesis.toy import generate_toy

SOURCES = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "toys"
    generate_toy(root, num_train=SOURCES, num_test=3, size=48, difficulty=0.3, seed=4)
    return root


def make(data: Path | str, out: Path, *words: str, source: str = "--dataset-path") -> int:
    base = ["synthesize", "relight", source, str(data), "-o", str(out), "--device", "cpu"]
    if "--devices" in words or "--num-gpus" in words:
        base = base[:-2]
    # Charts take longer than all the rest.
    return main([*base, *words, *(() if "--page" in words else ("--no-page",))])


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "relit"
    assert make(data, out, "--per-image", "2", "--batch-size", "4", "--page") == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "TrainDataset").rglob("*"))
        if path.is_file()
    }


def rows_of(folder: Path, name: str = PROVENANCE) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def everything(folder: Path) -> dict[str, Any]:
    """Return all that a run leaves but measured times."""
    ledger = [same_work(row) for row in rows_of(folder, LEDGER)]
    with (folder / PAIRS).open() as file:
        table = [line[:-1] for line in csv.reader(file)]
    provenance = (folder / PROVENANCE).read_text()
    return {"files": files_of(folder), "ledger": ledger, "table": table, "rows": provenance}


def test_masks_are_exact_and_train_reads_the_result(data: Path, made: Path) -> None:
    found, real = load_train([made]), load_train([data])
    assert len(found) == 2 * SOURCES
    by_name = {pair.name: read_pair(pair.image, pair.mask) for pair in real.pairs}
    changes = []
    for pair in found.pairs:
        image, mask = read_pair(pair.image, pair.mask)
        before, truth = by_name[pair.name.rpartition("_r")[0]]
        assert np.array_equal(mask, truth) and image.shape == before.shape
        changes.append(np.abs(image.astype(int) - before)[truth == 255].mean())
    assert np.mean(changes) > 5, "they were relit"
    listed = load_train([made / PAIRS])
    assert len(listed) == len(found)


@pytest.mark.parametrize("words", [("--batch-size", "1"), ("--devices", "cpu,cpu")])
def test_the_same_bytes_whatever_the_batch_and_the_processes(data, made, tmp_path, words) -> None:
    assert make(data, tmp_path / "out", "--per-image", "2", "--batch-size", "4", *words) == 0
    assert everything(tmp_path / "out") == everything(made)


def test_neutral_light_gives_the_source(data: Path, tmp_path: Path) -> None:
    """The whole way, from file to file: within one level."""
    words = ("--strength", "0", "--patterns", "--format", "png", "--per-image", "1")
    assert make(data, tmp_path / "out", *words) == 0
    for path in (data / "TrainDataset" / "Imgs").iterdir():
        made = read_image(tmp_path / "out" / "TrainDataset" / "Imgs" / f"{path.stem}_r1.png")
        assert np.abs(made.astype(int) - read_image(path)).max() <= 1


def test_the_same_bytes_whatever_the_threads(data: Path, made: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        assert make(data, tmp_path / "out", "--per-image", "2") == 0
    finally:
        torch.set_num_threads(1)
    assert files_of(tmp_path / "out") == files_of(made)


def test_overwrite_leaves_nothing_of_other_settings(data, made, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    assert make(data, out, "--per-image", "1", "--seed", "3", "--overwrite") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{SOURCES} images made with other settings are removed" in said
    assert len(files_of(out)) == 2 * SOURCES == 2 * len(load_train([out]))
    assert make(data, tmp_path / "new", "--per-image", "1", "--seed", "3") == 0
    assert files_of(out) == files_of(tmp_path / "new")


def test_made_images_are_not_put_among_others(data: Path, tmp_path: Path, capsys) -> None:
    real = tmp_path / "toys"
    shutil.copytree(data, real)
    for more in ((), ("--overwrite",)):
        assert make(data, real, *more) == 2
        assert "Made images are not put among others" in " ".join(capsys.readouterr().err.split())
    assert files_of(real) == files_of(data)


def test_a_deadline_leaves_work_that_the_same_command_finishes(data, made, tmp_path) -> None:
    out = tmp_path / "out"
    assert make(data, out, "--per-image", "2", "--max-hours", "1e-9") == 75
    assert make(data, out, "--per-image", "2") == 0
    assert files_of(out) == files_of(made)


def test_stages_add_up_and_models_are_counted(made: Path) -> None:
    summary = json.loads((made / "relight.json").read_text())
    rows = stage_rows(summary)
    assert rows[-1][2] == "100.0%"
    assert sum(float(share[:-1]) for _, _, share in rows[:-1]) == pytest.approx(100, abs=0.6)
    assert {"albedo", "height", "shadows", "recombine", "write"} <= {name for name, _, _ in rows}
    assert summary["model_loads"] == 0 and warm_up(summary) is not None


def test_a_row_of_the_provenance_is_enough_to_make_the_image_again(made: Path) -> None:
    first, *rows = rows_of(made)
    assert set(first) == {"settings", "values"} and len(rows) == 2 * SOURCES
    row = rows[3]
    sources = {source["role"]: source["path"] for source in row["sources"]}
    image, mask = map(np.array, read_pair(sources["image"], sources["mask"]))
    light = Light.from_record(row["parameters"])
    found = relight(
        torch.from_numpy(image).permute(2, 0, 1)[None],
        torch.from_numpy(mask)[None, None],
        [light],
    ).images_B3HW[0]
    again = found.permute(1, 2, 0).numpy()
    kept = read_image(made / row["image"]).astype(int)
    # Albedo and height were rounded to half precision, the image by JPEG.
    stored = cv2.imdecode(np.frombuffer(encode(again, ".jpg", quality=QUALITY), np.uint8), 1)
    assert np.abs(kept - stored[..., ::-1]).mean() < 0.3
    other = relight(
        torch.from_numpy(image).permute(2, 0, 1)[None],
        torch.from_numpy(mask)[None, None],
        [Light.from_record(rows[2]["parameters"])],
    ).images_B3HW[0]
    assert np.abs(kept - other.permute(1, 2, 0).numpy()).mean() > 1, "another light differs"


def test_a_second_call_makes_nothing_and_more_lights_are_added(
    data, made, tmp_path, capsys
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    assert make(data, out, "--per-image", "2") == 0
    assert "0 images made, 10 were there already" in capsys.readouterr().out
    assert make(data, out, "--num-samples", "12") == 0
    assert "2 images made, 10 were there already" in capsys.readouterr().out
    before, after = files_of(made), files_of(out)
    assert before.items() <= after.items() and len(after) == len(before) + 4


def test_limit_and_other_settings(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert make(data, out, "--per-image", "1", "--limit", "3") == 0
    assert len(files_of(out)) == 6
    capsys.readouterr()
    assert make(data, out, "--seed", "5", "--strength", "0.5") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "3 images made with other settings: --seed 0, now 5; light strength 1, now 0.5" in said
    assert make(data, out, "--per-image", "1") == 0
    assert "2 images made, 3 were there already" in capsys.readouterr().out


def test_caches_say_hit_or_why_not(data: Path, tmp_path: Path, capsys) -> None:
    cache = ("--cache-dir", str(tmp_path / "cache"), "--per-image", "1")
    assert make(data, tmp_path / "a", *cache) == 0
    assert f"albedo: miss: not made yet {SOURCES}" in capsys.readouterr().out
    assert make(data, tmp_path / "strict", *cache, "--strict-cache", "--seed", "1") == 0
    assert f"albedo: hit {SOURCES}" in capsys.readouterr().out
    assert make(data, tmp_path / "b", *cache) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b"), "found or computed: no difference"
    entries = sorted((tmp_path / "cache" / "stages" / "albedo").rglob("*.bin"))
    entries[0].write_bytes(entries[0].read_bytes()[:-1] + b"?")
    entries[1].unlink()
    capsys.readouterr()
    assert make(data, tmp_path / "strict", *cache, "--strict-cache", "--seed", "2") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--strict-cache: the stage albedo has no cached result for 2 sources" in said
    assert make(data, tmp_path / "c", *cache) == 0
    said = capsys.readouterr().out
    assert f"albedo: hit {SOURCES - 2}; corrupt: rebuilt 1; miss: not made yet 1" in said
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c")


def test_a_broken_source_is_a_failed_row(data: Path, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "toys"
    shutil.copytree(data, broken)
    victim = min((broken / "TrainDataset" / "Imgs").iterdir())
    victim.write_bytes(victim.read_bytes()[:300])
    out = tmp_path / "out"
    assert make(broken, out, "--per-image", "2") == 3
    assert victim.name in capsys.readouterr().err
    rows = [row for row in rows_of(out, LEDGER) if row.get("status") == "failed"]
    assert [row["item"] for row in rows] == [f"{victim.stem}_r1", f"{victim.stem}_r2"]
    assert len(files_of(out)) == 2 * 2 * (SOURCES - 1)
    # Repaired, it is made by the same command, and nothing else is.
    shutil.copy(data / "TrainDataset" / "Imgs" / victim.name, victim)
    assert make(broken, out, "--per-image", "2") == 0
    assert "2 images made" in capsys.readouterr().out


def test_sources_too_small_or_without_an_object_are_rows(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    sizes = {"dot": (1, 1), "line": (3, 200), "good": (16, 40), "empty": (40, 40)}
    for name, (height, width) in sizes.items():
        mask = np.zeros((height, width), np.uint8)
        mask[: max(1, height // 2), : max(1, width // 2)] = 0 if name == "empty" else 255
        image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        for folder, pixels in (("Imgs", image), ("GT", mask)):
            (tmp_path / "odd" / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "odd" / folder / f"{name}.png"), pixels)
    assert make(tmp_path / "odd", tmp_path / "out", "--per-image", "3") == 3
    said = capsys.readouterr()
    # Lines are broken by the length of the paths in them.
    faults = " ".join(said.err.split())
    assert "3 images made" in said.out and "3 sources could not be used" in faults
    assert "200x3 pixels" in faults and "shows no object" in faults
    assert {Path(name).stem[:4] for name in files_of(tmp_path / "out")} == {"good"}


class TestLeaks:
    def test_a_copy_of_a_test_image_is_refused_with_its_name(self, data, tmp_path, capsys) -> None:
        leaky = tmp_path / "toys"
        shutil.copytree(data, leaky)
        test = min((data / "TestDataset").rglob("*.jpg"))
        small = cv2.resize(cv2.imread(str(test)), (44, 44))
        cv2.imwrite(str(leaky / "TrainDataset" / "Imgs" / "new.jpg"), small)
        cv2.imwrite(
            str(leaky / "TrainDataset" / "GT" / "new.png"),
            cv2.resize(
                cv2.imread(str(test.parents[1] / "GT" / f"{test.stem}.png")), (44, 44), 0, 0, 0, 0
            ),
        )
        assert make(leaky, tmp_path / "out", "--per-image", "1") == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "1 source of 6 would leak" in said and "new.jpg: it is a copy of" in said
        assert not (tmp_path / "out" / LEDGER).exists()
        assert (
            make(leaky, tmp_path / "out", "--per-image", "1", "--allow-test-sources", "--page") == 0
        )
        marked = [row["image"] for row in rows_of(tmp_path / "out")[1:] if "test_source" in row]
        assert marked == ["TrainDataset/Imgs/new_r1.jpg"]
        # What is made from such an image is one as well.
        capsys.readouterr()
        assert make(tmp_path / "out", tmp_path / "again") == 3
        assert "new_r1.jpg: it was made from a test image (it is a" in " ".join(
            capsys.readouterr().err.split()
        )
        page = (tmp_path / "out" / PAGE).read_text()
        assert "1 image of 6 are made from test images" in page

    def test_a_test_split_is_refused_and_the_training_split_is_not(self, data, tmp_path, capsys):
        part = next((data / "TestDataset").iterdir())
        assert make(part, tmp_path / "out") == 3
        assert "says that it is in a test split" in " ".join(capsys.readouterr().err.split())
        assert make(data, tmp_path / "out", "--limit", "1") == 0
        assert "none of 5 sources is among 3 test images (toy)" in capsys.readouterr().out

    def test_another_data_sets_test_images(self, data: Path, tmp_path: Path, capsys) -> None:
        other = tmp_path / "copies"
        other.mkdir()
        shutil.copy(min((data / "TrainDataset" / "Imgs").iterdir()), other / "renamed.jpg")
        assert make(data, tmp_path / "out", "--test-data", str(other)) == 3
        assert "a copy of renamed in the test set copies" in " ".join(
            capsys.readouterr().err.split()
        )


def test_csv_in_and_out(data: Path, tmp_path: Path) -> None:
    table = data / "two.csv"
    names = sorted(path.stem for path in (data / "TrainDataset" / "Imgs").iterdir())[:2]
    lines = [f"TrainDataset/Imgs/{n}.jpg,TrainDataset/GT/{n}.png,Beetle" for n in names]
    table.write_text("image,mask,class\n" + "\n".join(lines) + "\n")
    out = tmp_path / "out"
    assert make(table, out, "--num-samples", "3", "--num-gpus", "0", source="--csv") == 0
    with (out / PAIRS).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {row["class"] for row in rows} == {"Beetle"}
    assert {Path(row["source_image"]).stem for row in rows} == set(names)
    assert all((out / row["image"]).is_file() and (out / row["mask"]).is_file() for row in rows)
    assert {pair.group for pair in load_train([out / PAIRS]).pairs} == {"Beetle"}


class TestMaskSources:
    def test_a_table_of_images_and_maps(self, data: Path, tmp_path: Path, capsys) -> None:
        images = sorted((data / "TrainDataset" / "Imgs").iterdir())[:2]
        table = data / "images.csv"
        table.write_text("image\n" + "".join(f"TrainDataset/Imgs/{p.name}\n" for p in images))
        maps = tmp_path / "maps"
        maps.mkdir()
        for path in images:
            shutil.copy(data / "TrainDataset" / "GT" / f"{path.stem}.png", maps)
        assert make(table, tmp_path / "out", source="--csv") == 3
        assert "has no column 'mask'" in " ".join(capsys.readouterr().err.split())
        words = ("--mask-source", str(maps), "--cache", "none", "--size", "32", "--per-image", "1")
        assert make(table, tmp_path / "out", *words, source="--csv") == 0
        (pair, _) = load_train([tmp_path / "out"]).pairs
        assert read_pair(pair.image, pair.mask)[0].shape == (32, 32, 3)

    def test_a_folder_of_maps(self, data: Path, tmp_path: Path, capsys) -> None:
        images, maps = tmp_path / "photos", tmp_path / "maps"
        shutil.copytree(data / "TrainDataset" / "Imgs", images)
        maps.mkdir()
        for path in (data / "TrainDataset" / "GT").iterdir():
            soft = cv2.GaussianBlur(cv2.imread(str(path), 0), (0, 0), 1)
            cv2.imwrite(str(maps / path.name), soft)
        words = ("--mask-source", str(maps), "--per-image", "1", "--cache-dir", str(tmp_path / "c"))
        assert make(images, tmp_path / "out", *words) == 0
        assert f"mask: miss: not made yet {SOURCES}" in capsys.readouterr().out
        name = min(path.stem for path in maps.iterdir())
        mask = cv2.imread(str(tmp_path / "out" / "TrainDataset" / "GT" / f"{name}_r1.png"), 0)
        cut = np.where(cv2.imread(str(maps / f"{name}.png"), 0) > 127, 255, 0)
        assert np.array_equal(mask, cut)
        assert rows_of(tmp_path / "out")[1]["mask_source"] == f"maps in {maps}"

    def test_a_checkpoint(self, data, tiny_run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        # Two epochs teach it little: at one half it finds nothing.
        monkeypatch.setattr("camoxpert.synthesis.masks.THRESHOLD", 0.3)
        images = data / "TrainDataset" / "Imgs"
        words = (
            "--mask-source",
            str(tiny_run),
            "--per-image",
            "1",
            "--cache-dir",
            str(tmp_path / "c"),
        )
        assert make(images, tmp_path / "a", *words) == 0
        said = capsys.readouterr().out
        assert f"mask: miss: not made yet {SOURCES}" in said
        assert json.loads((tmp_path / "a" / "relight.json").read_text())["mask_models_loaded"] == 1
        assert make(images, tmp_path / "b", *words) == 0
        assert f"mask: hit {SOURCES}" in capsys.readouterr().out
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b") != {}

    def test_nothing_there(self, data: Path, tmp_path: Path, capsys) -> None:
        assert make(data, tmp_path / "out", "--mask-source", str(tmp_path / "no")) == 3
        assert "--mask-source: There is no" in " ".join(capsys.readouterr().err.split())


def test_depth_maps_change_the_form_and_only_that(data, made, tmp_path: Path, capsys) -> None:
    depths = tmp_path / "depths"
    depths.mkdir()
    ramp = np.tile(np.linspace(0, 60000, 48, dtype=np.uint16), (48, 1))
    for path in (data / "TrainDataset" / "Imgs").iterdir():
        cv2.imwrite(str(depths / f"{path.stem}.png"), ramp)
    assert make(data, tmp_path / "out", "--per-image", "2", "--depth-maps", str(depths)) == 0
    assert "heights: depth maps" in capsys.readouterr().out
    with_depth, plain = files_of(tmp_path / "out"), files_of(made)
    masks = {name for name in plain if "/GT/" in name}
    assert {n for n in plain if plain[n] != with_depth[n]} == plain.keys() - masks
    (depths / f"{path.stem}.png").unlink()
    assert make(data, tmp_path / "out", "--depth-maps", str(depths)) == 3
    assert "1 of 5 images have no depth map" in " ".join(capsys.readouterr().err.split())


def test_a_network_gives_the_form(data, made, tmp_path: Path, capsys, monkeypatch) -> None:
    class Brightness:
        def depths(self, images_B3HW: torch.Tensor) -> torch.Tensor:
            return images_B3HW.float().mean(1, keepdim=True)

    monkeypatch.setattr(
        "camoxpert.synthesis.relight.depth.load_depth_model", lambda folder, device: Brightness()
    )
    network = tmp_path / "small"
    network.mkdir()
    (network / "config.json").write_text("{}")
    words = ("--per-image", "2", "--depth-model", str(network))
    assert make(data, tmp_path / "out", *words) == 0
    assert "heights: depth model small (" in capsys.readouterr().out
    with_depth, plain = files_of(tmp_path / "out"), files_of(made)
    assert {n for n in plain if plain[n] != with_depth[n]} == {n for n in plain if "/Imgs/" in n}
    assert json.loads((tmp_path / "out" / "relight.json").read_text())["model_loads"] == 1
    (network / "config.json").write_text("{} ")
    assert make(data, tmp_path / "out", *words) == 2
    assert "heights depth model small (" in " ".join(capsys.readouterr().err.split())
    assert make(data, tmp_path / "new", "--depth-model", str(tmp_path / "no")) == 3


def test_the_page_shows_everything_and_loads_nothing(made: Path) -> None:
    page = (made / PAGE).read_text()
    assert not active_parts(page)
    for text in ("Before and after", "Difficulty", "Provenance", "light azimuth", "recombine"):
        assert text in page
    assert page.count("data:image/jpeg") == 2 * SOURCES


def test_flags_that_contradict_each_other(data: Path, tmp_path: Path, capsys) -> None:
    for words, text in (
        (("--per-image", "2", "--num-samples", "3"), "give one of them"),
        (("--range", "azimut", "1", "2"), "Did you mean azimuth?"),
        (("--range", "key", "0.9", "0.1"), "The range of key"),
        (("--patterns", "blind"), "There is no pattern shadow 'blind'"),
        (("--size", "8"), "--size must be at least 32"),
        (("--batch-size", "some"), "--batch-size must be auto or at least 1"),
        (("--num-gpus", "1"), "there is no CUDA device 0"),
    ):
        assert make(data, tmp_path / "out", *words) == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_void_survives_writing_a_mask(tmp_path: Path) -> None:
    from PIL import Image

    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:25], mask[5:7] = 255, VOID
    path = tmp_path / "mask.png"
    path.write_bytes(encode_mask(mask))
    with Image.open(path) as image:
        assert np.array_equal(binary_mask(image, path), mask)


def test_differences_name_nested_settings() -> None:
    head = Head({"--seed": 1, "light": {"key": (0.5, 1.0), "strength": 1.0}, "--size": None})
    assert head.differences(head.fields()) == []
    other = Head({"--seed": 1, "light": {"key": (0.25, 1.0), "strength": 1.0}, "--size": 64})
    assert other.differences(head.fields()) == ["light key 0.5 1, now 0.25 1", "--size off, now 64"]


@pytest.mark.parametrize("command", ["relight", "compose", "counterfactual"])
def test_a_mask_of_another_size_is_refused_as_train_does(
    tmp_path: Path, capsys, command: str
) -> None:
    """Stretched over the image, the mask of a part of it would lie beside the object."""
    data = tmp_path / "data"
    generate_toy(data, num_train=6, num_test=0, size=64, seed=4)
    masks = sorted((data / "TrainDataset" / "GT").iterdir())
    cropped = masks[0]
    cv2.imwrite(str(cropped), cv2.imread(str(cropped), 0)[:, :48])
    words = ["synthesize", command, "--dataset-path", str(data)]
    assert main([*words, "-o", str(tmp_path / "no")]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 mask of another size than the image: {cropped.stem} (64x64, mask 48x64)" in said
    assert not (tmp_path / "no").exists()
    more = ["--resize", "bilinear", "--limit", "2"] if command == "relight" else []
    if more:
        assert main([*words, *more, "-o", str(tmp_path / "yes")]) == 0
        assert "1 mask of another size" in " ".join(capsys.readouterr().err.split())
