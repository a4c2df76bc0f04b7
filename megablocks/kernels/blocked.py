"""The damped EMA as matrix products over blocks of time: portable and differentiable to any order.

Time is cut into J blocks of T steps. Inside a block the EMA is a triangular T x T Toeplitz product per channel; from
block to block only N numbers per channel are carried:

    y[j] = x[j] inside + h[j] leave         inside: (T, T)   leave: (N, T)
    h[j+1] = q^T h[j] + x[j] enter          enter: (T, N)

So coefficients are made for T lags instead of L, nothing of size D x N x L exists, memory is O(B L D), and a later
input never meets an earlier output, not even as a rounding error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks.kernels import EMACoefficients

BLOCK = 64
"""T. Shorter blocks carry more states, longer ones multiply more zeros; measured fastest from L = 256 on."""

GROUP = 16
"""Blocks that one level of the scan over blocks runs through; the levels grow with the logarithm of L."""


def blocked(
    x: Tensor,
    forward: EMACoefficients,
    mirror: EMACoefficients | None = None,
    *,
    omega: Tensor | None = None,
    hidden: Tensor | None = None,
    lengths: Tensor | None = None,
    truncation: int | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Runs the recurrence block by block (see `megablocks.kernels` for the contract)."""
    batch, length, channels = x.shape
    # A compiler may know the length by name only: what it traces must not depend on how the length falls.
    traced = torch.compiler.is_compiling()
    size = BLOCK if traced else min(BLOCK, length)
    blocks = _parts(length, size)
    padded = F.pad(x, (0, 0, 0, blocks * size - length)) if traced or length % size else x
    # (D, B, J, T): channels outermost, because each multiplies by matrices of its own.
    cut = transposed(padded.reshape(-1, channels)).view(channels, batch, blocks, size)

    matrices = _matrices(forward, size, blocks, truncation)
    inside = matrices.inside
    terms, states = _from_other_blocks(cut, forward, matrices, hidden, truncation)
    if mirror is not None:
        # Reversed time is the same sum with the axes of every matrix reversed and the blocks read from the end.
        reversed_matrices = _matrices(mirror, size, blocks, truncation).reversed()
        inside = inside + reversed_matrices.inside
        terms += _from_other_blocks(cut, mirror, reversed_matrices, None, truncation, backward=True)[0]
    if omega is not None:
        inside = inside + omega.view(-1, 1, 1) * torch.eye(size, dtype=x.dtype, device=x.device)

    y = torch.bmm(cut.flatten(1, 2), inside)
    for operand, matrix in terms:
        y = y.baddbmm_(operand.flatten(1, 2), matrix)
    y = transposed(y.view(channels, batch * blocks * size)).view(batch, blocks * size, channels)[:, :length]
    if not final or states is None:
        return y, None
    return y, _final_state(cut, forward, matrices.enter, states, lengths, length)


