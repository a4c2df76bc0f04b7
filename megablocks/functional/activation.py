"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from megablocks._checks import lookup

Activation = Callable[[Tensor], Tensor]


def linear(x: Tensor) -> Tensor:
    """Returns `x`: no activation."""
    return x


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "tanh": F.tanh,
    "linear": linear,
}


_OTHERS = ", or a callable"


def activation_function(activation: str | Activation) -> Activation:
    """Returns the activation of a name; a callable is returned as it is."""
    return activation if callable(activation) else lookup("activation", activation, ACTIVATIONS, others=_OTHERS)
