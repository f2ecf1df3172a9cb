"""The gate: an exported file is compared with its checkpoint before anybody gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from camoxpert import console, stop
from camoxpert.config import DataConfig
from camoxpert.data.files.manifest import Manifest
from camoxpert.data.loader import build_eval_loader
from camoxpert.errors import NumericError
from camoxpert.export.forced import rounds_of
from camoxpert.export.graph import STRIDE, ExportGraph
from camoxpert.inference.runtimes import Runtime
from camoxpert.inference.score import Item, score
from camoxpert.metrics import Evaluator
from camoxpert.metrics.scoring import Row
from camoxpert.synthesis.toy import toy_pair
from camoxpert.text import count

MOST_DIFFERENCE = 1e-4
"""Largest difference of a probability in fp32."""
LEAST_SPREAD = 1.0
"""Least distance between the highest and the lowest logit: without it every wrong graph passes."""
LEAST_IMAGES = 50
LIMITS = {
    "fp32": {"Smeasure": 0.001, "MAE": 0.0005, "iou": 0.995},
    "fp16": {"Smeasure": 0.002},
    "bf16": {"Smeasure": 0.002},
    "int8": {"Smeasure": 0.005},
}
"""Precision -> largest change of a measure; ``iou``: least IoU with the checkpoint's masks."""
Force = Callable[[Sequence[Sequence[int]]], tuple[ExportGraph, Runtime]]
"""Returns a graph and a file that use given experts of every level; see ``forced.force``."""


@dataclass
class Parity:
    """Comparison of the graph's outputs with the network's.

    Attributes:
        shapes: (batch, height, width) that were compared.
        difference: largest difference of a probability, over all of them.
        presence_difference: the same of the presence; None without the head.
        not_finite: shapes for which an output holds NaN or infinity.
        spread: highest minus lowest logit of the network.
        reached: share of the experts of all levels that some image used.
        forced: those that none used, as level and number: compared in a copy of the file whose
            routers choose them.
        not_reached: those that could not be compared.
    """

    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    difference: float = 0.0
    presence_difference: float | None = None
    not_finite: list[tuple[int, int, int]] = field(default_factory=list)
    spread: float = 0.0
    reached: float = 1.0
    forced: list[str] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)


@dataclass
class Agreement:
    """Comparison of the scores on images.

    Attributes:
        images: how many.
        source: where they came from.
        scores: measure -> (checkpoint, exported file), means over the images.
        iou: intersection over union of both masks at one half, over all pixels of all images.
        worst_iou: of the image where they differ most.
        worst_image: its name.
    """

    images: int
    source: str
    scores: dict[str, tuple[float, float]]
    iou: float
    worst_iou: float
    worst_image: str

    def change(self, measure: str) -> float:
        """Return by how much the exported file scores higher."""
        before, after = self.scores[measure]
        return after - before


