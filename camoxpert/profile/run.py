"""``profile``: the training step of a user's own command, on their machine, by component."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from camoxpert import console, text
from camoxpert.benchmark.common import Report, heading, show_table
from camoxpert.data.loader import Batches, finish
from camoxpert.data.samples.batches import Batch, RawBatch
from camoxpert.profile.diagnose import Advice, Conditions, Workload, advice, diagnose
from camoxpert.profile.guidance import REFERENCES, show_support, support_rows
from camoxpert.profile.regions import ComponentTimer, watched
from camoxpert.profile.syncs import SyncCounter
from camoxpert.runtime.device import device_name, wait_for
from camoxpert.runtime.host import usable_cores
from camoxpert.runtime.regions import listening
from camoxpert.training.optim import set_lr
from camoxpert.training.run import Run
from camoxpert.training.stages import set_trainable, training_loader
from camoxpert.training.step import train_step

FIRST = ("data wait", "copy", "augment", REFERENCES, "backbone", "guidance", "router")
LAST = ("decoder", "heads", "loss", "backward", "backward: recomputed", "clip", "optimizer", "EMA",
        "other")  # fmt: skip


class TrainingStep:
    """The last stage's step of a prepared run: the weights change, nothing is saved.

    Everything that the profile uses of the training is in here.
    """

    def __init__(self, run: Run) -> None:
        stage = run.plan.stages[-1]
        set_trainable(run, stage, stage.first_epoch + stage.epochs - 1)
        run.model.set_active_experts(run.config.model.top_k)
        set_lr(run.optimizer, 1e-6)
        self.run = run
        self.device = run.device
        self.images = stage.batch_size
        self.loading = run.data.loading
        self.loader = training_loader(run, stage.batch_size)
        self.batches = _full_batches(self.loader)

    def take(self, batch: Batch) -> None:
        """Take one optimizer step."""
        train_step(self.run, [batch.to(self.device)])

    def receive(self, batch: Batch | RawBatch) -> Batch:
        """Return the batch on the device, changed there if it is raw."""
        return finish(self.loader, batch, self.device)

    def fetch(self) -> Batch:
        """Wait for the next batch."""
        return self.receive(next(self.batches))

    def drain(self) -> None:
        """Take the batches that the workers prepared ahead."""
        for _ in range(max(1, self.loading.num_workers) * self.loading.prefetch + 1):
            next(self.batches)

    def wait(self) -> None:
        """Wait for the device."""
        wait_for(self.device)

    def close(self) -> None:
        """End the data workers."""
        self.loader.close()


@dataclass(frozen=True)
class Times:
    """Where the time of a step goes.

    Attributes:
        components: seconds per component, on the device's clock if it has one.
        host: seconds of a step on the host.
        plain: median seconds of a step on a preloaded batch, without the timer.
        cost: share of a step that the timer adds.
    """

    components: dict[str, float]
    host: float
    plain: float
    cost: float


@dataclass(frozen=True)
class Profile:
    """The figures of a profile, as they are written to JSON.

    Attributes:
        milliseconds: per component; they add up to ``step_milliseconds``.
        host_milliseconds: of a step on the host's clock.
        gmacs: 1e9 multiply-adds of one image's forward pass.
        peak_tflops: 1e12 operations per second of a large matrix product on this device.
        model_flops_utilisation: share of that peak that three forward passes per step reach.
        data_wait: share of consecutive steps spent waiting for a batch, 0..1.
        interventions_milliseconds: mean step as it is, median steps with preloaded data and with
            twice the images.
        timer_cost: share of a step that the timer adds.
        support_milliseconds: of a guided run, see ``guidance.support_rows``; else empty.
    """

    milliseconds: dict[str, float]
    step_milliseconds: float
    host_milliseconds: float
    images_per_second: float
    parameters: int
    gmacs: float
    peak_tflops: float
    model_flops_utilisation: float
    host_syncs: int
    operators: int
    verdict: str
    evidence: str
    data_wait: float
    interventions_milliseconds: dict[str, float]
    advice: list[Advice]
    timer_cost: float
    support_milliseconds: dict[str, float] = field(default_factory=dict)


def run(prepared: Run, *, steps: int = 10, trace: Path | None = None) -> Report:
    """Profile, print, and return the content of the JSON file; the weights change.

    Args:
        prepared: a run that was prepared as for training.
        steps: timed steps.
        trace: also write a trace of three steps for chrome://tracing or Perfetto.
    """
    step = TrainingStep(prepared)
    try:
        for _ in range(3):
            step.take(step.fetch())
        step.wait()
        kept = step.fetch()
        with SyncCounter() as counter:
            step.take(kept)
        times = measure(step, kept, steps)
        profile = judge(step, times, counter, rounds=max(3, steps // 2))
        show(profile, step)
        if trace is not None:
            write_trace(trace, prepared.device, lambda: step.take(kept))
            console.say(f"trace of three steps: {trace} (chrome://tracing, ui.perfetto.dev)")
    finally:
        step.close()
    settings = {
        "backbone": prepared.config.model.backbone,
        "img_size": prepared.config.data.img_size,
        "batch_size": step.images,
        "num_workers": prepared.data.loading.num_workers,
        "precision": prepared.precision.name,
        "steps": steps,
        "device": device_name(prepared.device),
    }
    return heading("profile", settings) | asdict(profile)


def measure(step: TrainingStep, kept: Batch, steps: int) -> Times:
    """Time training steps by component, and steps with and without the timer on one batch."""
    timer, spare = ComponentTimer(step.device), ComponentTimer(step.device)
    plain: list[float] = []
    timed: list[float] = []
    model = step.run.model
    # One after another as in training: any pause lets the workers prepare batches ahead.
    step.drain()
    step.take(step.fetch())
    step.wait()
    for _ in range(steps):
        with watched(model, timer), timer.step():
            with timer.region("data wait"):
                batch = next(step.batches)
            # A raw batch is changed on the device.
            with timer.region("augment" if isinstance(batch, RawBatch) else "copy"):
                arrived = step.receive(batch)
            step.take(arrived)
            step.wait()
    for _ in range(steps):
        # With and without the timer in turns: its own cost is part of the result.
        started = time.perf_counter()
        step.take(kept)
        step.wait()
        plain.append(time.perf_counter() - started)
        with watched(model, spare):
            started = time.perf_counter()
            with spare.step():
                step.take(kept)
                step.wait()
            timed.append(time.perf_counter() - started)
    return Times(
        components=timer.table(device=step.device.type == "cuda"),
        host=sum(timer.table().values()),
        plain=statistics.median(plain),
        cost=statistics.median(timed) / statistics.median(plain) - 1,
    )


def judge(step: TrainingStep, times: Times, counter: SyncCounter, *, rounds: int) -> Profile:
    """Diagnose the step and put all figures together."""
    run = step.run
    peak = arithmetic_peak(step.device, run.precision.dtype)
    use = 3 * 2e9 * run.gmacs * step.images / times.plain / peak
    loading = step.loading
    workload = Workload(
        step.fetch, step.take, _doubled, step.wait, step.drain, burst=loading.num_workers
    )
    diagnosis = diagnose(workload, rounds=rounds, syncs=counter.syncs, utilisation=use)
    support: dict[str, float] = {}
    if run.guide is not None:
        support = support_rows(
            run.guide,
            step=1e3 * sum(times.components.values()),
            references=1e3 * times.components.get(REFERENCES, 0.0),
            images=step.images,
            steps=run.plan.steps,
        )
    return Profile(
        milliseconds={name: 1e3 * times.components[name] for name in _ordered(times.components)},
        step_milliseconds=1e3 * sum(times.components.values()),
        host_milliseconds=1e3 * times.host,
        images_per_second=step.images / diagnosis.seconds,
        parameters=run.parameters,
        gmacs=run.gmacs,
        peak_tflops=peak / 1e12,
        model_flops_utilisation=use,
        host_syncs=counter.syncs,
        operators=counter.operators,
        verdict=diagnosis.verdict,
        evidence=diagnosis.evidence,
        data_wait=diagnosis.waiting,
        interventions_milliseconds={
            "as it is": 1e3 * diagnosis.seconds,
            "batch at hand": 1e3 * diagnosis.without_data,
            "twice the images": 1e3 * diagnosis.doubled,
        },
        advice=advice(
            diagnosis,
            times.components,
            Conditions(
                batch_size=step.images,
                steps=run.batching.steps,
                num_workers=loading.num_workers,
                cores=usable_cores(),
                cached=loading.cache is not None,
                accelerator=step.device.type == "cuda",
            ),
        ),
        timer_cost=times.cost,
        support_milliseconds=support,
    )


def show(profile: Profile, step: TrainingStep) -> None:
    """Print a profile."""
    size = step.run.config.data.img_size
    console.say(f"one training step, {text.count(step.images, 'image')} of {size} px:")
    total = profile.step_milliseconds
    rows = [[n, f"{ms:.2f} ms", f"{ms / total:.1%}"] for n, ms in profile.milliseconds.items()]
    show_table([*rows, ["step", f"{total:.2f} ms"]])
    if profile.support_milliseconds:
        show_support(profile.support_milliseconds)
    console.say(
        f"{profile.parameters / 1e6:.2f} M parameters, {profile.gmacs:.2f} GMACs an image; "
        f"{profile.images_per_second:.1f} images/s; {profile.model_flops_utilisation:.1%} of the "
        f"{profile.peak_tflops:.2f} TFLOP/s that a matrix product reaches here"
    )
    syncs = text.count(profile.host_syncs, "host sync")
    console.say(f"{syncs} and {profile.operators} operators in a step")
    console.say(f"{profile.verdict}-bound: {profile.evidence}")
    for found in profile.advice:
        console.say(f"  up to {found['gain']:.2f} times as fast: {found['text']}")
    if not profile.advice:
        console.say("  nothing to gain from data, batch size or EMA")
    console.say(f"the timer itself costs {max(profile.timer_cost, 0):.1%} of a step")


def arithmetic_peak(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the floating-point operations per second of a large matrix product, measured."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype or torch.float32) for _ in range(2))
    seconds = []
    for _ in range(5):
        wait_for(device)
        started = time.perf_counter()
        a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def write_trace(path: Path, device: torch.device, step: Callable[[], object]) -> None:
    """Write a trace of three steps, for the usual viewers."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    recorded = torch.profiler.profile(activities=activities)
    with listening(torch.profiler.record_function), recorded:
        for _ in range(3):
            step()
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))


def _ordered(components: Iterable[str]) -> list[str]:
    """Sort components by their place in a step; experts by name between FIRST and LAST."""
    order = [*FIRST, *sorted(name for name in components if name.startswith("expert")), *LAST]
    return sorted(components, key=order.index)


def _doubled(batch: Batch) -> Batch:
    """Return the batch with every image twice."""
    return replace(
        batch.changed(lambda tensor: torch.cat([tensor, tensor])),
        names=batch.names * 2,
        sizes=batch.sizes * 2,
        indices=[*batch.indices, *batch.indices],
    )


def _full_batches(loader: Batches) -> Iterator[Batch | RawBatch]:
    """Yield full batches, epoch after epoch, without end."""
    epoch, size = 0, 0
    while True:
        loader.set_epoch(epoch)
        for batch in loader:
            size = max(size, len(batch.names))
            if len(batch.names) == size:
                yield batch
        epoch += 1
