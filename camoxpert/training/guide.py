"""What a guided run shows its images: features of references, made once by the frozen encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from camoxpert import console, stop
from camoxpert.config import Config
from camoxpert.data.cache.choice import cache_root
from camoxpert.data.cache.support import Reference as Shown
from camoxpert.data.cache.support import SupportCache
from camoxpert.data.files.classes import object_classes
from camoxpert.data.files.manifest import load_train
from camoxpert.data.files.pairing import Pair
from camoxpert.data.files.unlabeled import joined
from camoxpert.data.samples.batches import Batch
from camoxpert.data.samples.episodes import Episodes, episodes_of
from camoxpert.doctor.inspect import copies_among
from camoxpert.errors import CheckpointError, DataError
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.models.guidance import Guidance, Reference, combine
from camoxpert.models.support import load_support_encoder
from camoxpert.runs.records import GuidanceRecord
from camoxpert.runtime.device import upload
from camoxpert.runtime.processes import World
from camoxpert.text import count
from camoxpert.training.data import RunData, search_of

HINT = (
    "Classes are read from names (COD10K-CAM-1-Aquatic-3-Crab-32, crab_12), from folders of images "
    "by class, or from the column class of a CSV."
)


@dataclass(frozen=True)
class Guide:
    """The references of a run.

    Attributes:
        episodes: which of them an image is shown with.
        names: of the training images, by index.
        features_ND: of the references, on the CPU.
        digest: of the encoder.
        facts: for ``run.json``.
        validation: name of a validation image -> its class, where training knows it.
    """

    episodes: Episodes
    names: tuple[str, ...]
    features_ND: Tensor
    digest: str
    facts: GuidanceRecord
    validation: Mapping[str, str] = field(default_factory=dict)

    @property
    def validates(self) -> bool:
        """Whether validation scores the model with references as well."""
        return bool(self.validation)

    def reference(self, batch: Batch, epoch: int) -> Reference:
        """Return what the images of a batch are shown with.

        An image that replaces an unreadable one is shown with nothing: it may be of another class.
        """
        drawn = [
            self.episodes.draw(epoch=epoch, index=index) if self.names[index] == name else []
            for index, name in zip(batch.indices, batch.names, strict=True)
        ]
        # Put together on the host and copied once; the last column says whether there is one.
        table = torch.zeros(len(drawn), self.features_ND.shape[1] + 1)
        for line, rows in zip(table, drawn, strict=True):
            if rows:
                line[:-1] = combine(self.features_ND[rows])
                line[-1] = 1
        sent = upload(table.numpy(), batch.images)
        return Reference(sent[:, :-1], sent[:, -1] > 0)

    def by_class(self) -> dict[str, Tensor]:
        """Return class -> features (N, D) of its references."""
        members = self.episodes.members
        return {name: self.features_ND[list(rows)] for name, rows in members.items()}

    def teach(self, guidance: Guidance, *, restored: bool = False) -> None:
        """Let a model remember the classes.

        Args:
            guidance: of the model.
            restored: its weights were trained with these references, or with earlier ones.

        Raises:
            CheckpointError: they were trained with another encoder.
        """
        known = guidance.encoder_digest
        if restored and known and known != self.digest:
            raise CheckpointError(
                f"The stopped run described its references with another support encoder, or "
                f"another version of it (sha256 {known[:12]}, now {self.digest[:12]}). Use the "
                f"weights it was started with, or --resume never for a new run."
            )
        features = self.by_class()
        if known != self.digest:
            guidance.standardise(features)
        guidance.remember(features, self.digest)


def prepare_guide(
    config: Config, data: RunData, model: CamoXpert, world: World, *, write: bool = True
) -> Guide | None:
    """Describe the references of a run, and let its model remember their classes.

    Prints the encoder, the classes and what the cache did.

    Args:
        config: settings with nothing left open.
        data: of the run.
        model: on the device of the step.
        world: the processes that train together; rank 0 describes for all.
        write: False describes nothing.

    Returns:
        The guide; None without guidance, or if ``write`` is False.

    Raises:
        ConfigError, CheckpointError: the encoder cannot be had.
        DataError: no class has two images, or a reference cannot be read.
    """
    if model.guidance is None:
        return None
    trained = data.trained
    more = world.from_first(lambda: _more_references(config, data))
    every = [*trained.pairs, *more]
    classes = object_classes(every)
    if more and not set(classes[len(trained) :]) & set(classes[: len(trained)]) - {""}:
        raise DataError(
            f"--reference-data {config.data.episodes.references}: none of its "
            f"{count(len(more), 'image')} is of a class of the training images. {HINT}"
        )
    rows = [row for row, name in enumerate(classes) if name]
    references = [every[row] for row in rows]
    if not references:
        raise DataError(
            f"--support-encoder {config.model.support.encoder}: no training image tells the class "
            f"of its object, so none can be shown another of its kind. {HINT}"
        )
    if not write:
        console.decide(
            "guidance", f"training would describe {count(len(references), 'reference')} first"
        )
        return None
    features_ND, facts, digest = world.from_first(lambda: _describe(config, references, model))
    usable = features_ND.isfinite().all(1).tolist()
    own = [-1] * len(every)
    for number, row in enumerate(rows):
        own[row] = number
    shown = [classes[row] if usable[number] else "" for number, row in enumerate(rows)]
    asked = [
        name if own[index] >= 0 and usable[own[index]] else ""
        for index, name in enumerate(classes[: len(trained)])
    ]
    episodes = episodes_of(
        asked, shown, own[: len(trained)], config.data.episodes, seed=config.train.seed
    )
    if not episodes.shown:
        raise DataError(
            f"--support-encoder {config.model.support.encoder}: no class has two images, so no "
            f"image can be shown another of its kind. {HINT}"
        )
    known = _validation_classes(data, episodes)
    _decide(config, data, episodes, facts, len(known))
    names = tuple(pair.name for pair in trained.pairs)
    guide = Guide(episodes, names, features_ND, digest, facts, known)
    guide.teach(model.guidance)
    return guide


def _more_references(config: Config, data: RunData) -> tuple[Pair, ...]:
    """Return the references beside the training images.

    Without those that the run has anyway, by their content: a training image would be shown with
    itself, and what the run is measured with would teach it.
    """
    folder = config.data.episodes.references
    if not folder:
        return ()
    try:
        pairs = load_train([folder], search_of(config.data, {})).pairs
    except DataError as error:
        raise DataError(f"--reference-data: {error}") from error
    held_out = joined(data.validation, data.calibration, *data.tests.values()).pairs
    copies = copies_among(pairs, [*held_out, *data.trained.pairs])
    if copies:
        measured = sum(copy < len(held_out) for copy in copies.values())
        reasons = {
            "trained on anyway": len(copies) - measured,
            "images for validation, calibration or tests": measured,
        }
        console.decide(
            "guidance",
            f"{len(copies)} of {count(len(pairs), 'reference')} in {folder} are not used: "
            + ", ".join(f"{number} {what}" for what, number in reasons.items() if number),
        )
    return tuple(pair for number, pair in enumerate(pairs) if number not in copies)


def _describe(
    config: Config, references: Sequence[Pair], model: CamoXpert
) -> tuple[Tensor, GuidanceRecord, str]:
    """Return the features (N, D) of references, NaN for those that show nothing; what the cache
    did; and the digest of the encoder."""
    data = config.data
    encoder = load_support_encoder(config.model, device=str(model.mean.device))
    folder = None if data.cache == "none" else cache_root(data) / "stages"
    cache = SupportCache(encoder, folder, max_pixels=data.max_pixels)
    features = torch.full((len(references), encoder.width), torch.nan)
    with console.progress("describing references", total=len(references)) as bar:
        for features_D, pair in zip(features, references, strict=True):
            stop.check()
            found_D = cache.drawn(
                Shown(pair.image, pair.mask, pair.any_size), unreadable=data.unreadable
            )
            if found_D is not None:
                features_D.copy_(found_D)
            bar.set_postfix_str(cache.stats.short(), refresh=False)
            bar.update()
    known = encoder.facts
    facts: GuidanceRecord = {
        "encoder": {
            "encoder": known.encoder,
            "weights": known.weights,
            "side": known.side,
            "version": known.version,
        },
        "width": encoder.width,
        "references": int(features.isfinite().all(1).sum()),
        "cache": cache.stats.to_dict(),
        "cache_text": cache.stats.describe(),
    }
    return features, facts, encoder.digest


def _validation_classes(data: RunData, episodes: Episodes) -> dict[str, str]:
    """Return name -> class of the validation images whose class has references.

    Together with the training images, as they were before they were set aside: what a data set
    calls all of its images is no class. Two images of one name are left out.
    """
    pairs = data.validation.pairs
    classes = object_classes([*pairs, *data.trained.pairs])[: len(pairs)]
    names = Counter(pair.name for pair in pairs)
    return {
        pair.name: name
        for pair, name in zip(pairs, classes, strict=True)
        if name in episodes.members and names[pair.name] == 1
    }


def _decide(
    config: Config, data: RunData, episodes: Episodes, facts: GuidanceRecord, validated: int
) -> None:
    support, drawn = config.model.support, config.data.episodes
    side, classes = facts["encoder"]["side"], len(episodes.members)
    console.decide(
        "guidance",
        f"{support.encoder} describes references ({facts['width']} features, {side} px); "
        f"{episodes.shown} of {count(len(data.trained), 'training image')} have others of their "
        f"class, in {count(classes, 'class')}",
    )
    console.decide(
        "",
        f"shown with 1 to {drawn.shots} of them, {drawn.dropout:.0%} of the time with none; "
        f"support cache: {facts['cache_text']}",
    )
    if validated:
        console.decide(
            "",
            f"validation also shows {validated} of {count(len(data.validation), 'image')} the mean "
            f"of the training references of their class, and this score chooses the best weights",
        )
