"""The table of scores by what the model is shown of each image, from ``scores.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from camoxpert.pages.shots import comparison_cells, markdown_table
from camoxpert.pages.tables import format_value
from camoxpert.runs.scores import ResultEntry
from camoxpert.text import count, table


def subset_cells(result: ResultEntry) -> tuple[list[str], list[list[str]]]:
    """Return head and lines: what is shown, measures, difference to the photograph alone; below the
    subsets their mean and the worst."""
    found = result["modalities"]
    head, lines = comparison_cells(found, base="rgb")
    for name in ("mean", "worst"):
        cells = [format_value(key, found[name].get(key)) for key in head[1:] if key in found[name]]
        words = "mean of all" if name == "mean" else "worst"
        lines.append([words, *cells, *[""] * (len(head) - 1 - len(cells))])
    return head, lines


def subset_title(result: ResultEntry) -> str:
    """Return what the table is of."""
    found = result["modalities"]
    lacking = [
        f"{found['images'] - number} without {name}"
        for name, number in found["have"].items()
        if number < found["images"]
    ]
    return (
        f"{result['method']} on {result['dataset']} by what the model is shown: "
        f"{count(found['images'], 'image')}{''.join(f', {text}' for text in lacking)}"
    )


def subset_text(results: Sequence[ResultEntry]) -> str:
    """Lay the table of every data set out in aligned columns."""
    parts = []
    for result in results:
        head, lines = subset_cells(result)
        first, *rest = table([head, *lines]).splitlines()
        parts.append("\n".join([subset_title(result), first, "-" * len(first), *rest]))
    return "\n\n".join(parts)


def subset_markdown(results: Sequence[ResultEntry]) -> str:
    """Lay the table of every data set out in Markdown."""
    return "\n".join(markdown_table(subset_title(r), *subset_cells(r)) for r in results)


SUBSET_FORMATS: Mapping[str, Callable[[Sequence[ResultEntry]], str]] = {
    "text": subset_text,
    "markdown": subset_markdown,
}
