"""Exporting a checkpoint: trace, write, compare, and only then put the file where it was asked."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from camoxpert import __version__, console
from camoxpert.config import DataConfig
from camoxpert.data.files.image_io import write_jpeg, write_png
from camoxpert.data.files.manifest import Manifest, Search, find_test_sets, load_eval
from camoxpert.errors import ConfigError, DataError
from camoxpert.export.gate import (
    LEAST_IMAGES,
    Gate,
    Maps,
    agreement_of,
    compare,
    describe,
    judge,
    shapes_for,
)
from camoxpert.export.graph import STRIDE, ExportGraph, check_exportable
from camoxpert.export.usage import Usage, count_usage
from camoxpert.export.write import (
    FORMATS,
    InBfloat16,
    check_format,
    files_of,
    move_into_place,
    put_about,
    trace,
    write_onnx,
    write_openvino,
    write_torch,
)
from camoxpert.files import file_digest, write_json
from camoxpert.inference.aligned import say_photographs_alone
from camoxpert.inference.exported import LAYOUT, ExportedNetwork, memory_of
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.runtimes import is_exported, open_runtime
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.runs.share import shared_settings
from camoxpert.synthesis.toy import toy_pair
from camoxpert.text import count

MOST_IMAGES = 200
"""Images that the gate scores at most."""


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Attributes:
        format: onnx, openvino or torch.
        precision: fp32, fp16 or bf16, as the format takes it.
        static: batch, height and width that are fixed; None: all stay open.
        prune: leave experts out that no image of ``data`` uses.
        data: data sets of the gate, and of ``prune``; empty: the test sets of the run, or generated
            images.
    """

    format: str = "onnx"
    precision: str = "fp32"
    static: tuple[int, int, int] | None = None
    prune: bool = False
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """What was written: the file, and what the gate found."""

    path: Path
    gate: Gate


def export_model(
    model: Path, target: Path, options: ExportOptions, search: Search | None = None
) -> Exported:
    """Export a checkpoint and prove that the file is the same model.

    Args:
        model: run folder, checkpoint or folder of shared weights.
        target: file to write; beside it ``FILE.json`` gets the figures of the gate.
        options: what to write.
        search: how the data sets' pairs are found.

    Raises:
        ConfigError: a network or a precision that the format cannot hold, or a missing library.
        NumericError: the file is not the same model within the limits of the gate.
        CheckpointError, DataError: the model or the data cannot be read.
    """
    check_target(target, options.format)
    check_format(options.format, options.precision)
    if is_exported(model):
        raise ConfigError(f"{model} is exported already; give its run folder or checkpoint.")
    predictor = load_predictor(model, device="cpu", precision="fp32")
    network = predictor.network
    assert isinstance(network, CamoXpert)
    check_exportable(network, static=options.static is not None)
    say_photographs_alone(predictor.modalities, "the exported file")
    with tempfile.TemporaryDirectory(prefix="camoxpert-export-") as scratch:
        images = _gate_images(predictor, options, search or Search("auto", "exclude"), scratch)
        data = DataConfig(img_size=predictor.img_size, max_pixels=predictor.max_pixels)
        usage = count_usage(network, images.sets, data) if options.prune else None
        if usage is not None:
            _decide_usage(usage)
        graph = ExportGraph(network, None if usage is None else usage.kept)
        about = _about(predictor, graph, options, usage)
        file = Path(scratch) / f"model{FORMATS[options.format]}"
        console.decide("export", f"{options.format}, {options.precision}, {_sizes(options)}")
        _write(graph, file, options)
        put_about(file, about)
        gate = run_gate(predictor, graph, file, options, images, data)
        console.decide("gate", describe(gate))
        if gate.parity.not_reached:
            console.warn(
                f"no image was found that uses {count(len(gate.parity.not_reached), 'expert')} "
                f"({gate.parity.not_reached[0]}, ...): not compared. --prune-experts leaves out "
                "what is never used."
            )
        gate.require()
        figures = {**gate.fields(), "usage": None if usage is None else asdict(usage)}
        put_about(file, {**about, "gate": figures})
        move_into_place(file, target)
    write_json(target.with_name(f"{target.name}.json"), {**about, "gate": figures})
    return Exported(target, gate)


def check_target(target: Path, name: str) -> None:
    """Raise ConfigError for a file whose name does not say its format."""
    suffix = FORMATS[name]
    if target.suffix.lower() != suffix:
        raise ConfigError(f"-o {target}: a file of --format {name} ends in {suffix}.")


@dataclass(frozen=True)
class GateImages:
    """The images of the gate and where they come from."""

    sets: tuple[Manifest, ...]
    source: str


