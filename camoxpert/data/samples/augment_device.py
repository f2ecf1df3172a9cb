"""Augment a whole batch on its device: one warp, one colour change, blur and noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from camoxpert.data.files.labels import VOID
from camoxpert.data.samples.draw import BLUR_RADIUS, GREY, Draw, gaussian_kernel, linear_colour
from camoxpert.runtime.device import upload


def apply_draws(
    pixels_BHWC: Tensor, draws: Sequence[Draw], target: int, *, void: bool = False
) -> tuple[Tensor, Tensor]:
    """Augment a batch.

    Nothing here waits for the device: choices that depend on a draw are made on the host.
    Corruptions are not made here: samples that may have them are augmented on the CPU.

    Args:
        pixels_BHWC: uint8 (B, S, S, 4), RGB and the mask (0, VOID or 255).
        draws: one per image, made for S and ``target``.
        target: side of the result.
        void: some mask may have void pixels. The host knows: looking would wait for the device.

    Returns:
        images uint8 (B, 3, T, T), masks uint8 (B, 1, T, T) of 0, VOID and 255.
    """
    assert not any(sample.corruption for sample in draws), "corruptions are made on the CPU"
    planes = pixels_BHWC.permute(0, 3, 1, 2)
    flips = [sample.flips for sample in draws]
    if all(flip is not None for flip in flips):
        planes = _flip(planes, flips)
        images, masks = planes[:, :3].float(), planes[:, 3:]
    else:
        matrices = [sample.matrix for sample in draws]
        if void:
            images, masks = _warp_with_void(planes, matrices, target)
        else:
            warped = warp(planes.float(), matrices, target)
            images, masks = warped[:, :3], (warped[:, 3:] > 127.5).to(torch.uint8) * 255
    images = _colour(images, draws)
    images = _blur(images, draws)
    images = _noise(images, draws)
    return images.round().clamp(0, 255).to(torch.uint8), masks.contiguous()


def move_maps(maps_BHW: Tensor, draws: Sequence[Draw], target: int) -> Tensor:
    """Apply the geometry of a batch's draws alone to soft maps; their values stay soft.

    Args:
        maps_BHW: uint8 (B, S, S).
        draws, target: see ``apply_draws``.

    Returns:
        uint8 (B, 1, T, T).
    """
    planes = maps_BHW[:, None]
    flips = [sample.flips for sample in draws]
    if all(flip is not None for flip in flips):
        return _flip(planes, flips).contiguous()
    moved = warp(planes.float(), [sample.matrix for sample in draws], target)
    return moved.round().clamp(0, 255).to(torch.uint8)


def move_planes(planes_BHWM: Tensor, draws: Sequence[Draw], target: int) -> Tensor:
    """Apply the geometry of a batch's draws alone to the planes of modalities.

    Args:
        planes_BHWM: uint8 (B, S, S, M), 0 where nothing is known, which does not blend.
        draws, target: see ``apply_draws``.

    Returns:
        uint8 (B, M, T, T).
    """
    planes = planes_BHWM.permute(0, 3, 1, 2)
    flips = [sample.flips for sample in draws]
    if all(flip is not None for flip in flips):
        return _flip(planes, flips).contiguous()
    number = planes.shape[1]
    both = torch.cat([planes.float(), (planes > 0).float()], 1)
    moved = warp(both, [sample.matrix for sample in draws], target)
    total, share = moved[:, :number], moved[:, number:]
    means = (total / share.clamp_min(1e-6)).round().clamp(1, 255)
    return means.masked_fill(share < 0.5, 0).to(torch.uint8)


def _warp_with_void(
    planes_BCHW: Tensor, matrices: Sequence[np.ndarray], target: int
) -> tuple[Tensor, Tensor]:
    """Warp images and masks; objects and void are resampled apart, as ``join_void`` describes."""
    mask_B1HW = planes_BCHW[:, 3:]
    parts = [planes_BCHW[:, :3], (mask_B1HW == 255) * 255.0, (mask_B1HW == VOID) * 255.0]
    warped = warp(torch.cat([part.float() for part in parts], 1), matrices, target)
    objects, void = warped[:, 3:4], warped[:, 4:]
    masks = (2 * objects + void > 255).to(torch.uint8) * 255
    return warped[:, :3], masks.masked_fill(void > 127.5, VOID)


def warp(planes_BCHW: Tensor, matrices: Sequence[np.ndarray], target: int) -> Tensor:
    """Resample bilinearly, with OpenCV's BORDER_REFLECT_101.

    Beyond the edge the image is mirrored without repeating its last pixel.

    Args:
        planes_BCHW: float (B, C, S, S).
        matrices: (2, 3) maps of source pixels to target pixels.
        target: side of the result.
    """
    source = planes_BCHW.shape[-1]
    back = np.stack([np.linalg.inv(np.vstack([m, [0, 0, 1]]))[:2] for m in matrices])
    # Pixel i of n is at 2i / (n - 1) - 1 (align_corners).
    half_target, half_source = (target - 1) / 2, (source - 1) / 2
    linear = back[:, :, :2] * half_target
    offset = back[:, :, 2:] + back[:, :, :2].sum(2, keepdims=True) * half_target
    theta = np.concatenate([linear, offset], 2) / half_source
    theta[:, :, 2] -= 1
    on_device = upload(theta, planes_BCHW)
    grid = F.affine_grid(on_device, [len(matrices), 1, target, target], align_corners=True)
    return F.grid_sample(planes_BCHW, grid, padding_mode="reflection", align_corners=True)


def _flip(planes_BCHW: Tensor, flips: Sequence[tuple[bool, bool] | None]) -> Tensor:
    """Flip without resampling, so that flips alone change no pixel."""
    for axis, dim in ((0, 3), (1, 2)):
        chosen = [i for i, flip in enumerate(flips) if flip is not None and flip[axis]]
        if chosen:
            where = upload(np.array([i in chosen for i in range(len(flips))]), planes_BCHW) > 0
            planes_BCHW = torch.where(
                where[:, None, None, None], planes_BCHW.flip(dim), planes_BCHW
            )
    return planes_BCHW


def _colour(images_BCHW: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Apply brightness, contrast and saturation as one product with RGB, then turn the hue."""
    if not any(sample.colour for sample in draws):
        return images_BCHW
    matrices, pivots = zip(*(linear_colour(sample) for sample in draws), strict=True)
    numbers = upload(np.column_stack([np.reshape(matrices, (-1, 9)), pivots]), images_BCHW)
    mean_grey = images_BCHW.mean((2, 3)) @ upload(GREY, images_BCHW)
    offset = numbers[:, 9] * mean_grey
    batch, channels, height, width = images_BCHW.shape
    changed = torch.baddbmm(
        offset[:, None, None],
        numbers[:, :9].reshape(batch, 3, 3),
        images_BCHW.reshape(batch, channels, height * width),
    )
    changed = changed.clamp(0, 255).reshape(batch, channels, height, width)
    shifts = np.array([sample.hue for sample in draws])
    return turn_hue(changed, upload(shifts, images_BCHW)) if shifts.any() else changed


