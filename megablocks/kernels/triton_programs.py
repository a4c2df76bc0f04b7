"""The compiled half of `triton_gpu`: what a program does with one row, one span of time and a tile of channels.

A tile is a group of channels with all their averages, in the registers of one warp. The recurrence reads inputs some
steps ahead of the one that it is at, because memory answers late.

**Gradients of the coefficients** are sums over all pairs of an input x_s and an output gradient dy_t that is not
earlier. Time is cut once more, into blocks of T = `BLOCK` steps, of which no inner state is needed. Number the steps of
a block from 0, let H be the state before it and C what the adjoint carries into it from behind. The pairs

* inside the block need no average: they are counted by lag, `sum_t dy_t x_{t-l}`, and meet the powers of q only after
  all blocks and rows have been added up. Those of lag 0 are the gradient of omega;
* of the past and the block make `g H f`, where `f = sum_t q^{t+1} dy_t`;
* of the block and the future make `b C e`, where `e = sum_s q^{T-1-s} x_s`;
* of the past and the future make `q^T H C`.

In the derivative by log q, each power of q is weighted with its exponent. Horner's rule finds these weighted sums along
with f and e, for one more multiplication and addition. Programs leave partial sums that torch adds up: no atomics, the
same bits every time.
"""

from __future__ import annotations

import inspect
from typing import Any, no_type_check

import triton  # type: ignore[import-untyped, import-not-found]
import triton.language as tl  # type: ignore[import-untyped, import-not-found]


def _kernel(function: Any) -> Any:
    """Has Triton compile a function once for all sizes, and without a word about alignment.

    For the sake of wider loads it would give a thread a quarter of the averages of four channels, and pass numbers from
    thread to thread in every step.
    """
    sizes = [name for name in inspect.signature(function).parameters if not name.isupper()]
    return triton.jit(do_not_specialize=sizes)(function)


@no_type_check
@triton.jit
def _place(lengths_ptr, steps, span, spans, channels, CHANNELS: tl.constexpr):
    """Where a program works: its row and how long that is, its channels, its first step and how many there are."""
    groups = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // groups // spans).to(tl.int64)
    first = tl.program_id(0) // groups % spans * span
    d = tl.program_id(0) % groups * CHANNELS + tl.arange(0, CHANNELS)
    length = steps
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + row).to(tl.int32)
    count = tl.maximum(tl.minimum(length - first, span), 0)
    return row, length, d, first, count


