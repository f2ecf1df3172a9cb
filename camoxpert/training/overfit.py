"""Learning a few batches by heart: whether it worked, and what to look at where it did not.

Whatever a model cannot learn from a few images that it sees at every step, it will not learn from a
data set. The test is cheap, and it finds wrong masks, a rate out of range, a loss that does not fit
its target and weights that do not move.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from camoxpert.data.files.image_io import read_mask_as
from camoxpert.data.files.pairing import Pair
from camoxpert.doctor.inspect import MaskShape, mask_shape
from camoxpert.errors import DataError
from camoxpert.text import count

if TYPE_CHECKING:
    from camoxpert.training.run import Run

NEAR_ZERO = 0.15
"""Loss of the masks that counts as near zero; an untrained network has about 1.5."""
LAST_STEPS = 10
"""Steps over which the loss of an epoch is averaged."""
PATIENCE = 4
"""Epochs without a better loss after which the run is given up."""
BETTER = 0.98
"""Factor by which a loss must fall to count as better."""
LOWEST_RATE = 1e-5
FEWEST_PIXELS = 16
"""Pixels at the training size below which an object is hardly seen."""


@dataclass
class Overfit:
    """The loss of the masks, epoch by epoch.

    Attributes:
        steps: losses of the epoch in progress.
        losses: mean of the last steps of each epoch that is done.
    """

    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def reached(self) -> bool:
        """Whether the loss is near zero."""
        return bool(self.losses) and self.losses[-1] < NEAR_ZERO

    def add(self, loss: float) -> None:
        """Count a step's loss of the masks."""
        self.steps.append(loss)

    def end_epoch(self) -> str:
        """Return why training ends with this epoch, or ""."""
        last = self.steps[-LAST_STEPS:]
        self.steps = []
        if not last:
            return ""
        self.losses.append(sum(last) / len(last))
        if self.reached:
            return f"learned by heart: the loss of the masks is {self.losses[-1]:.3f}"
        best = 0
        for epoch, loss in enumerate(self.losses):
            # NaN is never better.
            if loss < BETTER * self.losses[best]:
                best = epoch
        if len(self.losses) - 1 - best >= PATIENCE:
            return (
                f"not learned by heart: the loss of the masks is {self.losses[-1]:.3f} and has not "
                f"fallen for {PATIENCE} epochs"
            )
        return ""


def verdict(run: Run) -> str:
    """Return what is wrong with a run that learned batches by heart, in one paragraph; "" if it
    did, or if that was not its task."""
    if run.overfit is None:
        return ""
    empty = _of_masks(run)
    if not run.overfit.reached:
        return _diagnosis(run, run.overfit, empty)
    if not empty:
        return ""
    return f"The loss is near zero, which says nothing here: {'; '.join(empty)}."


def _diagnosis(run: Run, overfit: Overfit, of_masks: list[str]) -> str:
    losses = overfit.losses or [float("nan")]
    hints = [*of_masks, *_of_training(run, losses)]
    if not hints:
        hints = ["none of the usual causes was found; `camoxpert doctor` checks the data"]
    listed = " ".join(f"({number}) {hint}." for number, hint in enumerate(hints, start=1))
    return (
        f"{count(len(run.data.train), 'image')} could not be learned by heart: after "
        f"{count(run.state.step, 'step')} the loss of the masks is {losses[-1]:.3f}, and near zero "
        f"is below {NEAR_ZERO:g}. What to look at: {listed}"
    )


def _of_masks(run: Run) -> list[str]:
    pairs = run.data.train.pairs
    shapes = [shape for pair in pairs if (shape := _shape(run, pair)) is not None]
    if not shapes:
        return ["none of the masks can be read"]
    number, hints = len(shapes), []
    for words, found in (
        ("are empty: there is nothing to find in them", [s.share == 0 for s in shapes]),
        ("mark every pixel as object", [s.share == 1 for s in shapes]),
        ("look inverted: the object, white, surrounds the image", [s.inverted for s in shapes]),
    ):
        if sum(found) > number / 2:
            every = "all" if all(found) else f"{sum(found)} of"
            hints.append(f"{every} {number} masks {words}; `camoxpert doctor` checks all of them")
    side = run.config.data.img_size
    small = sum(0 < s.share * side * side < FEWEST_PIXELS for s in shapes)
    if small > number / 4:
        hints.append(
            f"{small} of {number} objects cover fewer than {FEWEST_PIXELS} pixels at --img-size "
            f"{side}: raise it"
        )
    return hints


def _shape(run: Run, pair: Pair) -> MaskShape | None:
    try:
        mask, _ = read_mask_as(pair.mask, max_pixels=run.config.data.max_pixels)
    except DataError:
        return None
    return mask_shape(mask)


def _of_training(run: Run, losses: list[float]) -> list[str]:
    state, hints = run.state, []
    if state.skipped > state.step / 10:
        hints.append(
            f"{state.skipped} of {state.step} steps were skipped as not finite: lower --lr, or use "
            f"--precision fp32"
        )
    frozen = run.config.train.stage1_epochs or 0
    if frozen >= len(losses):
        hints.append(f"the backbone was frozen all the time: --stage1-epochs {frozen}")
    elif frozen:
        hints.append(f"the backbone was frozen for {frozen} of {len(losses)} epochs")
    rate = max(stage.lr for stage in run.plan.stages)
    if rate < LOWEST_RATE:
        hints.append(f"the rate is low: --lr {rate:g}, and 1e-4 to 1e-2 is usual")
    lowest = min(losses)
    if losses[-1] > 1.25 * lowest:
        hints.append(f"the loss was {lowest:.3f} and rose again: --lr {rate:g} may be too high")
    elif len(losses) > 1 and losses[-1] < BETTER * losses[-2]:
        hints.append(
            f"the loss was still falling ({losses[-2]:.3f}, then {losses[-1]:.3f}): raise --epochs "
            f"or --lr"
        )
    elif len(losses) > 1 and losses[-1] > 0.9 * losses[0]:
        hints.append(
            f"the loss hardly moved ({losses[0]:.3f} to {losses[-1]:.3f}): the rate (--lr {rate:g})"
            f" is far too low or too high, or masks and images do not belong together"
        )
    return hints
