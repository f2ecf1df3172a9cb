"""Everything decided before the first step: data, device, precision, model, optimizer, plan.

Each decision is one line for the user, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from camoxpert.config import Config
from camoxpert.data.augment import SampleTransform
from camoxpert.data.loader import Batch, Loader, build_loader, choose_num_workers
from camoxpert.data.manifest import (
    Manifest,
    find_test_sets,
    load_train,
    require_readable,
    split_validation,
)
from camoxpert.losses import total_loss
from camoxpert.models.build import build_model
from camoxpert.models.camoxpert import CamoXpert
from camoxpert.training.ema import ModelEma
from camoxpert.training.memory import choose_checkpointing
from camoxpert.training.meters import StepCounts
from camoxpert.training.optim import (
    Plan,
    backbone_scale,
    build_optimizer,
    make_plan,
    stage1_epochs,
)
from camoxpert.training.precision import (
    Precision,
    check_architecture,
    choose_device,
    choose_precision,
    set_tf32,
)

Say = Callable[[str], None]


@dataclass
class Data:
    """The data of a run.

    Attributes:
        train, validation: parts of TRAIN; test sets never choose anything.
        tests: test sets found beside the training data, by name; scored once, at the end.
        data_hash: content hash of train and validation together.
        num_workers: data worker processes.
    """

    train: Manifest
    validation: Manifest
    tests: dict[str, Manifest]
    data_hash: str
    num_workers: int


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
    decisions: list[str]
    parameters: int
    gmacs: float
    step_counts: StepCounts = field(default_factory=StepCounts)
    # Parts that every micro-batch is taken in, since the device ran out of memory.
    split: int = 1

    @property
    def evaluated_model(self) -> CamoXpert:
        """The model that validation scores: the EMA where there is one."""
        if self.ema is None:
            return self.model
        assert isinstance(self.ema.module, CamoXpert)
        return self.ema.module


def load_data(config: Config, say: Say) -> Data:
    """Find, pair, check and split the data; raises DataError for anything wrong with it."""
    data = config.data
    whole = load_train(data.roots, layout=data.layout, noncam=data.noncam)
    require_readable(whole, max_pixels=data.max_pixels)
    train, validation = split_validation(whole, data.val_fraction, config.train.seed)
    tests = find_test_sets(data.roots, layout=data.layout, noncam=data.noncam)
    workers, reason = choose_num_workers(data.num_workers)
    say(
        f"data        {len(train)} training and {len(validation)} validation images "
        f"({whole.layout}), validation carved from TRAIN"
    )
    for note in whole.notes:
        say(f"            {note}")
    sizes = ", ".join(f"{name} {len(test)}" for name, test in tests.items())
    say(f"test sets   {sizes or 'none found'}; they choose nothing and are scored at the end")
    say(f"workers     {workers}: {reason}")
    return Data(train, validation, tests, whole.content_hash(), workers)


def prepare(config: Config, say: Say) -> Setup:
    """Decide and build everything a run needs."""
    decisions: list[str] = []

    def decide(text: str) -> None:
        decisions.append(text)
        say(text)

    device = choose_device(config.train.device)
    check_architecture(device)
    data = load_data(config, decide)
    precision = choose_precision(config.train, device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    decide(f"device      {device} ({name})")
    tf32 = set_tf32(config.train.tf32, device)
    decide(f"precision   {precision.reason}; TF32 {tf32}")

    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device)
    has_weights = bool(config.model.weights) or config.model.pretrained
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moe = model.moe_levels[0]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    gmacs = forward_gmacs(model, config.data.img_size)
    decide(
        f"model       {config.model.backbone}, {size:.2f} M parameters, {gmacs:.2f} GMACs an "
        f"image; "
        f"{config.model.num_experts} experts, "
        f"top {config.model.top_k}, dispatch {moe.dispatch}"
    )
    plan = make_plan(
        config.train, config.optim, num_images=len(data.train), has_weights=has_weights
    )
    scale = backbone_scale(config.optim, has_weights=has_weights)
    first, why = stage1_epochs(config.train, has_weights=has_weights)
    decide(
        f"plan        {plan.epochs} epochs, {plan.steps} optimizer steps; stage 1 {first} epochs "
        f"({why}); "
        f"backbone at {scale:g}x the learning rate"
    )
    routers = [(moe.router, config.optim.router_lr_scale) for moe in model.moe_levels]
    optimizer = build_optimizer(model, config.optim, scales=[(model.backbone, scale), *routers])
    ema = ModelEma(model, config.train.ema_decay) if config.train.use_ema else None
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
        decisions=decisions,
        parameters=sum(p.numel() for p in model.parameters()),
        gmacs=gmacs,
    )
    _, reason = choose_checkpointing(
        config.train.gradient_checkpointing,
        device,
        enable=model.set_gradient_checkpointing,
        trial_step=lambda: trial_step(setup),
    )
    decide(f"checkpoint  gradient checkpointing {reason}")
    if config.train.compile:
        decide(f"compile     {compile_model(model)}, static shapes; the first steps take minutes")
    return setup


def compile_model(model: CamoXpert) -> str:
    """Compile what compiles as one graph, in place and without new parameter names.

    Like experts with gathered weights are one program for any routing, so the whole network is one
    graph. Otherwise only the backbone is: reading the counts breaks the decoder's graph. Static
    shapes: block by block with dynamic shapes crashes Inductor on EdgeNeXt.

    Returns:
        What was compiled, in words.
    """
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


def training_loader(setup: Setup, batch_size: int) -> Loader:
    """Build the training loader for one stage's batch size."""
    data = setup.config.data
    transform = SampleTransform(
        img_size=data.img_size, augment=data.augment, seed=setup.config.train.seed
    )
    return build_loader(
        setup.data.train,
        transform,
        batch_size=batch_size,
        num_workers=setup.data.num_workers,
        shuffle=True,
        seed=setup.config.train.seed,
        drop_last=False,
        persistent_workers=data.persistent_workers,
        prefetch_factor=data.prefetch_factor,
        pin_memory=data.pin_memory and setup.device.type == "cuda",
        max_pixels=data.max_pixels,
    )


def trial_step(setup: Setup) -> None:
    """Run one forward and backward pass on made-up images of the largest micro-batch."""
    batch_size = max(stage.batch_size for stage in setup.plan.stages)
    size = setup.config.data.img_size
    images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=setup.device)
    masks = torch.zeros(batch_size, 1, size, size, device=setup.device)
    setup.model.train()
    # The first epochs may use all experts: that is the step that has to fit.
    warm = setup.config.train.router_warmup > 0
    setup.model.set_active_experts(
        setup.config.model.num_experts if warm else setup.config.model.top_k
    )
    with autocast(setup):
        output = setup.model(images)
    loss, _ = total_loss(output, masks, setup.config.loss)
    loss.backward()
    setup.optimizer.zero_grad(set_to_none=True)


def autocast(setup: Setup) -> torch.autocast:
    """Return the autocast context of the run's precision."""
    return torch.autocast(
        setup.device.type, dtype=setup.precision.dtype, enabled=setup.precision.dtype is not None
    )


def mask_target(batch: Batch) -> torch.Tensor:
    """Return 0/1 float targets (B, 1, H, W) of a batch whose masks are 0/255."""
    return (batch.masks > 127).float()
