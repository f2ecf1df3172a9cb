"""The table of what each expert does best, from the results in ``scores.json``."""

from __future__ import annotations

from camoxpert.pages.render import p_value
from camoxpert.runs.scores import ResultEntry
from camoxpert.text import table

TITLES = {"object_fraction": "object size"}


def expert_cells(result: ResultEntry) -> tuple[list[str], list[list[str]]]:
    """Return head and lines: level, expert, images, share, then a mean per column.

    Experts that no image chose are left out. Under each level, the p-values of its columns.
    """
    found = result["experts"]
    keys = found["keys"]
    head = ["level", "chosen first", "images", "share", *(TITLES.get(key, key) for key in keys)]
    lines: list[list[str]] = []
    for level in dict.fromkeys(use["level"] for use in found["uses"]):
        label = level
        for use in found["uses"]:
            if use["level"] == level and use["images"]:
                values = [_cell(key, use["means"].get(key)) for key in keys]
                lines.append([label, use["expert"], f"{use['images']}", f"{use['share']:.0%}"])
                lines[-1] += values
                label = ""
        tests = found["p_values"].get(level)
        if tests and lines[-1][0] == "":
            values = [p_value(tests[key]) if key in tests else "-" for key in keys]
            lines.append(["", "p", "", "", *values])
    return head, lines


def expert_text(result: ResultEntry) -> str:
    """Lay the table of one data set out in aligned columns."""
    head, lines = expert_cells(result)
    first, *rest = table([head, *lines], left=2).splitlines()
    title = f"{result['method']} on {result['dataset']}: images by the expert that each level chose"
    return "\n".join([title, first, "-" * len(first), *rest])


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if key == "object_fraction" else f"{value:.3f}"