def exporting() -> bool:
    """Whether `torch.export` is at work: its programs serve lengths of any kind, and run where this package is not."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def _parts(count: int, size: int) -> int:
    """Parts of a size that hold so many; exported at least two, the last of them never full, so that all are alike."""
    return count // size + 2 if exporting() else -(-count // size)


def transposed(x: Tensor) -> Tensor:
    """Returns a contiguous transposed matrix, whose gradient comes back contiguous too.

    Copying whole matrices is three times faster than copying tensors whose strides say the same, and products of
    operands that are not contiguous would be copied channel by channel, forwards and backwards.
    """
    if torch.compiler.is_compiling():  # a compiler lays tensors out itself, and warns of every `Function`
        return x.t().contiguous()
    result: Tensor = _Transposed.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Transposed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return transposed(gradient)

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        return tangent.t().contiguous()


class _Matrices(NamedTuple):
    inside: Tensor  # (D, T, T), input step by output step
    enter: Tensor  # (D, T, N)
    leave: Tensor  # (D, N, T)
    distant: list[tuple[int, Tensor]]  # truncated only: how many blocks back, (D, T, T)

    def reversed(self) -> _Matrices:
        distant = [(blocks_back, matrix.flip(1, 2)) for blocks_back, matrix in self.distant]
        return _Matrices(self.inside.flip(1, 2), self.enter.flip(1), self.leave.flip(2), distant)


def _matrices(coefficients: EMACoefficients, size: int, blocks: int, truncation: int | None) -> _Matrices:
    _, log_q, b, g = coefficients
    steps = torch.arange(size, device=b.device)
    powers = torch.exp(log_q.unsqueeze(-1) * steps)  # (D, N, T)
    enter = (b.unsqueeze(-1) * powers.flip(-1)).transpose(1, 2)
    leave = (g * torch.exp(log_q)).unsqueeze(-1) * powers
    distant = []
    if truncation is not None:
        distant = half_seen(coefficients, size, blocks, truncation)
    return _Matrices(toeplitz(coefficients, size, 0, truncation), enter, leave, distant)


def half_seen(coefficients: EMACoefficients, size: int, blocks: int, truncation: int) -> list[tuple[int, Tensor]]:
    """How many blocks back those are that a window covers for some output steps only, one or two, and their weights."""
    whole = whole_blocks(truncation, size)
    reached = [back for back in (whole + 1, whole + 2) if (back - 1) * size + 1 < truncation]
    if not torch.compiler.is_compiling():
        reached = [back for back in reached if back < blocks]
    return [(back, toeplitz(coefficients, size, back, truncation)) for back in reached]


def whole_blocks(truncation: int, size: int) -> int:
    """Earlier blocks that lie inside the window of every step of a block."""
    return max(0, truncation // size - 1)


def toeplitz(coefficients: EMACoefficients, size: int, blocks_back: int, truncation: int | None) -> Tensor:
    """Weights `[d, s, r]` of step s, `blocks_back` blocks earlier, in the output at step r; zero at lags not seen."""
    _, log_q, b, g = coefficients
    lags = torch.arange(1 - size, size, device=b.device) + blocks_back * size
    seen = lags >= 0 if truncation is None else (lags >= 0) & (lags < truncation)
    powers = torch.exp(log_q.unsqueeze(-1) * lags.clamp(min=0))
    kernel = torch.einsum("dn,dnl->dl", b * g, powers).masked_fill(~seen, 0.0)
    return kernel.unfold(-1, size, 1).flip(1).contiguous()


def _from_other_blocks(
    cut: Tensor,
    coefficients: EMACoefficients,
    matrices: _Matrices,
    hidden: Tensor | None,
    truncation: int | None,
    backward: bool = False,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Pairs (operand, matrix) whose products add to each block what came before it, and the state before each."""
    blocks, size = cut.shape[2:]
    if not torch.compiler.is_compiling() and blocks == 1 and hidden is None:
        return [], cut.new_zeros(*cut.shape[:3], matrices.enter.shape[-1])
    ends = torch.einsum("dbjt,dtn->dbjn", cut, matrices.enter)
    log_decay = (coefficients.log_q * size).unsqueeze(1)
    if backward:
        ends = ends.flip(2)
    if truncation is None:
        start = torch.zeros_like(ends[:, :, 0]) if hidden is None else hidden.transpose(0, 1)
        states = _scan(ends, log_decay, start, _levels(blocks))
    else:
        states = window(ends, log_decay, whole_blocks(truncation, size))
    if backward:
        states = states.flip(2)
    shift = _later if backward else earlier
    terms = [(states, matrices.leave), *((shift(cut, back), matrix) for back, matrix in matrices.distant)]
    return terms, states if truncation is None else None


def _levels(blocks: int) -> int:
    """Levels of groups that the scan goes through; for a compiler enough for four million steps of any length."""
    if torch.compiler.is_compiling():
        return 3
    levels = 0
    while GROUP ** (levels + 1) < blocks:
        levels += 1
    return levels


