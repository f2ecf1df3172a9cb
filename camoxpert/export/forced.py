"""Make a file use the experts that no image reached, so that their arithmetic is compared.

The last layer of a router is replaced by constants, in a copy of the file and in a copy of the
graph; all else stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from camoxpert.errors import NumericError
from camoxpert.export.graph import ExportGraph, KeptExperts
from camoxpert.inference.runtimes import ABOUT_FILE

HIGHEST = 50.0
"""Logit of the first chosen expert; those of the others are 0."""
STEP = 0.5
"""How much lower the next one's is: unlike gates tell two exchanged experts apart."""


def rounds_of(missing: Sequence[tuple[int, int]], top_k: Sequence[int]) -> list[list[list[int]]]:
    """Return which experts to use in which round, for every level; an empty list: the router's.

    Args:
        missing: (level, number) of the experts to reach.
        top_k: experts per image, of every level.
    """
    left = [[number for level, number in missing if level == own] for own in range(len(top_k))]
    rounds = []
    while any(left):
        rounds.append([numbers[:k] for numbers, k in zip(left, top_k, strict=True)])
        left = [numbers[k:] for numbers, k in zip(left, top_k, strict=True)]
    return rounds


def force(
    graph: ExportGraph, chosen: Sequence[Sequence[int]]
) -> tuple[ExportGraph, dict[str, Any]]:
    """Return a copy of a graph whose routers choose given experts, and what was changed.

    Args:
        graph: as it was exported.
        chosen: numbers of the experts for every level, stride 4 first; fewer than an image uses:
            the first others join; none: the level stays.

    Returns:
        The graph, and the name of each changed layer -> its bias (E,); its weights are 0.
    """
    made = copy.deepcopy(graph)
    names = {id(module): name for name, module in made.named_modules()}
    biases = {}
    for level, numbers in zip(made.network.moe_levels, chosen, strict=True):
        if not numbers:
            continue
        router: Any = level.router
        kept = list(range(len(level.experts)))
        if isinstance(router, KeptExperts):
            kept, router = router.kept_L.tolist(), router.router
        router.fold()
        others = [number for number in range(len(level.experts)) if number not in numbers]
        used = [*numbers, *others][: router.top_k]
        gate: nn.Linear = router.gate
        bias = torch.zeros_like(gate.bias)
        for place, number in enumerate(used):
            bias[kept[number]] = HIGHEST - STEP * place
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.copy_(bias)
        biases[names[id(gate)]] = bias
    return made, biases


def forced_copy(
    file: Path, target: Path, biases: Mapping[str, Tensor], nodes: Mapping[str, str]
) -> None:
    """Write a copy of an exported file with other routers.

    Args:
        file: that was written.
        target: file to write, of the same format.
        biases: see ``force``.
        nodes: layer -> its node in the ONNX graph, by which OpenVINO names it.

    Raises:
        NumericError: the file has no such layer.
    """
    write = {".onnx": _onnx, ".xml": _openvino, ".pt2": _torch}[file.suffix]
    write(file, target, biases, nodes)


def _onnx(file: Path, target: Path, biases: Mapping[str, Tensor], nodes: Mapping[str, str]) -> None:
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(file))
    layers = {node.name: node for node in model.graph.node if node.op_type == "Gemm"}
    for name, bias in biases.items():
        node = layers.get(nodes.get(name, ""))
        if node is None:
            raise _missing(name)
        # alpha scales the product of inputs and weights.
        kept = [attribute for attribute in node.attribute if attribute.name != "alpha"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("alpha", 0.0)])
        model.graph.initializer.append(numpy_helper.from_array(bias.numpy(), f"{name}.forced"))
        inputs = [*node.input[:2], f"{name}.forced"]
        del node.input[:]
        node.input.extend(inputs)
    onnx.save(model, str(target))


def _openvino(
    file: Path, target: Path, biases: Mapping[str, Tensor], nodes: Mapping[str, str]
) -> None:
    import openvino as ov
    from openvino import opset13 as operators

    model = ov.Core().read_model(file)
    layers = {node.get_friendly_name(): node for node in model.get_ops()}
    for name, bias in biases.items():
        # A bias of zeros is folded away: then the product stands alone.
        own = nodes.get(name, "")
        node = layers.get(own) or layers.get(f"{own}/WithoutBiases")
        if node is None or node.get_type_name() not in ("Add", "MatMul"):
            raise _missing(name)
        product = node.output(0)
        if node.get_type_name() == "Add":
            product = node.input(0).get_source_output()
        readers = list(node.output(0).get_target_inputs())
        zero = operators.multiply(product, operators.constant(np.zeros(1, np.float32)))
        forced = operators.add(zero, operators.constant(bias.numpy()[None]))
        for reader in readers:
            reader.replace_source_output(forced.output(0))
    ov.save_model(model, target, compress_to_fp16=False)


def _torch(
    file: Path, target: Path, biases: Mapping[str, Tensor], nodes: Mapping[str, str]
) -> None:
    # Our own file, written a moment ago.
    extra = {ABOUT_FILE: ""}
    program = torch.export.load(file, extra_files=extra)
    for name, bias in biases.items():
        if f"{name}.weight" not in program.state_dict:
            raise _missing(name)
        with torch.no_grad():
            program.state_dict[f"{name}.weight"].zero_()
            program.state_dict[f"{name}.bias"].copy_(bias)
    torch.export.save(program, target, extra_files=extra)


def _missing(name: str) -> NumericError:
    return NumericError(
        f"The exported file has no layer {name}, so that its experts cannot be compared with those "
        "of the checkpoint; no file was written."
    )
