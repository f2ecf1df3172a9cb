"""The seven specialist experts: each applies another operator to the same features.

Every expert maps (B, C, H, W) to (B, C, H, W), costs time linear in the number of pixels, accepts
any size from 1x1 up and a batch of zero samples: an idle expert still runs, so that every rank of a
distributed run executes the same program. Shape letters: B batch, C width, D hidden width, H
height, W width in pixels, N pixels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.models.layers import (
    LayerNorm2d,
    cell_means,
    depthwise,
    fixed_depthwise,
    fixed_inside,
    local_mean,
    mix,
    pointwise,
    resize,
)


class TextureExpert(nn.Module):
    """Texture statistics: local mean and standard deviation beside multi-scale dilated filters.

    A camouflaged animal copies the colours of its surroundings better than their second-order
    statistics, so the local standard deviation is an input of its own.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = mix(width, hidden)
        self.filters = nn.ModuleList(depthwise(hidden, 3, dilation=d) for d in (1, 2, 4))
        self.statistics = mix(2 * hidden, hidden)
        self.leave = pointwise(hidden, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return texture features, (B, C, H, W)."""
        h = self.enter(x_BCHW)
        mean = local_mean(h, 5)
        # E[(h - mean)^2], not E[h^2] - mean^2: the difference of two big numbers is noise in bf16.
        deviation = (local_mean((h - mean).square(), 5) + 1e-5).sqrt()
        responses = sum(conv(h) for conv in self.filters)
        y: Tensor = self.leave(F.gelu(responses + self.statistics(torch.cat([mean, deviation], 1))))
        return y


class ChannelCosines(nn.Module):
    """The cosines of a head's channels over the pixels, in float32 whatever surrounds it.

    With thousands of pixels bf16 loses the lengths, and fp16 overflows. A module, so that exported
    files of lower precision keep it apart.

    Args:
        heads: groups of channels.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, query_BDHW: Tensor, key_BDHW: Tensor) -> Tensor:
        """Return the cosines of each head's query channels with its key channels, (B, h, D, D).

        The lengths divide the few products, not the maps. Products between heads are computed and
        dropped: views of channels-last maps give one product, heads apart would be copies of the
        maps.
        """
        with torch.autocast(query_BDHW.device.type, enabled=False):
            query_BND, key_BND = (
                maps.float().flatten(2).transpose(1, 2) for maps in (query_BDHW, key_BDHW)
            )
            products = torch.bmm(query_BND.transpose(1, 2), key_BND)
            squares = (maps.square().sum(1).clamp_min(1e-24) for maps in (query_BND, key_BND))
            query_BD, key_BD = (square.rsqrt() for square in squares)
            cosines = products * query_BD[:, :, None] * key_BD[:, None]
            heads = cosines.unflatten(2, (self.heads, -1)).unflatten(1, (self.heads, -1))
            return heads.diagonal(dim1=1, dim2=3).movedim(-1, 1)


