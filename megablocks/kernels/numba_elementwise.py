"""Gates and dropout on the CPU, compiled by numba, in as few passes over memory as there can be.

One function of torch after another reads and writes whole tensors, and a processor waits for memory most of that time:
a gate takes two such functions, its gradients four to six. Here they take one and two. Dropout keeps nothing of what it
has dropped: it draws the same again in the backward pass, from the seed.

Loops run over rows of contiguous numbers, which numba turns into vector instructions by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from megablocks.kernels.numba_host import Array, reserve, share_out
from megablocks.kernels.numba_tiles import Compiled, _compile
from megablocks.kernels.registered import torch_operator

_COST = 8
"""What a number takes here, in steps of one average of one channel (see `share_out`)."""

_GROUP = 256
"""Draws of four numbers each that stand together; first come all first numbers, then all second ones."""

_ONE = np.float32(1.0)
_LOG2_E = np.float32(math.log2(math.e))
_LN2_HIGH = np.float32(0.693359375)  # of few digits, so that whole multiples are exact
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
_COEFFICIENTS = tuple(np.float32(1.0 / math.factorial(k)) for k in range(7, 1, -1))
_LOWEST, _HIGHEST = np.float32(-88.0), np.float32(88.8)  # of which 2^n is zero, and infinite

_WORD = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)


@_compile
def exponential(x: Any) -> Any:
    """e^x in float32 to two units in the last place: 2^n times a polynomial of what is left, |r| <= ln(2) / 2.

    Zero below -87.3, where numbers are no longer normal, and infinite from 88.4 on.
    """
    x = _LOWEST if x < _LOWEST else (_HIGHEST if x > _HIGHEST else x)  # so that NaN stays
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    total = _COEFFICIENTS[0]
    for coefficient in _COEFFICIENTS[1:]:
        total = total * r + coefficient
    total = (total * r + _ONE) * r + _ONE
    return total * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compile
def _shares(x: Any) -> Any:
    """sigmoid(x) and sigmoid(-x), both with all their digits."""
    e = exponential(-abs(x))
    more = _ONE / (_ONE + e)
    less = e * more
    return (more, less) if x >= 0 else (less, more)


@numba.njit(inline="always")  # or its rounds stay a loop, which stands in the way of vectors
def philox(a: Any, b: Any, c: Any, d: Any, low: Any, high: Any) -> Any:
    """Four random numbers of 32 bits for a counter of four and a key of two: Philox 4x32 in ten rounds.

    Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
    """
    for _ in range(10):
        left, right = _MULTIPLIERS[0] * np.uint64(a), _MULTIPLIERS[1] * np.uint64(c)
        a, b = np.uint32(right >> _WORD) ^ b ^ low, np.uint32(right)
        c, d = np.uint32(left >> _WORD) ^ d ^ high, np.uint32(left)
        low, high = np.uint32(low + _KEY_STEPS[0]), np.uint32(high + _KEY_STEPS[1])
    return a, b, c, d


@_compile
def _row(rows: Any, r: int, width: int) -> Any:
    """Row `r` of a tensor, which is its numbers and how many of them lie from row to row."""
    numbers, stride = rows
    return numbers[r * stride : r * stride + width]


@_compile
def _dropout_task(row: int, first: int, last: int, seed: Any, limit: Any, scale: Any, x: Any, y: Any) -> None:
    """Zeroes the numbers of groups `first` to `last` whose draw is above the limit, and scales the others.

    `row` counts rows of a batch for kernels that have them, here and below (see `share_out`).
    """
    low, high, none = np.uint32(seed), np.uint32(seed >> _WORD), np.uint32(0)
    draws = np.empty(4 * _GROUP, np.uint32)
    firsts, seconds = draws[:_GROUP], draws[_GROUP : 2 * _GROUP]
    thirds, fourths = draws[2 * _GROUP : 3 * _GROUP], draws[3 * _GROUP :]
    nothing = y.dtype.type(0)
    for group in range(first, last):
        counter = np.uint64(group * _GROUP)
        begin, above = np.uint32(counter), np.uint32(counter >> _WORD)
        for i in range(_GROUP):
            at = np.uint32(begin + np.uint32(i))
            firsts[i], seconds[i], thirds[i], fourths[i] = philox(at, above, none, none, low, high)
        begin_at, end_at = 4 * _GROUP * group, 4 * _GROUP * (group + 1)
        given, made = x[begin_at:end_at], y[begin_at:end_at]
        for i in range(given.size):
            made[i] = given[i] * scale if draws[i] <= limit else nothing


@_compile
def _silu_gate_task(row: int, first: int, last: int, width: int, x: Any, gate: Any, y: Any) -> None:
    """Rows `first` to `last` of x silu(gate)."""
    for r in range(first, last):
        a, u, made = _row(x, r, width), _row(gate, r, width), _row(y, r, width)
        for c in range(width):
            made[c] = a[c] * (u[c] / (_ONE + exponential(-u[c])))


@_compile
def _silu_gate_slope_task(row: int, first: int, last: int, width: int, dy: Any, x: Any, gate: Any, dgate: Any) -> None:
    """Rows of the gradient of the gate; that of x is the gradient of y, gated."""
    for r in range(first, last):
        given, a, u, made = _row(dy, r, width), _row(x, r, width), _row(gate, r, width), _row(dgate, r, width)
        for c in range(width):
            share, rest = _shares(u[c])
            made[c] = given[c] * (a[c] * (share * (_ONE + u[c] * rest)))


@_compile
def _update_gate_task(row: int, first: int, last: int, width: int, x: Any, candidate: Any, update: Any, y: Any) -> None:
    """Rows of x + sigmoid(update) (candidate - x), counted from the nearer end, which is then exact."""
    for r in range(first, last):
        a, h, u, made = _row(x, r, width), _row(candidate, r, width), _row(update, r, width), _row(y, r, width)
        for c in range(width):
            share, rest = _shares(u[c])
            way = h[c] - a[c]
            made[c] = a[c] + share * way if share < rest else h[c] - rest * way


@_compile
def _update_gate_slope_task(
    row: int, first: int, last: int, width: int, dy: Any, x: Any, candidate: Any, update: Any, dupdate: Any
) -> None:
    """Rows of the gradient of the update."""
    for r in range(first, last):
        given, a, h, u = _row(dy, r, width), _row(x, r, width), _row(candidate, r, width), _row(update, r, width)
        made = _row(dupdate, r, width)
        for c in range(width):
            share, rest = _shares(u[c])
            made[c] = given[c] * (share * rest * (h[c] - a[c]))


@_compile
def _update_gate_shares_task(
    row: int, first: int, last: int, width: int, dy: Any, update: Any, dx: Any, dcandidate: Any
) -> None:
    """Rows of what x and the candidate have of the gradient."""
    for r in range(first, last):
        given, u = _row(dy, r, width), _row(update, r, width)
        to_x, to_candidate = _row(dx, r, width), _row(dcandidate, r, width)
        for c in range(width):
            share, rest = _shares(u[c])
            to_x[c], to_candidate[c] = given[c] * rest, given[c] * share


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    y = reserve(x, zeros=False)
    numbers = x.contiguous().numpy().reshape(-1)
    limit = np.uint32(max(round((1.0 - p) * 2**32) - 1, 0))
    arguments = (np.uint64(int(seed) % 2**64), limit, y.dtype.type(1.0 / (1.0 - p)), numbers, y.reshape(-1))
    if numbers.size:
        share_out(_dropout_task, 1, -(-numbers.size // (4 * _GROUP)), numbers.size * _COST, *arguments)
    return torch.from_numpy(y)


def _gate(task: Compiled) -> Callable[..., Tensor]:
    return lambda *inputs: _run(task, 1, *inputs)[0]


def _update_gate_shares(dy: Tensor, update: Tensor) -> tuple[Tensor, ...]:
    return _run(_update_gate_shares_task, 2, dy, update)


def _run(task: Compiled, results: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Results, each like the first input, of a task over rows of the last axis."""
    x = inputs[0]
    for part in inputs:
        if part.shape != x.shape or part.dtype != torch.float32:
            raise ValueError(
                f"Tensors of a compiled gate must be float32 and of one shape, but are "
                f"{', '.join(f'{other.dtype} {tuple(other.shape)}' for other in inputs)}; use torch's functions."
            )
    made = tuple(torch.from_numpy(reserve(x, zeros=False)) for _ in range(results))
    if x.numel():
        width = x.shape[-1] if x.dim() else 1
        count = x.numel() // width
        share_out(task, 1, count, x.numel() * _COST, width, *(_in_rows(part, width) for part in (*inputs, *made)))
    return made


