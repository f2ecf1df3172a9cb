"""``benchmark moe``: every dispatch back end against the per-image loop and against a dense block
of the same active work, forward and backward, at several batch and map sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from camoxpert.benchmark.common import heading, interleaved, milliseconds, paired_ratio
from camoxpert.models.moe import DISPATCH, MoE
from camoxpert.profile.syncs import SyncCounter

SIZES = ((16, 22), (64, 11), (64, 22))
"""(images, side of the square map in pixels)."""
BACK_ENDS = {
    "specialist": ("loop", "sorted", "dense"),
    "uniform": ("loop", "sorted", "gathered", "dense"),
}


def run(
    *,
    device: torch.device,
    sizes: Sequence[tuple[int, int]] = SIZES,
    num_experts: int = 4,
    top_k: int = 2,
    width: int = 96,
    rounds: int = 7,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure; return the content of the JSON file.

    Args:
        device: where.
        sizes: (batch, side) pairs.
        num_experts, top_k, width: of the block.
        rounds: timed rounds, interleaved.
        say: prints a line.
    """
    settings = {"num_experts": num_experts, "top_k": top_k, "width": width, "rounds": rounds}
    result = heading("moe", {**settings, "device": device_name(device)})
    result["rows"] = []
    for family, names in BACK_ENDS.items():
        for batch, side in sizes:
            torch.manual_seed(0)
            x = torch.randn(batch, width, side, side, device=device, requires_grad=True)
            moe = MoE(width, num_experts=num_experts, top_k=top_k, family=family).to(device)
            blocks: dict[str, Callable[[], None]] = {
                name: _step(moe, x, name, device) for name in names
            }
            # One expert for all images with the hidden width of k experts. Like experts: exactly
            # the same active work; unlike ones: the ratio of multiply-adds is reported beside the
            # time.
            single = _dense_block(width, top_k, family).to(device)
            blocks["one expert"] = _step(single, x, "dense", device)
            for block in blocks.values():
                block()
            counted = {name: _count(moe, x, name) for name in names}
            seconds = interleaved(blocks, rounds=rounds)
            row: dict[str, Any] = {"family": family, "batch": batch, "side": side, "back_ends": {}}
            say(f"{family} experts, {batch} images, maps of {side} x {side}:")
            for name, values in seconds.items():
                entry: dict[str, Any] = {
                    "milliseconds": milliseconds(values),
                    "over_loop": paired_ratio(seconds["loop"], values),
                    **counted.get(name, {}),
                }
                row["back_ends"][name] = entry
                counts = (
                    f"{entry['operators']:>6} operators {entry['syncs']:>4} syncs"
                    if name in counted
                    else ""
                )
                say(
                    f"  {name:<11} {entry['milliseconds']:9.2f} ms  "
                    f"{entry['over_loop']['ratio']:6.2f} x loop  {counts}"
                )
            best = min(names, key=lambda name: row["back_ends"][name]["milliseconds"])
            row["over_one_expert"] = paired_ratio(seconds[best], seconds["one expert"])
            moe.dispatch = "sorted"
            row["macs_over_one_expert"] = _macs(moe, x) / _macs(single, x)
            say(
                f"  {best} takes {row['over_one_expert']['ratio']:.2f} times the one expert "
                f"({row['macs_over_one_expert']:.2f} times its multiply-adds)"
            )
            result["rows"].append(row)
    return result


def device_name(device: torch.device) -> str:
    """Return the device's name for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _dense_block(width: int, top_k: int, family: str) -> MoE:
    kinds = ("hybrid",) if family == "specialist" else ()
    expansion = float(top_k)
    return MoE(width, num_experts=1, top_k=1, family=family, kinds=kinds, expansion=expansion)


def _step(moe: MoE, x: torch.Tensor, name: str, device: torch.device) -> Callable[[], None]:
    def step() -> None:
        moe.dispatch = name
        y, _ = moe(x)
        y.square().mean().backward()
        moe.zero_grad(set_to_none=True)
        x.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)

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


def _macs(block: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(x)
    return counter.get_total_flops() / 2
