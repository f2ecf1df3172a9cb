"""``benchmark export``: what each format of a model costs and what it does to its measures, on this
machine.

Eager torch is the baseline. Every variant gets the same uint8 images as an array and returns its
map as an array, with the same number of threads; the rounds of all of them are interleaved.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from camoxpert import console, stop
from camoxpert.benchmark.common import (
    Report,
    heading,
    interleaved,
    milliseconds,
    paired_ratio,
    quartiles,
    show_table,
)
from camoxpert.data.files.manifest import USUAL, Search
from camoxpert.errors import ConfigError
from camoxpert.export.gate import Agreement, Parity, judge, varied_images
from camoxpert.export.graph import IMAGES, LOGITS, REFERENCE, ExportGraph, check_exportable
from camoxpert.export.images import Scored, calibration_of, data_of, gate_images
from camoxpert.export.job import ExportOptions, Made, about_of, write_int8
from camoxpert.export.skip import skip_unused
from camoxpert.export.target import files_of
from camoxpert.export.write import (
    InBfloat16,
    check_format,
    put_about,
    trace,
    write_onnx,
    write_openvino,
    write_torch,
)
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.inference.runtimes import ExportAbout, Runtime, is_exported, open_runtime
from camoxpert.models.camoxpert import CamoXpert

EAGER = "eager fp32"
OPENVINO_BF16 = "OpenVINO bf16"
WORTH_INT8 = 1.2
"""How much faster than bf16 an int8 file must be to be recommended."""
BATCHES = (1, 8)


@dataclass
class Variant:
    """One way to run the model.

    Attributes:
        runtime: runs it.
        precision: whose limits it is held to.
        files: what is shipped; empty: the checkpoint.
        details: more for the JSON file.
    """

    runtime: Runtime
    precision: str
    files: Sequence[Path] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


class InTorch:
    """A graph in torch behind the call of a runtime."""

    def __init__(self, graph: Callable[..., Sequence[torch.Tensor]], about: ExportAbout) -> None:
        self.graph, self.about = graph, about
        self.title = f"torch {torch.__version__}"

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        """Return outputs by name."""
        with torch.no_grad():
            found = self.graph(*(torch.from_numpy(array) for array in inputs.values()))
        return [found[self.about["outputs"].index(name)].float().numpy() for name in outputs]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: run folder, checkpoint or shared weights.
        data: data sets that are scored; empty: the run's test sets, or generated images.
        calibration: data sets that calibrate int8; empty: the run's training data.
        rounds: timed calls of each variant.
        compiled: also measure torch.compile.
        search: how pairs are found.
    """

    model: Path
    data: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    rounds: int = 15
    compiled: bool = True
    search: Search = USUAL


def run(subject: Subject) -> Report:
    """Export, measure, print, and return the JSON file's content.

    Raises:
        ConfigError: a model that is exported already or cannot be, or a missing library.
    """
    if is_exported(subject.model):
        raise ConfigError(f"{subject.model} is exported already; give its run or checkpoint.")
    for name in ("onnx", "openvino"):
        check_format(name, "int8")
    predictor = load_predictor(subject.model, device="cpu", precision="fp32")
    network = predictor.network
    assert isinstance(network, CamoXpert)
    check_exportable(network, static=False)
    with tempfile.TemporaryDirectory(prefix="camoxpert-export-") as scratch:
        images = gate_images(predictor, subject.data, subject.search, scratch)
        scored = Scored(predictor, images, data_of(predictor))
        variants, left_out = build_variants(predictor, scored, Path(scratch), subject)
        rows = measure(variants, inputs_of(predictor), scored.agreement, rounds=subject.rounds)
    best = choose(rows)
    show(rows, left_out, best)
    settings = {
        "backbone": network.config.backbone,
        "experts": network.describe_decoder(),
        "img_size": predictor.img_size,
        "threads": torch.get_num_threads(),
        "rounds": subject.rounds,
        "images": images.source,
    }
    return {
        **heading("export", settings),
        "variants": rows,
        "left_out": left_out,
        "recommended": best,
    }


