"""What describing references costs a guided run, and what keeping their features saves."""

from __future__ import annotations

from camoxpert import console
from camoxpert.benchmark.common import show_table
from camoxpert.training.guide import Guide

REFERENCES = "references"
"""The component of a step that draws references and joins their features."""


def support_rows(
    guide: Guide, *, step: float, references: float, images: int, steps: int
) -> dict[str, float]:
    """Return where the time of a step would go if it encoded its references itself.

    Args:
        guide: of the run.
        step: milliseconds of a step.
        references: of them, drawing references and joining their features.
        images: of a step.
        steps: of the whole run, over which what was done before it is spread.

    Returns:
        Milliseconds of the step itself, the support encoder, the support cache (hashing and reading
        before the run, drawing and joining in the step), and what was saved: they add up to a step
        that reads and encodes the references that it shows. Saved is negative where the features
        are not used often enough.
    """
    cache = guide.facts["cache"]
    described = cache["hits"] + sum(cache["misses"].values())
    each = 1e3 * (cache["encoded_seconds"] + cache["saved_seconds"]) / max(described, 1)
    encoder = 1e3 * cache["encoded_seconds"] / steps
    lookup = 1e3 * cache["found_seconds"] / steps + references
    shown = images * mean_references(guide)
    return {
        "step without references": step - references,
        "support encoder": encoder,
        "support cache": lookup,
        "saved": shown * each - encoder - lookup,
    }


def mean_references(guide: Guide) -> float:
    """Return how many references a training image is shown with, on average over an epoch."""
    drawn = [guide.episodes.draw(epoch=0, index=index) for index in range(len(guide.names))]
    return sum(map(len, drawn)) / max(len(drawn), 1)


def show_support(rows: dict[str, float]) -> None:
    """Print the rows and their sum."""
    total = sum(rows.values())
    console.say("a step that encoded the references it shows would take:")
    table = [[name, f"{ms:.2f} ms", f"{ms / total:.1%}"] for name, ms in rows.items()]
    show_table([*table, ["sum", f"{total:.2f} ms", "100.0%"]])
