"""Dropout, from draws of our own on a CPU, where torch's take longer than the products of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks.functional.backends import compiled_elementwise
from megablocks.functional.transforms import plain_only


def dropout(x: Tensor, p: float) -> Tensor:
    r"""Zeroes numbers with probability $p < 1$ and scales the others by $1 / (1 - p)$, as `F.dropout` in training."""
    compiled = compiled_elementwise(x, dtypes=(torch.float32, torch.float64))
    if compiled is not None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
        dropped: Tensor = compiled.dropout(x, seed, p)
        return dropped
    if type(x) is not Tensor or not x.is_cpu or torch.compiler.is_compiling() or plain_only(x):
        return F.dropout(x, p)
    # Half the time of torch, which draws one number after the other, each from 64 bits.
    draws = torch.empty(-(-x.numel() // 2), dtype=torch.int64).random_().view(torch.int32)[: x.numel()]
    kept = draws.bitwise_and_(0x7FFF_FFFF) <= round((1 - p) * 2**31) - 1  # 31 bits for each number
    return x * kept.view(x.shape).to(x.dtype).mul_(1 / (1 - p))
