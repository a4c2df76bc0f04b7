"""Real tokens put into slots, packed to the left, and taken out again.

Padding is deletion: positions, lags and chunk borders count real tokens only. So whatever depends on positions first
moves the real tokens of each row side by side, works there, and moves the results back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Slots(NamedTuple):
    """Where the tokens of each row go: real token number i of row b into slot `offset[b] + i`."""

    slot: Tensor
    """Slot of each token, (B, L), int64; of no meaning at padding."""
    padding_mask: Tensor | None
    """(B, L), bool, True at padding; `None` where every token is real."""
    source: Tensor
    """Token of each slot, (B, S), int64; 0 in empty slots."""
    filled: Tensor
    """Slots that got a token, (B, S), bool."""

    def put(self, x: Tensor) -> Tensor:
        """Moves (B, L, ...) into slots, (B, S, ...); empty slots are zero."""
        return take(x, self.source, ~self.filled)

    def back(self, y: Tensor) -> Tensor:
        """Moves (B, S, ...) from slots to the tokens they came from, (B, L, ...); padding is zero."""
        return take(y, self.slot, self.padding_mask)


class Span(NamedTuple):
    """Where tokens go that every row puts into the same slots, from `begin` on: the plain case of `Slots`."""

    begin: int
    length: int
    total: int
    device: torch.device

    @property
    def slot(self) -> Tensor:
        """Slot of each token, (L,)."""
        return torch.arange(self.begin, self.begin + self.length, device=self.device)

    @property
    def filled(self) -> Tensor:
        """Slots that got a token, (1, S), bool."""
        slot = torch.arange(self.total, device=self.device)
        return ((slot >= self.begin) & (slot < self.begin + self.length)).unsqueeze(0)

    def put(self, x: Tensor) -> Tensor:
        """Moves (B, L, D) into slots, (B, S, D); empty slots are zero."""
        missing = self.total - self.begin - self.length
        return F.pad(x, (0, 0, self.begin, missing)) if self.begin or missing else x

    def back(self, y: Tensor) -> Tensor:
        """Moves (B, S, D) from slots to the tokens they came from, (B, L, D)."""
        return y[:, self.begin : self.begin + self.length]


def slots(shape: tuple[int, int], count: int, *, padding_mask: Tensor | None, offset: Tensor) -> Slots:
    """Lays out `count` slots for tokens of the given `(batch, length)`; `offset` (B,) is each row's first slot."""
    length = shape[1]
    if padding_mask is None:
        steps = torch.arange(length, device=offset.device)
        slot = offset.unsqueeze(-1) + steps
        source = torch.arange(count, device=offset.device) - offset.unsqueeze(-1)
        filled = (source >= 0) & (source < length)
        return Slots(slot, None, source.clamp(0, length - 1), filled)
    slot = offset.unsqueeze(-1) + (~padding_mask).cumsum(1) - 1
    # Padding goes to a slot behind the last, which is cut off; empty slots keep -1.
    target = torch.where(padding_mask, count, slot)
    token = torch.arange(length, device=offset.device).expand(shape)
    source = torch.full((shape[0], count + 1), -1, device=offset.device).scatter(1, target, token)[:, :count]
    return Slots(slot.clamp(min=0), padding_mask, source.clamp(min=0), source >= 0)


def packed(padding_mask: Tensor) -> Slots:
    """Lays out as many slots as there are tokens, real ones first."""
    shape = (padding_mask.shape[0], padding_mask.shape[1])
    start = torch.zeros(shape[0], dtype=torch.int64, device=padding_mask.device)
    return slots(shape, shape[1], padding_mask=padding_mask, offset=start)


def real_lengths(shape: tuple[int, int], padding_mask: Tensor | None, device: torch.device) -> Tensor:
    """Returns the number of real tokens of each row, (B,), int64."""
    if padding_mask is None:
        return torch.full((shape[0],), shape[1], dtype=torch.int64, device=device)
    return (~padding_mask).sum(1)


def zero_padding(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Returns `x` (B, L, ...) with exact zeros at padding, whatever stood there, NaN included."""
    if padding_mask is None:
        return x
    return x.masked_fill(padding_mask.view(*padding_mask.shape, *[1] * (x.dim() - 2)), 0.0)


def take(x: Tensor, index: Tensor, empty: Tensor | None) -> Tensor:
    """Returns (B, S, ...) with row `index[b, s]` of `x[b]` at each place, zeros where `empty` (B, S) says so."""
    trailing = x.shape[2:]
    picked = x.gather(1, index.view(*index.shape, *[1] * len(trailing)).expand(*index.shape, *trailing))
    return zero_padding(picked, empty)


def last_real_position(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Returns each row's last real position alone, (B, 1, D); zeros for a row of padding."""
    if padding_mask is None:
        return x[:, -1:]
    steps = torch.arange(x.shape[1], device=x.device)
    last = torch.where(padding_mask, -1, steps).amax(1, keepdim=True)
    return take(x, last.clamp(min=0), last < 0)


def last_padding(padding_mask: Tensor | None) -> Tensor | None:
    """Returns the mask of those positions, (B, 1): `True` for a row of padding."""
    return None if padding_mask is None else padding_mask.all(1, keepdim=True)
