"""Dropout, from draws of our own on a CPU, where torch's take longer than the products of a layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks.functional.backends import compiled_elementwise
from megablocks.functional.transforms import plain_only


def dropout(x: Tensor, p: float) -> Tensor:
    r"""Zeroes numbers with probability $p$ and scales the others by $1 / (1 - p)$, as `F.dropout` in training."""
    if p < 1.0 and _compiled(x) is not None:
        seed = torch.empty((), dtype=torch.int64).random_()
        dropped: Tensor = _Dropout.apply(x, seed, p)  # type: ignore[no-untyped-call]
        return dropped
    if p == 1.0 or type(x) is not Tensor or not x.is_cpu or torch.compiler.is_compiling() or plain_only(x):
        return F.dropout(x, p)
    # Half the time of torch, which draws one number after the other, each from 64 bits.
    draws = torch.empty(-(-x.numel() // 2), dtype=torch.int64).random_().view(torch.int32)[: x.numel()]
    kept = draws.bitwise_and_(0x7FFF_FFFF) <= round((1 - p) * 2**31) - 1  # 31 bits for each number
    return x * kept.view(x.shape).to(x.dtype).mul_(1 / (1 - p))


class _Dropout(torch.autograd.Function):
    """Keeps nothing but the seed, from which the backward pass draws the same again."""

    @staticmethod
    def forward(x: Tensor, seed: Tensor, p: float) -> Tensor:
        dropped: Tensor = _compiled(x).dropout(x, seed, p)
        return dropped

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, seed, ctx.p = inputs
        ctx.save_for_backward(seed)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        if _compiled(gradient) is not None:
            return _Dropout.apply(gradient, seed, ctx.p), None, None  # type: ignore[no-untyped-call]
        from megablocks.kernels.numba_elementwise import dropout

        return gradient * dropout(torch.ones(ctx.shape, dtype=ctx.dtype), seed, ctx.p), None, None


def _compiled(x: Tensor) -> Any:
    return compiled_elementwise(x, dtypes=(torch.float32, torch.float64))
