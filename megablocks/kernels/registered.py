"""Makes a kernel that torch knows by name of a pair of functions: one node for a compiler, with gradients of its own.

A fused kernel is two functions over plain tensors, neither of which autograd looks into,

    forward(x, log_q, b, g, omega, hidden, lengths) -> (y, final)
    backward(dy, dfinal, x, log_q, b, g, omega, hidden, lengths) -> (dx, dlog_q, db, dg, domega, dhidden)

where `log_q`, `b` and `g` are (D, N), or (2D, N) for an average that looks both ways, its second half backwards in
time. Everything is contiguous and of one dtype, `lengths` int64. `omega`, `hidden` and `lengths` may be `None`;
`domega` and `dhidden` are then tensors that nobody looks at. `final` always comes. Beyond `lengths`, `x` and `dy` are
read as zeros, and `y` and `dx` are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from megablocks.kernels import EMACoefficients
from megablocks.kernels.blocked import blocked
from megablocks.kernels.windowed import windowed


class RegisteredKernel:
    """A kernel (see `megablocks.kernels`) that is the operator `megablocks::NAME` to torch.

    Its gradients come from `backward`; gradients of gradients, from `blocked`.
    """

    def __init__(
        self, name: str, forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., tuple[Tensor, ...]]
    ) -> None:
        self.name = name
        inputs = "Tensor x, Tensor log_q, Tensor b, Tensor g, Tensor? omega, Tensor? hidden, Tensor? lengths"
        self.operator = torch.library.custom_op(
            f"megablocks::{name}", forward, mutates_args=(), schema=f"({inputs}) -> (Tensor, Tensor)"
        )
        self.backward_operator = torch.library.custom_op(
            f"megablocks::{name}_backward",
            backward,
            mutates_args=(),
            schema=f"(Tensor dy, Tensor dfinal, {inputs}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        )
        self.operator.register_fake(_shapes)
        self.backward_operator.register_fake(_shapes_back)
        self.operator.register_autograd(self._gradients, setup_context=_remember)

    def __call__(
        self,
        x: Tensor,
        forward: EMACoefficients,
        mirror: EMACoefficients | None = None,
        *,
        omega: Tensor | None = None,
        hidden: Tensor | None = None,
        lengths: Tensor | None = None,
        truncation: int | None = None,
        final: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the kernel (see `megablocks.kernels` for the contract)."""
        if truncation is not None:
            return windowed(self, x, forward, mirror, omega=omega, truncation=truncation), None
        both = (forward,) if mirror is None else (forward, mirror)
        log_q, b, g = (
            torch.cat([getattr(direction, name) for direction in both]).contiguous() for name in ("log_q", "b", "g")
        )
        x = x.contiguous()
        omega, hidden, lengths = (None if part is None else part.contiguous() for part in (omega, hidden, lengths))
        y, after = self.operator(x, log_q, b, g, omega, hidden, lengths)
        return y, after if final else None

    def _gradients(self, ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _twice_differentiable(dy, dfinal, *saved)
        dx, dlog_q, db, dg, domega, dhidden = self.backward_operator(dy.contiguous(), dfinal.contiguous(), *saved)
        omega, hidden = saved[4:6]
        return dx, dlog_q, db, dg, None if omega is None else domega, None if hidden is None else dhidden, None


def _shapes(x: Tensor, log_q: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], log_q.shape[1])


def _shapes_back(
    dy: Tensor, dfinal: Tensor, x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    alike = (torch.empty_like(part) for part in (x, log_q, b, g))
    return *alike, x.new_empty(x.shape[2]), torch.empty_like(dfinal)


def _remember(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _twice_differentiable(dy: Tensor, dfinal: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients themselves, from `blocked`, of which autograd knows every step."""
    x, log_q, b, g, omega, hidden, lengths = inputs
    width = x.shape[-1]
    rows = EMACoefficients(-torch.expm1(log_q), log_q, b, g)
    forward = EMACoefficients(*(row[:width] for row in rows))
    mirror = EMACoefficients(*(row[width:] for row in rows)) if log_q.shape[0] != width else None
    y, final = blocked(x, forward, mirror, omega=omega, hidden=hidden, lengths=lengths, final=True)
    wanted = [part for part in inputs[:6] if part is not None and part.requires_grad]
    grads = iter(
        torch.autograd.grad((y, cast(Tensor, final)), wanted, (dy, dfinal), create_graph=True, materialize_grads=True)
    )
    return tuple(next(grads) if part is not None and part.requires_grad else None for part in inputs)
