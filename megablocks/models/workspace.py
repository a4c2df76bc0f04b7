"""What one loop works on: keys that are written into instead of being copied at every step, and a compiled step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megablocks.layers.cross_attention import GatedCrossAttention
from megablocks.layers.gated_attention import MovingAverageGatedAttention
from megablocks.state import ChunkKeys, DecoderState, FixedKeys, GrowingKeys, WorkingKeys

WINDOW = 32
"""Slots that the keys of a compiled step are a multiple of, so that most steps have the shapes of the step before."""

Read = Callable[[nn.Module, Tensor, Tensor | None, DecoderState], tuple[Tensor, DecoderState]]
"""Reads a segment: a model, its tokens, their padding, a state; returns logits and the state after it."""


class Workspace(NamedTuple):
    """The state of a loop that reads one token of each row at a time, and what it was made of."""

    state: DecoderState
    originals: tuple[ChunkKeys | GrowingKeys | FixedKeys, ...]

    @classmethod
    def of(cls, model: nn.Module, state: DecoderState, steps: int) -> Workspace | None:
        """Returns a workspace for at most so many steps, or `None` where some keys are not this package's alone.

        Args:
            model: What will read the tokens.
            state: Stays as it is.
            steps: Tokens that each row will read at most.
        """
        originals: list[ChunkKeys | GrowingKeys | FixedKeys] = []

        def working(keys: ChunkKeys | GrowingKeys | FixedKeys) -> Any:
            slots, longest = keys.keys.shape[1], int(keys.length.max())
            if isinstance(keys, GrowingKeys):
                slots += steps
            elif isinstance(keys, FixedKeys) and longest + steps > slots:
                return keys  # too few slots: the state says so when it comes to that
            originals.append(keys)
            chunk_size = slots if isinstance(keys, ChunkKeys) else None
            begin = longest if longest == int(keys.length.min()) else None
            return WorkingKeys(_room(keys, slots), keys.keys.shape[2], keys.length, chunk_size, begin)

        made: DecoderState = _map_keys(working, state)
        ours = sum(isinstance(module, MovingAverageGatedAttention) and module.causal for module in model.modules())
        return cls(made, tuple(originals)) if len(originals) == ours else None

    def settled(self, state: DecoderState) -> DecoderState:
        """Returns what the loop has come to as a state of the kind that it began with."""
        originals, rooms = iter(self.originals), iter(_working_keys(self.state))

        def settle(keys: WorkingKeys) -> Any:
            original, room = next(originals), next(rooms)
            slots, length = room.room.shape[1], keys.length
            if isinstance(original, GrowingKeys):
                slots = original.keys.shape[1] + int((length - original.length).max())
            elif isinstance(original, ChunkKeys):
                length = length % slots
            empty = (torch.arange(slots, device=length.device) >= length.unsqueeze(-1)).unsqueeze(-1)
            own, values = (tensor[:, :slots].masked_fill(empty, 0.0) for tensor in (room.keys, room.values))
            return type(original)(own, values, length)

        settled: DecoderState = _map_keys(settle, state)
        return settled


class CompiledSteps:
    """Reads the tokens of a loop with a compiled step, which is shown as much of the keys as has been written.

    Lengths that grow are marked as such, so that the step is compiled once and serves them all.

    Args:
        plain: What reads a segment without being compiled.
        compiled: The same, compiled.
        model: What will read the tokens.
        working: What the loop works on.
        ends: Whether rows may come to stand still.
    """

    def __init__(self, plain: Read, compiled: Read, model: nn.Module, working: Workspace, *, ends: bool) -> None:
        self._plain, self._compiled = plain, compiled
        self._rooms = _working_keys(working.state)
        self._begins = [int(keys.length.max()) for keys in self._rooms]
        self._together = not ends and all(keys.begin is not None for keys in self._rooms)
        self._reach = min((bias.max_positions for bias in _limited_biases(model)), default=None)
        self._steps = 0
        self._shown: list[int] | None = None

    def __call__(
        self, model: nn.Module, tokens: Tensor, padding_mask: Tensor | None, state: DecoderState
    ) -> tuple[Tensor, DecoderState]:
        """Reads one token of each row."""
        step, self._steps = self._steps, self._steps + 1
        if step == 0:  # which makes the tables
            return self._plain(model, tokens, padding_mask, state)
        if self._reach is not None and max(self._begins, default=0) + step >= self._reach:
            self._shown = None  # rows that have come to the end of a bias are told so, if there are any
            whole = [keys.room.shape[1] for keys in self._rooms]
            return self._plain(model, tokens, padding_mask, self._windowed(state, whole))
        slots = [self._slots(keys, begin + step) for keys, begin in zip(self._rooms, self._begins, strict=True)]
        if slots == self._shown:  # steps are alike: nothing need be looked at again to know so
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                return self._compiled(model, tokens, padding_mask, state)
        self._shown = slots
        with torch._dynamo.config.patch(_no_limits()):
            return self._compiled(model, tokens, padding_mask, self._windowed(state, slots))

    def _slots(self, keys: WorkingKeys, position: int) -> int:
        """Slots that are shown while the token at a position, the last of any row, is read."""
        most = keys.room.shape[1]
        if keys.chunk_size is None:
            most = most if self._reach is None else min(most, self._reach)
        elif self._together:
            position %= keys.chunk_size
        else:
            return most
        return min(-(-(position + 1) // WINDOW) * WINDOW, most)

    def _windowed(self, state: DecoderState, slots: list[int]) -> DecoderState:
        rooms = iter(zip(self._rooms, slots, strict=True))

        def windowed(keys: WorkingKeys) -> WorkingKeys:
            whole, end = next(rooms)
            seen = keys._replace(room=whole.room[:, :end], begin=None)
            if keys.chunk_size is None or self._together:
                torch._dynamo.maybe_mark_dynamic(seen.room, 1)
            if keys.chunk_size is None and seen.bias is not None:
                torch._dynamo.maybe_mark_dynamic(seen.bias, 0)
            return seen

        shown: DecoderState = _map_keys(windowed, state)
        return shown


@cache
def _no_limits() -> dict[str, int]:
    """Settings that let a step be compiled for any number of models and rows: torch fails at the ninth otherwise."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    return {name: sys.maxsize, f"accumulated_{name}": sys.maxsize}


def _room(keys: ChunkKeys | GrowingKeys | FixedKeys, slots: int) -> Tensor:
    """So many slots (B, S, Z + V), the first as they are; S is outermost, so that no stride depends on it."""
    held = torch.cat([keys.keys, keys.values], dim=-1)
    room = held.new_zeros(slots, held.shape[0], held.shape[2]).transpose(0, 1)
    room[:, : held.shape[1]] = held
    return room


def _limited_biases(model: nn.Module) -> Iterator[Any]:
    """Biases that do not reach as far as the positions of a loop may grow."""
    for part in model.modules():
        grows = isinstance(part, MovingAverageGatedAttention) and part.causal and part.chunk_size is None
        if grows or isinstance(part, GatedCrossAttention):
            bias: Any = part.position_bias
            if hasattr(bias, "max_positions"):
                yield bias


def _working_keys(state: DecoderState) -> list[WorkingKeys]:
    found: list[WorkingKeys] = []
    _map_keys(found.append, state)
    return found


def _map_keys(function: Callable[[Any], Any], state: Any) -> Any:
    """Returns a state with other keys in their places."""
    if isinstance(state, ChunkKeys | GrowingKeys | FixedKeys | WorkingKeys):
        return function(state)
    if isinstance(state, tuple):
        parts = [_map_keys(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
