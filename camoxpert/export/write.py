"""Writing a traced graph as ONNX, OpenVINO or a torch program."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camoxpert import stop
from camoxpert.errors import ConfigError
from camoxpert.export.graph import ExportGraph
from camoxpert.export.target import FORMATS, files_of, report_of
from camoxpert.files import write_json
from camoxpert.inference.runtimes import ABOUT, ABOUT_FILE, ExportAbout, check_library

PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "torch": ("fp32", "bf16"),
}
WHY_NOT = {
    ("onnx", "bf16"): "ONNX Runtime has no bf16 convolutions on a CPU",
    ("torch", "fp16"): "torch has no fast fp16 convolutions on a CPU, so it could not be checked",
    ("torch", "int8"): "torch's quantisation for CPUs is being removed from torch",
}
OPSET = 20
KEPT_IN_FP32 = (
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceMean"),
    *("Softmax", "TopK", "Sqrt", "Pow", "Reciprocal", "Div", "Resize", "Range", "CumSum"),
)
"""ONNX operators that stay in float32 in an fp16 file: norms and what they are made of, because
variances overflow and small ones vanish; the router's choice; and sizes."""
FP32_PARTS = (".router", ".presence", ".guidance", ".cosines")
"""Parts of the network that compute in float32 in training as well."""


def check_format(name: str, precision: str) -> None:
    """Raise ConfigError for a format that has no such precision, or whose library is missing."""
    if precision not in PRECISIONS[name]:
        reason = WHY_NOT[name, precision]
        others = [other for other in FORMATS if precision in PRECISIONS[other]]
        raise ConfigError(
            f"--format {name} --precision {precision}: {reason}. {name} takes "
            f"{', '.join(PRECISIONS[name])}; {precision} is written by --format "
            f"{' or '.join(others)}."
        )
    needed = {
        "onnx": ("onnx", "onnxscript", "onnxruntime"),
        "openvino": ("onnx", "onnxscript", "openvino"),
        "torch": (),
    }[name]
    if precision == "int8" and name == "openvino":
        needed = (*needed, "nncf")
    for library in needed:
        check_library(library)


def trace(graph: ExportGraph, static: Sequence[int] | None) -> torch.export.ExportedProgram:
    """Return the program of a graph.

    Args:
        graph: to trace.
        static: batch, height and width; None: all three stay open.
    """
    # Two images of unlike sides: a size of 1 or two equal ones would be taken for constants.
    inputs = graph.example(*(static or (2, 128, 160)))
    sizes = None if static else graph.free_sizes()
    with torch.no_grad(), quiet():
        return torch.export.export(graph, inputs, dynamic_shapes=sizes, strict=False)


class InBfloat16(ExportGraph):
    """The same graph with convolutions and products in bfloat16, as ``--precision bf16`` runs."""

    def forward(self, images: Tensor, reference: Tensor | None = None) -> tuple[Tensor, ...]:
        """As ``ExportGraph.forward``."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(images, reference)


def write_onnx(
    program: torch.export.ExportedProgram, graph: ExportGraph, path: Path, *, precision: str
) -> dict[str, str]:
    """Write a traced graph as ONNX, in fp32 or fp16.

    Returns:
        Name of each linear layer -> its node; in an fp16 file nodes no longer name their weights.
    """
    import onnx

    with torch.no_grad(), quiet():
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(graph.input_names),
            output_names=list(graph.output_names),
            opset_version=OPSET,
            verbose=False,
        )
    assert written is not None
    model = written.model_proto
    name_sizes(model)
    nodes = linear_nodes(model)
    if precision == "fp16":
        model = half(model)
    onnx.save(model, str(path))
    return nodes


def linear_nodes(model: Any) -> dict[str, str]:
    """Return the node of every linear layer of an ONNX model, by the name of the layer."""
    return {
        node.input[1].removesuffix(".weight"): node.name
        for node in model.graph.node
        if node.op_type == "Gemm" and node.input[1].endswith(".weight")
    }


def half(model: Any) -> Any:
    """Return an ONNX model in fp16 with norms, routers and inputs and outputs in float32."""
    from onnxruntime.transformers.float16 import (
        DEFAULT_OP_BLOCK_LIST,
        convert_float_to_float16,
    )

    kept = [node.name for node in model.graph.node if _in_fp32_part(node)]
    own = {node.name for node in model.graph.node if node.op_type == "Cast"}
    with quiet():
        halved = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *KEPT_IN_FP32],
            node_block_list=kept,
            disable_shape_infer=True,
        )
    _join_kept(halved, own)
    return halved


def _join_kept(model: Any, own: Collection[str]) -> None:
    """Let nodes that stay in float32 hand their results to one another as they are.

    The converter casts each of their outputs to fp16, and back for the next one: a sum of squares
    that is over 65504 is infinite in between.

    Args:
        model: as the converter left it; changed.
        own: names of the casts that the model had before.
    """
    float32, float16 = 1, 10  # onnx.TensorProto.FLOAT and FLOAT16
    graph = model.graph

    def casts(to: int) -> dict[str, Any]:
        """Return the converter's casts by their output."""
        return {
            node.output[0]: node
            for node in graph.node
            if node.op_type == "Cast" and node.name not in own and node.attribute[0].i == to
        }

    down, up = casts(float16), casts(float32)
    exact = {o: down[n.input[0]].input[0] for o, n in up.items() if n.input[0] in down}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in exact:
                node.input[place] = exact[name]
    used = {name for node in graph.node for name in node.input}
    used |= {output.name for output in graph.output}
    # First the casts back, then those that only they read.
    for group in (up, down):
        for output, node in group.items():
            if output not in used:
                graph.node.remove(node)
        used = {name for node in graph.node for name in node.input}
        used |= {output.name for output in graph.output}


