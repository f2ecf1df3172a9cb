"""Building a run: device, data, precision, model, optimizer, batching and plan, decided in this
order.

Each decision is one printed line with its reason. Only a data cache is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from camoxpert import console, stop
from camoxpert.config import Config
from camoxpert.data.samples.augment import image_sides, training_sides
from camoxpert.errors import ConfigError
from camoxpert.losses import LARGE, SMALL, total_loss
from camoxpert.models.backbone import STRIDES
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.cost import network_cost
from camoxpert.models.regions import grid_of
from camoxpert.runs.folder import recorded_hashes
from camoxpert.runs.identity import TEACHER, file_hashes
from camoxpert.runs.records import RunInfo
from camoxpert.runtime.device import (
    check_architecture,
    choose_device,
    choose_precision,
    device_name,
    set_tf32,
)
from camoxpert.runtime.processes import World
from camoxpert.training.batching import Batching, agree_on_batching
from camoxpert.training.compiling import compile_model
from camoxpert.training.data import find_data
from camoxpert.training.ema import ModelEma
from camoxpert.training.guide import prepare_guide
from camoxpert.training.initial import read_initial, start_from
from camoxpert.training.modalities import decide_modalities
from camoxpert.training.optim import backbone_scale, build_optimizer, lr_scales, starts_with_weights
from camoxpert.training.overfit import Overfit
from camoxpert.training.plan import Plan, make_plan
from camoxpert.training.routing import RoutingMeter, StepCounts
from camoxpert.training.run import Run
from camoxpert.training.split import Split

ROUGH = 8
"""With fewer images the mean and spread of logits are called rough."""


def prepare(
    asked: Config,
    *,
    continued: RunInfo | None = None,
    kept: Split | None = None,
    recipe: Mapping[str, float] | None = None,
    presence: str | None = None,
    restored: bool = False,
    write: bool = True,
    world: World | None = None,
) -> Run:
    """Decide and build everything a run needs; it has no folder yet.

    Args:
        asked: checked settings.
        continued: ``run.json`` of the stopped run that this one will continue; the batching that
            it chose from free memory is kept, so that the same command takes the same steps.
        kept: the split of that run.
        recipe: what that run's preset decided.
        presence: ``on`` or ``off`` as that run has it.
        restored: weights will come from a checkpoint: none are downloaded or read from files.
        write: False does not build a missing data cache.
        world: the processes that train together.

    Raises:
        ConfigError, DataError: settings that do not fit the device or the data.
        Stopped: asked to stop; nothing was trained yet.
    """
    world = world or World()
    files = file_hashes(asked, recorded_hashes(continued or {}))
    device = choose_device(asked.train.device, index=world.local_rank)
    check_architecture(device)
    data = world.in_turn(
        lambda: find_data(
            asked,
            world,
            device=device.type,
            write=write,
            kept=kept,
            recipe=recipe,
            presence=presence,
            teacher=files.get(TEACHER, ""),
        )
    )
    config = data.recipe.config
    world.check_stop()
    on_cuda = device.type == "cuda"
    name = device_name(device) if on_cuda else f"{torch.get_num_threads()} threads"
    console.decide("device", f"{device} ({name})")
    if world.size > 1:
        share = data.images_per_epoch(world.size)
        console.decide(
            "processes",
            f"{world.size}, {world.local_size} on this machine; each sees {share} of the "
            f"{data.images_per_epoch()} training images an epoch",
        )
    precision = choose_precision(config.train, device)
    tf32 = set_tf32(config.train.tf32, device)
    console.decide("precision", f"{precision.reason}; TF32 {tf32}")
    model, gmacs = _build_network(config, device, world, restored=restored)
    world.check_stop()
    # Before the average is made of the model, which then has the same memory.
    guide = prepare_guide(config, data, model, world, write=write)
    has_weights = starts_with_weights(config.model)
    scale = backbone_scale(config.optim, has_weights=has_weights)
    scales = lr_scales(model, config.optim, has_weights=has_weights)
    optimizer = build_optimizer(model, config.optim, scales=scales)
    ema = ModelEma(model, config.train.ema_decay) if config.train.use_ema else None
    before = (continued or {}).get("batch")
    batching = agree_on_batching(config, model, device, precision, before, world)
    world.check_stop()
    console.decide("memory", batching.reason)
    recomputed = model.set_gradient_checkpointing(batching.checkpointing)
    if batching.checkpointing:
        console.decide("checkpoint", f"activations of the {recomputed} are recomputed")
    if config.model.router_norm == "batch" and model.moe_levels:
        console.decide("router", describe_router_norm(config, batching))
    plan = _decide_plan(config, batching, data.images_per_epoch(world.size), scale)
    _decide_loss(config)
    if config.train.compile:
        compiled = compile_model(model, sizes=len(training_sides(config.data)))
        console.decide("compile", f"{compiled}, static shapes; the first steps take minutes")
    return Run(
        asked=asked,
        config=config,
        data=data,
        device=device,
        precision=precision,
        model=model,
        ema=ema,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=precision.scaler),
        plan=plan,
        batching=batching,
        world=world,
        stop=stop.current(),
        meter=RoutingMeter(model.level_names(), model.expert_kinds),
        step_counts=StepCounts(world.sum),
        gmacs=gmacs,
        forward=model,
        loss=total_loss,
        files=files,
        guide=guide,
        overfit=None if config.train.quick.overfit_batches is None else Overfit(),
    )


def _build_network(
    config: Config, device: torch.device, world: World, *, restored: bool
) -> tuple[CamoXpert, float]:
    """Build the network with the same weights on every rank, then seed each rank differently."""
    torch.manual_seed(config.train.seed)
    settings = config.model
    source = None if restored else read_initial(config)
    covered = source is not None and source.config.model.backbone == settings.backbone
    if restored or covered:
        settings = replace(settings, pretrained=False, weights="")
    model = build_model(settings, sides=image_sides(config.data), modalities=config.data.beside_rgb)
    model.config = config.model
    if source is not None:
        start_from(model, source, keep_rgb=config.train.keep_rgb)
    model = model.to(device)
    if not world.first:
        torch.manual_seed(config.train.seed + 1_000_003 * world.rank)
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    gmacs = network_cost(model, config.data.img_size).active / 1e9
    console.decide(
        "model",
        f"{config.model.backbone}, {size:.2f} M parameters, {gmacs:.2f} GMACs an image; "
        f"{model.describe_decoder()}",
    )
    decide_modalities(model, config)
    model.set_expert_dropout(config.train.expert_dropout)
    if config.train.expert_dropout and model.moe_levels:
        console.decide(
            "dropout",
            f"each level hides one expert at random from {config.train.expert_dropout:.0%} of its "
            f"{'regions' if config.model.routing_grid > 1 else 'images'} in training",
        )
    if config.model.routing_grid > 1 and model.moe_levels:
        console.decide("regions", _describe_regions(config))
    return model, gmacs


def describe_router_norm(config: Config, batching: Batching) -> str:
    """Return over how many images (regions) a router standardises the logits of its experts.

    Raises:
        ConfigError: over a single one.
    """
    fewest = min(batching.size, batching.stage2_size or batching.size)
    if fewest == 1 and config.model.routing_grid == 1:
        raise ConfigError(
            "--router-norm batch compares the images of a micro-batch, and here it has one. Take "
            "--batch-size 8 or more, with fewer --accumulation-steps; --gradient-checkpointing "
            "saves memory; or leave --router-norm out."
        )
    cut = "" if config.model.routing_grid == 1 else "regions of the "
    text = f"logits of each expert are standardised over the {cut}{fewest} images of a micro-batch"
    return text + (f"; under {ROUGH} their mean and spread are rough" if fewest < ROUGH else "")


def _decide_loss(config: Config) -> None:
    """Print the parts of the loss that are off by default."""
    loss = config.loss
    if loss.size_balance:
        console.decide(
            "loss",
            f"images whose object covers under {SMALL:.0%} or over {LARGE:.0%} of the pixels have "
            f"{1 + loss.size_balance:g} times the weight of the others; the mean of a step is 1",
        )
    if loss.uncertainty:
        console.decide("loss", f"uncertain pixels cost up to {loss.uncertainty:g}, from 0 at first")


def _describe_regions(config: Config) -> str:
    """Return into how many regions the maps of an image are cut."""
    sides = [config.data.img_size // stride for stride in STRIDES]
    grids = [grid_of(config.model.routing_grid, side, side) for side in sides]
    cut = ", ".join(
        f"stride {stride} in {grid} x {grid}" if grid > 1 else f"stride {stride} whole"
        for stride, grid in zip(STRIDES, grids, strict=True)
    )
    return f"{cut}; each is routed by itself"


def _decide_plan(config: Config, batching: Batching, num_images: int, scale: float) -> Plan:
    plan = make_plan(
        config.train,
        config.optim,
        num_images=num_images,
        batch_size=batching.size,
        accumulation_steps=batching.steps,
        stage2_batch_size=batching.stage2_size,
        processes=batching.processes,
    )
    _say_scaling(config, batching, plan)
    first = config.train.stage1_epochs
    stages = f"stage 1 takes {first} of them" if first else "all of it trains from the start"
    console.decide(
        "plan",
        f"{plan.epochs} epochs, {plan.steps} optimizer steps; {stages}; backbone at {scale:g}x the "
        "learning rate",
    )
    return plan


def _say_scaling(config: Config, batching: Batching, plan: Plan) -> None:
    """Print the rate of each stage where it is scaled, and the warm-up that this takes.

    Raises:
        ConfigError: a scaled rate is below the one at which the schedule ends.
    """
    optim = config.optim
    if optim.scale_lr == "none":
        return
    for stage in plan.stages:
        images = stage.batch_size * batching.steps * batching.processes
        if stage.lr < optim.min_lr:
            raise ConfigError(
                f"--scale-lr {optim.scale_lr}: {images} images per step make --lr {optim.lr:g} "
                f"{stage.lr:g}, which is below --min-lr {optim.min_lr:g}, where the schedule ends. "
                f"Lower --min-lr or raise --lr."
            )
        warmup = optim.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
        place = f"stage {stage.number}: " if len(plan.stages) > 1 else ""
        console.decide(
            "rate",
            f"{place}{optim.lr:g} for {optim.base_batch} images is {stage.lr:.4g} for the {images} "
            f"of a step (--scale-lr {optim.scale_lr}), after {warmup:g} epochs of warm-up",
        )
