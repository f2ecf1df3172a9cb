"""Chains of trainings: what is kept, what is reused, and what a miss says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY
from helpers.folds import result, words
from helpers.printed import said
from helpers.runs import weights_of

import camoxpert
from camoxpert.cli import main
from camoxpert.config import load_config
from camoxpert.crossval import seen
from camoxpert.errors import ConfigError
from camoxpert.files import read_json
from camoxpert.runs.checkpoint import load_checkpoint
from camoxpert.stages import key, store
from camoxpert.stages.chain import read_chain
from camoxpert.stages.key import Facts, differences, facts_of
from camoxpert.synthesis.toy import generate_toy
from camoxpert.training import session

Train = Callable[..., int]
SHORT = ("--epochs", "1", "--stage1-epochs", "0", "--no-report", "--no-test")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another data set of 10 training images."""
    root = tmp_path_factory.mktemp("source")
    generate_toy(root, num_train=10, num_test=2, size=32, difficulty=0.3, seed=9)
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def train(easy: Path, tmp_path: Path, cache: Path) -> Train:
    """Return a function that trains stages of a tiny model and returns the exit code."""

    def call(stages: Path, *more: str, data: Path = easy, out: str = "runs") -> int:
        base = ["train", "--stages", str(stages), "--dataset-path", str(data), *TINY, *SHORT]
        return main(
            [*base, "--checkpoint-dir", str(tmp_path / out), "--cache-dir", str(cache), *more]
        )

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the runs that are trained."""
    names: list[str] = []
    honest = session.run

    def run(config, **options):
        names.append(Path(config.data.roots[0]).name + ("+" if config.model.init_from else ""))
        return honest(config, **options)

    monkeypatch.setattr(session, "run", run)
    return names


def chain_file(folder: Path, text: str) -> Path:
    path = folder / "stages.yaml"
    path.write_text(text)
    return path


def two(folder: Path, source: Path, more: str = "") -> Path:
    """Write two stages: the other data set, then the one of the command."""
    first = f"  - name: pretrain\n    data: {{roots: ['{source}']}}\n{more}"
    return chain_file(folder, f"stages:\n{first}  - name: finetune\n    train.epochs: 2\n")


def kept(cache: Path, name: str) -> Path:
    (folder,) = [
        path.parent
        for path in (cache / "stages").glob("*/stage.json")
        if read_json(path)["name"] == name
    ]
    return folder


class TestFile:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: {width: 16}\n", "no list `stages`"),
            ("stages: []\n", "no list `stages`"),
            ("stages: [pretrain]\n", "not a name with settings"),
            ("stages: [{train.epochs: 1}]\n", "needs a name of its own"),
            ("stages: [{name: a}, {name: A}]\n", "needs a name of its own"),
            ("stages: [{name: a/b}]\n", "needs a name of its own"),
            ("stages: [{name: a, optim.lrr: 1}]\n", "Did you mean optim.lr"),
            ("stages: [{name: a}, {name: b, model.init_from: x}]\n", "is the stage before it"),
            ("stages: [{name: a, run.name: x}]\n", "for all stages together"),
        ],
    )
    def test_what_is_no_chain(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_chain(chain_file(tmp_path, text))

    def test_settings_of_all_and_of_one(self, tmp_path: Path) -> None:
        """The file < flags < the stage; test sets are scored by the last stage only."""
        text = "optim: {lr: 0.5}\nmodel.width: 24\nstages:\n- {name: a, optim.lr: 0.1}\n- name: b\n"
        chain = read_chain(chain_file(tmp_path, text))
        assert chain.common == {"optim.lr": 0.5, "model.width": 24}
        base = load_config(flags={**chain.common, "model.width": 32})
        first, last = chain.resolve(base)
        assert (first.config.optim.lr, last.config.optim.lr) == (0.1, 0.5)
        assert first.config.model.width == last.config.model.width == 32
        assert (first.config.run.test, last.config.run.test) == (False, True)
        assert not first.last and last.last

    def test_a_stage_that_cannot_be_is_named(self, tmp_path: Path) -> None:
        chain = read_chain(chain_file(tmp_path, "stages: [{name: big, data.img_size: 50}]\n"))
        with pytest.raises(ConfigError, match="stage big: --img-size must be a multiple of 32"):
            chain.resolve(load_config())


class TestFacts:
    def facts(self, easy: Path, parent: str = "", **settings: object) -> Facts:
        flags = {"data.roots": [str(easy)]} | {k.replace("__", "."): v for k, v in settings.items()}
        return facts_of(load_config(flags=flags), parent)

    def test_what_counts(self, easy: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = self.facts(easy)
        assert self.facts(easy, train__device="cpu", run__dir="x", data__num_workers=1) == base
        others = [
            self.facts(easy, optim__lr=0.5),
            self.facts(easy, parent="0123"),
            self.facts(source),
        ]
        monkeypatch.setattr(key, "code_digest", lambda: "1.0 abc")
        others.append(self.facts(easy))
        assert len({base.key, *(other.key for other in others)}) == 5
        words = [differences(base.to_dict(), other) for other in others]
        assert words[0] == ["optim.lr differs (unset -> 0.5)"]
        assert words[1] == ["the stage before it differs"]
        assert words[2] == ["the training data differs"]
        program = f"the program differs ({camoxpert.__version__} "
        assert len(words[3]) == 1 and words[3][0].startswith(program)

    def test_moved_data_is_the_same(self, easy: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(easy, tmp_path / "deep" / easy.name)
        assert self.facts(moved).key == self.facts(easy).key
        image = sorted((moved / "TrainDataset" / "Imgs").iterdir())[0]
        image.write_bytes(image.read_bytes() + b"\0")
        assert self.facts(moved).key != self.facts(easy).key


@pytest.mark.slow
class TestTrain:
    def test_the_second_time_only_the_last_stage_is_trained(
        self, train: Train, source: Path, easy: Path, tmp_path: Path, cache: Path, started, capsys
    ) -> None:
        stages = two(tmp_path, source)
        assert train(stages) == 0
        words = said(capsys)
        assert "pretrain: miss: no stage is kept yet: trained now" in words
        assert "tensors from" in words and "finetune: the run that is asked for" in words
        assert started == [source.name, f"{easy.name}+"]
        folder = kept(cache, "pretrain")
        assert train(stages, out="again") == 0
        assert f"pretrain: hit: {folder}" in said(capsys)
        assert started == [source.name, f"{easy.name}+", f"{easy.name}+"]
        # The same run, bit for bit, from the kept weights.
        (one,), (two_,) = ((tmp_path / n).glob("tiny_test-32-*") for n in ("runs", "again"))
        first, second = weights_of(one), weights_of(two_)
        assert all((first[name] == second[name]).all() for name in first)
        records = [read_json(run / "run.json")["stages"] for run in (one, two_)]
        assert [record[0]["verdict"][:4] for record in records] == ["miss", "hit:"]
        assert records[0][0]["key"] == records[1][0]["key"] == folder.name
        assert train(stages, "--dry-run") == 0

    def test_it_starts_from_the_weights_of_the_stage_before(
        self, train: Train, source: Path, tmp_path: Path, cache: Path
    ) -> None:
        """With a rate of almost nothing, the last stage ends where the first did."""
        stages = two(tmp_path, source)
        assert (
            train(
                stages, "optim.lr=1e-12", "optim.min_lr=0", "optim.weight_decay=0", "--no-use-ema"
            )
            == 0
        )
        before = load_checkpoint(kept(cache, "pretrain") / "best.pt").values["model"]
        (run,) = (tmp_path / "runs").glob("tiny_test-32-*")
        after = weights_of(run)
        assert all(before[n].allclose(after[n], atol=1e-6) for n in before)

    def test_a_miss_names_what_differs(
        self, train: Train, source: Path, tmp_path: Path, started, capsys
    ) -> None:
        assert train(two(tmp_path, source)) == 0
        said(capsys)
        assert train(two(tmp_path, source), "--strict-cache", "model.width=24") == 3
        words = said(capsys)
        assert "pretrain: miss: model.width differs (16 -> 24) from pretrain" in words
        assert "--strict-cache: the result of stage pretrain is not kept" in words
        assert len(started) == 2, "nothing was trained"
        more = "    optim.lr: 0.001\n    train.seed: 3\n"
        assert train(two(tmp_path, source, more), "--strict-cache") == 3
        words = said(capsys)
        assert "optim.lr differs (0.00025 -> 0.001), train.seed differs (42 -> 3)" in words

    @pytest.mark.parametrize("damage", ["weights", "record", "gone"])
    def test_a_damaged_result_is_said_and_trained_again(
        self, train: Train, source: Path, tmp_path: Path, cache: Path, started, capsys, damage: str
    ) -> None:
        stages = two(tmp_path, source)
        assert train(stages) == 0
        folder = kept(cache, "pretrain")
        good = (folder / "best.pt").read_bytes()
        if damage == "weights":
            bad = bytearray(good)
            bad[len(bad) // 2] ^= 1
            (folder / "best.pt").write_bytes(bad)
        elif damage == "record":
            (folder / "stage.json").write_text('{"facts": {')
        else:
            (folder / "best.pt").unlink()
        assert train(stages, "--strict-cache", out="strict") == 3
        shutil.rmtree(tmp_path / "runs")
        said(capsys)
        assert train(stages) == 0
        what = {"weights": "differs from what", "record": "is damaged", "gone": "is missing"}[
            damage
        ]
        words = said(capsys)
        assert "pretrain: corrupt: " in words and what in words and ": trained again" in words
        assert len(started) == 4
        weights = load_checkpoint(folder / "best.pt").values["model"]
        assert weights.keys() and read_json(folder / "stage.json")["name"] == "pretrain"

    def test_a_run_that_finished_and_was_not_kept(
        self, train: Train, source: Path, tmp_path: Path, cache: Path, started, capsys
    ) -> None:
        stages = two(tmp_path, source)
        assert train(stages) == 0
        shutil.rmtree(cache / "stages")
        assert train(stages) == 0
        assert "pretrain: miss: no stage is kept yet; its run" in said(capsys)
        assert len(started) == 3, "the last stage alone is trained twice"
        assert kept(cache, "pretrain").is_dir()
        # A run whose weights are damaged is not taken, and neither is it overwritten.
        shutil.rmtree(cache / "stages")
        (run,) = (tmp_path / "runs").glob("pretrain-*")
        (run / "checkpoints" / "best.pt").write_bytes(b"no")
        assert train(stages) == 0
        assert len(started) == 5 and len(list((tmp_path / "runs").glob("pretrain-*"))) == 2
        # Quick runs have names of their own.
        for number in (7, 8):
            shutil.rmtree(cache / "stages")
            assert train(stages, "--data-fraction", "0.5") == 0
            assert len(started) == number

    @pytest.mark.parametrize(
        ("more", "text"),
        [
            (("--resume", "runs/x"), "--resume runs/x names one run"),
            (("--splits", "x.json", "--fold", "1"), "trains one fold with its stages"),
        ],
    )
    def test_what_belongs_to_one_run(
        self, train: Train, source: Path, tmp_path: Path, capsys, more: tuple[str, ...], text: str
    ) -> None:
        assert train(two(tmp_path, source), *more) == 2
        assert text in said(capsys)

    def test_a_later_stage_that_is_kept_needs_no_earlier_one(
        self, train: Train, source: Path, easy: Path, tmp_path: Path, cache: Path, started, capsys
    ) -> None:
        first = f"stages:\n- name: a\n  data.roots: ['{source}']\n- name: b\n"
        assert train(chain_file(tmp_path, first)) == 0
        shutil.rmtree(kept(cache, "a"))
        assert train(chain_file(tmp_path, first + "- {name: c, optim.lr: 0.001}\n")) == 0
        words = said(capsys)
        assert "a: not needed, a later one is kept" in words and "b: hit" in words
        assert started == [source.name, f"{easy.name}+", f"{easy.name}+"]

    def test_two_processes_train_a_stage_once(
        self, train: Train, source: Path, tmp_path: Path, cache: Path, started, capsys, monkeypatch
    ) -> None:
        """The other process trained it while this one waited for the lock."""
        stages = two(tmp_path, source)
        assert train(stages) == 0
        made, away = kept(cache, "pretrain"), tmp_path / "away"
        shutil.move(str(made), away)
        honest = store.held

        @contextmanager
        def held(root: Path, name: str) -> Iterator[None]:
            with honest(root, name):
                shutil.move(str(away), made)
                yield

        monkeypatch.setattr(store, "held", held)
        assert train(stages, out="other") == 0
        assert "made by another process" in said(capsys)
        assert started.count(source.name) == 1

    def test_a_deadline_in_the_first_stage(
        self, train: Train, source: Path, tmp_path: Path, monkeypatch, capsys, started
    ) -> None:
        from camoxpert.stop import DEADLINE_CODE, Stop

        stages = two(tmp_path, source)
        with monkeypatch.context() as patch:
            patch.setattr(Stop, "code", lambda stop: DEADLINE_CODE)
            assert train(stages, "--save-every", "1") == 75
        assert train(stages, "--save-every", "1") == 0
        assert started[0] == source.name

    def test_other_experts_and_another_size_are_listed(
        self, train: Train, source: Path, tmp_path: Path, capsys
    ) -> None:
        """What fits is taken, by kind of expert; what does not is named as new."""
        family = "    model.expert_family: specialist\n"
        kinds = family + "    model.experts: [edge, texture, hybrid]\n"
        first = two(tmp_path, source, kinds).read_text()
        last = family + "    model.experts: [texture, edge, contrast]\n    data.img_size: 64\n"
        assert train(chain_file(tmp_path, first + last)) == 0
        printed = capsys.readouterr().out
        init = printed[printed.index("init  ") :].partition("\nmodel ")[0]
        fresh, taken = (
            line for line in init.splitlines() if "new here: " in line or "taken: " in line
        )
        # Edge and texture changed places and are taken; a contrast expert was not there.
        assert "experts.2" in fresh and "experts.0" not in fresh and "experts.1" not in fresh
        assert "backbone (" in taken and "experts.0" in taken and "experts.1" in taken
        assert train(chain_file(tmp_path, first + "    model.width: 24\n"), out="wide") == 0
        printed = capsys.readouterr().out
        init = printed[printed.index("init  ") :].partition("\nmodel ")[0]
        fresh, taken = (
            line for line in init.splitlines() if "new here: " in line or "taken: " in line
        )
        assert "decoder" in fresh and "backbone (" in taken and "backbone (" not in fresh


@pytest.mark.slow
class TestFolds:
    def test_three_folds_share_a_stage(
        self, easy: Path, source: Path, tmp_path: Path, cache: Path, started, capsys
    ) -> None:
        """Trained once by the fold that is trained first, and taken by the others; a second method
        with the same stage trains none."""
        stages = two(tmp_path, source)
        more = ["--stages", str(stages), "--cache-dir", str(cache), "--folds", "3"]
        command = words(easy, tmp_path / "cv", *more, "--epochs", "1", "--stage1-epochs", "0")
        assert main([*command, "--fold", "2"]) == 0
        assert started == [source.name, f"{easy.name}+"]
        assert main(command) == 0
        text = said(capsys)
        assert started == [source.name, *[f"{easy.name}+"] * 3]
        assert text.count("pretrain: miss") == 1 and text.count("pretrain: hit") == 2
        markdown = (tmp_path / "cv" / "summary.md").read_text()
        assert "Stages before the last: 1 trained, 2 taken" in markdown
        folder = kept(cache, "pretrain")
        for fold in (1, 2, 3):
            config = load_config(file=tmp_path / "cv" / f"fold-{fold}" / "config.yaml")
            assert Path(config.model.init_from).parent == folder
            assert config.train.epochs == 2, "as the stage says"
        splits = ["--splits", str(tmp_path / "cv" / "splits.json"), "--compare-with"]
        again = words(easy, tmp_path / "two", *more[:4], *splits, str(tmp_path / "cv"))
        again += ["--epochs", "1", "--stage1-epochs", "0"]
        text = stages.read_text() + "    optim.lr: 0.001\n"
        chain_file(tmp_path, text)
        assert main(again) == 0
        assert started.count(source.name) == 1, "the second method shares the first stage"
        assert "pretrain: miss" not in said(capsys)
        # Other stages in the same folder are other folds.
        chain_file(tmp_path, text.replace("0.001", "0.002"))
        said(capsys)
        assert main(again) == 2
        assert "All folds of one cross-validation have the same stages" in said(capsys)

    def test_a_stage_on_the_divided_images_holds_out_the_same(
        self, easy: Path, tmp_path: Path, cache: Path, started, capsys
    ) -> None:
        """Its weights know nothing of the held-out images, so it is trained for each fold."""
        text = "stages:\n- {name: small, train.epochs: 1}\n- {name: large, data.img_size: 64}\n"
        more = ["--stages", str(chain_file(tmp_path, text)), "--cache-dir", str(cache)]
        more += ["--folds", "2", "--epochs", "1", "--stage1-epochs", "0"]
        assert main(words(easy, tmp_path / "cv", *more)) == 0
        assert started == [easy.name, f"{easy.name}+"] * 2
        for run in (tmp_path / "cv" / "stages").iterdir():
            config = load_config(file=run / "config.yaml")
            assert config.data.fold in (1, 2) and config.data.val_fraction == 0
            trained = {
                line.split(",")[2] for line in (run / "samples.csv").read_text().splitlines()
            }
            with_scores = tmp_path / "cv" / f"fold-{config.data.fold}" / "out_of_fold"
            held_out = {path.stem for path in (with_scores / "maps").iterdir()}
            assert held_out and not trained & held_out
        text = said(capsys)
        assert "the folds differ" not in text and text.count("small: miss") == 2
        assert "data.fold differs (1 -> 2)" in text

    def test_the_last_stage_names_the_data(
        self, easy: Path, source: Path, tmp_path: Path, cache: Path, capsys
    ) -> None:
        """Then the command names none; what the last stage trains on is divided."""
        stages = two(tmp_path, source)
        chain_file(tmp_path, stages.read_text() + f"    data: {{roots: ['{easy}']}}\n")
        command = words(easy, tmp_path / "cv", "--stages", str(stages), "--dry-run")
        place = command.index("--dataset-path")
        del command[place : place + 2]
        assert main(command) == 0
        assert "5 of 18 images" in said(capsys)

    def test_a_start_that_saw_the_images(
        self, easy: Path, source: Path, tmp_path: Path, finished: Path, capsys
    ) -> None:
        """The first stage starts from a model that was trained on what the last one holds out."""
        model = finished / "fold-1" / "checkpoints" / "best.pt"
        stages = two(tmp_path, source, f"    model.init_from: '{model}'\n")
        command = words(easy, tmp_path / "cv", "--stages", str(stages), "--dry-run")
        assert main(command) == 3
        assert "was trained on these images" in said(capsys)

    def test_killed_between_stage_and_fold(
        self, easy: Path, source: Path, tmp_path: Path, cache: Path, monkeypatch
    ) -> None:
        stages = two(tmp_path, source)
        more = ["--stages", str(stages), "--folds", "2", "--epochs", "1", "--stage1-epochs", "0"]
        command = words(easy, tmp_path / "cv", *more, "--cache-dir", str(cache))
        honest = session.run

        def dies(config, **options):
            if config.model.init_from:
                raise KeyboardInterrupt
            return honest(config, **options)

        with monkeypatch.context() as patch:
            patch.setattr(session, "run", dies)
            assert main(command) == 130
        assert main(command) == 0
        other = words(easy, tmp_path / "whole", *more, "--cache-dir", str(tmp_path / "cache2"))
        assert main(other) == 0
        assert result(tmp_path / "cv") == result(tmp_path / "whole")

    def test_a_stage_that_saw_held_out_images_is_refused(
        self, easy: Path, source: Path, tmp_path: Path, cache: Path, capsys
    ) -> None:
        """A copy under another name in the data of the first stage."""
        leaky = Path(shutil.copytree(source, tmp_path / "leaky"))
        stolen = sorted((easy / "TrainDataset" / "Imgs").iterdir())[0]
        shutil.copy(stolen, leaky / "TrainDataset" / "Imgs" / f"stolen{stolen.suffix}")
        mask = easy / "TrainDataset" / "GT" / f"{stolen.stem}.png"
        shutil.copy(mask, leaky / "TrainDataset" / "GT" / "stolen.png")
        more = ["--stages", str(two(tmp_path, leaky)), "--cache-dir", str(cache), "--folds", "2"]
        assert main(words(easy, tmp_path / "cv", *more)) == 3
        text = said(capsys)
        assert "Stage pretrain: 1 of 11 images are copies" in text
        assert f"stolen ({stolen.stem}" in text
        assert not list((tmp_path / "cv").glob("fold-*"))

    def test_part_of_the_images_in_a_stage(self, easy: Path, source: Path, tmp_path: Path) -> None:
        """Two roots, one of which is divided."""
        text = f"stages:\n- name: all\n  data.roots: ['{source}', '{easy}']\n- name: last\n"
        chain = read_chain(chain_file(tmp_path, text))
        config = load_config(flags={"data.roots": [str(easy)]})
        with pytest.raises(seen.DataError, match="are among those that the folds hold out"):
            seen.shared_stages(chain, config, seen.find_pool(config))
        alone = replace(config, data=replace(config.data, roots=(str(source),)))
        text = "stages:\n- name: all\n- name: last\n"
        chain = read_chain(chain_file(tmp_path, text))
        assert seen.shared_stages(chain, alone, seen.find_pool(alone)) == frozenset()
