"""Folds from several machines are joined where they are one method, whatever their paths are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camoxpert.config import load_config, to_yaml
from camoxpert.crossval.method import method_differences, method_of_run, stages_before
from camoxpert.errors import ConfigError
from camoxpert.files import write_json
from camoxpert.stages import key
from camoxpert.stages.chain import Chain, read_chain

DATA, OTHER = "d" * 64, "e" * 64
FILES = {"model.init_from": "1" * 64, "data.teacher": "2" * 64, "data.clean_list": "3" * 64}


def fold_run(
    folder: Path, *, fold: int = 1, data: str | None = DATA, files: Any = FILES, **settings: Any
) -> Path:
    """Write the records of a fold that was trained at a place of its own."""
    place = f"/machine{fold}"
    flags = {
        "data.roots": [f"{place}/easy"],
        "data.synthetic": [f"{place}/made"],
        "data.unlabeled": f"{place}/more",
        "data.teacher": f"{place}/teacher.pt",
        "data.clean_list": f"{place}/clean.csv",
        "data.splits": f"{place}/cv/splits.json",
        "data.cache_dir": f"{place}/cache",
        "data.fold": fold,
        "model.init_from": f"{place}/model.pt",
    }
    more = {name.replace("__", "."): value for name, value in settings.items()}
    run = folder / f"fold-{fold}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config(flags=flags | more)))
    # Splits that other versions wrote differ in their bytes and not in their folds.
    known = {**files, "data.splits": str(fold) * 64}
    write_json(run / "run.json", {"files": known, **({"data_hash": data} if data else {})})
    return run


def differences(
    first: Path, second: Path, *, repeats: tuple[int, int] = (0, 0), **about: Any
) -> str:
    """Return in what two folds differ; ``about`` is what each says of its stages."""
    methods = [
        method_of_run(run, {} if not about else {"stages": about[name]}, repeat=repeat)
        for run, name, repeat in zip((first, second), ("one", "two"), repeats, strict=True)
    ]
    return "; ".join(method_differences(*methods))


class TestPlaces:
    def test_the_same_data_and_files_at_other_places(self, tmp_path: Path) -> None:
        assert differences(fold_run(tmp_path), fold_run(tmp_path, fold=2)) == ""

    @pytest.mark.parametrize("path", FILES)
    def test_another_file(self, tmp_path: Path, path: str) -> None:
        """Even under one name: its content is another one."""
        other = fold_run(tmp_path, fold=2, files={**FILES, path: "9" * 64})
        assert differences(fold_run(tmp_path), other).startswith(f"{path}: /machine1/")
        missing = {name: digest for name, digest in FILES.items() if name != path}
        # Images without masks need a teacher.
        unset = {path.replace(".", "__"): "", "data__unlabeled": ""}
        none = fold_run(tmp_path / "none", fold=2, files=missing, **unset)
        assert path in differences(tmp_path / "fold-1", none)

    def test_other_data_beside_the_divided(self, tmp_path: Path) -> None:
        first = fold_run(tmp_path)
        assert "data.synthetic: /machine1/made -> /machine2/made" in differences(
            first, fold_run(tmp_path, fold=2, data=OTHER)
        )
        again = fold_run(tmp_path / "again", data=OTHER)
        assert "has other content" in differences(first, again)

    def test_without_a_hash_only_the_roots_are_forgiven(self, tmp_path: Path) -> None:
        words = differences(fold_run(tmp_path, data=None), fold_run(tmp_path, fold=2))
        assert "data.synthetic" in words and "data.roots" not in words

    def test_the_seed_follows_the_repeat(self, tmp_path: Path) -> None:
        first, second = fold_run(tmp_path, train__seed=5), fold_run(tmp_path, fold=2, train__seed=6)
        assert differences(first, second, repeats=(0, 1)) == ""
        assert differences(first, second) == "train.seed: 5 -> 6"

    def test_other_settings(self, tmp_path: Path) -> None:
        second = fold_run(tmp_path, fold=2, optim__lr=0.5)
        assert differences(fold_run(tmp_path), second).startswith("optim.lr: ")


class TestStages:
    @pytest.fixture(autouse=True)
    def at_no_cost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The data of a stage is not there; its hash is what would be found."""
        monkeypatch.setattr(key, "hash_of_data", lambda config: Path(config.data.roots[0]).name)
        splits = type("Splits", (), {"digest": "s"})
        monkeypatch.setattr(key, "read_splits", lambda path: splits)

    def chain(self, folder: Path, text: str) -> Chain:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stages.yaml").write_text(text)
        return read_chain(folder / "stages.yaml")

    def about(self, folder: Path, text: str, *, fold: int = 1, repeat: int = 0) -> list[Any]:
        """Return what ``fold.json`` says of the stages of a fold; the first of them is shared."""
        base = load_config(flags={"data.roots": [f"/machine{fold}/easy"], "train.seed": 5})
        stages = []
        for stage in self.chain(folder / str(fold), text).resolve(base):
            config = stage.config
            if stage.name != "shared":
                data = replace(config.data, splits=f"/machine{fold}/splits.json", fold=fold)
                config = replace(
                    config, data=data, train=replace(config.train, seed=config.train.seed + repeat)
                )
            stages.append(replace(stage, config=config))
        found = stages_before(stages, repeat=repeat)
        return [{"name": name, "facts": facts} for name, facts in found]

    TEXT = (
        "stages:\n- {{name: shared, data.roots: [/machine{0}/source]}}\n"
        "- {{name: own, train.epochs: {1}}}\n- name: last\n"
    )

    def test_equal_stages_at_other_places(self, tmp_path: Path) -> None:
        """Their weights differ, as each fold trained its own: what led to them is compared."""
        first = fold_run(tmp_path, model__init_from="/machine1/cache/stages/a/best.pt")
        files = {**FILES, "model.init_from": "7" * 64}
        second = fold_run(tmp_path, fold=2, files=files, train__seed=43)
        one = self.about(tmp_path, self.TEXT.format(1, 3))
        two = self.about(tmp_path, self.TEXT.format(2, 3), fold=2, repeat=1)
        assert differences(first, second, repeats=(0, 1), one=one, two=two) == ""
        # Without stages the weights are what counts.
        words = differences(first, second, repeats=(0, 1), one=[], two=[])
        assert words.startswith("model.init_from: /machine1/")

    def test_other_stages(self, tmp_path: Path) -> None:
        runs = fold_run(tmp_path), fold_run(tmp_path, fold=2)
        one = self.about(tmp_path, self.TEXT.format(1, 3))
        two = self.about(tmp_path, self.TEXT.format(2, 9), fold=2)
        assert differences(*runs, one=one, two=two) == "stage own: train.epochs differs (3 -> 9)"
        moved = self.TEXT.format(2, 3).replace("source", "elsewhere")
        two = self.about(tmp_path, moved, fold=2)
        assert differences(*runs, one=one, two=two) == "stage shared: the training data differs"
        assert "stages before it: shared, own -> none" in differences(*runs, one=one, two=[])
        assert "shared, own -> own" in differences(*runs, one=one, two=one[1:])

    def test_folds_of_older_versions(self, tmp_path: Path) -> None:
        """They say only that there were stages, in run.json."""
        first, second = fold_run(tmp_path), fold_run(tmp_path, fold=2)
        for run in (first, second):
            write_json(run / "run.json", {"data_hash": DATA, "files": FILES, "stages": [{}]})
        assert differences(first, second) == ""
        write_json(second / "run.json", {"data_hash": DATA, "files": FILES})
        assert differences(first, second) == "stages before it: some -> none"

    def test_the_file_of_stages_without_paths(self, tmp_path: Path) -> None:
        """The same stages on two machines; of other ones the command is refused."""
        from camoxpert.crossval.opening import _settle_chain

        out = tmp_path / "cv"
        (out / "fold-1").mkdir(parents=True)
        write_json(out / "fold-1" / "run.json", {"stages": [{"name": "shared"}]})
        with pytest.raises(
            ConfigError, match=r"have 2 stages \(shared, the last\), and these have no"
        ):
            _settle_chain(out, None)
        _settle_chain(out, self.chain(tmp_path / "1", self.TEXT.format(1, 3)))
        _settle_chain(out, self.chain(tmp_path / "2", self.TEXT.format(2, 3)))
        with pytest.raises(ConfigError, match="have the same stages"):
            _settle_chain(out, self.chain(tmp_path / "3", self.TEXT.format(1, 9)))
        write_json(tmp_path / "plain" / "fold-1" / "run.json", {})
        with pytest.raises(ConfigError, match="have no stages, and these have 3 stages"):
            _settle_chain(tmp_path / "plain", self.chain(tmp_path / "1", self.TEXT.format(1, 3)))
