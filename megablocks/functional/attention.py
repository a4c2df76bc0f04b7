"""Single-head attention with softmax, relu2, laplace or any function: whole or in chunks, causal or not, streamed.

A query sees a set of keys; everything is said of that set: softmax runs over it, the other functions divide scores by
its size. Keys that are padding, in the future or in another chunk are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from megablocks._checks import values_readable
from megablocks.functional.attention_function import Attention
from megablocks.functional.padding import Slots, pad_to_multiple, real_lengths, slots, take, zero_padding
from megablocks.functional.sight import PositionBias, Sight, attend, attend_sight
from megablocks.state import ChunkKeys, FixedKeys, GrowingKeys, KeyState


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
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
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
        dropout: Applied to the weights; `None` where nothing is dropped.
        need_weights: Whether to return the weights. Without them, memory is linear in $L$ for chunks of any size.

    Returns:
        The output $(B, L, V)$, zero at padding, and the weights $(B, K, C, C)$ in chunks of real tokens, or
        $(B, 1, L, L)$ where there is one chunk; `None` where they are not needed.
    """
    batch, length = q.shape[:2]
    size = length if chunk_size is None else min(chunk_size, length)
    count = -(-length // size) * size
    options: dict[str, Any] = {"bias": bias, "dropout": dropout, "need_weights": need_weights}
    if padding_mask is None:
        filled = None if count == length else (torch.arange(count, device=q.device) < length).unsqueeze(0)
        q, k, v = (pad_to_multiple(x, size) for x in (q, k, v))
        out, weights = _in_chunks(q, k, v, function, size, causal, filled, **options)
        return out[:, :length], weights
    start = torch.zeros(batch, dtype=torch.int64, device=q.device)
    layout = slots((batch, length), count, padding_mask=padding_mask, offset=start)
    q, k, v = (layout.put(x) for x in (q, k, v))
    out, weights = _in_chunks(q, k, v, function, size, causal, layout.filled, **options)
    if weights is not None and count == size:
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
    need_weights: bool = True,
) -> tuple[Tensor, Tensor | None, KeyState]:
    """Attends causally from a segment to itself and to the keys of a state.

    Args:
        q: Queries of the segment, $(B, L, Z)$ with any $L$.
        k: Its keys, $(B, L, Z)$.
        v: Its values, $(B, L, V)$.
        state: Keys and values so far; its type says whether they are chunked.
        function: What `attention_function` returns, or what has its members.
        bias: Maps positions, within the chunk where there are chunks, to the relative bias.
        padding_mask: $(B, L)$, bool, `True` at padding.
        dropout: Applied to the weights; `None` where nothing is dropped.
        need_weights: Whether to return the weights.

    Returns:
        The output $(B, L, V)$, zero at padding; the weights, $(B, 1, L, S)$ over the slots of the state or, for a
        segment longer than a chunk, $(B, K, C, C)$, `None` where they are not needed; and the new state.
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

    options: dict[str, Any] = {"bias": bias, "dropout": dropout, "need_weights": need_weights}
    seen = (keys.to(k.dtype), values.to(v.dtype), function)
    if size is not None and length > size:
        out, weights = _in_chunks(layout.put(q), *seen, size, True, layout.filled, **options)
        return layout.back(out), weights, _next_state(state, keys, values, total)
    at, slot = layout.slot, torch.arange(count, device=q.device)
    if size is None:
        out, weights = attend_sight(q, *seen, Sight(at, slot, causal=True), **options)
    else:
        visible = (slot <= at.unsqueeze(-1)) & (slot // size == at.unsqueeze(-1) // size)
        relative = None if bias is None else bias(at % size, slot % size)
        out, weights = attend(q, *seen, bias=relative, visible=visible, dropout=dropout)
    out = zero_padding(out, padding_mask)
    weights = zero_padding(weights, padding_mask).unsqueeze(1) if weights is not None and need_weights else None
    return out, weights, _next_state(state, keys, values, total)


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    size: int,
    causal: bool,
    filled: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attends within chunks of slots; `filled` (B, S) are those that hold a query, the first ones of each row."""
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b (k c) z -> (b k) c z", c=size) for x in (q, k, v))
    shown = None
    if filled is not None:
        filled = rearrange(filled.expand(batch, -1), "b (k c) -> (b k) c", c=size)
        # Every slot before that of a real token is filled, so looking back needs no other mask.
        shown = None if causal else filled.unsqueeze(1)
    slot = torch.arange(size, device=q.device)
    sight = Sight(slot, slot, causal, shown)
    out, weights = attend_sight(q, k, v, function, sight, **options)
    if weights is not None:
        weights = weights if filled is None else weights.masked_fill(~filled.unsqueeze(-1), 0.0)
        weights = rearrange(weights, "(b k) c s -> b k c s", b=batch)
    return rearrange(out, "(b k) c v -> b (k c) v", b=batch), weights


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
