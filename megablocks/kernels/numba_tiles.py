"""The compiled half of `numba_cpu`: tiles of channels, blocks of steps.

Time runs in blocks of S steps. With the powers q^0 to q^S at hand a block of one average is

    y[s] += q^{s+1} g h         h = q^S h + b (sum_s q^{S-1-s} x[s])         s = 0 .. S-1

and what its inputs say to its own outputs, S numbers k[j] = sum_n g b q^j per channel. So a step costs two products
per average instead of four operations that wait for each other.

A tile is a vector of channels (see `numba_vectors`). Each average in turn takes its powers and its state into registers
and goes through a chunk of steps, whose inputs and outputs stay in the nearest cache; then the next tile does the same
steps. Tensors are read and written a chunk of all tiles at a time, step after step, because memory is fastest in the
order in which it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from megablocks.kernels.numba_vectors import (
    TILE,
    add_powers,
    convolve,
    convolve_back,
    correlate,
    filled,
    flipped,
    load,
    load_rows,
    power_sum,
    power_sum_and_slope,
    store,
    store_rows,
    zeros,
)

STEPS = 8
"""S, steps of a block; what is left at the end of a row is done step by step."""

CHUNK = 64
"""Steps that one tile does before the next takes its turn."""

# Rows that stand together for each average, so that a compiler sees one piece of memory.
STATE, EXPANSION, PROJECTION, FORGET_STEP, FORGET_BLOCK, POWERS = range(6)
ADJOINT, GRAD_LOG_Q, GRAD_EXPANSION, GRAD_PROJECTION = range(POWERS + STEPS + 1, POWERS + STEPS + 5)
RECORD = (GRAD_PROJECTION + 1) * TILE

INPUT, OUTPUT, GRAD_INPUT = range(3)
"""What a block holds of each step: the input, the output or its gradient, the gradient of the input."""

Compiled = Callable[..., Any]


def _compile(function: Compiled) -> Compiled:
    """Compiles at the first call, for good where the disk may be written."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        compiled: Compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no place for its cache
        compiled = numba.njit(**options)(function)
    return compiled


@_compile
def _after(h: Any, f: Any, b: Any, powers: Any, x: Any) -> Any:
    """What a state is after a block."""
    # h - f h rather than q^S h: rounding what is kept would bend slow decays.
    return (h - f * h) + b * power_sum(powers, flipped(x), 0)


class _Blocks(NamedTuple):
    inside: Compiled
    forward: Compiled
    advance: Compiled
    inside_back: Compiled
    backward: Compiled


def _blocks(steps: int) -> _Blocks:
    """Functions for `count` blocks of `steps` steps, 1 or S, which stand in `chunk` from `start` on.

    `averages` holds records, `k` and `dk` the weights inside a block and their gradients.
    """
    forget = FORGET_BLOCK if steps == STEPS else FORGET_STEP
    powers_and_one = steps + 1
    out, grad, size = OUTPUT * steps * TILE, GRAD_INPUT * steps * TILE, 3 * steps * TILE

    def inside(k: Any, chunk: Any, start: int, count: int) -> None:
        weights = load_rows(k, 0, steps)
        for at in range(start, start + count * size, size):
            x = load_rows(chunk, at, steps)
            store_rows(chunk, at + out, convolve(zeros(x), weights, x, 0))

    def forward(averages: Any, chunk: Any, start: int, count: int) -> None:
        for record in range(0, averages.size, RECORD):
            powers = load_rows(averages, record + POWERS * TILE, powers_and_one)
            b, g = load(averages, record + EXPANSION * TILE), load(averages, record + PROJECTION * TILE)
            f, h = load(averages, record + forget * TILE), load(averages, record + STATE * TILE)
            for at in range(start, start + count * size, size):
                y = load_rows(chunk, at + out, steps)
                store_rows(chunk, at + out, add_powers(y, powers, g * h, 1))
                h = _after(h, f, b, powers, load_rows(chunk, at, steps))
            store(averages, record + STATE * TILE, h)

    def advance(averages: Any, chunk: Any, start: int, count: int) -> None:
        """Moves the states on and does nothing else."""
        for record in range(0, averages.size, RECORD):
            powers = load_rows(averages, record + POWERS * TILE, powers_and_one)
            b, f = load(averages, record + EXPANSION * TILE), load(averages, record + forget * TILE)
            h = load(averages, record + STATE * TILE)
            for at in range(start, start + count * size, size):
                h = _after(h, f, b, powers, load_rows(chunk, at, steps))
            store(averages, record + STATE * TILE, h)

    def inside_back(k: Any, dk: Any, chunk: Any, start: int, count: int) -> None:
        weights, gradients = load_rows(k, 0, steps), load_rows(dk, 0, steps)
        for at in range(start, start + count * size, size):
            x, dy = load_rows(chunk, at, steps), load_rows(chunk, at + out, steps)
            store_rows(chunk, at + grad, convolve_back(zeros(x), weights, dy, 0))
            gradients = correlate(gradients, dy, x, 0)
        store_rows(dk, 0, gradients)

    def backward(averages: Any, chunk: Any, start: int, count: int, before: Any) -> None:
        """Goes through the blocks once forwards, for the states `before` each, and once back; states stay."""
        for record in range(0, averages.size, RECORD):
            powers = load_rows(averages, record + POWERS * TILE, powers_and_one)
            b, g = load(averages, record + EXPANSION * TILE), load(averages, record + PROJECTION * TILE)
            f, h = load(averages, record + forget * TILE), load(averages, record + STATE * TILE)
            for i in range(count):
                store(before, i * TILE, h)
                h = _after(h, f, b, powers, load_rows(chunk, start + i * size, steps))

            a = load(averages, record + ADJOINT * TILE)
            dlog_q = load(averages, record + GRAD_LOG_Q * TILE)
            db = load(averages, record + GRAD_EXPANSION * TILE)
            dg = load(averages, record + GRAD_PROJECTION * TILE)
            slope = filled(averages, steps) * load(averages, record + (POWERS + steps) * TILE)
            for i in range(count - 1, -1, -1):
                at = start + i * size
                h = load(before, i * TILE)
                left, left_slope = power_sum_and_slope(powers, load_rows(chunk, at + out, steps), 1)
                x = load_rows(chunk, at, steps)
                entered, entered_slope = power_sum_and_slope(powers, flipped(x), 0)
                dx = flipped(load_rows(chunk, at + grad, steps))
                store_rows(chunk, at + grad, flipped(add_powers(dx, powers, a * b, 0)))
                dg += h * left
                db += a * entered
                dlog_q += g * h * left_slope + a * (b * entered_slope + slope * h)
                a = (a - f * a) + g * left
            store(averages, record + ADJOINT * TILE, a)
            store(averages, record + GRAD_LOG_Q * TILE, dlog_q)
            store(averages, record + GRAD_EXPANSION * TILE, db)
            store(averages, record + GRAD_PROJECTION * TILE, dg)

    return _Blocks(*(_compile(function) for function in (inside, forward, advance, inside_back, backward)))


