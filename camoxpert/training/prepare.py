"""Everything decided before the first step: data, device, precision, model, optimizer, plan.

Each decision is one line for the user, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from camoxpert.config import Config
from camoxpert.data.loader import Batches
from camoxpert.data.samples.augment import training_sides
from camoxpert.data.samples.batches import Batch
from camoxpert.losses import total_loss
from camoxpert.models.build import build_model
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.runtime.device import (
    Precision,
    check_architecture,
    choose_device,
    choose_precision,
    set_tf32,
)
from camoxpert.runtime.host import available_memory
from camoxpert.runtime.processes import World
from camoxpert.training import data_setup
from camoxpert.training.batching import (
    COMFORTABLE,
    COMFORTABLE_HOST,
    MicroBatch,
    asked_for,
    effective_batch,
    keep_effective,
    measured_bytes,
    measured_rate,
    micro_batch_sizes,
    plan_micro_batch,
    predicted_bytes,
)
from camoxpert.training.data_setup import Data, load_data
from camoxpert.training.ema import ModelEma
from camoxpert.training.guards import StopFlag
from camoxpert.training.meters import StepCounts
from camoxpert.training.optim import (
    Plan,
    backbone_scale,
    build_optimizer,
    make_plan,
    stage1_epochs,
)

Say = Callable[[str], None]
GRAPHS_PER_SIZE = 8
NOTHING_YET = "Nothing was trained yet; the same command starts again."


@dataclass
class Setup:
    """A run ready to start, nothing written yet."""

    config: Config
    data: Data
    device: torch.device
    precision: Precision
    model: CamoXpert
    ema: ModelEma | None
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    plan: Plan
    micro_batch: MicroBatch
    decisions: list[str]
    parameters: int
    gmacs: float
    step_counts: StepCounts = field(default_factory=StepCounts)
    world: World = field(default_factory=World)
    # What a forward pass goes through: the model, wrapped where several processes train it.
    forward: nn.Module = field(default_factory=nn.Identity)
    # Parts that every micro-batch is taken in, since the device ran out of memory.
    split: int = 1

    @property
    def steps(self) -> int:
        """Micro-batches of each process per optimizer step."""
        return self.micro_batch.steps

    @property
    def evaluated_model(self) -> CamoXpert:
        """The model that validation scores: the EMA where there is one."""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, CamoXpert)
        return self.ema.module


def prepare(
    config: Config,
    say: Say,
    *,
    continued: Mapping[str, Any] | None = None,
    write: bool = True,
    world: World | None = None,
    stop: StopFlag | None = None,
) -> Setup:
    """Decide and build everything a run needs.

    Args:
        config: checked settings.
        say: prints one line for the user.
        continued: ``run.json`` of the stopped run that this one will continue; what it chose by the
            memory of that day is kept, so that the same command takes the same steps.
        write: False leaves a cache of the data that is not there unbuilt.
        world: the processes that train together.
        stop: looked at now and then.

    Raises:
        Stopped: asked to stop; nothing was trained yet.
    """
    decisions: list[str] = []
    world, stop = world or World(), stop or StopFlag()

    def check_stop() -> None:
        stop.agree({f"stop {code}": 1.0 for code in world.gather(stop.code()) if code})
        if stop.agreed:
            raise stop.stopped(NOTHING_YET)

    def decide(text: str) -> None:
        decisions.append(text)
        say(text)

    device = choose_device(config.train.device, index=world.local_rank)
    check_architecture(device)
    data = world.in_turn(
        lambda: load_data(
            config,
            decide,
            device=device.type,
            write=write,
            rank=world.rank,
            world_size=world.size,
            processes=world.local_size,
            check_stop=lambda: stop.check(NOTHING_YET),
        )
    )
    check_stop()
    precision = choose_precision(config.train, device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    decide(f"device      {device} ({name})")
    if world.size > 1:
        share = -(-len(data.train) // world.size)
        decide(
            f"processes   {world.size}, {world.local_size} on this machine; each sees {share} of "
            f"the {len(data.train)} training images an epoch"
        )
    tf32 = set_tf32(config.train.tf32, device)
    decide(f"precision   {precision.reason}; TF32 {tf32}")

    # The same weights everywhere, then every process its own random numbers.
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device)
    if not world.first:
        torch.manual_seed(config.train.seed + 1_000_003 * world.rank)
    check_stop()
    has_weights = bool(config.model.weights) or config.model.pretrained
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moe = model.moe_levels[0]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    gmacs = forward_gmacs(model, config.data.img_size)
    decide(
        f"model       {config.model.backbone}, {size:.2f} M parameters, {gmacs:.2f} GMACs an "
        f"image; {config.model.num_experts} experts, top {config.model.top_k}, dispatch "
        f"{moe.dispatch}"
    )
    routers = [(moe.router, config.optim.router_lr_scale) for moe in model.moe_levels]
    scale = backbone_scale(config.optim, has_weights=has_weights)
    optimizer = build_optimizer(model, config.optim, scales=[(model.backbone, scale), *routers])
    ema = ModelEma(model, config.train.ema_decay) if config.train.use_ema else None
    batch = agree_on_micro_batch(
        config, model, device, precision, (continued or {}).get("batch"), world
    )
    check_stop()
    decide(f"memory      {batch.reason}")
    covered = model.set_gradient_checkpointing(batch.checkpointing)
    if batch.checkpointing:
        decide(f"checkpoint  activations of the {covered} are recomputed")
    plan = make_plan(
        config.train,
        config.optim,
        num_images=-(-len(data.train) // world.size),
        has_weights=has_weights,
        batch_size=batch.size,
        accumulation_steps=batch.steps,
        stage2_batch_size=batch.stage2_size,
    )
    first, why = stage1_epochs(config.train, has_weights=has_weights)
    decide(
        f"plan        {plan.epochs} epochs, {plan.steps} optimizer steps; stage 1 {first} epochs "
        f"({why}); backbone at {scale:g}x the learning rate"
    )
    setup = Setup(
        config=config,
        data=data,
        device=device,
        precision=precision,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.scaler),
        plan=plan,
        micro_batch=batch,
        decisions=decisions,
        parameters=sum(p.numel() for p in model.parameters()),
        gmacs=gmacs,
        world=world,
        forward=model,
        step_counts=StepCounts(world.sum),
    )
    if config.train.compile:
        decide(
            f"compile     {compile_model(model, sizes=len(training_sides(config.data)))}, static "
            f"shapes; the first steps take minutes"
        )
    return setup


def compile_model(model: CamoXpert, *, sizes: int = 1) -> str:
    """Compile what compiles as one graph, in place and without new parameter names.

    Like experts with gathered weights are one program for any routing, so the whole network is one
    graph. Otherwise only the backbone is: reading the counts breaks the decoder's graph. Static
    shapes: block by block with dynamic shapes crashes Inductor on EdgeNeXt. Every training size is
    compiled once, and kept.

    Args:
        model: changed in place.
        sizes: training sizes that will be seen.

    Returns:
        What was compiled, in words.
    """
    # A size means a graph for full batches, short ones, training and evaluation each; beyond
    # torch's own limit of eight it would give up on compiling.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS_PER_SIZE * sizes)
    if all(level.dispatch in ("gathered", "dense") for level in model.moe_levels):
        model.compile(dynamic=False, fullgraph=True)
        return "the whole network as one graph"
    model.backbone.compile(dynamic=False)
    return "the backbone (--expert-family uniform compiles as a whole)"


@torch.no_grad()
def forward_gmacs(model: CamoXpert, img_size: int) -> float:
    """Return the billions of multiply-adds of one image's forward pass, active experts only."""
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    image = torch.zeros(1, 3, img_size, img_size, dtype=torch.uint8, device=model.mean.device)
    with FlopCounterMode(display=False) as counter:
        model(image)
    model.train(training)
    return counter.get_total_flops() / 2e9


