"""The gate refuses graphs that are nearly right, and sees every expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers.drawn import SIDE, drawn_network
from torch import Tensor

from camoxpert.benchmark.export import InTorch
from camoxpert.errors import ConfigError, NumericError
from camoxpert.export.forced import force, rounds_of
from camoxpert.export.gate import Agreement, Parity, compare, judge, shapes_for
from camoxpert.export.graph import ExportGraph
from camoxpert.inference.exported import ExportedNetwork
from camoxpert.models import experts
from camoxpert.models.zoom import Zoomed

SAME = Agreement(50, "generated", {"Smeasure": (0.8, 0.8), "MAE": (0.05, 0.05)}, 1.0, 1.0, "a")
SHAPES = shapes_for(SIDE, None)
Call = Callable[..., Sequence[Tensor]]


@pytest.fixture(scope="module")
def graph() -> ExportGraph:
    kinds = "model.experts=[semantic,texture]"
    return ExportGraph(
        drawn_network("model.backbone=tiny_test", "model.num_experts=2", "model.top_k=2", kinds)
    )


def run_by(call: Call, graph: ExportGraph) -> InTorch:
    return InTorch(call, {"outputs": list(graph.output_names)})


def verdict(graph: ExportGraph, call: Call, shapes: Any = SHAPES) -> list[str]:
    parity = compare(graph, graph, run_by(call, graph), shapes)
    return judge("fp32", parity, SAME).broken


def test_the_same_graph_passes(graph: ExportGraph) -> None:
    assert len(SHAPES) >= 6 and {batch for batch, *_ in SHAPES} == {1, 5}
    assert any(height != width for _, height, width in SHAPES)
    assert verdict(graph, ExportGraph(graph.network)) == []


def test_a_wrong_mean_fails(graph: ExportGraph) -> None:
    wrong = ExportGraph(graph.network)
    wrong.network.mean += 0.05
    assert "a probability differs" in verdict(graph, wrong)[0]


def test_swapped_channels_fail(graph: ExportGraph) -> None:
    assert "a probability differs" in verdict(graph, lambda images: graph(images.flip(1)))[0]


def test_a_missing_sigmoid_fails(graph: ExportGraph) -> None:
    def bare(images: Tensor) -> Sequence[Tensor]:
        _probability, logits = graph(images)
        return logits, logits

    assert "a probability differs" in verdict(graph, bare)[0]


def test_pooling_of_one_size_fails(graph: ExportGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    # As adaptive_avg_pool2d is exported: its cells are those of the map it was traced with.
    def traced(images: Tensor) -> Sequence[Tensor]:
        height, width = images.shape[-2:]

        def cells(x: Tensor, grid: int) -> Tensor:
            rows, columns = x.shape[-2] * SIDE // height, x.shape[-1] * SIDE // width
            return F.adaptive_avg_pool2d(x[..., :rows, :columns], grid)

        with monkeypatch.context() as patch:
            patch.setattr(experts, "cell_means", cells)
            return graph(images)

    assert verdict(graph, traced, [(1, SIDE, SIDE)]) == []
    assert "a probability differs" in verdict(graph, traced)[0]
    assert "a probability differs" in verdict(graph, traced, [(1, 2 * SIDE, 2 * SIDE)])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_what_is_not_finite_is_refused_in_every_precision(
    graph: ExportGraph, precision: str, value: float
) -> None:
    def narrow(images: Tensor) -> Sequence[Tensor]:
        probability, logits = graph(images)
        return probability, logits * (value if images.shape[-1] == 32 else 1)

    found = compare(graph, graph, run_by(narrow, graph), SHAPES)
    assert found.not_finite and {shape[2] for shape in found.not_finite} == {32}
    named = " x ".join(map(str, (found.not_finite[0][0], 3, *found.not_finite[0][1:])))
    assert f"NaN or infinity for {named}" in judge(precision, found, SAME).broken[0]
    wide = compare(graph, graph, run_by(narrow, graph), shapes_for(SIDE, None, least=64))
    assert wide.not_finite == [] and judge(precision, wide, SAME).broken == []


def test_a_file_is_never_given_less_than_its_shortest_side() -> None:
    class Sizes:
        title, about = "", {"outputs": ["probability", "logits"], "config": {}, "least_side": 64}
        seen: ClassVar[list[tuple[int, ...]]] = []

        def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
            self.seen.append(inputs["images"].shape)
            return [inputs["images"][:, :1].astype("float32")]

    runtime = Sizes()
    images = torch.arange(2 * 3 * 96 * 20, dtype=torch.int32).reshape(2, 3, 96, 20) % 256
    found = ExportedNetwork(runtime, torch.device("cpu"))(images.to(torch.uint8))
    assert runtime.seen == [(2, 3, 96, 64)]
    assert torch.equal(found.logits_B1HW, images[:, :1].float())
    runtime.about.pop("least_side")  # of an earlier version
    ExportedNetwork(runtime, torch.device("cpu"))(images.to(torch.uint8))
    assert runtime.seen[-1] == (2, 3, 96, 32)


def test_weights_that_say_nothing_are_refused() -> None:
    flat = drawn_network("model.backbone=tiny_test", "model.num_experts=2", gain=0.0)
    (reason,) = verdict(ExportGraph(flat), ExportGraph(flat))
    assert "not trained" in reason


def test_a_graph_of_one_size_is_named(graph: ExportGraph) -> None:
    def one_size(images: Tensor) -> Sequence[Tensor]:
        return graph(images + torch.zeros(1, 1, 64, 64, dtype=torch.uint8))

    with pytest.raises(NumericError, match=r"fails on images of shape \(5, 3, 64, 96\)"):
        verdict(graph, one_size)


@pytest.fixture(scope="module")
def many() -> ExportGraph:
    return ExportGraph(drawn_network("model.backbone=tiny_test", "model.num_experts=7"))


def test_an_expert_that_no_image_uses_is_compared(many: ExportGraph) -> None:
    seen = compare(many, many, run_by(many, many), SHAPES)
    assert seen.not_reached and seen.reached < 1
    level, number = next(
        (level, int(text.split()[-1]))
        for text in seen.not_reached
        for level, name in enumerate(reversed(many.network.level_names()))
        if text.startswith(f"{name},")
    )
    wrong = ExportGraph(many.network)
    with torch.no_grad():
        for weights in wrong.network.moe_levels[level].experts[number].parameters():
            weights.mul_(1.1)
    broken = run_by(wrong, many)
    # The images alone do not tell.
    assert judge("fp32", compare(many, many, broken, SHAPES), SAME).broken == []

    def forced(chosen: Sequence[Sequence[int]]) -> tuple[ExportGraph, InTorch]:
        return force(many, chosen)[0], run_by(force(wrong, chosen)[0], many)

    found = compare(many, many, broken, SHAPES, forced)
    assert found.not_reached == [] and len(found.forced) == len(seen.not_reached)
    assert "a probability differs" in judge("fp32", found, SAME).broken[0]


def test_forced_experts_are_used_with_unlike_gates(many: ExportGraph) -> None:
    chosen = [[5, 2], [6], [], [0, 1]]
    made, biases = force(many, chosen)
    assert sorted(biases) == [f"network.decoder.levels.{n}.moe.router.gate" for n in (0, 1, 3)]
    before = many.run(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).routing[::-1]
    after = made.run(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).routing[::-1]
    assert after[0].experts_BK.tolist() == [[5, 2]] and after[3].experts_BK.tolist() == [[0, 1]]
    assert after[1].experts_BK[0, 0] == 6
    assert after[2].experts_BK.tolist() == before[2].experts_BK.tolist()
    # exp(.5) / (1 + exp(.5)), worked by hand.
    torch.testing.assert_close(
        after[0].gates_BK, torch.tensor([[0.6225, 0.3775]]), rtol=0, atol=1e-4
    )


def test_rounds_reach_all_that_are_missing() -> None:
    assert rounds_of([(0, 4), (2, 1), (0, 5), (0, 6)], [2, 2, 2]) == [
        [[4, 5], [], [1]],
        [[6], [], []],
    ]
    assert rounds_of([], [2, 2]) == []


def test_every_limit_of_int8_is_that_of_the_scores() -> None:
    far = Agreement(50, "", {"Smeasure": (0.8, 0.7949), "MAE": (0, 0.1)}, 0.5, 0.5, "a")
    assert "Smeasure" in judge("int8", Parity(spread=8.0), far).broken[0]
    near = Agreement(50, "", {"Smeasure": (0.8, 0.7951), "MAE": (0, 0.1)}, 0.5, 0.5, "a")
    assert judge("int8", Parity(difference=0.2, spread=8.0), near).broken == []


def test_data_sets_may_share_the_names_of_images(tmp_path: Path) -> None:
    from camoxpert.config import DataConfig
    from camoxpert.data.files.manifest import load_eval
    from camoxpert.export.gate import Maps, agreement_of
    from camoxpert.synthesis.toy import generate_toy

    model = drawn_network("model.backbone=tiny_test", "model.num_experts=2")
    maps = Maps()
    for name in ("one", "two"):
        generate_toy(tmp_path / name, num_train=1, num_test=2, size=SIDE, seed=0)
        (manifest,) = load_eval(tmp_path / name).values()
        named = replace(manifest, dataset=name)
        maps.add(model, named, DataConfig(img_size=SIDE), torch.device("cpu"))
    assert len(maps.masks) == 4 and agreement_of(maps, maps, "data").iou == 1


def test_an_exported_network_takes_two_sizes_as_the_network_does(graph: ExportGraph) -> None:
    """``predict --zoom`` of an exported file: the network itself is given three inputs."""
    runtime = run_by(graph, graph)
    runtime.about |= {"config": {}}
    images = graph.example(2, SIDE, SIDE)[0]
    with torch.no_grad():
        expected = Zoomed(graph.network, SIDE // 2)(images).logits_B1HW
        exported = ExportedNetwork(runtime, torch.device("cpu"))
        found = Zoomed(exported, SIDE // 2)(images).logits_B1HW
        with pytest.raises(ConfigError, match="photographs alone"):
            exported(images, None, SEEN)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


SEEN: Any = object()
"""What other sensors saw."""
