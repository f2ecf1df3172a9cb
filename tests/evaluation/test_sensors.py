"""A model with depth and heat, from training to prediction: any of it may be missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.printed import complained
from helpers.sensors import TINY_WORDS, views
from PIL import Image
from torch import nn

import camoxpert
from camoxpert import console
from camoxpert.cli import main
from camoxpert.config import build_config
from camoxpert.data.files.image_io import read_image
from camoxpert.data.files.manifest import Search, load_train
from camoxpert.data.samples.batches import Batch
from camoxpert.errors import ConfigError, DataError
from camoxpert.files import read_json, read_jsonl
from camoxpert.inference.aligned import say_photographs_alone, with_files
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.sources import Photo
from camoxpert.models.modalities import subsets
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.runs.share import read_shared, write_shared
from camoxpert.training.modalities import draw_subset, seen_in_training
from camoxpert.training.prepare import prepare
from camoxpert.training.stages import training_loader
from camoxpert.training.step import train_step

NAMES = ("depth", "thermal")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return views(tmp_path_factory.mktemp("sensors") / "data")


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def command(data: Path, out: Path, *words: str) -> int:
    base = ["train", "--dataset-path", str(data), "--checkpoint-dir", str(out), *TINY_WORDS]
    return main([*base, "--epochs", "1", "--stage1-epochs", "0", "--no-report", *words])


@pytest.fixture(scope="module")
def run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a tiny model whose weights make its sensors matter."""
    out = tmp_path_factory.mktemp("runs")
    assert command(whole, out, "--run-name", "sensors", "--no-test") == 0
    # Three steps teach nothing: what a long training would make large is drawn.
    folder = out / "sensors"
    predictor = load_predictor(folder)
    branch = predictor.network.modalities
    assert branch is not None
    for number, parameter in enumerate(branch.parameters()):
        generator = torch.Generator().manual_seed(number)
        nn.init.normal_(parameter, std=0.3, generator=generator)
    checkpoint = load_checkpoint(folder / "checkpoints" / "best.pt")
    checkpoint.evaluated_weights.update(predictor.network.state_dict())
    write_shared(folder / "model", checkpoint)
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> Predictor:
    return camoxpert.load(run / "model")


def one(data: Path, index: int = 0) -> tuple[Path, dict[str, Path]]:
    pair = load_train([data], Search(modalities=NAMES)).pairs[index]
    return pair.image, dict(pair.modalities)


