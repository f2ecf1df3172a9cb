"""A stage that all folds share holds nothing out, so it takes no images of the command."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.folds import words
from helpers.sensors import TINY_WORDS, views

from camoxpert.cli import main
from camoxpert.config import build_config, load_config
from camoxpert.crossval import seen
from camoxpert.errors import ConfigError
from camoxpert.stages.chain import Chain, read_chain
from camoxpert.synthesis.toy import generate_toy


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return another data set than the divided one."""
    generate_toy(tmp_path / "source", num_train=6, num_test=2, size=32, difficulty=0.3, seed=9)
    return tmp_path / "source"


def two(folder: Path, source: Path, more: str = "") -> Path:
    path = folder / "stages.yaml"
    first = f"- name: pretrain\n  data.roots: ['{source}']\n{more}"
    path.write_text(f"stages:\n{first}- name: finetune\n")
    return path


def with_own(chain: Chain, path: str, value: Any) -> Chain:
    """Return the chain whose first stage says a setting itself."""
    (name, own), *others = chain.stages
    return replace(chain, stages=((name, {**own, path: value}), *others))


@pytest.mark.parametrize(
    ("path", "value"),
    [("data.synthetic", ["made"]), ("data.unlabeled", "more"), ("data.negatives", ["none"])],
)
def test_what_is_inherited_is_refused(tmp_path: Path, source: Path, path: str, value: Any) -> None:
    chain = read_chain(two(tmp_path, source))
    stage = chain.resolve(load_config())[0]
    seen._require_own_images(chain, stage)
    inherits = replace(stage, config=build_config({path: value}))
    with pytest.raises(ConfigError, match=f"stage pretrain: .*inherits {path} .*`{path}: "):
        seen._require_own_images(chain, inherits)
    # What the stage itself names is its own.
    seen._require_own_images(with_own(chain, path, value), inherits)


@pytest.mark.slow
def test_a_stage_that_says_that_it_has_none(
    easy: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    shutil.copytree(source / "TrainDataset", made / "TrainDataset")
    stages = two(tmp_path, source)
    more = ["--stages", str(stages), "--synthetic", str(made), "--folds", "2", "--dry-run"]
    more += ["--cache-dir", str(tmp_path / "cache")]
    assert main(words(easy, tmp_path / "cv", *more)) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "stage pretrain" in text and "`data.synthetic: []`" in text
    two(tmp_path, source, "  data.synthetic: []\n")
    assert main(words(easy, tmp_path / "cv", *more)) == 0


def test_settings_that_need_a_start_in_a_later_stage(tmp_path: Path) -> None:
    """The stage before is the start; the first stage has none, and is refused."""
    path = tmp_path / "stages.yaml"
    base = load_config(flags={"model.weights": "x.pt", "data.modalities": ["rgb", "depth"]})
    for setting in ("train.keep_rgb: true", "model.upcycle_noise: 0.1"):
        path.write_text(f"stages:\n- name: a\n- {{name: b, {setting}}}\n")
        last = read_chain(path).resolve(base)[-1].config
        assert last.model.init_from == "" and last.model.weights == "x.pt"
        path.write_text(f"stages:\n- {{name: a, {setting}}}\n- name: b\n")
        with pytest.raises(ConfigError, match=r"stage a: .*--init-from"):
            read_chain(path).resolve(base)


def test_settings_that_need_a_start_for_all_stages(tmp_path: Path) -> None:
    """Given by the command, those stages take them that have a start, and modalities."""
    path = tmp_path / "stages.yaml"
    path.write_text(
        "stages:\n- {name: a, data.modalities: [rgb]}\n- {name: b, data.modalities: [rgb]}\n"
        "- name: c\n- name: d\n"
    )
    flags = {"train.keep_rgb": True, "model.upcycle_noise": 0.1}
    base = load_config(flags={"data.modalities": ["rgb", "depth"], **flags}, conflicts=False)
    found = [stage.config for stage in read_chain(path).resolve(base)]
    assert [one.train.keep_rgb for one in found] == [False, False, True, True]
    assert [one.model.upcycle_noise for one in found] == [0.0, 0.1, 0.1, 0.1]
    # A start of the first stage is one.
    started = replace(base, model=replace(base.model, init_from="x.pt"))
    assert read_chain(path).resolve(started)[0].config.model.upcycle_noise == 0.1
    # The last stage is what was asked for: there it is never dropped.
    path.write_text("stages:\n- name: a\n- {name: b, data.modalities: [rgb]}\n")
    with pytest.raises(ConfigError, match=r"stage b: --keep-rgb .* no --modalities"):
        read_chain(path).resolve(base)
    path.write_text("stages:\n- name: a\n")
    with pytest.raises(ConfigError, match=r"stage a: .*--init-from"):
        read_chain(path).resolve(base)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["stage", "command"])
def test_a_dry_run_of_a_stage_that_keeps_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """The start is not trained yet; the rest is tried."""
    data, path = views(tmp_path / "data"), tmp_path / "stages.yaml"
    own = ", train.keep_rgb: true" if where == "stage" else ""
    path.write_text(f"stages:\n- {{name: a, data.modalities: [rgb]}}\n- {{name: b{own}}}\n")
    words = ["train", "--dataset-path", str(data), "--checkpoint-dir", str(tmp_path / "runs")]
    words += [*TINY_WORDS, "--stages", str(path), "--cache-dir", str(tmp_path / "cache")]
    words += ["--keep-rgb"] if where == "command" else []
    assert main([*words, "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("one step forward and back") == 2
    assert "stage b: the run that is asked for --keep-rgb not tried: the stage before" in text
