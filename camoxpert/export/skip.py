"""Let an ONNX file leave out the experts that no image of a batch uses.

A graph with open sizes has every expert, times a gate that is 0 where it was not chosen. Each of
these products becomes the branch of an ``If`` on its gates: one image costs the experts that it
uses, as in torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camoxpert.export.write import part_of

LEVEL, EXPERT = ".moe", ".moe.experts"
"""Ends of the names of modules that gate experts; part of the names of those of experts."""
WORK = ("Conv", "ConvInteger", "QLinearConv", "MatMul", "Gemm")
"""Operators that make it worth a branch."""


def skip_unused(path: Path) -> int:
    """Put the experts of an ONNX file into branches; returns how many.

    Args:
        path: the file; it is written again. Its router's operators and all names stay.
    """
    import onnx

    model = onnx.load(str(path))
    found = put_into_branches(model.graph)
    if found:
        onnx.save(model, str(path))
    return found


def put_into_branches(graph: Any) -> int:
    """Do so in an ``onnx.GraphProto``; returns how many experts it found."""
    _sort(graph)
    maker = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input if name)
    readers.update(value.name for value in graph.output)
    branches: dict[str, tuple[str, list[Any]]] = {}
    levels: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type != "Mul" or not part_of(node).endswith(LEVEL):
            continue
        for value, gate in (tuple(node.input), tuple(reversed(node.input))):
            own = _own_nodes(value, maker, readers)
            if any(n.op_type in WORK for n in own) and any(EXPERT in part_of(n) for n in own):
                branches[node.output[0]] = (gate, own)
                levels.setdefault(part_of(node), []).append(node.output[0])
                break
    features = {}
    for outputs in levels.values():
        shared = _shared_input([branches[name][1] for name in outputs], graph)
        for name in outputs:
            if shared is None:
                del branches[name]
            else:
                features[name] = shared
    # Shapes of what is inside are forgotten; the types of the results are known from here.
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    taken = {name for _, own in branches.values() for node in own for name in node.output}
    own_values = {value.name: value for value in graph.value_info}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    moved: set[str] = set()
    for node in graph.node:
        if node.output[0] in branches:
            gate, own = branches[node.output[0]]
            inside = [n for n in graph.node if n.output[0] in {m.output[0] for m in own}]
            used = Counter(name for n in inside for name in n.input)
            local = [n for n in used if n in weights and used[n] == readers[n]]
            moved.update(local)
            local_weights = [weights[name] for name in local]
            outer = (gate, features[node.output[0]])
            nodes += _branch(node, outer, inside, local_weights, types.get(node.output[0], 1))
        elif node.output[0] not in taken:
            nodes.append(node)
    kept = [tensor for tensor in graph.initializer if tensor.name not in moved]
    described = [value for name, value in own_values.items() if name not in taken]
    for field, values in (("node", nodes), ("initializer", kept), ("value_info", described)):
        _replace(graph, field, values)
    return len(branches)


def _replace(graph: Any, field: str, values: Sequence[Any]) -> None:
    """Set a repeated field, also to parts of what it holds now."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    graph.ClearField(field)
    getattr(graph, field).extend(copies)


def _sort(graph: Any) -> None:
    """Put every node behind those that it reads: the conversion to fp16 appends its casts."""
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output}
    order: dict[int, None] = {}
    for start in range(len(graph.node)):
        waiting = [start]
        while waiting:
            needed = {maker[name] for name in graph.node[waiting[-1]].input if name in maker}
            missing = needed - order.keys()
            if missing:
                waiting += sorted(missing, reverse=True)
            else:
                order.setdefault(waiting.pop())
    _replace(graph, "node", [graph.node[place] for place in order])


def _own_nodes(value: str, maker: dict[str, Any], readers: Counter[str]) -> list[Any]:
    """Return the nodes whose results are used for a value and for nothing else."""
    own: dict[int, Any] = {}
    seen: Counter[str] = Counter({value: 1})
    waiting = [value]
    while waiting:
        node = maker.get(waiting.pop())
        if node is None or id(node) in own:
            continue
        if any(seen[name] < readers[name] for name in node.output):
            # Read elsewhere too, or by nodes that have not been reached yet: those come back to it.
            continue
        own[id(node)] = node
        for name in node.input:
            if name:
                seen[name] += 1
                waiting.append(name)
    return list(own.values())


def _shared_input(experts: list[list[Any]], graph: Any) -> str | None:
    """Return the features that all experts of a level read, None where that cannot be told."""
    weights = {tensor.name for tensor in graph.initializer}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}
    common: set[str] | None = None
    for own in experts:
        made = {name for node in own for name in node.output}
        read = {name for node in own for name in node.input if name} - made - weights
        common = read if common is None else common & read
    maps = [name for name in common or () if ranks.get(name, 4) == 4]
    known = [name for name in maps if name in ranks]
    return known[0] if len(known) == 1 else maps[0] if len(maps) == 1 else None


def _branch(
    product: Any, outer: tuple[str, str], inside: list[Any], weights: list[Any], kind: int
) -> list[Any]:
    """Return the nodes that take the place of a product of an expert and its gates.

    Args:
        product: the node.
        outer: names of its gates and of the features that the expert reads.
        inside: nodes of the expert.
        weights: that it alone uses.
        kind: ONNX's number of the type of its values; 1: float32.
    """
    from onnx import TensorProto, helper

    (gate, features), name = outer, product.output[0]
    highest, used = f"{name}.highest_gate", f"{name}.used"
    product_inside = type(product).FromString(product.SerializeToString())
    product_inside.output[0] = f"{name}.inside"
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    nothing = [
        helper.make_node("Shape", [features], [f"{name}.shape"]),
        helper.make_node("ConstantOfShape", [f"{name}.shape"], [f"{name}.zeros"], value=zero),
        helper.make_node("CastLike", [f"{name}.zeros", gate], [f"{name}.nothing"]),
    ]
    then = helper.make_graph(
        [*inside, product_inside],
        f"{name}.then",
        [],
        [helper.make_tensor_value_info(f"{name}.inside", kind, None)],
        initializer=weights,
    )
    otherwise = helper.make_graph(
        nothing, f"{name}.else", [], [helper.make_tensor_value_info(f"{name}.nothing", kind, None)]
    )
    chosen = helper.make_node(
        "If", [used], [name], name=product.name, then_branch=then, else_branch=otherwise
    )
    chosen.metadata_props.extend(product.metadata_props)
    return [
        helper.make_node("ReduceMax", [gate], [highest], f"{name}.reduce", keepdims=0),
        helper.make_node("Cast", [highest], [used], f"{name}.cast", to=TensorProto.BOOL),
        chosen,
    ]
