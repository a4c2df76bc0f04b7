"""The damped EMA as fused GPU kernels, forwards and backwards, in Triton: little more moves than `x` and `y`.

A program runs the recurrence for one row and 32 channels, with all their averages in registers:

    h_t = h_{t-1} - p h_{t-1} + b x_t        y_t = sum_n g h_t + omega x_t

(`h - p h` and not `q h`, because rounding q to float32 would bend slow decays). Few rows and channels would leave most
of the chip idle, so time is cut into spans, each with a program of its own. First every span runs from zeros, for the
state that it ends in; then these are carried from span to span, h = q^T h + end; then every span runs from its true
state and writes its outputs. An average that looks both ways is a second run, which reads each row from its end.

**Gradient of x.** The adjoint a_t, the gradient of the loss by h_t, is the same recurrence backwards in time, with b
and g in each other's place: `dx_t = sum_n b a_t + omega dy_t`. What is carried is the state after its decay,

    a_t = c_{t+1} + g dy_t        c_t = q a_t,

so it starts from the gradient of the final state, ends in that of the starting state, and nothing is divided by q.

The programs themselves, and how they find the gradients of the coefficients, stand in `triton_programs`. Powers of q
are exponentials of multiples of log q and come from torch: a GPU's own exponential is a rough one. `x`, `dy` and `y`
may be of any floating dtype; coefficients, states and sums are float32 or float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton  # type: ignore[import-untyped, import-not-found]
from einops import rearrange
from torch import Tensor

from megablocks.kernels import triton_programs
from megablocks.kernels.registered import RegisteredKernel

THREADS = 32
"""Threads of a program, one warp. Each has a channel of its own, unless its registers do not hold all averages."""

HELD = 16
"""Averages in float32 that a thread's registers hold, beside their coefficients."""

RESIDENT = 16
"""Programs that a multiprocessor runs at a time."""

SHORTEST = 64
"""Steps of a span at least, so that starting a program costs little beside them."""

LONGEST = 8192
"""Steps of a span at most. What float32 rounds off in a step adds up over tens of thousands, but not across spans."""

BLOCK = 16
"""Steps whose pairs are counted by lag. In longer blocks there are more lags, in shorter ones more to carry."""

AHEAD = 8
"""Steps that inputs are loaded before they are needed, because memory answers late."""


class _Direction(NamedTuple):
    """Coefficients of one direction of time, in tiles."""

    log_q: Tensor
    p: Tensor
    b: Tensor
    g: Tensor
    flip: bool
    """Whether time runs backwards."""


