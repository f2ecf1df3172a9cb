"""Settings: one tree, sources in order, and errors that suggest the nearest name."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from camoxpert.config import (
    EXPERT_KINDS,
    Config,
    changed_settings,
    config_from_dict,
    leaves,
    load_config,
    to_dict,
    to_yaml,
)
from camoxpert.config.flags import add_setting_flags, read_config
from camoxpert.errors import ConfigError
from camoxpert.stages.chain import read_chain

CONFIGS = Path(__file__).parents[1] / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "optim: {lr: 1e-3, min_lr: 1e-7}\ntrain: {epochs: 9}\n")
    config = load_config(file=file, flags={"optim.lr": 2e-3}, overrides=["train.epochs=7"])
    assert (config.optim.lr, config.optim.min_lr, config.train.epochs) == (2e-3, 1e-7, 7)
    assert config.data.img_size == Config().data.img_size


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),
        ("train.epochs=12", 12),
        ("train.use_ema=false", False),
        ("train.gradient_checkpointing=on", "on"),
        ("train.gradient_checkpointing=off", "off"),
        ("data.roots=[a, b]", ("a", "b")),
        ("data.roots=a", ("a",)),
        ("optim.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("optim.stage2_lr=null", None),
        ("run.name=007", "007"),
        ("run.name=1.50", "1.50"),
    ],
)
def test_override_values_keep_their_type(override: str, value: object) -> None:
    config = load_config(overrides=[override])
    group, name = override.partition("=")[0].split(".")
    got = getattr(getattr(config, group), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lrr=1"], "Did you mean optim.lr?"),
        (["lr=1"], "Did you mean optim.lr?"),
        (["model.num_expert=3"], "Did you mean model.num_experts?"),
        (["optim.lr=fast"], "optim.lr must be a number, got 'fast'"),
        (["train.epochs=2.5"], "train.epochs must be a whole number"),
        (["train.epochs=true"], "train.epochs must be a whole number"),
        (["train.use_ema=1"], "train.use_ema must be true or false"),
        (["optim.betas=[0.9]"], "optim.betas must be a list"),
        (["optim.scheduler=cosin"], "Did you mean cosine?"),
        (["optim.lr=0"], "must be above 0"),
        (["optim.lr=.nan"], "must be a number"),
        (["data.val_fraction=0.9"], "at most 0.5"),
        (["data.img_size=100"], "Use 96 or 128"),
        (["model.width=30"], "multiple of 8"),
        (["model.top_k=8"], "Lower --top-k"),
        (["model.experts=[edges]"], "Did you mean edge?"),
        (["model.shared_expert=edges"], "Did you mean edge?"),
        (["model.num_experts=2", "model.experts=[edge,texture,contrast]"], "names 3 kinds"),
        (["train.epochs=5", "train.stage1_epochs=6"], "--stage1-epochs 6"),
        (["train.amp=false", "train.precision=bf16"], "contradict"),
        (["train.resume=never", "train.resume_from=x"], "contradict"),
        (["optim.min_lr=1", "optim.lr=0.01"], "--min-lr"),
        (["loss.structure=0"], "weight 0"),
        (["train.early_stopping=3", "data.val_fraction=0"], "validation split"),
        (["train.device=gpu"], "--device"),
        (["optim"], "group.name=value"),
        (["optim=3"], "Did you mean"),
    ],
)
def test_mistakes_are_named(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {lrr: 1}", "Did you mean optim.lr?"),
        ("optim: 3", "group of settings"),
        ("optim: {lr: 1}\noptim: {lr: 2}", "duplicate key"),
        ("- a\n- b", "mapping"),
        ("optim: [", "cannot be read as YAML"),
        ("run: {name: '${oc.env:HOME}'}", "resolver"),
        ("a: &x [1, 2]\nb: *x", "alias"),
        ("optim: {lr: {peak: 1}}", "optim.lr must be a number"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s).*") as caught:
        load_config(file=write(tmp_path / "c.yaml", text))
    assert says in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="There is no file"):
        load_config(file="nowhere.yaml")


def test_interpolation_inside_the_file_is_allowed(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "optim: {lr: 0.002, stage2_lr: '${optim.lr}'}")
    assert load_config(file=file).optim.stage2_lr == 0.002


def test_round_trips(tmp_path: Path) -> None:
    config = load_config(overrides=["optim.lr=3e-4", "data.roots=[a]", "model.experts=[edge]"])
    assert config_from_dict(to_dict(config)) == config
    assert load_config(file=write(tmp_path / "c.yaml", to_yaml(config))) == config
    assert set(changed_settings(config)) == {"optim.lr", "data.roots", "model.experts"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train.amp=false", "train.precision=fp32"),
        ("train.amp=true", "train.precision=auto"),
        ("train.skip_stage1=true", "train.stage1_epochs=0"),
        ("train.skip_stage1=false", "train.stage1_epochs=null"),
        ("train.resume_from=runs/x", "train.resume=runs/x"),
        ("train.resume_from=", "train.resume=auto"),
    ],
)
def test_settings_of_earlier_versions_keep_their_meaning(
    old: str, new: str, tmp_path: Path
) -> None:
    path, _, value = old.partition("=")
    group, name = path.split(".")
    meant = load_config(overrides=[new])
    assert load_config(overrides=[old]) == meant
    text = f"{group}: {{{name}: {value or repr('')}}}"
    assert load_config(file=write(tmp_path / "c.yaml", text)) == meant
    # A checkpoint holds every setting of its version, removed ones included.
    value_of = {"true": True, "false": False}.get(value, value)
    saved = to_dict(Config())
    saved[group][name] = value_of
    assert config_from_dict(saved) == meant


def test_two_runs_to_continue_are_one_too_many() -> None:
    both = {"train.resume": "a", "train.resume_from": "b"}
    with pytest.raises(ConfigError, match="--resume-from and --resume a contradict"):
        load_config(flags=both)
    for other in ("auto", "b"):
        assert load_config(flags=both | {"train.resume": other}).train.resume == "b"


@pytest.mark.parametrize("betas", ["[1.5,0.9]", "[0.9,1.0]", "[-0.1,0.9]"])
def test_betas_out_of_range(betas: str) -> None:
    with pytest.raises(ConfigError, match="each is at least 0 and less than 1"):
        load_config(overrides=[f"optim.betas={betas}"])


def test_every_setting_is_documented_and_flags_are_unique() -> None:
    flags = [leaf.flag for leaf in leaves() if leaf.flag]
    assert len(flags) == len(set(flags))
    assert all(len(leaf.help) > 10 for leaf in leaves())


def test_expert_kinds_match_the_table() -> None:
    from camoxpert.models.experts import EXPERTS

    assert tuple(EXPERTS) == EXPERT_KINDS


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_load_and_start_with_their_command(path: Path) -> None:
    if path.stem == "stages":
        assert len(read_chain(path).resolve(Config())) > 1
    else:
        load_config(file=path)
    head = path.read_text().splitlines()
    assert any("train_ultimate.py train" in line for line in head[:4] if line.startswith("#"))


@pytest.mark.parametrize(
    ("name", "batch", "steps", "size", "checkpointing"),
    [
        ("balanced", 32, 4, 352, "auto"),
        ("max_speed", 48, 3, 320, "off"),
        ("memory", 16, 8, 352, "on"),
    ],
)
def test_presets_are_the_ones_users_know(
    name: str, batch: int, steps: int, size: int, checkpointing: str
) -> None:
    config = load_config(file=CONFIGS / f"{name}.yaml")
    assert (config.train.batch_size, config.train.accumulation_steps) == (batch, steps)
    assert config.data.img_size == size
    assert config.train.gradient_checkpointing == checkpointing


def test_home_folders_in_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data: {roots: ['~/a', b~c]}\nrun: {dir: '~/runs'}\n")
    config = load_config(file="~/c.yaml", overrides=["data.clean_list=~/clean.csv"])
    assert config.data.roots == (str(tmp_path / "a"), "b~c")
    assert config.run.dir == str(tmp_path / "runs")
    assert config.data.clean_list == str(tmp_path / "clean.csv")
    assert load_config(overrides=["data.clean_list=~no-such-user/x"]).data.clean_list[0] == "~"


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--dataset-path", ["a", "b"]),
        ("--negatives", ["n"]),
        ("--synthetic", ["s"]),
        ("--multi-scale", ["1.0", "1.5"]),
        ("--modalities", ["depth"]),
    ],
)
def test_an_override_behind_a_list_is_an_override(flag: str, values: list[str]) -> None:
    """argparse gives it to the list."""
    parser = argparse.ArgumentParser()
    add_setting_flags(parser)
    options, rest = parser.parse_known_args([flag, *values, "model.width=16"])
    config = read_config(options, rest, beneath={})
    assert config.model.width == 16
    (path,) = [leaf.path for leaf in leaves() if leaf.flag == flag]
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    assert [str(value) for value in found] == values
