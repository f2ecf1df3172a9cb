"""``profile``: the training step of a user's own command, on their machine, taken apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from camoxpert.benchmark.common import heading
from camoxpert.benchmark.moe import device_name
from camoxpert.data.loader import Batches, finish
from camoxpert.data.samples.batches import Batch, RawBatch
from camoxpert.profile.regions import ComponentTimer, Workload, advice, diagnose, text_rows
from camoxpert.profile.syncs import SyncCounter
from camoxpert.training import step as training_step
from camoxpert.training import trainer
from camoxpert.training.meters import RoutingMeter
from camoxpert.training.optim import set_lr
from camoxpert.training.prepare import Setup, training_loader

ORDER = ("data wait", "copy", "augment", "backbone", "router")
LATER = ("decoder", "heads", "loss", "backward", "clip", "optimizer", "EMA", "other")


def run(
    setup: Setup, *, steps: int = 10, trace: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Profile; return the content of the JSON file. The weights change, nothing is saved.

    Args:
        setup: as for training.
        steps: timed steps.
        trace: also write a trace of three steps for chrome://tracing or Perfetto.
        say: prints a line.
    """
    model = setup.model
    stage = setup.plan.stages[-1]
    trainer.set_trainable(setup, stage, stage.first_epoch + stage.epochs - 1)
    model.set_active_experts(setup.config.model.top_k)
    set_lr(setup.optimizer, 1e-6)
    loader = training_loader(setup, stage.batch_size)
    batches = _endless(loader)

    def receive(batch: Batch | RawBatch) -> Batch:
        return finish(loader, batch, setup.device)

    meter = RoutingMeter(model.level_names(), model.moe_levels[0].kinds)
    try:
        result = _measure(setup, batches, receive, meter, steps, trace, say)
    finally:
        loader.close()
    return result


