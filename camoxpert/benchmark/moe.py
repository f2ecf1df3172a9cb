"""``benchmark moe``: every dispatch back end against the per-image loop and against a dense block
of the same active work, forward and backward, at several batch and map sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from camoxpert import console
from camoxpert.benchmark.common import (
    Ratio,
    Report,
    heading,
    interleaved,
    milliseconds,
    multiply_adds,
    paired_ratio,
    show_table,
)
from camoxpert.models.moe import DISPATCH, MoE
from camoxpert.profile.syncs import SyncCounter
from camoxpert.runtime.device import device_name, wait_for

SIZES = ((16, 22), (64, 11), (64, 22))
"""(images, side of the square map in pixels)."""
BACK_ENDS = {
    "specialist": ("loop", "sorted", "dense"),
    "uniform": ("loop", "sorted", "gathered", "dense"),
}
ONE_EXPERT = "one expert"


@dataclass(frozen=True)
class Block:
    """Experts, top-k, width and family of the blocks that are compared."""

    num_experts: int = 4
    top_k: int = 2
    width: int = 96
    family: str = "specialist"

    def build(self) -> MoE:
        """Return the mixture of experts."""
        return MoE(self.width, num_experts=self.num_experts, top_k=self.top_k, family=self.family)

    def build_one_expert(self) -> MoE:
        """Return one expert for all images with the hidden width of k experts.

        For like experts that is the same active work; for unlike ones the ratio of multiply-adds
        is reported beside the time.
        """
        kinds = ("hybrid",) if self.family == "specialist" else ()
        expansion = float(self.top_k)
        return MoE(
            self.width,
            num_experts=1,
            top_k=1,
            family=self.family,
            kinds=kinds,
            expansion=expansion,
        )


@dataclass(frozen=True)
class Row:
    """The figures of one family at one batch and map size."""

    family: str
    batch: int
    side: int
    back_ends: dict[str, dict[str, float | Ratio]]
    over_one_expert: Ratio
    macs_over_one_expert: float


def run(
    *,
    device: torch.device,
    sizes: Sequence[tuple[int, int]] = SIZES,
    num_experts: int = 4,
    top_k: int = 2,
    width: int = 96,
    rounds: int = 7,
) -> Report:
    """Measure, print, and return the content of the JSON file.

    Args:
        device: where.
        sizes: (batch, side) pairs.
        num_experts, top_k, width: of the block.
        rounds: timed rounds, interleaved.
    """
    settings = {"num_experts": num_experts, "top_k": top_k, "width": width, "rounds": rounds}
    report = heading("moe", {**settings, "device": device_name(device)})
    rows = [
        measure(Block(num_experts, top_k, width, family), batch, side, device, rounds)
        for family in BACK_ENDS
        for batch, side in sizes
    ]
    return {**report, "rows": [asdict(row) for row in rows]}


def measure(block: Block, batch: int, side: int, device: torch.device, rounds: int) -> Row:
    """Time and count all back ends of a family at one size."""
    names = BACK_ENDS[block.family]
    torch.manual_seed(0)
    x = torch.randn(batch, block.width, side, side, device=device, requires_grad=True)
    moe, single = block.build().to(device), block.build_one_expert().to(device)
    steps = {name: _step(moe, x, name) for name in names}
    steps[ONE_EXPERT] = _step(single, x, "dense")
    for step in steps.values():
        step()
    counts = {name: _count(moe, x, name) for name in names}
    seconds = interleaved(steps, rounds=rounds)
    times = {name: milliseconds(values) for name, values in seconds.items()}
    over_loop = {name: paired_ratio(seconds["loop"], taken) for name, taken in seconds.items()}

    console.say(f"{block.family} experts, {batch} images, maps of {side} x {side}:")
    show_table(
        [
            [name, f"{times[name]:.2f} ms", f"{over_loop[name]['ratio']:.2f} x loop"]
            + [f"{number} {kind}" for kind, number in counts.get(name, {}).items()]
            for name in steps
        ]
    )
    best = min(names, key=times.__getitem__)
    over_one_expert = paired_ratio(seconds[best], seconds[ONE_EXPERT])
    moe.dispatch = "sorted"
    macs = multiply_adds(moe, x) / multiply_adds(single, x)
    console.say(
        f"  {best} takes {over_one_expert['ratio']:.2f} times as long as one expert "
        f"({macs:.2f} times its multiply-adds)"
    )
    return Row(
        family=block.family,
        batch=batch,
        side=side,
        back_ends={
            name: {
                "milliseconds": times[name],
                "over_loop": over_loop[name],
                **counts.get(name, {}),
            }
            for name in steps
        },
        over_one_expert=over_one_expert,
        macs_over_one_expert=macs,
    )


def _step(moe: MoE, x: torch.Tensor, name: str) -> Callable[[], None]:
    def step() -> None:
        moe.dispatch = name
        y, _ = moe(x)
        y.square().mean().backward()
        moe.zero_grad(set_to_none=True)
        x.grad = None
        wait_for(x.device)

    return step


def _count(moe: MoE, x: torch.Tensor, name: str) -> dict[str, int]:
    """Count operators and host syncs of the dispatch alone, forward and backward."""
    routing = moe.router(x)
    routing = routing._replace(gates_BK=routing.gates_BK.detach().requires_grad_())
    leaf = x.detach().clone().requires_grad_()
    with SyncCounter() as counter:
        DISPATCH[name](moe.experts, leaf, routing, None).sum().backward()
    moe.zero_grad(set_to_none=True)
    return {"operators": counter.operators, "syncs": counter.syncs}