@dataclass
class Gate:
    """What the gate found.

    Attributes:
        precision: of the file.
        parity, agreement: see there.
        broken: sentences, one for each limit that is not kept; empty: the file may be used.
    """

    precision: str
    parity: Parity
    agreement: Agreement
    broken: list[str]

    def fields(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        agreement = asdict(self.agreement)
        changes = {name: self.agreement.change(name) for name in self.agreement.scores}
        return {
            "passed": not self.broken,
            "precision": self.precision,
            "limits": {"difference": MOST_DIFFERENCE, **LIMITS[self.precision]},
            "parity": asdict(self.parity),
            "agreement": {**agreement, "changes": changes},
            "broken": self.broken,
        }

    def require(self) -> None:
        """Raise NumericError if a limit is not kept."""
        if self.broken:
            raise NumericError(
                "The exported model is not the same model, and no file was written: "
                + "; ".join(self.broken)
                + "."
            )


def judge(precision: str, parity: Parity, agreement: Agreement) -> Gate:
    """Return the verdict on what was measured."""
    limits, broken = LIMITS[precision], []
    if parity.spread <= LEAST_SPREAD:
        broken.append(
            f"the network's logits spread over {parity.spread:.2g} only (more than "
            f"{LEAST_SPREAD:g} is needed), so that nothing can be compared: it is not trained"
        )
    if parity.not_finite:
        batch, height, width = parity.not_finite[0]
        broken.append(
            f"it returns NaN or infinity for {batch} x 3 x {height} x {width} (in "
            f"{len(parity.not_finite)} of {count(len(parity.shapes), 'shape')})"
        )
    # "not <=" is true of NaN as well.
    if precision == "fp32" and not parity.difference <= MOST_DIFFERENCE:
        broken.append(
            f"a probability differs by {parity.difference:.2g} (at most {MOST_DIFFERENCE:g})"
        )
    presence = parity.presence_difference
    if precision == "fp32" and presence is not None and not presence <= MOST_DIFFERENCE:
        broken.append(f"the presence differs by {presence:.2g} (at most {MOST_DIFFERENCE:g})")
    for measure in ("Smeasure", "MAE"):
        change = agreement.change(measure)
        if measure in limits and not abs(change) <= limits[measure]:
            broken.append(
                f"{measure} changes by {change:+.4f} (at most {limits[measure]:g}) on "
                f"{agreement.images} images"
            )
    if "iou" in limits and not agreement.iou >= limits["iou"]:
        broken.append(
            f"its masks have an IoU of {agreement.iou:.4f} with the checkpoint's (at least "
            f"{limits['iou']:g}; worst image {agreement.worst_image}: {agreement.worst_iou:.3f})"
        )
    return Gate(precision, parity, agreement, broken)


def shapes_for(
    side: int, static: Sequence[int] | None, least: int = STRIDE
) -> list[tuple[int, int, int]]:
    """Return the shapes to compare: of a graph with open sizes six or more, most not square.

    Args:
        side: of the images that the network was trained on.
        static: the only shape there is.
        least: shortest side that the file is given.
    """
    if static:
        return [(static[0], static[1], static[2])] * 6
    side = max(side, least)
    half = max(least, side // 2 // STRIDE * STRIDE)
    sizes = [(64, 64), (64, 96), (128, least), (half, side), (side, half), (96, 160)]
    sizes += [(least, 160), (side, side)]
    shapes = [(5 if index % 3 == 1 else 1, *size) for index, size in enumerate(sizes)]
    return list(dict.fromkeys(shapes))


def compare(
    reference: Callable[..., Sequence[Tensor]],
    graph: ExportGraph,
    runtime: Runtime,
    shapes: Sequence[tuple[int, int, int]],
    force: Force | None = None,
) -> Parity:
    """Compare a file with the network on noise, flat colours, textures and camouflage.

    Experts that none of these images uses are compared in copies whose routers choose them.

    Args:
        reference: returns what the graph should, from its inputs.
        graph: what was exported, for the names and to see which experts are used.
        runtime: runs the file.
        shapes: (batch, height, width).
        force: makes such copies; None: experts that no image uses are not compared.
    """
    found = Parity(shapes=list(shapes))
    levels = graph.network.moe_levels
    used = [set[int]() for _ in levels]
    for index, shape in enumerate(shapes):
        stop.check()
        images = varied_images(*shape, seed=index)
        _compare_one(reference, graph, runtime, images, index, found, used)
    total = sum(len(level.experts) for level in levels)
    unused = missing_experts(graph, used)
    found.reached = 1 - len(unused) / total if total else 1.0
    rounds = rounds_of(unused, [level.router.top_k for level in levels])
    for index, chosen in enumerate(rounds if force else ()):
        assert force is not None
        stop.check()
        forced_graph, forced_runtime = force(chosen)
        # The second shape: several images, not square.
        images = varied_images(*shapes[1], seed=index)
        _compare_one(forced_graph, forced_graph, forced_runtime, images, index, found, used)
    left = missing_experts(graph, used)
    names = graph.network.level_names()[::-1]
    found.not_reached = [f"{names[level]}, expert {number}" for level, number in left]
    found.forced = [
        f"{names[level]}, expert {number}"
        for level, number in unused
        if (level, number) not in left
    ]
    return found


def _compare_one(
    reference: Callable[..., Sequence[Tensor]],
    graph: ExportGraph,
    runtime: Runtime,
    images: Tensor,
    index: int,
    found: Parity,
    used: list[set[int]],
) -> None:
    inputs: list[Tensor] = [images]
    if graph.network.guidance is not None:
        generator = torch.Generator().manual_seed(index)
        told = torch.randn(len(images), graph.network.guidance.features, generator=generator)
        # With and without references in turn.
        inputs.append(nn.functional.normalize(told, dim=1) * float(index % 2))
    with torch.no_grad():
        expected = [tensor.float().numpy() for tensor in reference(*inputs)]
        note_used(graph, inputs, used)
    names = graph.output_names
    arrays = {
        name: np.ascontiguousarray(tensor.numpy())
        for name, tensor in zip(graph.input_names, inputs, strict=True)
    }
    try:
        given = dict(zip(names, runtime.run(arrays, names), strict=True))
    except Exception as error:  # of the runtime's own types
        reason = " ".join(str(error).split())[-200:]
        raise NumericError(
            f"The exported model fails on images of shape {tuple(images.shape)}, and no file was "
            f"written ({type(error).__name__}: {reason})."
        ) from error
    wanted = dict(zip(names, expected, strict=True))
    for name in names:
        if given[name].shape != wanted[name].shape:
            raise NumericError(
                f"The exported model returns {name} of shape {given[name].shape} for images of "
                f"shape {tuple(images.shape)}; the network {wanted[name].shape}."
            )
    if not all(np.isfinite(given[name]).all() for name in names):
        found.not_finite.append((len(images), *images.shape[-2:]))
    logits = wanted["logits"]
    found.spread = max(found.spread, float(logits.max() - logits.min()))
    # max() of Python drops NaN; that of NumPy keeps it.
    worst = largest_difference(given["probability"], wanted["probability"])
    # Larger maps are made from the logits: they must be those of the probabilities.
    own = 1 / (1 + np.exp(-given["logits"].astype(np.float64)))
    worst = float(np.max([worst, largest_difference(own, wanted["probability"])]))
    found.difference = float(np.max([found.difference, worst]))
    if "presence" in wanted:
        presence = largest_difference(given["presence"], wanted["presence"])
        found.presence_difference = float(np.max([found.presence_difference or 0.0, presence]))


def largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the largest absolute difference; NaN if either holds one."""
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def note_used(graph: ExportGraph, inputs: Sequence[Tensor], used: list[set[int]]) -> None:
    """Add the experts that images use to those of each level, stride 4 first."""
    if not used:
        return
    output = graph.run(*inputs)
    for level, routing in enumerate(reversed(output.routing)):
        used[level] |= set(routing.experts_BK.unique().tolist())


def missing_experts(graph: ExportGraph, used: Sequence[set[int]]) -> list[tuple[int, int]]:
    """Return (level, number) of the experts that no image used."""
    return [
        (index, number)
        for index, level in enumerate(graph.network.moe_levels)
        for number in range(len(level.experts))
        if number not in used[index]
    ]


def varied_images(batch: int, height: int, width: int, *, seed: int) -> Tensor:
    """Return images (B, 3, H, W), uint8, that routers tell apart: camouflage, noise, flat colours
    and gradients in turn."""
    random = np.random.default_rng(seed)
    images = []
    for index in range(batch):
        kind = (seed + index) % 4
        if kind == 0:
            image, _ = toy_pair(seed, index, size=max(height, width), difficulty=0.3)
            image = image[:height, :width]
        elif kind == 1:
            image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        elif kind == 2:
            image = np.broadcast_to(random.integers(0, 256, 3, dtype=np.uint8), (height, width, 3))
        else:
            ramp = np.linspace(0, 255, width)[None, :, None] * random.uniform(0.2, 1, 3)
            image = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8)
        images.append(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return torch.from_numpy(np.stack(images))


class Maps:
    """Scores of one model, and its masks at one half."""

    def __init__(self) -> None:
        self.evaluator = Evaluator(keys=("Smeasure", "MAE"))
        self.masks: dict[str, NDArray[np.bool_]] = {}

    def seen(self, item: Item, prediction: Callable[[], NDArray[np.uint8]], row: Row) -> None:
        """Keep an image's mask."""
        self.masks[item.name] = prediction() > 127

    def add(
        self, model: nn.Module, manifest: Manifest, data: DataConfig, device: torch.device
    ) -> None:
        """Score a model on images; those of other data sets may have the same names."""
        pairs = (replace(pair, name=f"{manifest.dataset}/{pair.name}") for pair in manifest.pairs)
        manifest = replace(manifest, pairs=tuple(pairs))
        loader = build_eval_loader(manifest, data, batch_size=8)
        batches = console.track(loader, f"compare {manifest.dataset}")
        score(model, batches, device=device, evaluator=self.evaluator, seen=self.seen)


def agreement_of(before: Maps, after: Maps, source: str) -> Agreement:
    """Return how the exported model's scores and masks agree with the checkpoint's."""
    ious, joint, either = {}, 0, 0
    for name, mask in before.masks.items():
        other = after.masks[name]
        both, union = int((mask & other).sum()), int((mask | other).sum())
        ious[name] = both / union if union else 1.0
        joint, either = joint + both, either + union
    worst = min(ious, key=lambda name: ious[name])
    first, second = before.evaluator.results(), after.evaluator.results()
    return Agreement(
        images=len(ious),
        source=source,
        scores={name: (first[name], second[name]) for name in ("Smeasure", "MAE")},
        iou=joint / either if either else 1.0,
        worst_iou=ious[worst],
        worst_image=worst,
    )


def describe(gate: Gate) -> str:
    """Return the figures of a gate in a line."""
    parity, agreement = gate.parity, gate.agreement
    s_change, mae_change = agreement.change("Smeasure"), agreement.change("MAE")
    return (
        f"largest difference of a probability {parity.difference:.1e} over {len(parity.shapes)} "
        f"shapes; on {agreement.images} images ({agreement.source}) S {s_change:+.5f}, MAE "
        f"{mae_change:+.5f}, IoU of the masks {agreement.iou:.4f}"
    )