@no_type_check
@_kernel
def run(
    x_ptr,
    y_ptr,
    starts_ptr,
    ends_ptr,
    carries_ptr,
    p_ptr,
    enter_ptr,
    leave_ptr,
    omega_ptr,
    lengths_ptr,
    steps,
    span,
    spans,
    channels,
    ADJOINT: tl.constexpr,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    AVERAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Runs each span from its state in `starts` for that in `ends` and, if there is a `y`, for its part of `y`.

    `ADJOINT` runs it from its end, and notes in `carries`, if there are any, what is carried into each block.
    `REVERSED` reads each row from its last token. It is the second direction, and adds to the `y` of the first.
    """
    row, length, d, first, count = _place(lengths_ptr, steps, span, spans, channels, CHANNELS)
    groups = tl.cdiv(channels, CHANNELS)
    size = AVERAGES * CHANNELS
    tile = tl.arange(0, AVERAGES)[:, None] * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(0) % groups * size + tile
    program = tl.program_id(0).to(tl.int64) * size + tile
    real = d < channels
    counts = tl.where(real, count, 0)
    p = tl.load(p_ptr + group)
    enter = tl.load(enter_ptr + group)
    state = tl.load(starts_ptr + program)

    s = first + count - 1 if ADJOINT else first
    at = (row * steps + (length - 1 - s if REVERSED else s)) * channels + d
    stride = (channels if ADJOINT == REVERSED else -channels).to(tl.int64)
    x_ptr += at
    if y_ptr is not None:
        y_ptr += at
        leave = tl.load(leave_ptr + group)
        if omega_ptr is not None:
            omega = tl.load(omega_ptr + d, real, 0.0)

    inputs, outputs = (), ()
    for i in tl.static_range(AHEAD):
        inputs += (tl.load(x_ptr + i * stride, i < counts, 0.0),)
        if REVERSED and y_ptr is not None:
            outputs += (tl.load(y_ptr + i * stride, i < counts, 0.0),)
    # Unrolled, so that every input stays in a register of its own: to move one on its way would be to wait for it.
    for i in tl.range(count, loop_unroll_factor=AHEAD):
        inputs += (tl.load(x_ptr + AHEAD * stride, i + AHEAD < counts, 0.0),)
        x = inputs[0].to(p.dtype)
        inputs = inputs[1:]
        if carries_ptr is not None and (i == 0 or (s + 1) % BLOCK == 0):
            block = row * tl.cdiv(steps, BLOCK) + s // BLOCK
            tl.store(carries_ptr + block * groups * size + group, state)
        if not ADJOINT:
            state -= p * state
        state += enter * x
        if y_ptr is not None:
            y = tl.sum(leave * state, 0)
            if omega_ptr is not None:
                y += omega * x
            if REVERSED:
                outputs += (tl.load(y_ptr + AHEAD * stride, i + AHEAD < counts, 0.0),)
                y += outputs[0]
                outputs = outputs[1:]
            tl.store(y_ptr, y, real)
            y_ptr += stride
        if ADJOINT:
            state -= p * state
        x_ptr += stride
        s += -1 if ADJOINT else 1
    tl.store(ends_ptr + program, state)


@no_type_check
@_kernel
def carry(
    starts_ptr,
    ends_ptr,
    kept_ptr,
    last_ptr,
    spans,
    size,
    ADJOINT: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Carries states, of `size` numbers, from span to span: fills `starts`, in which the first span's is already.

    That span ran from its true state, the others ran from zeros. `ADJOINT` goes from the last span to the first.
    """
    parts = size // THREADS
    row = (tl.program_id(0) // parts).to(tl.int64)
    cell = tl.program_id(0) % parts * THREADS + tl.arange(0, THREADS)
    last = tl.load(last_ptr + row).to(tl.int32)
    at = (row * spans + (last if ADJOINT else 0)) * size + cell
    stride = (-size if ADJOINT else size).to(tl.int64)
    starts_ptr += at
    ends_ptr += at
    kept = tl.load(kept_ptr + cell)
    state = tl.full([THREADS], 0.0, kept.dtype)
    ends = ()
    for i in tl.static_range(AHEAD):
        ends += (tl.load(ends_ptr + tl.minimum(i, last) * stride),)
    for i in tl.range(last, loop_unroll_factor=AHEAD):
        ends += (tl.load(ends_ptr + tl.minimum(i + AHEAD, last) * stride),)
        state = kept * state + ends[0]
        ends = ends[1:]
        starts_ptr += stride
        tl.store(starts_ptr, state)


@no_type_check
@_kernel
def pair(
    x_ptr,
    dy_ptr,
    starts_ptr,
    carries_ptr,
    powers_ptr,
    b_ptr,
    g_ptr,
    dlog_q_ptr,
    db_ptr,
    dg_ptr,
    lags_ptr,
    lengths_ptr,
    steps,
    span,
    spans,
    channels,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
    AVERAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Adds up the pairs of inputs and output gradients of each span, those inside a block by lag."""
    row, length, d, first, count = _place(lengths_ptr, steps, span, spans, channels, CHANNELS)
    groups = tl.cdiv(channels, CHANNELS)
    size = AVERAGES * CHANNELS
    tile = tl.arange(0, AVERAGES)[:, None] * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.program_id(0) % groups * size + tile
    program = tl.program_id(0).to(tl.int64) * size + tile
    counts = tl.where(d < channels, count, 0)
    q = tl.load(powers_ptr + groups * size + group)
    b = tl.load(b_ptr + group)
    g = tl.load(g_ptr + group)
    before = tl.load(starts_ptr + program)
    nothing = tl.full([AVERAGES, CHANNELS], 0.0, q.dtype)
    dlog_q, db, dg = nothing, nothing, nothing
    lags = ()
    for _ in tl.static_range(BLOCK):
        lags += (tl.full([CHANNELS], 0.0, q.dtype),)

    at = (row * steps + (length - 1 - first if REVERSED else first)) * channels + d
    stride = (-channels if REVERSED else channels).to(tl.int64)
    x_ptr += at
    dy_ptr += at
    for begin in range(0, count, BLOCK):
        # The last block of a row may be short. It is read with zeros behind it; but inputs for e, which weights them by
        # their distance from the end, with zeros before them.
        filled = tl.minimum(count - begin, BLOCK)
        fill = tl.minimum(counts - begin, BLOCK)
        e, de = nothing, nothing
        for i in tl.static_range(BLOCK):
            x = tl.load(x_ptr + (i + filled - BLOCK) * stride, i + fill >= BLOCK, 0.0).to(q.dtype)
            de = de * q + e
            e = e * q + x
        behind = tl.load(carries_ptr + (row * tl.cdiv(steps, BLOCK) + (first + begin) // BLOCK) * groups * size + group)
        kept = tl.load(powers_ptr + filled * groups * size + group) * before
        dlog_q += behind * (b * q * de + filled * kept)
        db += behind * e
        after = kept + b * e

        xs, dys = (), ()
        for i in tl.static_range(BLOCK):
            xs += (tl.load(x_ptr, i < fill, 0.0).to(q.dtype),)
            dys += (tl.load(dy_ptr, i < fill, 0.0).to(q.dtype),)
            x_ptr += stride
            dy_ptr += stride
        f, df = nothing, nothing
        for i in tl.static_range(BLOCK):
            f = f * q + dys[BLOCK - 1 - i]
            df = df * q + f
        before *= q
        dlog_q += before * g * df
        dg += before * f
        before = after

        totals = ()
        for lag in tl.static_range(BLOCK):
            total = lags[lag]
            for i in tl.static_range(BLOCK - lag):
                total += dys[i + lag] * xs[i]
            totals += (total,)
        lags = totals

    tl.store(dlog_q_ptr + program, dlog_q)
    tl.store(db_ptr + program, db)
    tl.store(dg_ptr + program, dg)
    lags_ptr += tl.program_id(0).to(tl.int64) * BLOCK * CHANNELS + tl.arange(0, CHANNELS)
    for lag in tl.static_range(BLOCK):
        tl.store(lags_ptr + lag * CHANNELS, lags[lag])
