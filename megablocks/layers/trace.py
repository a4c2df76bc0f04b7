"""How layers are called: what `trace=True` shows of a call, and calls for the last token alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from megablocks.functional.padding import last_real_position

Shown = Literal[True, "hidden_states"]
"""What `trace` asks a stack for: all, or hidden states alone, without attention weights, which are L x L numbers."""


class Trace(NamedTuple):
    """The inside of a call: what came out of every layer, and who attended to whom."""

    hidden_states: tuple[Tensor, ...] = ()
    """The input of the first layer and the output of each, `(B, L, D)`; empty for a single layer."""
    attention_weights: tuple[Tensor, ...] = ()
    """Per self-attention `(B, 1, L, L)`, `(B, K, C, C)` in chunks of real tokens; `(B, 1, L, S)` over a state."""
    cross_attention_weights: tuple[Tensor, ...] = ()
    """Per cross-attention `(B, L, M)`."""


def results(y: Tensor, trace: Trace | None, state: Any) -> Any:
    """Returns `y`, `(y, trace)`, `(y, state)` or `(y, trace, state)`, whichever are there."""
    extras = tuple(extra for extra in (trace, state) if extra is not None)
    return (y, *extras) if extras else y


def call_for(layer: nn.Module, x: Tensor, state: Any, trace: Shown | bool, **given: Any) -> tuple[Tensor, Any, Any]:
    """Calls a layer and returns output, trace and state, `None` for what was not asked for: `results` undone."""
    if state is not None:
        given["state"] = state
    if trace:
        given["trace"] = trace
    returned = layer(x, **given)
    if state is None and not trace:
        return returned, None, None
    y, *extras = returned
    return y, extras[0] if trace else None, extras[-1] if state is not None else None


def call_for_last(
    layer: nn.Module,
    x: Tensor,
    state: Any,
    trace: Shown | bool,
    *,
    last_only: bool,
    padding_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, Any, Any]:
    """The same with `last_only`, for layers too that do not take it: their output is cut."""
    # In a graph there are no signatures to look at: there the output is cut.
    taken = last_only and not torch.compiler.is_compiling() and _takes_last_only(layer.forward)
    if taken:
        given["last_only"] = True
    y, seen, after = call_for(layer, x, state, trace, padding_mask=padding_mask, **given)
    return last_real_position(y, padding_mask) if last_only and not taken else y, seen, after


def _takes_last_only(forward: Callable[..., Any]) -> bool:
    function = getattr(forward, "__func__", None)  # of a class, unless somebody has put another one in its place
    return _names_last_only(forward) if function is None else _of_class(function)


def _names_last_only(forward: Callable[..., Any]) -> bool:
    return "last_only" in inspect.signature(forward).parameters


_of_class = cache(_names_last_only)
