"""Noting which experts a model chooses for the images of a data set.

Shape letters: H, W height and width; L levels, N images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camoxpert.evaluation.experts import (
    ExpertTable,
    column,
    expert_table,
    object_contrast,
    shrunk,
    texture,
)
from camoxpert.inference.score import Item
from camoxpert.metrics.scoring import Row
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.experts import expert_names


class ExpertMeter:
    """Notes the expert that every level uses most for each image, and what the image is like.

    Args:
        model: with several experts per level.
    """

    def __init__(self, model: CamoXpert) -> None:
        self.levels = model.level_names()
        self.experts = expert_names(model.expert_kinds)
        self._names: list[str] = []
        self._first: list[Tensor] = []
        self._properties: dict[str, Row] = {}

    def add_choices(self, items: Sequence[Item], first_LN: Tensor) -> None:
        """Note the choices of a forward pass; they stay on the device."""
        self._names += [item.name for item in items]
        self._first.append(first_LN)

    def add_image(
        self, item: Item, mask_HW: NDArray[np.bool_], void_HW: NDArray[np.bool_] | None
    ) -> None:
        """Note the texture and contrast of an image at the size that the network sees."""
        picture = np.ascontiguousarray(item.image.permute(1, 2, 0).numpy())
        size = picture.shape[1], picture.shape[0]
        void = None if void_HW is None else shrunk(void_HW, size)
        self._properties[item.name] = {
            "texture": texture(picture),
            "contrast": object_contrast(picture, shrunk(mask_HW, size), void),
        }

    def columns(self) -> dict[str, Row]:
        """Return image -> its columns of the per-image table; waits for the device once."""
        first_NL = torch.cat(self._first, 1).t().tolist()
        return {
            name: self._properties[name]
            | {column(level): self.experts[e] for level, e in zip(self.levels, own, strict=True)}
            for name, own in zip(self._names, first_NL, strict=True)
        }

    def table(self, rows: Sequence[Row], *, statistics: bool) -> ExpertTable:
        """Return what each expert was chosen for; see ``expert_table``."""
        return expert_table(rows, self.levels, self.experts, statistics=statistics)


def expert_meter(model: nn.Module) -> ExpertMeter | None:
    """Return a meter for a model whose levels choose among experts, else None."""
    if isinstance(model, CamoXpert) and len(model.expert_kinds) > 1:
        return ExpertMeter(model)
    return None
