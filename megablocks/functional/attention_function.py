"""How scores become attention weights: softmax, relu2, laplace, or any function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megablocks._checks import check_kept_shape, lookup, refuse_class

LAPLACE_MEAN = 0.707107
LAPLACE_DEVIATION = 0.282095


def relu2(scores: Tensor) -> Tensor:
    r"""Squared ReLU, $\max(x, 0)^2$."""
    return scores.relu().square()


def laplace(scores: Tensor) -> Tensor:
    r"""The Laplace attention function, $\frac12 (1 + \mathrm{erf}((x - \mu) / (\sigma \sqrt 2)))$.

    With $\mu = 0.707107$ and $\sigma = 0.282095$ it follows the squared ReLU near its inflection point and is bounded
    by 1, in value and, unlike it, in gradient (paper, section 3.2 and appendix C).
    """
    return 0.5 * (1.0 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_DEVIATION * math.sqrt(2.0))))


def softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the visible keys; a query that sees none gets zeros."""
    if visible is None:
        return scores.softmax(-1)
    # The lowest finite number, not -inf: an empty row stays finite, and so does its gradient.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0.0)


class Elementwise:
    """Attention weights from a function of each score alone, zero at keys that are not visible."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, scores: Tensor, visible: Tensor | None) -> Tensor:
        """Returns the weights of (..., L, S) scores."""
        weights = check_kept_shape("attention", self.function(scores), tuple(scores.shape))
        return weights if visible is None else weights.masked_fill(~visible, 0.0)


class AttentionFunction(NamedTuple):
    """How scores become weights."""

    weights: Callable[[Tensor, Tensor | None], Tensor]
    """Maps scores (..., L, S), float32 or wider, and visibility, which broadcasts to them, to weights."""
    divide_by_keys: bool
    """Whether scores are q.k over the number of visible keys, as for element-wise functions, or q.k / sqrt(Z)."""


class Attention(Protocol):
    """What attends: an `AttentionFunction`, or anything with its two members, such as a module."""

    @property
    def weights(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """See `AttentionFunction`."""

    @property
    def divide_by_keys(self) -> bool:
        """See `AttentionFunction`."""


ATTENTION: Mapping[str, AttentionFunction] = {
    "softmax": AttentionFunction(softmax, divide_by_keys=False),
    "relu2": AttentionFunction(Elementwise(relu2), divide_by_keys=True),
    "laplace": AttentionFunction(Elementwise(laplace), divide_by_keys=True),
}


def attention_function(attention: str | Callable[[Tensor], Tensor] | AttentionFunction) -> AttentionFunction:
    """Returns the function of a name; a callable is taken as an element-wise function of the scores, like laplace."""
    if isinstance(attention, AttentionFunction):
        refuse_class("attention", attention.weights)
        return attention
    refuse_class("attention", attention)
    if callable(attention):
        return AttentionFunction(Elementwise(attention), divide_by_keys=True)
    return lookup("attention", attention, ATTENTION, others=", an element-wise callable or an AttentionFunction")
