"""Small layers shared by the experts and the decoder.

Shape letters: B batch, C channels, H height, W width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of every pixel; independent of batch size and image size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise (B, C, H, W) over C; the shape stays."""
        # In float32, which autocast does by itself only on CUDA: the CPU kernel sums the gradients
        # of weight and bias over all pixels in the input's type, and bf16 loses a tenth of them.
        x_BHWC = x_BCHW.permute(0, 2, 3, 1).float()
        x_BHWC = F.layer_norm(x_BHWC, (x_BHWC.shape[-1],), self.weight, self.bias, eps=1e-6)
        return x_BHWC.permute(0, 3, 1, 2)


def pointwise(channels_in: int, channels_out: int) -> nn.Conv2d:
    """Return a 1x1 convolution: mixes channels, pixel by pixel."""
    return nn.Conv2d(channels_in, channels_out, 1)


class Depthwise(nn.Conv2d):
    """Per-channel convolution that keeps the size.

    On a CPU two forms have no fast kernel for their gradients. A dilated filter runs on the maps of
    every d-th row and column instead, where it has no gaps, and a row filter on rows laid down as
    columns. Forward and backward pass of 8 x 96 x 40 x 40, one core: 3x3 with dilation 2 or 4 34 ->
    14 to 21 ms, 1x11 23 -> 9 ms, the fixed 5x5 with dilation 2 230 -> 18 ms.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Filter (B, C, H, W); the shape stays."""
        if needs_gradients_on_cpu(x_BCHW):
            height, width = self.weight.shape[-2:]
            smallest = min(x_BCHW.shape[-2:]) // self.dilation[0]
            if self.dilation[0] > 1 and smallest >= max(height, width):
                pad = (height // 2, width // 2)
                return dilated(x_BCHW, self.weight, self.bias, self.dilation[0], pad)
            if height == 1 < width <= x_BCHW.shape[-1]:
                return self._rows(x_BCHW)
        return super().forward(x_BCHW)

    def _rows(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        lines = x_BHWC.reshape(batch * height, width, 1, channels).permute(0, 3, 1, 2)
        pad = (self.weight.shape[-1] // 2, 0)
        y = F.conv2d(lines, self.weight.transpose(2, 3), self.bias, padding=pad, groups=channels)
        y_BHWC = y.permute(0, 2, 3, 1).reshape(batch, height, width, channels)
        return y_BHWC.permute(0, 3, 1, 2)


def depthwise(channels: int, kernel: int | tuple[int, int] = 3, *, dilation: int = 1) -> nn.Conv2d:
    """Return a per-channel convolution that keeps the size; odd kernels."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2 * dilation, width // 2 * dilation)
    return Depthwise(
        channels, channels, (height, width), padding=padding, dilation=dilation, groups=channels
    )


def needs_gradients_on_cpu(x: Tensor) -> bool:
    """Return whether oneDNN will compute gradients; its forward kernels are fast in all forms."""
    return x.device.type == "cpu" and torch.is_grad_enabled()


def dilated(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, pad: tuple[int, int]
) -> Tensor:
    """Apply a dilated per-channel filter as one without gaps, to every d-th row and column.

    Args:
        x_BCHW: maps.
        weight, bias: of the filter.
        dilation: d.
        pad: zeros at the top and bottom, left and right, in units of d.
    """
    batch, channels, height, width = x_BCHW.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    extra = (columns * dilation - width, rows * dilation - height)
    if any(extra):
        # Zeros at the end: the filter meets them where it would meet the border's.
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, extra[0], 0, extra[1]))
    phases = x_BHWC.reshape(batch, rows, dilation, columns, dilation, channels)
    phases = phases.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows, columns, channels)
    y = F.conv2d(phases.permute(0, 3, 1, 2), weight, bias, padding=pad, groups=channels)
    rows, columns = y.shape[-2:]
    y = y.permute(0, 2, 3, 1).reshape(batch, dilation, dilation, rows, columns, channels)
    y = y.permute(0, 3, 1, 4, 2, 5).reshape(batch, rows * dilation, columns * dilation, channels)
    lost = [(size // 2 - p) * 2 * dilation for size, p in zip(weight.shape[-2:], pad, strict=True)]
    return y[:, : height - lost[0], : width - lost[1]].permute(0, 3, 1, 2)


def mix(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return pointwise convolution, norm and activation."""
    return nn.Sequential(pointwise(channels_in, channels_out), LayerNorm2d(channels_out), nn.GELU())


def fixed_depthwise(x_BCHW: Tensor, kernel_hw: Tensor, *, dilation: int = 1) -> Tensor:
    """Filter every channel with one fixed kernel (h, w), replicating the border.

    Replicated, not zero: a zero border would look like an outline all around the image.
    """
    pad_y, pad_x = (size // 2 * dilation for size in kernel_hw.shape)
    padded = F.pad(x_BCHW, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    return fixed_inside(padded, kernel_hw, dilation=dilation)


def fixed_inside(x_BCHW: Tensor, kernel_hw: Tensor, *, dilation: int = 1) -> Tensor:
    """Filter every channel with one fixed kernel (h, w) where it lies within the map."""
    channels = x_BCHW.shape[1]
    kernel = kernel_hw.to(x_BCHW.dtype).expand(channels, 1, *kernel_hw.shape)
    if dilation > 1 and needs_gradients_on_cpu(x_BCHW):
        smallest = min(x_BCHW.shape[-2:]) // dilation
        if smallest >= max(kernel_hw.shape):
            return dilated(x_BCHW, kernel, None, dilation, (0, 0))
    return F.conv2d(x_BCHW, kernel, groups=channels, dilation=dilation)


def local_mean(x_BCHW: Tensor, size: int) -> Tensor:
    """Return the mean over a size x size window (odd), counting only pixels inside the image."""
    half = size // 2
    rows = F.avg_pool2d(x_BCHW, (size, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, size), 1, (0, half), count_include_pad=False)


def cell_means(x_BCHW: Tensor, grid: int) -> Tensor:
    """Return the means (B, C, grid, grid) over the cells of ``F.adaptive_avg_pool2d``.

    An exported graph holds it as two products with matrices that follow the size of the map;
    ``adaptive_avg_pool2d`` it holds for one size, and is silently wrong at all others.
    """
    if not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x_BCHW, grid)
    rows_GH, columns_GW = (cell_shares(side, grid, x_BCHW) for side in x_BCHW.shape[-2:])
    return rows_GH @ x_BCHW @ columns_GW.t()


def cell_shares(side: int, grid: int, like: Tensor) -> Tensor:
    """Return the share of every pixel of a side in the mean of every cell, (grid, side).

    Cell i reaches from floor(i * side / grid) to ceil((i + 1) * side / grid), exclusive; cells
    overlap where the side is not divisible.
    """
    pixel = torch.arange(side, device=like.device)
    cell = torch.arange(grid, device=like.device)[:, None]
    start = (cell * side) // grid
    end = ((cell + 1) * side + grid - 1) // grid
    inside = ((pixel >= start) & (pixel < end)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def resize(x_BCHW: Tensor, size_hw: tuple[int, int] | torch.Size) -> Tensor:
    """Resize bilinearly to (H, W), pixel centres aligned (align_corners=False)."""
    # An exported graph leaves the sizes open: to compare them would fix it to one case.
    if not torch.compiler.is_exporting() and tuple(x_BCHW.shape[-2:]) == tuple(size_hw):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size_hw), mode="bilinear", align_corners=False)
