"""What makes the runs of all folds one method: their settings, the content of what settings name,
and the stages before them.

Folds may be trained on several machines, so no path counts: data, models and files are compared by
their recorded hashes. What differs from fold to fold by design is left out: which fold is held out,
the seed of a repeat, and the weights that a fold's own stages left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from camoxpert.config import Config, load_config
from camoxpert.runs.folder import recorded_hashes
from camoxpert.runs.identity import PLACES, ROOTS, setting_differences
from camoxpert.runs.records import read_info
from camoxpert.stages.chain import INIT_FROM, Stage
from camoxpert.stages.key import FOLD, SPLITS, Facts, differences, facts_of

SEED = "train.seed"


@dataclass(frozen=True)
class Method:
    """How a fold was trained, or is to be.

    Attributes:
        config: its settings, without what differs from fold to fold.
        files: sha256 of the files that settings name, by dotted path.
        data: hash of all training data, or "": not known.
        stages: (name, what its result depends on) of the stages before the last; None: not
            recorded, as by older versions.
        staged: whether there were any.
    """

    config: Config
    files: Mapping[str, str]
    data: str
    stages: Sequence[tuple[str, Mapping[str, Any]]] | None
    staged: bool


def method_of(
    config: Config,
    *,
    repeat: int,
    files: Mapping[str, str],
    data: str,
    stages: Sequence[tuple[str, Mapping[str, Any]]] | None,
    staged: bool | None = None,
) -> Method:
    """Return how a fold is trained.

    Args:
        config: settings of its run.
        repeat: of the fold, from 0; its seed is that of the first repeat and this number.
        files, data, stages, staged: as ``Method`` has them; ``staged`` None follows from
            ``stages``.
    """
    has_stages = bool(stages) if staged is None else staged
    model = replace(config.model, init_from="") if has_stages else config.model
    neutral = replace(
        config,
        data=replace(config.data, splits="", fold=None),
        model=model,
        train=replace(config.train, seed=config.train.seed - repeat),
    )
    apart = {SPLITS, *([INIT_FROM] if has_stages else [])}
    kept = {path: digest for path, digest in files.items() if path not in apart}
    return Method(neutral, kept, data, stages, has_stages)


def method_of_run(
    run: Path, about: Mapping[str, Any], *, repeat: int, staged: bool | None = None
) -> Method:
    """Return how the run of a fold was trained, as its records say.

    Args:
        run: its folder.
        about: content of its ``fold.json``; {} for one that is not scored.
        repeat: of the fold, from 0.
        staged: whether stages lead to it; None: as its records say.
    """
    info, listed = read_info(run), about.get("stages")
    stages = None
    if isinstance(listed, list):
        stages = [(str(one["name"]), one["facts"]) for one in listed]
    return method_of(
        load_config(file=run / "config.yaml"),
        repeat=repeat,
        files=recorded_hashes(info),
        data=str(info.get("data_hash") or ""),
        stages=stages,
        staged=bool(stages or info.get("stages")) if staged is None else staged,
    )


def stages_before(stages: Sequence[Stage], *, repeat: int) -> list[tuple[str, dict[str, Any]]]:
    """Return what the stages before the last depend on, equal for all folds of a method.

    Args:
        stages: of one fold.
        repeat: of the fold, from 0.
    """
    found = []
    for number, stage in enumerate(stages[:-1]):
        # A parent means that the start is the stage before, whose weights are each fold's own.
        facts = facts_of(stage.config, "before" if number else "")
        settings = dict(facts.settings)
        if settings.pop(FOLD, None) is not None:
            settings[SEED] -= repeat
        neutral = replace(facts, settings=settings, splits="", code="", parent="")
        found.append((stage.name, neutral.to_dict()))
    return found


def method_differences(old: Method, new: Method) -> list[str]:
    """Return in what two folds were trained in another way, in words; []: they are one method."""
    changes = setting_differences(old.config, new.config, before=old.files, now=new.files)
    if old.staged != new.staged:
        # The start of one of them is what its stages left.
        changes.pop(INIT_FROM, None)
    known = bool(old.data and new.data)
    # The folds know their images; of those beside them only a hash says whether they are the same.
    forgiven = PLACES if known else {ROOTS}
    words = [text for path, text in changes.items() if path not in forgiven]
    if known and old.data != new.data:
        moved = [text for path, text in changes.items() if path in PLACES and path != ROOTS]
        words += moved or [
            "the training data, or what lies beside it (--synthetic, --negatives, --unlabeled, "
            "--modalities), has other content"
        ]
    return words + _stage_differences(old, new)


def _stage_differences(old: Method, new: Method) -> list[str]:
    if old.staged != new.staged:
        return [f"stages before it: {_named(old)} -> {_named(new)}"]
    if old.stages is None or new.stages is None:
        return []
    if [name for name, _ in old.stages] != [name for name, _ in new.stages]:
        return [f"stages before it: {_named(old)} -> {_named(new)}"]
    return [
        f"stage {name}: {text}"
        for (name, one), (_, other) in zip(old.stages, new.stages, strict=True)
        for text in differences(one, _facts(other))
    ]


def _named(method: Method) -> str:
    if method.stages is None:
        return "some" if method.staged else "none"
    return ", ".join(name for name, _ in method.stages) or "none"


def _facts(values: Mapping[str, Any]) -> Facts:
    return Facts(**{name: values[name] for name in Facts.__dataclass_fields__})
