"""Single-head attention with softmax, relu2, laplace or any function: whole or in chunks, causal or not, streamed.

A query sees a set of keys; everything is said of that set: softmax runs over it, the other functions divide scores by
its size. Keys that are padding, in the future or in another chunk are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from megablocks._checks import values_readable
from megablocks.functional.attention_function import Attention
from megablocks.functional.padding import (
    Slots,
    Span,
    last_padding,
    last_real_position,
    real_lengths,
    slots,
    take,
    zero_padding,
)
from megablocks.functional.position import simple_bias
from megablocks.functional.sight import (
    PositionBias,
    Sight,
    any_length,
    apply_weights,
    attend,
    attend_sight,
    relative_bias,
    relative_table,
)
from megablocks.state import ChunkKeys, FixedKeys, GrowingKeys, KeyState, WorkingKeys


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
    if chunk_size is not None and any_length(length):  # a chunk to spare: how the last one falls is no other case
        size, count = chunk_size, (length // chunk_size + 2) * chunk_size
    else:
        size = length if chunk_size is None else min(chunk_size, length)
        count = -(-length // size) * size
    options: dict[str, Any] = {"bias": bias, "dropout": dropout, "need_weights": need_weights}
    if padding_mask is None:
        filled = None if count == length else (torch.arange(count, device=q.device) < length).unsqueeze(0)
        if filled is not None:
            q, k, v = (F.pad(x, (0, 0, 0, count - length)) for x in (q, k, v))
        out, weights = _in_chunks(q, k, v, function, size, causal, filled, **options)
        return out[:, :length], weights
    start = torch.zeros(batch, dtype=torch.int64, device=q.device)
    layout = slots((batch, length), count, padding_mask=padding_mask, offset=start)
    packed = (layout.put(q), layout.put(k), layout.put(v))
    out, weights = _in_chunks(*packed, function, size, causal, layout.filled, **options)
    if weights is None or count > size:
        return layout.back(out), weights
    by_query = layout.back(weights.squeeze(1))
    weights = layout.back(by_query.transpose(1, 2)).transpose(1, 2).unsqueeze(1)
    return apply_weights(weights, v.unsqueeze(1), dropout).squeeze(1), weights


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
    last_only: bool = False,
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
        last_only: Whether each row's last real query alone attends: output and weights are those of $L = 1$.

    Returns:
        The output $(B, L, V)$, zero at padding; the weights, $(B, 1, L, S)$ over the slots of the state or, for a
        segment longer than a chunk, $(B, K, C, C)$, `None` where they are not needed; and the new state.
    """
    options: dict[str, Any] = {"bias": bias, "dropout": dropout, "need_weights": need_weights}
    if isinstance(state, WorkingKeys):
        return _in_place(q, k, v, state, function, padding_mask, **options)
    shape = (q.shape[0], q.shape[1])
    length, held = q.shape[1], state.keys.shape[1]
    size = held if isinstance(state, ChunkKeys) else None
    begin = _common_position(state.length) if padding_mask is None else None
    if size is None:
        count = held if isinstance(state, FixedKeys) else held + length
    elif begin is not None:
        count = -(-(begin + length) // size) * size
    else:
        count = held + length - 1 if length <= size else -(-(held + length - 1) // size) * size
    layout: Slots | Span = (
        slots(shape, count, padding_mask=padding_mask, offset=state.length)
        if begin is None
        else Span(begin, length, count, q.device)
    )
    total = state.length + real_lengths(shape, padding_mask, q.device)
    if isinstance(state, FixedKeys):
        _check_capacity(total, held)
    keys, values = _append(state.keys, k, layout), _append(state.values, v, layout)

    seen = (keys.to(k.dtype), values.to(v.dtype), function)
    at = layout.slot
    if last_only:
        q, padding_mask = last_real_position(q, padding_mask), last_padding(padding_mask)
        at = at[-1:] if begin is not None else (total - 1).clamp(min=0).unsqueeze(-1)
    elif size is not None and length > size:
        out, weights = _in_chunks(layout.put(q), *seen, size, True, layout.filled, **options)
        return layout.back(out), weights, _next_state(state, keys, values, total)
    slot = torch.arange(count, device=q.device)
    if size is None or count == size:
        out, weights = attend_sight(q, *seen, Sight(at, slot, causal=True), **options)
    else:
        visible = (slot <= at.unsqueeze(-1)) & (slot // size == at.unsqueeze(-1) // size)
        relative = None if bias is None else relative_bias(bias, at % size, slot % size)
        out, weights = attend(q, *seen, bias=relative, visible=visible, dropout=dropout)
    out = zero_padding(out, padding_mask)
    weights = zero_padding(weights, padding_mask).unsqueeze(1) if weights is not None and need_weights else None
    return out, weights, _next_state(state, keys, values, total)


def passed_chunks(state: KeyState, length: int) -> tuple[int, KeyState]:
    """Returns how many tokens of a segment stand in chunks before that of its last token, and keys at its beginning.

    None do unless all rows stand alike; the keys are then those of the state. Padding is for the caller to look at.
    """
    begin = _common_position(state.length) if isinstance(state, ChunkKeys) else None
    size = state.keys.shape[1]
    passed = 0 if begin is None else (begin + length - 1) // size * size - begin
    if passed <= 0:
        return 0, state
    return passed, ChunkKeys(*(torch.zeros_like(part) for part in (state.keys, state.values, state.length)))


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    size: int,
    causal: bool,
    filled: Tensor | None,
    *,
    bias: PositionBias | None,
    dropout: Callable[[Tensor], Tensor] | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attends within chunks of slots; `filled` (B, S) are those that hold a query, the first ones of each row."""
    batch = q.shape[0]
    count = q.shape[1] // size  # which einops cannot find out of a batch without rows
    q, k, v = (rearrange(x, "b (k c) z -> (b k) c z", k=count) for x in (q, k, v))
    shown = None
    if filled is not None:
        filled = rearrange(filled.expand(batch, -1), "b (k c) -> (b k) c", k=count)
        # Every slot before that of a real token is filled, so looking back needs no other mask.
        shown = None if causal else filled.unsqueeze(1)
    slot = torch.arange(size, device=q.device)
    sight = Sight(slot, slot, causal, shown)
    # Weights that are shown are the applied ones, so that gradients can be asked of them.
    early = None if need_weights else dropout
    out, weights = attend_sight(q, k, v, function, sight, bias=bias, dropout=early, need_weights=need_weights)
    if weights is not None:
        weights = weights if filled is None else weights.masked_fill(~filled.unsqueeze(-1), 0.0)
        weights = rearrange(weights, "(b k) c s -> b k c s", k=count)
        out = apply_weights(weights, rearrange(v, "(b k) c v -> b k c v", k=count), dropout).flatten(0, 1)
    return rearrange(out, "(b k) c v -> b (k c) v", k=count), weights


def _in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: WorkingKeys,
    function: Attention,
    padding_mask: Tensor | None,
    *,
    bias: PositionBias | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None, KeyState]:
    """Attends from one token to those before it and itself, which it puts among them; padding is written over later."""
    table = state.bias
    if table is None and bias is not None and not torch.compiler.is_compiling():
        table = relative_table(bias, state.room.shape[1])
    own = torch.cat([k, v], dim=-1).to(state.room.dtype)
    begin = state.begin if padding_mask is None else None
    if begin is not None:
        after: int | None = begin + 1 if state.chunk_size is None else (begin + 1) % state.chunk_size
        state.room[:, begin : begin + 1] = own
        end, at = begin + 1, torch.tensor([begin], device=q.device)
        if table is not None:
            bias = partial(_bias_of_newest, table)
    else:
        after, at = None, state.length if state.chunk_size is None else state.length % state.chunk_size
        state.room[torch.arange(q.shape[0], device=q.device), at] = own.squeeze(1)
        end, at = int(at.max()) + 1 if values_readable(at) else state.room.shape[1], at.unsqueeze(-1)
        if table is not None:
            bias = partial(simple_bias, table)
    seen = state.room[:, :end]
    keys, values = seen[..., : state.qk_dim].to(k.dtype), seen[..., state.qk_dim :].to(v.dtype)
    sight = Sight(at, torch.arange(end, device=q.device), causal=begin is None)
    out, weights = attend_sight(q, keys, values, function, sight, bias=bias, **options)
    out = zero_padding(out, padding_mask)
    weights = None if weights is None else zero_padding(weights, padding_mask).unsqueeze(1)
    total = state.length + real_lengths((q.shape[0], 1), padding_mask, q.device)
    return out, weights, state._replace(length=total, begin=after, bias=table)


def _bias_of_newest(table: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """The bias of one query for all keys up to its own, (1, S), which is a slice of the table."""
    same = table.shape[0] // 2
    return table[same + 1 - keys.shape[0] : same + 1].unsqueeze(0)


def _common_position(length: Tensor) -> int | None:
    """Where all rows of a state stand, if they stand alike and that can be read."""
    if not values_readable(length) or not length.numel() or not bool((length == length[0]).all()):
        return None
    return int(length[0])


def _append(held: Tensor, new: Tensor, layout: Slots | Span) -> Tensor:
    """Keys or values of a state, followed in each row by those of the segment: (B, S, ...)."""
    new = new.to(held.dtype)
    if isinstance(layout, Span):
        if layout.length == layout.total:
            return new
        empty = held.new_zeros(held.shape[0], layout.total - layout.begin - layout.length, held.shape[2])
        return torch.cat([held[:, : layout.begin], new, empty], dim=1)
    missing = layout.source.shape[1] - held.shape[1]
    grown = F.pad(held, (0, 0, 0, missing)) if missing else held
    if layout.padding_mask is not None:  # both are zero where the other is not
        return grown + layout.put(new)
    return grown.scatter(1, layout.slot.unsqueeze(-1).expand(new.shape), new)


def _next_state(state: KeyState, keys: Tensor, values: Tensor, total: Tensor) -> KeyState:
    if isinstance(state, GrowingKeys):
        return GrowingKeys(keys, values, total)
    if isinstance(state, FixedKeys):
        return FixedKeys(keys, values, total)
    size = state.keys.shape[1]
    if keys.shape[1] == size:  # one token: the chunk stays as it is, until it is full
        full = total == size
        if values_readable(full) and not bool(full.any()):
            return ChunkKeys(keys, values, total)
        keys, values = (tensor.masked_fill(full.view(-1, 1, 1), 0.0) for tensor in (keys, values))
        return ChunkKeys(keys, values, total.masked_fill(full, 0))
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
