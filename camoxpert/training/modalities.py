"""What training shows of the modalities: all, the photograph alone, or a part, drawn for every
image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from camoxpert import console
from camoxpert.config import Config
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.modalities import counted
from camoxpert.data.samples.batches import Batch
from camoxpert.errors import DataError
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.modalities import Modalities, all_there_is, in_order, subsets
from camoxpert.runtime.device import upload
from camoxpert.text import count

STREAM = 1 << 21
"""Separates the random numbers from those of the order, the augmentation and the references."""
WHOLE_SHARE = 0.5
"""Of the images that are not shown as a photograph alone, the share that is shown with all."""


def draw_subset(
    modalities: int, alone: float, *, seed: int, epoch: int, index: int
) -> tuple[bool, ...]:
    """Return what image ``index`` is shown with in an epoch, photograph first.

    Args:
        modalities: how many there are beside the photograph, at least 1.
        alone: share of the images that are shown as the photograph alone. Half of the others are
            shown with all, the rest with one of the other subsets, each as often.
        seed, epoch, index: of the draw.
    """
    generator = np.random.default_rng([seed, epoch, index, STREAM])
    first, second = generator.random(2).tolist()
    photograph, *others, whole = subsets(modalities)
    if first < alone:
        return photograph
    if first < alone + (1 - alone) * WHOLE_SHARE:
        return whole
    return others[int(second * len(others))]


def share_alone(config: Config) -> float:
    """Return the share of the images that training shows as the photograph alone: 0 where that
    would teach nothing, because what sees it is kept."""
    return 0.0 if config.train.keep_rgb else config.data.modality_dropout


def seen_in_training(batch: Batch, config: Config, epoch: int) -> Modalities:
    """Return what the images of a batch are shown with; see ``draw_subset``.

    An image of which nothing of its draw is there keeps its photograph.
    """
    data = config.data
    drawn = [
        draw_subset(
            len(data.beside_rgb),
            share_alone(config),
            seed=config.train.seed,
            epoch=epoch,
            index=index,
        )
        for index in batch.indices
    ]
    chosen_BN = upload(np.array(drawn, np.float32), batch.images) > 0
    return all_there_is(in_order(batch.modalities, data.beside_rgb)).shown(chosen_BN)


def say_modalities(names: Sequence[str], trained: Manifest, validation: Manifest) -> None:
    """Print how many images have each modality.

    Raises:
        DataError: no training image has one of them.
    """
    parts = {"training": trained, "validation": validation}
    for name in names:
        have = {part: counted(found.pairs, [name])[name] for part, found in parts.items()}
        if not have["training"]:
            raise DataError(
                f"--modalities {name}: no training image has any. Put its files into a folder "
                f"{name}/ beside the folder of images, with the names of the images, or into a "
                f"column {name} of the CSV; or leave it out."
            )
        console.decide(
            "modalities",
            f"{name}: {have['training']} of {count(len(trained), 'training image')} and "
            f"{have['validation']} of {count(len(validation), 'validation image')} have it; the "
            f"others are seen without",
        )


def decide_modalities(model: CamoXpert, config: Config) -> None:
    """Print what the modalities of a model cost, and how training shows them."""
    if model.modalities is None:
        return
    size = sum(parameter.numel() for parameter in model.modalities.parameters()) / 1e6
    alone = share_alone(config)
    console.decide(
        "",
        f"light stems for {', '.join(model.modality_names)}: {size:.2f} M of the parameters; the "
        f"GMACs are those of a photograph alone",
    )
    console.decide(
        "",
        f"training shows {alone:.0%} of the images as the photograph alone, "
        f"{(1 - alone) * WHOLE_SHARE:.0%} with all they have, the others with a part of it; "
        f"validation chooses the best weights by the mean of all and the photograph alone",
    )
