"""A truncated average from a kernel that forgets nothing.

Time is cut into blocks of T steps, each a sequence of its own for the kernel. The state that a block starts from is the
sum of what the blocks before it end with, as far as they lie in the window of each of its steps; what lies in the
windows of some of its steps only, in one or two blocks still earlier, comes by matrix products. A difference of two
averages would be simpler, but keeps a rounding error of everything that ever was in the window.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks.kernels import EMACoefficients, Kernel
from megablocks.kernels.blocked import BLOCK, blocked, earlier, half_seen, transposed, whole_blocks, window


def windowed(
    kernel: Kernel,
    x: Tensor,
    forward: EMACoefficients,
    mirror: EMACoefficients | None = None,
    *,
    omega: Tensor | None = None,
    truncation: int,
) -> Tensor:
    """Returns what `kernel` would if it kept lags 0 to `truncation` - 1 only."""
    if truncation < BLOCK:  # nothing but short windows: no kernel is needed
        return blocked(x, forward, mirror, omega=omega, truncation=truncation)[0]
    y = _one_way(kernel, x, forward, omega, truncation)
    if mirror is not None:
        y = y + _one_way(kernel, x.flip(1), mirror, None, truncation).flip(1)
    return y


def _one_way(kernel: Kernel, x: Tensor, coefficients: EMACoefficients, omega: Tensor | None, truncation: int) -> Tensor:
    batch, length, channels = x.shape
    blocks = -(-length // BLOCK)
    x = F.pad(x, (0, 0, 0, blocks * BLOCK - length))
    rows = x.view(batch * blocks, BLOCK, channels)

    hidden = None
    width = whole_blocks(truncation, BLOCK)
    if width:
        ends = cast(Tensor, kernel(rows, coefficients, final=True)[1])
        ends = ends.view(batch, blocks, channels, -1).permute(2, 0, 1, 3)
        hidden = window(ends, (coefficients.log_q * BLOCK).unsqueeze(1), width).permute(1, 2, 0, 3).flatten(0, 1)
    y = kernel(rows, coefficients, omega=omega, hidden=hidden)[0].view(batch, blocks * BLOCK, channels)

    distant = half_seen(coefficients, BLOCK, blocks, truncation)
    if distant:
        cut = transposed(x.view(-1, channels)).view(channels, batch, blocks, BLOCK)
        far = torch.stack([torch.bmm(earlier(cut, back).flatten(1, 2), weights) for back, weights in distant]).sum(0)
        y = y + transposed(far.view(channels, -1)).view(y.shape)
    return y[:, :length]
