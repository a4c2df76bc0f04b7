"""A state that one loop works on: its keys are written into instead of being copied at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megablocks.layers.gated_attention import MovingAverageGatedAttention
from megablocks.state import ChunkKeys, DecoderState, FixedKeys, GrowingKeys, WorkingKeys

ROUND = 128
"""Slots that room for growing keys is a multiple of, where a compiled step should serve more than one length."""


class Workspace(NamedTuple):
    """The state of a loop that reads one token of each row at a time, and what it was made of."""

    state: DecoderState
    originals: tuple[ChunkKeys | GrowingKeys | FixedKeys, ...]

    @classmethod
    def of(cls, model: nn.Module, state: DecoderState, steps: int, *, rounded: bool) -> Workspace | None:
        """Returns a workspace for at most so many steps, or `None` where some keys are not this package's alone.

        Args:
            model: What will read the tokens.
            state: Stays as it is.
            steps: Tokens that each row will read at most.
            rounded: Whether to leave room for more tokens, so that fewer shapes occur.
        """
        originals: list[ChunkKeys | GrowingKeys | FixedKeys] = []

        def working(keys: ChunkKeys | GrowingKeys | FixedKeys) -> Any:
            slots = keys.keys.shape[1]
            if isinstance(keys, GrowingKeys):
                slots += steps
                slots = -(-slots // ROUND) * ROUND if rounded else slots
            elif isinstance(keys, FixedKeys) and int(keys.length.max()) + steps > slots:
                return keys  # too few slots: the state says so when it comes to that
            originals.append(keys)
            missing = slots - keys.keys.shape[1]
            own, values = (F.pad(t, (0, 0, 0, missing)) if missing else t.clone() for t in keys[:2])
            return WorkingKeys(own, values, keys.length)

        made: DecoderState = _map_keys(working, state)
        ours = sum(isinstance(module, MovingAverageGatedAttention) and module.causal for module in model.modules())
        return cls(made, tuple(originals)) if len(originals) == ours else None

    def settled(self, state: DecoderState) -> DecoderState:
        """Returns what the loop has come to as a state of the kind that it began with."""
        originals = iter(self.originals)

        def settle(keys: WorkingKeys) -> Any:
            original = next(originals)
            slots, length = keys.keys.shape[1], keys.length
            if isinstance(original, GrowingKeys):
                slots = original.keys.shape[1] + int((length - original.length).max())
            elif isinstance(original, ChunkKeys):
                length = length % slots
            empty = (torch.arange(slots, device=length.device) >= length.unsqueeze(-1)).unsqueeze(-1)
            own, values = (tensor[:, :slots].masked_fill(empty, 0.0) for tensor in keys[:2])
            return type(original)(own, values, length)

        settled: DecoderState = _map_keys(settle, state)
        return settled


def _map_keys(function: Callable[[Any], Any], state: Any) -> Any:
    """Returns a state with other keys in their places."""
    if isinstance(state, ChunkKeys | GrowingKeys | FixedKeys | WorkingKeys):
        return function(state)
    if isinstance(state, tuple):
        parts = [_map_keys(function, part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