def inputs_of(predictor: Predictor) -> dict[int, dict[str, NDArray[Any]]]:
    """Return the inputs of each batch size: varied images, and no references."""
    side = predictor.img_size
    images = np.ascontiguousarray(varied_images(max(BATCHES), side, side, seed=0).numpy())
    found = {batch: {IMAGES: images[:batch]} for batch in BATCHES}
    guidance = predictor.network.guidance
    if guidance is not None:
        for batch, given in found.items():
            given[REFERENCE] = np.zeros((batch, guidance.features), np.float32)
    return found


def build_variants(
    predictor: Predictor, scored: Scored, folder: Path, subject: Subject
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Return all ways to run a model, and why others are left out.

    Args:
        predictor: of the checkpoint.
        scored: its scores.
        folder: for the files.
        subject: what is measured.
    """
    cpu, network = torch.device("cpu"), predictor.network
    graph = ExportGraph(network)
    calibration = calibration_of(predictor, graph, subject.calibration, subject.search)

    def about(name: str, precision: str) -> ExportAbout:
        return about_of(predictor, graph, ExportOptions(name, precision))

    console.say("writing ONNX, OpenVINO and torch files")
    in_torch = about("torch", "fp32")
    variants = {
        EAGER: Variant(InTorch(ExportGraph.around(network), in_torch), "fp32"),
        "eager bf16": Variant(InTorch(InBfloat16.around(network), in_torch), "bf16"),
    }
    program = trace(graph, None)
    onnx_file = folder / "graph.onnx"
    write_onnx(program, graph, onnx_file, precision="fp32")
    put_about(onnx_file, about("onnx", "fp32"))
    write_torch(program, folder / "model.pt2")
    put_about(folder / "model.pt2", in_torch)

    def add(title: str, file: Path, precision: str, details: Mapping[str, Any]) -> None:
        runtime = open_runtime(file, cpu, precision)
        variants[title] = Variant(runtime, precision, files_of(file), details)

    add("torch program fp32", folder / "model.pt2", "fp32", {})
    branches = folder / "branches.onnx"
    branches.write_bytes(onnx_file.read_bytes())
    skip_unused(branches)
    add("ONNX Runtime fp32", branches, "fp32", {})
    add("ONNX Runtime fp32, all experts", onnx_file, "fp32", {})
    for precision in ("fp32", "bf16"):
        file = folder / f"{precision}.xml"
        write_openvino(branches, file, precision=precision)
        put_about(file, about("openvino", precision))
        add(f"OpenVINO {precision}", file, precision, {})
    for title, name, suffix in (
        ("ONNX Runtime int8", "onnx", ".onnx"),
        ("OpenVINO int8", "openvino", ".xml"),
    ):
        made = Made(graph, folder / f"int8{suffix}", scored, about(name, "int8"))
        write_int8(made, calibration)
        if name == "onnx":
            skip_unused(made.file)
        put_about(made.file, made.about)
        add(title, made.file, "int8", made.about["int8"])
    left_out = {}
    reason = why_not_compiled(graph, inputs_of(predictor), subject)
    if isinstance(reason, str):
        left_out["compiled fp32"] = reason
    else:
        # One image at a time, so that scoring compiles no other batch size.
        fixed: ExportAbout = {**in_torch, "static": [1, predictor.img_size, predictor.img_size]}
        variants["compiled fp32"] = Variant(InTorch(reason, fixed), "fp32")
    return variants, left_out


def why_not_compiled(
    graph: ExportGraph, inputs: Mapping[int, Mapping[str, NDArray[Any]]], subject: Subject
) -> str | Callable[..., Any]:
    """Return the compiled graph, or the reason why there is none."""
    if not subject.compiled:
        return "--no-compile"
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(word and shutil.which(word) for word in wanted):
        return "no C++ compiler was found (g++ or clang++)"
    console.say("compiling for each batch size: minutes")
    call: Callable[..., Any] = torch.compile(graph, dynamic=False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # The compiler's notes to itself.
            warnings.simplefilter("ignore", FutureWarning)
            for given in inputs.values():
                stop.check()
                call(*(torch.from_numpy(array) for array in given.values()))
    except Exception as error:  # whatever the compilers raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return call


def measure(
    variants: Mapping[str, Variant],
    inputs: Mapping[int, Mapping[str, NDArray[Any]]],
    agreement: Callable[[Runtime], Agreement],
    *,
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Return the figures of every variant.

    Args:
        variants: by name, the baseline among them.
        inputs: batch size -> inputs.
        agreement: compares a variant with the checkpoint.
        rounds: timed calls of each variant and batch size.
    """

    def call(runtime: Runtime, given: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        return lambda: runtime.run(given, [LOGITS])

    calls = {
        f"{title}|{batch}": call(variant.runtime, given)
        for title, variant in variants.items()
        for batch, given in inputs.items()
    }
    seconds = interleaved(calls, rounds=rounds, warmup=2, description="formats")
    one = [f"{title}|{min(inputs)}" for title in variants]
    baseline = seconds[one[list(variants).index(EAGER)]]
    rows: dict[str, dict[str, Any]] = {}
    for title, variant in variants.items():
        stop.check()
        found = agreement(variant.runtime)
        broken = judge(variant.precision, Parity(spread=float("inf")), found).broken
        times = {str(batch): seconds[f"{title}|{batch}"] for batch in inputs}
        rows[title] = {
            "runtime": variant.runtime.title,
            "precision": variant.precision,
            "milliseconds": {size: milliseconds(taken) for size, taken in times.items()},
            # Images per second over those of eager torch, one by one.
            "over_eager": {
                size: paired_ratio(baseline, [value / int(size) for value in taken])
                for size, taken in times.items()
            },
            "megabytes": sum(file.stat().st_size for file in variant.files) / 1e6 or None,
            "change": {name: found.change(name) for name in found.scores},
            "iou": found.iou,
            "images": found.images,
            "broken": broken,
            "details": dict(variant.details),
        }
        if OPENVINO_BF16 in variants:
            bf16 = seconds[f"{OPENVINO_BF16}|{min(inputs)}"]
            own = seconds[f"{title}|{min(inputs)}"]
            rows[title]["over_openvino_bf16"] = paired_ratio(bf16, own)
    return rows


def choose(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the format to take: the fastest, one image at a time, that keeps its limits.

    An int8 file must be at least 1.2 times as fast as OpenVINO in bf16, or another is taken.
    """
    one = str(min(BATCHES))
    allowed = {
        title: row["milliseconds"][one]
        for title, row in rows.items()
        if row["megabytes"] and not row["broken"]
    }
    for title in list(allowed):
        ratio = rows[title].get("over_openvino_bf16")
        if "int8" in title and ratio and ratio["ratio"] < WORTH_INT8:
            del allowed[title]
    best = min(allowed, key=lambda title: allowed[title]) if allowed else EAGER
    return {"format": best, "over_eager": rows[best]["over_eager"][one]}


def show(
    rows: Mapping[str, Mapping[str, Any]], left_out: Mapping[str, str], best: Mapping[str, Any]
) -> None:
    """Print one table, what is left out, and what to take."""
    cells = []
    for title, row in rows.items():
        sizes = [str(batch) for batch in BATCHES]
        cells.append(
            [
                title,
                *(f"{row['milliseconds'][size]:.1f}" for size in sizes),
                *(quartiles(row["over_eager"][size]) for size in sizes),
                f"{row['megabytes']:.1f}" if row["megabytes"] else "",
                f"{row['change']['Smeasure']:+.4f}",
                f"{row['change']['MAE']:+.4f}",
                f"{row['iou']:.4f}",
                "refused" if row["broken"] else "passes",
            ]
        )
    head = [
        *("format", "ms, 1 image", "ms, 8", "images/s over eager, 1", "8"),
        *("MB", "S", "MAE", "IoU", "gate"),
    ]
    show_table([head, *cells])
    for title, reason in left_out.items():
        console.say(f"  {title} left out: {reason}")
    for title, row in rows.items():
        in_float = row["details"].get("in_float")
        if in_float:
            console.say(f"  {title}, in float: {', '.join(in_float)}")
    console.say(f"take {best['format']}: {quartiles(best['over_eager'])} times eager, one by one")
