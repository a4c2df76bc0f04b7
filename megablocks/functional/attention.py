"""Single-head attention with softmax, relu2, laplace or any function: whole or in chunks, causal or not, streamed.

A query sees a set of keys; everything is said of that set: softmax runs over it, the other functions divide scores by
its size. Keys that are padding, in the future or in another chunk are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from megablocks._checks import lookup, values_readable
from megablocks.functional.activation import refuse_class
from megablocks.functional.padding import Slots, pad_to_multiple, real_lengths, slots, take, zero_padding
from megablocks.functional.precision import at_least_float32
from megablocks.state import ChunkKeys, FixedKeys, GrowingKeys, KeyState

PositionBias = Callable[[Tensor, Tensor], Tensor]
"""Maps positions of queries (L,) or (B, L) and of keys (S,) or (B, S) to a bias (L, S) or (B, L, S)."""

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
        weights = self.function(scores)
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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    *,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attends from queries to keys, $O = f(q k^\top / \tau + R)\, v$.

    $\tau$ is $\sqrt Z$ for softmax, and the number of keys that the query sees, at least 1, for the other functions.

    Args:
        q: Queries, $(\dots, L, Z)$.
        k: Keys, $(\dots, S, Z)$.
        v: Values, $(\dots, S, V)$.
        function: What `attention_function` returns, or what has its members.
        bias: $R$, broadcasting to $(\dots, L, S)$. It is not divided.
        visible: Bool, $(\dots, 1, S)$ or $(\dots, L, S)$, `True` where the query sees the key; `None` for everywhere.
        dropout: Applied to the weights.

    Returns:
        The output $(\dots, L, V)$ and the weights before dropout $(\dots, L, S)$. Scores and weights are computed in
        float32 or wider.
    """
    if function.divide_by_keys:
        scores = (q @ k.transpose(-1, -2)).to(at_least_float32(q.dtype))
        if visible is None:
            scores = scores / k.shape[-2]
        else:
            scores = scores / visible.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    else:
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).to(at_least_float32(q.dtype))
    if bias is not None:
        scores = scores + bias
    weights = function.weights(scores, visible)
    applied = weights.to(v.dtype)
    return (applied if dropout is None else dropout(applied)) @ v, weights


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    *,
    causal: bool,
    chunk_size: int | None = None,
    bias: PositionBias | None = None,
    padding_mask: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends within chunks of C consecutive real tokens; the last chunk may be short.

    Args:
        q: Queries, $(B, L, Z)$.
        k: Keys, $(B, L, Z)$.
        v: Values, $(B, L, V)$.
        function: What `attention_function` returns, or what has its members.
        causal: Whether a query sees only keys up to its own position.
        chunk_size: C; `None` for one chunk of everything.
        bias: Maps positions within a chunk to the relative bias.
        padding_mask: $(B, L)$, bool, `True` at padding.
        dropout: Applied to the weights.

    Returns:
        The output $(B, L, V)$, zero at padding, and the weights $(B, K, C, C)$ in chunks of real tokens, or
        $(B, 1, L, L)$ where there is one chunk.
    """
    batch, length = q.shape[:2]
    size = length if chunk_size is None else min(chunk_size, length)
    count = -(-length // size) * size
    if padding_mask is None:
        filled = None if count == length else (torch.arange(count, device=q.device) < length).unsqueeze(0)
        q, k, v = (pad_to_multiple(x, size) for x in (q, k, v))
        out, weights = _in_chunks(q, k, v, function, size, causal, bias, filled, dropout)
        return out[:, :length], weights
    start = torch.zeros(batch, dtype=torch.int64, device=q.device)
    layout = slots((batch, length), count, padding_mask=padding_mask, offset=start)
    q, k, v = (layout.put(x) for x in (q, k, v))
    out, weights = _in_chunks(q, k, v, function, size, causal, bias, layout.filled, dropout)
    if count == size:
        by_query = layout.back(weights.squeeze(1))
        weights = layout.back(by_query.transpose(1, 2)).transpose(1, 2).unsqueeze(1)
    return layout.back(out), weights


def streamed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: KeyState,
    function: Attention,
    *,
    bias: PositionBias | None = None,
    padding_mask: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, KeyState]:
    """Attends causally from a segment to itself and to the keys of a state.

    Args:
        q: Queries of the segment, $(B, L, Z)$ with any $L$.
        k: Its keys, $(B, L, Z)$.
        v: Its values, $(B, L, V)$.
        state: Keys and values so far; its type says whether they are chunked.
        function: What `attention_function` returns, or what has its members.
        bias: Maps positions, within the chunk where there are chunks, to the relative bias.
        padding_mask: $(B, L)$, bool, `True` at padding.
        dropout: Applied to the weights.

    Returns:
        The output $(B, L, V)$, zero at padding; the weights, $(B, 1, L, S)$ over the slots of the state or, for a
        segment longer than a chunk, $(B, K, C, C)$; and the new state.
    """
    shape = (q.shape[0], q.shape[1])
    length, held = q.shape[1], state.keys.shape[1]
    size = held if isinstance(state, ChunkKeys) else None
    if size is not None:
        count = held + length - 1 if length <= size else -(-(held + length - 1) // size) * size
    else:
        count = held if isinstance(state, FixedKeys) else held + length
    layout = slots(shape, count, padding_mask=padding_mask, offset=state.length)
    total = state.length + real_lengths(shape, padding_mask, q.device)
    if isinstance(state, FixedKeys):
        _check_capacity(total, held)
    keys = _append(state.keys, k, layout)
    values = _append(state.values, v, layout)

    if size is not None and length > size:
        out, weights = _in_chunks(
            layout.put(q), keys.to(k.dtype), values.to(v.dtype), function, size, True, bias, layout.filled, dropout
        )
        out = layout.back(out)
    else:
        at, slot = layout.slot, torch.arange(count, device=q.device)
        visible = slot <= at.unsqueeze(-1)
        if size is not None:
            visible = visible & (slot // size == at.unsqueeze(-1) // size)
            at, slot = at % size, slot % size
        relative = None if bias is None else bias(at, slot)
        out, weights = attend(
            q, keys.to(k.dtype), values.to(v.dtype), function, bias=relative, visible=visible, dropout=dropout
        )
        out = zero_padding(out, padding_mask)
        weights = zero_padding(weights, padding_mask).unsqueeze(1)
    return out, weights, _next_state(state, keys, values, total)


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    size: int,
    causal: bool,
    bias: PositionBias | None,
    filled: Tensor | None,
    dropout: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Attends within chunks of slots; `filled` (B, S) are those that hold a query, the first ones of each row."""
    q, k, v = (rearrange(x, "b (k c) z -> b k c z", c=size) for x in (q, k, v))
    slot = torch.arange(size, device=q.device)
    visible = None
    if causal:
        # Every slot before that of a real token is filled, so looking back needs no other mask.
        visible = slot <= slot.unsqueeze(-1)
    elif filled is not None:
        visible = rearrange(filled, "b (k c) -> b k 1 c", c=size)
    relative = None if bias is None else bias(slot, slot)
    out, weights = attend(q, k, v, function, bias=relative, visible=visible, dropout=dropout)
    if filled is not None:
        weights = weights.masked_fill(~rearrange(filled, "b (k c) -> b k c 1", c=size), 0.0)
    return rearrange(out, "b k c v -> b (k c) v"), weights


