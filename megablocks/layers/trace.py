"""What `trace=True` shows of a call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Trace(NamedTuple):
    """The inside of a call: what came out of every layer, and who attended to whom."""

    hidden_states: tuple[Tensor, ...] = ()
    """The input of the first layer and the output of each, `(B, L, D)`; empty for a single layer."""
    attention_weights: tuple[Tensor, ...] = ()
    """For each self-attention `(B, 1, L, L)`, or `(B, K, C, C)` in chunks of real tokens; over a state `(B, 1, L, S)`."""
    cross_attention_weights: tuple[Tensor, ...] = ()
    """For each cross-attention `(B, L, M)`."""


def results(y: Tensor, trace: Trace | None, state: Any) -> Any:
    """Returns `y`, `(y, trace)`, `(y, state)` or `(y, trace, state)`, whichever are there."""
    extras = tuple(extra for extra in (trace, state) if extra is not None)
    return (y, *extras) if extras else y
