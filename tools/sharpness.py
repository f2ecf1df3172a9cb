"""Measure how much of a difference between models is confidence: scores of the same masks, sharper.

python tools/sharpness.py IMAGES MASKS -o FILE --arm moe RUN... --arm unet RUN...

Weighted F, MAE and the S-measure look at grey levels; IoU looks at the mask alone, and moves a
little because scoring stretches each map to 0..1. Multiplying the logits by a factor changes grey
levels and no mask, so it shows what a model would have scored had it been surer of the same mask.
The runs of all arms need the same images. Differences to the first arm come with their 95 %
interval over seeds and images, each arm at the factor that is best for it on these very images: an
upper bound, no setting to choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import camoxpert
from camoxpert.console import say
from camoxpert.data.files.image_io import read_mask
from camoxpert.errors import DataError
from camoxpert.files import write_json
from camoxpert.metrics import Evaluator
from camoxpert.metrics.statistics import compare_seeds
from camoxpert.text import shorten

FACTORS = (1, 2, 4, 8, 16)
MEASURES = ("wFmeasure", "Smeasure", "MAE", "IoU")
EDGE = 1e-6
"""Probabilities closer to 0 or 1 count as this close."""


def sharper(probability_HW: NDArray[np.float32], factor: float) -> NDArray[np.float64]:
    """Return the probabilities (0..1) of ``factor`` times the logits, (H, W)."""
    clipped = np.clip(probability_HW.astype(np.float64), EDGE, 1 - EDGE)
    return 1 / (1 + ((1 - clipped) / clipped) ** factor)


def score_run(run: Path, pairs: Sequence[tuple[Path, Path]]) -> NDArray[np.float64]:
    """Return scores (factors, measures, images), the images in the order of their names."""
    model = camoxpert.load(run)
    scorers = [Evaluator(keys=MEASURES) for _ in FACTORS]
    for image, mask in pairs:
        probability_HW = model.predict(image).probability_HW
        truth_HW = read_mask(mask) > 127
        for factor, scorer in zip(FACTORS, scorers, strict=True):
            scorer.add(image.stem, sharper(probability_HW, factor).astype(np.float32), truth_HW)
    return np.array(
        [[[row[key] for row in scorer.rows()] for key in MEASURES] for scorer in scorers]
    )


def measure(images: Path, masks: Path, arms: dict[str, list[Path]]) -> dict[str, object]:
    """Return the content of the JSON file.

    Args:
        images, masks: folders; a mask has its image's name.
        arms: name -> run folders, one per seed.
    """
    found = {path.stem: path for path in sorted(masks.iterdir())}
    paths = sorted(images.iterdir())
    missing = [path.name for path in paths if path.stem not in found]
    if missing:
        raise DataError(f"{masks} has no mask for {shorten(missing)}.")
    pairs = [(path, found[path.stem]) for path in paths]
    scores = {}
    for name, runs in arms.items():
        scores[name] = np.stack([score_run(run, pairs) for run in runs])
        say(f"{name}: {scores[name].mean((0, 3)).round(3).tolist()}")
    best = {name: int(s[:, :, 0].mean((0, 2)).argmax()) for name, s in scores.items()}
    first = next(iter(arms))
    result = {}
    for name, s in scores.items():
        result[name] = {
            "mean": {
                f"{factor}": dict(zip(MEASURES, s[:, index].mean((0, 2)).tolist(), strict=True))
                for index, factor in enumerate(FACTORS)
            },
            "best_factor": FACTORS[best[name]],
        }
        if name == first:
            continue
        for words, own, other in (("as trained", 0, 0), ("at its best", best[first], best[name])):
            a, b = scores[first][:, own, 0], s[:, other, 0]
            low, high = compare_seeds(a, b)
            result[name][f"{first} better by, {words}"] = [float(a.mean() - b.mean()), low, high]
    return {"factors": FACTORS, "images": len(pairs), "arms": result}


def main() -> None:
    """Parse the command line, measure, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("masks", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--arm", nargs="+", action="append", required=True, metavar=("NAME", "RUN"))
    options = parser.parse_args()
    arms = {name: [Path(run) for run in runs] for name, *runs in options.arm}
    write_json(options.output, measure(options.images, options.masks, arms))


if __name__ == "__main__":
    main()