def turn_hue(images_BCHW: Tensor, shift_B: Tensor) -> Tensor:
    """Turn the hue of RGB images by fractions of the circle; keep value and saturation (HSV)."""
    value, strongest = images_BCHW.max(1)
    chroma = value - images_BCHW.amin(1)
    red, green, blue = images_BCHW.unbind(1)
    # Position of the colour in its sextant, and the number of the sextant.
    between = torch.stack([green - blue, blue - red, red - green], 1)
    position = between.gather(1, strongest[:, None])[:, 0] / chroma.clamp(min=1e-6)
    sextant = 2 * strongest + position + 6 * shift_B[:, None, None]
    channels = [(n + sextant) % 6 for n in (5, 3, 1)]
    lowered = [torch.minimum(k, 4 - k).clamp(0, 1) * chroma for k in channels]
    return value[:, None] - torch.stack(lowered, 1)


def _blur(images_BCHW: Tensor, draws: Sequence[Draw]) -> Tensor:
    chosen = [i for i, sample in enumerate(draws) if sample.blur]
    if not chosen:
        return images_BCHW
    sigmas = np.array([draws[i].blur for i in chosen])
    weights = upload(gaussian_kernel(sigmas[:, None]), images_BCHW)
    rows = torch.cat([images_BCHW[i : i + 1] for i in chosen], 1)
    per_channel = weights.repeat_interleave(3, 0)[:, None]
    pad = BLUR_RADIUS
    rows = F.pad(rows, (pad, pad, pad, pad), mode="reflect")
    rows = F.conv2d(rows, per_channel[:, :, None], groups=rows.shape[1])
    rows = F.conv2d(rows, per_channel[:, :, :, None], groups=rows.shape[1])
    return _replaced(images_BCHW, chosen, rows.chunk(len(chosen), 1))


def _noise(images_BCHW: Tensor, draws: Sequence[Draw]) -> Tensor:
    chosen = [i for i, sample in enumerate(draws) if sample.noise]
    if not chosen:
        return images_BCHW
    parts = [
        images_BCHW[i : i + 1]
        + 255 * draws[i].noise * gaussian_noise(images_BCHW[i : i + 1], draws[i].noise_seed)
        for i in chosen
    ]
    return _replaced(images_BCHW, chosen, parts)


def gaussian_noise(like: Tensor, seed: int) -> Tensor:
    """Return standard normal numbers of a tensor's shape, a pure function of seed and position.

    A counter is hashed (the finaliser of MurmurHash3, 32 bits) and transformed by Box and Muller's
    rule: there is no generator state that a resumed run or another batch size could change.
    """
    counter = torch.arange(like.numel(), device=like.device, dtype=torch.int64)
    first = _hashed(counter * 2 + seed * 0x9E3779B1)
    second = _hashed(counter * 2 + 1 + seed * 0x9E3779B1)
    radius = torch.sqrt(-2 * torch.log((first.float() + 1) / 2**32))
    angle = second.float() * (2 * torch.pi / 2**32)
    return (radius * torch.cos(angle)).to(like.dtype).reshape(like.shape)


def _hashed(x: Tensor) -> Tensor:
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)


def _replaced(images_BCHW: Tensor, chosen: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    rows = list(images_BCHW.chunk(len(images_BCHW)))
    for i, part in zip(chosen, parts, strict=True):
        rows[i] = part
    return torch.cat(rows)
