"""Every kernel against the plain float64 loop, over the whole contract: outputs, final states, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from laws import EXACT, assert_close, assert_gradients_close, assert_same
from megablocks.functional import ema_backend
from megablocks.functional.backends import BACKENDS
from megablocks.functional.ema import coefficients
from megablocks.kernels import EMACoefficients
from megablocks.kernels.blocked import BLOCK, GROUP
from megablocks.kernels.registered import RegisteredKernel
from strategies import seeds

KERNELS = {name: BACKENDS[name].load() for name in ema_backend().available}
TRUNCATIONS = {
    name: kernel.truncated
    for name, kernel in KERNELS.items()
    if isinstance(kernel, RegisteredKernel) and kernel.truncated is not None
}
BORDERS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1)
SCANNED = GROUP * BLOCK + BLOCK + 12
"""Long enough for the scan over blocks to go through groups of them."""

fast_kernels = {name: kernel for name, kernel in KERNELS.items() if name != "recurrent"}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def parameters(seed: int, width: int, averages: int, *, spread: float = 1.0) -> list[Tensor]:
    """alpha, delta, beta, eta (D, N), in float64, ready for gradients."""
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4, width, averages, generator=source, dtype=torch.float64) * spread
    return [parameter.clone().requires_grad_() for parameter in drawn]


def drawn(seed: int, *shape: int) -> Tensor:
    """Numbers from a seed, ready for gradients."""
    source = torch.Generator().manual_seed(seed + 1)
    return torch.randn(*shape, generator=source, dtype=torch.float64).requires_grad_()


def only_real(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The numbers of the first `lengths` steps of each row."""
    return x if lengths is None else x[torch.arange(x.shape[1]) < lengths.unsqueeze(-1)]


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """Tensors agree, and so do the gradients of a drawn combination of them."""
    for tensor, other in zip(found, expected, strict=True):
        assert_close(tensor, other)
    weights = [torch.randn_like(tensor) for tensor in expected]
    grads = []
    for tensors in (found, expected):
        total = sum((weight * tensor).sum() for weight, tensor in zip(weights, tensors, strict=True))
        if not total.requires_grad:  # the oracle's answer to rows without a token
            grads.append([torch.zeros_like(leaf) for leaf in leaves])
            continue
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads.append(list(torch.autograd.grad(total, leaves, **options)))
    assert_gradients_close(*grads)


def check_recurrence(
    kernel: Callable[..., Any],
    *,
    seed: int,
    length: int,
    averages: int,
    start: bool,
    lengths: tuple[int, ...] | None,
    mirror: bool = False,
) -> None:
    """Without truncation: the oracle's outputs and final state, from a starting state or zeros."""
    torch.manual_seed(seed)
    batch, width = 2 if lengths is None else len(lengths), 3
    params, x = parameters(seed, width, averages), drawn(seed, batch, length, width)
    hidden = drawn(seed + 2, batch, width, averages) if start else None
    counts = None if lengths is None else torch.tensor(lengths)
    mask = None if counts is None else torch.arange(length) >= counts.unsqueeze(-1)
    clean = x if mask is None else x.masked_fill(mask.unsqueeze(-1), 0.0)
    omega = drawn(seed + 4, width)
    leaves = [x, *params, omega] + ([hidden] if start else [])
    back = parameters(seed + 3, width, averages) if mirror else []

    y, final = kernel(
        clean,
        coefficients(*params),
        coefficients(*back) if mirror else None,
        omega=omega,
        hidden=hidden,
        lengths=counts,
        final=True,
    )
    expected, last = oracles.ema(x, *params, omega, padding_mask=mask, hidden=hidden)
    if mirror:
        both = [torch.cat(pair) for pair in zip(params, back, strict=True)]
        looking_back, _ = oracles.ema(x, *params, omega, padding_mask=mask)
        expected = expected - looking_back + oracles.ema(x, *both, omega, causal=False, padding_mask=mask)[0]
    compare((only_real(y, counts), final), (only_real(expected, counts), last), leaves + back)


def check_window(
    kernel: Callable[..., Any], *, seed: int, length: int, averages: int, truncation: int, mirror: bool
) -> None:
    """With truncation: the oracle's outputs, backwards in time as well where there is a mirror."""
    torch.manual_seed(seed)
    width = 2
    params, back = parameters(seed, width, averages), parameters(seed + 3, width, averages)
    x, omega = drawn(seed, 2, length, width), drawn(seed + 4, width)
    mirrored = coefficients(*back) if mirror else None
    y, final = kernel(x, coefficients(*params), mirrored, omega=omega, truncation=truncation)
    assert final is None
    both = [torch.cat(pair) for pair in zip(params, back, strict=True)] if mirror else params
    expected, _ = oracles.ema(x, *both, omega, causal=not mirror, truncation=truncation)
    compare((y,), (expected,), [x, *params, omega] + (back if mirror else []))