def training_loader(
    setup: Setup, batch_size: int, *, report: Callable[[str], None] | None = None
) -> Batches:
    """Build the training loader for one stage's batch size: this process's share of every epoch.

    ``report`` receives a line where data workers died and were started anew.
    """
    return data_setup.training_loader(
        setup.config,
        setup.data,
        batch_size,
        device=setup.device.type,
        rank=setup.world.rank,
        world_size=setup.world.size,
    )


def agree_on_micro_batch(
    config: Config,
    model: CamoXpert,
    device: torch.device,
    precision: Precision,
    continued: Mapping[str, Any] | None,
    world: World,
) -> MicroBatch:
    """Choose as ``choose_micro_batch`` does, for all processes: what fits the fullest device.

    The steps of a stopped run stay what they were while nobody asks for others, whatever the number
    of processes.
    """
    asked = asked_for(config.train)
    if continued and tuple(continued.get("asked") or ()) == asked:
        before = int(continued["size"]) * int(continued["steps"]) * int(continued["processes"])
        if before != world.size * effective_batch(config.train, world.size):
            return keep_effective(config.train, continued, world.size)
    own = choose_micro_batch(config, model, device, precision, continued, processes=world.size)
    chosen = min(world.gather(own), key=lambda batch: (batch.size, not batch.checkpointing))
    chosen = replace(chosen, processes=world.size, asked=asked)
    if world.size == 1:
        return chosen
    shared = f"; {chosen.effective} images per step over {world.size} processes"
    return replace(chosen, reason=chosen.reason + shared)


