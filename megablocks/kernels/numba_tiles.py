"""The compiled half of `numba_cpu`: tiles of channels, blocks of steps.

Time runs in blocks of S steps. With the powers q^0 to q^S at hand a block of one average is

    y[s] += q^{s+1} g h         h = q^S h + b (sum_s q^{S-1-s} x[s])         s = 0 .. S-1

and what its inputs say to its own outputs, S numbers k[j] = sum_n g b q^j per channel. So a step costs two products
per average instead of four operations that wait for each other.

A tile's coefficients and states stay in the nearest cache for a chunk of steps; then the next tile does the same
steps. Tensors are read and written a chunk of all tiles at a time, step after step, because memory is fastest in the
order in which it lies. The innermost loops run over the channels of a tile, side by side in memory: those become vector
instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

TILE = 32
"""Channels that are worked on together."""

STEPS = 8
"""S, steps of a block; what is left at the end of a row is done step by step."""

CHUNK = 32
"""Steps that one tile does before the next takes its turn."""

# Rows of TILE numbers that stand together for each average, so that a compiler sees one piece of memory.
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


class _Block(NamedTuple):
    inside: Compiled
    forward: Compiled
    advance: Compiled
    inside_back: Compiled
    backward: Compiled


def _block(steps: int) -> _Block:
    """Functions for a block of `steps` steps, 1 or S. The averages go in pairs, to read and write steps half as often.

    `averages` holds records, `block` rows of steps, `k` and `dk` the weights inside a block and their gradients.
    """
    forget = FORGET_BLOCK if steps == STEPS else FORGET_STEP
    last = POWERS + steps - 1
    out, grad = OUTPUT * steps * TILE, GRAD_INPUT * steps * TILE

    def inside(k: Any, block: Any) -> None:
        for c in range(TILE):
            for s in range(steps):
                total = k[c] * block[s * TILE + c]
                for r in range(s):
                    total += k[(s - r) * TILE + c] * block[r * TILE + c]
                block[out + s * TILE + c] = total

    def forward(averages: Any, block: Any) -> None:
        for start in range(0, averages.size, 2 * RECORD):
            pair = averages[start : start + 2 * RECORD]
            for c in range(TILE):
                h1, h2 = pair[STATE * TILE + c], pair[RECORD + STATE * TILE + c]
                lead1 = h1 * pair[PROJECTION * TILE + c]
                lead2 = h2 * pair[RECORD + PROJECTION * TILE + c]
                sum1 = pair[last * TILE + c] * block[c]
                sum2 = pair[RECORD + last * TILE + c] * block[c]
                for s in range(steps):
                    power = (POWERS + s + 1) * TILE + c
                    total = block[out + s * TILE + c] + pair[power] * lead1
                    block[out + s * TILE + c] = total + pair[RECORD + power] * lead2
                for s in range(1, steps):
                    power = (last - s) * TILE + c
                    sum1 += pair[power] * block[s * TILE + c]
                    sum2 += pair[RECORD + power] * block[s * TILE + c]
                # h - f h rather than q^S h: rounding what is kept would bend slow decays.
                h1 = h1 - pair[forget * TILE + c] * h1
                h2 = h2 - pair[RECORD + forget * TILE + c] * h2
                pair[STATE * TILE + c] = h1 + pair[EXPANSION * TILE + c] * sum1
                pair[RECORD + STATE * TILE + c] = h2 + pair[RECORD + EXPANSION * TILE + c] * sum2

    def advance(averages: Any, block: Any, before: Any) -> None:
        """Moves the states on and writes down what they were."""
        for start in range(0, averages.size, RECORD):
            record = averages[start : start + RECORD]
            kept = before[start // RECORD * TILE : (start // RECORD + 1) * TILE]
            for c in range(TILE):
                h = record[STATE * TILE + c]
                kept[c] = h
                total = record[last * TILE + c] * block[c]
                for s in range(1, steps):
                    total += record[(last - s) * TILE + c] * block[s * TILE + c]
                h = h - record[forget * TILE + c] * h
                record[STATE * TILE + c] = h + record[EXPANSION * TILE + c] * total

    def inside_back(k: Any, dk: Any, block: Any) -> None:
        for c in range(TILE):
            for s in range(steps):
                total = k[c] * block[out + s * TILE + c]
                for r in range(s + 1, steps):
                    total += k[(r - s) * TILE + c] * block[out + r * TILE + c]
                block[grad + s * TILE + c] = total
            for j in range(steps):
                total = dk[j * TILE + c]
                for s in range(j, steps):
                    total += block[out + s * TILE + c] * block[(s - j) * TILE + c]
                dk[j * TILE + c] = total

    def backward(averages: Any, block: Any, before: Any) -> None:
        for start in range(0, averages.size, RECORD):
            record = averages[start : start + RECORD]
            kept = before[start // RECORD * TILE : (start // RECORD + 1) * TILE]
            for c in range(TILE):
                h, a = kept[c], record[ADJOINT * TILE + c]
                b, g = record[EXPANSION * TILE + c], record[PROJECTION * TILE + c]
                # Sums of powers times steps, and of sums: the second weigh each power with its exponent.
                left = record[(POWERS + steps) * TILE + c] * block[out + (steps - 1) * TILE + c]
                left_slope = left
                for i in range(1, steps):
                    s = steps - 1 - i
                    left += record[(POWERS + s + 1) * TILE + c] * block[out + s * TILE + c]
                    left_slope += left
                entered = record[last * TILE + c] * block[c]
                entered_slope = entered - entered
                ab = a * b
                block[grad + c] += record[last * TILE + c] * ab
                for s in range(1, steps):
                    power = record[(last - s) * TILE + c]
                    entered_slope += entered
                    entered += power * block[s * TILE + c]
                    block[grad + s * TILE + c] += power * ab
                ah = a * h
                record[GRAD_PROJECTION * TILE + c] += h * left
                record[GRAD_EXPANSION * TILE + c] += a * entered
                record[GRAD_LOG_Q * TILE + c] += (
                    g * h * left_slope + ab * entered_slope + steps * record[(POWERS + steps) * TILE + c] * ah
                )
                a = a - record[forget * TILE + c] * a
                record[ADJOINT * TILE + c] = a + g * left

    return _Block(*(_compile(function) for function in (inside, forward, advance, inside_back, backward)))


_inside, _forward, _advance, _inside_back, _backward = _block(STEPS)
_inside_step, _forward_step, _advance_step, _inside_back_step, _backward_step = _block(1)


@_compile
def _copy_steps(
    tensor: Any, row: int, begin: int, end: int, count: int, first: int, flip: bool, chunks: Any, what: int, out: bool
) -> None:
    """Copies steps `begin` to `end` of tiles from `first` on into the blocks of their chunks, or `out` of them.

    Flipped, steps count from the row's end, and what comes out is added to what stands there.
    """
    full = (end - begin) // STEPS * STEPS
    for step in range(begin, end):
        i = step - begin
        size = STEPS if i < full else 1
        start = (i // size * size * 3 + what * size + i % size) * TILE
        at = count - 1 - step if flip else step
        for tile in range(chunks.shape[0]):
            channel = (first + tile) * TILE
            width = min(TILE, tensor.shape[2] - channel)
            # Numbers one by one, not slices: those are objects, counted in and out.
            if not out:
                for c in range(width):
                    chunks[tile, start + c] = tensor[row, at, channel + c]
            elif flip:
                for c in range(width):
                    tensor[row, at, channel + c] += chunks[tile, start + c]
            else:
                for c in range(width):
                    tensor[row, at, channel + c] = chunks[tile, start + c]


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
    """Copies states (N' TILE) into the records of a tile, or `out` of them."""
    for start in range(0, averages.size, RECORD):
        held = averages[start + STATE * TILE : start + (STATE + 1) * TILE]
        marked = marks[start // RECORD * TILE : (start // RECORD + 1) * TILE]
        for c in range(TILE):
            if out:
                marked[c] = held[c]
            else:
                held[c] = marked[c]


@_compile
def forward_task(
    row: int, first: int, last: int, flip: bool, counts: Any, table: Any, k: Any, x: Any, states: Any, y: Any
) -> None:
    """Computes outputs of tiles `first` to `last` of a row of so many steps, and moves its states on.

    `table` (tiles, N' RECORD) holds the records, `k` (tiles, S TILE) the weights inside blocks, `x` and `y` are
    (B, L, D), `states` is (B, N, D). Flipped, time runs backwards, and outputs are added to `y`.
    """
    count = counts[row]
    records = table[first:last].copy()
    _copy_row(records, STATE, states[row], first, False)
    chunks = np.zeros((last - first, CHUNK * 3 * TILE), x.dtype)
    for begin in range(0, count, CHUNK):
        end = min(begin + CHUNK, count)
        full = (end - begin) // STEPS
        _copy_steps(x, row, begin, end, count, first, flip, chunks, INPUT, False)
        for tile in range(first, last):
            averages, weights, chunk = records[tile - first], k[tile], chunks[tile - first]
            for i in range(full):
                block = chunk[i * 3 * STEPS * TILE : (i + 1) * 3 * STEPS * TILE]
                _inside(weights, block)
                _forward(averages, block)
            for i in range(full * STEPS, end - begin):
                step = chunk[i * 3 * TILE : (i + 1) * 3 * TILE]
                _inside_step(weights, step)
                _forward_step(averages, step)
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
    records = table[first:last].copy()
    _copy_row(records, STATE, states[row], first, False)
    _copy_row(records, ADJOINT, adjoints[row], first, False)
    averages = records.shape[1] // RECORD
    turns = (count + CHUNK - 1) // CHUNK
    chunks = np.zeros((last - first, CHUNK * 3 * TILE), x.dtype)
    before = np.empty((CHUNK // STEPS + STEPS, averages * TILE), x.dtype)
    marks = np.empty((turns, last - first, averages * TILE), x.dtype)
    for j in range(turns):
        begin, end = j * CHUNK, (j + 1) * CHUNK
        if end < count:
            _copy_steps(x, row, begin, end, count, first, flip, chunks, INPUT, False)
        for tile in range(first, last):
            record, chunk = records[tile - first], chunks[tile - first]
            _copy_states(record, marks[j, tile - first], True)
            if end < count:
                for i in range(CHUNK // STEPS):
                    _advance(record, chunk[i * 3 * STEPS * TILE : (i + 1) * 3 * STEPS * TILE], before[i])
    for j in range(turns - 1, -1, -1):
        begin, end = j * CHUNK, min((j + 1) * CHUNK, count)
        full = (end - begin) // STEPS
        single = end - begin - full * STEPS
        _copy_steps(x, row, begin, end, count, first, flip, chunks, INPUT, False)
        _copy_steps(dy, row, begin, end, count, first, flip, chunks, OUTPUT, False)
        for tile in range(first, last):
            record, weights, gradient, chunk = records[tile - first], k[tile], dk[row, tile], chunks[tile - first]
            _copy_states(record, marks[j, tile - first], False)
            steps = chunk[full * 3 * STEPS * TILE :]
            for i in range(full):
                _advance(record, chunk[i * 3 * STEPS * TILE : (i + 1) * 3 * STEPS * TILE], before[i])
            for i in range(single):
                _advance_step(record, steps[i * 3 * TILE : (i + 1) * 3 * TILE], before[full + i])
            for i in range(single - 1, -1, -1):
                block = steps[i * 3 * TILE : (i + 1) * 3 * TILE]
                _inside_back_step(weights, gradient, block)
                _backward_step(record, block, before[full + i])
            for i in range(full - 1, -1, -1):
                block = chunk[i * 3 * STEPS * TILE : (i + 1) * 3 * STEPS * TILE]
                _inside_back(weights, gradient, block)
                _backward(record, block, before[i])
        _copy_steps(dx, row, begin, end, count, first, flip, chunks, GRAD_INPUT, True)
    _copy_row(records, ADJOINT, adjoints[row], first, True)
    _copy_row(records, GRAD_LOG_Q, dlog_q[row], first, True)
    _copy_row(records, GRAD_EXPANSION, db[row], first, True)
    _copy_row(records, GRAD_PROJECTION, dg[row], first, True)