class AttentionExpert(nn.Module):
    """Cross-covariance attention: channels attend to channels, so the cost is linear in pixels.

    Source: El-Nouby et al., XCiT, NeurIPS 2021, equation 5, with a depthwise filter on the values.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in (4, 2, 1) if hidden % heads == 0)
        self.norm = LayerNorm2d(width)
        self.project = pointwise(width, 3 * hidden)
        self.local = depthwise(hidden, 3)
        self.cosines = ChannelCosines(self.heads)
        self.temperature = nn.Parameter(torch.ones(self.heads, 1, 1))
        self.leave = pointwise(hidden, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return attended features, (B, C, H, W)."""
        query, key, value = self.project(self.norm(x_BCHW)).chunk(3, dim=1)
        value = value + self.local(value)
        attention_BhDD = (self.cosines(query, key) * self.temperature).softmax(-1)
        # The attention and the last layer are one small matrix per image, so that the pixels meet
        # one product instead of two.
        leave_hDC = self.leave.weight.flatten(1).t().unflatten(0, (self.heads, -1))
        both_BDC = (attention_BhDD.transpose(-1, -2) @ leave_hDC).flatten(1, 2)
        value_BND = value.flatten(2).transpose(1, 2)
        assert self.leave.bias is not None
        y_BNC = torch.baddbmm(self.leave.bias, value_BND, both_BDC)
        return y_BNC.transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class HybridExpert(nn.Module):
    """Local detail and global context: a 3x3 filter beside long row and column strips."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.enter = mix(width, hidden)
        self.local = depthwise(hidden, 3)
        self.row = depthwise(hidden, (1, 11))
        self.column = depthwise(hidden, (11, 1))
        self.gate = pointwise(hidden, hidden)
        self.leave = pointwise(hidden, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return local features gated by their wide surroundings, (B, C, H, W)."""
        h = self.enter(x_BCHW)
        reach = self.column(self.row(h)) + h.mean((2, 3), keepdim=True)
        y: Tensor = self.leave(F.gelu(self.local(h)) * torch.sigmoid(self.gate(reach)) + reach)
        return y


