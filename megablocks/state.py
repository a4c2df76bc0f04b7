"""Typed inference states, and what people do with them.

A state is a NamedTuple of tensors, batch on axis 0 of each, or a NamedTuple or tuple of such states. No call ever
writes into one: an old state stays valid, so keeping it is branching from it. `torch.save` and
`torch.load(weights_only=True)` know the types.

Axis letters are those of `megablocks.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megablocks._checks import check_rows

StateT = TypeVar("StateT")


class EMAState(NamedTuple):
    """The running averages of a causal EMA."""

    hidden: Tensor
    """The averages after the last real token, `(B, D, N)`, float32 or wider."""


class TruncatedEMAState(NamedTuple):
    """What a truncated causal EMA remembers: its last K inputs, oldest first, zeros before the first token."""

    inputs: Tensor
    """`(B, K, D)`, float32 or wider."""


class ChunkKeys(NamedTuple):
    """Keys and values of the chunk that is being filled, in tensors of fixed shape."""

    keys: Tensor
    """`(B, C, Z)`; slots from `length` on are zero."""
    values: Tensor
    """`(B, C, V)`."""
    length: Tensor
    """`(B,)`, int64: real tokens of each row in the current chunk, less than C."""


class GrowingKeys(NamedTuple):
    """Keys and values of everything so far; each call appends as many slots as it has tokens."""

    keys: Tensor
    """`(B, S, Z)`, real tokens first; slots from `length` on are zero."""
    values: Tensor
    """`(B, S, V)`."""
    length: Tensor
    """`(B,)`, int64: real tokens of each row."""


class FixedKeys(NamedTuple):
    """Keys and values of everything so far in tensors of fixed shape, for a decoding step compiled once."""

    keys: Tensor
    """`(B, capacity, Z)`, real tokens first; slots from `length` on are zero."""
    values: Tensor
    """`(B, capacity, V)`."""
    length: Tensor
    """`(B,)`, int64: real tokens of each row."""


class WorkingKeys(NamedTuple):
    """Keys and values that belong to one loop, which nobody else sees: a step writes into them instead of copying.

    `generate` makes them of a state and makes a state of them again. Token number i stands in slot i, modulo C where
    there are chunks.
    """

    room: Tensor
    """`(B, S, Z + V)`: a key and a value in each slot; behind the newest token slots may hold anything."""
    qk_dim: int
    """Z."""
    length: Tensor
    """`(B,)`, int64: real tokens of each row since its first slot was filled first."""
    chunk_size: int | None
    """C, `None` for no chunks."""
    begin: int | None
    """The slot of the next token, where it is the same in all rows and that is known without looking."""
    bias: Tensor | None = None
    """`(2P - 1,)` for P positions: the position bias by relative position, made in the first step where it can be."""

    @property
    def keys(self) -> Tensor:
        """`(B, S, Z)`, a view."""
        return self.room[..., : self.qk_dim]

    @property
    def values(self) -> Tensor:
        """`(B, S, V)`, a view."""
        return self.room[..., self.qk_dim :]


KeyState = ChunkKeys | GrowingKeys | FixedKeys | WorkingKeys


class AttentionState(NamedTuple):
    """State of a causal `MovingAverageGatedAttention`."""

    ema: Any
    """State of its EMA."""
    keys: KeyState
    """Keys and values that later tokens may attend to."""


class CrossAttentionState(NamedTuple):
    """State of a `GatedCrossAttention`: the memory, projected once, and where each row of queries stands."""

    keys: Tensor
    """`(B, M, Z)`, real tokens of the memory first."""
    values: Tensor
    """`(B, M, D)`."""
    padding_mask: Tensor
    """`(B, M)`, bool: the padding mask of the memory, in its own order."""
    position: Tensor
    """`(B,)`, int64: real query tokens seen so far."""


class DecoderLayerState(NamedTuple):
    """State of a `MegaDecoderLayer`."""

    attention: Any
    """State of its self-attention."""
    cross_attention: CrossAttentionState | None
    """State of its cross-attention, `None` where it has none."""


class DecoderState(NamedTuple):
    """State of a `MegaDecoder`, and of the models around one."""

    layers: tuple[Any, ...]
    """One state for each layer, first to last."""


torch.serialization.add_safe_globals(
    [
        EMAState,
        TruncatedEMAState,
        ChunkKeys,
        GrowingKeys,
        FixedKeys,
        AttentionState,
        CrossAttentionState,
        DecoderLayerState,
        DecoderState,
    ]
)


def _map(function: Callable[[Tensor], Tensor], state: StateT) -> StateT:
    mapped: StateT = pytree.tree_map_only(Tensor, function, state)
    return mapped


def select_rows(state: StateT, rows: Tensor) -> StateT:
    """Returns the state whose row `i` is row `rows[i]` of `state`.

    Selecting, reordering for beam search and repeating rows are all this one operation.

    Args:
        state: Any state of this package.
        rows: Row numbers, `(B',)`, int64, in any order, repeats allowed.

    Raises:
        TypeError: If `rows` is anything else, such as a list or a mask.

    Example:
        >>> from megablocks import MultiDimensionDampedEMA
        >>> state = MultiDimensionDampedEMA(8, 4).init_state(3)
        >>> select_rows(state, torch.tensor([2, 0])).hidden.shape
        torch.Size([2, 8, 4])
    """
    check_rows(rows)
    return _map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)), state)


def detach(state: StateT) -> StateT:
    """Returns the state cut off from the graph: truncated back-propagation through time."""
    return _map(Tensor.detach, state)


def to_device(state: StateT, device: torch.device | str) -> StateT:
    """Returns the state on another device. Precision stays as it is: states are float32 on purpose."""
    return _map(lambda tensor: tensor.to(device), state)


def size_in_bytes(state: object) -> int:
    """Returns the bytes that the state's tensors hold."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))


def batch_size(state: object) -> int:
    """Returns the number of rows of the state."""
    leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    if not leaves:
        raise ValueError(f"`state` must hold at least one tensor, but is {state!r}.")
    return int(leaves[0].shape[0])
