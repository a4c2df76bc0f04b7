"""The damped EMA as one pass over time on the CPU, compiled by numba.

This half makes the tables that the compiled one, `numba_tiles`, reads, and shares rows out to threads. The backward
pass runs time backwards; it needs the state before each block, and computes it again from states that it lays down
once in a chunk. Tables are NumPy's work: torch would wake threads of its own, which then stand in the way of ours.
Threads are Python's, which compiled code does not hold up: that works after a fork and from several
threads at once, where numba's own do not.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from megablocks.kernels.numba_tiles import (
    EXPANSION,
    FORGET_BLOCK,
    FORGET_STEP,
    POWERS,
    PROJECTION,
    RECORD,
    STEPS,
    TILE,
    Compiled,
    backward_task,
    forward_task,
)
from megablocks.kernels.registered import RegisteredKernel

Array = npt.NDArray[Any]

SMALL = 1 << 18
"""Steps times channels times averages that are not worth waking threads for."""

PATIENCE = 1.0
"""Seconds of compilation after which the first call says what it is doing."""

_LOGGER = logging.getLogger("megablocks")
_compiled: set[tuple[Compiled, np.dtype[Any]]] = set()


class _Direction(NamedTuple):
    """Coefficients of one direction of time, as the compiled functions read them."""

    records: Array
    """(tiles, N', rows of a record, TILE), states, adjoints and gradients zero; N' is N or N + 1, an even number."""
    inside: Array
    """(tiles, S, TILE): weights of a block's inputs in its own outputs, the skip connection at lag 0 included."""
    flip: bool
    """Whether time runs backwards."""


def _directions(log_q: Tensor, b: Tensor, g: Tensor, omega: Tensor | None, width: int) -> list[_Direction]:
    made = []
    for start in range(0, log_q.shape[0], width):
        tiled_log_q, tiled_b, tiled_g = (_tiled(part[start : start + width]) for part in (log_q, b, g))
        records = np.zeros((*tiled_b.shape[:2], RECORD // TILE, TILE), tiled_b.dtype)
        records[:, :, EXPANSION], records[:, :, PROJECTION] = tiled_b, tiled_g
        records[:, :, FORGET_STEP] = -np.expm1(tiled_log_q)
        records[:, :, FORGET_BLOCK] = -np.expm1(STEPS * tiled_log_q)
        powers = records[:, :, POWERS : POWERS + STEPS + 1]
        np.exp(tiled_log_q[:, :, None] * np.arange(STEPS + 1, dtype=powers.dtype)[:, None], out=powers)
        inside = ((tiled_b * tiled_g)[:, :, None] * powers[:, :, :STEPS]).sum(1)
        if omega is not None and start == 0:
            inside[:, 0] += np.pad(omega.numpy(), (0, -width % TILE)).reshape(-1, TILE)
        made.append(_Direction(records, inside, start > 0))
    return made


def _tiled(part: Tensor) -> Array:
    """(D, N) as (tiles, N', TILE), filled up with zeros."""
    filled = np.pad(part.numpy(), ((0, -part.shape[0] % TILE), (0, part.shape[1] % 2)))
    return np.ascontiguousarray(rearrange(filled, "(i c) n -> i n c", c=TILE))


def _untiled(tiled: Array, width: int, averages: int) -> Array:
    """The other way."""
    return rearrange(tiled, "i n c -> (i c) n")[:width, :averages]


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
    y = _room(x, lengths)
    states = _states(hidden, x, b)
    for direction in _directions(log_q, b, g, omega, x.shape[2]):
        moved = np.zeros_like(states) if direction.flip else states
        _share_out(forward_task, direction, lengths, x.numpy(), moved, y)
    return torch.from_numpy(y), _given_back(states)


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
    dx = _room(x, lengths)
    begin, adjoint = _states(hidden, x, b), _states(dfinal, x, b)
    domega = x.new_zeros(width)
    grads = []
    for direction in _directions(log_q, b, g, omega, width):
        start, end = (np.zeros_like(begin), np.zeros_like(begin)) if direction.flip else (begin, adjoint)
        sums = [np.empty_like(begin) for _ in range(3)]
        inside = np.zeros((batch, *direction.inside.shape), begin.dtype)
        written = (start, dy.numpy(), end, dx, *sums, inside.reshape(batch, inside.shape[1], -1))
        _share_out(backward_task, direction, lengths, x.numpy(), *written)
        of_inside = _through_inside(direction, inside.sum(0))
        grads.append(
            [part.sum(0).T + _untiled(more, width, b.shape[1]) for part, more in zip(sums, of_inside, strict=True)]
        )
        if not direction.flip:
            domega = torch.from_numpy(inside[:, :, 0].sum(0).reshape(-1)[:width].copy())
    dlog_q, db, dg = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*grads, strict=True))
    return torch.from_numpy(dx), dlog_q, db, dg, domega, _given_back(adjoint)


def _room(x: Tensor, lengths: Tensor | None) -> Array:
    """Memory for outputs, zeros where rows end early; NumPy asks for large pages, which are there much sooner."""
    make = np.empty if lengths is None else np.zeros
    return make(tuple(x.shape), x.numpy().dtype)


def _states(hidden: Tensor | None, x: Tensor, b: Tensor) -> Array:
    """(B, D, N) as (B, N, D), a copy."""
    if hidden is None:
        return np.zeros((x.shape[0], b.shape[1], x.shape[2]), x.numpy().dtype)
    return np.array(hidden.numpy().transpose(0, 2, 1), order="C")


def _given_back(states: Array) -> Tensor:
    """(B, N, D) as (B, D, N)."""
    return torch.from_numpy(np.ascontiguousarray(states.transpose(0, 2, 1)))


def _through_inside(direction: _Direction, dk: Array) -> tuple[Array, Array, Array]:
    """Gradients of log q, b and g, tiled, from those of the weights inside blocks, k[j] = sum_n g b q^j."""
    records = direction.records
    b, g, powers = records[:, :, EXPANSION], records[:, :, PROJECTION], records[:, :, POWERS : POWERS + STEPS]
    each = powers * dk[:, None]
    total, slope = each.sum(2), (each * np.arange(STEPS, dtype=dk.dtype)[:, None]).sum(2)
    return b * g * slope, g * total, b * total


def _share_out(task: Compiled, direction: _Direction, lengths: Tensor | None, x: Array, *written: Array) -> None:
    """Runs a task for every row, or for parts of its channels where there are fewer rows than threads."""
    batch, length, _ = x.shape
    tiles, averages = direction.records.shape[:2]
    arrays = [direction.records.reshape(tiles, -1), direction.inside.reshape(tiles, -1), x, *written]
    _compile_for(task, arrays)
    counts = [length] * batch if lengths is None else lengths.tolist()
    threads = torch.get_num_threads()
    parts = min(tiles, threads // math.gcd(threads, batch))
    borders = [tiles * part // parts for part in range(parts + 1)]
    calls = [
        (row, first, last, direction.flip, count, *arrays)
        for row, count in enumerate(counts)
        for first, last in itertools.pairwise(borders)
    ]
    if threads == 1 or x.size * averages < SMALL:
        for call in calls:
            task(*call)
    else:
        list(_pool(threads).map(lambda call: task(*call), calls))


def _compile_for(task: Compiled, arrays: list[Any]) -> None:
    """Compiles a task for the types of these arrays, and says so if that takes longer than a second."""
    known = (task, arrays[0].dtype)
    if known in _compiled:
        return
    message = "Compiling the damped EMA for this CPU; later calls need not wait."
    told = threading.Timer(PATIENCE, _LOGGER.warning, (message,))
    told.start()
    try:
        task(0, 0, 0, False, 0, *arrays)  # no tile: nothing but the compilation
    finally:
        told.cancel()
    _compiled.add(known)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="megablocks")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


numba_cpu = RegisteredKernel("ema_numba", forward, backward)
