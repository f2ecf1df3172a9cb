"""Noting how probable a model finds it that the images of a data set hold any object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from camoxpert.inference.score import Item


class PresenceMeter:
    """Notes the probability of every image; they stay on the device until one is asked for."""

    def __init__(self) -> None:
        self._waiting: list[tuple[list[str], Tensor]] = []
        self._known: dict[str, float] = {}

    def add(self, items: Sequence[Item], presence_N: Tensor) -> None:
        """Note the probabilities of a forward pass; they stay on the device."""
        self._waiting.append(([item.name for item in items], presence_N))

    def probabilities(self) -> Mapping[str, float]:
        """Return image -> probability, 0..1, of all images so far."""
        for names, presence_N in self._waiting:
            self._known.update(zip(names, presence_N.tolist(), strict=True))
        self._waiting.clear()
        return self._known
