"""Unreadable samples: an error by default, or skipped up to a limit.

Under ``skip`` sample i is replaced by the next readable one (i+1, i+2, ..., wrapping around),
augmented by the draw of i. This depends only on the files, so the batches are the same for any
number of workers, with or without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from camoxpert.config import DataConfig
from camoxpert.errors import DataError
from camoxpert.text import bullet_list

T = TypeVar("T")

# (name, why it cannot be read).
Fault = tuple[str, str]


def allowed(count: int, share: float) -> int:
    """Return how many of ``count`` images may be unreadable; at least one."""
    return max(1, int(share * count))


def skippable(data: DataConfig, count: int) -> int:
    """Return how many unreadable samples in a row are skipped, of ``count``; 0: none."""
    return allowed(count, data.max_unreadable) if data.unreadable == "skip" else 0


def require_few(faults: Sequence[Fault], count: int, share: float, *, what: str) -> None:
    """Raise DataError if more than the allowed share of ``count`` images is unreadable."""
    if len(faults) > allowed(count, share):
        raise DataError(
            f"{len(faults)} of {count} {what} cannot be read, but data.max_unreadable={share:g} "
            f"allows only {allowed(count, share)}:\n"
            f"{bullet_list([reason for _, reason in faults])}\n"
            "Repair, replace or remove these files (image and mask), or raise data.max_unreadable."
        )


class Unreadable:
    """Counts the unreadable images of a run, in the training process.

    Args:
        count: number of training images.
        share: data.max_unreadable.
    """

    def __init__(self, count: int, share: float) -> None:
        self.count = count
        self.share = share
        self.seen: dict[str, str] = {}

    def note(self, replaced: Iterable[Fault]) -> list[str]:
        """Record a batch's ``replaced``; return a line for every new name.

        Raises:
            DataError: more names than allowed; it lists them.
        """
        lines = []
        for name, reason in replaced:
            if name not in self.seen:
                self.seen[name] = reason
                lines.append(f"{name} cannot be read and is replaced: {reason}")
        require_few(list(self.seen.items()), self.count, self.share, what="training images")
        return lines


def first_readable(
    index: int, names: Sequence[str], read: Callable[[int], T], *, skip: int
) -> tuple[int, T, list[Fault]]:
    """Read sample ``index``, or the next one that can be read.

    Args:
        index: the sample to read.
        names: names of all samples.
        read: reads a sample, or raises DataError.
        skip: number of unreadable samples in a row to skip; 0: raise at the first.

    Returns:
        The index of the sample read, the sample, and the faults of those skipped.

    Raises:
        DataError: the error of ``read``, or one that lists the samples that cannot be read.
    """
    faults: list[Fault] = []
    while True:
        place = (index + len(faults)) % len(names)
        try:
            return place, read(place), faults
        except DataError as error:
            if not skip:
                raise
            faults.append((names[place], str(error)))
            # Too many already: do not try thousands more.
            if len(faults) > skip or len(faults) == len(names):
                reasons = [reason for _, reason in faults]
                raise DataError(
                    f"{len(faults)} samples in a row cannot be read, which is too many to skip:\n"
                    f"{bullet_list(reasons)}\n"
                    "Repair, replace or remove these files (image and mask)."
                ) from None
