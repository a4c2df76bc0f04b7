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
    Compiled,
    _compile,
    _copy_row,
    _records,
    _room,
)
from megablocks.kernels.numba_vectors import (
    TILE,
    add_powers,
    convolve,
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

# Rows of a record that mean something else here: how much the segment before is still worth, the derivative of a state
# by log q, and what gradients are made of, sum L U and sum (L' U + L U').
WEIGHT, SLOPE, PRODUCT, PRODUCT_SLOPE = ADJOINT, GRAD_EXPANSION, GRAD_PROJECTION, GRAD_LOG_Q

_OUT = OUTPUT * STEPS * TILE
_BLOCK = 2 * STEPS * TILE
_POWERS_AND_ONE = STEPS + 1

_EMPTY = 2
"""Blocks of zeros before the first one, so that far lags find something wherever a window begins."""

_TOGETHER = 8
"""Blocks that one average goes through before the next takes its turn, to find them in the nearest cache."""


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
    """Copies a tile of a row into blocks. Flipped, steps count from the row's end."""
    length = tensor.shape[1]
    width = min(TILE, tensor.shape[2] - channel)
    numbers = tensor.reshape(tensor.size)
    for step in range(length):
        place = (step // STEPS + _EMPTY) * _BLOCK + (what * STEPS + step % STEPS) * TILE
        at = (row * length + (length - 1 - step if flip else step)) * tensor.shape[2] + channel
        if width == TILE:
            store(blocks, place, load(numbers, at))
        else:
            for c in range(width):
                blocks[place + c] = numbers[at + c]


@_compile
def _copy_out(tensor: Any, row: int, channel: int, flip: bool, add: bool, blocks: Any) -> None:
    """Copies outputs out of blocks, or adds them to what is there."""
    length = tensor.shape[1]
    width = min(TILE, tensor.shape[2] - channel)
    numbers = tensor.reshape(tensor.size)
    for step in range(length):
        place = (step // STEPS + _EMPTY) * _BLOCK + _OUT + step % STEPS * TILE
        at = (row * length + (length - 1 - step if flip else step)) * tensor.shape[2] + channel
        if width == TILE:
            total = load(blocks, place)
            store(numbers, at, total + load(numbers, at) if add else total)
        else:
            for c in range(width):
                numbers[at + c] = blocks[place + c] + (numbers[at + c] if add else 0)


@_compile
def _inside(k: Any, blocks: Any, start: int, count: int) -> None:
    weights = load_rows(k, 0, STEPS)
    for at in range(start, start + count * _BLOCK, _BLOCK):
        x = load_rows(blocks, at, STEPS)
        store_rows(blocks, at + _OUT, convolve(zeros(x), weights, x, 0))


@_compile
def _inside_back(dk: Any, blocks: Any, start: int, count: int) -> None:
    """Gradients of outputs stand where outputs would, here and below."""
    gradients = load_rows(dk, 0, STEPS)
    for at in range(start, start + count * _BLOCK, _BLOCK):
        gradients = correlate(gradients, load_rows(blocks, at + _OUT, STEPS), load_rows(blocks, at, STEPS), 0)
    store_rows(dk, 0, gradients)


def _far(room: int) -> tuple[Compiled, Compiled]:
    """Functions for so many far lags. A window leaves two blocks at a time, `before` blocks before its own."""
    older, newer = 2 * STEPS - 1, STEPS - 1

    def forward(taps: Any, blocks: Any, start: int, count: int, before: int) -> None:
        weights = load_rows(taps, 0, room)
        for at in range(start, start + count * _BLOCK, _BLOCK):
            left = at - before * _BLOCK
            y = load_rows(blocks, at + _OUT, STEPS)
            y = convolve(y, weights, load_rows(blocks, left, STEPS), older)
            y = convolve(y, weights, load_rows(blocks, left + _BLOCK, STEPS), newer)
            store_rows(blocks, at + _OUT, y)

    def backward(dtaps: Any, blocks: Any, start: int, count: int, before: int) -> None:
        gradients = load_rows(dtaps, 0, room)
        for at in range(start, start + count * _BLOCK, _BLOCK):
            left = at - before * _BLOCK
            dy = load_rows(blocks, at + _OUT, STEPS)
            gradients = correlate(gradients, dy, load_rows(blocks, left, STEPS), older)
            gradients = correlate(gradients, dy, load_rows(blocks, left + _BLOCK, STEPS), newer)
        store_rows(dtaps, 0, gradients)

    return _compile(forward), _compile(backward)


_few, _few_back = _far(STEPS - 1)
_many, _many_back = _far(2 * STEPS - 2)


@_compile
def _restart(averages: Any) -> None:
    """Begins a segment: nothing is held of it, and the one before is worth all that it held."""
    for record in range(0, averages.size, RECORD):
        store(averages, record + STATE * TILE, filled(averages, 0.0))
        store(averages, record + SLOPE * TILE, filled(averages, 0.0))
        store(averages, record + WEIGHT * TILE, filled(averages, 1.0))


@_compile
def _one_block_on(averages: Any, record: int) -> Any:
    """Returns what something is worth a block later."""
    weight = load(averages, record + WEIGHT * TILE)
    weight = weight - load(averages, record + FORGET_BLOCK * TILE) * weight
    store(averages, record + WEIGHT * TILE, weight)
    return weight


@_compile
def _forward(averages: Any, blocks: Any, start: int, count: int, ends: Any, first: int) -> None:
    """Outputs of blocks, of which the first is number `first` of its segment.

    `ends` holds sums from a place in the segment before to its end, and then what the block there ends with.
    """
    row = averages.size // RECORD * TILE
    for record in range(0, averages.size, RECORD):
        powers = load_rows(averages, record + POWERS * TILE, _POWERS_AND_ONE)
        b, g = load(averages, record + EXPANSION * TILE), load(averages, record + PROJECTION * TILE)
        f, weight = load(averages, record + FORGET_BLOCK * TILE), load(averages, record + WEIGHT * TILE)
        h = load(averages, record + STATE * TILE)
        at, place = start, first * row + record // RECORD * TILE
        for _ in range(count):
            held = h + weight * load(ends, place)
            y = load_rows(blocks, at + _OUT, STEPS)
            store_rows(blocks, at + _OUT, add_powers(y, powers, g * held, 1))
            end = b * power_sum(powers, flipped(load_rows(blocks, at, STEPS)), 0)
            store(ends, place, end)
            h = (h - f * h) + end
            weight = weight - f * weight
            at += _BLOCK
            place += row
        store(averages, record + STATE * TILE, h)
        store(averages, record + WEIGHT * TILE, weight)


@_compile
def _sum_up(averages: Any, ends: Any, count: int) -> None:
    """Puts sums from each place of a segment to its end where the ends of its blocks stand."""
    row = averages.size // RECORD * TILE
    _restart(averages)
    for i in range(count - 2, -1, -1):
        for record in range(0, averages.size, RECORD):
            weight = _one_block_on(averages, record)
            place = i * row + record // RECORD * TILE
            store(ends, place, load(ends, place + row) + weight * load(ends, place))


@_compile
def _sum_up_slopes(averages: Any, ends: Any, slopes: Any, count: int) -> None:
    """The same for derivatives of those sums; done first, while the ends still stand."""
    row = averages.size // RECORD * TILE
    _restart(averages)
    for i in range(count - 2, -1, -1):
        lag = filled(averages, STEPS * (count - 1 - i))
        for record in range(0, averages.size, RECORD):
            weight = _one_block_on(averages, record)
            place = i * row + record // RECORD * TILE
            slope = load(slopes, place) + lag * load(ends, place)
            store(slopes, place, load(slopes, place + row) + weight * slope)


@_compile
def _backward(averages: Any, blocks: Any, start: int, count: int, ends: Any, slopes: Any, first: int) -> None:
    """What blocks add to the products, of which the first is number `first` of its segment."""
    row = averages.size // RECORD * TILE
    for record in range(0, averages.size, RECORD):
        powers = load_rows(averages, record + POWERS * TILE, _POWERS_AND_ONE)
        f, weight = load(averages, record + FORGET_BLOCK * TILE), load(averages, record + WEIGHT * TILE)
        h, dh = load(averages, record + STATE * TILE), load(averages, record + SLOPE * TILE)
        product = load(averages, record + PRODUCT * TILE)
        product_slope = load(averages, record + PRODUCT_SLOPE * TILE)
        steps, lag = filled(averages, STEPS), filled(averages, STEPS * first)
        at, place = start, first * row + record // RECORD * TILE
        for _ in range(count):
            left, left_slope = power_sum_and_slope(powers, load_rows(blocks, at + _OUT, STEPS), 1)
            held, slope = load(ends, place), load(slopes, place)
            state = h + weight * held
            product += left * state
            product_slope += left_slope * state + left * (dh + weight * (slope + lag * held))
            entered, entered_slope = power_sum_and_slope(powers, flipped(load_rows(blocks, at, STEPS)), 0)
            store(ends, place, entered)
            store(slopes, place, entered_slope)
            dh += steps * h
            dh = (dh - f * dh) + entered_slope
            h = (h - f * h) + entered
            weight = weight - f * weight
            lag += steps
            at += _BLOCK
            place += row
        store(averages, record + STATE * TILE, h)
        store(averages, record + SLOPE * TILE, dh)
        store(averages, record + WEIGHT * TILE, weight)
        store(averages, record + PRODUCT * TILE, product)
        store(averages, record + PRODUCT_SLOPE * TILE, product_slope)


@_compile
def truncated_forward_task(
    row: int, first: int, last: int, flip: bool, add: bool, whole: int, table: Any, k: Any, far: Any, x: Any, y: Any
) -> None:
    """Computes outputs of tiles `first` to `last` of a row.

    `table` and `k` are as in `forward_task`, `far` (tiles, lags TILE) holds the weights of the far lags, `whole` is W,
    `x` and `y` are (B, L, D). Flipped, time runs backwards; with `add`, outputs are added to `y`.
    """
    few = far.shape[-1] == (STEPS - 1) * TILE
    records = _records(table, first, last)
    count = (x.shape[1] + STEPS - 1) // STEPS
    blocks = _room((count + _EMPTY) * _BLOCK, x)
    ends = _room(whole * records.shape[1] // RECORD * TILE, x)
    for tile in range(first, last):
        averages, weights, taps = records[tile - first], k[tile], far[tile]
        ends[:] = 0
        blocks[:] = 0
        _copy_in(x, row, tile * TILE, flip, blocks, INPUT)
        for begin in range(0, count, whole):
            _restart(averages)
            end = min(begin + whole, count)
            for j in range(begin, end, _TOGETHER):
                start, together = (j + _EMPTY) * _BLOCK, min(_TOGETHER, end - j)
                _inside(weights, blocks, start, together)
                if begin > 0 and few:
                    _few(taps, blocks, start, together, whole + 2)
                elif begin > 0:
                    _many(taps, blocks, start, together, whole + 2)
                _forward(averages, blocks, start, together, ends, j - begin)
            if end - begin == whole:
                _sum_up(averages, ends, whole)
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
    records = _records(table, first, last)
    count = (x.shape[1] + STEPS - 1) // STEPS
    blocks = _room((count + _EMPTY) * _BLOCK, x)
    ends = _room(whole * records.shape[1] // RECORD * TILE, x)
    slopes = _room(ends.size, x)
    for tile in range(first, last):
        averages, weights, taps = records[tile - first], dk[row, tile], dfar[row, tile]
        ends[:] = 0
        slopes[:] = 0
        blocks[:] = 0
        _copy_in(x, row, tile * TILE, flip, blocks, INPUT)
        _copy_in(dy, row, tile * TILE, flip, blocks, OUTPUT)
        for begin in range(0, count, whole):
            _restart(averages)
            end = min(begin + whole, count)
            for j in range(begin, end, _TOGETHER):
                start, together = (j + _EMPTY) * _BLOCK, min(_TOGETHER, end - j)
                _inside_back(weights, blocks, start, together)
                if begin > 0 and few:
                    _few_back(taps, blocks, start, together, whole + 2)
                elif begin > 0:
                    _many_back(taps, blocks, start, together, whole + 2)
                _backward(averages, blocks, start, together, ends, slopes, j - begin)
            if end - begin == whole:
                _sum_up_slopes(averages, ends, slopes, whole)
                _sum_up(averages, ends, whole)
    _copy_row(records, PRODUCT, products[row], first, True)
    _copy_row(records, PRODUCT_SLOPE, product_slopes[row], first, True)
