"""Maps of two methods on two data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.maps import CLASSES, pair, write


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two data sets and two methods' maps; return their folder, now the working directory."""
    monkeypatch.chdir(tmp_path)
    for dataset, count, start in (("COD10K", 12, 0), ("CAMO", 6, 50)):
        for index in range(start, start + count):
            kind = CLASSES[index % 3]
            name = f"COD10K-CAM-{kind}-{index}" if dataset == "COD10K" else f"camo_{index}"
            for method, noise in (("good", 0.5), ("bad", 2.0)):
                prediction, mask = pair(index, noise)
                write(tmp_path / "maps" / method / dataset / f"{name}.png", prediction)
            write(tmp_path / "data" / dataset / "GT" / f"{name}.png", mask)
            write(tmp_path / "data" / dataset / "Imgs" / f"{name}.jpg", np.dstack([prediction] * 3))
    return tmp_path
