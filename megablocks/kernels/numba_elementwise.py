"""Gates and dropout on the CPU, compiled by numba: each number is read once and written once.

One function of torch after another reads and writes whole tensors, and a processor waits for memory most of that time:
the gradient of a gate takes six of them. Here it is one pass. Dropout needs no memory for what it has dropped: it draws
the same again in the backward pass, from the seed.

Loops run over rows of contiguous numbers, which numba turns into vector instructions by itself.
"""

from __future__ import annotations

import math
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
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.8)

_WORD = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)


@_compile
def exponential(x: Any) -> Any:
    """e^x in float32 to two units in the last place: 2^n times a polynomial of what is left, |r| <= ln(2) / 2."""
    x = _LOWEST if x < _LOWEST else (_HIGHEST if x > _HIGHEST else x)  # so that NaN stays
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    total = _COEFFICIENTS[0]
    for coefficient in _COEFFICIENTS[1:]:
        total = total * r + coefficient
    total = (total * r + _ONE) * r + _ONE
    return total * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compile
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + exponential(-x))


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
    """Zeroes the numbers of groups `first` to `last` whose draw is above the limit, and scales the others."""
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
            made[c] = a[c] * u[c] * _sigmoid(u[c])


@_compile
def _silu_gate_back_task(
    row: int, first: int, last: int, width: int, dy: Any, x: Any, gate: Any, dx: Any, dgate: Any
) -> None:
    for r in range(first, last):
        given, a, u = _row(dy, r, width), _row(x, r, width), _row(gate, r, width)
        to_x, to_gate = _row(dx, r, width), _row(dgate, r, width)
        for c in range(width):
            s = _sigmoid(u[c])
            to_x[c] = given[c] * u[c] * s
            to_gate[c] = given[c] * a[c] * s * (_ONE + u[c] * (_ONE - s))


@_compile
def _update_gate_task(row: int, first: int, last: int, width: int, x: Any, candidate: Any, update: Any, y: Any) -> None:
    """Rows `first` to `last` of x + sigmoid(update) (candidate - x)."""
    for r in range(first, last):
        a, h, u, made = _row(x, r, width), _row(candidate, r, width), _row(update, r, width), _row(y, r, width)
        for c in range(width):
            made[c] = a[c] + _sigmoid(u[c]) * (h[c] - a[c])


@_compile
def _update_gate_back_task(
    row: int,
    first: int,
    last: int,
    width: int,
    dy: Any,
    x: Any,
    candidate: Any,
    update: Any,
    dx: Any,
    dcandidate: Any,
    dupdate: Any,
) -> None:
    for r in range(first, last):
        given, a, h, u = _row(dy, r, width), _row(x, r, width), _row(candidate, r, width), _row(update, r, width)
        to_x, to_candidate, to_update = _row(dx, r, width), _row(dcandidate, r, width), _row(dupdate, r, width)
        for c in range(width):
            s = _sigmoid(u[c])
            taken = given[c] * s
            to_x[c] = given[c] - taken
            to_candidate[c] = taken
            to_update[c] = taken * (_ONE - s) * (h[c] - a[c])


def _dropout(x: Tensor, seed: int, p: float) -> Tensor:
    y = reserve(x, zeros=False)
    numbers = x.contiguous().numpy().reshape(-1)
    limit = np.uint32(max(round((1.0 - p) * 2**32) - 1, 0))
    arguments = (np.uint64(seed), limit, y.dtype.type(1.0 / (1.0 - p)), numbers, y.reshape(-1))
    share_out(_dropout_task, 1, -(-numbers.size // (4 * _GROUP)), numbers.size * _COST, *arguments)
    return torch.from_numpy(y)


def _silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    (y,) = _by_rows(_silu_gate_task, 1, x, gate)
    return y


def _silu_gate_back(dy: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    return _by_rows(_silu_gate_back_task, 2, dy, x, gate)


def _update_gate(x: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
    (y,) = _by_rows(_update_gate_task, 1, x, candidate, update)
    return y


def _update_gate_back(dy: Tensor, x: Tensor, candidate: Tensor, update: Tensor) -> tuple[Tensor, ...]:
    return _by_rows(_update_gate_back_task, 3, dy, x, candidate, update)


def _by_rows(task: Compiled, results: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Results, each like the first input, of a task over rows of the last axis."""
    made = [torch.from_numpy(reserve(inputs[0], zeros=False)) for _ in range(results)]
    rows = [_rows(part) for part in (*inputs, *made)]
    width = inputs[0].shape[-1]
    count = inputs[0].numel() // width
    share_out(task, 1, count, count * width * _COST, width, *rows)
    return tuple(made)


def _rows(x: Tensor) -> tuple[Array, int]:
    """The numbers of a tensor, from its first to its last one, and how many of them lie from row to row."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count, stride = rows.shape[0], rows.stride(0)
    return rows.as_strided(((count - 1) * stride + rows.shape[1],), (1,)).numpy(), stride


def _same_shape(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _same_shapes(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(_same_shape(part) for part in inputs)


dropout = torch_operator("dropout", "Tensor x, int seed, float p", _dropout, _same_shape, 1)
"""Zeroes numbers of a contiguous or other tensor with probability p and scales the others by 1 / (1 - p)."""

silu_gate = torch_operator("silu_gate", "Tensor x, Tensor gate", _silu_gate, _same_shape, 1)
"""x silu(gate); all tensors of a gate are float32 and of one shape."""

silu_gate_back = torch_operator(
    "silu_gate_backward", "Tensor dy, Tensor x, Tensor gate", _silu_gate_back, _same_shapes, 2
)
"""Gradients of x and of the gate."""

update_gate = torch_operator("update_gate", "Tensor x, Tensor candidate, Tensor update", _update_gate, _same_shape, 1)
"""x + sigmoid(update) (candidate - x)."""

update_gate_back = torch_operator(
    "update_gate_backward",
    "Tensor dy, Tensor x, Tensor candidate, Tensor update",
    _update_gate_back,
    _same_shapes,
    3,
)
"""Gradients of x, of the candidate and of the update."""


def _dropout_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return dropout(dy, ctx.seed, ctx.p), None, None


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.seed, ctx.p = inputs


dropout.register_autograd(_dropout_gradient, setup_context=_remember)
