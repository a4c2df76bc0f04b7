"""Relative position biases: what a query at one position adds to its score for a key at another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megablocks.functional.precision import at_least_float32, without_autocast

ROTARY_BASE = 10000.0


def simple_bias(table: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    r"""Looks the bias up in a table by relative position, $R_{ij} = w_{P - 1 + j - i}$.

    Args:
        table: $w$, $(2P - 1,)$: one entry for each relative position from $-(P-1)$ to $P-1$.
        query_positions: Integers, $(L,)$ or $(B, L)$.
        key_positions: Integers, $(S,)$ or $(B, S)$.

    Returns:
        $(L, S)$ or $(B, L, S)$. Beyond the table its outermost entries stand in.
    """
    last = table.shape[0] - 1
    index = key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1) + last // 2
    return table[index.clamp(0, last)]


def rotary_bias(alpha: Tensor, beta: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    r"""Computes the rotary bias, the dot product of two learned vectors turned by their positions.

    $$R_{ij} = \langle \mathrm{rot}_i\, \alpha,\; \mathrm{rot}_j\, \beta \rangle,$$

    a function of $i - j$ alone, for any positions. Half precisions are computed in float32.

    Args:
        alpha: $(Z,)$, turned by the queries' positions.
        beta: $(Z,)$, turned by the keys' positions.
        query_positions: Integers, $(L,)$ or $(B, L)$.
        key_positions: Integers, $(S,)$ or $(B, S)$.

    Returns:
        $(L, S)$ or $(B, L, S)$, float32 or wider.
    """
    with without_autocast(alpha):
        if query_positions.shape == (1,):  # a decoding step: by relative positions, no vector is turned
            dtype = at_least_float32(alpha.dtype)
            (a, a_too), (b, b_too) = (vector.to(dtype).chunk(2, dim=-1) for vector in (alpha, beta))
            angles = _angles(key_positions - query_positions, alpha.shape[-1] // 2, dtype)
            bias = angles.cos() @ (a * b + a_too * b_too) + angles.sin() @ (a_too * b - a * b_too)
            return bias.unsqueeze(-2)
        return rotate(alpha, query_positions) @ rotate(beta, key_positions).transpose(-1, -2)


def rotate(vector: Tensor, positions: Tensor) -> Tensor:
    r"""Turns a vector by each position: components $k$ and $k + Z/2$ by the angle $i\, 10000^{-2k/Z}$ at position $i$.

    Args:
        vector: $(Z,)$ with even $Z$.
        positions: Integers of any shape.

    Returns:
        The shape of `positions` with $Z$ appended, float32 or wider.
    """
    dtype = at_least_float32(vector.dtype)
    first, second = vector.to(dtype).chunk(2, dim=-1)
    angles = _angles(positions, first.shape[-1], dtype)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _angles(positions: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Angles of pairs of components, the shape of `positions` with their number appended."""
    # Angles grow with the position, so their rounding would too: counted in float64, whole turns left out, they are
    # exact to 1e-9 at a million. Where a device has no float64, they are made on the CPU.
    place = torch.device("cpu") if positions.device.type == "mps" else positions.device
    per_turn = [ROTARY_BASE ** (-k / count) / (2 * math.pi) for k in range(count)]
    turns = positions.to(place).unsqueeze(-1) * torch.tensor(per_turn, dtype=torch.float64, device=place)
    return ((turns - turns.round()) * (2 * math.pi)).to(dtype).to(positions.device)