_inside, _forward, _advance, _inside_back, _backward = _blocks(STEPS)
_inside_step, _forward_step, _advance_step, _inside_back_step, _backward_step = _blocks(1)


@_compile
def _room(size: int, like: Any) -> Any:
    """Zeros that begin where a line of the cache does: a vector across two lines takes twice as long."""
    spare = np.zeros(size + TILE, like.dtype)
    first = -(spare.ctypes.data // spare.itemsize) % TILE
    return spare[first : first + size]


@_compile
def _records(table: Any, first: int, last: int) -> Any:
    """A copy of the records of tiles `first` to `last`."""
    count, size = last - first, table.shape[1]
    records = _room(count * size, table).reshape((count, size))
    records[:] = table[first:last]
    return records


@_compile
def _copy_steps(
    tensor: Any, row: int, begin: int, end: int, count: int, first: int, flip: bool, chunks: Any, what: int, out: bool
) -> None:
    """Copies steps `begin` to `end` of tiles from `first` on into the blocks of their chunks, or `out` of them.

    Flipped, steps count from the row's end, and what comes out is added to what stands there.
    """
    width, room = tensor.shape[2], chunks.shape[1]
    numbers, places = tensor.reshape(tensor.size), chunks.reshape(chunks.size)
    whole = min(chunks.shape[0], width // TILE - first)
    full = (end - begin) // STEPS * STEPS
    for step in range(begin, end):
        i = step - begin
        size = STEPS if i < full else 1
        place = (i // size * size * 3 + what * size + i % size) * TILE
        at = (row * tensor.shape[1] + (count - 1 - step if flip else step)) * width + first * TILE
        for _ in range(whole):
            if not out:
                store(places, place, load(numbers, at))
            elif flip:
                store(numbers, at, load(numbers, at) + load(places, place))
            else:
                store(numbers, at, load(places, place))
            at += TILE
            place += room
        if whole < chunks.shape[0]:  # the last tile of all, and not full
            for c in range(width % TILE):
                if not out:
                    places[place + c] = numbers[at + c]
                elif flip:
                    numbers[at + c] += places[place + c]
                else:
                    numbers[at + c] = places[place + c]


@_compile
def _copy_row(records: Any, what: int, numbers: Any, first: int, out: bool) -> None:
    """Copies numbers (N, D) into a row of the records of tiles from `first` on, or `out` of it."""
    for tile in range(records.shape[0]):
        channel = (first + tile) * TILE
        for n in range(numbers.shape[0]):
            for c in range(min(TILE, numbers.shape[1] - channel)):
                at = n * RECORD + what * TILE + c
                if out:
                    numbers[n, channel + c] = records[tile, at]
                else:
                    records[tile, at] = numbers[n, channel + c]


@_compile
def _copy_states(averages: Any, marks: Any, out: bool) -> None:
    """Copies states (N TILE) into the records of a tile, or `out` of them."""
    for n in range(averages.size // RECORD):
        if out:
            store(marks, n * TILE, load(averages, n * RECORD + STATE * TILE))
        else:
            store(averages, n * RECORD + STATE * TILE, load(marks, n * TILE))


@_compile
def forward_task(
    row: int, first: int, last: int, flip: bool, counts: Any, table: Any, k: Any, x: Any, states: Any, y: Any
) -> None:
    """Computes outputs of tiles `first` to `last` of a row of so many steps, and moves its states on.

    `table` (tiles, N RECORD) holds the records, `k` (tiles, S TILE) the weights inside blocks, `x` and `y` are
    (B, L, D), `states` is (B, N, D). Flipped, time runs backwards, and outputs are added to `y`.
    """
    count = counts[row]
    records = _records(table, first, last)
    _copy_row(records, STATE, states[row], first, False)
    chunks = _room((last - first) * CHUNK * 3 * TILE, x).reshape((last - first, CHUNK * 3 * TILE))
    for begin in range(0, count, CHUNK):
        end = min(begin + CHUNK, count)
        full, rest = divmod(end - begin, STEPS)
        steps = full * 3 * STEPS * TILE
        _copy_steps(x, row, begin, end, count, first, flip, chunks, INPUT, False)
        for tile in range(last - first):
            averages, weights, chunk = records[tile], k[first + tile], chunks[tile]
            _inside(weights, chunk, 0, full)
            _forward(averages, chunk, 0, full)
            if rest:
                _inside_step(weights, chunk, steps, rest)
                _forward_step(averages, chunk, steps, rest)
        _copy_steps(y, row, begin, end, count, first, flip, chunks, OUTPUT, True)
    _copy_row(records, STATE, states[row], first, True)


@_compile
def backward_task(
    row: int,
    first: int,
    last: int,
    flip: bool,
    counts: Any,
    table: Any,
    k: Any,
    x: Any,
    states: Any,
    dy: Any,
    adjoints: Any,
    dx: Any,
    dlog_q: Any,
    db: Any,
    dg: Any,
    dk: Any,
) -> None:
    """Gradients of tiles `first` to `last` of a row; adjoints of its final states become those of the first ones."""
    count = counts[row]
    records = _records(table, first, last)
    _copy_row(records, STATE, states[row], first, False)
    _copy_row(records, ADJOINT, adjoints[row], first, False)
    averages = records.shape[1] // RECORD
    turns = (count + CHUNK - 1) // CHUNK
    chunks = _room((last - first) * CHUNK * 3 * TILE, x).reshape((last - first, CHUNK * 3 * TILE))
    before = _room(CHUNK // STEPS * TILE, x)
    marks = _room(turns * (last - first) * averages * TILE, x).reshape((turns, last - first, averages * TILE))
    for j in range(turns):
        begin, end = j * CHUNK, (j + 1) * CHUNK
        if end < count:
            _copy_steps(x, row, begin, end, count, first, flip, chunks, INPUT, False)
        for tile in range(last - first):
            _copy_states(records[tile], marks[j, tile], True)
            if end < count:
                _advance(records[tile], chunks[tile], 0, CHUNK // STEPS)
    for j in range(turns - 1, -1, -1):
        begin, end = j * CHUNK, min((j + 1) * CHUNK, count)
        full, rest = divmod(end - begin, STEPS)
        steps = full * 3 * STEPS * TILE
        _copy_steps(x, row, begin, end, count, first, flip, chunks, INPUT, False)
        _copy_steps(dy, row, begin, end, count, first, flip, chunks, OUTPUT, False)
        for tile in range(last - first):
            record, weights, gradient, chunk = records[tile], k[first + tile], dk[row, first + tile], chunks[tile]
            _copy_states(record, marks[j, tile], False)
            if rest:
                _advance(record, chunk, 0, full)
                _inside_back_step(weights, gradient, chunk, steps, rest)
                _backward_step(record, chunk, steps, rest, before)
                _copy_states(record, marks[j, tile], False)
            _inside_back(weights, gradient, chunk, 0, full)
            _backward(record, chunk, 0, full, before)
        _copy_steps(dx, row, begin, end, count, first, flip, chunks, GRAD_INPUT, True)
    _copy_row(records, ADJOINT, adjoints[row], first, True)
    _copy_row(records, GRAD_LOG_Q, dlog_q[row], first, True)
    _copy_row(records, GRAD_EXPANSION, db[row], first, True)
    _copy_row(records, GRAD_PROJECTION, dg[row], first, True)
