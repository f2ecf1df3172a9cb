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


def depthwise(channels: int, kernel: int | tuple[int, int] = 3, *, dilation: int = 1) -> nn.Conv2d:
    """Return a per-channel convolution that keeps the size; odd kernels."""
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2 * dilation, width // 2 * dilation)
    return nn.Conv2d(
        channels, channels, (height, width), padding=padding, dilation=dilation, groups=channels
    )


def mix(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return pointwise convolution, norm and activation."""
    return nn.Sequential(pointwise(channels_in, channels_out), LayerNorm2d(channels_out), nn.GELU())


def fixed_depthwise(x_BCHW: Tensor, kernel_hw: Tensor, *, dilation: int = 1) -> Tensor:
    """Filter every channel with one fixed kernel (h, w), replicating the border.

    Replicated, not zero: a zero border would look like an outline all around the image.
    """
    channels = x_BCHW.shape[1]
    height, width = kernel_hw.shape
    pad_y, pad_x = height // 2 * dilation, width // 2 * dilation
    padded = F.pad(x_BCHW, (pad_x, pad_x, pad_y, pad_y), mode="replicate")
    kernel = kernel_hw.to(x_BCHW.dtype).expand(channels, 1, height, width)
    return F.conv2d(padded, kernel, groups=channels, dilation=dilation)


def local_mean(x_BCHW: Tensor, size: int) -> Tensor:
    """Return the mean over a size x size window (odd), counting only pixels inside the image."""
    half = size // 2
    rows = F.avg_pool2d(x_BCHW, (size, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, size), 1, (0, half), count_include_pad=False)


def resize(x_BCHW: Tensor, size_hw: tuple[int, int] | torch.Size) -> Tensor:
    """Resize bilinearly to (H, W), pixel centres aligned (align_corners=False)."""
    if tuple(x_BCHW.shape[-2:]) == tuple(size_hw):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size_hw), mode="bilinear", align_corners=False)
