"""What the arguments that layers share mean, and how their parts are drawn anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megablocks._checks import check_table, lookup
from megablocks.functional.attention_function import AttentionFunction, Elementwise, attention_function
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.position import RotaryRelativeBias


@remembers_arguments
class LearnedAttention(nn.Module):
    """An attention function that is a module, so that the layer which calls it owns its parameters.

    Args:
        function: Maps scores to weights, or, unless `elementwise`, scores and visibility to weights.
        divide_by_keys: As in `AttentionFunction`.
        elementwise: Whether `function` maps each score alone.
    """

    def __init__(self, function: nn.Module, *, divide_by_keys: bool = True, elementwise: bool = True) -> None:
        super().__init__()
        self.function = function
        self.divide_by_keys = divide_by_keys
        self.elementwise = elementwise

    def weights(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Returns the weights of (..., L, S) scores."""
        weights: Tensor = (Elementwise(self.function) if self.elementwise else self.function)(scores, visible)
        return weights

    def reset_parameters(self) -> None:
        """Draws the function's parameters anew in its own way, if it has one."""
        reset_parts(self.function)


_OTHER_BIASES = ", a module such as SimpleRelativeBias(1024), or None"


def bias_module(
    position_bias: str | nn.Module | None,
    qk_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module | None:
    """Returns what the `position_bias` argument of a layer means: `"rotary"`, a module, or none."""
    if position_bias is None or isinstance(position_bias, nn.Module):
        return position_bias
    names: dict[str, Callable[[], nn.Module]] = {
        "rotary": lambda: RotaryRelativeBias(qk_dim, device=device, dtype=dtype)
    }
    return lookup("position_bias", position_bias, names, others=_OTHER_BIASES)()


def check_reach(position_bias: object, span: int) -> None:
    """Raises if a bias has a table, and that does not reach over so many positions."""
    limit = getattr(position_bias, "max_positions", None)
    if limit is not None:
        check_table(span, limit)


def attention_part(
    attention: str | Callable[[Tensor], Tensor] | AttentionFunction | LearnedAttention,
) -> AttentionFunction | LearnedAttention:
    """Returns what the `attention` argument of a layer means; a module, however it is wrapped, as a module."""
    if isinstance(attention, LearnedAttention):
        return attention
    made = attention_function(attention)
    elementwise = isinstance(made.weights, Elementwise)
    function = made.weights.function if isinstance(made.weights, Elementwise) else made.weights
    if isinstance(function, nn.Module):
        return LearnedAttention(function, divide_by_keys=made.divide_by_keys, elementwise=elementwise)
    return made


def reset_linear(*layers: nn.Linear) -> None:
    """Draws weights from a normal distribution with standard deviation 0.02 and sets biases to zero."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def reset_parts(*parts: object) -> None:
    """Calls `reset_parameters` of every part that has it."""
    for part in parts:
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
