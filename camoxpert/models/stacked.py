"""Like experts in stacked weights: one tensor per layer holds all experts. So the weights of an
image's experts can be gathered, and the host never needs to know which ones it uses.

Every expert is pointwise -> depthwise -> pointwise. Experts differ in the receptive field of the
depthwise filter: all kernels have the same size, and a mask keeps the taps of each expert. Shape
letters: B batch, C width, D hidden width, E experts, H height, W width in pixels, K experts per
image.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 7
"""Side of the kernel that all receptive fields are cut from, in pixels."""


def _field(rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """Return a 0/1 kernel with taps at the given offsets from the centre."""
    mask = torch.zeros(KERNEL, KERNEL)
    for row in rows:
        for column in columns:
            mask[row + KERNEL // 2, column + KERNEL // 2] = 1
    return mask


NEAR, WIDE, LINE = (-1, 0, 1), (-2, 0, 2), tuple(range(-3, 4))
FIELDS = {
    "3x3": _field(NEAR, NEAR),
    "3x3 dilated 2": _field(WIDE, WIDE),
    "3x3 dilated 3": _field((-3, 0, 3), (-3, 0, 3)),
    "row": _field((0,), LINE),
    "column": _field(LINE, (0,)),
    "5x5": _field(tuple(range(-2, 3)), tuple(range(-2, 3))),
    "7x7": _field(LINE, LINE),
}
"""Receptive fields by name, assigned to the experts in this order and repeated as needed."""


class UniformExperts(nn.Module):
    """E experts in stacked weights.

    Behaves like a list of experts (``len``, index, iteration) for the back ends that call them one
    by one; ``forward`` serves the one that does not.

    Args:
        count: experts E.
        width: channels C.
        hidden: hidden channels D.
    """

    masks_EHW: Tensor
    decayed = ("enter_EDC", "filter_EDHW", "leave_ECD")
    """Parameters that weight decay applies to."""

    def __init__(self, count: int, width: int, hidden: int) -> None:
        super().__init__()
        names = tuple(FIELDS)
        self.kinds = tuple(names[i % len(names)] for i in range(count))
        self.register_buffer(
            "masks_EHW", torch.stack([FIELDS[kind] for kind in self.kinds]), persistent=False
        )
        self.enter_EDC = nn.Parameter(torch.empty(count, hidden, width))
        self.enter_bias_ED = nn.Parameter(torch.zeros(count, hidden))
        self.filter_EDHW = nn.Parameter(torch.empty(count, hidden, KERNEL, KERNEL))
        self.filter_bias_ED = nn.Parameter(torch.zeros(count, hidden))
        self.leave_ECD = nn.Parameter(torch.empty(count, width, hidden))
        self.leave_bias_EC = nn.Parameter(torch.zeros(count, width))
        # As nn.Conv2d initialises each of them: uniform, 1 / sqrt(inputs).
        taps_E = self.masks_EHW.sum((1, 2))
        nn.init.uniform_(self.enter_EDC, -(width**-0.5), width**-0.5)
        nn.init.uniform_(self.leave_ECD, -(hidden**-0.5), hidden**-0.5)
        with torch.no_grad():
            self.filter_EDHW.uniform_(-1, 1).mul_(taps_E.rsqrt()[:, None, None, None])

    def __len__(self) -> int:
        return self.enter_EDC.shape[0]

    def __getitem__(self, index: int) -> Callable[[Tensor], Tensor]:
        return partial(self.run, index)

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (self[index] for index in range(len(self)))

    def keep(self, kept: Sequence[int]) -> None:
        """Drop all experts but those with these numbers."""
        rows = list(kept)
        self.kinds = tuple(self.kinds[index] for index in rows)
        self.masks_EHW = self.masks_EHW[rows]
        for name, weights in list(self.named_parameters(recurse=False)):
            setattr(self, name, nn.Parameter(weights.detach()[rows]))

    def filters(self) -> Tensor:
        """Return the masked depthwise kernels, (E, D, 7, 7)."""
        return self.filter_EDHW * self.masks_EHW[:, None]

    def run(self, index: int, x_BCHW: Tensor) -> Tensor:
        """Run one expert on a batch, (B, C, H, W) to (B, C, H, W)."""
        hidden = self.enter_EDC.shape[1]
        enter, leave = (w[index][..., None, None] for w in (self.enter_EDC, self.leave_ECD))
        kernel = (self.filter_EDHW[index] * self.masks_EHW[index])[:, None]
        h = F.gelu(F.conv2d(x_BCHW, enter, self.enter_bias_ED[index]))
        h = F.conv2d(h, kernel, self.filter_bias_ED[index], padding=KERNEL // 2, groups=hidden)
        return F.conv2d(F.gelu(h), leave, self.leave_bias_EC[index])

    def forward(self, x_BCHW: Tensor, gates_BK: Tensor, experts_BK: Tensor) -> Tensor:
        """Return the gated sum of every image's own experts, (B, C, H, W).

        The weights of the chosen experts are gathered per image; both pointwise layers become one
        batched product each, over the K experts of an image at once, and the depthwise layer one
        grouped convolution. Shapes do not depend on the choice: no host sync, no graph break, the
        same program for any routing.
        """
        batch, width, height, columns = x_BCHW.shape
        top_k, hidden = experts_BK.shape[1], self.enter_EDC.shape[1]
        flat = experts_BK.reshape(-1)

        def chosen(weights: Tensor, *shape: int) -> Tensor:
            return weights.index_select(0, flat).reshape(batch, *shape)

        enter = chosen(self.enter_EDC, top_k * hidden, width)
        enter_bias = chosen(self.enter_bias_ED, top_k * hidden, 1)
        h = F.gelu(torch.baddbmm(enter_bias, enter, x_BCHW.flatten(2)))
        h = F.conv2d(
            h.reshape(1, batch * top_k * hidden, height, columns),
            chosen(self.filters(), top_k * hidden, KERNEL, KERNEL).reshape(-1, 1, KERNEL, KERNEL),
            chosen(self.filter_bias_ED, top_k * hidden).reshape(-1),
            padding=KERNEL // 2,
            groups=batch * top_k * hidden,
        )
        h = F.gelu(h).reshape(batch, top_k * hidden, height * columns)
        # The gate scales the last layer's weights: cheaper than scaling its output K times.
        gates = gates_BK.to(x_BCHW.dtype)
        leave = chosen(self.leave_ECD, top_k, width, hidden) * gates[:, :, None, None]
        leave = leave.transpose(1, 2).reshape(batch, width, top_k * hidden)
        leave_bias = (chosen(self.leave_bias_EC, top_k, width) * gates[..., None]).sum(1)
        return torch.baddbmm(leave_bias[..., None], leave, h).reshape(x_BCHW.shape)
