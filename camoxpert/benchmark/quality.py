"""``benchmark quality``: which decoder is best on this data, each at its own best learning rate.

Every arm has the same backbone, weights, data, augmentation, loss, schedule and steps. The rate of
an arm is the one with the best mean score on the validation split, of the same rates for all. With
it the arm is trained on all training images once per seed, and the test sets are scored once. Runs
are ordinary runs; a contest that was stopped continues where it was.
"""

from __future__ import annotations

import math
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from camoxpert import console, text
from camoxpert.benchmark.train import one_expert_of_equal_work
from camoxpert.config import (
    DECODERS,
    Config,
    QuickConfig,
    changed_settings,
    load_config,
    quick_words,
)
from camoxpert.data.samples.augment import image_sides
from camoxpert.errors import CheckpointError, ConfigError, NumericError, Stopped
from camoxpert.files import read_json
from camoxpert.models.backbone import Backbone
from camoxpert.models.camoxpert import build_model
from camoxpert.models.cost import Cost, network_cost
from camoxpert.runs.identity import setting_differences
from camoxpert.runs.records import read_info, read_records
from camoxpert.training import session

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SEARCH_FRACTION = 0.2
"""Share of TRAIN that chooses the rate, where the data has no validation split."""
CLOSE = 0.02
"""Scores in validation that are less apart do not tell rates apart: seeds differ by as much."""
DENSE_ACTIVE, DENSE_TOTAL = "dense-active", "dense-total"
ARMS = {
    "moe": "the mixture of experts, as the settings say",
    DENSE_ACTIVE: "one expert for all images, as many multiply-adds as an image's experts",
    DENSE_TOTAL: "one expert for all images, as many multiply-adds as all experts",
    **{name: "of segmentation-models-pytorch" for name in DECODERS if name != "moe"},
}


@dataclass(frozen=True)
class Arm:
    """A contestant.

    Attributes:
        name: in the table and in the names of its runs.
        config: the settings of its runs but for rate, seed and split.
        parameters: of the network.
        cost: multiply-adds of the network for one image.
    """

    name: str
    config: Config
    parameters: int
    cost: Cost


@dataclass(frozen=True)
class Trial:
    """One training run of the contest.

    Attributes:
        arm: contestant.
        rate: peak learning rate of the decoder.
        seed: of the run.
        final: trained on all images and scored on the test sets; else it helps to choose the rate.
    """

    arm: Arm
    rate: float
    seed: int
    final: bool

    @property
    def name(self) -> str:
        """Name of the run folder."""
        part = f"seed{self.seed}" if self.final else f"search-seed{self.seed}"
        return f"{self.arm.name}-lr{self.rate:g}-{part}"

    def config(self, folder: Path) -> Config:
        """Return the settings of the run.

        Args:
            folder: receives the run folder.
        """
        config = self.arm.config
        fraction = 0.0 if self.final else max(config.data.val_fraction, SEARCH_FRACTION)
        return replace(
            config,
            data=replace(config.data, val_fraction=fraction),
            optim=replace(config.optim, lr=self.rate, stage2_lr=None),
            train=replace(config.train, seed=self.seed, resume="auto", max_hours=None),
            run=replace(
                config.run,
                dir=str(folder),
                name=self.name,
                test=self.final,
                report=False,
                tensorboard=False,
                num_images=0,
            ),
        )


