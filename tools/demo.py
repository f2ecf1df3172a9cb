"""The demo: generate camouflage, train on it, score the test split, predict, print the result.

``make demo`` runs it. Every step is a command that a user could type, printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from camoxpert.cli import main

RECIPE = os.path.relpath(Path(__file__).parent.parent / "configs" / "demo.yaml")
SIZE = ("--train", "600", "--test", "100", "--size", "96", "--difficulty", "0.1")


def command(*words: str) -> None:
    """Print a command and run it; exit with its code if it fails."""
    print(f"\n$ camoxpert {shlex.join(words)}", flush=True)
    code = main(words)
    if code:
        sys.exit(code)


def newest_run(folder: Path) -> Path:
    """Return the newest run folder."""
    return max((p.parent for p in folder.glob("*/run.json")), key=lambda p: p.stat().st_mtime)


def demo(output: Path) -> int:
    """Run the demo into ``output``; return 1 if the model did not learn."""
    started = time.monotonic()
    data = output / "data"
    if not data.is_dir():
        command("synthesize", "toy", str(data), *SIZE)
    folders = ("--dataset-path", str(data), "--checkpoint-dir", str(output))
    command("train", "--config", RECIPE, *folders)
    run = newest_run(output)
    pictures = output / "predictions"
    images = data / "TestDataset" / "toy" / "Imgs"
    command("predict", str(run), str(images), "-o", str(pictures), "--overwrite")

    (result,) = json.loads((run / "evaluation" / "scores.json").read_text())["results"]
    # The floor has no weighted F, which would take longer than the model's own measures.
    score, floor = result["scores"], result["baseline"]["all_foreground"]["IoU"]
    print(
        f"\nweighted F {score['wFmeasure']:.3f}, IoU {score['IoU']:.3f} on {result['num_images']} "
        f"test images; marking everything has an IoU of {floor:.3f}."
        f"\n{time.monotonic() - started:.0f} seconds. Open {run / 'report.html'} and "
        f"{pictures / 'overlays'}."
    )
    return 0 if score["IoU"] >= 2 * floor else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    sys.exit(demo(parser.parse_args().output))
