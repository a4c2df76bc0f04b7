"""Makes a kernel that torch knows by name of a pair of functions: one node for a compiler, with gradients of its own.

A fused kernel is two functions over plain tensors, neither of which autograd looks into,

    forward(x, log_q, b, g, omega, hidden, lengths) -> (y, final)
    backward(dy, dfinal, x, log_q, b, g, omega, hidden, lengths) -> (dx, dlog_q, db, dg, domega, dhidden)

where `log_q`, `b` and `g` are (D, N), or (2D, N) for an average that looks both ways, its second half backwards in
time. Everything is contiguous and of one dtype, `lengths` int64. `omega`, `hidden` and `lengths` may be `None`;
`domega` and `dhidden` are then tensors that nobody looks at. `final` always comes. Beyond `lengths`, `x` and `dy` are
read as zeros, and `y` and `dx` are zeros. A kernel may bring two more functions for truncated averages,

    truncated_forward(x, log_q, b, g, omega, truncation) -> y
    truncated_backward(dy, x, log_q, b, g, omega, truncation) -> (dx, dlog_q, db, dg, domega)

for truncations of `SHORTEST` lags and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from megablocks.kernels import EMACoefficients
from megablocks.kernels.blocked import blocked
from megablocks.kernels.windowed import windowed

SHORTEST = 16
"""Shorter truncations go to `blocked`, which makes one matrix product of them."""

Function = Callable[..., Any]


class RegisteredKernel:
    """A kernel (see `megablocks.kernels`) that is the operator `megablocks::NAME` to torch.

    Its gradients come from `backward`; gradients of gradients, from `blocked`. A truncated average is the operator
    `megablocks::NAME_truncated`, or where there is none, made of the other by `windowed`.
    """

    def __init__(
        self, name: str, forward: Function, backward: Function, *, truncated: tuple[Function, Function] | None = None
    ) -> None:
        self.name = name
        inputs = "Tensor x, Tensor log_q, Tensor b, Tensor g, Tensor? omega"
        self.operator = _Operator(
            name,
            f"{inputs}, Tensor? hidden, Tensor? lengths",
            (forward, _shapes, 2),
            (backward, _shapes_back, 6),
            _visible,
        )
        self.truncated: _Operator | None = None
        if truncated is not None:
            self.truncated = _Operator(
                f"{name}_truncated",
                f"{inputs}, int truncation",
                (truncated[0], _truncated_shape, 1),
                (truncated[1], _truncated_shapes_back, 5),
                _truncated_visible,
            )

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
        if truncation is not None and truncation < SHORTEST:
            return blocked(x, forward, mirror, omega=omega, truncation=truncation)
        if truncation is not None and self.truncated is None:
            return windowed(self, x, forward, mirror, omega=omega, truncation=truncation), None
        both = (forward,) if mirror is None else (forward, mirror)
        rows = (torch.cat([getattr(direction, name) for direction in both]) for name in ("log_q", "b", "g"))
        inputs = [None if part is None else part.contiguous() for part in (x, *rows, omega)]
        if truncation is not None:
            return cast(_Operator, self.truncated).forward(*inputs, truncation), None
        hidden, lengths = (None if part is None else part.contiguous() for part in (hidden, lengths))
        y, after = self.operator.forward(*inputs, hidden, lengths)
        return y, after if final else None


class _Operator:
    """Two functions as an operator with gradients; gradients of those come from `visible`, which autograd sees through.

    Each function comes with one that makes tensors of the right shapes, and the number of its results. Those of
    `backward` are the gradients of its first inputs.
    """

    def __init__(
        self,
        name: str,
        inputs: str,
        forward: tuple[Function, Function, int],
        backward: tuple[Function, Function, int],
        visible: Function,
    ) -> None:
        grads = "Tensor dy, Tensor dfinal" if forward[2] == 2 else "Tensor dy"
        self.forward = torch_operator(name, inputs, *forward)
        self.backward = torch_operator(f"{name}_backward", f"{grads}, {inputs}", *backward)
        self._visible = visible
        self._differentiable = backward[2]
        self.forward.register_autograd(self._gradients, setup_context=_remember)

    def _gradients(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, *ctx.numbers)
        if torch.is_grad_enabled():
            made = self._twice_differentiable(grads, inputs)
        else:
            made = self.backward(*(grad.contiguous() for grad in grads), *inputs)
        given = zip(made, inputs[: self._differentiable], strict=True)
        unknown = [None] * (len(inputs) - self._differentiable)
        return *(None if part is None else grad for grad, part in given), *unknown

    def _twice_differentiable(self, grads: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> list[Tensor | None]:
        """Gradients that have gradients themselves."""
        outputs = self._visible(*inputs)
        candidates = inputs[: self._differentiable]
        wanted = [part for part in candidates if part is not None and part.requires_grad]
        made = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, materialize_grads=True))
        return [next(made) if part is not None and part.requires_grad else None for part in candidates]


def torch_operator(name: str, inputs: str, function: Function, shapes: Function, results: int) -> Any:
    """Makes the operator `megablocks::NAME` of a function, one that makes tensors of its shapes, and their number."""
    outputs = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    made = torch.library.custom_op(f"megablocks::{name}", function, mutates_args=(), schema=f"({inputs}) -> {outputs}")
    made.register_fake(shapes)
    return made


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.numbers = [part for part in inputs if isinstance(part, int)]
    ctx.save_for_backward(*(part for part in inputs if not isinstance(part, int)))


def _shapes(x: Tensor, log_q: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2], log_q.shape[1])


def _shapes_back(
    dy: Tensor, dfinal: Tensor, x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, *others: Tensor | None
) -> tuple[Tensor, ...]:
    return *_truncated_shapes_back(dy, x, log_q, b, g), torch.empty_like(dfinal)


def _truncated_shape(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


def _truncated_shapes_back(
    dy: Tensor, x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    return *(torch.empty_like(part) for part in (x, log_q, b, g)), x.new_empty(x.shape[2])


def _visible(
    x: Tensor,
    log_q: Tensor,
    b: Tensor,
    g: Tensor,
    omega: Tensor | None,
    hidden: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    forward, mirror = _directions(x, log_q, b, g)
    y, final = blocked(x, forward, mirror, omega=omega, hidden=hidden, lengths=lengths, final=True)
    return y, cast(Tensor, final)


def _truncated_visible(
    x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, omega: Tensor | None, truncation: int
) -> tuple[Tensor]:
    forward, mirror = _directions(x, log_q, b, g)
    return (blocked(x, forward, mirror, omega=omega, truncation=truncation)[0],)


def _directions(x: Tensor, log_q: Tensor, b: Tensor, g: Tensor) -> tuple[EMACoefficients, EMACoefficients | None]:
    width = x.shape[-1]
    rows = EMACoefficients(-torch.expm1(log_q), log_q, b, g)
    forward = EMACoefficients(*(row[:width] for row in rows))
    return forward, None if log_q.shape[0] == width else EMACoefficients(*(row[width:] for row in rows))
