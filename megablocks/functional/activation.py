"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks._checks import lookup, refuse_class
from megablocks.functional.backends import compiled_gates
from megablocks.functional.transforms import plain_only

Activation = Callable[[Tensor], Tensor]


def linear(x: Tensor) -> Tensor:
    """Returns `x`: no activation."""
    return x


def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    r"""Returns $x \odot \mathrm{silu}(\text{gate})$, and keeps for the backward pass no more than what came in."""
    if _nothing_kept():
        return _SiluGate.forward(x, gate)
    gated: Tensor = _SiluGate.apply(x, gate)  # type: ignore[no-untyped-call]
    return gated


class _SiluGate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate: Tensor) -> Tensor:
        if (compiled := compiled_gates(x, gate)) is None:
            return x * F.silu(gate)
        gated: Tensor = compiled.silu_gate(x, gate)
        return gated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        if not _may_overwrite(gradient):
            return gradient * F.silu(gate), _silu_slope(gradient * x, gate)
        if (compiled := compiled_gates(gradient, x, gate)) is not None:
            slope: Tensor = compiled.silu_gate_slope(gradient, x, gate)
            del x  # which may have been made for this alone
            return compiled.silu_gate(gradient, gate), slope
        slope = gradient * x
        del x
        torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=slope)
        return F.silu(gate).mul_(gradient), slope

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, gate_tangent: Tensor) -> Tensor:
        x, gate = ctx.saved_tensors
        return tangent * F.silu(gate) + _silu_slope(gate_tangent * x, gate)


def rescaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    r"""Returns $x \odot \text{scale} + \text{shift}$ for each row of both, $(\dots, R, Z)$ from $(\dots, Z)$."""
    return x.unsqueeze(-2) * scale + shift


def update_gate(x: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
    r"""Returns $\sigma(u) \odot \text{candidate} + (1 - \sigma(u)) \odot x$, keeping no more than what came in."""
    if _nothing_kept():
        return _UpdateGate.forward(x, candidate, update)
    mixed: Tensor = _UpdateGate.apply(x, candidate, update)  # type: ignore[no-untyped-call]
    return mixed


class _UpdateGate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
        if (compiled := compiled_gates(x, candidate, update)) is None:
            return torch.lerp(x, candidate, torch.sigmoid(update))
        mixed: Tensor = compiled.update_gate(x, candidate, update)
        return mixed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, candidate, update = ctx.saved_tensors
        if not _may_overwrite(gradient):
            gate = update.sigmoid()
            taken = gradient * gate
            return gradient - taken, taken, (candidate - x) * taken * (1.0 - gate)
        if (compiled := compiled_gates(gradient, x, candidate, update)) is not None:
            slope: Tensor = compiled.update_gate_slope(gradient, x, candidate, update)
            del x, candidate  # as above
            return *compiled.update_gate_shares(gradient, update), slope
        slope = candidate - x
        del x, candidate
        gate = update.sigmoid()
        taken = gradient * gate
        slope.mul_(gradient)
        torch.ops.aten.sigmoid_backward.grad_input(slope, gate, grad_input=slope)
        return torch.sub(gradient, taken, out=gate), taken, slope

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, candidate_tangent: Tensor, update_tangent: Tensor) -> Tensor:
        x, candidate, update = ctx.saved_tensors
        gate = update.sigmoid()
        mixed: Tensor = tangent + (candidate_tangent - tangent) * gate
        return mixed.addcmul(update_tangent * (candidate - x), gate * (1.0 - gate))


def _nothing_kept() -> bool:
    """Whether plain operations will do: without gradients, and where a compiler chooses what to keep."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


def _may_overwrite(gradient: Tensor) -> bool:
    """Whether a backward pass may write into what it has made: not if it is itself differentiated, or batched."""
    return not torch.is_grad_enabled() and not plain_only(gradient) and type(gradient) is Tensor


def _silu_slope(gradient: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # the operator below has no derivative itself
        sigmoid = x.sigmoid()
        return gradient * sigmoid * (1.0 + x * (1.0 - sigmoid))
    slope: Tensor = torch.ops.aten.silu_backward(gradient, x)
    return slope


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its approximation by a hyperbolic tangent."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "tanh": F.tanh,
    "linear": linear,
}


_OTHERS = ", or a callable"


def activation_function(activation: str | Activation) -> Activation:
    """Returns the activation of a name; a callable is returned as it is."""
    refuse_class("activation", activation)
    return activation if callable(activation) else lookup("activation", activation, ACTIVATIONS, others=_OTHERS)
