"""What the compiled functions of `numba_tiles` and `numba_windows` read, and the threads that run them.

Threads are torch's own, borrowed: they wait for more to do for a while, awake, and would stand in the way of others. In
a forked process, which has none of them, and where they cannot be reached, Python's threads serve; compiled code does
not hold them up. Numba's own threads survive no fork, and no two callers at once.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, cast

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
    Compiled,
)
from megablocks.kernels.numba_vectors import TILE

Array = npt.NDArray[Any]

SMALL = 1 << 18
"""Steps times channels times averages that are not worth waking threads for."""

PATIENCE = 1.0
"""Seconds of compilation after which the first call says what it is doing."""

_LINE = 16
"""Numbers that fill a line of the cache, or two."""

_SMALLEST_NORMAL = sys.float_info.min

_LOGGER = logging.getLogger("megablocks")
_compiled: set[tuple[Compiled, np.dtype[Any] | None]] = set()


class Direction(NamedTuple):
    """Coefficients of one direction of time, as the compiled functions read them; what is beyond D is zero."""

    log_q: Array
    """(tiles, N, TILE)."""
    records: Array
    """(tiles, N, rows of a record, TILE), states, adjoints and gradients zero."""
    inside: Array
    """(tiles, S, TILE): weights of a block's inputs in its own outputs, the skip connection at lag 0 included."""
    flip: bool
    """Whether time runs backwards."""

    @property
    def tables(self) -> tuple[Array, Array]:
        """Records and weights of each tile, side by side."""
        tiles = len(self.records)
        return self.records.reshape(tiles, -1), self.inside.reshape(tiles, -1)

    def weights(self, lags: range) -> Array:
        """(tiles, lags, TILE): what inputs that long ago weigh in outputs, sum_n g b q^lag."""
        b, g = self.records[:, :, EXPANSION], self.records[:, :, PROJECTION]
        weights: Array = np.einsum("inc,injc->ijc", b * g, self._powers(lags))
        return weights

    def through_weights(self, lags: range, dweights: Array) -> tuple[Array, Array, Array]:
        """Gradients of log q, b and g, tiled, from those of `weights`."""
        b, g = self.records[:, :, EXPANSION], self.records[:, :, PROJECTION]
        each = self._powers(lags) * dweights[:, None]
        total, slope = each.sum(2), np.einsum("injc,j->inc", each, np.array(lags, each.dtype))
        return b * g * slope, g * total, b * total

    def _powers(self, lags: range) -> Array:
        powers: Array = np.exp(self.log_q[:, :, None] * np.array(lags, self.log_q.dtype)[:, None])
        return powers


def directions(log_q: Tensor, b: Tensor, g: Tensor, omega: Tensor | None, width: int) -> list[Direction]:
    """Returns the coefficients of a kernel, forwards in time and, where there are twice as many, backwards."""
    made = []
    for start in range(0, log_q.shape[0], width):
        tiled_log_q, tiled_b, tiled_g = (_tiled(part[start : start + width].numpy()) for part in (log_q, b, g))
        records = np.zeros((*tiled_b.shape[:2], RECORD // TILE, TILE), tiled_b.dtype)
        records[:, :, EXPANSION], records[:, :, PROJECTION] = tiled_b, tiled_g
        records[:, :, FORGET_STEP] = -np.expm1(tiled_log_q)
        records[:, :, FORGET_BLOCK] = -np.expm1(STEPS * tiled_log_q)
        direction = Direction(tiled_log_q, records, np.empty(0), start > 0)
        records[:, :, POWERS : POWERS + STEPS + 1] = direction._powers(range(STEPS + 1))
        inside = direction.weights(range(STEPS))
        if omega is not None and start == 0:
            inside[:, 0] += np.pad(omega.numpy(), (0, -width % TILE)).reshape(-1, TILE)
        made.append(direction._replace(inside=inside))
    return made


def _tiled(part: Array) -> Array:
    """(D, N) as (tiles, N, TILE), filled up with zeros."""
    filled = np.pad(part, ((0, -part.shape[0] % TILE), (0, 0)))
    return np.ascontiguousarray(rearrange(filled, "(i c) n -> i n c", c=TILE))


def untiled(tiled: Array, width: int) -> Array:
    """(tiles, N, TILE) as (D, N)."""
    return rearrange(tiled, "i n c -> (i c) n")[:width]


def reserve(x: Tensor, zeros: bool) -> Array:
    """Memory for outputs, zeros or anything. NumPy asks for large pages, which are there much sooner."""
    make = np.zeros if zeros else np.empty
    spare = make(x.numel() + _LINE, x.numpy().dtype)
    first = -(spare.ctypes.data // spare.itemsize) % _LINE  # where a line of the cache begins
    return spare[first : first + x.numel()].reshape(x.shape)


def share_out(task: Compiled, batch: int, tiles: int, size: int, *arguments: Any) -> None:
    """Calls `task(row, first tile, last tile, *arguments)` for every row, or for parts of rows if those are few.

    `size` counts what there is to do: steps times channels times averages.
    """
    if batch == 0:
        return
    _compile_for(task, arguments)
    threads = torch.get_num_threads()
    parts = min(tiles, threads // math.gcd(threads, batch))
    borders = [tiles * part // parts for part in range(parts + 1)]
    calls = [(row, first, last) for row in range(batch) for first, last in itertools.pairwise(borders)]
    if threads == 1 or size < SMALL:
        with _flushing():
            for call in calls:
                task(*call, *arguments)
        return
    remaining = iter(calls)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with _flushing():
                for call in remaining:
                    task(*call, *arguments)
        except BaseException as error:
            errors.append(error)

    _in_parallel(threads, work)
    if errors:
        raise errors[0]


@contextmanager
def _flushing() -> Iterator[None]:
    """Lets this thread take zero for numbers below the normal ones: what decays gets there, and it takes ages."""
    before = _SMALLEST_NORMAL / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _compile_for(task: Compiled, arguments: tuple[Any, ...]) -> None:
    """Compiles a task for the types of these arguments or loads it, and says so if that takes longer than a second."""
    known = (task, next((part.dtype for part in arguments if isinstance(part, np.ndarray)), None))
    if known in _compiled:
        return
    message = "Compiling a kernel for this CPU, or loading it from the cache; later calls need not wait."
    told = threading.Timer(PATIENCE, _LOGGER.warning, (message,))
    told.start()
    try:
        task(0, 0, 0, *arguments)  # no tile: nothing but the compilation
    finally:
        told.cancel()
    _compiled.add(known)


def _in_parallel(threads: int, work: Callable[[], None]) -> None:
    """Runs `work` on so many threads at once: torch's own if they can be reached, or else Python's."""
    if _openmp is not None:
        _openmp(_OpenMPWork(lambda _: work()), None, threads, 0)
    else:
        for done in [_pool(threads).submit(work) for _ in range(threads)]:
            done.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="megablocks")


_OpenMPWork = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _find_openmp() -> Callable[..., None] | None:
    """The entry by which compilers start OpenMP threads, of the library that torch has loaded."""
    try:
        entry = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another library, another way to call it
        return None
    entry.argtypes = [_OpenMPWork, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return cast(Callable[..., None], entry)


_openmp = _find_openmp()


def _forked() -> None:
    """A forked process has none of its parent's threads, and OpenMP does not know."""
    global _openmp
    _openmp = None
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
