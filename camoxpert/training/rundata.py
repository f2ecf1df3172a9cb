"""The data of a run, by what it is used for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from camoxpert.data.files.made import MADE, NO_MADE
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.files.mixing import Mix, mix_of
from camoxpert.data.files.negatives import NEGATIVES, NO_NEGATIVES
from camoxpert.data.files.unlabeled import NO_IMAGES, joined
from camoxpert.data.loader import LoaderPlan
from camoxpert.training.recipe import Recipe


@dataclass
class RunData:
    """The data of a run.

    Attributes:
        train, validation: parts of TRAIN; test sets never choose anything.
        made: made images, trained on beside ``train``.
        unlabeled: images without masks, trained on beside ``train``.
        negatives: images without an object, real and made, trained on beside ``train``; where none
            are told apart, they are in ``train``.
        calibration: images of both kinds that calibrate the presence head.
        left_out: training images that a quick run does not use.
        tests: test sets found beside the training data, by name; scored once, at the end.
        data_hash: content hash of all that is trained on or validated with.
        loading: workers, cache and teacher's maps of the training loader.
        recipe: the settings with nothing left open.
        checked: how much of the files was read to check them, as a sentence.
    """

    train: Manifest
    validation: Manifest
    tests: dict[str, Manifest]
    data_hash: str
    loading: LoaderPlan
    recipe: Recipe
    checked: str
    made: Manifest = NO_MADE
    unlabeled: Manifest = NO_IMAGES
    negatives: Manifest = NO_NEGATIVES
    calibration: Manifest = NO_IMAGES
    left_out: Manifest = NO_IMAGES

    @property
    def trained(self) -> Manifest:
        """All images that are trained on: real ones first, those without masks last."""
        return joined(self.train, self.made, self.negatives, self.unlabeled)

    def real_and_made(self) -> tuple[Manifest, Manifest]:
        """Return the labelled images that are trained on: real ones and made ones."""
        parts = [
            replace(self.negatives, pairs=tuple(p for p in self.negatives.pairs if p.made is made))
            for made in (False, True)
        ]
        return joined(self.train, parts[0]), joined(self.made, parts[1])

    @property
    def mix(self) -> Mix:
        """How many images of each kind there are, and how many an epoch sees."""
        return mix_of(self.trained, self.recipe.config.data)

    def images_per_epoch(self, processes: int = 1) -> int:
        """Return how many images one of several processes takes in an epoch."""
        return self.mix.per_process(processes)

    def counts(self) -> dict[str, int]:
        """Return the number of images of each kind, for ``run.json``."""
        counts = {
            "training": len(self.train),
            "validation": len(self.validation),
            MADE: len(self.made),
            f"{MADE}_per_epoch": self.mix.made_seen,
            "unlabeled": len(self.unlabeled),
        }
        if len(self.negatives):
            counts |= {
                NEGATIVES: len(self.negatives),
                f"{NEGATIVES}_per_epoch": self.mix.negatives_seen,
                "calibration": len(self.calibration),
            }
        return counts | ({"left_out": len(self.left_out)} if len(self.left_out) else {})
