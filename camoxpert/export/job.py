"""Exporting a checkpoint: trace, write, compare, and only then put the file where it was asked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from camoxpert import __version__, console
from camoxpert.data.files.manifest import Search
from camoxpert.errors import ConfigError
from camoxpert.export.forced import force, forced_copy
from camoxpert.export.gate import (
    LEAST_IMAGES,
    Force,
    Gate,
    Parity,
    compare,
    describe,
    judge,
    shapes_for,
)
from camoxpert.export.graph import STRIDE, ExportGraph, check_exportable
from camoxpert.export.images import (
    Calibration,
    Scored,
    calibration_of,
    data_of,
    fill_up,
    real_sets,
)
from camoxpert.export.quantize import Quantizer
from camoxpert.export.sensitivity import quantise
from camoxpert.export.skip import skip_unused
from camoxpert.export.target import (
    FORMATS,
    check_replaceable,
    digests_of,
    files_of,
    format_of,
    report_of,
)
from camoxpert.export.usage import Usage, count_usage
from camoxpert.export.write import (
    InBfloat16,
    check_format,
    move_into_place,
    put_about,
    trace,
    write_onnx,
    write_openvino,
    write_torch,
)
from camoxpert.files import file_digest
from camoxpert.inference.aligned import say_photographs_alone
from camoxpert.inference.exported import memory_of
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.runtimes import (
    LAYOUT,
    ExportAbout,
    PresenceImages,
    Runtime,
    is_exported,
    open_runtime,
)
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.runs.share import shared_settings
from camoxpert.text import count


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Attributes:
        format: onnx, openvino or torch.
        precision: fp32, fp16, bf16 or int8, as the format takes it.
        static: batch, height and width that are fixed; None: all stay open.
        prune: leave experts out that no image of ``data`` uses.
        data: data sets of the gate, and of ``prune``; empty: the test sets of the run, or generated
            images.
        calibration: data sets whose training images calibrate int8; empty: those of the run.
    """

    format: str = "onnx"
    precision: str = "fp32"
    static: tuple[int, int, int] | None = None
    prune: bool = False
    data: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()


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
    format_of(target, options.format)
    check_replaceable(target)
    check_format(options.format, options.precision)
    if is_exported(model):
        raise ConfigError(f"{model} is exported already; give its run folder or checkpoint.")
    predictor = load_predictor(model, device="cpu", precision="fp32")
    network = predictor.network
    assert isinstance(network, CamoXpert)
    check_exportable(network, static=options.static is not None)
    say_photographs_alone(predictor.modalities, "the exported file")
    search = search or Search("auto", "exclude")
    with tempfile.TemporaryDirectory(prefix="camoxpert-export-") as scratch:
        real = real_sets(predictor, options.data, search)
        if options.prune:
            require_real(sum(map(len, real)))
        calibration = None
        if options.precision == "int8":
            # Before the work: the images may not be there.
            whole = ExportGraph(network)
            calibration = calibration_of(predictor, whole, options.calibration, search)
        images = fill_up(real, predictor.img_size, scratch)
        usage = None
        if options.prune:
            usage = count_usage(network, images.sets, data_of(predictor))
            _decide_usage(usage)
        graph = ExportGraph(network, None if usage is None else usage.kept)
        about = about_of(predictor, graph, options, usage)
        file = Path(scratch) / f"model{FORMATS[options.format]}"
        console.decide("export", f"{options.format}, {options.precision}, {_sizes(options)}")
        made = Made(graph, file, Scored(predictor, images, data_of(predictor)), about)
        write_graph(made, options)
        if calibration is not None:
            write_int8(made, calibration)
            if options.format == "onnx":
                skip(made, file, options)
        put_about(file, about)
        gate = run_gate(predictor, made, options)
        console.decide("gate", describe(gate))
        gate.require()
        figures = {**gate.fields(), "usage": None if usage is None else asdict(usage)}
        put_about(file, {**about, "gate": figures})
        report = {**about, "gate": figures, "files": digests_of(file, target)}
        move_into_place(file, target, report)
    return Exported(target, gate)


@dataclass(frozen=True)
class Made:
    """A file that is being made.

    Attributes:
        graph: what is exported.
        file: in the scratch folder.
        scored: the checkpoint's scores.
        about: its metadata.
        nodes: its linear layers, as ``write_onnx`` returns them.
    """

    graph: ExportGraph
    file: Path
    scored: Scored
    about: ExportAbout
    nodes: dict[str, str] = field(default_factory=dict)

    @property
    def onnx_file(self) -> Path:
        """The graph as ONNX in fp32, or fp16; not there for a torch program."""
        return self.file.with_name("graph.onnx")


def require_real(number: int) -> None:
    """Raise ConfigError for too few images of data sets to say which experts are never used."""
    if number < LEAST_IMAGES:
        raise ConfigError(
            f"--prune-experts leaves out what no image uses, and {LEAST_IMAGES} images of "
            f"data sets have to say so; {number} can be had. "
            "Generated ones do not count: experts that only photographs use would be removed. Name "
            "data sets like the images that the model is for: --data DIR."
        )


