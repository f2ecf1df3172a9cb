"""Make the pictures of README.md and docs/gallery.md, all from generated scenes.

``python tools/pictures.py -o docs/images`` makes those that need no model;
``--demo runs/demo`` makes those of the demo's model as well: its predictions, and, where playwright
and Chromium are installed, its report and the page of ``serve``.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from camoxpert.cli import main
from camoxpert.data.files.image_io import read_image, read_mask, write_jpeg
from camoxpert.data.samples.corruptions import CORRUPTIONS, corrupt
from camoxpert.pages.pictures import compare, overlay
from camoxpert.synthesis.toy import toy_pair

GAP = 6
"""White pixels between cells."""


def grid(rows: Sequence[Sequence[np.ndarray]], side: int) -> np.ndarray:
    """Return uint8 RGB cells of ``side`` x ``side`` pixels in rows, with white between them."""
    lines = []
    for row in rows:
        cells = [cv2.resize(cell, (side, side), interpolation=cv2.INTER_CUBIC) for cell in row]
        lines.append(_joined(cells, axis=1))
    return _joined(lines, axis=0)


def _joined(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    shape = list(parts[0].shape)
    shape[axis] = GAP
    white = np.full(shape, 255, np.uint8)
    return np.concatenate([p for part in parts for p in (part, white)][:-1], axis=axis)


def difficulties() -> np.ndarray:
    """Return a row of scenes from easy to nearly invisible, above their objects."""
    pairs = [
        toy_pair(3, index, size=160, difficulty=level)
        for index, level in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    ]
    return grid([[image for image, _ in pairs], [overlay(*pair) for pair in pairs]], 160)


def corruptions() -> np.ndarray:
    """Return a scene under every corruption of ``evaluate --corruptions``, at severity 3."""
    image, _ = toy_pair(5, 1, size=160, difficulty=0.2)
    shown = [corrupt(image, name, 3) for name in CORRUPTIONS]
    return grid([shown[:4], shown[4:]], 160)


def made(kind: str, *words: str, scenes: int = 12) -> np.ndarray:
    """Return images made of generated scenes, above their objects.

    Args:
        kind: a kind of ``synthesize``.
        words: its further arguments.
        scenes: number of scenes to make them of.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "toy", Path(folder) / "out"
        scene = ("--train", str(scenes), "--test", "1", "--size", "192", "--difficulty", "0.15")
        quietly("synthesize", "toy", str(data), *scene, "--seed", "4")
        quietly("synthesize", kind, "--dataset-path", str(data), "-o", str(out), *words,
                "--no-page", "--cache", "none", "--device", "cpu")  # fmt: skip
        with (out / "pairs.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        pairs = [(read_image(out / row["image"]), read_mask(out / row["mask"])) for row in rows]
    return grid([[image for image, _ in pairs], [overlay(*pair) for pair in pairs]], 160)


def quietly(*words: str) -> None:
    """Run a command; exit with its code if it fails."""
    code = main(words)
    if code:
        sys.exit(code)


# File -> what makes it, without a model.
GENERATED: dict[str, Callable[[], np.ndarray]] = {
    "toy.jpg": difficulties,
    "corruptions.jpg": corruptions,
    "relight.jpg": lambda: made("relight", "--per-image", "3", scenes=2),
    "compose.jpg": lambda: made("compose", "--num-samples", "6", "--seed", "1"),
    "counterfactual.jpg": lambda: made("counterfactual", "--limit", "6"),
}


def predictions(demo: Path) -> np.ndarray:
    """Return six test images of the demo, from its worst to its best mask.

    Rows: image; prediction (green found, red false alarm, blue missed); true object.

    Args:
        demo: output folder of tools/demo.py.
    """
    truth = demo / "data" / "TestDataset" / "toy"
    scored = []
    for path in sorted((truth / "GT").iterdir()):
        true = read_mask(path) > 127
        found = read_mask(demo / "predictions" / "masks" / path.name) > 127
        scored.append(((found & true).sum() / (found | true).sum(), path.stem, found, true))
    scored.sort(key=lambda row: (row[0], row[1]))
    chosen = [scored[round(share * (len(scored) - 1))] for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    images = [read_image(next((truth / "Imgs").glob(f"{name}.*"))) for _, name, _, _ in chosen]
    print("IoU:", ", ".join(f"{row[0]:.2f}" for row in chosen))
    shown = [(image, found, true) for image, (*_, found, true) in zip(images, chosen, strict=True)]
    compared = [compare(*row) for row in shown]
    return grid([images, compared, [overlay(image, true) for image, _, true in shown]], 144)


def screenshots(demo: Path, output: Path) -> None:
    """Write report.jpg and serve.jpg: pages of the demo's run in Chromium without a window."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("playwright is not installed: report.jpg and serve.jpg stay as they are.")
        return
    from threading import Thread

    from camoxpert.inference.predictor import load_predictor
    from camoxpert.serve.analysis import Analyst
    from camoxpert.serve.server import Address, Server

    report = next(demo.glob("*/report.html"))
    photo = sorted((demo / "data" / "TestDataset" / "toy" / "Imgs").iterdir())[2]
    with sync_playwright() as tool, tempfile.TemporaryDirectory() as folder:
        uploads = Path(folder)
        browser = tool.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 720})
        page.goto(report.resolve().as_uri())
        page.screenshot(path=output / "report.jpg", type="jpeg", quality=70)
        server = Server(Address("127.0.0.1", 0))
        server.answer_for(Analyst(load_predictor(report.parent, device="cpu"), 0.5), uploads)
        Thread(target=server.serve_forever, daemon=True).start()
        page.goto(server.url)
        page.set_input_files("input[type=file]", photo)
        page.wait_for_function("document.querySelector('canvas')?.width > 0")
        page.wait_for_timeout(500)
        page.screenshot(path=output / "serve.jpg", type="jpeg", quality=70)
        browser.close()
        server.shutdown()
        server.close()


def run(output: Path, demo: Path | None) -> None:
    """Write the pictures into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    for name, make in GENERATED.items():
        write_jpeg(output / name, make(), quality=80)
    if demo:
        write_jpeg(output / "demo.jpg", predictions(demo), quality=85)
        screenshots(demo, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--demo", type=Path, help="output folder of tools/demo.py")
    options = parser.parse_args()
    run(options.output, options.demo)
