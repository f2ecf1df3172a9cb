"""The groups that scores and data sets are broken down by: size and number of the objects."""

from __future__ import annotations

from bisect import bisect_right

SIZES = ("none", "tiny < 1 %", "small 1-5 %", "medium 5-20 %", "large >= 20 %")
"""Object sizes, as a share of the image."""
_LIMITS = (0.01, 0.05, 0.2)


def size_class(object_fraction: float) -> int:
    """Return the position in SIZES of an object's share of the image, 0..1."""
    return 1 + bisect_right(_LIMITS, object_fraction) if object_fraction else 0


def size_label(object_fraction: float) -> str:
    """Return the name of a size, prefixed with its position so that names sort by size."""
    position = size_class(object_fraction)
    return f"{position} {SIZES[position]}"


def count_label(num_objects: int) -> str:
    """Return the group of a number of objects: 0, 1, 2, or 3 or more."""
    return f"{num_objects}" if num_objects < 3 else "3 or more"