def part_of(node: Any) -> str:
    """Return the module of the network that an ONNX node was made by, such as
    ``network.decoder.levels.0``; "" where the exporter does not say."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = [scope.strip(" '\"[]") for scope in entry.value.split(",")]
            modules = [scope for scope in scopes if scope.startswith("network")]
            return modules[-1] if modules else ""
    return ""


def _in_fp32_part(node: Any) -> bool:
    part = part_of(node)
    return any(word in f".{part}" for word in FP32_PARTS)


def name_sizes(model: Any) -> None:
    """Name the open sizes of an ONNX model's inputs and outputs by what they are."""
    names = {0: "batch", 2: "height", 3: "width"}
    for value in (*model.graph.input, *model.graph.output):
        for index, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_param"):
                size.dim_param = names[index]


def write_openvino(onnx_file: Path, path: Path, *, precision: str) -> None:
    """Write an ONNX file as OpenVINO: ``.xml`` and ``.bin``.

    Weights are stored as fp16 in an fp16 or bf16 file, which computes in float32 or bfloat16.
    """
    import openvino as ov

    with quiet():
        model = read_onnx_as_openvino(onnx_file)
        ov.save_model(model, path, compress_to_fp16=precision in ("fp16", "bf16"))


def read_onnx_as_openvino(onnx_file: Path) -> Any:
    """Return an ONNX file as OpenVINO's model, with the folding that its converter does."""
    import openvino as ov

    try:
        # As the converter does it, which reports every conversion to its makers.
        from openvino._offline_transformations import apply_moc_transformations
    except ImportError:
        return ov.convert_model(onnx_file)
    model = ov.Core().read_model(onnx_file)
    apply_moc_transformations(model, cf=False, smart_reshape=True)
    return model


def write_torch(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a traced graph as a torch program, without its example inputs."""
    program._example_inputs = None
    with quiet():
        torch.export.save(program, path, extra_files={ABOUT_FILE: "null"})


def put_about(path: Path, about: ExportAbout) -> None:
    """Write the metadata into an exported file."""
    text = json.dumps(about)
    suffix = path.suffix
    if suffix == ".onnx":
        import onnx

        model = onnx.load(str(path))
        del model.metadata_props[:]
        model.metadata_props.add(key=ABOUT, value=text)
        onnx.save(model, str(path))
    elif suffix == ".xml":
        import openvino as ov

        model = ov.Core().read_model(path)
        model.set_rt_info(text, [ABOUT])
        again = path.with_name(f"again-{path.name}")
        ov.save_model(model, again, compress_to_fp16=False)
        del model  # It maps the file that is replaced.
        again.replace(path)
        again.with_suffix(".bin").replace(path.with_suffix(".bin"))
    else:
        _replace_member(path, ABOUT_FILE, text.encode())


def _replace_member(path: Path, name: str, data: bytes) -> None:
    """Write an archive again with other bytes in the member whose name ends like that."""
    import zipfile

    again = path.with_name(f"again-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            content = data if member.filename.endswith("/" + name) else old.read(member)
            new.writestr(member.filename, content)
    again.replace(path)


def move_into_place(source: Path, target: Path, figures: Mapping[str, Any]) -> None:
    """Move an exported model where it was asked for, weights first.

    Args:
        source: the model.
        target: its new place.
        figures: for the file beside it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renamed on one disk, so that a model is there whole or not at all.
    near = {
        new: new.with_name(f".{new.name}.part") for new in (*files_of(target), report_of(target))
    }
    try:
        for old, new in zip(files_of(source), files_of(target), strict=True):
            shutil.copyfile(old, near[new])
        write_json(near[report_of(target)], figures)
        with stop.current().deferred():
            for new in reversed(near):
                near[new].replace(new)
    finally:
        for part in near.values():
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters print and log about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
