"""The model card of shared weights: what the model is, how well it scores, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from camoxpert.config import QuickConfig, quick_words
from camoxpert.config.data import RGB
from camoxpert.runs.checkpoint import FORMAT, SHARED
from camoxpert.runs.hub import LIBRARY, PREFIX
from camoxpert.runs.origin import About

TAGS = ("camouflaged-object-detection", "image-segmentation", "mixture-of-experts")
FIRST = ("Smeasure", "wFmeasure", "meanEm", "maxFm", "MAE", "IoU")
"""Measures of the card's table, in this order; a folder of results has all of them."""


def card(about: About, repo: str = "") -> str:
    """Return the README of shared weights, with the front matter that the Hub reads.

    Args:
        about: see ``share.about_of``.
        repo: ``USER/NAME`` for the commands; "": a placeholder.
    """
    import yaml

    model = about["config"]["model"]
    title = f"CamoXpert: {_plain(model['backbone'])}, {_mixture(model)}"
    front = yaml.safe_dump(_front_matter(about, title), sort_keys=False, allow_unicode=False)
    name = f"{PREFIX}{repo or 'USER/NAME'}"
    quick = quick_words(QuickConfig(**about["config"]["train"].get("quick", {})))
    warned = [f"**Quick run, not a whole one:** {'; '.join(quick.values())}."] if quick else []
    parts = [
        f"---\n{front}---",
        f"# {title}",
        *warned,
        *_sensors(about["config"]["data"]),
        "Finds camouflaged objects: one image in, one probability map out"
        + (", with the probability that anything is hidden." if about["calibration"] else "."),
        f"```\npip install 'camoxpert[hub]'\ncamoxpert predict {name} photos/ -o out/\n"
        f"camoxpert evaluate {name} --data DATASET\n```",
        f'```python\nimport camoxpert\n\nmodel = camoxpert.load("{name}")\n'
        'prediction = model.predict("photo.jpg")\n```',
        "A folder with these files takes the place of the name.",
        "## Measures",
        *_measures(about),
        "## Training",
        _training(about),
        "## Weights it started from, and licence",
        _licences(about),
        "## Presence and calibration",
        _calibration(about["calibration"]),
        "## Limits",
        "Intervals are over images alone: they say nothing of other seeds or of photographs of "
        "another kind. Probabilities of pixels are not calibrated. An image without a hidden "
        "object may get a mask, unless a presence head says otherwise.",
        "## Files",
        f"`{SHARED}`: weights and settings, no code (checkpoint format {FORMAT}). `config.json`: "
        "the settings and figures alone, for readers.",
    ]
    return "\n\n".join(parts) + "\n"


def _sensors(data: Mapping[str, Any]) -> list[str]:
    """Return a sentence about the modalities beside the photograph, if there are any."""
    names = [_plain(name) for name in data.get("modalities", ()) if name != RGB]
    if not names:
        return []
    return [
        f"Beside photographs it takes {', '.join(names)}, any of which may be missing: `predict "
        f"--modality {names[0]} FOLDER`."
    ]


def _front_matter(about: About, title: str) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": LIBRARY,
        "pipeline_tag": "image-segmentation",
        "tags": list(TAGS),
    }
    if about["license"]:
        front["license"] = _plain(about["license"])
    origin: Mapping[str, object] = about["backbone_weights"] or {}
    if origin.get("hub"):
        front["base_model"] = str(origin["hub"])
    results = [
        {
            "task": {"type": "image-segmentation"},
            "dataset": {"name": _plain(row.get("dataset")), "type": _plain(row.get("dataset"))},
            "metrics": [
                {"type": _plain(key), "name": _plain(key), "value": round(value, 4)}
                for key, value in _shown(row.get("scores"))
            ],
        }
        for row in about["results"] or ()
    ]
    if results:
        front["model-index"] = [{"name": title, "results": results}]
    return front