@every_kernel
@pytest.mark.parametrize("length", BORDERS)
@pytest.mark.parametrize("start", [False, True], ids=["from zeros", "from a state"])
def test_borders_of_blocks(kernel, length, start):
    counts = tuple(sorted({0, 1, length // 2, max(length - 1, 0), length}))
    for lengths in (None, counts):
        check_recurrence(kernel, seed=length, length=length, averages=2, start=start, lengths=lengths)


@every_kernel
@given(
    seed=seeds(),
    length=st.integers(1, 12) | st.integers(BLOCK - 2, 2 * BLOCK + 2),
    averages=st.integers(1, 4),
    start=st.booleans(),
    mirror=st.booleans(),
    data=st.data(),
)
def test_recurrence(kernel, seed, length, averages, start, mirror, data):
    counts = st.none() | st.lists(st.integers(0, length), min_size=1, max_size=3).map(tuple)
    lengths = data.draw(counts, label="lengths")
    if mirror:  # Backwards in time, what stands first comes last: rows of one length.
        lengths = None
    check_recurrence(kernel, seed=seed, length=length, averages=averages, start=start, lengths=lengths, mirror=mirror)


@every_kernel
@given(
    seed=seeds(),
    length=st.integers(1, 12),
    averages=st.integers(1, 4),
    truncation=st.integers(1, 14),
    mirror=st.booleans(),
)
@example(seed=0, length=BLOCK + 6, averages=2, truncation=BLOCK + 1, mirror=True)
def test_window(kernel, seed, length, averages, truncation, mirror):
    check_window(kernel, seed=seed, length=length, averages=averages, truncation=truncation, mirror=mirror)


@pytest.mark.parametrize("operator", TRUNCATIONS.values(), ids=TRUNCATIONS)
@given(
    seed=seeds(),
    length=st.integers(1, 120),
    averages=st.integers(1, 3),
    truncation=st.integers(16, 70),
    mirror=st.booleans(),
)
@example(seed=0, length=95, averages=1, truncation=16, mirror=True)
@example(seed=0, length=120, averages=2, truncation=31, mirror=True)
def test_window_of_an_operator(operator, seed, length, averages, truncation, mirror):
    # Kernels leave short windows to `blocked`; what is made for long ones must be right from its shortest on.
    def kernel(x: Tensor, *directions: EMACoefficients | None, omega: Tensor, truncation: int) -> tuple[Tensor, None]:
        rows = [torch.cat(rows) for rows in zip(*filter(None, directions), strict=True)]
        return operator.forward(x, *rows[1:], omega, truncation), None

    check_window(kernel, seed=seed, length=length, averages=averages, truncation=truncation, mirror=mirror)


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """x (B, L, D) convolved with a kernel (D, lags): one matrix (L, L) for each channel."""
    length = x.shape[1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    seen = (lag >= 0) & (lag < kernel.shape[1])
    toeplitz = torch.where(seen, kernel[:, lag.clamp(0, kernel.shape[1] - 1)], 0.0)
    return torch.einsum("dts,bsd->btd", toeplitz, x)


@every_kernel
@pytest.mark.parametrize("length", [GROUP * BLOCK, GROUP * BLOCK + 1, SCANNED])
@pytest.mark.parametrize("truncation", [None, 1, BLOCK, 3 * BLOCK + 5, 7 * BLOCK, GROUP * BLOCK - 1, GROUP * BLOCK + 1])
def test_long_sequences(kernel, length, truncation):
    # Slow decays, so that what comes from far away counts. The oracle's loop over lags, written as matrix products.
    torch.manual_seed(0)
    params, back, x = parameters(0, 2, 2), parameters(1, 2, 2), drawn(0, 2, length, 2)
    with torch.no_grad():
        for alpha in (params[0], back[0]):
            alpha.sub_(torch.tensor([[3.0, 6.0], [8.0, 0.0]], dtype=torch.float64))
    lags = torch.arange(min(truncation or length, length))

    def response(alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor) -> Tensor:
        q = 1 - alpha.sigmoid() * delta.sigmoid()
        weight = alpha.sigmoid() * beta * eta / math.sqrt(eta.shape[1])
        return (weight[..., None] * q[..., None] ** lags).sum(1)

    y, _ = kernel(x, coefficients(*params), coefficients(*back), truncation=truncation)
    expected = filtered(x, response(*params)) + filtered(x.flip(1), response(*back)).flip(1)
    compare((y,), (expected,), [x, *params, *back])


@every_kernel
@pytest.mark.parametrize("length", [GROUP * BLOCK + 1, SCANNED])
def test_long_sequences_from_a_state(kernel, length):
    # Cutting a long sequence in two is the one pass: the grouped scan starts from a state, and ends in one.
    params, x = parameters(5, 2, 3, spread=2.0), drawn(0, 2, length, 2)
    hidden = drawn(9, 2, 2, 3)
    counts = torch.tensor([length, length - BLOCK - 3])
    cut = x.masked_fill((torch.arange(length) >= counts[:, None])[..., None], 0.0)
    y, final = kernel(cut, coefficients(*params), hidden=hidden, lengths=counts, final=True)
    state, pieces = hidden, []
    for index, segment in enumerate(cut.split(BLOCK - 7, dim=1)):
        left = (counts - index * (BLOCK - 7)).clamp(0, segment.shape[1])
        piece, state = KERNELS["recurrent"](segment, coefficients(*params), hidden=state, lengths=left, final=True)
        pieces.append(piece)
    leaves = [x, hidden, *params]
    compare((only_real(y, counts), final), (only_real(torch.cat(pieces, 1), counts), state), leaves)


@every_kernel
def test_no_final_state_unless_asked_for(kernel):
    params, x = parameters(0, 2, 2), drawn(0, 1, 5, 2)
    assert kernel(x, coefficients(*params))[1] is None


@every_kernel
@pytest.mark.parametrize("length", [5, BLOCK + 3, SCANNED])
@pytest.mark.parametrize("truncation", [None, 3, BLOCK + 1])
def test_a_later_input_never_meets_an_earlier_output(kernel, length, truncation):
    params = [parameter.detach().float() for parameter in parameters(0, 3, 4)]
    x = drawn(0, 2, length, 3).detach().float()
    for at in (1, length // 2, length - 1):
        disturbed = x.clone()
        disturbed[:, at:] = torch.randn(2, length - at, 3) * 1e30
        y, moved = (kernel(z, coefficients(*params), truncation=truncation)[0] for z in (x, disturbed))
        assert_same(moved[:, :at], y[:, :at])


@every_kernel
@pytest.mark.parametrize("mirror", [False, True])
def test_what_left_the_window_leaves_nothing_behind(kernel, mirror):
    params = coefficients(*(parameter.detach().float() for parameter in parameters(0, 3, 4)))
    x = drawn(0, 1, 6 * BLOCK, 3).detach().float()
    loud = x.clone()
    loud[:, :3] *= 1e30
    truncation = 2 * BLOCK + 5
    y, moved = (kernel(z, params, params if mirror else None, truncation=truncation)[0] for z in (x, loud))
    assert_same(moved[:, truncation + 3 :], y[:, truncation + 3 :])


@every_kernel
def test_float32_over_a_long_time(kernel):
    # Law 7: at lag 65,536 the error stays under 1e-3 of the impulse response, for decays that are felt so far away.
    if kernel is KERNELS["recurrent"]:
        steps, width = 65_536, 1  # step by step: one row, one channel
    else:
        steps, width = 65_536, 8
    alpha = torch.linspace(-13.0, -9.0, width).unsqueeze(-1)
    params = [alpha, *(torch.ones(width, 1) for _ in range(3))]
    x = torch.zeros(1, steps + 1, width)
    x[:, 0] = 1.0
    with torch.no_grad():
        y, final = kernel(x, coefficients(*params), final=True)
    wide = coefficients(*(parameter.double() for parameter in params))
    expected = wide.b * wide.g * torch.exp(wide.log_q * steps)
    assert ((y[0, -1].double() - expected[:, 0]) / expected[:, 0]).abs().max() < 1e-3
    assert ((final[0].double() - expected / wide.g) / (expected / wide.g)).abs().max() < 1e-3


@every_kernel
def test_backward_in_float64_is_the_numerical_gradient(kernel):
    params, x, hidden = parameters(0, 2, 2), drawn(0, 1, 4, 2), drawn(3, 1, 2, 2)

    def run(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        x, hidden, *rest = arguments
        return kernel(x, coefficients(*rest), hidden=hidden, final=True)

    torch.autograd.gradcheck(run, [x, hidden, *params], atol=EXACT * 1e4)
