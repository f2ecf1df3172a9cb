"""Small data sets that several sensors saw."""

from __future__ import annotations

from pathlib import Path

from camoxpert.synthesis.toy_modalities import generate_views

TINY_WORDS = (
    *("--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--batch-size", "8"),
    *("--num-experts", "3", "--num-workers", "0", "--no-tensorboard"),
    *("model.width=16", "model.detail_width=8", "--modalities", "rgb", "depth", "thermal"),
)


def views(root: Path, *, train: int = 24, test: int = 8, size: int = 40) -> Path:
    """Write scenes with depth and thermal, and return their folder."""
    sensors = ("depth", "thermal")
    generate_views(root, sensors, num_train=train, num_test=test, size=size, difficulty=0.2)
    return root