def _measure(
    setup: Setup,
    batches: Iterator[Batch | RawBatch],
    receive: Callable[[Batch | RawBatch], Batch],
    meter: RoutingMeter,
    steps: int,
    trace: Path | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    device, stage = setup.device, setup.plan.stages[-1]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step(batch: Batch) -> None:
        training_step.train_step(setup, [batch.to(device)], meter)

    def fetch() -> Batch:
        return receive(next(batches))

    for _ in range(3):
        step(fetch())
    wait()
    kept = fetch()
    with SyncCounter() as counter:
        step(kept)

    timer, spare = ComponentTimer(device), ComponentTimer(device)
    plain: list[float] = []
    timed: list[float] = []
    for _ in range(steps):
        # With and without the timer in turns: its own cost is part of the answer.
        started = time.perf_counter()
        step(kept)
        wait()
        plain.append(time.perf_counter() - started)
        with instrumented(setup, timer), timer.step():
            with timer.region("data wait"):
                batch = next(batches)
            # A raw batch is changed where it arrives.
            with timer.region("augment" if isinstance(batch, RawBatch) else "copy"):
                arrived = receive(batch)
            training_step.train_step(setup, [arrived], meter)
            wait()
        with instrumented(setup, spare):
            started = time.perf_counter()
            with spare.step():
                step(kept)
                wait()
            timed.append(time.perf_counter() - started)
    cost = statistics.median(timed) / statistics.median(plain) - 1

    table = timer.table(device=device.type == "cuda")
    experts = [name for name in table if name.startswith("expert")]
    order = [*ORDER, *sorted(experts), *LATER]
    images = stage.batch_size
    peak = arithmetic_peak(device, setup.precision.dtype)
    use = 3 * 2e9 * setup.gmacs * images / statistics.median(plain) / peak
    workload = Workload(fetch, step, _doubled, wait)
    diagnosis = diagnose(workload, rounds=max(3, steps // 2), syncs=counter.syncs, utilisation=use)
    suggestions = advice(
        diagnosis,
        table,
        batch_size=images,
        num_workers=setup.data.num_workers,
        accelerator=device.type == "cuda",
    )

    say(f"one training step, {images} images of {setup.config.data.img_size} px:")
    for line in text_rows(table, order):
        say(f"  {line}")
    host = sum(timer.table().values())
    say(
        f"{setup.parameters / 1e6:.2f} M parameters, {setup.gmacs:.2f} GMACs an image; "
        f"{images / diagnosis.seconds:.1f} images/s; {use:.1%} of the {peak / 1e12:.2f} TFLOP/s "
        "that a matrix product reaches here"
    )
    say(f"{counter.syncs} host syncs and {counter.operators} operators in a step")
    say(f"{diagnosis.verdict}-bound: {diagnosis.evidence}")
    for gain, text in suggestions:
        say(f"  up to {gain:.2f} times as fast: {text}")
    if not suggestions:
        say("  nothing to gain from data, batch size or EMA")
    say(f"the timer itself costs {max(cost, 0):.1%} of a step")
    if trace is not None:
        write_trace(trace, device, lambda: step(kept))
        say(f"trace of three steps: {trace} (chrome://tracing, ui.perfetto.dev)")
    settings = {
        "backbone": setup.config.model.backbone,
        "img_size": setup.config.data.img_size,
        "batch_size": images,
        "num_workers": setup.data.num_workers,
        "precision": setup.precision.name,
        "steps": steps,
        "device": device_name(device),
    }
    return heading("profile", settings) | {
        "milliseconds": {name: 1e3 * table[name] for name in order if name in table},
        "step_milliseconds": 1e3 * sum(table.values()),
        "host_milliseconds": 1e3 * host,
        "images_per_second": images / diagnosis.seconds,
        "parameters": setup.parameters,
        "gmacs": setup.gmacs,
        "peak_tflops": peak / 1e12,
        "model_flops_utilisation": use,
        "host_syncs": counter.syncs,
        "operators": counter.operators,
        "verdict": diagnosis.verdict,
        "evidence": diagnosis.evidence,
        "interventions_milliseconds": {
            "as it is": 1e3 * diagnosis.seconds,
            "batch at hand": 1e3 * diagnosis.without_data,
            "twice the images": 1e3 * diagnosis.doubled,
        },
        "advice": [{"gain": gain, "text": text} for gain, text in suggestions],
        "timer_cost": cost,
    }


@contextmanager
def instrumented(setup: Setup, timer: ComponentTimer) -> Iterator[None]:
    """Charge every part of the training step to its component for the time of the block."""
    model = setup.model
    timer.watch(model.backbone, "backbone")
    timer.watch(model.decoder, "decoder")
    for level in model.decoder.levels:
        timer.watch(level.head, "heads")  # type: ignore[arg-type]
    if model.decoder.detail is not None:
        timer.watch(model.decoder.detail, "heads")
    with ExitStack() as stack:
        for moe in model.moe_levels:
            timer.watch(moe.router, "router")
            if isinstance(moe.experts, torch.nn.ModuleList):
                for kind, expert in zip(moe.kinds, moe.experts, strict=True):
                    timer.watch(expert, f"expert {kind}")
            else:
                for name in ("gathered", "run"):
                    original = getattr(moe.experts, name)
                    timed = timer.wrap(original, f"experts ({name})")
                    stack.enter_context(mock.patch.object(moe.experts, name, timed))
            if moe.shared is not None:
                timer.watch(moe.shared, "expert shared")
        parts: list[tuple[Any, str, str]] = [
            (training_step, "total_loss", "loss"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "clip"),
            (setup.optimizer, "step", "optimizer"),
            (setup.optimizer, "zero_grad", "optimizer"),
        ]
        if setup.ema is not None:
            parts.append((setup.ema, "update", "EMA"))
        for owner, name, component in parts:
            function = timer.wrap(getattr(owner, name), component)
            stack.enter_context(mock.patch.object(owner, name, function))
        try:
            yield
        finally:
            timer.close()


def arithmetic_peak(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the floating-point operations per second of a large matrix product, measured."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    seconds = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def write_trace(path: Path, device: torch.device, step: Callable[[], object]) -> None:
    """Write a trace of three steps, for the usual viewers."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


def _doubled(batch: Batch) -> Batch:
    return replace(
        batch,
        images=torch.cat([batch.images, batch.images]),
        masks=torch.cat([batch.masks, batch.masks]),
        names=batch.names * 2,
        sizes=batch.sizes * 2,
        indices=[*batch.indices, *batch.indices],
    )


def _endless(loader: Batches) -> Iterator[Batch | RawBatch]:
    """Yield full batches for ever, epoch after epoch."""
    epoch, size = 0, 0
    while True:
        loader.set_epoch(epoch)
        for batch in loader:
            size = max(size, len(batch.names))
            if len(batch.names) == size:
                yield batch
        epoch += 1