@dataclass(frozen=True)
class ArmResult:
    """What the contest found about an arm.

    Attributes:
        arm: contestant.
        search: rate -> best score on the validation split; None where training failed.
        rate: the best of them.
        runs: run folders of the seeds.
    """

    arm: Arm
    search: dict[float, float | None]
    rate: float
    runs: tuple[Path, ...]

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate is the smallest or largest tried: a better one may lie outside."""
        return len(self.search) > 1 and self.rate in (min(self.search), max(self.search))

    @property
    def close_rate(self) -> float | None:
        """Another rate that was nearly as good in validation: a coin flip; None: there is none."""
        best = self.search.get(self.rate)
        others = {rate: score for rate, score in self.search.items() if rate != self.rate}
        near = [
            (score, rate)
            for rate, score in others.items()
            if best is not None and score is not None and best - score < CLOSE
        ]
        return max(near)[1] if near else None


def build_arms(
    config: Config, names: Sequence[str] | None, own: Mapping[str, Sequence[str]]
) -> list[Arm]:
    """Return the contestants; the first is the one that the others are compared with.

    Args:
        config: settings of all.
        names: of ARMS; None: all that the backbone can have.
        own: name -> dotted overrides of further arms.

    Raises:
        ConfigError: an unknown or doubled name, or settings that cannot be.
    """
    for name in names or ():
        if name not in ARMS:
            raise ConfigError(
                f"--arms: unknown arm {name!r}.{text.did_you_mean(name, ARMS)} Known: "
                f"{', '.join(ARMS)}; --arm NAME SETTING=VALUE adds one."
            )
    for name in own:
        if name in ARMS or not re.fullmatch(r"[\w.+-]+", name):
            raise ConfigError(
                f"--arm {name}: the name is taken or not plain (letters, digits, . + -); the "
                "settings follow it: --arm wide model.width=128."
            )
    arms = []
    for name in dict.fromkeys(ARMS if names is None else names):
        try:
            arms.append(_arm(name, _with_decoder(config, name)))
        except ConfigError as error:
            if names is not None or name == "moe":
                raise
            console.say(f"{name} is left out: {error}")
    typed = changed_settings(config)
    for name, overrides in own.items():
        arms.append(_arm(name, load_config(flags=typed, overrides=overrides)))
    return arms


def _arm(name: str, config: Config) -> Arm:
    """Build an arm's network once: what cannot be is found before hours of training.

    Raises:
        ConfigError: settings that cannot be, or early stopping: all arms take the same steps.
    """
    if config.train.early_stopping:
        raise ConfigError(
            f"{name}: --early-stopping has no place here: all arms take the same steps, and the "
            "final runs have no validation split."
        )
    if config.train.quick != QuickConfig():
        raise ConfigError(
            f"{name}: the runs of a contest are whole ones. Leave out "
            f"{text.shorten(quick_words(config.train.quick))}; `sweep` takes quick runs."
        )
    bare = replace(config.model, pretrained=False, weights="", init_from="")
    with torch.random.fork_rng(devices=[]):
        network = build_model(
            bare, sides=image_sides(config.data), modalities=config.data.beside_rgb
        )
    parameters = sum(p.numel() for p in network.parameters())
    return Arm(name, config, parameters, network_cost(network, config.data.img_size))


def _with_decoder(config: Config, name: str) -> Config:
    """Return the settings of an arm of ARMS."""
    if name in DECODERS:
        return replace(config, model=replace(config.model, decoder=name))
    model = replace(config.model, decoder="moe")
    bare = replace(model, pretrained=False, weights="", init_from="")
    channels = Backbone(bare, image_sides(config.data)).channels
    single, _ = one_expert_of_equal_work(
        model, channels, config.data.img_size, all_experts=name == DENSE_TOTAL
    )
    return replace(config, model=single, train=replace(config.train, router_warmup=0))


def contest(
    arms: Sequence[Arm],
    folder: Path,
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    search_seeds: int = 1,
    max_hours: float | None = None,
) -> list[ArmResult]:
    """Search the rate of every arm, then train it with every seed; skip what is done.

    Args:
        arms: contestants.
        folder: receives a folder for each run, and holds those of a contest that was stopped.
        rates: peak learning rates to choose from; a single one is taken as it is.
        seeds: of the final runs; the first of them are those of the search.
        search_seeds: runs with each rate, whose mean score chooses; one is a coin flip between
            rates that are nearly as good.
        max_hours: after this time the run in progress is saved and the contest stops.

    Raises:
        Stopped: the same call continues.
        CheckpointError: the folder holds a run with other settings.
    """
    searched = len(rates) > 1
    for arm in arms:
        for rate in rates:
            for seed in seeds:
                for final in (True, False):
                    # Before hours of training: a folder of another contest is refused at once.
                    trial = Trial(arm, rate, seed, final)
                    _is_done(folder / trial.name, trial.config(folder))
    deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
    tried = seeds[:search_seeds] if searched else ()
    number, total = 0, len(arms) * (len(rates) * len(tried) + len(seeds))
    results = []
    for arm in arms:
        search: dict[float, float | None] = {}
        for rate in rates if searched else ():
            scores = []
            for seed in tried:
                number += 1
                trial = Trial(arm, rate, seed, final=False)
                scores.append(_train(trial, folder, f"[{number}/{total}]", deadline))
            known = [score for score in scores if score is not None]
            # A rate with which training fails is none, however good it is with another seed.
            search[rate] = statistics.mean(known) if len(known) == len(tried) else None
        best = max(search, key=lambda rate: _or_worst(search[rate])) if searched else rates[0]
        runs = []
        for seed in seeds:
            number += 1
            trial = Trial(arm, best, seed, final=True)
            _train(trial, folder, f"[{number}/{total}]", deadline)
            runs.append(folder / trial.name)
        results.append(ArmResult(arm, search, best, tuple(runs)))
    return results


def _or_worst(score: float | None) -> float:
    return -math.inf if score is None else score


def _train(trial: Trial, folder: Path, place: str, deadline: float | None) -> float | None:
    """Train, unless that was done before; return the score of a search run, None if it failed.

    Args:
        trial: the run.
        folder: receives the run folder.
        place: number of the run, for the user.
        deadline: of the contest, on the monotonic clock, or None.
    """
    config = trial.config(folder)
    path = folder / trial.name
    started = time.monotonic()
    done = _is_done(path, config)
    if not done:
        console.note(f"{place} {trial.name}: training")
        if deadline is not None:
            # A run that begins at the deadline stops in its first step.
            left = max((deadline - started) / 3600, 1e-6)
            config = replace(config, train=replace(config.train, max_hours=left))
        try:
            with console.muted():
                session.run(config)
        except NumericError as error:
            if trial.final:
                raise
            console.say(f"{place} {trial.name}: training failed: {error}")
            return None
        except Stopped as stopped:
            stopped.args = (f"Stopped in {trial.name}; the same command continues there.",)
            raise
    seconds = "done before" if done else f"{time.monotonic() - started:.0f} s"
    _prune(path, keep_best=trial.final)
    if trial.final:
        console.say(f"{place} {trial.name}: {_score_line(path)} ({seconds})")
        return None
    best = read_records(path / "metrics.jsonl").best
    score = None if best is None else best["scores"].get(config.train.select)
    shown = "not validated" if score is None else f"{config.train.select} {score:.3f} in validation"
    console.say(f"{place} {trial.name}: {shown} ({seconds})")
    return score


def _prune(path: Path, *, keep_best: bool) -> None:
    """Delete the weights of a finished run that nobody needs: a contest has dozens of runs."""
    for file in (path / "checkpoints").glob("*.pt"):
        if not (keep_best and file.name == "best.pt"):
            file.unlink()
    if not keep_best:
        shutil.rmtree(path / "model", ignore_errors=True)


def _is_done(path: Path, config: Config) -> bool:
    """Return whether a run is finished.

    Raises:
        CheckpointError: it was trained with other settings.
    """
    if not (path / "config.yaml").is_file():
        return False
    old = load_config(file=path / "config.yaml")
    changes = setting_differences(old, config, before={}, now={})
    if changes:
        raise CheckpointError(
            f"{path} was trained with other settings ({text.shorten(changes.values(), 3)}). Give "
            "another --output folder, or remove that run."
        )
    return read_info(path).get("status") == "finished"


def _score_line(path: Path) -> str:
    scores = read_json(path / "evaluation" / "scores.json").get("results", [])
    return ", ".join(f"{row['dataset']} wF {row['scores']['wFmeasure']:.3f}" for row in scores)
