"""Decisions about the data of a run: training images, cache, place of augmentation, workers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from camoxpert import console
from camoxpert.config import Config, DataConfig, QuickConfig
from camoxpert.data.cache.build import find_cache, open_cache
from camoxpert.data.cache.choice import choose_cache
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.headers import other_sizes, require_readable, unreadable_pairs
from camoxpert.data.files.image_io import read_mask_as
from camoxpert.data.files.made import MADE, find_made
from camoxpert.data.files.manifest import (
    CleanList,
    Manifest,
    Search,
    find_test_sets,
    load_eval,
    load_training_data,
    read_clean_list,
    unused_rows,
)
from camoxpert.data.files.mixing import Mix, mix_of
from camoxpert.data.files.negatives import NEGATIVES, divided
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.unlabeled import NO_IMAGES, find_unlabeled, joined
from camoxpert.data.loader import LoaderPlan, seconds_per_sample
from camoxpert.data.samples.augment import sample_transform, training_sides
from camoxpert.data.samples.datasets import PairDataset
from camoxpert.data.unreadable import require_few
from camoxpert.data.workers import choose_num_workers, choose_prefetch, choose_start_method
from camoxpert.doctor.inspect import MaskShape, identical_files, mask_shape
from camoxpert.errors import DataError
from camoxpert.runtime.host import free_shared_memory
from camoxpert.runtime.processes import World
from camoxpert.synthesis.online import OnlineScenes
from camoxpert.text import count, shorten
from camoxpert.training.batching import effective_batch
from camoxpert.training.leaks import without_leaks
from camoxpert.training.modalities import say_modalities
from camoxpert.training.negatives import (
    Kinds,
    find_kinds,
    require_no_leaks,
    say_presence,
    set_calibration_aside,
    with_negatives,
    without_made,
)
from camoxpert.training.quick import as_trained, choose_part, images_per_epoch, say_quick
from camoxpert.training.recipe import Recipe, choose_recipe
from camoxpert.training.rundata import RunData
from camoxpert.training.split import (
    BESIDE,
    Split,
    asked_splits,
    decide_split,
    on_neither_side,
    uses_given,
)
from camoxpert.training.teacher import find_soft_maps

MASKS_LOOKED_AT = 16
TEST_SETS = ("NC4K", "CHAMELEON")
"""Names of data sets that exist for testing alone."""


def find_data(
    asked: Config,
    world: World,
    *,
    device: str = "cpu",
    write: bool = True,
    kept: Split | None = None,
    recipe: Mapping[str, float] | None = None,
    presence: str | None = None,
    teacher: str = "",
) -> RunData:
    """Find, pair, check, split and decode the data, printing each decision.

    Args:
        asked: settings; what they leave open is decided by the number of images.
        world: the processes that train together; only rank 0 makes the checks that print a remark,
            and the ranks of a machine share its cores and memory.
        device: type of the device on which the step runs.
        write: False does not build a missing cache.
        kept: the split of the run that is continued.
        recipe: what its preset decided.
        presence: ``on`` or ``off`` as that run has it.
        teacher: hash of the teacher.

    Raises:
        DataError: anything wrong with the data, its cache or the teacher's maps.
        Stopped: a stop was requested; a half-built cache is continued next time.
    """
    asked = as_trained(asked)
    by_heart = asked.train.quick.overfit_batches is not None
    say_quick(asked)
    clean = read_clean_list(asked.data.clean_list)
    search = search_of(asked.data, clean)
    splits = asked_splits(asked.data)
    found = load_training_data(asked.data.roots, search, validate=uses_given(asked.data))
    made, unlabeled = find_made(asked.data.synthetic, search), find_unlabeled(asked.data.unlabeled)
    kinds = find_kinds(with_negatives(found, asked, write=write), made, asked, presence)
    found, made, whole = kinds.found, kinds.made, kinds.found.whole
    every, data_hash = joined(whole, made, unlabeled), _hash_of(whole, made, unlabeled)
    chosen = _choose_recipe(asked, kinds, unlabeled, world, recipe)
    config, data = chosen.config, chosen.config.data
    cache, verdict = find_cache(every, data) if data.cache in ("auto", "disk") else (None, "")
    # A cache that fits its files was made from files that could be read.
    faults = unreadable_in(cache, every) if cache is not None else _look_for_faults(every, data)
    train, validation = decide_split(found, config, kept or {}, splits=splits, write=write)
    apart = on_neither_side(whole, train, validation)
    tests = {} if by_heart else _find_tests(data, search)
    calibration = NO_IMAGES
    if kinds.head:
        train, calibration = set_calibration_aside(
            train, whole, made, config, kept or {}, write=write
        )
    held_out = joined(validation, without_made(calibration))
    made = without_leaks(made, data.synthetic, train, held_out, tests, apart)
    require_no_leaks(whole, tests)
    train, left_out = choose_part(train, whole, config, kept or {}, world.size, write=write)
    (train, negatives), (made, made_negatives) = divided(train), divided(made)
    negatives = joined(negatives, made_negatives)
    trained = joined(train, made, negatives, unlabeled)
    _say_extra(mix_of(trained, data), data, made, unlabeled)
    say_presence(kinds, mix_of(trained, data), data, calibration)
    say_modalities(data.beside_rgb, trained, validation)
    for note in whole.notes:
        console.decide("", note)
    _say_tests(whole, tests, by_heart=by_heart)
    parts = {"training": train, "validation": validation, "calibration": calibration}
    parts |= {MADE: made, NEGATIVES: negatives, "unlabeled": unlabeled}
    require_few_faults(parts, faults, data.max_unreadable)
    looked_at = _quick_checks({**parts, **tests}, data, faults) if world.first else 0
    unmatched = unused_rows(clean, [whole, *tests.values()])
    if unmatched:
        console.decide(
            "warning",
            f"{len(unmatched)} of {len(clean)} rows of the clean list name no image here, for "
            f"example {'/'.join(unmatched[0])}",
        )
    quick = config.train.quick != QuickConfig() and not data.strict_cache
    if cache is None and data.cache == "auto" and quick:
        console.decide("cache", "none: a quick run decodes what it needs")
    else:
        cache = _decide_cache(cache, verdict, every, config, world, write=write)
    if cache is not None:
        # Decoding finds more than headers show.
        faults = unreadable_in(cache, every)
        require_few_faults(parts, faults, data.max_unreadable)
    if faults:
        console.decide(
            "warning",
            f"{len(faults)} of {len(every)} images cannot be read and are skipped "
            f"(--unreadable skip): {shorten(pair.name for pair in faults)}",
        )
    soft = find_soft_maps(
        config,
        trained,
        digest=teacher,
        unreadable=faults,
        local_rank=world.local_rank,
        write=write,
    )
    loading = replace(_decide_loading(config, trained, cache, world, device), soft=soft)
    console.decide("recipe", chosen.reason)
    checked = (
        f"every pixel of the {count(len(whole), 'training pair')} was decoded into the cache"
        if cache is not None
        else f"the headers of {count(len(whole), 'training pair')} and the pixels of "
        f"{count(looked_at, 'mask')} were read, so damage inside a file was not looked for"
    )
    if splits is not None and data.val_fraction == 0:
        validation = replace(validation, pairs=())
    if by_heart:
        validation = replace(train, split="validation")
    beside = (made, unlabeled, negatives, calibration, left_out)
    return RunData(train, validation, tests, data_hash, loading, chosen, checked, *beside)


def _choose_recipe(
    asked: Config,
    kinds: Kinds,
    unlabeled: Manifest,
    world: World,
    kept: Mapping[str, float] | None,
) -> Recipe:
    """Return the settings with nothing left open, by the number of images that an epoch sees."""
    seen = mix_of(joined(kinds.found.whole, kinds.made, unlabeled), asked.data)
    number = images_per_epoch(asked, seen.real + seen.extra, world.size)
    chosen = choose_recipe(asked, number, processes=world.size, kept=kept)
    model = replace(chosen.config.model, presence="on" if kinds.head else "off")
    return replace(chosen, config=replace(chosen.config, model=model))


def _say_extra(found: Mix, data: DataConfig, made: Manifest, unlabeled: Manifest) -> None:
    """Print how many made images and how many without masks are trained on, and how often."""
    if found.made:
        fewer = ""
        if found.made_seen == found.made:
            fewer = f", all there are (--synthetic-share {data.synthetic_share:g})"
        console.decide(
            MADE,
            f"{count(found.made, 'made image')} in {', '.join(data.synthetic)}; an epoch sees "
            f"{found.made_seen} of them, {found.made_share:.0%} of the images with masks in a "
            f"batch{fewer}; validation and tests stay real",
        )
    if found.unlabeled:
        used = found.unlabeled_seen
        console.decide(
            "unlabeled",
            f"{count(found.unlabeled, 'image')} without masks in {data.unlabeled}; an epoch sees "
            f"{used} of them, {used / max(used + found.labeled_seen, 1):.0%} of a batch, for the "
            f"teacher's loss alone",
        )
    for note in (*made.notes, *unlabeled.notes):
        console.decide("", note)


def _say_tests(whole: Manifest, tests: Mapping[str, Manifest], *, by_heart: bool) -> None:
    """Print the test sets, training data that is one, and masks of another size."""
    if by_heart:
        console.decide("test sets", "none is scored: a few batches are learned by heart")
    else:
        sizes = ", ".join(f"{name} {len(test)}" for name, test in tests.items())
        console.decide(
            "test sets", f"{sizes or 'none found'}; they choose nothing and are scored at the end"
        )
    for name in sorted({pair.dataset for pair in whole.pairs}):
        if name.upper() in TEST_SETS:
            console.decide(
                "warning",
                f"{name} is a test set in this field: scores of a model that was trained on it "
                "cannot be compared. --test-data scores it instead",
            )
    resized = [text for manifest in (whole, *tests.values()) for text in other_sizes(manifest)]
    if resized:
        console.decide(
            "resize",
            f"{count(len(resized), 'mask')} of another size than the image, as --resize bilinear "
            f"allows: {shorten(resized)}",
        )


def _hash_of(whole: Manifest, made: Manifest, unlabeled: Manifest) -> str:
    """Return the content hash of all training data; of real images with masks alone, that of them,
    as it always was."""
    beside = [part.content_hash() for part in (made, unlabeled) if len(part)]
    if not beside:
        return whole.content_hash()
    return hashlib.sha256("".join([whole.content_hash(), *beside]).encode()).hexdigest()


def _find_tests(data: DataConfig, search: Search) -> dict[str, Manifest]:
    """Return the test sets beside the training data and those of ``data.test_roots``, by name."""
    tests = find_test_sets(data.roots, search)
    more = load_eval(data.test_roots, search) if data.test_roots else {}
    doubled = sorted(tests.keys() & more.keys())
    if doubled:
        raise DataError(
            f"--test-data: {doubled[0]} is already a test set of the training data. Leave one out."
        )
    return tests | more


def search_of(data: DataConfig, clean: CleanList) -> Search:
    """Return how a run finds its pairs."""
    return Search(
        data.layout,
        data.noncam,
        clean,
        data.allow_outside,
        any_size=data.resize == "bilinear",
        modalities=data.beside_rgb,
    )


def hash_of_data(config: Config) -> str:
    """Return the content hash of the data that a run with these settings trains on."""
    config = as_trained(config)
    data = config.data
    clean = read_clean_list(data.clean_list)
    search = search_of(data, clean)
    found = load_training_data(data.roots, search, validate=uses_given(data))
    made = find_made(data.synthetic, search)
    whole = with_negatives(found, config).whole
    return _hash_of(whole, made, find_unlabeled(data.unlabeled))


def unreadable_in(cache: PixelCache, manifest: Manifest) -> dict[Pair, str]:
    """Return the pairs of a manifest that could not be decoded into a cache, and why."""
    return {manifest.pairs[i]: why for i, why in cache.unreadable_of(manifest).items()}


def require_few_faults(
    parts: Mapping[str, Manifest], faults: Mapping[Pair, str], share: float
) -> None:
    """Raise DataError where more than a share of the images of a part is unreadable."""
    for name, manifest in parts.items():
        found = [(pair.name, faults[pair]) for pair in manifest.pairs if pair in faults]
        require_few(found, len(manifest), share, what=f"{name} images")


def _look_for_faults(whole: Manifest, data: DataConfig) -> dict[Pair, str]:
    """Read the headers of all files; return the unreadable pairs, or raise DataError for them."""
    if data.unreadable == "skip":
        return dict(unreadable_pairs(whole, max_pixels=data.max_pixels))
    require_readable(whole, max_pixels=data.max_pixels)
    return {}


def _quick_checks(
    parts: Mapping[str, Manifest], data: DataConfig, unreadable: Collection[Pair]
) -> int:
    """Print the cheap part of ``doctor``: how masks are stored, identical images between splits.

    Pairs known to be ``unreadable`` are skipped; under ``--unreadable skip`` so are masks that turn
    out to be.

    Returns:
        How many masks were decoded.
    """
    sound = [pair for pair in parts["training"].pairs if pair not in unreadable]
    looked_at = sound[:: max(1, len(sound) // MASKS_LOOKED_AT)][:MASKS_LOOKED_AT]
    kinds: Counter[str] = Counter()
    shapes: list[MaskShape] = []
    for pair in looked_at:
        try:
            mask, kind = read_mask_as(pair.mask, max_pixels=data.max_pixels)
        except DataError:
            if data.unreadable != "skip":
                raise
            continue
        kinds[kind] += 1
        shapes.append(mask_shape(mask))
    words = ", ".join(kind for kind, _ in kinds.most_common())
    console.decide("masks", f"stored as {words} ({len(looked_at)} looked at)")
    _judge_masks(shapes)
    items = [
        # These are trained on: only what is set aside must not be among them.
        (pair.image, "training" if part in (*BESIDE, NEGATIVES) else part)
        for part, manifest in parts.items()
        for pair in manifest.pairs
        if pair not in unreadable
    ]
    groups = [
        group
        for group in identical_files([path for path, _ in items])
        if len({items[i][1] for i in group}) > 1
    ]
    if groups:
        a = groups[0][0]
        b = next(i for i in groups[0] if items[i][1] != items[a][1])
        console.decide(
            "warning",
            f"identical images in different splits: {len(groups)}, for example "
            f"{items[a][0].name} ({items[a][1]}) and {items[b][0].name} ({items[b][1]}); "
            f"`camoxpert doctor` writes a --clean-list",
        )
    return len(shapes)


def _judge_masks(shapes: Sequence[MaskShape]) -> None:
    """Print what is odd about the masks looked at: void, swapped values, one value alone."""
    number = len(shapes)
    void = sum(shape.void > 0 for shape in shapes)
    if void:
        console.decide(
            "void",
            f"{void} of {number} masks looked at have unlabelled pixels; losses and measures leave "
            f"them out",
        )
    odd = {
        "look inverted: the object, white (255), surrounds the image": [s.inverted for s in shapes],
        "are empty: nothing is marked as object": [shape.share == 0 for shape in shapes],
        "mark every pixel as object": [shape.share == 1 for shape in shapes],
    }
    for what, found in odd.items():
        if any(found):
            # A few empty masks may be intended; a few inverted ones may be large objects.
            console.decide(
                "warning" if sum(found) > number / 2 else "",
                f"{sum(found)} of {number} masks looked at {what}; `camoxpert doctor` checks all",
            )


def _decide_cache(
    found: PixelCache | None,
    verdict: str,
    whole: Manifest,
    config: Config,
    world: World,
    *,
    write: bool,
) -> PixelCache | None:
    data = config.data
    mode, why = "disk", "made by an earlier run"
    if found is None:
        mode, why = choose_cache(
            whole,
            data,
            epochs=config.train.epochs,
            forks=choose_start_method(data.start_method)[0] == "fork",
            processes=world.local_size,
        )
    console.decide("cache", f"{mode}: {why}")
    if found is not None:
        where = found.path.parent if found.path else "in memory"
        console.decide("", f"hit: {where}")
    elif mode != "none" and not write and not data.strict_cache:
        console.decide("", f"{verdict or 'in memory'}; training would decode into it first")
    elif mode != "none":
        return open_cache(whole, data, mode=mode)
    return found


def _decide_loading(
    config: Config, train: Manifest, cache: PixelCache | None, world: World, device: str
) -> LoaderPlan:
    data, sides = config.data, training_sides(config.data)
    # Corruptions need a JPEG codec; those of a sample cost milliseconds, see docs/data.md.
    corrupts = data.augment.corrupt > 0
    default = device == "cuda" and not corrupts
    on_device = data.augment_on == "device" or (data.augment_on == "auto" and default)
    where = "where the step runs" if on_device else "in the data workers"
    reason = "as asked" if data.augment_on != "auto" else f"the default on {device}"
    if corrupts:
        if data.augment_on == "auto" and device == "cuda":
            reason = "corruptions are made on the CPU"
        reason += f"; {data.augment.corrupt:.0%} of the images corrupted, at severities 1 to 3"
    scenes = OnlineScenes() if data.augment.relight or data.augment.compose else None
    words = f"{where}: {reason}"
    if data.augment.relight:
        words += f"; {data.augment.relight:.0%} of the images in another light"
    if data.augment.compose:
        words += f"; {data.augment.compose:.0%} with an object of another training image"
    if len(sides) > 1:
        words += f"; training sizes {', '.join(map(str, sides))} px, one a batch"
    console.decide("augment", words)
    # Composing takes ten times as long as all else that a data worker does.
    straight = cache is not None and on_device and not data.augment.compose
    if straight and data.num_workers is None:
        workers, reason = 0, "batches are read straight from the cache, a thread ahead of the step"
    else:
        seconds = 0.0
        if data.num_workers is None:
            transform = sample_transform(data, config.train.seed, scenes)
            sample = PairDataset(train, data, transform, cache=cache, raw=on_device)
            seconds = seconds_per_sample(sample, data.img_size)
        workers, reason = choose_num_workers(
            data.num_workers, seconds=seconds, device=device, processes=world.local_size
        )
    if workers:
        method, how = choose_start_method(data.start_method)
        reason += f"; started by {method} ({how})"
    batch = config.train.batch_size or -(-effective_batch(config.train) // world.size)
    prefetch, fewer = choose_prefetch(
        data.prefetch_factor,
        num_workers=workers,
        batch_bytes=batch * max(sides) ** 2 * 4,
        shared=free_shared_memory(),
        processes=world.local_size,
    )
    console.decide("workers", f"{workers}: {reason}" + (f"; {fewer}" if fewer else ""))
    return LoaderPlan(
        num_workers=workers,
        prefetch=prefetch,
        cache=cache,
        on_device=on_device,
        pin_memory=data.pin_memory and device == "cuda",
        scenes=scenes,
    )
