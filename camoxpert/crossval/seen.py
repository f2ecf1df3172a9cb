"""Keep what already saw the held-out images out of a cross-validation: other models, and stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from camoxpert import console
from camoxpert.config import Config, get_setting
from camoxpert.crossval.divide import find_pool
from camoxpert.crossval.learned import lineage, overlap
from camoxpert.data.cache.choice import cache_root
from camoxpert.data.files.manifest import Manifest
from camoxpert.doctor.leaks import LeakSearch, copies_of
from camoxpert.errors import CheckpointError, ConfigError, DataError
from camoxpert.runs.hub import is_hub_name
from camoxpert.stages.chain import Chain, Stage
from camoxpert.text import count, shorten
from camoxpert.training.data import hash_of_data

STARTS = (
    *(("--init-from", "model.init_from"), ("--teacher", "data.teacher")),
    *(("--weights", "model.weights"), ("--support-weights", "model.support.weights")),
)
"""Settings that name a model to start from or to learn from, with their flags."""
BESIDE = {"data.synthetic": "[]", "data.unlabeled": "''", "data.negatives": "[]"}
"""Settings that bring images beside the roots, and how a stage says that it has none."""


def require_nothing_seen(configs: Sequence[Config], pool: Manifest) -> None:
    """Refuse a start or a teacher that learned from the images that folds hold out: under any
    splits, in other folders, through a model before it, or from the Hub.

    What cannot be known is said.

    Args:
        configs: the settings of all stages; the last are those of the folds.
        pool: the divided images.

    Raises:
        DataError: a model learned from some of these images.
    """
    named = [(flag, get_setting(one, path)) for flag, path in STARTS for one in configs]
    asked = [(f, v) for f, v in dict.fromkeys(named) if v and (is_hub_name(v) or Path(v).exists())]
    if not asked:
        return
    digests = {pool.content_hash(), *map(hash_of_data, configs[-1:])}
    for flag, value in asked:
        known = True
        try:
            for learned in lineage(value):
                known = known and bool(learned.samples)
                found = overlap(pool, learned, digests)
                if found:
                    raise DataError(
                        f"{flag} {learned.name} was trained on these images ({found}), also on "
                        f"those that each fold holds out: its scores would be too good. Leave it "
                        f"out, or train it as a stage before (--stages), which holds out the same "
                        f"images."
                    )
        except CheckpointError:
            # Whoever reads it for training says what is wrong with it.
            known = False
        why = "none of its images has the name and the size of one here, and copies may differ"
        if not known:
            why = "what it was trained on is not recorded"
        console.warn(
            f"{flag} {value}: {why}. If it learned from some of {count(len(pool), 'image')}, the "
            f"scores of the folds that hold them out are too good"
        )


def shared_stages(
    chain: Chain | None, config: Config, pool: Manifest, *, write: bool = True
) -> frozenset[str]:
    """Return the names of the stages before the last that train on other images than the folds.

    They are trained once for all folds. A stage that trains on the divided images holds out the
    same as its fold, and is trained for each.

    Args:
        chain: the stages, or None.
        config: settings that they share.
        pool: the divided images.
        write: keep the copies found in the cache folder.

    Raises:
        ConfigError: a stage inherits images beside its own data from the command.
        DataError: a stage trains on some of the images, or on copies of them.
    """
    if chain is None:
        return frozenset()
    keys = {(pair.dataset, pair.name) for pair in pool.pairs}
    real = {pair.image.resolve() for pair in pool.pairs}
    shared = set()
    *before, last = chain.resolve(config)
    data = last.config.data
    for stage in before:
        source = find_pool(stage.config)
        if {(pair.dataset, pair.name) for pair in source.pairs} == keys and real == {
            pair.image.resolve() for pair in source.pairs
        }:
            continue
        _require_own_images(chain, stage)
        seen = [pair.name for pair in source.pairs if pair.image.resolve() in real]
        how = "are among those that the folds hold out"
        if not seen and data.group_copies:
            search = LeakSearch({}, data.max_pixels, cache_root(data) if write else None)
            copies = copies_of(
                [p.image for p in source.pairs], [p.image for p in pool.pairs], search
            )
            seen = [
                f"{source.pairs[a].name} ({pool.pairs[b].name}, {words})" for a, b, words in copies
            ]
            how = "are copies of images that the folds hold out"
        if seen:
            raise DataError(
                f"Stage {stage.name}: {len(seen)} of {count(len(source), 'image')} {how}: "
                f"{shorten(seen, 3)}. The scores of every fold would be too good. Remove them from "
                f"the data of the stage (--clean-list), or let the stage train on the divided data "
                f"alone, of which it holds out the same."
            )
        shared.add(stage.name)
    return frozenset(shared)


def _require_own_images(chain: Chain, stage: Stage) -> None:
    """Raise ConfigError where a stage of all folds inherits images that belong to the divided data.

    It holds no image out: those made from images of every fold would be trained on, as would the
    photographs without masks beside them.
    """
    own = dict(chain.stages)[stage.name]
    for path, empty in BESIDE.items():
        value = get_setting(stage.config, path)
        if value and path not in own:
            shown = value if isinstance(value, str) else " ".join(value)
            raise ConfigError(
                f"{chain.path}, stage {stage.name}: it trains on other data once for all folds, "
                f"holds nothing out, and inherits {path} {shown} from the command: images that "
                f"were made from held-out ones, or lie beside them, would be trained on, and the "
                f"scores of every fold would be too good. Set it in that stage: `{path}: {empty}`, "
                f"or to images of the stage's own data."
            )
