"""Measure the presence head: does it tell images with an object from those without, and by what?

python tools/presence.py toy -o out --weights tf_efficientnet_lite0.pth
python tools/presence.py real -o out --weights ... --dataset-path animals --textures textures

``toy`` generates camouflage, ``real`` takes a data set and a folder of images without objects, half
of which train and half of which test. Figures: ``OUT/presence.json``. Trained are:

- ``head``: a model with the head as users get it; some images are set aside and calibrate it;
- ``all-images``: one with the head, with nothing set aside (``data.calibration_fraction=0``);
- ``no-head``: one without it on exactly the same images. Its masks must be those of ``all-images``,
  to the last bit; what ``head`` loses against it is the price of the images set aside;
- ``objects-alone``: one without it on the images with objects, in as many optimizer steps.

Measured are:

- ranking, calibration and false masks on test images of both kinds;
- the same question answered by the mask alone: its highest value, and its area;
- counterfactuals of the test images with objects: how often the presence drops when the object is
  taken out, and when as much background is changed instead (the control);
- the mask scores of the images with objects, of all models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import camoxpert
from camoxpert import console
from camoxpert.cli import main
from camoxpert.data.files.image_io import read_image, write_jpeg, write_png
from camoxpert.errors import DataError
from camoxpert.files import write_json
from camoxpert.metrics.presence import bootstrap, probability_measures
from camoxpert.runs.checkpoint import PRESENCE, load_checkpoint
from camoxpert.synthesis.toy import toy_name, toy_pair

LONGEST = 192
"""Longer side of real images: what is made of them has the sharpness of the others."""
DROP = 0.05
"""By how much the presence must fall to count as a drop."""
SCORES = ("Smeasure", "wFmeasure", "IoU", "MAE")
MANY = "many-scenes"
ARMS = ("all-images", "no-head", "objects-alone")
"""Models beside the one with the head that is measured."""
NOTHING_ASIDE = "data.calibration_fraction=0"


def call(*words: object, some_may_fail: bool = False) -> None:
    """Run a command; leave if it fails."""
    code = main([str(word) for word in words])
    if code and not (some_may_fail and code == DataError.exit_code):
        sys.exit(code)


def write_set(folder: Path, pairs: Sequence[tuple[str, Path, Path | None]]) -> None:
    """Write a test set from (name, image, mask); without a mask a black one."""
    for name, image, mask in pairs:
        place = folder / "Imgs" / f"{name}{image.suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, place)
        (folder / "GT").mkdir(exist_ok=True)
        if mask is None:
            height, width = read_image(image).shape[:2]
            write_png(folder / "GT" / f"{name}.png", np.zeros((height, width), np.uint8))
        else:
            shutil.copyfile(mask, folder / "GT" / f"{name}.png")


def toy_data(out: Path, options: argparse.Namespace) -> None:
    """Generate OUT/data, OUT/negatives and OUT/test: scenes that no other set shares."""
    scene = ("--size", options.img_size, "--difficulty", options.difficulty, "--seed", options.seed)
    counts = ("--train", options.train, "--test", options.test, "--negatives", options.negatives)
    call("synthesize", "toy", out / "data", *counts, *scene)
    (out / "data" / "Negatives").rename(out / "negatives")
    (out / "data" / "TestDataset" / "toy").rename(out / "objects")
    shutil.rmtree(out / "data" / "TestDataset")
    first = options.train + options.test + options.negatives
    looks = {"size": options.img_size, "difficulty": options.difficulty}
    for index in range(first, first + options.test):
        image, _ = toy_pair(options.seed, index, empty=True, **looks)
        write_jpeg(out / "empty" / f"{toy_name(index)}.jpg", image, quality=95)
    # For the calibration error, of which chance is the larger part in a few hundred images.
    for index in range(10**5, 10**5 + 2 * options.many):
        image, mask = toy_pair(options.seed, index, empty=index % 2 > 0, **looks)
        place = out / "test" / MANY
        write_jpeg(place / "Imgs" / f"{toy_name(index)}.jpg", image, quality=95)
        write_png(place / "GT" / f"{toy_name(index)}.png", mask)


def real_data(out: Path, options: argparse.Namespace) -> None:
    """Copy a data set and divide the images without objects, all of them at one scale."""
    root = Path(options.dataset_path)
    (test,) = sorted((root / "TestDataset").iterdir())
    sets = ((root / "TrainDataset", out / "data" / "TrainDataset"), (test, out / "objects"))
    for source, target in sets:
        for image in sorted((source / "Imgs").iterdir()):
            write_jpeg(target / "Imgs" / f"{image.stem}.jpg", shrunk(read_image(image)), quality=95)
            mask = shrunk(read_image(source / "GT" / f"{image.stem}.png")[..., 0])
            write_png(
                target / "GT" / f"{image.stem}.png", np.where(mask > 127, 255, 0).astype(np.uint8)
            )
    for number, image in enumerate(sorted(Path(options.textures).glob("*.jpg"))):
        place = out / ("negatives", "empty")[number % 2] / image.name
        write_jpeg(place, shrunk(read_image(image)), quality=95)


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """Return an image whose longer side is LONGEST."""
    height, width = pixels.shape[:2]
    scale = LONGEST / max(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))


def make_data(out: Path, options: argparse.Namespace) -> None:
    """Write everything that is trained on and tested with."""
    {"toy": toy_data, "real": real_data}[options.kind](out, options)
    shutil.copytree(out / "objects", out / "sources" / "TrainDataset")
    for source, made in (("data", "made"), ("sources", "changed")):
        words = ("--dataset-path", out / source, "-o", out / made, "--no-page", "--cache", "none")
        call("synthesize", "counterfactual", *words, some_may_fail=True)
    objects = [
        (path.stem, path, out / "objects" / "GT" / f"{path.stem}.png")
        for path in sorted((out / "objects" / "Imgs").iterdir())
    ]
    empty = [(path.stem, path, None) for path in sorted((out / "empty").iterdir())]
    removed = [
        (path.stem, path, None)
        for path in sorted((out / "changed" / "TrainDataset" / "Imgs").glob("*_removed.jpg"))
    ]
    write_set(out / "test" / "other-scenes", [*objects, *empty])
    write_set(out / "test" / "object-removed", [*objects, *removed])


def train(out: Path, name: str, options: argparse.Namespace, *words: object, epochs: int) -> Path:
    """Train a model, unless that was done before; return its run folder."""
    run = out / "runs" / name
    if not (run / "checkpoints" / "best.pt").is_file() or not (run / "model").is_dir():
        call(
            *("train", "--dataset-path", out / "data", "--checkpoint-dir", out / "runs"),
            *("--run-name", name, "--backbone", "tf_efficientnet_lite0"),
            *(("--weights", options.weights) if options.weights else ("--no-pretrained",)),
            *("--img-size", options.img_size, "--batch-size", 16, "--epochs", epochs),
            *("--num-experts", options.experts, "--top-k", min(2, options.experts)),
            *("--num-workers", 0, "--seed", options.seed),
            *("--no-tensorboard", "--no-test", "--no-report", "--cache", "ram"),
            *(("--lr", options.lr) if options.lr else ()),
            *(words if NOTHING_ASIDE in words else (*words, aside(options))),
        )
    return run


def aside(options: argparse.Namespace) -> str:
    """Return the setting of the share of images that calibrate."""
    return f"data.calibration_fraction={options.calibration_fraction}"


def judge(out: Path, model: Any, *, calibrated: bool) -> dict[str, Any]:
    """Score a model on the test sets; the many scenes are for the calibration error alone."""
    found: dict[str, Any] = {}
    for place in sorted((out / "test").iterdir()):
        if place.name == MANY and not calibrated:
            continue
        target = out / "evaluation" / place.name
        (result,) = camoxpert.evaluate(model, place, output=target, empty_gt="skip", gallery=6)
        presence = result.presence
        assert presence is not None, f"{place} has images of one kind only"
        found[place.name] = {
            "scores": {key: result.scores[key] for key in SCORES},
            "with_object": presence.num_present,
            "without": presence.num_empty,
            "presence": presence.scores,
            "calibrated_ece": presence.calibrated_ece,
            "intervals": presence.intervals,
        }
    return found


def same_masks(folders: Sequence[Path]) -> bool:
    """Return whether two runs have the same weights but for those of the presence head."""
    found = [
        load_checkpoint(folder / "checkpoints" / "best.pt").evaluated_weights for folder in folders
    ]
    masks = [{n: w for n, w in one.items() if not n.startswith(PRESENCE)} for one in found]
    return masks[0].keys() == masks[1].keys() and all(
        torch.equal(weight, masks[1][name]) for name, weight in masks[0].items()
    )


def by_the_mask(out: Path, model: Any) -> dict[str, Any]:
    """Rank the images by the mask alone: by its highest value, and by its area."""
    table: dict[str, Any] = {}
    for place in sorted((out / "test").iterdir()):
        if place.name == MANY:
            continue
        masks = {path.stem: path for path in (place / "GT").iterdir()}
        highest, area, present = [], [], []
        for prediction in model.stream(str(place / "Imgs")):
            highest.append(float(prediction.probability_HW.max()))
            area.append(float(prediction.probability_HW.mean()))
            present.append(bool(read_image(masks[prediction.name]).any()))
        has = np.array(present)
        table[place.name] = {}
        for name, values in (("highest value", highest), ("soft area", area)):
            scores = np.array(values)
            ends = bootstrap(scores, has)["AUROC"]
            auroc = probability_measures(scores, has)["AUROC"]
            table[place.name][name] = {"AUROC": auroc, "interval": list(ends)}
    return table


def counterfactuals(out: Path, model: Any) -> dict[str, Any]:
    """Return how the presence of test images changes when something is taken out of them."""
    presence = {
        found.name: found.presence
        for folder in (out / "objects" / "Imgs", out / "changed" / "TrainDataset" / "Imgs")
        for found in model.stream(str(folder))
    }
    table = {}
    for kind in ("removed", "control"):
        pairs = [
            (presence[name], presence[f"{name}_{kind}"])
            for name in sorted(presence)
            if f"{name}_{kind}" in presence
        ]
        before, after = np.array(pairs).T
        table[kind] = {
            "images": len(pairs),
            "lower": float((after < before).mean()),
            f"lower by {DROP:g}": float((after < before - DROP).mean()),
            "below one half": float((after < 0.5).mean()),
            "median before": float(np.median(before)),
            "median after": float(np.median(after)),
        }
    return table


def run(options: argparse.Namespace) -> None:
    """Do everything; what is done is kept."""
    out, started = Path(options.output), time.monotonic()
    if not (out / "test" / "object-removed" / "GT").is_dir():
        make_data(out, options)
    extra = ("--negatives", out / "negatives", "--synthetic", out / "made")
    share = ("--negative-share", options.negative_share)
    head = train(out, "head", options, *extra, *share, epochs=options.epochs)
    arms, without = {"head": head}, ("--presence", "off")
    for name, words in (("all-images", ()), ("no-head", without)):
        if name in options.arms:
            equal = (*extra, *share, *words, NOTHING_ASIDE)
            arms[name] = train(out, name, options, *equal, epochs=options.epochs)
    if "objects-alone" in options.arms:
        info = json.loads((head / "run.json").read_text())
        images = info["images"]
        seen = images["training"] + sum(v for k, v in images.items() if k.endswith("_per_epoch"))
        # As many optimizer steps as the others; nothing is set aside without the head.
        own = images["training"] + info["presence"]["objects"]
        longer = round(options.epochs * seen / own)
        arms["objects-alone"] = train(out, "objects-alone", options, *without, epochs=longer)
    shutil.rmtree(out / "evaluation", ignore_errors=True)
    figures: dict[str, Any] = {"settings": vars(options), "arms": {}}
    for name, folder in arms.items():
        model = camoxpert.load(folder, device="cpu")
        figures["arms"][name] = {
            "test": judge(out, model, calibrated=name == "head"),
            "by the mask alone": by_the_mask(out, model),
        }
        if name == "head":
            figures["counterfactuals"] = counterfactuals(out, model)
            figures["calibration"] = json.loads((folder / "run.json").read_text())["presence"]
    if {"all-images", "no-head"} <= arms.keys():
        pair = [arms["all-images"], arms["no-head"]]
        figures["the head changes no mask"] = same_masks(pair)
    figures["seconds"] = time.monotonic() - started
    write_json(out / "presence.json", figures)
    console.say(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("toy", "real"))
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--weights", default="", help="of tf_efficientnet_lite0")
    parser.add_argument("--dataset-path", help="real: TrainDataset and one set in TestDataset")
    parser.add_argument("--textures", help="real: folder of images without objects")
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--negatives", type=int, default=240)
    parser.add_argument("--test", type=int, default=150)
    parser.add_argument("--many", type=int, default=800, help="toy: further scenes of each kind")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--difficulty", type=float, default=0.3)
    parser.add_argument("--negative-share", type=float, default=0.4)
    parser.add_argument("--calibration-fraction", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--lr", type=float, default=0, help="0: of the preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    run(parser.parse_args())
