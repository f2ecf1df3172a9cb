"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: error, warning or note.
        check: what was checked, in a word or two.
        text: what is wrong, and what to do.
        files: the files concerned.
    """

    level: str
    check: str
    text: str
    files: tuple[str, ...] = ()