class FrequencyExpert(nn.Module):
    """Low, middle and high bands from fixed binomial low-pass filters, each filtered on its own.

    The bands add up to the input exactly (a Laplacian pyramid without decimation; Burt and Adelson,
    1983). A learned gain per channel and band lets the expert choose a part of the spectrum.
    """

    kernel_hw: Tensor

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
        self.register_buffer("kernel_hw", torch.outer(row, row), persistent=False)
        self.enter = mix(width, hidden)
        self.gain = nn.Parameter(torch.ones(3, hidden, 1, 1))
        self.bands = nn.ModuleList(depthwise(hidden, 3) for _ in range(3))
        self.leave = nn.Sequential(mix(3 * hidden, hidden), pointwise(hidden, width))

    def split(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the (low, middle, high) bands of x; their sum is x."""
        blurred = fixed_depthwise(x_BCHW, self.kernel_hw)
        low = fixed_depthwise(blurred, self.kernel_hw, dilation=2)
        return low, blurred - low, x_BCHW - blurred

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features of the re-weighted bands, (B, C, H, W)."""
        bands = self.split(self.enter(x_BCHW))
        weighted = [
            conv(band * gain) for conv, band, gain in zip(self.bands, bands, self.gain, strict=True)
        ]
        y: Tensor = self.leave(torch.cat(weighted, 1))
        return y


class EdgeExpert(nn.Module):
    """Fixed Sobel and Laplacian operators: gradient magnitude and curvature of every feature."""

    sobel_hw: Tensor
    laplacian_hw: Tensor

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]) / 4
        self.register_buffer("sobel_hw", sobel, persistent=False)
        self.register_buffer("laplacian_hw", laplacian, persistent=False)
        self.enter = mix(width, hidden)
        self.refine = depthwise(hidden, 3)
        self.leave = nn.Sequential(mix(3 * hidden, hidden), pointwise(hidden, width))

    def edges(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient magnitude (>= 0) and Laplacian of every channel, (B, C, H, W) each."""
        # Replicated, as in ``fixed_depthwise``; once for the three operators.
        padded = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
        horizontal = fixed_inside(padded, self.sobel_hw)
        vertical = fixed_inside(padded, self.sobel_hw.t())
        # The small constant keeps the square root's gradient finite on flat areas.
        magnitude = (horizontal.square() + vertical.square() + 1e-6).sqrt()
        return magnitude, fixed_inside(padded, self.laplacian_hw)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features of the outlines, (B, C, H, W)."""
        h = self.enter(x_BCHW)
        magnitude, laplacian = self.edges(h)
        y: Tensor = self.leave(torch.cat([self.refine(h), magnitude, laplacian], 1))
        return y


class SemanticExpert(nn.Module):
    """Scene context: pyramid pooling, the whole image and grids of 2, 3 and 6 cells.

    Source: Zhao et al., PSPNet, CVPR 2017, section 3.2.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.grids = (1, 2, 3, 6)
        part = max(hidden // 4, 1)
        self.enter = mix(width, hidden)
        self.cells = nn.ModuleList(mix(hidden, part) for _ in self.grids)
        self.refine = depthwise(hidden, 3)
        self.leave = nn.Sequential(mix(hidden + 4 * part, hidden), pointwise(hidden, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features of the surroundings at four scales, (B, C, H, W)."""
        h = self.enter(x_BCHW)
        size = h.shape[-2:]
        join, norm, activation = self.leave[0].children()
        assert isinstance(join, nn.Conv2d)
        own, around = join.weight.split([h.shape[1], join.weight.shape[1] - h.shape[1]], 1)
        # The layer that joins the parts meets the cells before they are enlarged: products for a
        # few cells, not for every pixel. Enlarging is one product, for all grids at once.
        cells_BCG = torch.cat(
            [
                F.conv2d(cell(cell_means(h, grid)), weight).flatten(2)
                for grid, cell, weight in zip(
                    self.grids, self.cells, around.chunk(len(self.grids), 1), strict=True
                )
            ],
            2,
        )
        own_BCHW = F.conv2d(self.refine(h), own, join.bias)
        with torch.autocast(h.device.type, enabled=False):
            joined_BNC = torch.baddbmm(
                own_BCHW.float().flatten(2).transpose(1, 2),
                self._shares(size, h.device).t().expand(h.shape[0], -1, -1),
                cells_BCG.float().transpose(1, 2),
            )
        joined_BCHW = joined_BNC.transpose(1, 2).unflatten(2, size)
        y: Tensor = self.leave[1](activation(norm(joined_BCHW)))
        return y

    def _shares(self, size_hw: torch.Size, device: torch.device) -> Tensor:
        """Return the share of each cell of all grids, G of them, in each of N pixels, (G, N)."""
        shares = [
            resize(torch.eye(grid * grid, device=device).view(-1, 1, grid, grid), size_hw)
            for grid in self.grids
        ]
        return torch.cat(shares).flatten(1)


class ContrastExpert(nn.Module):
    """Centre minus surround: every feature minus its local mean at three window sizes.

    Source: Itti, Koch and Niebur, PAMI 1998 (centre-surround differences).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.windows = (3, 7, 15)
        self.enter = mix(width, hidden)
        self.refine = depthwise(hidden, 3)
        self.leave = nn.Sequential(mix(4 * hidden, hidden), pointwise(hidden, width))

    def differences(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return x minus its mean over each window, (B, C, H, W) each."""
        return [x_BCHW - local_mean(x_BCHW, window) for window in self.windows]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return features of local contrast, (B, C, H, W)."""
        h = self.enter(x_BCHW)
        y: Tensor = self.leave(torch.cat([self.refine(h), *self.differences(h)], 1))
        return y


EXPERTS: dict[str, Callable[[int, int], nn.Module]] = {
    "texture": TextureExpert,
    "attention": AttentionExpert,
    "hybrid": HybridExpert,
    "frequency": FrequencyExpert,
    "edge": EdgeExpert,
    "semantic": SemanticExpert,
    "contrast": ContrastExpert,
}


def expert_names(kinds: Sequence[str]) -> list[str]:
    """Return a name for each expert of a level: its kind, with a number where a kind repeats."""
    return [
        f"{kind} {1 + list(kinds[:index]).count(kind)}" if list(kinds).count(kind) > 1 else kind
        for index, kind in enumerate(kinds)
    ]


def expert_kinds(num_experts: int, kinds: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return one kind per expert: ``kinds`` (or all seven, in table order) repeated as needed."""
    order = kinds or tuple(EXPERTS)
    return tuple(order[i % len(order)] for i in range(num_experts))