class TestTraining:
    def test_draws_are_a_pure_function_and_have_their_shares(self) -> None:
        drawn = [draw_subset(2, 0.4, seed=1, epoch=0, index=i) for i in range(4000)]
        assert drawn == [draw_subset(2, 0.4, seed=1, epoch=0, index=i) for i in range(4000)]
        assert drawn != [draw_subset(2, 0.4, seed=1, epoch=1, index=i) for i in range(4000)]
        every = subsets(2)
        assert len(every) == 7 and every[0] == (True, False, False) and every[-1] == (True,) * 3
        share = {subset: drawn.count(subset) / len(drawn) for subset in every}
        assert abs(share[every[0]] - 0.4) < 0.03 and abs(share[every[-1]] - 0.3) < 0.03
        assert all(abs(share[subset] - 0.06) < 0.02 for subset in every[1:-1])
        # With one modality besides: photograph, modality, both.
        assert subsets(1) == [(True, False), (False, True), (True, True)]

    def test_an_image_keeps_its_photograph_if_nothing_else_is_there(self) -> None:
        config = build_config({"data.modalities": ["rgb", *NAMES]})
        number = 200
        images = torch.zeros(number, 3, 4, 4, dtype=torch.uint8)
        planes = torch.ones(number, 1, 4, 4, dtype=torch.uint8)
        sizes = [(4, 4)] * number
        batch = Batch(images, images[:, :1], ["a"] * number, sizes, list(range(number)))
        batch.modalities = {"depth": planes, "thermal": torch.zeros_like(planes)}
        seen = seen_in_training(batch, config, epoch=0)
        assert not seen.present_BM[:, 1].any(), "missing stays missing"
        assert (seen.rgb_B | seen.present_BM[:, 0]).all()
        assert 0 < (~seen.rgb_B).sum() < number and 0 < seen.present_BM[:, 0].sum() < number

    def test_it_learns_and_says_what_it_does(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one(data, 2)[1]["depth"].unlink()
        assert command(data, tmp_path, "--run-name", "a") == 0
        told = capsys.readouterr().out
        assert (
            "depth: 2" in told and "thermal: 2" in told and "1 of 24 images have no depth" in told
        )
        assert "40% of the images as the photograph alone" in told
        records = read_jsonl(tmp_path / "a" / "metrics.jsonl")
        (validation,) = [r for r in records if r["kind"] == "validation"]
        assert validation["rgb"].keys() == validation["scores"].keys()
        info = read_json(tmp_path / "a" / "run.json")
        assert any("light stems for depth, thermal" in line for line in info["decisions"])
        # The test set at the end was scored with every subset.
        scores = read_json(tmp_path / "a" / "evaluation" / "scores.json")
        assert len(scores["results"][0]["modalities"]["rows"]) == 7

    def test_two_steps_move_stems_and_repeat(self, whole: Path) -> None:
        values = {
            **{"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16},
            **{"model.num_experts": 3, "model.detail_width": 8, "data.img_size": 32},
            **{"data.roots": [str(whole)], "data.num_workers": 0, "train.batch_size": 8},
            **{"train.epochs": 1, "run.tensorboard": False, "data.cache": "none"},
            **{"data.modalities": ["rgb", *NAMES]},
        }

        def trained() -> dict[str, torch.Tensor]:
            run = prepare(build_config(values))
            for group in run.optimizer.param_groups:
                group["lr"] = 1e-3
            loader = training_loader(run, 8)
            loader.set_epoch(0)
            for batch in list(loader)[:2]:
                train_step(run, [batch])
            return {n: p.detach().clone() for n, p in run.model.named_parameters()}

        torch.manual_seed(0)
        first, start = trained(), prepare(build_config(values)).model
        moved = [n for n, p in start.named_parameters() if not torch.equal(p, first[n])]
        assert any(n.startswith("modalities.stems.depth") for n in moved)
        assert any(n.startswith("modalities.routers") for n in moved)
        second = trained()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_an_override_behind_the_names(self, whole: Path, tmp_path: Path) -> None:
        """The list of names would swallow it."""
        assert TINY_WORDS[-1] == "thermal"
        base = ["train", "--dataset-path", str(whole), "--checkpoint-dir", str(tmp_path)]
        assert main([*base, *TINY_WORDS, "optim.lr=3e-4", "--dry-run"]) == 0

    def test_a_modality_that_no_image_has_is_refused(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.rmtree(data / "TrainDataset" / "Thermal")
        assert command(data, tmp_path) == 3
        assert "no training image has any" in complained(capsys)

    def test_from_a_model_of_photographs(
        self, whole: Path, tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("--init-from", str(tiny_run), "--dry-run")
        assert command(whole, tmp_path, *words) == 0
        assert "new here: modalities" in capsys.readouterr().out

    def test_photographs_are_kept_exactly(
        self, whole: Path, tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image, seen = one(whole)
        words = ("--init-from", str(tiny_run), "--run-name", "kept", "--no-test", "--lr", "3e-3")
        before = camoxpert.load(tiny_run).predict(image).probability_HW
        for more, same in ((("--keep-rgb",), True), ((), False)):
            out = tmp_path / str(same)
            assert command(whole, out, *words, *more) == 0
            model = camoxpert.load(out / "kept")
            assert np.array_equal(model.predict(image).probability_HW, before) == same
            taught = model.predict(image, modalities=seen).probability_HW
            assert not np.array_equal(taught, before), "and the modalities were learned"
        capsys.readouterr()
        assert command(whole, tmp_path, "--keep-rgb") == 2
        assert "there is no --init-from" in complained(capsys)
        assert command(whole, tmp_path, *words, "--keep-rgb", "--router-bias-rate", "0.1") == 2
        assert "--router-bias-rate 0.1 would move it" in complained(capsys)
        # What the other model lacks would stay random for good.
        assert command(whole, tmp_path, *words, "--keep-rgb", "--num-experts", "4") == 2
        assert "lacks others of this model: decoder.levels.0.moe" in complained(capsys)

    def test_photographs_are_kept_by_routers_with_statistics(
        self, whole: Path, tmp_path: Path, toy_data: Path
    ) -> None:
        image, _ = one(whole)
        norm = ("--router-norm", "batch", "--no-test", "--no-report")
        plain = TINY_WORDS[: TINY_WORDS.index("--modalities")]
        base = ["train", "--dataset-path", str(toy_data), "--checkpoint-dir", str(tmp_path)]
        base += ["--epochs", "1", "--stage1-epochs", "0", *plain]
        assert main([*base, *norm, "--run-name", "base"]) == 0
        before = camoxpert.load(tmp_path / "base").predict(image).probability_HW
        for more, same in ((("--keep-rgb",), True), ((), False)):
            out = tmp_path / str(same)
            words = ("--init-from", str(tmp_path / "base"), "--run-name", "kept", "--lr", "3e-3")
            assert command(whole, out, *words, *norm, *more) == 0
            after = camoxpert.load(out / "kept").predict(image).probability_HW
            assert np.array_equal(after, before) == same

    def test_as_a_teacher_it_looks_at_photographs(
        self, run: Path, toy_data: Path, tmp_path: Path, train: Callable[..., int]
    ) -> None:
        words = ("--teacher", str(run / "model"), "--epochs", "1", "--stage1-epochs", "0")
        assert train(*words, "--no-test", "--no-report") == 0


class TestPredict:
    def test_a_photograph_alone_is_seen_by_the_base_model(
        self, model: Predictor, whole: Path
    ) -> None:
        image, seen = one(whole)
        alone = model.predict(image).probability_HW
        branch, model.network.modalities = model.network.modalities, None
        try:
            base = model.predict(image).probability_HW
        finally:
            model.network.modalities = branch
        assert np.array_equal(alone, base)
        assert np.array_equal(model.predict(image, modalities={}).probability_HW, base)
        assert not np.allclose(model.predict(image, modalities=seen).probability_HW, base)

    def test_any_may_be_missing(self, model: Predictor, whole: Path) -> None:
        image, seen = one(whole)
        found = [
            model.predict(image, modalities={name: seen[name] for name in names}).probability_HW
            for names in ((), ("depth",), ("thermal",), NAMES)
        ]
        assert all(np.isfinite(map_HW).all() and map_HW.shape == (40, 40) for map_HW in found)
        assert len({map_HW.tobytes() for map_HW in found}) == 4
        # None is missing, and an array is what its file holds.
        values = np.array(Image.open(seen["depth"]))
        given = {"depth": values, "thermal": None}
        again = model.predict(image, modalities=given)  # type: ignore[arg-type]  # None
        assert np.array_equal(again.probability_HW, found[1])
        # A list, each image with its own.
        pixels = read_image(image)
        several = model.predict([image, pixels], modalities=[seen, {"depth": seen["depth"]}])
        np.testing.assert_allclose(several[0].probability_HW, found[3], atol=1e-5)
        np.testing.assert_allclose(several[1].probability_HW, found[1], atol=1e-5)

    @pytest.mark.parametrize("options", [{"tta": "flip,scales"}, {"tile": 32}])
    def test_views_take_them_along(
        self, model: Predictor, whole: Path, options: dict[str, object]
    ) -> None:
        image, seen = one(whole)
        found = model.predict(image, modalities=seen, **options).probability_HW  # type: ignore[call-overload]
        alone = model.predict(image, **options).probability_HW  # type: ignore[call-overload]
        assert found.shape == alone.shape and not np.allclose(found, alone)

    def test_zoom_takes_them_along(self, run: Path, whole: Path) -> None:
        zoomed = camoxpert.load(run / "model", zoom=True)
        image, seen = one(whole)
        alone = zoomed.predict(image).probability_HW
        assert not np.allclose(zoomed.predict(image, modalities=seen).probability_HW, alone)

    def test_files_of_another_image_change_the_output(self, model: Predictor, whole: Path) -> None:
        image, seen = one(whole)
        _, others = one(whole, 5)
        right = model.predict(image, modalities=seen).probability_HW
        wrong = model.predict(image, modalities={**seen, "depth": others["depth"]}).probability_HW
        assert not np.allclose(right, wrong)

    def test_mistakes_get_one_paragraph(
        self, model: Predictor, whole: Path, tiny_run: Path, tmp_path: Path
    ) -> None:
        image, seen = one(whole)
        with pytest.raises(ConfigError, match="trained with photographs alone"):
            camoxpert.load(tiny_run).predict(image, modalities=seen)
        with pytest.raises(ConfigError, match="Did you mean depth"):
            model.predict(image, modalities={"dept": seen["depth"]})
        with pytest.raises(ConfigError, match="2 images and 1 were given"):
            model.predict([image, image], modalities=[seen])
        with pytest.raises(DataError, match=r"shape \(4, 4, 3\) is not a modality"):
            model.predict(image, modalities={"depth": np.zeros((4, 4, 3))})
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"bad\.png is not an image"):
            model.predict(image, modalities={"depth": bad})

    def test_folders_on_the_command_line(
        self, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        photos = data / "TestDataset" / "toy"
        sorted((photos / "Thermal").iterdir())[0].unlink()
        words = ["predict", str(run / "model"), str(photos / "Imgs"), "-o", str(tmp_path / "out")]
        words += ["--save", "map", "--modality", "depth", str(photos / "Depth")]
        words += ["--modality", "thermal", str(photos / "Thermal")]
        assert main(words) == 0
        told = capsys.readouterr()
        assert "thermal: 1 of 8 photos have no file" in told.out + told.err
        maps = {p.name: p.read_bytes() for p in (tmp_path / "out" / "maps").iterdir()}
        assert len(maps) == 8
        # The same call has nothing to do; a file that changed is predicted again.
        assert main(words) == 0
        assert "8 were there already" in capsys.readouterr().out
        changed = sorted((photos / "Depth").iterdir())[3]
        Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(changed)
        assert main(words) == 0
        assert "1 images predicted, 7 were there already" in capsys.readouterr().out
        again = {p.name: p.read_bytes() for p in (tmp_path / "out" / "maps").iterdir()}
        assert [name for name in maps if maps[name] != again[name]] == [changed.name]
        # Photographs alone are other results.
        assert main(words[:7]) == 2
        assert "--modality ['depth', 'thermal'], now off" in complained(capsys)

    def test_wrong_folders(
        self,
        run: Path,
        tiny_run: Path,
        whole: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        photos = whole / "TestDataset" / "toy"
        end = [str(photos / "Imgs"), "-o", str(tmp_path / "out")]
        asked = ["--modality", "depth", str(photos / "Depth")]
        assert main(["predict", str(tiny_run), *end, *asked]) == 2
        assert "photographs alone" in complained(capsys)
        for words, code, text in (
            (["--modality", "depth", str(tmp_path / "gone")], 3, "--modality depth: "),
            (
                ["--modality", "depth", str(whole / "TrainDataset" / "Depth")],
                3,
                "no file there has",
            ),
            ([*asked, *asked], 2, "each name is given once"),
            (["--modality", "smell", str(photos / "Depth")], 2, "was not trained with it"),
        ):
            assert main(["predict", str(run), *end, *words]) == code
            assert text in " ".join(capsys.readouterr().err.split())

    def test_from_python_into_a_folder(self, run: Path, whole: Path, tmp_path: Path) -> None:
        photos = whole / "TestDataset" / "toy"
        folders = {"depth": photos / "Depth"}
        found = camoxpert.predict_folder(
            run / "model", photos / "Imgs", tmp_path / "out", kinds=["map"], modalities=folders
        )
        assert found.done == 8 and not found.failed


class TestEvaluate:
    def test_every_subset_with_mean_and_worst(
        self, run: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["evaluate", str(run / "model"), "--data", str(whole), "-o", str(tmp_path / "out")]
        assert main([*words, "--gallery", "1"]) == 0
        told = capsys.readouterr().out
        assert "rgb + depth + thermal" in told and "mean of all" in told and "worst" in told
        scores = read_json(tmp_path / "out" / "scores.json")["results"][0]
        table = scores["modalities"]
        assert [row["shown"] for row in table["rows"]] == [
            *("rgb", "depth", "thermal"),
            *("rgb + depth", "rgb + thermal", "depth + thermal", "rgb + depth + thermal"),
        ]
        values = [row["scores"]["wFmeasure"] for row in table["rows"]]
        assert table["mean"]["wFmeasure"] == pytest.approx(sum(values) / 7)
        assert table["worst"]["wFmeasure"] == min(values)
        errors = [row["scores"]["MAE"] for row in table["rows"]]
        assert table["worst"]["MAE"] == max(errors)
        assert scores["scores"] == table["rows"][-1]["scores"], "all there is are the scores"
        assert table["rows"][0]["differences"] == {} and table["rows"][3]["differences"]
        page = (tmp_path / "out" / "index.html").read_text()
        assert "By modality" in page and "rgb + thermal" in page

    def test_photographs_alone_score_as_in_the_table(
        self, run: Path, data: Path, tmp_path: Path
    ) -> None:
        (before,) = camoxpert.evaluate(run / "model", data, intervals=False)
        assert before.modalities is not None
        for name in ("Depth", "Thermal"):
            shutil.rmtree(data / "TestDataset" / "toy" / name)
        (after,) = camoxpert.evaluate(run / "model", data, intervals=False)
        assert after.modalities is None
        assert after.scores == before.modalities.rows[0].scores

    def test_images_that_lack_one(self, run: Path, data: Path) -> None:
        sorted((data / "TestDataset" / "toy" / "Depth").iterdir())[0].unlink()
        (found,) = camoxpert.evaluate(run / "model", data, intervals=False)
        table = found.modalities
        assert table is not None and table.have == {"depth": 7, "thermal": 8}
        assert {row.shown: row.images for row in table.rows}["depth"] == 7
        assert {row.shown: row.images for row in table.rows}["depth + thermal"] == 8

    def test_shuffled_depth_changes_the_scores(self, run: Path, data: Path) -> None:
        (right,) = camoxpert.evaluate(run / "model", data, intervals=False)
        files = sorted((data / "TestDataset" / "toy" / "Depth").iterdir())
        contents = [path.read_bytes() for path in files]
        for path, content in zip(files, [*contents[1:], contents[0]], strict=True):
            path.write_bytes(content)
        (wrong,) = camoxpert.evaluate(run / "model", data, intervals=False)
        assert right.scores != wrong.scores
        assert right.modalities is not None and wrong.modalities is not None
        for before, after in zip(right.modalities.rows, wrong.modalities.rows, strict=True):
            assert (before.scores == after.scores) == ("depth" not in before.shown)

    @pytest.mark.parametrize("words", [["--corruptions", "noise", "--severity", "1"], ["--zoom"]])
    def test_with_other_options(
        self, run: Path, whole: Path, tmp_path: Path, words: list[str]
    ) -> None:
        base = ["evaluate", str(run / "model"), "--data", str(whole), "-o", str(tmp_path / "out")]
        assert main([*base, "--no-intervals", "--gallery", "0", *words]) == 0


class TestFiles:
    def test_checkpoints_and_shared_weights_know_the_names(
        self, run: Path, model: Predictor
    ) -> None:
        assert camoxpert.load(run).modalities == model.modalities == NAMES
        assert read_shared(run / "model" / "model.safetensors").config.data.beside_rgb == NAMES
        card = (run / "model" / "README.md").read_text()
        assert "it takes depth, thermal, any of which may be missing" in card

    def test_serve_and_export_take_photographs_alone(self, model: Predictor) -> None:
        from camoxpert.export.graph import ExportGraph

        with console.remembering() as lines:
            say_photographs_alone(model.modalities, "serve")
            say_photographs_alone((), "serve")
        (line,) = lines
        assert "serve takes photographs alone; depth, thermal" in line
        graph = ExportGraph(model.network)
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            expected = model.network(images).logits_B1HW
            torch.testing.assert_close(graph(images)[1], expected, atol=1e-4, rtol=1e-4)
        assert not any("modalities" in name for name, _ in graph.named_parameters())


def test_a_file_with_the_name_of_two_photos(tmp_path: Path) -> None:
    """It shows one of them; each has its own where the folders say so."""
    photos = [Photo(Path(part, "x.jpg"), f"{part}/x") for part in ("a", "b")]
    depth = tmp_path / "depth"
    for part in ("a", "b"):
        (depth / part).mkdir(parents=True)
    Image.new("L", (4, 4)).save(depth / "x.png")
    with pytest.raises(DataError, match=r"has the name of a/x\.jpg and of b/x\.jpg"):
        with_files(photos, {"depth": depth})
    (depth / "x.png").unlink()
    for part in ("a", "b"):
        Image.new("L", (4, 4)).save(depth / part / "x.png")
    found, _ = with_files(photos, {"depth": depth})
    assert [dict(p.modalities)["depth"].parent.name for p in found] == ["a", "b"]