def _measures(about: About) -> list[str]:
    """Return the tables of the test sets and of validation."""
    parts = []
    for row in about["results"] or ():
        ends = row.get("intervals") or {}
        lines = "".join(
            f"| {_plain(key)} | {value:.3f} | {_between(ends.get(key))} |\n"
            for key, value in _shown(row.get("scores"))
        )
        head = f"**{_plain(row.get('dataset'))}**, {_number(row.get('num_images'))} test images"
        how = f"protocol {_plain(row.get('protocol'))}, {_number(row.get('img_size'))} px"
        parts.append(f"{head} ({how}):")
        parts.append(f"| measure | value | 95 % interval |\n| --- | --- | --- |\n{lines}".rstrip())
        presence = _shown(row.get("presence") or {}, ())
        if presence:
            told = ", ".join(f"{_plain(key)} {value:.3f}" for key, value in presence)
            parts.append(f"Images with an object told from those without: {told}.")
    if not parts:
        parts.append("No test set was scored with these weights before they were shared.")
    rows = "".join(f"| {_plain(key)} | {value:.3f} |\n" for key, value in _shown(about["scores"]))
    if rows:
        parts.append("Validation, which chose these weights out of those of its run:")
        parts.append(f"| measure | validation |\n| --- | --- |\n{rows}".rstrip())
    return parts


def _training(about: About) -> str:
    data, facts, state = about["config"]["data"], about["training"] or {}, about["state"]
    said = [f"Images of {_number(data['img_size'])} px"]
    images = facts.get("images")
    if isinstance(images, Mapping) and images.get("training"):
        said.append(f"{_number(images['training'])} training images")
    if state.get("step"):
        said.append(f"{_number(state['step'])} optimizer steps")
    if facts.get("parameters"):
        said.append(f"{_number(facts['parameters'] / 1e6, '.2f')} M parameters")
    if facts.get("gmacs"):
        said.append(f"{_number(facts['gmacs'], '.3g')} GMACs an image")
    versions = facts.get("versions")
    if isinstance(versions, Mapping):
        said.append(", ".join(f"{_plain(k)} {_plain(v)}" for k, v in versions.items()))
    digest = about["data_hash"]
    data_hash = f"`{_plain(digest)}`" if digest else "not recorded"
    return f"{'; '.join(said)}. Hash of the training data (images and masks): {data_hash}."


def _licences(about: About) -> str:
    origin: Mapping[str, object] = about["backbone_weights"] or {}
    licence = _plain(origin.get("license") or "unknown")
    known = "" if licence == "unknown" else f", licence {licence} as timm records it"
    told = {
        "timm": f"The backbone started from timm's weights {_plain(origin.get('name', ''))}"
        f"{known or ', whose licence timm does not record: it is unknown'}.",
        "none": "The backbone started from random weights: no weights of others are in it.",
        "file": "The backbone started from a file of weights whose licence is unknown here.",
        "model": "The training started from another model; its licence, and that of the weights "
        "it started from itself, are unknown here.",
    }
    first = told.get(
        str(origin.get("source")),
        "What the backbone started from was not recorded: its licence is unknown.",
    )
    own = about["license"]
    second = (
        f"These weights are shared under {_plain(own)}."
        if own
        else "Whoever shared these weights named no licence for them."
    )
    return f"{first} {second} The licence of the training data is not recorded."


def _calibration(calibration: Mapping[str, float] | None) -> str:
    if calibration is None:
        return "The model has no presence head: it does not say whether anything is hidden at all."
    images = int(calibration["images"])
    if not images:
        return "The model has a presence head. Its probabilities are not calibrated."
    return (
        f"The presence head was calibrated on {images} images that neither trained nor chose "
        f"anything: sigmoid(logit / {calibration['temperature']:.3f} + {calibration['bias']:.3f})."
    )


def _mixture(model: Mapping[str, Any]) -> str:
    if model.get("decoder", "moe") != "moe":
        return f"{_plain(model['decoder'])} decoder"
    return f"{_number(model['num_experts'])} experts, top {_number(model['top_k'])}"


def _shown(scores: Any, order: Sequence[str] = FIRST) -> list[tuple[str, float]]:
    """Return measures with their values: those of ``order`` alone, or all where none of them is."""
    if not isinstance(scores, Mapping):
        return []
    numbers = {k: float(v) for k, v in scores.items() if isinstance(v, (int, float))}
    chosen = [key for key in order if key in numbers] or list(numbers)
    return [(key, numbers[key]) for key in chosen]


def _between(ends: Any) -> str:
    if not isinstance(ends, Sequence) or len(ends) != 2:
        return "not computed"
    return " to ".join(_number(end, ".3f") for end in ends)


def _number(value: Any, form: str = "") -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"


def _plain(text: Any) -> str:
    """Return text without characters that Markdown or HTML interpret."""
    return "".join(c if c.isalnum() or c in " _-." else " " for c in str(text))