def run_gate(
    predictor: Predictor,
    graph: ExportGraph,
    file: Path,
    options: ExportOptions,
    images: GateImages,
    data: DataConfig,
) -> Gate:
    """Compare an exported file with the predictor's network.

    Args:
        predictor: of the checkpoint.
        graph: that was exported.
        file: that was written.
        options: of the export.
        images: to score.
        data: how they are read.
    """
    device = torch.device("cpu")
    runtime = open_runtime(file, device, options.precision)
    reference: Callable[..., Sequence[torch.Tensor]] = ExportGraph(predictor.network)
    if options.prune:
        # Where an expert is gone the whole network answers otherwise: the images judge that.
        reference = graph
    shapes = shapes_for(predictor.img_size, options.static)
    parity = compare(reference, graph, runtime, shapes)
    before, after = Maps(), Maps()
    exported = ExportedNetwork(runtime, device)
    for manifest in images.sets:
        before.add(predictor.model, manifest, data, device)
        after.add(exported, manifest, data, device)
    return judge(options.precision, parity, agreement_of(before, after, images.source))


def _write(graph: ExportGraph, file: Path, options: ExportOptions) -> None:
    traced = graph
    if options.format == "torch" and options.precision == "bf16":
        traced = InBfloat16.of(graph)
    program = trace(traced, options.static)
    if options.format == "torch":
        write_torch(program, file)
        return
    onnx_file = file.with_suffix(".onnx")
    precision = options.precision if options.format == "onnx" else "fp32"
    write_onnx(program, graph, onnx_file, precision=precision)
    if options.format == "openvino":
        write_openvino(onnx_file, file, precision=options.precision)


def _about(
    predictor: Predictor, graph: ExportGraph, options: ExportOptions, usage: Usage | None
) -> dict[str, Any]:
    """Return the metadata of the file."""
    checkpoint, network = predictor.checkpoint, graph.network
    state = checkpoint.values.get("state", {})
    presence = None
    if network.presence is not None:
        presence = {"images": int(network.presence.calibration.images)}
    return {
        "layout": LAYOUT,
        "camoxpert": __version__,
        "format": options.format,
        "precision": options.precision,
        "static": None if options.static is None else list(options.static),
        "sides_are_multiples_of": STRIDE,
        "img_size": predictor.img_size,
        "threshold": 0.5,
        "inputs": list(graph.input_names),
        "outputs": list(graph.output_names),
        "presence": presence,
        "guidance": None if network.guidance is None else memory_of(network.guidance),
        "kept_experts": None if usage is None else [list(row) for row in usage.kept],
        "config": shared_settings(checkpoint.config),
        "scores": checkpoint.values.get("scores", {}),
        "state": {name: state.get(name) for name in ("step", "epoch", "images")},
        "checkpoint_sha256": file_digest(checkpoint.path),
    }


def _gate_images(
    predictor: Predictor, options: ExportOptions, search: Search, scratch: str
) -> GateImages:
    """Return the images to compare: of the data, filled up with generated ones."""
    sets: list[Manifest] = []
    if options.data:
        sets = list(load_eval(options.data, search).values())
    else:
        with contextlib.suppress(DataError):
            own = replace(search, layout=predictor.config.data.layout)
            sets = list(find_test_sets(predictor.config.data.roots, own).values())
    left = MOST_IMAGES
    chosen = []
    for manifest in sets:
        taken = manifest.pairs[: max(left, 0)]
        left -= len(taken)
        if taken:
            chosen.append(replace(manifest, pairs=taken))
    source = ", ".join(manifest.dataset for manifest in chosen)
    missing = LEAST_IMAGES - (MOST_IMAGES - left)
    if missing > 0:
        made = Path(scratch) / "made"
        generate_images(made, missing, side=max(64, min(predictor.img_size, 256)))
        chosen += find_test_sets([str(made)]).values()
        source = f"{source} and {missing} generated" if source else "generated"
    return GateImages(tuple(chosen), source)


def generate_images(root: Path, number: int, *, side: int) -> None:
    """Write generated camouflage as the test set ``generated``, in scenes of no other set."""
    folder = root / "TestDataset" / "generated"
    for index in range(number):
        image, mask = toy_pair(2**20, index, size=side, difficulty=0.3)
        write_jpeg(folder / "Imgs" / f"generated_{index:03d}.jpg", image, quality=95)
        write_png(folder / "GT" / f"generated_{index:03d}.png", mask)


def _decide_usage(usage: Usage) -> None:
    total = sum(map(len, usage.counts))
    console.decide(
        "experts",
        f"{usage.removed} of {total} left out: none of {usage.images} images uses them"
        if usage.removed
        else f"all {total} are used by some of {usage.images} images: none is left out",
    )


def _sizes(options: ExportOptions) -> str:
    if options.static is None:
        return f"any batch, sides any multiple of {STRIDE}"
    batch, height, width = options.static
    return f"fixed: {count(batch, 'image')} of {width} x {height} px"


def written_files(exported: Exported) -> Iterator[Path]:
    """Yield the files of an export, the gate's figures last."""
    report = exported.path.with_name(f"{exported.path.name}.json")
    return itertools.chain(files_of(exported.path), [report])