def _scan(ends: Tensor, log_decay: Tensor, start: Tensor, levels: int) -> Tensor:
    """State before each block: `h[0] = start`, `h[j+1] = decay h[j] + ends[j]`; ends (D, B, J, N), start (D, B, N)."""
    channels, batch, blocks, averages = ends.shape
    if levels == 0:
        if torch.compiler.is_compiling():
            ends = F.pad(ends, (0, 0, 0, GROUP))[:, :, :GROUP]
        decay = torch.exp(log_decay)
        before = [start]
        for end in ends.unbind(2)[:-1]:
            before.append(torch.addcmul(end, decay, before[-1]))
        return torch.stack(before, dim=2)[:, :, :blocks]
    groups = _parts(blocks, GROUP)
    grouped = F.pad(ends, (0, 0, 0, groups * GROUP - blocks)).reshape(channels, batch * groups, GROUP, averages)
    local = _scan(grouped, log_decay, torch.zeros_like(grouped[:, :, 0]), 0)
    totals = torch.addcmul(grouped[:, :, -1], torch.exp(log_decay), local[:, :, -1])
    carried = _scan(totals.view(channels, batch, groups, averages), log_decay * GROUP, start, levels - 1)
    steps = torch.arange(GROUP, device=ends.device).unsqueeze(-1)
    decays = torch.exp(log_decay.unsqueeze(2) * steps)  # (D, 1, GROUP, N)
    states = torch.addcmul(local, decays, carried.flatten(1, 2).unsqueeze(2))
    return states.view(channels, batch, groups * GROUP, averages)[:, :, :blocks]


def window(ends: Tensor, log_decay: Tensor, width: int) -> Tensor:
    """State before each block from its last `width` blocks alone, by doubling: no difference of long sums, so nothing
    that has left the window leaves a rounding error behind."""
    log_decay = log_decay.unsqueeze(2)
    states, covered = torch.zeros_like(ends), 0
    span, doubled = 1, earlier(ends, 1)  # the sum over `span` blocks, the newest one block back
    while covered < width:
        if width & span:
            states = states + torch.exp(log_decay * covered) * earlier(doubled, covered)
            covered += span
        if covered < width:
            doubled = doubled + torch.exp(log_decay * span) * earlier(doubled, span)
            span *= 2
    return states


def earlier(blocks: Tensor, count: int) -> Tensor:
    """At each block, what stands `count` blocks before it; zeros before the first."""
    return F.pad(blocks, (0, 0, count, 0))[:, :, : blocks.shape[2]]


def _later(blocks: Tensor, count: int) -> Tensor:
    """At each block, what stands `count` blocks after it; zeros after the last."""
    return F.pad(blocks, (0, 0, 0, count))[:, :, count:]


def _final_state(
    cut: Tensor, coefficients: EMACoefficients, enter: Tensor, states: Tensor, lengths: Tensor | None, length: int
) -> Tensor:
    """State after the last real token of each row, (B, D, N)."""
    channels, batch, _, size = cut.shape
    if lengths is None:
        lengths = torch.full((batch,), length, device=cut.device)
    block = (lengths - 1).clamp(min=0) // size
    filled = lengths - block * size
    chosen = block.view(1, -1, 1, 1)
    before = states.gather(2, chosen.expand(channels, -1, 1, states.shape[-1])).squeeze(2)
    inputs = cut.gather(2, chosen.expand(channels, -1, 1, size)).squeeze(2)
    # Pushed to the end of a block, the row's last inputs meet the weights that `enter` holds for a full one.
    source = torch.arange(size, device=cut.device) - (size - filled).unsqueeze(-1)
    pushed = inputs.gather(2, source.clamp(min=0).expand(channels, -1, -1)).masked_fill(source < 0, 0.0)
    kept = torch.exp(coefficients.log_q.unsqueeze(1) * filled.view(1, -1, 1))
    return torch.baddbmm(kept * before, pushed, enter).transpose(0, 1)
