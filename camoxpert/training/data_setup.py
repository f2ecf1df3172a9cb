"""Decisions about the data of a run: what is trained on, cached where, changed where, by how many
workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from camoxpert.config import Config
from camoxpert.data.cache.build import find_cache, open_cache
from camoxpert.data.cache.choice import cache_place, choose_cache
from camoxpert.data.cache.table import PixelCache
from camoxpert.data.files.headers import require_readable, unreadable_pairs
from camoxpert.data.files.image_io import read_mask_as
from camoxpert.data.files.manifest import (
    Manifest,
    Search,
    find_test_sets,
    load_train,
    read_clean_list,
    split_validation,
    unused_rows,
)
from camoxpert.data.files.pairing import Pair
from camoxpert.data.loader import Batches, LoaderPlan, build_loader, seconds_per_sample
from camoxpert.data.samples.augment import sample_transform, training_sides
from camoxpert.data.samples.datasets import PairDataset
from camoxpert.data.unreadable import require_few
from camoxpert.data.workers import choose_num_workers, choose_prefetch, choose_start_method
from camoxpert.doctor.inspect import identical_files
from camoxpert.errors import DataError
from camoxpert.runtime.host import free_shared_memory
from camoxpert.text import shorten
from camoxpert.training.batching import effective_batch

Say = Callable[[str], None]
MASKS_LOOKED_AT = 16


@dataclass
class Data:
    """The data of a run.

    Attributes:
        train, validation: parts of TRAIN; test sets never choose anything.
        tests: test sets found beside the training data, by name; scored once, at the end.
        data_hash: content hash of train and validation together.
        num_workers: data worker processes.
        cache: decoded pairs of train and validation, or None.
        on_device: samples are changed where the step runs.
        prefetch: batches each worker prepares ahead.
    """

    train: Manifest
    validation: Manifest
    tests: dict[str, Manifest]
    data_hash: str
    num_workers: int
    cache: PixelCache | None = None
    on_device: bool = False
    prefetch: int = 2


def load_data(
    config: Config,
    say: Say,
    *,
    device: str = "cpu",
    write: bool = True,
    rank: int = 0,
    world_size: int = 1,
    processes: int = 1,
    check_stop: Callable[[], None] = lambda: None,
) -> Data:
    """Find, pair, check, split and decode the data.

    Args:
        config: settings.
        say: prints one line for the user.
        device: type of the device on which the step runs.
        write: False leaves a cache that is not there unbuilt.
        rank, world_size: this process among those that train together; the first one alone looks
            for what is only worth a remark.
        processes: training processes on this machine; they share its cores and memory.
        check_stop: called often; raises to stop. A cache that is half built then continues next
            time.

    Raises:
        DataError: anything wrong with the data or its cache.
    """
    data = config.data
    skip = data.unreadable == "skip"
    clean = read_clean_list(data.clean_list)
    search = Search(data.layout, data.noncam, clean, data.allow_outside)
    whole = load_train(data.roots, search)
    sides = training_sides(data)
    cache, verdict = None, ""
    if data.cache in ("auto", "disk"):
        cache, verdict = find_cache(whole, data)
    faults: dict[Pair, str] = {}
    mode, why = "disk", "made by an earlier run"
    if cache is not None:
        faults = unreadable_in(cache, whole)
    else:
        # A cache that fits its files was made from files that could be read.
        check_stop()
        if skip:
            faults = dict(unreadable_pairs(whole, max_pixels=data.max_pixels))
        else:
            require_readable(whole, max_pixels=data.max_pixels)
        forks = choose_start_method(data.start_method)[0] == "fork"
        mode, why = choose_cache(
            whole, data, epochs=config.train.epochs, forks=forks, processes=processes
        )
    check_stop()
    train, validation = split_validation(whole, data.val_fraction, config.train.seed)
    tests = find_test_sets(data.roots, search)
    say(
        f"data        {len(train)} training and {len(validation)} validation images "
        f"({whole.layout}), validation carved from TRAIN"
    )
    for note in whole.notes:
        say(f"            {note}")
    sizes = ", ".join(f"{name} {len(test)}" for name, test in tests.items())
    say(f"test sets   {sizes or 'none found'}; they choose nothing and are scored at the end")
    check_bound(train, validation, faults, data.max_unreadable)
    check_stop()
    if rank == 0:
        lines = quick_checks(
            train, validation, tests, max_pixels=data.max_pixels, unreadable=faults, skip=skip
        )
        for line in lines:
            say(line)
    check_stop()
    unmatched = unused_rows(clean, [whole, *tests.values()])
    if unmatched:
        say(
            f"warning     {len(unmatched)} of {len(clean)} rows of the clean list name no image "
            f"here, for example {'/'.join(unmatched[0])}"
        )
    say(f"cache       {mode}: {why}")
    if cache is not None:
        say(f"            hit: {cache_place(whole, data)}")
    elif mode != "none" and not write and not data.strict_cache:
        say(f"            {verdict or 'in memory'}; training would decode into it first")
    elif mode != "none":
        cache = open_cache(whole, data, mode=mode)
    if cache is not None:
        # Decoding finds more than headers show.
        faults = unreadable_in(cache, whole)
        check_bound(train, validation, faults, data.max_unreadable)
    if faults:
        say(
            f"warning     {len(faults)} of {len(whole)} images cannot be read and are skipped "
            f"(--unreadable skip): {shorten(pair.name for pair in faults)}"
        )
    check_stop()
    on_device = data.augment_on == "device" or (data.augment_on == "auto" and device == "cuda")
    where = "where the step runs" if on_device else "in the data workers"
    reason = "as asked" if data.augment_on != "auto" else f"the default on {device}"
    words = f"augment     {where}: {reason}"
    if len(sides) > 1:
        words += f"; training sizes {', '.join(map(str, sides))} px, one a batch"
    say(words)
    transform = sample_transform(data, config.train.seed)
    dataset = PairDataset(train, data, transform, cache=cache, raw=on_device)
    if cache is not None and on_device and data.num_workers is None:
        workers, reason = 0, "batches are read straight from the cache, a thread ahead of the step"
    else:
        seconds = 0.0
        if data.num_workers is None:
            seconds = seconds_per_sample(dataset, data.img_size)
        workers, reason = choose_num_workers(
            data.num_workers, seconds=seconds, device=device, processes=processes
        )
    if workers:
        method, how = choose_start_method(data.start_method)
        reason += f"; started by {method} ({how})"
    batch = config.train.batch_size or -(-effective_batch(config.train) // world_size)
    prefetch, fewer = choose_prefetch(
        data.prefetch_factor,
        num_workers=workers,
        batch_bytes=batch * max(sides) ** 2 * 4,
        shared=free_shared_memory(),
        processes=processes,
    )
    say(f"workers     {workers}: {reason}" + (f"; {fewer}" if fewer else ""))
    return Data(train, validation, tests, whole.content_hash(), workers, cache, on_device, prefetch)


def unreadable_in(cache: PixelCache, manifest: Manifest) -> dict[Pair, str]:
    """Return the pairs of a manifest that could not be decoded into a cache, and why."""
    return {manifest.pairs[i]: why for i, why in cache.unreadable_of(manifest).items()}


def check_bound(
    train: Manifest, validation: Manifest, faults: Mapping[Pair, str], share: float
) -> None:
    """Raise DataError where more of a part is unreadable than its share."""
    for manifest, what in ((train, "training images"), (validation, "validation images")):
        found = [(pair.name, faults[pair]) for pair in manifest.pairs if pair in faults]
        require_few(found, len(manifest), share, what=what)


def quick_checks(
    train: Manifest,
    validation: Manifest,
    tests: Mapping[str, Manifest],
    *,
    max_pixels: int,
    unreadable: Collection[Pair] = (),
    skip: bool = False,
) -> list[str]:
    """Return what the cheap part of ``doctor`` says: how masks are stored, and identical images
    between the splits. Pairs known to be ``unreadable`` are left alone; with ``skip`` so are masks
    that prove to be."""
    sound = [pair for pair in train.pairs if pair not in unreadable]
    looked_at = sound[:: max(1, len(sound) // MASKS_LOOKED_AT)][:MASKS_LOOKED_AT]
    kinds: Counter[str] = Counter()
    for pair in looked_at:
        try:
            kinds[read_mask_as(pair.mask, max_pixels=max_pixels)[1]] += 1
        except DataError:
            if not skip:
                raise
    words = ", ".join(kind for kind, _ in kinds.most_common())
    lines = [f"masks       stored as {words} ({len(looked_at)} looked at)"]
    parts = {"training": train, "validation": validation, **tests}
    items = [
        (pair.image, part)
        for part, manifest in parts.items()
        for pair in manifest.pairs
        if pair not in unreadable
    ]
    same = identical_files([path for path, _ in items])
    groups = [group for group in same if len({items[i][1] for i in group}) > 1]
    if groups:
        a = groups[0][0]
        b = next(i for i in groups[0] if items[i][1] != items[a][1])
        lines.append(
            f"warning     identical images in different splits: {len(groups)}, for example "
            f"{items[a][0].name} ({items[a][1]}) and {items[b][0].name} ({items[b][1]}); "
            f"`camoxpert doctor` writes a --clean-list"
        )
    return lines


def training_loader(
    config: Config,
    data: Data,
    batch_size: int,
    *,
    device: str,
    rank: int = 0,
    world_size: int = 1,
) -> Batches:
    """Build the training loader for one stage's batch size.

    Args:
        config, data: settings, and what ``load_data`` made of them.
        batch_size: images of a batch of this process.
        device: type of the device on which the step runs.
        rank, world_size: this process among those that share an epoch.
    """
    plan = LoaderPlan(
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        cache=data.cache,
        on_device=data.on_device,
        pin_memory=config.data.pin_memory and device == "cuda",
    )
    return build_loader(
        data.train,
        config.data,
        plan,
        batch_size=batch_size,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
    )
