"""Published scores on the field's test sets, to read beside one's own; none was measured here."""

from __future__ import annotations

from collections.abc import Iterable

from camoxpert.evaluation.results import EvaluationResult
from camoxpert.runs.scores import TableEntry

IMAGES = {"COD10K": 2026, "NC4K": 4121, "CAMO": 250}
"""Official test set -> number of its images."""
KEYS = ("Smeasure", "wFmeasure", "MAE")
# Model -> parameters, multiply-adds, and test set -> S-measure, weighted F, MAE; None: not given.
# Sources: Pang et al., ZoomNeXt, TPAMI 2024; Hu et al., PRNet, 2024; Ji et al., DGNet, MIR 2023;
# Fan et al., SINet-V2, TPAMI 2022. Taken over second-hand: check the papers before citing them.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "ZoomNeXt PVTv2-B4, 65 M, 132 GMACs": {
        "COD10K": (0.898, 0.838, 0.017),
        "NC4K": (0.900, 0.865, 0.028),
        "CAMO": (0.888, 0.859, 0.040),
    },
    "ZoomNeXt PVTv2-B2, 62 GMACs": {
        "COD10K": (0.887, 0.818, 0.019),
        "NC4K": (0.892, 0.852, 0.030),
        "CAMO": (0.874, 0.839, 0.047),
    },
    "PRNet, 12.7 M, 10.2 GMACs": {
        "COD10K": (0.874, None, 0.022),
        "NC4K": (0.891, None, 0.031),
        "CAMO": (0.872, None, 0.050),
    },
    "DGNet, 21 M, 2.8 GMACs": {
        "COD10K": (0.822, 0.692, 0.033),
        "NC4K": (0.857, 0.783, 0.042),
        "CAMO": (0.838, 0.768, 0.057),
    },
    "SINet-V2, 27 M, 12.2 GMACs": {
        "COD10K": (0.815, 0.680, 0.037),
        "NC4K": (0.847, 0.770, 0.048),
        "CAMO": (0.820, 0.743, 0.070),
    },
}


def official_name(dataset: str, num_images: int) -> str | None:
    """Return which of the field's test sets this is, by its name and number of images, or None.

    A part of a test set is not comparable, so the number must be the official one.
    """
    for name, number in IMAGES.items():
        if name.lower() in dataset.lower() and num_images == number:
            return name
    return None


def published_rows(results: Iterable[EvaluationResult]) -> list[TableEntry]:
    """Return table rows of published methods for the official test sets among the results."""
    rows: list[TableEntry] = []
    seen = set()
    for result in results:
        name = official_name(result.dataset, result.num_images)
        if name is None or name in seen:
            continue
        seen.add(name)
        for method, scores in PUBLISHED.items():
            known = zip(KEYS, scores[name], strict=True)
            values = {key: value for key, value in known if value is not None}
            rows.append(
                {
                    "dataset": result.dataset,
                    "method": f"published: {method}",
                    "num_images": result.num_images,
                    "scores": values,
                }
            )
    return rows
