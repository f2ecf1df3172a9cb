"""Spaces of settings that `sweep` searches: what is read and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.sweep import SPACE

from camoxpert.config import load_config
from camoxpert.config.checks import PATHS
from camoxpert.errors import ConfigError
from camoxpert.training.sweep.space import Dimension, read_space, start_of, values_of
from camoxpert.training.sweep.study import Book

pytest.importorskip("optuna")


class TestSpace:
    def test_by_hand(self, space: Callable[[str], Path]) -> None:
        text = f"{SPACE}optim.scheduler: [cosine, poly]\n"
        text += "model: {drop_path: {low: 0, high: 0.4, step: 0.1}}\n"
        text += "data.multi_scale: [[], [0.75, 1.25]]\n"
        text += "optim.clip_grad_norm: {low: 1, high: 5, int: true}\n"
        assert read_space(space(text)) == (
            Dimension("optim.lr", (), 1e-4, 1e-2, True, False),
            Dimension("model.top_k", (), 1, 3, False, True),
            Dimension("optim.scheduler", ("cosine", "poly")),
            Dimension("model.drop_path", (), 0.0, 0.4, False, False, 0.1),
            Dimension("data.multi_scale", ((), (0.75, 1.25))),
            Dimension("optim.clip_grad_norm", (), 1.0, 5.0, False, True),
        )

    def test_what_is_drawn_stands_for_settings(self, space: Callable[[str], Path]) -> None:
        dims = read_space(
            space("data.multi_scale: [[], [0.75, 1.25]]\noptim.lr: {low: 1e-4, high: 1e-2}")
        )
        config = load_config(flags={"optim.lr": 1e-3, "data.multi_scale": (0.75, 1.25)})
        drawn = start_of(dims, config)
        assert values_of(dims, drawn) == {"data.multi_scale": [0.75, 1.25], "optim.lr": 1e-3}
        assert start_of(dims, load_config(flags={"optim.lr": 0.1})) == {}
        assert start_of(dims, load_config()) == {}, "unset: the preset decides"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("optim.lrr: [1, 2]", "unknown setting optim.lrr. Did you mean optim.lr?"),
            ("lr: [1e-3, 1e-2]", "Did you mean optim.lr?"),
            ("optim: {lerning_rate: [1, 2]}", "unknown setting optim.lerning_rate"),
            ("optim.scheduler: [cosine, polly]", "Did you mean poly?"),
            ("optim.lr: {lo: 1e-4, high: 1e-2}", "unknown word lo. Did you mean low?"),
            ("optim.lr: {low: 1e-2, high: 1e-4}", "low must be below high"),
            ("optim.lr: {low: 1e-2}", "needs low and high"),
            ("optim.lr: 0.001", "must be a list"),
            ("optim.lr: {low: -1, high: 1}", "must be above 0"),
            ("optim.min_lr: {low: 0, high: 1, log: true}", "low must be above 0"),
            ("optim.min_lr: {low: 0.5, high: 1, int: true}", "odd ends"),
            ("optim.lr: {low: 1e-4, high: 1e-2, log: true, step: 1e-4}", "a step is above 0"),
            ("optim.lr: {low: 1e-4, high: 1e-2, log: maybe}", "true or false"),
            ("optim.scheduler: {low: 1, high: 2}", "give a list of values"),
            ("optim.scheduler: [cosine]", "at least two"),
            ("optim.scheduler: [cosine, cosine]", "given twice"),
            ("model.top_k: [0, 1]", "at least 1"),
            ("run.dir: [a, b]", "cannot be searched"),
            ("data.roots: [a, b]", "cannot be searched"),
            ("train.quick.data_fraction: [0.1, 0.2]", "cannot be searched"),
            ("data.val_fraction: [0.1, 0.2]", "could not be compared"),
            ("train.seed: [1, 2]", "could not be compared"),
            ("train.select: [MAE, IoU]", "could not be compared"),
            ("data.fold: [0, 1]", "could not be compared"),
            ("data.modalities: [[rgb], [rgb, depth]]", "could not be compared"),
            ("train.validate_every: [1, 2]", "could not be compared"),
            ("train.max_skipped_steps: [10, 20]", "cannot be searched"),
            ("model.drop_path: {low: 0, high: 0.4, step: 0.5}", "more than from 0 to 0.4"),
            ("{}", "names no setting"),
            ("[1, 2]", "mapping"),
            ("a: *x", "alias"),
        ],
    )
    def test_mistakes(self, space: Callable[[str], Path], text: str, words: str) -> None:
        with pytest.raises(ConfigError) as found:
            read_space(space(text))
        assert words in str(found.value), found.value

    @pytest.mark.parametrize("path", sorted(PATHS))
    def test_no_path_is_searched(self, space: Callable[[str], Path], path: str) -> None:
        with pytest.raises(ConfigError, match="cannot be searched"):
            read_space(space(f"{path}: [a, b]"))

    @pytest.mark.parametrize(
        ("entry", "value", "drawn"),
        [
            # 0.3 % 0.1 is 0.09999999999999998.
            ("{low: 0, high: 0.4, step: 0.1}", 0.3, 0.3),
            ("{low: 0.1, high: 0.7, step: 0.2}", 0.5, 0.5),
            ("{low: 0, high: 0.4, step: 0.1}", 0.35, None),
            ("{low: 0, high: 0.4, step: 0.1}", 0.5, None),
            ("{low: 0, high: 4, int: true}", 1.5, None),
            ("{low: 0, high: 4, int: true, step: 2}", 2.0, 2),
            ("{low: 0, high: 4, int: true, step: 2}", 3.0, None),
        ],
    )
    def test_the_first_trial_has_the_settings_as_they_are_if_it_can(
        self, space: Callable[[str], Path], tmp_path: Path, entry: str, value: float, drawn: Any
    ) -> None:
        dims = read_space(space(f"optim.weight_decay: {entry}"))
        start = start_of(dims, load_config(flags={"optim.weight_decay": value}))
        assert start == ({} if drawn is None else {"optim.weight_decay": drawn})
        if drawn is None:
            return
        assert isinstance(start["optim.weight_decay"], type(drawn))
        book = Book(tmp_path, dims, higher_is_better=True, epochs=4, seed=0, start=start)
        claim = book.claim(1)
        assert claim is not None and claim.drawn == start
        claim.lock.release()

    def test_a_missing_file(self, space: Callable[[str], Path], tmp_path: Path) -> None:
        space()
        with pytest.raises(ConfigError, match=r"Did you mean .*space\.yaml"):
            read_space(tmp_path / "spase.yaml")