def choose_micro_batch(
    config: Config,
    model: CamoXpert,
    device: torch.device,
    precision: Precision,
    continued: Mapping[str, Any] | None = None,
    *,
    processes: int = 1,
) -> MicroBatch:
    """Choose micro-batch, accumulation and recomputation; leaves no gradients behind.

    On CUDA always, from measured steps. On a CPU, where memory is seldom what is scarce, only for
    ``--batch-size auto``.
    """
    train = config.train
    wanted, sizes = effective_batch(train, processes), micro_batch_sizes(train, processes)
    setting = train.gradient_checkpointing
    if train.batch_size is None and continued and wanted % int(continued["size"]) == 0:
        size, recompute = int(continued["size"]), bool(continued["checkpointing"])
        reason = f"{size} images x {wanted // size} per step, as in the run being continued"
        return MicroBatch(size, wanted // size, recompute, reason)
    largest = max(sizes[0], train.stage2_batch_size or 0)

    def step(images: int) -> None:
        with unchanged(model, device):
            trial_step(model, config, device, precision, images)

    if device.type == "cuda":
        # AdamW's two moments come with the first step, in the parameters' own format.
        moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters())

        def measure(images: int, recompute: bool) -> int | None:
            model.set_gradient_checkpointing(recompute)
            peak = measured_bytes(step, images, device)
            return None if peak is None else peak + moments

        def rate(images: int, recompute: bool) -> float:
            model.set_gradient_checkpointing(recompute)
            try:
                return measured_rate(step, images, device)
            except torch.OutOfMemoryError:
                return 0.0

        # With sizes asked for, stage 2's may be the larger: what fits it fits both.
        chosen = plan_micro_batch(
            wanted // sizes[0] * largest if train.batch_size else wanted,
            [largest] if train.batch_size else sizes,
            checkpointing=setting,
            measure=measure,
            free=torch.cuda.mem_get_info(device)[0],
            comfortable=COMFORTABLE,
            rate=rate,
            verify=True,
        )
        return replace(chosen, size=sizes[0]) if train.batch_size else chosen
    free = available_memory()
    if train.batch_size is not None or free is None:
        size = sizes[0]
        recompute = setting == "on"
        why = "as asked" if setting != "auto" else f"memory is not scarce on {device.type}"
        reason = f"{size} images"
        reason += f" x {wanted // size} per step" if wanted != size else " per step"
        reason += f", recomputation {'on' if recompute else 'off'}: {why}"
        return MicroBatch(size, wanted // size, recompute, reason)
    # Weights and average are there already; gradients come with the step, the moments after it.
    fixed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())

    def predict(images: int, recompute: bool) -> int:
        def fake_step(copied: torch.nn.Module) -> None:
            assert isinstance(copied, CamoXpert)
            for level in copied.moe_levels:
                # The reference reads every choice one by one: there are no values here.
                level.dispatch = "sorted" if level.dispatch == "loop" else level.dispatch
            copied.set_gradient_checkpointing(recompute)
            trial_step(copied, config, device, precision, images)

        return predicted_bytes(model, fake_step) + fixed

    return plan_micro_batch(
        wanted,
        sizes,
        checkpointing=setting,
        measure=predict,
        free=free,
        comfortable=COMFORTABLE_HOST,
    )


@contextmanager
def unchanged(model: CamoXpert, device: torch.device) -> Iterator[None]:
    """Put buffers (batch norm's statistics), random state and routing back after trying things
    out."""
    kept = [buffer.clone() for buffer in model.buffers()]
    training, active = model.training, [level.router.top_k for level in model.moe_levels]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)
        model.train(training)
        for level, top_k in zip(model.moe_levels, active, strict=True):
            level.router.top_k = top_k


def trial_step(
    model: CamoXpert,
    config: Config,
    device: torch.device,
    precision: Precision,
    batch_size: int,
) -> None:
    """Run one forward and backward pass on made-up images; leaves no gradients behind."""
    size = max(training_sides(config.data))
    images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=device)
    masks = torch.zeros(batch_size, 1, size, size, device=device)
    model.train()
    # The first epochs may use all experts: that is the step that has to fit.
    warm = config.train.router_warmup > 0
    model.set_active_experts(config.model.num_experts if warm else config.model.top_k)
    try:
        enabled = precision.dtype is not None
        with torch.autocast(device.type, dtype=precision.dtype, enabled=enabled):
            output = model(images)
        loss, _ = total_loss(output, masks, config.loss)
        loss.backward()
    finally:
        # Also where memory ran out half way.
        model.zero_grad(set_to_none=True)


def autocast(setup: Setup) -> torch.autocast:
    """Return the autocast context of the run's precision."""
    return torch.autocast(
        setup.device.type, dtype=setup.precision.dtype, enabled=setup.precision.dtype is not None
    )


def mask_target(batch: Batch) -> torch.Tensor:
    """Return 0/1 float targets (B, 1, H, W) of a batch whose masks are 0/255."""
    return (batch.masks > 127).float()
