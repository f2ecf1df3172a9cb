"""``--stages FILE``: a list of trainings, each of which starts from the weights of the one before.

::

    model: {backbone: edgenext_small}       # settings of all stages, as in a file of --config
    stages:
      - name: pretrain                      # a name, and the settings in which the stage differs
        data: {roots: [SOURCE]}
        train.epochs: 30
      - name: finetune

What a stage says wins over flags, for this stage. These stages are not the two of every run
(``--stage1-epochs``: the decoder first, then everything): each of them is a run with both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from camoxpert.config import Config, build_config, changed_settings, read_yaml, settings_of
from camoxpert.config.checks import check_conflicts
from camoxpert.errors import ConfigError
from camoxpert.files import expand_user, why_missing

INIT_FROM = "model.init_from"
KEEP_RGB, UPCYCLE_NOISE = "train.keep_rgb", "model.upcycle_noise"
"""Settings that need a model to start from."""


@dataclass(frozen=True)
class Stage:
    """One training of a chain.

    Attributes:
        name: in messages and in the name of its run.
        config: all its settings.
        last: no stage follows.
    """

    name: str
    config: Config
    last: bool = False


@dataclass(frozen=True)
class Chain:
    """What a file of stages says.

    Attributes:
        path: the file.
        common: dotted path -> value for all stages; flags win over them.
        stages: (name, dotted path -> value) of each.
    """

    path: Path
    common: Mapping[str, Any]
    stages: tuple[tuple[str, Mapping[str, Any]], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: equal for chains that train the same."""
        stages = [[name, dict(own)] for name, own in self.stages]
        plain: dict[str, Any] = json.loads(json.dumps({"common": self.common, "stages": stages}))
        return plain

    def resolve(self, base: Config) -> list[Stage]:
        """Return the stages with all their settings.

        Args:
            base: the settings that they share.

        Raises:
            ConfigError: a stage's settings cannot be.
        """
        shared = changed_settings(base)
        found = []
        for number, (name, own) in enumerate(self.stages, 1):
            last = number == len(self.stages)
            # Test sets are scored by the model that was asked for.
            beneath = shared if last else {**shared, "run.test": False}
            if number > 1:
                beneath = {path: value for path, value in beneath.items() if path != INIT_FROM}
            try:
                config = build_config({**beneath, **own})
                if not last:
                    config = _with_what_applies(config, own, started=number > 1)
                check_conflicts(config if number == 1 else _with_start(config, self.path))
            except ConfigError as error:
                raise ConfigError(f"{self.path}, stage {name}: {error}") from error
            found.append(Stage(name, config, last))
        return found


def _with_what_applies(config: Config, own: Mapping[str, Any], *, started: bool) -> Config:
    """Return the settings of a stage before the last without those that all stages share and that
    need a start, or modalities, which this one does not have.

    Args:
        config: its settings.
        own: those that it says itself, which stay.
        started: whether a stage comes before it.
    """
    started = started or bool(config.model.init_from)
    if not (started and config.data.beside_rgb) and KEEP_RGB not in own:
        config = replace(config, train=replace(config.train, keep_rgb=False))
    if not started and UPCYCLE_NOISE not in own:
        config = replace(config, model=replace(config.model, upcycle_noise=0.0))
    return config


def _with_start(config: Config, start: Path) -> Config:
    """Return settings as they are once the stage before has left its weights, for checks."""
    # Weights of the backbone are those of the first stage; the stage before replaces them.
    return replace(config, model=replace(config.model, init_from=str(start), weights=""))


def read_chain(path: str | Path) -> Chain:
    """Read a file of stages.

    Raises:
        ConfigError: missing, not such a file, or with settings that a stage cannot have.
    """
    place = Path(expand_user(str(path)))
    if not place.is_file():
        raise ConfigError(f"--stages: {why_missing(place, 'file')} configs/stages.yaml is one.")
    tree = read_yaml(place)
    listed = tree.pop("stages", None)
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"--stages: {place} has no list `stages`. Each of its entries has a name and the "
            f"settings of one training; configs/stages.yaml is an example."
        )
    names: list[str] = []
    stages = []
    for number, entry in enumerate(listed, 1):
        where = f"{place}, stage {number}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: got {entry!r}, not a name with settings.")
        name = str(entry.pop("name", ""))
        if not re.fullmatch(r"[\w.+-]+", name) or name.lower() in names:
            raise ConfigError(
                f"{where}: needs a name of its own from letters, digits and . + - _; got {name!r}."
            )
        names.append(name.lower())
        own = settings_of(entry, f" (in {place}, stage {name})")
        _check_own(own, f"{place}, stage {name}", first=number == 1)
        stages.append((name, own))
    return Chain(place, settings_of(tree, f" (in {place})"), tuple(stages))


def _check_own(own: Mapping[str, Any], where: str, *, first: bool) -> None:
    """Raise ConfigError for settings that the chain itself decides."""
    if INIT_FROM in own and not first:
        raise ConfigError(
            f"{where}: {INIT_FROM} is the stage before it. Leave it out; only the first stage may "
            f"start from another model."
        )
    for path in ("data.splits", "data.fold", "run.dir", "run.name", "train.resume"):
        if path in own:
            raise ConfigError(f"{where}: {path} is for all stages together. Give its flag instead.")