def _append(held: Tensor, new: Tensor, layout: Slots) -> Tensor:
    """Keys or values of a state, followed in each row by those of the segment: (B, S, ...)."""
    # Both sides are zero where the other is not.
    return F.pad(held, (0, 0, 0, layout.source.shape[1] - held.shape[1])) + layout.put(new).to(held.dtype)


def _next_state(state: KeyState, keys: Tensor, values: Tensor, total: Tensor) -> KeyState:
    if isinstance(state, GrowingKeys):
        return GrowingKeys(keys, values, total)
    if isinstance(state, FixedKeys):
        return FixedKeys(keys, values, total)
    size = state.keys.shape[1]
    length = total % size
    steps = torch.arange(size, device=keys.device)
    index = ((total - length).unsqueeze(-1) + steps).clamp(max=keys.shape[1] - 1)
    empty = steps >= length.unsqueeze(-1)
    return ChunkKeys(take(keys, index, empty), take(values, index, empty), length)


def _check_capacity(total: Tensor, capacity: int) -> None:
    message = f"A state with `capacity={capacity}` is full; make a larger one, or one without `capacity`, which grows."
    if values_readable(total):
        if bool((total > capacity).any()):
            raise ValueError(f"{message} The longest row has come to {int(total.max())} tokens.")
    else:
        torch._assert_async((total <= capacity).all(), message)
