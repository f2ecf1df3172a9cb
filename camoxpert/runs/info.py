"""``run.json``: what was run, with which versions, on what."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from camoxpert import __version__
from camoxpert.files import write_json
from camoxpert.runs.records import RunInfo

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import Unpack

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "opencv-python-headless",
    "albumentations",
)


def write_run_json(
    run_dir: Path,
    *,
    argv: Sequence[str],
    device: str,
    data_hash: str,
    phases: Mapping[str, float],
    extra: RunInfo | None = None,
) -> None:
    """Write ``run.json`` of a run that starts. It contains no host or user name.

    Args:
        run_dir: an existing folder.
        argv: the command, from ``camoxpert`` on.
        device: such as ``cuda:0``.
        data_hash: of the training data.
        phases: wall seconds of earlier sessions.
        extra: fields known only to the caller.
    """
    info: RunInfo = {
        "argv": list(argv),
        "status": "running",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "cores": os.cpu_count(),
        "versions": versions(),
        "git_commit": git_commit(Path(__file__).parents[2]),
        "data_hash": data_hash,
        "phases": dict(phases),
    }
    write_json(run_dir / "run.json", {**info, **(extra or {})})


def update_run_json(run_dir: Path, **changed: Unpack[RunInfo]) -> None:
    """Write further fields of a run, such as how it ended, into its ``run.json``.

    Raises:
        OSError: it cannot be read or written.
        ValueError: it is not JSON.
    """
    path = run_dir / "run.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changed})


def versions() -> dict[str, str]:
    """Return the installed versions of the packages results depend on, without importing them."""
    # Our own is that of the code that runs, which need not be installed.
    found = {"camoxpert": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit(folder: Path) -> str | None:
    """Return the commit of the checkout in ``folder``, with ``-dirty`` if changed, or None."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
