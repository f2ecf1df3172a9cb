"""The files of an export: what they are called, and whether they may be written.

Nothing here imports torch: a command asks before its work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from camoxpert.errors import ConfigError
from camoxpert.files import file_digest, read_json

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""``--format`` -> suffix of the file, in small letters or capitals."""
OF_AN_EXPORT = ("layout", "format", "checkpoint_sha256")
"""Keys that the figures of every export have."""


def format_of(target: Path, wanted: str | None = None) -> str:
    """Return the format of a file by ``--format`` and its name.

    Raises:
        ConfigError: the name does not say a format, or says another one.
    """
    named = next((n for n, suffix in FORMATS.items() if suffix == target.suffix.lower()), None)
    if wanted is None and named is None:
        raise ConfigError(
            f"-o {target}: its name does not say the format. End it in "
            f"{', '.join(FORMATS.values())}."
        )
    if wanted is not None and wanted != named:
        raise ConfigError(f"-o {target}: a file of --format {wanted} ends in {FORMATS[wanted]}.")
    return wanted or str(named)


def files_of(path: Path) -> list[Path]:
    """Return the files that an exported model consists of."""
    two = path.suffix.lower() == FORMATS["openvino"]
    return [path, path.with_suffix(".bin")] if two else [path]


def report_of(target: Path) -> Path:
    """Return the file with the figures of the gate, beside the model."""
    return target.with_name(f"{target.name}.json")


def digests_of(made: Path, target: Path) -> dict[str, str]:
    """Return file name -> sha256 of a model that is to be moved to ``target``."""
    pairs = zip(files_of(made), files_of(target), strict=True)
    return {new.name: file_digest(old) for old, new in pairs}


def check_replaceable(target: Path) -> None:
    """Raise ConfigError if an export would replace a file that no export wrote.

    What an earlier one wrote may go: ``FILE.json`` beside it names its files with their sha256.
    """
    report = report_of(target)
    there = [path for path in (*files_of(target), report) if os.path.lexists(path)]
    if not there:
        return
    about = read_json(report)
    foreign = there if not set(OF_AN_EXPORT) <= about.keys() else _changed(there, about)
    if foreign:
        reason = (
            f"{report.name} is not of an export"
            if foreign[0] == report
            else f"no {report.name} of an export with its sha256 lies beside it"
        )
        raise ConfigError(
            f"-o {target} would replace {foreign[0]}, which this program did not write ({reason}). "
            "Nothing was started; name another file with -o, or move that one away."
        )


def _changed(there: Sequence[Path], about: Mapping[str, object]) -> list[Path]:
    """Return the files of an earlier export, but for its figures, that are no longer what it
    wrote."""
    known = about.get("files")
    if known is None:
        # Version 0.2.0 did not write them down.
        return []
    if not isinstance(known, Mapping):
        return list(there)
    return [
        path
        for path in there
        if path.suffix != ".json"
        and not (path.is_file() and known.get(path.name) == file_digest(path))
    ]