class _Work:
    """One call of the kernel, cut into programs: one for each row, each span of it, each group of channels in that.

    States and coefficients, (..., D, N) outside, are in tiles here, (..., groups, averages, channels of a group),
    padded with zeros. A program's tile is one stretch of memory, in which neighbouring threads read neighbours.
    """

    def __init__(self, x: Tensor, log_q: Tensor, lengths: Tensor | None) -> None:
        self.batch, self.steps, self.channels = x.shape
        self.averages, self.dtype, self.lengths = log_q.shape[1], log_q.dtype, lengths
        self.tile = _tile(self.averages, self.dtype)
        self.groups = -(-self.channels // self.tile["CHANNELS"])
        self.span = _span(self.steps, self.batch * self.groups, _processors(x.device))
        self.spans = -(-self.steps // self.span)
        # Where the span that a row begins with, and the one it ends in, stand in (B, spans, ...).
        rows = torch.arange(self.batch, device=x.device)
        last = torch.full_like(rows, self.spans - 1) if lengths is None else (lengths - 1).clamp(min=0) // self.span
        self.first, self.last = (rows, torch.zeros_like(rows)), (rows, last)

    def tiles(self, rows: Tensor) -> Tensor:
        """(..., D, N) in tiles."""
        averages, channels = self.tile.values()
        padded = F.pad(rows, (0, averages - self.averages, 0, self.groups * channels - self.channels))
        return rearrange(padded, "... (groups d) n -> ... groups n d", d=channels).contiguous()

    def rows(self, tiles: Tensor) -> Tensor:
        """(..., D, N) from tiles, as a copy, because outputs of an operator must not share memory."""
        rows = rearrange(tiles, "... groups n d -> ... (groups d) n")[..., : self.channels, : self.averages]
        return rows.clone(memory_format=torch.contiguous_format)

    def directions(self, log_q: Tensor, b: Tensor, g: Tensor) -> list[_Direction]:
        """Coefficients of the past, and if there are twice as many rows, of the future."""
        parts = torch.stack([log_q, -torch.expm1(log_q), b, g])
        both = self.tiles(parts.view(4, -1, self.channels, self.averages)).unbind(1)
        return [_Direction(log_q, p, b, g, flip=index == 1) for index, (log_q, p, b, g) in enumerate(both)]

    def outputs(self, x: Tensor, future: list[_Direction]) -> Tensor:
        """Room for outputs, zeros behind the tokens. Those of two directions are rounded when they have been added."""
        make = torch.empty_like if self.lengths is None else torch.zeros_like
        return make(x, dtype=self.dtype if future else x.dtype)

    def launch(self, kernel: Any, *tensors: Tensor | None, **flags: int) -> None:
        """Starts a program for each row, span and group."""
        programs = self.batch * self.spans * self.groups
        sizes = self.steps, self.span, self.spans, self.channels
        _launch(kernel, programs, *tensors, self.lengths, *sizes, BLOCK=BLOCK, **self.tile, **flags)

    def run(
        self,
        x: Tensor,
        y: Tensor | None,
        starts: Tensor,
        direction: _Direction,
        *,
        omega: Tensor | None = None,
        carries: Tensor | None = None,
        adjoint: bool = False,
    ) -> Tensor:
        """Runs all spans: fills `y` and `carries`, returns the states at the ends."""
        _, p, b, g, flip = direction
        enter, leave = (g, b) if adjoint else (b, g)
        ends = torch.empty_like(starts)
        tensors = y, starts, ends, carries, p, enter, leave, omega
        self.launch(triton_programs.run, x, *tensors, ADJOINT=adjoint, REVERSED=flip, AHEAD=AHEAD)
        return ends

    def starts(self, x: Tensor, direction: _Direction, given: Tensor | None, *, adjoint: bool = False) -> Tensor:
        """States that the spans start from, (B, spans, *tile); the first span's is the `given` one, or zeros."""
        starts = direction.p.new_zeros(self.batch, self.spans, *direction.p.shape)
        if given is not None:
            starts[self.last if adjoint else self.first] = self.tiles(given)
        if self.spans > 1:
            ends = self.run(x, None, starts, direction, adjoint=adjoint)
            kept = torch.exp(direction.log_q * self.span)
            programs, sizes = self.batch * kept.numel() // THREADS, (self.spans, kept.numel())
            flags = {"ADJOINT": adjoint, "AHEAD": AHEAD, "THREADS": THREADS}
            _launch(triton_programs.carry, programs, starts, ends, kept, self.last[1], *sizes, **flags)
        return starts

    def pair(self, x: Tensor, dy: Tensor, starts: Tensor, carries: Tensor, direction: _Direction) -> list[Tensor]:
        """Gradients of log q, b and g, in tiles, and of omega."""
        exponents = torch.arange(BLOCK + 1, dtype=self.dtype, device=x.device).view(-1, 1, 1, 1)
        powers = torch.exp(direction.log_q * exponents)
        sums = starts.new_empty(3, *starts.shape)
        lags = starts.new_empty(self.batch, self.spans, self.groups, BLOCK, self.tile["CHANNELS"])
        b, g = direction.b, direction.g
        self.launch(triton_programs.pair, x, dy, starts, carries, powers, b, g, *sums, lags, REVERSED=direction.flip)
        dlog_q, db, dg = sums.sum((1, 2))
        counted = lags.sum((0, 1)).transpose(0, 1)  # (BLOCK, groups, channels)
        inside = powers[:-1] * counted.unsqueeze(2)
        dlog_q += b * g * (exponents[:-1] * inside).sum(0)
        db += g * inside.sum(0)
        dg += b * inside.sum(0)
        return [self.rows(dlog_q), self.rows(db), self.rows(dg), counted[0].flatten()[: self.channels]]


def _launch(kernel: Any, programs: int, *arguments: Tensor | int | None, **flags: int) -> None:
    """Starts so many programs, a warp each, on the GPU that the tensors are on, which need not be the current one."""
    # Fusion: a product and a sum are one instruction, rounded once. From Triton 3.10 on it must be asked for.
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*arguments, **flags, num_warps=1, enable_fp_fusion=True)


def _tile(averages: int, dtype: torch.dtype) -> dict[str, int]:
    """Averages of a tile, a power of two, and channels, so many that a thread's share of it fits its registers."""
    padded = triton.next_power_of_2(averages)
    held = THREADS * HELD * torch.float32.itemsize // dtype.itemsize
    return {"AVERAGES": padded, "CHANNELS": min(THREADS, max(1, held // padded))}


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Triton's interpreter has none: four, so that its tests see time cut into spans."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _span(steps: int, programs: int, processors: int) -> int:
    """Steps of a span, in whole blocks: time is cut into as many spans as a chip has room for, none if it is half full.

    What a cut costs, the first run from zeros, is worth it only for a chip that would stand idle.
    """
    spans = max(RESIDENT * processors // max(1, programs), -(-steps // LONGEST))
    return -(-max(SHORTEST, -(-steps // spans)) // BLOCK) * BLOCK


def forward(
    x: Tensor,
    log_q: Tensor,
    b: Tensor,
    g: Tensor,
    omega: Tensor | None,
    hidden: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and final state (see `megablocks.kernels.registered` for the contract)."""
    work = _Work(x, log_q, lengths)
    past, *future = work.directions(log_q, b, g)
    y = work.outputs(x, future)
    ends = work.run(x, y, work.starts(x, past, hidden), past, omega=omega)
    for direction in future:
        work.run(x, y, work.starts(x, direction, None), direction)
    return y.to(x.dtype), work.rows(ends[work.last])


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
    """Gradients (see `megablocks.kernels.registered` for the contract)."""
    work = _Work(x, log_q, lengths)
    past, *future = work.directions(log_q, b, g)
    dx = work.outputs(x, future)
    carries = past.p.new_empty(work.batch, -(-work.steps // BLOCK), *past.p.shape)

    def gradients(
        direction: _Direction, start: Tensor | None, dend: Tensor | None, omega: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        starts = work.starts(dy, direction, dend, adjoint=True)
        ends = work.run(dy, dx, starts, direction, omega=omega, carries=carries, adjoint=True)
        return ends, work.pair(x, dy, work.starts(x, direction, start), carries, direction)

    ends, (*grads, domega) = gradients(past, hidden, dfinal, omega)
    for direction in future:
        _, (*others, _) = gradients(direction, None, None, None)
        grads = [torch.cat(both) for both in zip(grads, others, strict=True)]
    dlog_q, db, dg = grads
    return dx.to(x.dtype), dlog_q, db, dg, domega, work.rows(ends[work.first])


triton_gpu = RegisteredKernel("ema_triton", forward, backward)
