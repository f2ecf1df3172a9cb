"""Text for users: shortened lists, the nearest name to a typo, counts and text tables."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence


def shorten(names: Iterable[object], limit: int = 4) -> str:
    """Join the first names with commas, and say how many more there are."""
    known = [str(name) for name in names]
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return ", ".join(known[:limit]) + more


def bullet_list(lines: Sequence[str], limit: int = 10) -> str:
    """Return one indented line for each of the first lines, and how many more there are."""
    more = f"\n... and {len(lines) - limit} more" if len(lines) > limit else ""
    return "\n".join(f"  {line}" for line in lines[:limit]) + more


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name closest to ``name``, or None if none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """Return `` Did you mean X?`` with the closest known name, else ``otherwise``."""
    found = closest(name, known, cutoff=0.5)
    return f" Did you mean {found}?" if found else otherwise


def count(number: int, noun: str) -> str:
    """Return ``1 image``, ``2 images``, ``2 classes``."""
    ending = "es" if noun.endswith("ss") else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"


def free_name(name: str, taken: Collection[str]) -> str:
    """Return ``name``, or the first of name-2, name-3, ... that is not taken, ignoring case."""
    used = {other.lower() for other in taken}
    candidate, number = name, 1
    while candidate.lower() in used:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def safe_name(name: str) -> str:
    """Return a file name for any text, without path separators and leading dots."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "unnamed"


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Return a file name for each name, unique on case-insensitive disks as well."""
    files: dict[str, str] = {}
    for name in dict.fromkeys(names):
        files[name] = free_name(safe_name(name), files.values())
    return files


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Format cells in columns: the first ``left`` columns left-aligned, the others right-aligned.

    An empty row becomes an empty line.
    """
    width = max((len(row) for row in rows), default=0)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(width)]
    return "\n".join(
        "  ".join(
            cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
            for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    )