def write_graph(made: Made, options: ExportOptions) -> None:
    """Trace a graph and write it; int8 files are made of what this leaves behind."""
    traced = made.graph
    if options.format == "torch" and options.precision == "bf16":
        traced = InBfloat16.around(made.graph.network)
    program = trace(traced, options.static)
    if options.format == "torch":
        write_torch(program, made.file)
        return
    half = options.format == "onnx" and options.precision == "fp16"
    precision = "fp16" if half else "fp32"
    made.nodes.update(write_onnx(program, made.graph, made.onnx_file, precision=precision))
    if options.precision == "int8":
        return
    skip(made, made.onnx_file, options)
    if options.format == "openvino":
        write_openvino(made.onnx_file, made.file, precision=options.precision)
    else:
        made.file.write_bytes(made.onnx_file.read_bytes())


def skip(made: Made, onnx_file: Path, options: ExportOptions) -> None:
    """Let a file leave out the experts that no image of a batch uses, unless its size is fixed.

    Compilers for one size (TensorRT, ExecuTorch) want a graph without branches.
    """
    if options.static is None:
        made.about["experts_in_branches"] = skip_unused(onnx_file)


def write_int8(made: Made, calibration: Calibration) -> None:
    """Quantise a graph, with the parts in float that the limits of the gate ask for.

    Args:
        made: with the graph as ONNX in fp32; its metadata learns what was done.
        calibration: images that set the ranges.
    """
    cpu = torch.device("cpu")
    console.decide(
        "int8", f"calibrated on {count(len(calibration.inputs), 'image')} of {calibration.source}"
    )
    # An ONNX file can only be opened with its metadata.
    put_about(made.onnx_file, made.about)
    quantizer = Quantizer(
        made.onnx_file, made.file.suffix, made.about, calibration, made.file.parent
    )
    # Its scores alone: shapes are compared when the file is done.
    same = Parity(spread=float("inf"))

    def broken(file: Path) -> list[str]:
        return judge("int8", same, made.scored.agreement(open_runtime(file, cpu))).broken

    result = quantise(
        quantizer,
        made.file,
        broken=broken,
        open_file=lambda file: open_runtime(file, cpu),
        reference=open_runtime(made.onnx_file, cpu),
    )
    made.about["int8"] = {**result.fields(), "calibration": calibration.fields()}


def run_gate(predictor: Predictor, made: Made, options: ExportOptions) -> Gate:
    """Compare an exported file with the predictor's network.

    Args:
        predictor: of the checkpoint.
        made: the file.
        options: of the export.
    """
    runtime = open_runtime(made.file, torch.device("cpu"), options.precision)
    reference: Callable[..., Sequence[torch.Tensor]] = ExportGraph(predictor.network)
    if options.prune:
        # Where an expert is gone the whole network answers otherwise: the images judge that.
        reference = made.graph
    least = least_side(options.format, options.precision)
    shapes = shapes_for(predictor.img_size, options.static, least)
    parity = compare(reference, made.graph, runtime, shapes, _forcing(made, options))
    if parity.not_reached:
        console.warn(
            f"{count(len(parity.not_reached), 'expert')} ({parity.not_reached[0]}, ...) could not "
            "be compared. --prune-experts leaves out what is never used."
        )
    return judge(options.precision, parity, made.scored.agreement(runtime))


def _forcing(made: Made, options: ExportOptions) -> Force:
    copy = made.file.with_name(f"forced{made.file.suffix}")

    def forced(chosen: Sequence[Sequence[int]]) -> tuple[ExportGraph, Runtime]:
        graph, biases = force(made.graph, chosen)
        forced_copy(made.file, copy, biases, made.nodes)
        return graph, open_runtime(copy, torch.device("cpu"), options.precision)

    return forced


def about_of(
    predictor: Predictor,
    graph: ExportGraph,
    options: ExportOptions,
    usage: Usage | None = None,
) -> ExportAbout:
    """Return the metadata of the file."""
    checkpoint, network = predictor.checkpoint, graph.network
    state = checkpoint.values.get("state", {})
    presence: PresenceImages | None = None
    if network.presence is not None:
        presence = {"images": int(network.presence.calibration.images)}
    return {
        "layout": LAYOUT,
        "camoxpert": __version__,
        "format": options.format,
        "precision": options.precision,
        "static": None if options.static is None else list(options.static),
        "sides_are_multiples_of": STRIDE,
        "least_side": least_side(options.format, options.precision),
        "img_size": predictor.img_size,
        "threshold": 0.5,
        "inputs": list(graph.input_names),
        "outputs": list(graph.output_names),
        "presence": presence,
        "guidance": None if network.guidance is None else memory_of(network.guidance),
        "kept_experts": None if usage is None else [list(row) for row in usage.kept],
        "config": shared_settings(checkpoint.config),
        "scores": checkpoint.values.get("scores", {}),
        "state": {
            "step": state.get("step"),
            "epoch": state.get("epoch"),
            "images": state.get("images"),
        },
        "checkpoint_sha256": file_digest(checkpoint.path),
    }


def least_side(name: str, precision: str) -> int:
    """Return the shortest side that a file may be given.

    OpenVINO 2026.4 in bf16 returns NaN where a map is one pixel wide: of two models, 20 and 21 of
    35 shapes 32 px wide gave it, none of 105 wider ones.
    """
    return 2 * STRIDE if (name, precision) == ("openvino", "bf16") else STRIDE


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
        least = least_side(options.format, options.precision)
        return f"any batch, sides any multiple of {STRIDE}" + (
            f" from {least} px on" if least > STRIDE else ""
        )
    batch, height, width = options.static
    return f"fixed: {count(batch, 'image')} of {width} x {height} px"


def written_files(exported: Exported) -> list[Path]:
    """Return the files of an export, the gate's figures last."""
    return [*files_of(exported.path), report_of(exported.path)]
