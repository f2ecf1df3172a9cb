"""A folder as Kaggle's /kaggle/input, and notebooks executed with it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

import camoxpert
from camoxpert.data.files.image_io import read_mask, write_jpeg, write_png
from camoxpert.synthesis.toy import toy_pair

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
LIMIT = 540.0
"""Seconds that a notebook may take on busy cores; on quiet ones it takes less than 120."""
CLASSES = ("Aquatic-3-Crab", "Terrestrial-23-Cat", "Flying-53-Bird")
SIDE = 48
WHEEL = "0.0.1"
"""Version of the wheel, which no release has: what is imported can only be from it."""


def write_cod10k(root: Path, *, train: int = 24, test: int = 8, noncam: int = 2) -> Path:
    """Write generated camouflage in the layout and with the names of COD10K-v3."""
    for offset, split, number in ((0, "Train", train), (1000, "Test", test)):
        for index in range(number + noncam):
            empty = index >= number
            image, mask = toy_pair(0, offset + index, size=SIDE, difficulty=0.1, empty=empty)
            kind = CLASSES[index % len(CLASSES)]
            name = f"COD10K-CAM-1-{kind}-{offset + index}"
            if empty:
                name = f"COD10K-NonCAM-4-{kind}-{offset + index}"
            write_jpeg(root / split / "Image" / f"{name}.jpg", image, quality=95)
            write_png(root / split / "GT_Object" / f"{name}.png", mask)
    return root


def write_maps(folder: Path, data: Path, *, strength: float) -> None:
    """Write maps of a model that sees the objects as well as ``strength`` (0..1) says."""
    random = np.random.default_rng(0)
    for path in sorted((data / "Test" / "GT_Object").glob("COD10K-CAM-*.png")):
        mask = read_mask(path) > 0
        noise = random.uniform(0, 1, mask.shape)
        seen = strength * mask + (1 - strength) * noise
        write_png(folder / path.name, np.round(255 * seen).astype(np.uint8))


def write_wheel(folder: Path) -> Path:
    """Write the package as a wheel, without the tools and the network that building one needs."""
    folder.mkdir(parents=True)
    path = folder / f"camoxpert-{WHEEL}-py3-none-any.whl"
    info = f"camoxpert-{WHEEL}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: camoxpert\nVersion: {WHEEL}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with ZipFile(path, "w") as wheel:
        files = []
        for file in sorted((ROOT / "camoxpert").rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                files.append(file.relative_to(ROOT).as_posix())
                content = file.read_bytes()
                if files[-1] == "camoxpert/__init__.py":
                    # The program says the version that its source has.
                    own, wanted = (f'"{v}"'.encode() for v in (camoxpert.__version__, WHEEL))
                    assert content.count(own) == 1
                    content = content.replace(own, wanted)
                wheel.writestr(files[-1], content)
        for name, text in about.items():
            wheel.writestr(name, text)
        names = [*files, *about, f"{info}/RECORD"]
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def environment(inputs: Path, working: Path, site: Path) -> dict[str, str]:
    """Return the variables for a notebook in smoke mode."""
    return {
        "CAMOXPERT_SMOKE": "1",
        "CAMOXPERT_KAGGLE_INPUT": str(inputs),
        "CAMOXPERT_KAGGLE_WORKING": str(working),
        # pip installs the wheel there, beside this environment and not into it.
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }


def execute(book: Any, working: Path, *, limit: float = LIMIT) -> Any:
    """Execute a notebook and return it with its outputs.

    Args:
        book: the notebook.
        working: the working folder of its kernel.
        limit: seconds that it may take.

    Raises:
        CellExecutionError: a cell failed.
        TimeoutError: it took longer; its kernel is ended.
    """
    place = {"metadata": {"path": str(working)}}
    client = NotebookClient(
        book, timeout=None, startup_timeout=limit, kernel_name="python3", resources=place
    )

    async def limited() -> None:
        await asyncio.wait_for(client.async_execute(), limit)

    started = time.monotonic()
    try:
        asyncio.run(limited())
    except (DeadKernelError, asyncio.TimeoutError) as error:
        # nbclient takes the end of the wait for the death of its kernel.
        if time.monotonic() - started < limit:
            raise
        raise TimeoutError(f"The notebook took longer than {limit:g} seconds.") from error
    return book


def printed(book: Any, cell: str) -> str:
    """Return what the code of a cell printed, by the cell's id."""
    (found,) = [entry for entry in book.cells if entry.id == cell]
    return "".join(out.text for out in found.outputs if out.output_type == "stream")


def shown(book: Any, cell: str, kind: str) -> list[Any]:
    """Return what a cell displayed of a kind, such as ``image/png``."""
    (found,) = [entry for entry in book.cells if entry.id == cell]
    return [
        out.data[kind]
        for out in found.outputs
        if out.output_type == "display_data" and kind in out.data
    ]
