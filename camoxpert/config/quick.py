"""The settings of quick runs: less of everything, to try settings or to look for a fault."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config.schema import setting

PREFIX = "train.quick."


@dataclass(frozen=True)
class QuickConfig:
    """A run that is not a whole one; its name, ``run.json`` and report say so."""

    data_fraction: float = setting(
        1.0,
        "train on this share of the training images, of every class and object size alike, copies "
        "kept together; validation and tests stay whole",
        flag="--data-fraction",
        above=0,
        maximum=1,
    )
    limit_batches: int | None = setting(
        None,
        "batches per epoch, and images of as many batches per validation; unset: all",
        flag="--limit-batches",
        minimum=1,
    )
    overfit_batches: int | None = setting(
        None,
        "learn this many batches by heart, without augmentation, until the loss is near zero; a "
        "run that cannot has a fault, and says what to look at",
        flag="--overfit-batches",
        minimum=1,
    )


def quick_words(quick: QuickConfig) -> dict[str, str]:
    """Return what makes a run a quick one: dotted path -> sentence; {} for a whole run."""
    words = {}
    if quick.data_fraction < 1:
        words["data_fraction"] = (
            f"trained on {quick.data_fraction:.4g} of the training images (--data-fraction)"
        )
    if quick.limit_batches is not None:
        words["limit_batches"] = (
            f"at most {quick.limit_batches} batches of training and of validation an epoch "
            f"(--limit-batches)"
        )
    if quick.overfit_batches is not None:
        words["overfit_batches"] = (
            f"learned {quick.overfit_batches} batches by heart and was validated on the same "
            f"images (--overfit-batches)"
        )
    return {f"{PREFIX}{name}": sentence for name, sentence in words.items()}


def quick_name(quick: QuickConfig) -> str:
    """Return the part of a run's name that says how quick it is; "" for a whole run."""
    parts = [f"data{quick.data_fraction:g}"] if quick.data_fraction < 1 else []
    parts += [f"limit{quick.limit_batches}"] if quick.limit_batches is not None else []
    parts += [f"overfit{quick.overfit_batches}"] if quick.overfit_batches is not None else []
    return "-".join(["quick", *parts]) if parts else ""
