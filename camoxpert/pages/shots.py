"""The table of scores by the number of references, from the results in ``scores.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from camoxpert.pages.render import p_value
from camoxpert.pages.tables import format_value
from camoxpert.runs.scores import ResultEntry, ShownTable
from camoxpert.text import count, table

SHOWN = ("IoU", "wFmeasure", "Smeasure", "MAE")
COMPARED = ("IoU", "wFmeasure")
"""The first of these that was computed is compared with the scores without a reference."""


def shot_cells(result: ResultEntry) -> tuple[list[str], list[list[str]]]:
    """Return head and lines: what is shown, and to how many images where not to all, measures,
    difference to no reference, interval, p."""
    return comparison_cells(result["shots"])


def comparison_cells(found: ShownTable, *, base: str = "none") -> tuple[list[str], list[list[str]]]:
    """Return head and lines of scores by what is shown; see ``shot_cells``.

    Args:
        found: ``images`` and ``rows``, each an ``evaluation.shots.ShotScore``.
        base: what the first row is called, with which the others are compared.
    """
    first = found["rows"][0]["scores"]
    keys = [key for key in SHOWN if key in first] or list(first)[:4]
    compared = next((key for key in COMPARED if key in first), keys[0])
    head = ["shown", *keys]
    tested = any(row["differences"] for row in found["rows"])
    if tested:
        head += [f"{compared} - {base}", "95 % interval", "p"]
    lines = []
    for number, row in enumerate(found["rows"]):
        # The first is with no reference; older files do not say how many the others are of.
        images = row.get("images", found["images"]) if number else found["images"]
        few = f" ({images} of {found['images']} images)" if images < found["images"] else ""
        line = [
            f"{row['shown']}{few}",
            *(format_value(key, row["scores"].get(key)) for key in keys),
        ]
        difference = row["differences"].get(compared)
        if tested and difference:
            low, high = difference["low"], difference["high"]
            line += [f"{difference['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"]
            line.append(p_value(difference["p_value"]))
        elif tested:
            line += ["", "", ""]
        lines.append(line)
    return head, lines


def shot_title(result: ResultEntry) -> str:
    """Return what the table is of."""
    found = result["shots"]
    left = found["left_out"]
    without = f"; {count(left, 'image')} without a class to refer to left out" if left else ""
    return (
        f"{result['method']} on {result['dataset']} by what the model is shown: "
        f"{count(found['images'], 'image')} of {count(found['classes'], 'class')}{without}"
    )


def shot_text(results: Sequence[ResultEntry]) -> str:
    """Lay the table of every data set out in aligned columns."""
    parts = []
    for result in results:
        head, lines = shot_cells(result)
        first, *rest = table([head, *lines]).splitlines()
        parts.append("\n".join([shot_title(result), first, "-" * len(first), *rest]))
    return "\n\n".join(parts)


def shot_markdown(results: Sequence[ResultEntry]) -> str:
    """Lay the table of every data set out in Markdown."""
    return "\n".join(markdown_table(shot_title(r), *shot_cells(r)) for r in results)


def markdown_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table with a title in Markdown."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
    return f"{title}\n\n{rows}\n"


SHOT_FORMATS: Mapping[str, Callable[[Sequence[ResultEntry]], str]] = {
    "text": shot_text,
    "markdown": shot_markdown,
}
