"""The damped EMA as one pass over time on the CPU, compiled by numba.

The compiled half stands in `numba_tiles`, and in `numba_windows` for truncated averages. The backward pass runs time
backwards; it needs the state before each block, and computes it again from states that it lays down once in a chunk.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megablocks.kernels.numba_host import Array, Direction, directions, reserve, share_out, untiled
from megablocks.kernels.numba_tiles import STEPS, backward_task, forward_task
from megablocks.kernels.numba_vectors import TILE
from megablocks.kernels.numba_windows import (
    far_lags,
    far_room,
    truncated_backward_task,
    truncated_forward_task,
    whole_blocks,
)
from megablocks.kernels.registered import RegisteredKernel

_INSIDE = range(STEPS)
_whatever_numbers_come = np.errstate(all="ignore")  # and whatever the caller has told NumPy


@_whatever_numbers_come
def forward(
    x: Tensor,
    log_q: Tensor,
    b: Tensor,
    g: Tensor,
    omega: Tensor | None,
    hidden: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns outputs and final states (see `megablocks.kernels.registered`)."""
    y = reserve(x, zeros=lengths is not None)
    states = _states(hidden, x, b)
    for way in directions(log_q, b, g, omega, x.shape[2]):
        moved = np.zeros_like(states) if way.flip else states
        arguments = (*way.tables, x.numpy(), moved, y)
        share_out(forward_task, *_size(x, b), way.flip, _counts(x, lengths), *arguments)
    return torch.from_numpy(y), _given_back(states)


@_whatever_numbers_come
def backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    log_q: Tensor,
    b: Tensor,
    g: Tensor,
    omega: Tensor | None,
    hidden: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients (see `megablocks.kernels.registered`)."""
    batch, _, width = x.shape
    dx = reserve(x, zeros=lengths is not None)
    begin, adjoint = _states(hidden, x, b), _states(dfinal, x, b)
    domega = np.empty(0)
    grads = []
    for way in directions(log_q, b, g, omega, width):
        start, end = (np.zeros_like(begin), np.zeros_like(begin)) if way.flip else (begin, adjoint)
        sums = [np.empty_like(begin) for _ in range(3)]
        dinside = np.zeros((batch, len(way.records), STEPS * TILE), begin.dtype)
        arguments = (*way.tables, x.numpy(), start, dy.numpy(), end, dx, *sums, dinside)
        share_out(backward_task, *_size(x, b), way.flip, _counts(x, lengths), *arguments)
        through_inside = way.through_weights(_INSIDE, _lags(dinside.sum(0)))
        grads.append([part.sum(0).T + untiled(more, width) for part, more in zip(sums, through_inside, strict=True)])
        if not way.flip:
            domega = _of_skip(dinside, width)
    dlog_q, db, dg = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*grads, strict=True))
    return torch.from_numpy(dx), dlog_q, db, dg, torch.from_numpy(domega), _given_back(adjoint)


@_whatever_numbers_come
def truncated_forward(x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, omega: Tensor | None, truncation: int) -> Tensor:
    """Returns outputs of a truncated average (see `megablocks.kernels.registered`)."""
    y = reserve(x, zeros=False)
    for way in directions(log_q, b, g, omega, x.shape[2]):
        arguments = (
            way.flip,
            way.flip,
            whole_blocks(truncation),
            *way.tables,
            _far_table(way, truncation),
            x.numpy(),
            y,
        )
        share_out(truncated_forward_task, *_size(x, b), *arguments)
    return torch.from_numpy(y)


@_whatever_numbers_come
def truncated_backward(
    dy: Tensor, x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, omega: Tensor | None, truncation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns gradients of a truncated average (see `megablocks.kernels.registered`)."""
    batch, _, width = x.shape
    averages = b.shape[1]
    whole, lags = whole_blocks(truncation), far_lags(truncation)
    dx = reserve(x, zeros=False)
    domega = np.empty(0)
    grads = []
    for way in directions(log_q, b, g, omega, width):
        table, inside = way.tables
        # The average of dy, the other way in time.
        other_way = (not way.flip, way.flip, whole, table, inside, _far_table(way, truncation), dy.numpy(), dx)
        share_out(truncated_forward_task, *_size(x, b), *other_way)

        product, slope = (np.empty((batch, averages, width), table.dtype) for _ in range(2))
        rooms = (STEPS, far_room(truncation))
        dinside, dfar = (np.zeros((batch, len(table), room * TILE), table.dtype) for room in rooms)
        arguments = (way.flip, whole, table, x.numpy(), dy.numpy(), product, slope, dinside, dfar)
        share_out(truncated_backward_task, *_size(x, b), *arguments)
        rows = slice(width, None) if way.flip else slice(width)
        through_states = _through_states(b[rows].numpy(), g[rows].numpy(), product.sum(0).T, slope.sum(0).T)
        through_inside = way.through_weights(_INSIDE, _lags(dinside.sum(0)))
        through_far = way.through_weights(lags, _lags(dfar.sum(0))[:, : len(lags)])
        grads.append(
            [
                part + untiled(near + far, width)
                for part, near, far in zip(through_states, through_inside, through_far, strict=True)
            ]
        )
        if not way.flip:
            domega = _of_skip(dinside, width)
    dlog_q, db, dg = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*grads, strict=True))
    return torch.from_numpy(dx), dlog_q, db, dg, torch.from_numpy(domega)


def _size(x: Tensor, b: Tensor) -> tuple[int, int, int]:
    """Rows, tiles and work of a call."""
    return x.shape[0], -(-x.shape[2] // TILE), x.numel() * b.shape[1]


def _counts(x: Tensor, lengths: Tensor | None) -> Array:
    return np.full(x.shape[0], x.shape[1]) if lengths is None else lengths.numpy()


def _states(hidden: Tensor | None, x: Tensor, b: Tensor) -> Array:
    """(B, D, N) as (B, N, D), a copy."""
    if hidden is None:
        return np.zeros((x.shape[0], b.shape[1], x.shape[2]), x.numpy().dtype)
    return np.array(hidden.numpy().transpose(0, 2, 1), order="C")


def _given_back(states: Array) -> Tensor:
    """(B, N, D) as (B, D, N)."""
    return torch.from_numpy(np.ascontiguousarray(states.transpose(0, 2, 1)))


def _far_table(way: Direction, truncation: int) -> Array:
    """(tiles, room TILE): weights of the far lags, zeros beyond them."""
    far = np.zeros((len(way.records), far_room(truncation), TILE), way.records.dtype)
    lags = far_lags(truncation)
    far[:, : len(lags)] = way.weights(lags)
    return far.reshape(len(far), -1)


def _lags(weights: Array) -> Array:
    """(tiles, lags TILE) as (tiles, lags, TILE)."""
    return weights.reshape(len(weights), -1, TILE)


def _of_skip(dinside: Array, width: int) -> Array:
    """The gradient of the skip connection, which is a weight at lag 0."""
    total: Array = dinside[:, :, :TILE].sum(0)
    return total.reshape(-1)[:width].copy()


def _through_states(b: Array, g: Array, product: Array, slope: Array) -> tuple[Array, Array, Array]:
    """Gradients of log q, b and g where outputs are sums of g b times states of unit expansion."""
    return b * g * slope, g * product, b * product


numba_cpu = RegisteredKernel("ema_numba", forward, backward, truncated=(truncated_forward, truncated_backward))
