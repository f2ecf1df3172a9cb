"""``benchmark train``: the whole training step against the bare backbone's, and the decoder against
the same decoder with one expert of equal active work; all variants take turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from camoxpert.benchmark.common import heading, interleaved, milliseconds, paired_ratio
from camoxpert.benchmark.moe import device_name
from camoxpert.config import Config
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.profile.syncs import SyncCounter
from camoxpert.training.ema import ModelEma
from camoxpert.training.optim import build_optimizer


class Step:
    """A model with everything its training step needs, on made-up images.

    The step is that of the trainer: forward under autocast, losses in float32, backward, clipping,
    fused optimizer, EMA.
    """

    def __init__(
        self, config: Config, batch_size: int, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        torch.manual_seed(0)
        self.config, self.device, self.dtype = config, device, dtype
        self.model: CamoXpert = build_model(config.model).to(device).train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.ema = ModelEma(self.model, 0.999)
        size = config.data.img_size
        self.images = torch.randint(
            0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=device
        )
        self.masks = (torch.rand(batch_size, 1, size, size, device=device) > 0.7).float()

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the benchmark's precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def full(self) -> None:
        """Take one whole training step."""
        with self.autocast():
            output = self.model(self.images)
        loss, _ = total_loss(output, self.masks, self.config.loss)
        loss.backward()
        self._finish(self.model)
        self.ema.update(self.model, torch.ones((), device=self.device))

    def backbone(self) -> None:
        """Take the backbone's step alone: forward, a trivial loss, backward, clipping,
        optimizer."""
        images = self.images.float() / 255
        with self.autocast():
            maps = self.model.backbone(images)
        torch.stack([m.float().mean() for m in maps]).sum().backward()
        self._finish(self.model.backbone)

    def decoder(self) -> Callable[[], None]:
        """Return the decoder's forward and backward pass on fixed features."""
        images = self.images.float() / 255
        with torch.no_grad(), self.autocast():
            features = [m.detach() for m in self.model.backbone(images)]

        def step() -> None:
            with self.autocast():
                logits, sides, _ = self.model.decoder(images, features)
            total = logits.float().square().mean()
            (total + sum(side.float().square().mean() for side in sides)).backward()
            self.model.zero_grad(set_to_none=True)
            self.wait()

        return step

    def _finish(self, part: nn.Module) -> None:
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.wait()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def run(
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    batch_size: int,
    rounds: int = 7,
    with_loop: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure; return the content of the JSON file.

    Args:
        config: model and image size.
        device: where.
        dtype: of the forward pass; None is float32.
        batch_size: images per step.
        rounds: timed rounds, interleaved.
        with_loop: also time the per-image loop, which takes long on a GPU.
        say: prints a line.
    """
    model = config.model
    settings = {
        "backbone": model.backbone,
        "img_size": config.data.img_size,
        "batch_size": batch_size,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "width": model.width,
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "rounds": rounds,
        "device": device_name(device),
    }
    result = heading("train", settings)

    def variant(**changes: Any) -> Step:
        changed = dataclasses.replace(config, model=dataclasses.replace(model, **changes))
        return Step(changed, batch_size, device, dtype)

    ours = variant()
    variants = {
        "full step": ours.full,
        "backbone alone": ours.backbone,
        "full step, uniform experts": variant(expert_family="uniform", experts=()).full,
    }
    if with_loop:
        variants["full step, loop"] = variant(dispatch="loop").full
    # One expert for all images, as wide as the k experts of an image together.
    expansion = model.expert_expansion * model.top_k
    kind = (model.experts or ("hybrid",))[:1]
    single = variant(num_experts=1, top_k=1, experts=kind, expert_expansion=expansion)
    same_kind = variant(experts=kind)
    variants["decoder"] = ours.decoder()
    variants[f"decoder, all {kind[0]}"] = same_kind.decoder()
    variants[f"decoder, one {kind[0]} expert"] = single.decoder()
    for call in variants.values():
        call()
    with SyncCounter() as counter:
        ours.full()
    result["syncs_per_step"] = counter.syncs
    seconds = interleaved(variants, rounds=rounds, warmup=2)
    result["milliseconds"] = {name: milliseconds(values) for name, values in seconds.items()}
    say(
        f"{model.backbone}, {config.data.img_size} px, {batch_size} images, "
        f"{settings['precision']}:"
    )
    for name, value in result["milliseconds"].items():
        say(f"  {name:<28} {value:10.2f} ms")
    full = seconds["full step"]
    result["ratios"] = {
        "full step over backbone": paired_ratio(full, seconds["backbone alone"]),
        "uniform full step over backbone": paired_ratio(
            seconds["full step, uniform experts"], seconds["backbone alone"]
        ),
        "decoder over one expert": paired_ratio(
            seconds[f"decoder, all {kind[0]}"], seconds[f"decoder, one {kind[0]} expert"]
        ),
    }
    if with_loop:
        result["ratios"]["loop over full step"] = paired_ratio(seconds["full step, loop"], full)
    for name, ratio in result["ratios"].items():
        say(f"  {name}: {ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
    rate = batch_size / result["milliseconds"]["full step"] * 1e3
    result["images_per_second"] = rate
    say(f"  {rate:.1f} images/s, {result['syncs_per_step']} host syncs in a step")
    if device.type == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return result


def images_per_second(
    config: Config,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    batch_size: int,
    rounds: int,
) -> float:
    """Measure how many images per second the whole training step takes."""
    step = Step(config, batch_size, device, dtype)
    seconds = interleaved({"step": step.full}, rounds=rounds, warmup=2)["step"]
    return 1e3 * batch_size / milliseconds(seconds)
