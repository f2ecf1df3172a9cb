"""Where the time of a job went, as lines of text."""

from __future__ import annotations

from camoxpert.inference.timing import describe
from camoxpert.runs.jobs import JobSummary
from camoxpert.text import table

PLACES = {
    "forward": "making images",
    "read": "waiting for sources to be read",
    "write": "waiting for files to be written",
    "chunks": "waiting for work",
    "other": "the rest",
}
READING, WRITING = ("read", "look up"), ("write",)


def describe_stages(summary: JobSummary) -> str:
    """Return a line for each worker, and a table of stages whose shares add up.

    Args:
        summary: of an engine.
    """
    rows = stage_rows(summary)
    lines = [describe(summary, PLACES), table([("stage", "seconds", "share"), *rows])]
    warm = warm_up(summary)
    if warm is not None:
        lines.append(f"{warm:.2f} s of it are warm-up: the first passes of each worker")
    return "\n".join(lines)


def stage_rows(summary: JobSummary) -> list[tuple[str, str, str]]:
    """Return (stage, seconds, share) of all threads of all workers, and their sum."""
    seconds: dict[str, float] = {}
    for worker in summary["workers"]:
        for stage, value in worker.get("thread_seconds", {}).items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    whole = seconds.pop("forward", 0.0)
    inner = {k: v for k, v in seconds.items() if k not in (*READING, *WRITING)}
    parts = {k: seconds[k] for k in READING if k in seconds} | inner
    # Of a GPU only the whole pass is known.
    parts["between them" if inner else "making"] = max(0.0, whole - sum(inner.values()))
    parts |= {k: seconds[k] for k in WRITING if k in seconds}
    total = sum(parts.values()) or 1.0
    rows = [(name, f"{value:.2f}", f"{value / total:.1%}") for name, value in parts.items()]
    return [*rows, ("all threads", f"{total:.2f}", "100.0%")]


def warm_up(summary: JobSummary) -> float | None:
    """Return how many seconds the first passes took longer than the usual ones."""
    extra = []
    for worker in summary["workers"]:
        usual = worker.get("forward_seconds_per_input", {}).get("p50")
        first = worker.get("warm_up_seconds_per_input", [])
        if usual is not None:
            size = worker.get("batch_size", 1)
            extra.append(sum(max(0.0, seconds - usual) * size for seconds in first))
    return sum(extra) if extra else None