def _in_rows(x: Tensor, width: int) -> tuple[Array, int]:
    """The numbers of a tensor, from its first to its last one, and how many of them lie from row to row."""
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, stride = rows.shape[0], rows.stride(0)
    return rows.as_strided(((count - 1) * stride + width,), (1,)).numpy(), stride


def _like_first(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like_both(dy: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    return _like_first(dy), _like_first(dy)


dropout = torch_operator("dropout", "Tensor x, Tensor seed, float p", _dropout, _like_first, 1)
"""Zeroes numbers of a tensor with probability p and scales the others by 1 / (1 - p); the seed is one int64."""

silu_gate = torch_operator("silu_gate", "Tensor x, Tensor gate", _gate(_silu_gate_task), _like_first, 1)
"""x silu(gate); all tensors of a gate are float32 and of one shape."""

silu_gate_slope = torch_operator(
    "silu_gate_slope", "Tensor dy, Tensor x, Tensor gate", _gate(_silu_gate_slope_task), _like_first, 1
)
"""The gradient of that gate."""

update_gate = torch_operator(
    "update_gate", "Tensor x, Tensor candidate, Tensor update", _gate(_update_gate_task), _like_first, 1
)
"""x + sigmoid(update) (candidate - x)."""

update_gate_slope = torch_operator(
    "update_gate_slope",
    "Tensor dy, Tensor x, Tensor candidate, Tensor update",
    _gate(_update_gate_slope_task),
    _like_first,
    1,
)
"""The gradient of that update."""

update_gate_shares = torch_operator(
    "update_gate_shares", "Tensor dy, Tensor update", _update_gate_shares, _like_both, 2
)
"""The gradients of x and of the candidate."""
