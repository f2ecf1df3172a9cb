"""Shared fixtures: a small generated data set, a finished tiny run, and the command line
in-process."""

from __future__ import annotations

import base64
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from camoxpert.cli import main
from camoxpert.pages import charts
from camoxpert.runtime.host import available_memory, free_shared_memory

# With like experts this model has 158 tensors to train, write and read instead of 290; where it
# matters what an expert computes, a test adds SPECIALISTS.
TINY = (
    *("--backbone", "tiny_test", "--no-pretrained", "--img-size", "32", "--batch-size", "8"),
    *("--expert-family", "uniform", "--num-experts", "3", "--num-workers", "0", "--no-tensorboard"),
    # A low rate keeps rounding small; augmentation must repeat after a stop like everything else.
    *("--lr", "2.5e-4", "data.augment.strength=1"),
    *("model.width=16", "model.detail_width=8"),
)

SPECIALISTS = ("--expert-family", "specialist")

# The folders whose modules take minutes.
LONG = ("faults", "frozen", "training", "models")

ROOM = 4 << 30
"""Bytes that must be free there, and twice as many in memory: all files of the suite are 2.3 GB."""

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""A PNG of one pixel."""
DRAW = charts._png


def pytest_configure() -> None:
    """Keep the tests' files in memory where there is room.

    Every checkpoint is flushed to the disk before its old version goes. On a disk the tests of
    checkpoints took 109 s on one core, in memory 63 s.
    """
    chosen = {"PYTEST_DEBUG_TEMPROOT", "TMPDIR"} & set(os.environ)
    room = min(free_shared_memory() or 0, (available_memory() or 0) // 2)
    if not chosen and room >= ROOM:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = "/dev/shm"


def pytest_collection_finish() -> None:
    """Keep what was imported out of the garbage collector's walks: a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the long modules first: a worker that takes one up last leaves the others idle."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Fix the thread count: bitwise comparisons need it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the caches of all tests out of the user's cache folder."""
    os.environ["CAMOXPERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def blank_charts() -> Iterator[None]:
    """Build charts without drawing them: that took .64 s of the 1.55 s of a tiny training run.

    Tests in ``pages``, and programs that tests start, draw them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "_png", lambda figure: PIXEL)
        yield


@pytest.fixture
def drawn_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw charts in this test."""
    monkeypatch.setattr(charts, "_png", DRAW)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of 40 training and 8 test pairs of easy generated camouflage, 48 px."""
    from camoxpert.synthesis.toy import generate_toy

    root = tmp_path_factory.mktemp("toy")
    generate_toy(root, num_train=40, num_test=8, size=48, difficulty=0.1, seed=0)
    return root


@pytest.fixture
def train(toy_data: Path, tmp_path: Path) -> Callable[..., int]:
    """Return a function that trains a tiny model on the toy data and returns the exit code."""

    def call(*words: str, data: Path = toy_data, out: Path = tmp_path) -> int:
        return main(
            ["train", "--dataset-path", str(data), "--checkpoint-dir", str(out), *TINY, *words]
        )

    return call


@pytest.fixture
def stopped(train: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that trains until a deadline after some optimizer steps."""
    from camoxpert.stop import DEADLINE_CODE, Stop
    from camoxpert.training import trainer

    def call(*words: str, steps: int = 1, **options: Any) -> int:
        taken = []
        honest = trainer.train_step

        def step(*args: Any, **more: Any) -> Any:
            taken.append(1)
            return honest(*args, **more)

        def code(stop: Stop) -> int:
            return DEADLINE_CODE if len(taken) >= steps else 0

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train_step", step)
            patch.setattr(Stop, "code", code)
            return train(*words, **options)

    return call


@pytest.fixture(scope="session")
def tiny_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished two-stage run of a tiny model of specialists, with its report."""
    out = tmp_path_factory.mktemp("runs")
    words = ["--run-name", "tiny", "--epochs", "2", "--stage1-epochs", "1", "--lr", "3e-3"]
    words += SPECIALISTS
    base = ["train", "--dataset-path", str(toy_data), "--checkpoint-dir", str(out), *TINY]
    assert main([*base, *words]) == 0
    return out / "tiny"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 24 training and 6 test pairs of scenes with two hidden objects, 32 px."""
    from camoxpert.synthesis.toy_scenes import generate_scenes

    root = tmp_path_factory.mktemp("scenes")
    generate_scenes(root, num_train=24, num_test=6, size=32, difficulty=0.2, seed=0)
    return root


@pytest.fixture(scope="session")
def guided_run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of a tiny guided model whose weights make references matter."""
    out = tmp_path_factory.mktemp("guided")
    words = ["--run-name", "guided", "--epochs", "1", "--stage1-epochs", "0", "--no-test"]
    words += ["--support-encoder", "tiny_test", "model.support.pretrained=false"]
    base = ["train", "--dataset-path", str(scenes), "--checkpoint-dir", str(out), *TINY]
    assert main([*base, *words]) == 0
    # Three steps teach nothing: what a long training would make large is drawn.
    file = out / "guided" / "checkpoints" / "best.pt"
    values = torch.load(file, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in values["model"].items():
        if name.startswith("guidance.steering") and "film.weight" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    torch.save(values, file)
    (file.parent / "index.json").unlink()
    return out / "guided"
