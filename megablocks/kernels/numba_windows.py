"""The compiled half of `numba_cpu` for truncated averages.

Time runs in blocks of S steps, as in `numba_tiles`. An output hears the lags 0 to K - 1. With W = floor(K / S) - 1 it
hears

* its own block, by the weights inside a block,
* the W blocks before it, all of their steps whatever its own place: by a state, a sum of what W blocks end with,
* up to 2 S - 2 steps still earlier, one by one: the far lags S W + 1 to K - 1.

A sum over a window that moves on must forget. Subtracting what leaves it would keep a rounding error of all that ever
was there, so segments of W blocks are summed up twice: from their start as time goes on, and from their end backwards
once they are complete. Wherever a window begins and ends, it is the second sum of one segment and the first of the
next, a queue made of two stacks.

The gradient of x is the same average of the gradient of y, the other way in time. Gradients of the coefficients come
from one pass over x and the gradient of y with two states: what an average holds, divided by b, and its derivative by
log q.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megablocks.kernels.numba_tiles import (
    ADJOINT,
    EXPANSION,
    FORGET_BLOCK,
    GRAD_EXPANSION,
    GRAD_LOG_Q,
    GRAD_PROJECTION,
    INPUT,
    OUTPUT,
    POWERS,
    PROJECTION,
    RECORD,
    STATE,
    STEPS,
    TILE,
    Compiled,
    _compile,
    _copy_row,
    _inside,
)

# Rows of a record that mean something else here: how much the segment before is still worth, the derivative of a state
# by log q, and what gradients are made of, sum L U and sum (L' U + L U').
WEIGHT, SLOPE, PRODUCT, PRODUCT_SLOPE = ADJOINT, GRAD_EXPANSION, GRAD_PROJECTION, GRAD_LOG_Q

_LAST = POWERS + STEPS - 1
_OUT = OUTPUT * STEPS * TILE
_BLOCK = 2 * STEPS * TILE


def whole_blocks(truncation: int) -> int:
    """W, the number of blocks that a window holds whatever its place; at least 1 for windows of 2 S steps and more."""
    return truncation // STEPS - 1


def far_lags(truncation: int) -> range:
    """Lags beyond those blocks, S - 1 to 2 S - 2 of them."""
    return range(STEPS * whole_blocks(truncation) + 1, truncation)


def far_room(truncation: int) -> int:
    """How many far lags tables have room for: as few as there can be, or as many."""
    return STEPS - 1 if truncation % STEPS == 0 else 2 * STEPS - 2


@_compile
def _copy_in(tensor: Any, row: int, channel: int, flip: bool, blocks: Any, what: int) -> None:
    """Copies a tile of a row into blocks, the first one left out. Flipped, steps count from the row's end."""
    length = tensor.shape[1]
    width = min(TILE, tensor.shape[2] - channel)
    for step in range(length):
        start = (step // STEPS + 1) * _BLOCK + (what * STEPS + step % STEPS) * TILE
        at = length - 1 - step if flip else step
        for c in range(width):
            blocks[start + c] = tensor[row, at, channel + c]


@_compile
def _copy_out(tensor: Any, row: int, channel: int, flip: bool, add: bool, blocks: Any) -> None:
    """Copies outputs out of blocks, or adds them to what is there."""
    length = tensor.shape[1]
    width = min(TILE, tensor.shape[2] - channel)
    for step in range(length):
        start = (step // STEPS + 1) * _BLOCK + _OUT + step % STEPS * TILE
        at = length - 1 - step if flip else step
        if add:
            for c in range(width):
                tensor[row, at, channel + c] += blocks[start + c]
        else:
            for c in range(width):
                tensor[row, at, channel + c] = blocks[start + c]


def _far(most: int) -> tuple[Compiled, Compiled]:
    """Functions for up to so many far lags, at least S - 1. `old` are the two blocks that a window is leaving."""

    def forward(taps: Any, old: Any, block: Any) -> None:
        for c in range(TILE):
            for s in range(STEPS):
                total = block[_OUT + s * TILE + c]
                for m in range(1, most - s + 1):
                    source = (2 - (m + STEPS - 1) // STEPS) * _BLOCK + -m % STEPS * TILE
                    total += taps[(s + m - 1) * TILE + c] * old[source + c]
                block[_OUT + s * TILE + c] = total

    def backward(dtaps: Any, old: Any, block: Any) -> None:
        """Gradients of outputs stand where outputs would."""
        for c in range(TILE):
            for lag in range(STEPS - 1):
                total = dtaps[lag * TILE + c]
                for s in range(lag + 1):
                    total += block[_OUT + s * TILE + c] * old[_BLOCK + (STEPS - 1 - lag + s) * TILE + c]
                dtaps[lag * TILE + c] = total
            for lag in range(STEPS - 1, most):
                total = dtaps[lag * TILE + c]
                for s in range(STEPS):
                    m = lag + 1 - s
                    source = (2 - (m + STEPS - 1) // STEPS) * _BLOCK + -m % STEPS * TILE
                    total += block[_OUT + s * TILE + c] * old[source + c]
                dtaps[lag * TILE + c] = total

    return _compile(forward), _compile(backward)


_few, _few_back = _far(STEPS - 1)
_many, _many_back = _far(2 * STEPS - 2)


@_compile
def _inside_back(dk: Any, block: Any) -> None:
    for c in range(TILE):
        for j in range(STEPS):
            total = dk[j * TILE + c]
            for s in range(j, STEPS):
                total += block[_OUT + s * TILE + c] * block[(s - j) * TILE + c]
            dk[j * TILE + c] = total


@_compile
def _forward(averages: Any, block: Any, ends: Any) -> None:
    """Outputs of a block. `ends` holds sums from a place in the segment before to its end, and then the block's end."""
    tiny = np.finfo(block.dtype).tiny  # smaller numbers take processors a hundred times as long
    for start in range(0, averages.size, 2 * RECORD):
        pair = averages[start : start + 2 * RECORD]
        held = ends[start // RECORD * TILE : (start // RECORD + 2) * TILE]
        for c in range(TILE):
            p1, p2 = pair[STATE * TILE + c], pair[RECORD + STATE * TILE + c]
            w1, w2 = pair[WEIGHT * TILE + c], pair[RECORD + WEIGHT * TILE + c]
            lead1 = (p1 + w1 * held[c]) * pair[PROJECTION * TILE + c]
            lead2 = (p2 + w2 * held[TILE + c]) * pair[RECORD + PROJECTION * TILE + c]
            sum1 = pair[_LAST * TILE + c] * block[c]
            sum2 = pair[RECORD + _LAST * TILE + c] * block[c]
            for s in range(STEPS):
                power = (POWERS + s + 1) * TILE + c
                total = block[_OUT + s * TILE + c] + pair[power] * lead1
                block[_OUT + s * TILE + c] = total + pair[RECORD + power] * lead2
            for s in range(1, STEPS):
                power = (_LAST - s) * TILE + c
                sum1 += pair[power] * block[s * TILE + c]
                sum2 += pair[RECORD + power] * block[s * TILE + c]
            f1, f2 = pair[FORGET_BLOCK * TILE + c], pair[RECORD + FORGET_BLOCK * TILE + c]
            end1, end2 = pair[EXPANSION * TILE + c] * sum1, pair[RECORD + EXPANSION * TILE + c] * sum2
            held[c], held[TILE + c] = end1, end2
            p1, p2 = p1 - f1 * p1, p2 - f2 * p2
            pair[STATE * TILE + c], pair[RECORD + STATE * TILE + c] = p1 + end1, p2 + end2
            w1, w2 = w1 - f1 * w1, w2 - f2 * w2
            pair[WEIGHT * TILE + c] = w1 if w1 > tiny else w1 - w1
            pair[RECORD + WEIGHT * TILE + c] = w2 if w2 > tiny else w2 - w2


@_compile
def _start(averages: Any) -> None:
    for start in range(0, averages.size, RECORD):
        _restart(averages[start : start + RECORD])


@_compile
def _restart(record: Any) -> None:
    for c in range(TILE):
        record[STATE * TILE + c] = record[SLOPE * TILE + c] = 0
        record[WEIGHT * TILE + c] = 1


@_compile
def _sum_up(averages: Any, ends: Any) -> None:
    """Adds the end of one more block, going back in time, and leaves the sum in its place."""
    tiny = np.finfo(ends.dtype).tiny
    for start in range(0, averages.size, RECORD):
        record = averages[start : start + RECORD]
        held = ends[start // RECORD * TILE : (start // RECORD + 1) * TILE]
        for c in range(TILE):
            weight = record[WEIGHT * TILE + c]
            total = record[STATE * TILE + c] + weight * held[c]
            record[STATE * TILE + c] = total
            held[c] = total
            weight -= record[FORGET_BLOCK * TILE + c] * weight
            record[WEIGHT * TILE + c] = weight if weight > tiny else weight - weight


@_compile
def _sum_up_slopes(averages: Any, ends: Any, slopes: Any, lag: int) -> None:
    """The same for the derivative of that sum; `lag` is how far the block stands from the end of the segment."""
    for start in range(0, averages.size, RECORD):
        record = averages[start : start + RECORD]
        held = ends[start // RECORD * TILE : (start // RECORD + 1) * TILE]
        slope = slopes[start // RECORD * TILE : (start // RECORD + 1) * TILE]
        for c in range(TILE):
            total = record[SLOPE * TILE + c] + record[WEIGHT * TILE + c] * (slope[c] + lag * held[c])
            record[SLOPE * TILE + c] = total
            slope[c] = total


@_compile
def _backward(averages: Any, block: Any, ends: Any, slopes: Any, lag: int) -> None:
    """What a block adds to the products; `lag` is how far it stands from the end of the segment before."""
    tiny = np.finfo(block.dtype).tiny
    for start in range(0, averages.size, RECORD):
        record = averages[start : start + RECORD]
        held = ends[start // RECORD * TILE : (start // RECORD + 1) * TILE]
        slope = slopes[start // RECORD * TILE : (start // RECORD + 1) * TILE]
        for c in range(TILE):
            # Sums of powers times steps, and of sums: the second weigh each power with its exponent.
            left = record[(POWERS + STEPS) * TILE + c] * block[_OUT + (STEPS - 1) * TILE + c]
            left_slope = left
            entered = record[_LAST * TILE + c] * block[c]
            entered_slope = entered - entered
            for s in range(1, STEPS):
                power = record[(_LAST - s) * TILE + c]
                left += record[(_LAST + 1 - s) * TILE + c] * block[_OUT + (STEPS - 1 - s) * TILE + c]
                left_slope += left
                entered_slope += entered
                entered += power * block[s * TILE + c]
            p, dp, weight = record[STATE * TILE + c], record[SLOPE * TILE + c], record[WEIGHT * TILE + c]
            state = p + weight * held[c]
            change = dp + weight * (slope[c] + lag * held[c])
            record[PRODUCT * TILE + c] += left * state
            record[PRODUCT_SLOPE * TILE + c] += left_slope * state + left * change
            held[c], slope[c] = entered, entered_slope
            forget = record[FORGET_BLOCK * TILE + c]
            dp += STEPS * p
            record[SLOPE * TILE + c] = dp - forget * dp + entered_slope
            record[STATE * TILE + c] = p - forget * p + entered
            weight -= forget * weight
            record[WEIGHT * TILE + c] = weight if weight > tiny else weight - weight


@_compile
def truncated_forward_task(
    row: int, first: int, last: int, flip: bool, add: bool, whole: int, table: Any, k: Any, far: Any, x: Any, y: Any
) -> None:
    """Computes outputs of tiles `first` to `last` of a row.

    `table` and `k` are as in `forward_task`, `far` (tiles, lags TILE) holds the weights of the far lags, `whole` is W,
    `x` and `y` are (B, L, D). Flipped, time runs backwards; with `add`, outputs are added to `y`.
    """
    few = far.shape[-1] == (STEPS - 1) * TILE
    records = table[first:last].copy()
    count = (x.shape[1] + STEPS - 1) // STEPS
    blocks = np.zeros((count + 1) * _BLOCK, x.dtype)
    ends = np.zeros((whole, records.shape[1] // RECORD * TILE), x.dtype)
    for tile in range(first, last):
        averages, weights, taps = records[tile - first], k[tile], far[tile]
        _start(averages)
        ends[:] = 0
        blocks[:] = 0
        _copy_in(x, row, tile * TILE, flip, blocks, INPUT)
        for j in range(count):
            start = (j + 1) * _BLOCK
            block = blocks[start : start + _BLOCK]
            _inside(weights, block)
            if j > whole:
                old = blocks[start - (whole + 2) * _BLOCK : start - whole * _BLOCK]
                if few:
                    _few(taps, old, block)
                else:
                    _many(taps, old, block)
            _forward(averages, block, ends[j % whole])
            if j % whole == whole - 1:
                _start(averages)
                for i in range(whole - 1, -1, -1):
                    _sum_up(averages, ends[i])
                _start(averages)
        _copy_out(y, row, tile * TILE, flip, add, blocks)


@_compile
def truncated_backward_task(
    row: int,
    first: int,
    last: int,
    flip: bool,
    whole: int,
    table: Any,
    x: Any,
    dy: Any,
    products: Any,
    product_slopes: Any,
    dk: Any,
    dfar: Any,
) -> None:
    """Computes what the gradients of coefficients are made of, for tiles `first` to `last` of a row.

    `products` and `product_slopes` are (B, N, D), `dk` and `dfar` are like `k` and `far`, for each row.
    """
    few = dfar.shape[-1] == (STEPS - 1) * TILE
    records = table[first:last].copy()
    count = (x.shape[1] + STEPS - 1) // STEPS
    blocks = np.zeros((count + 1) * _BLOCK, x.dtype)
    ends = np.zeros((whole, records.shape[1] // RECORD * TILE), x.dtype)
    slopes = np.zeros_like(ends)
    for tile in range(first, last):
        averages, weights, taps = records[tile - first], dk[row, tile], dfar[row, tile]
        _start(averages)
        ends[:] = 0
        slopes[:] = 0
        blocks[:] = 0
        _copy_in(x, row, tile * TILE, flip, blocks, INPUT)
        _copy_in(dy, row, tile * TILE, flip, blocks, OUTPUT)
        for j in range(count):
            start, i = (j + 1) * _BLOCK, j % whole
            block = blocks[start : start + _BLOCK]
            _inside_back(weights, block)
            if j > whole:
                old = blocks[start - (whole + 2) * _BLOCK : start - whole * _BLOCK]
                if few:
                    _few_back(taps, old, block)
                else:
                    _many_back(taps, old, block)
            _backward(averages, block, ends[i], slopes[i], STEPS * i)
            if i == whole - 1:
                _start(averages)
                for i in range(whole - 1, -1, -1):
                    _sum_up_slopes(averages, ends[i], slopes[i], STEPS * (whole - 1 - i))
                    _sum_up(averages, ends[i])
                _start(averages)
    _copy_row(records, PRODUCT, products[row], first, True)
    _copy_row(records, PRODUCT_SLOPE, product_slopes[row], first, True)
