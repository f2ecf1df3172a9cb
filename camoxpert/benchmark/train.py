"""``benchmark train``: the whole training step against the bare backbone's, and the decoder against
the same decoder with one expert of equal active work; all variants take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from camoxpert import console, text
from camoxpert.benchmark.common import (
    Ratio,
    Report,
    heading,
    interleaved,
    milliseconds,
    paired_ratio,
    quartiles,
    show_table,
)
from camoxpert.config import Config, ModelConfig
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.cost import decoder_cost
from camoxpert.profile.syncs import SyncCounter
from camoxpert.runtime.device import Precision, device_name, wait_for
from camoxpert.training.ema import ModelEma
from camoxpert.training.optim import build_optimizer, set_lr

FULL, BACKBONE = "full step", "backbone alone"
UNIFORM, LOOP = "full step, uniform experts", "full step, loop"
CHANNELS_LAST = "full step, channels last"
SINGLE = "{}: one {} expert of equal work"


@dataclass(frozen=True)
class Subject:
    """The step that is measured.

    Attributes:
        config: model and image size.
        device: where.
        precision: of the forward pass.
        batch_size: images per step.
    """

    config: Config
    device: torch.device
    precision: Precision
    batch_size: int

    def with_model(self, model: ModelConfig) -> Step:
        """Return the step of another model."""
        return Step(replace(self, config=replace(self.config, model=model)))

    def channels_last(self) -> Step:
        """Return the same step with maps whose channels come last in memory."""
        train = replace(self.config.train, channels_last=True)
        return Step(replace(self, config=replace(self.config, train=train)))


class Step:
    """A model with everything its training step needs, on made-up images.

    The step is that of the trainer: forward under autocast, losses in float32, backward, clipping,
    fused optimizer, EMA.
    """

    def __init__(self, subject: Subject) -> None:
        torch.manual_seed(0)
        config, device, batch_size = subject.config, subject.device, subject.batch_size
        self.config, self.device, self.precision = config, device, subject.precision
        self.model: CamoXpert = (
            build_model(config.model, sides=[config.data.img_size]).to(device).train()
        )
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config.optim)
        # The weights stay, and with them the choices of experts: cuDNN makes new plans for groups
        # of a size it has not seen, seconds that belong to the first steps of a training.
        set_lr(self.optimizer, 0.0)
        self.ema = ModelEma(self.model, 0.999)
        size = config.data.img_size
        self.images = torch.randint(
            0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device
        )
        self.masks = (torch.rand(batch_size, 1, size, size, device=device) > 0.7).float()

    def full(self) -> None:
        """Take one whole training step."""
        with self.precision.autocast(self.device):
            output = self.model(self.images)
        loss, _ = total_loss(output, self.masks, self.config.loss)
        loss.backward()
        self._finish(self.model)
        self.ema.update(self.model, torch.ones((), device=self.device))

    def backbone(self) -> None:
        """Take the step of the backbone alone, with a trivial loss and without EMA."""
        images = self.images.float() / 255
        with self.precision.autocast(self.device):
            maps = self.model.backbone(images)
        torch.stack([m.float().mean() for m in maps]).sum().backward()
        self._finish(self.model.backbone)

    def decoder(self) -> Callable[[], None]:
        """Return the decoder's forward and backward pass on fixed features."""
        images = self.images.float() / 255
        with torch.no_grad(), self.precision.autocast(self.device):
            features = [m.detach() for m in self.model.backbone(images)]

        def step() -> None:
            with self.precision.autocast(self.device):
                logits, sides, _ = self.model.decoder(images, features)
            total = logits.float().square().mean()
            (total + sum(side.float().square().mean() for side in sides)).backward()
            self.model.zero_grad(set_to_none=True)
            wait_for(self.device)

        return step

    def _finish(self, part: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait_for(self.device)


def run(subject: Subject, *, rounds: int = 7, with_loop: bool = True) -> Report:
    """Measure, print, and return the content of the JSON file.

    Args:
        subject: the step.
        rounds: timed rounds, interleaved.
        with_loop: also time the per-image loop, which takes long on a GPU.
    """
    config, model, batch_size = subject.config, subject.config.model, subject.batch_size
    precision = str(subject.precision.dtype or torch.float32).removeprefix("torch.")
    report = heading(
        "train",
        {
            "backbone": model.backbone,
            "img_size": config.data.img_size,
            "batch_size": batch_size,
            "num_experts": model.num_experts,
            "top_k": model.top_k,
            "width": model.width,
            "precision": precision,
            "rounds": rounds,
            "device": device_name(subject.device),
        },
    )
    ours = Step(subject)
    peak = _peak_memory(ours)
    variants = {
        FULL: ours.full,
        BACKBONE: ours.backbone,
        UNIFORM: subject.with_model(replace(model, expert_family="uniform", experts=())).full,
    }
    if not config.train.channels_last:
        variants[CHANNELS_LAST] = subject.channels_last().full
    if with_loop:
        variants[LOOP] = subject.with_model(replace(model, dispatch="loop")).full
    kind = (model.experts or ("hybrid",))[0]
    # The first pair says what the mixture costs, the second what sorting images alone does.
    pairs = {"decoder": model}
    if model.expert_family == "specialist" and {*model.experts} != {kind}:
        pairs[f"decoder, all {kind}"] = replace(model, experts=(kind,))
    macs = {}
    for name, settings in pairs.items():
        single, macs[name] = one_expert_of_equal_work(
            settings, ours.model.backbone.channels, config.data.img_size
        )
        variants[name] = subject.with_model(settings).decoder()
        variants[SINGLE.format(name, kind)] = subject.with_model(single).decoder()
    for call in variants.values():
        call()
    with SyncCounter() as counter:
        ours.full()
    seconds = interleaved(variants, rounds=rounds, warmup=2)
    times = {name: milliseconds(values) for name, values in seconds.items()}
    ratios: dict[str, Ratio] = {
        "full step over backbone": paired_ratio(seconds[FULL], seconds[BACKBONE]),
        "uniform full step over backbone": paired_ratio(seconds[UNIFORM], seconds[BACKBONE]),
    }
    if CHANNELS_LAST in variants:
        ratios["channels last over full step"] = paired_ratio(seconds[CHANNELS_LAST], seconds[FULL])
    for name in pairs:
        ratios[f"{name} over one expert"] = paired_ratio(
            seconds[name], seconds[SINGLE.format(name, kind)]
        )
    if with_loop:
        ratios["loop over full step"] = paired_ratio(seconds[LOOP], seconds[FULL])
    rate = batch_size / times[FULL] * 1e3

    console.say(f"{model.backbone}, {config.data.img_size} px, {batch_size} images, {precision}:")
    show_table([[name, f"{value:.2f} ms"] for name, value in times.items()])
    for name, ratio in ratios.items():
        console.say(f"  {name}: {quartiles(ratio)}")
    for name, share in macs.items():
        console.say(f"  (of {name}, the one expert does {share:.3f} times the multiply-adds)")
    console.say(f"  {rate:.1f} images/s, {text.count(counter.syncs, 'host sync')} in a step")
    report |= {
        "syncs_per_step": counter.syncs,
        "milliseconds": times,
        "ratios": ratios,
        "macs_of_one_expert": macs,
        "images_per_second": rate,
    }
    if peak is not None:
        report["step_peak_memory_bytes"] = peak
    return report


def _peak_memory(step: Step) -> int | None:
    """Return the most memory that the device holds in a step, in bytes; None on a CPU.

    To be called while no other variant has memory there.
    """
    if step.device.type != "cuda":
        return None
    step.full()
    torch.cuda.reset_peak_memory_stats(step.device)
    step.full()
    return torch.cuda.max_memory_allocated(step.device)


def one_expert_of_equal_work(
    model: ModelConfig, channels: Sequence[int], img_size: int, *, all_experts: bool = False
) -> tuple[ModelConfig, float]:
    """Return the decoder with one expert for all images that does the most nearly equal work.

    The width of the one expert is searched for: the work of some kinds does not grow in proportion
    to their width (the gate of ``hybrid`` grows with its square).

    Args:
        model: a decoder; its first expert gives the kind, or ``hybrid`` where all kinds are used.
        channels: of the backbone's levels.
        img_size: in pixels.
        all_experts: equal to the work of all experts instead of those that an image uses.

    Returns:
        The settings, and the multiply-adds of that decoder over those of ``model``.
    """
    cost = decoder_cost(channels, model, img_size)
    target = cost.total if all_experts else cost.active

    def single(hidden: int) -> ModelConfig:
        expansion = hidden / model.width
        return replace(
            model,
            num_experts=1,
            top_k=1,
            expert_family="specialist",
            shared_expert="",
            router_norm="none",
            experts=(model.experts or ("hybrid",))[:1],
            expert_expansion=expansion,
        )

    def work(hidden: int) -> float:
        return decoder_cost(channels, single(hidden), img_size).total

    narrow, wide = 8, 8
    while work(wide) < target:
        narrow, wide = wide, 2 * wide
    while wide - narrow > 8:
        middle = (narrow + wide) // 16 * 8
        narrow, wide = (middle, wide) if work(middle) < target else (narrow, middle)
    nearest = min((narrow, wide), key=lambda hidden: abs(work(hidden) / target - 1))
    return single(nearest), work(nearest) / target


def images_per_second(subject: Subject, *, rounds: int) -> float:
    """Measure how many images per second the whole training step takes."""
    seconds = interleaved({FULL: Step(subject).full}, rounds=rounds, warmup=2)[FULL]
    return 1e3 * subject.batch_size / milliseconds(seconds)
