"""Write the summary of a cross-validation: JSON, Markdown, the page, and the maps in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2

from camoxpert import console, text
from camoxpert.config import Config, load_config
from camoxpert.crossval.collect import Collected, collect
from camoxpert.crossval.divide import find_pool
from camoxpert.crossval.heldout import MAPS, OUT_OF_FOLD, with_datasets
from camoxpert.crossval.summary import (
    FOUND,
    Difference,
    Pooled,
    Spread,
    Summary,
    Suspect,
    main_measure,
    summarise,
)
from camoxpert.data.files.folds import SPLITS, require_same_images
from camoxpert.data.files.image_io import read_map, read_pair
from camoxpert.data.files.manifest import Manifest
from camoxpert.errors import DataError
from camoxpert.files import read_json, write_bytes, write_json
from camoxpert.pages.crossval import CrossvalReport, write_crossval_page
from camoxpert.pages.pictures import panel
from camoxpert.pages.render import Picture, inline_jpeg
from camoxpert.pages.tables import format_value

JSON, MARKDOWN, PAGE = "summary.json", "summary.md", "report.html"
SHORT = ("Smeasure", "wFmeasure", "meanEm", "IoU", "MAE")
QUICK = "Quick runs, not whole ones:"
PICTURES = 12
"""Images shown on the page."""
OPTIMISTIC = (
    "The best epoch of each fold was chosen on the images that score it, so this score is "
    "optimistic: it is not what new images get."
)


def write_summary(
    folder: Path, summary: Summary, found: Collected, pool: Manifest, *, several: bool
) -> Path:
    """Write everything and print the main table; returns the page.

    Args:
        folder: of the cross-validation.
        summary: of all folds.
        found: the folds.
        pool: the images, for the pictures.
        several: names in the summary start with those of their data sets.
    """
    gather_maps(folder, found)
    write_json(folder / JSON, summary)
    write_bytes(folder / MARKDOWN, markdown(summary).encode("utf-8", "replace"))
    page = write_crossval_page(
        folder / PAGE,
        CrossvalReport(
            folder=str(folder),
            headline=headline(summary),
            quick=summary["quick"],
            tiles=_tiles(summary),
            scores=score_rows(summary),
            optimistic=OPTIMISTIC if summary["best_epoch"] else "",
            folds=fold_rows(summary),
            breakdowns=_breakdowns(summary),
            comparisons=[
                (
                    compared_words(difference),
                    comparison_rows(difference["measures"], difference["folds"]),
                )
                for difference in summary["comparisons"]
            ],
            suspects=suspect_rows(summary["suspects"]),
            wrong=wrong_words(summary),
            pictures=_pictures(folder, summary["suspects"], pool, several=several),
            remarks=remarks(summary),
            presence=[(key, f"{value:.3f}") for key, value in summary["presence"].items()],
            command=" ".join(summary["command"]),
            settings=[(path, str(value)) for path, value in summary["settings"].items()],
            versions=list(summary["versions"].items()),
        ),
    )
    console.say("")
    console.say(text.table(score_rows(summary)))
    console.say(headline(summary))
    if summary["quick"]:
        console.say(f"{QUICK} {'; '.join(summary['quick'])}.")
    if summary["best_epoch"]:
        console.say(OPTIMISTIC)
    for difference in summary["comparisons"]:
        console.say(f"\nthis method minus {compared_words(difference)}:")
        console.say(text.table(comparison_rows(difference["measures"], difference["folds"])))
    console.say(wrong_words(summary))
    return page


def rewrite(folder: Path) -> Path:
    """Sum up the folds of a finished cross-validation again, with the settings and the data of its
    own runs; returns the page.

    Raises:
        DataError: folds are missing, or the data is not where any of them had it.
    """
    found, earlier = collect(folder), read_json(folder / JSON)
    configs = [load_config(file=fold.path / "config.yaml") for fold in found.folds]
    here = [one for one in configs if all(Path(root).exists() for root in _data_of(one))]
    if not here:
        raise DataError(
            f"{folder} is a cross-validation, whose page shows images, and its data is not here "
            f"({text.shorten(_data_of(configs[0]))}). Name it: camoxpert crossval --dataset-path "
            f"DATA -o {folder} --summary-only."
        )
    pool = find_pool(here[0])
    require_same_images(found.splits, pool, folder / SPLITS)
    compared, kept = [], []
    for difference in earlier.get("comparisons") or ():
        # Files of older releases know it only from the folder where the command was given.
        places = [folder / difference.get("place", "."), Path(str(difference.get("other")))]
        there = [place for place in places if place.resolve() != folder.resolve()]
        other = next((place for place in there if place.is_dir()), None)
        if other is not None:
            compared.append(collect(other))
            continue
        kept.append(difference)
        console.warn(f"{difference.get('other')} is gone: its comparison stays as it was")
    summary = summarise(found, compared, command=[str(w) for w in earlier.get("command") or ()])
    summary["comparisons"] += kept
    several = len({pair.dataset for pair in pool.pairs}) > 1
    return write_summary(folder, summary, found, pool, several=several)


def _data_of(config: Config) -> list[str]:
    return [*config.data.roots, *config.data.negatives]


def gather_maps(folder: Path, found: Collected) -> None:
    """Put the maps of all folds into ``maps/repeat-N/``, as hard links where the disk has them."""
    for fold in found.folds:
        source = fold.path / OUT_OF_FOLD / MAPS
        target = folder / MAPS / f"repeat-{found.splits.repeat_of(fold.fold) + 1}"
        for file in sorted(source.rglob("*.png")):
            place = target / file.relative_to(source)
            if place.exists() and place.samefile(file):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.link(file, place)
                continue
            shutil.copyfile(file, place)


def headline(summary: Summary) -> str:
    """Return the answer as a sentence."""
    key = main_measure(summary)
    pooled, splits = summary["out_of_fold"][key], summary["splits"]
    over = summary["over_folds"].get(key)
    deviation = ""
    if over is not None and over["deviation"] is not None:
        deviation = f"; over folds {over['mean']:.3f}, standard deviation {over['deviation']:.3f}"
    return (
        f"{key} {pooled['value']:.3f} (95 % interval {pooled['low']:.3f} to {pooled['high']:.3f}) "
        f"on {text.count(splits['held_out'], 'image')}, each scored by a model that never saw it"
        f"{deviation}."
    )


def score_rows(summary: Summary) -> list[list[str]]:
    """Return the table of scores, with its heading."""
    head = ["measure", "all held-out images", "95 % interval", "over folds"]
    best = summary["best_epoch"]
    rows = [[*head, "best epoch (optimistic)"] if best else head]
    for key in _shown(summary["out_of_fold"]):
        pooled = summary["out_of_fold"][key]
        row = [
            key,
            format_value(key, pooled["value"]),
            f"{format_value(key, pooled['low'])} to {format_value(key, pooled['high'])}",
            _spread(key, summary["over_folds"].get(key)),
        ]
        rows.append([*row, _spread(key, best.get(key))] if best else row)
    return rows


def fold_rows(summary: Summary) -> list[list[str]]:
    """Return the table of folds, with its heading."""
    keys = _shown(summary["out_of_fold"])
    best = bool(summary["best_epoch"])
    rows = [["fold", "images", *keys, *(["best epoch", "its wFmeasure"] if best else []), "hours"]]
    for fold in summary["folds"]:
        row = [fold["name"], str(fold["images"])]
        row += [format_value(key, fold["scores"].get(key)) for key in keys]
        if best:
            value = fold["best_scores"].get("wFmeasure")
            row += [str(fold["best_epoch"] or "-"), format_value("wFmeasure", value)]
        rows.append([*row, f"{fold['hours']:.2f}"])
    return rows


def comparison_rows(
    measures: Mapping[str, Mapping[str, float]], folds: Mapping[str, Spread]
) -> list[list[str]]:
    """Return the table of paired differences, with its heading."""
    rows = [["measure", "difference", "95 % interval", "p", "over folds"]]
    for key in _shown(measures):
        value = measures[key]
        rows.append(
            [
                key,
                f"{value['difference']:+.3f}",
                f"{value['low']:+.3f} to {value['high']:+.3f}",
                f"{value['p_value']:.3f}",
                _spread(key, folds.get(key), sign="+"),
            ]
        )
    return rows


def compared_words(difference: Difference) -> str:
    """Return the name of the other method, and on what the two are compared."""
    words = f"{difference['other']}, on the same folds"
    if difference["left_out"]:
        words += (
            f", by the {text.count(difference['images'], 'image')} with an object: one of the two "
            f"does not score the {difference['left_out']} without"
        )
    return words


def suspect_rows(suspects: Sequence[Suspect]) -> list[list[str]]:
    """Return the table of images to look at, with its heading."""
    rows = [["image", "fold", "suspicion", "IoU", "wFmeasure", "sure", "wrong in"]]
    for one in suspects:
        rows.append(
            [
                one["name"],
                str(one["fold"]),
                f"{one['suspicion']:.3f}",
                ", ".join(f"{iou:.2f}" for iou in one["IoU"]),
                f"{one['wFmeasure']:.3f}",
                f"{one['sure']:.2f}",
                f"{one['wrong']} of {len(one['IoU'])}",
            ]
        )
    return rows


def wrong_words(summary: Summary) -> str:
    """Return how many images were never found."""
    wrong, repeats = summary["wrong_always"], summary["splits"]["repeats"]
    often = "in every repeat" if repeats > 1 else "by the model that never saw it"
    names = f": {text.shorten(wrong, 6)}" if wrong else ""
    return (
        f"{text.count(len(wrong), 'image')} of {summary['splits']['held_out']} with IoU below "
        f"{FOUND:g} {often}{names}. Those at the head of the list are contradicted with the most "
        f"certainty: look for wrong masks there first."
    )


def remarks(summary: Summary) -> list[str]:
    """Return what a reader must know."""
    splits = summary["splits"]
    lines = [
        f"{text.count(splits['images'], 'image')} in {text.count(splits['groups'], 'group')} of "
        "copies and series, which are never on both sides of a fold. Scores are those of the "
        "weights of the last epoch (EMA), which the held-out images did not choose.",
        "The interval draws groups of images with replacement (2000 times). It says how much the "
        "score would vary with other images of the same kind, not with other training seeds; the "
        "deviation over folds mixes both. Folds share most of their training images, so they are "
        "not independent.",
    ]
    # Each repeat holds every image out once.
    unreadable = len({text for fold in summary["folds"] for text in fold["unreadable"]})
    if unreadable:
        lines.append(f"{text.count(unreadable, 'image')} could not be read and have no score.")
    if splits["held_out"] < splits["images"] - unreadable:
        why = "no class is known" if splits["classes"] else "they have no object"
        lines.append(
            f"{splits['images'] - splits['held_out'] - unreadable} images have no score: {why}."
        )
    blank = [fold["name"] for fold in summary["folds"] if not fold["scores"]]
    if blank:
        lines.append(
            f"Left out of the mean over folds, as none of their images has a score: "
            f"{text.shorten(blank)}."
        )
    if splits["repeats"] > 1:
        lines.append(
            f"An image's score is the mean over {splits['repeats']} repeats, each with other folds "
            "and another seed."
        )
    if splits["classes"]:
        lines.append("Each fold holds out a class that its model never saw: a harder question.")
    reused = [
        stage["name"]
        for fold in summary["folds"]
        for stage in fold["stages"]
        if str(stage.get("verdict", "")).startswith("hit")
    ]
    trained = [stage for fold in summary["folds"] for stage in fold["stages"]]
    if trained:
        lines.append(
            f"Stages before the last: {len(trained) - len(reused)} trained, {len(reused)} taken "
            "from the cache."
        )
    return lines


def markdown(summary: Summary) -> str:
    """Return the summary as Markdown."""
    parts = [
        "# Cross-validation",
        *([f"**{QUICK}** {'; '.join(summary['quick'])}."] if summary["quick"] else []),
        headline(summary),
        _markdown_table(score_rows(summary)),
        *([OPTIMISTIC] if summary["best_epoch"] else []),
        "## Folds",
        _markdown_table(fold_rows(summary)),
    ]
    for difference in summary["comparisons"]:
        parts.append(f"## This method minus {compared_words(difference)}")
        parts.append(_markdown_table(comparison_rows(difference["measures"], difference["folds"])))
    parts += ["## Look at these images", wrong_words(summary)]
    parts.append(_markdown_table(suspect_rows(summary["suspects"])))
    parts += ["## Read this with it", *(f"- {line}" for line in remarks(summary))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _spread(key: str, value: Spread | None, *, sign: str = "") -> str:
    if value is None:
        return "-"
    mean = f"{value['mean']:{sign}.3f}"
    return mean if value["deviation"] is None else f"{mean} ± {value['deviation']:.3f}"


def _shown(values: Mapping[str, object]) -> list[str]:
    return [key for key in SHORT if key in values] or list(values)


def _tiles(summary: Summary) -> list[tuple[str, str]]:
    key = main_measure(summary)
    pooled: Pooled = summary["out_of_fold"][key]
    splits = summary["splits"]
    return [
        (f"{pooled['value']:.3f}", f"{key}, all held-out images"),
        (f"{pooled['low']:.3f} to {pooled['high']:.3f}", "95 % interval"),
        (_spread(key, summary["over_folds"].get(key)), "mean over folds ± deviation"),
        (str(splits["held_out"]), "images, each held out once a repeat"),
        (str(len(summary["folds"])), f"folds, {text.count(splits['repeats'], 'repeat')}"),
        (str(len(summary["wrong_always"])), f"images always below IoU {FOUND:g}"),
    ]


def _breakdowns(summary: Summary) -> list[tuple[str, list[list[str]]]]:
    tables = []
    for division, parts in summary["breakdown"].items():
        keys = _shown(next(iter(parts.values())))
        rows = [[division, "images", *keys]]
        for part, values in parts.items():
            own = [format_value(key, values.get(key)) for key in keys]
            rows.append([part, f"{values['images']:.0f}", *own])
        tables.append((division, rows))
    return tables


def _pictures(
    folder: Path, suspects: Sequence[Suspect], pool: Manifest, *, several: bool
) -> list[Picture]:
    """Return image, mask, map and their comparison for the first of the list."""
    pairs = {pair.name: pair for pair in with_datasets(pool, several).pairs}
    pictures = []
    for one in suspects[:PICTURES]:
        pair = pairs[one["name"]]
        try:
            image, mask = read_pair(pair.image, pair.mask, any_size=True)
            # Not cv2.imread, which ends the process at a path that is not UTF-8.
            found = read_map(folder / MAPS / "repeat-1" / f"{one['name']}.png")
        except (DataError, OSError):
            continue
        if found.shape != mask.shape:
            continue
        if image.shape[:2] != mask.shape:
            # A mask of another size than its image (--resize bilinear).
            size = (mask.shape[1], mask.shape[0])
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        pixels = panel(image, mask, found.astype("float32") / 255)
        _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        caption = (
            f"{one['name']}: suspicion {one['suspicion']:.2f}, IoU "
            f"{', '.join(f'{iou:.2f}' for iou in one['IoU'])}"
        )
        pictures.append(Picture(inline_jpeg(data.tobytes()), caption))
    return pictures
