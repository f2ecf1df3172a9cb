"""The plan of a run (stages, epochs, steps) and its schedules as pure functions of the step.

There is no scheduler object to save: the learning rate of step n is ``lr_at(plan, config, n)``,
before and after a resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from camoxpert.config import OptimConfig, QuickConfig, TrainConfig

OVERFIT_STEPS = 50
"""Optimizer steps of an epoch that learns batches by heart."""
SLOWEST_WARMUP = 5.0
"""Epochs of warm-up with 32 times the batch that a rate was meant for (Goyal et al., 2017)."""


@dataclass(frozen=True)
class Stage:
    """Consecutive epochs with one set of trained parameters.

    Attributes:
        number: 1 (decoder only) or 2 (everything).
        first_epoch, epochs: position and length.
        first_step: optimizer step at which it begins.
        batch_size: images per micro-batch.
        batches: micro-batches per epoch.
        steps: optimizer steps per epoch; the last window of an epoch may be short.
        lr: peak learning rate of the decoder.
        warmup_epochs: of a scaled rate; None: as the settings say.
    """

    number: int
    first_epoch: int
    epochs: int
    first_step: int
    batch_size: int
    batches: int
    steps: int
    lr: float
    warmup_epochs: float | None = None

    @property
    def last_epoch(self) -> int:
        """First epoch after the stage."""
        return self.first_epoch + self.epochs


@dataclass(frozen=True)
class Plan:
    """All stages of a run in order."""

    stages: tuple[Stage, ...]

    @property
    def epochs(self) -> int:
        """Epochs of all stages."""
        return self.stages[-1].last_epoch

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        last = self.stages[-1]
        return last.first_step + last.epochs * last.steps

    def progress(self, step: int) -> float:
        """Return the share of the run that is done before optimizer step ``step`` (from 0)."""
        return min(step / max(self.steps, 1), 1.0)

    def stage_of_epoch(self, epoch: int) -> Stage:
        """Return the stage that ``epoch`` (from 0) belongs to, the last one behind its end: a run
        may have done more epochs than it is to have now."""
        return next((one for one in self.stages if epoch < one.last_epoch), self.stages[-1])

    def step_of(self, epoch: int, done: int) -> int:
        """Return the optimizer step that follows ``done`` steps of an epoch."""
        stage = self.stage_of_epoch(epoch)
        return stage.first_step + (epoch - stage.first_epoch) * stage.steps + done

    def stage_of_step(self, step: int) -> Stage:
        """Return the stage that optimizer step ``step`` (from 0) belongs to."""
        for stage in self.stages:
            if step < stage.first_step + stage.epochs * stage.steps:
                return stage
        return self.stages[-1]


def make_plan(
    train: TrainConfig,
    optim: OptimConfig,
    *,
    num_images: int,
    batch_size: int | None = None,
    accumulation_steps: int | None = None,
    stage2_batch_size: int | None = None,
    processes: int = 1,
) -> Plan:
    """Return the stages and steps for ``num_images`` training images of one process.

    The rate and the epochs of stage 1 must be set: see ``recipe``.

    ``batch_size``, ``accumulation_steps`` and ``stage2_batch_size`` replace those of the settings.
    ``processes`` take a step together: with ``--scale-lr`` the rate is that of all their images.
    """
    chosen = batch_size or train.batch_size
    accumulation = accumulation_steps or train.accumulation_steps
    if chosen is None:
        raise ValueError("The micro-batch must be chosen before the plan is made.")
    if optim.lr is None or train.stage1_epochs is None:
        raise ValueError("The recipe must be chosen before the plan is made.")
    first = train.stage1_epochs
    stages: list[Stage] = []
    wanted = (
        (1, first, chosen, optim.lr),
        (2, train.epochs - first, stage2_batch_size or train.stage2_batch_size, optim.stage2_lr),
    )
    epoch = step = 0
    for number, epochs, asked, lr in wanted:
        if not epochs:
            continue
        batch = asked or chosen
        batches = epoch_batches(train.quick, math.ceil(num_images / batch), accumulation)
        steps = math.ceil(batches / accumulation)
        rate, warmup = scaled_rate(optim, lr if lr else optim.lr, batch * accumulation * processes)
        stages.append(Stage(number, epoch, epochs, step, batch, batches, steps, rate, warmup))
        epoch, step = epoch + epochs, step + epochs * steps
    return Plan(tuple(stages))


def epoch_batches(quick: QuickConfig, batches: int, accumulation: int) -> int:
    """Return the micro-batches of an epoch where a whole run has ``batches``.

    What is learned by heart is repeated: an epoch of one batch would be validated and saved after
    every step.
    """
    if quick.overfit_batches is not None:
        return batches * math.ceil(OVERFIT_STEPS * accumulation / batches)
    return min(batches, quick.limit_batches or batches)


def scaled_rate(optim: OptimConfig, lr: float, images: int) -> tuple[float, float | None]:
    """Return the peak rate of steps of so many images, and its epochs of warm-up.

    A rate that is raised needs a longer warm-up: one epoch for each doubling, at most five, which
    is what Goyal et al. (2017) took for 32 times the batch. A number of epochs that was set is
    kept; None is that of the settings.
    """
    if optim.scale_lr == "none":
        return lr, None
    factor = images / optim.base_batch
    if optim.scale_lr == "sqrt":
        factor = math.sqrt(factor)
    usual = OptimConfig().warmup_epochs
    needed = min(max(math.log2(factor), 0.0), SLOWEST_WARMUP)
    chosen = optim.warmup_epochs == usual and needed > usual
    return lr * factor, needed if chosen else None


def decay_factor(scheduler: str, progress: float) -> float:
    """Return how much of the peak is left, 1 at ``progress`` 0; see ``config.SCHEDULERS``.

    ``step`` is x0.1 at one half and at three quarters; ``poly`` has power 0.9 (PraNet, PFNet);
    ``onecycle`` is a cosine after a longer warm-up (see ``lr_at``).
    """
    progress = min(max(progress, 0.0), 1.0)
    if scheduler in ("cosine", "onecycle"):
        return 0.5 * (1 + math.cos(math.pi * progress))
    if scheduler == "poly":
        return math.pow(1 - progress, 0.9)
    if scheduler == "linear":
        return 1 - progress
    if scheduler == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0


def lr_at(plan: Plan, config: OptimConfig, step: int) -> float:
    """Return the decoder's learning rate at an optimizer step: warm-up, peak, decay to
    ``min_lr``."""
    stage = plan.stage_of_step(step)
    total = stage.epochs * stage.steps
    done = step - stage.first_step
    epochs = config.warmup_epochs if stage.warmup_epochs is None else stage.warmup_epochs
    warmup = min(epochs * stage.steps, total / 2)
    if config.scheduler == "onecycle":
        # The warm-up of OneCycle (Smith and Topin, 2018) takes 30 % of the steps.
        warmup = max(warmup, 0.3 * total)
    if done < warmup:
        return stage.lr * (done + 1) / (math.floor(warmup) + 1)
    progress = (done - warmup) / max(total - warmup, 1)
    return config.min_lr + (stage.lr - config.min_lr) * decay_factor(config.scheduler, progress)
