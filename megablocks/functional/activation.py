"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from megablocks._checks import lookup

Activation = Callable[[Tensor], Tensor]


def linear(x: Tensor) -> Tensor:
    """Returns `x`: no activation."""
    return x


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


def refuse_class(name: str, value: object) -> None:
    """Raises if a class is given for a function: called with scores, it would make an object of them."""
    if isinstance(value, type):
        raise TypeError(
            f"`{name}` must be a function or an instance of a module, but is the class {value.__name__}; "
            f"pass an instance, as in {name}={value.__name__}()."
        )
