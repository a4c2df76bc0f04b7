"""The multi-dimensional damped exponential moving average as a function, and the choice of its kernel."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks._checks import (
    check_batch,
    check_input,
    check_optional_size,
    check_padding_mask,
    check_state,
    check_state_shape,
)
from megablocks.functional.backends import choose
from megablocks.functional.padding import packed, zero_padding
from megablocks.functional.precision import at_least_float32, without_autocast
from megablocks.kernels import EMACoefficients, Kernel
from megablocks.kernels.recurrent import recurrent
from megablocks.state import EMAState, TruncatedEMAState


def coefficients(
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    *,
    dtype: torch.dtype | None = None,
    powers: bool = True,
) -> EMACoefficients:
    r"""Turns parameters into the coefficients of the recurrence, in float32 or wider.

    $$p = \sigma(\alpha)\,\sigma(\delta), \quad q = 1 - p, \quad b = \sigma(\alpha)\,\beta, \quad g = \eta / \sqrt{N}.$$

    $\log q$ is `log1p(-p)` for slow decays, where `1 - p` would lose digits, and
    $\log(\sigma(-\alpha) + \sigma(\alpha)\,\sigma(-\delta))$ for fast ones, where p rounds to 1.

    Args:
        alpha: Decay before the logistic function, $(D, N)$.
        delta: Damping before the logistic function, $(D, N)$.
        beta: Expansion, $(D, N)$.
        eta: Projection, $(D, N)$.
        dtype: Precision to compute in; `None` for that of the parameters, and at least float32.
        powers: Whether powers of q will be needed; a single step does without, and without $\log q$.
    """
    dtype = at_least_float32(alpha.dtype) if dtype is None else dtype
    alpha, delta, beta, eta = (parameter.to(dtype) for parameter in (alpha, delta, beta, eta))
    decay = alpha.sigmoid()
    p = decay * delta.sigmoid()
    if not powers:
        return EMACoefficients(p, p.new_empty(0), decay * beta, eta * eta.shape[-1] ** -0.5)
    slow = torch.log1p(-p.clamp(max=0.5))
    fast = torch.logaddexp(F.logsigmoid(-alpha), F.logsigmoid(alpha) + F.logsigmoid(-delta))
    # Infinite parameters make q zero; its logarithm stays finite, so that its product with lag 0 is a number.
    log_q = torch.where(p < 0.5, slow, fast).clamp(min=torch.finfo(dtype).min)
    return EMACoefficients(p, log_q, decay * beta, eta * eta.shape[-1] ** -0.5)


def ema_kernel(alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, length: int) -> Tensor:
    r"""Returns the impulse response of the average, $k_{d,l} = \sum_n b\, g\, q^l$, of shape $(D, \text{length})$.

    For looking at and for plotting: nothing in the package computes with it, and it takes $D N$ times `length` floats.

    Args:
        alpha: Decay before the logistic function, $(D, N)$; likewise `delta`, `beta` and `eta`.
        delta: Damping before the logistic function.
        beta: Expansion.
        eta: Projection.
        length: Number of lags.
    """
    _, log_q, b, g = coefficients(alpha, delta, beta, eta)
    lags = torch.arange(length, device=alpha.device)
    return torch.einsum("dn,dnl->dl", b * g, torch.exp(log_q.unsqueeze(-1) * lags))


@overload
def damped_ema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    omega: Tensor | None = None,
    *,
    truncation: int | None = None,
    padding_mask: Tensor | None = None,
    state: None = None,
    backend: str = "auto",
) -> Tensor:
    """Without a state: the output alone."""


@overload
def damped_ema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    omega: Tensor | None = None,
    *,
    truncation: int | None = None,
    padding_mask: Tensor | None = None,
    state: EMAState | TruncatedEMAState,
    backend: str = "auto",
) -> tuple[Tensor, EMAState | TruncatedEMAState]:
    """With a state: the output and the state after it."""


def damped_ema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    omega: Tensor | None = None,
    *,
    truncation: int | None = None,
    padding_mask: Tensor | None = None,
    state: EMAState | TruncatedEMAState | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, EMAState | TruncatedEMAState]:
    r"""Computes the multi-dimensional damped moving average of every channel of `x`.

    With $p, q, b, g$ from `coefficients`:

    $$h_t = q \odot h_{t-1} + b\, x_t, \qquad y_t = \sum_n g\, h_t + \omega\, x_t.$$

    Args:
        x: Input, $(B, L, D)$.
        alpha: Decay before the logistic function, $(D, N)$; $(2D, N)$ for a bidirectional average, whose second half
            of rows runs backwards in time. `delta`, `beta` and `eta` have the same shape.
        delta: Damping before the logistic function.
        beta: Expansion.
        eta: Projection, scaled by $1/\sqrt{N}$ inside.
        omega: Weight of the skip connection, $(D,)$; `None` for none.
        truncation: Number of lags kept, 0 to `truncation` - 1; `None` for all.
        padding_mask: $(B, L)$, bool, `True` at padding. Padded steps count as absent.
        state: State to start from. With a state the result is `(y, state)`.
        backend: `"auto"`, or a name that `ema_backend()` lists.

    Returns:
        $(B, L, D)$ in the dtype of `x`, zeros at padding; with a state also the state after the last real token.

    Raises:
        ValueError: If shapes do not fit, `truncation` is below 1, no backend has this name or it does not run on this
            device, or a state comes with a bidirectional average, or was made for another batch size, other sizes or
            another truncation.
        ImportError: If the backend needs a package that is not installed.
        TypeError: If `padding_mask` is not bool, or the state is of another kind.

    Note:
        Coefficients, averages and sums are float32 or wider, under autocast and half precisions too.

    Example:
        >>> x, (alpha, delta, beta, eta) = torch.randn(2, 10, 8), torch.randn(4, 8, 3)
        >>> damped_ema(x, alpha, delta, beta, eta).shape
        torch.Size([2, 10, 8])

    References:
        Ma et al., section 3.1, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """
    check_input("x", x, None)
    channels = x.shape[-1]
    both = _check_parameters(channels, alpha, delta, beta, eta, omega)
    check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
    check_optional_size("truncation", truncation, "no truncation")
    if state is not None:
        if both:
            raise ValueError("A state needs an average that looks back only, but these coefficients are bidirectional.")
        _check_state(state, x.shape[0], channels, alpha.shape[1], truncation)
    dtype = at_least_float32(torch.promote_types(x.dtype, alpha.dtype))
    with without_autocast(x):
        inputs = zero_padding(x, padding_mask).to(dtype)
        if truncation is not None and state is None and not torch.compiler.is_compiling() and truncation >= x.shape[1]:
            truncation = None  # nothing to cut
        kernel = choose(backend, inputs, truncation, alpha, delta, beta, eta)
        stepwise = kernel is recurrent and truncation is None
        rows = coefficients(alpha, delta, beta, eta, dtype=dtype, powers=not stepwise)
        forward = EMACoefficients(*(row[:channels] for row in rows)) if both else rows
        mirror = EMACoefficients(*(row[channels:] for row in rows)) if both else None
        if omega is not None:
            omega = omega.to(dtype)
        lengths = None if padding_mask is None else (~padding_mask).sum(1)
        layout = None if padding_mask is None or x.shape[1] == 1 else packed(padding_mask)
        if layout is not None:
            inputs = layout.put(inputs)

        new_state: EMAState | TruncatedEMAState | None = None
        if isinstance(state, TruncatedEMAState):
            y, new_state = _truncated_segment(kernel, inputs, forward, omega, state, lengths, truncation)
        else:
            hidden = None if state is None else state.hidden.to(dtype)
            y, after = kernel(
                inputs,
                forward,
                mirror,
                omega=omega,
                hidden=hidden,
                lengths=lengths,
                truncation=truncation,
                final=state is not None,
            )
            if after is not None:
                new_state = EMAState(after)
        y = zero_padding(y, padding_mask) if layout is None else layout.back(y)
        y = y.to(x.dtype)
    return y if new_state is None else (y, new_state)


def _check_parameters(channels: int, alpha: Tensor, *others: Tensor | None) -> bool:
    """Raises unless coefficients fit the input; returns whether they are bidirectional."""
    *alike, omega = others
    # Compared one by one: a compiler that knows sizes by name finds none of them in a tuple.
    if alpha.dim() != 2 or (alpha.shape[0] != channels and alpha.shape[0] != 2 * channels):
        raise ValueError(
            f"`alpha` must have shape ({channels}, N), or ({2 * channels}, N) for a bidirectional average, to fit an "
            f"input of width {channels}, but has shape {tuple(alpha.shape)}."
        )
    for name, parameter in zip(("delta", "beta", "eta"), alike, strict=True):
        if parameter is None or parameter.shape != alpha.shape:
            found = None if parameter is None else tuple(parameter.shape)
            raise ValueError(f"`{name}` must have the shape of `alpha`, {tuple(alpha.shape)}, but has {found}.")
    if omega is not None and omega.shape != (channels,):
        raise ValueError(f"`omega` must have shape ({channels},), but has shape {tuple(omega.shape)}.")
    return int(alpha.shape[0]) != channels


def _check_state(state: object, batch: int, embed_dim: int, ema_dim: int, truncation: int | None) -> None:
    """Raises unless the state is one that an average of these sizes makes."""
    owner = "MultiDimensionDampedEMA"
    if truncation is None:
        check_state(state, EMAState, f"{owner} without truncation")
        tensor, expected = state.hidden, (embed_dim, ema_dim)  # type: ignore[attr-defined]
    else:
        check_state(state, TruncatedEMAState, f"{owner} with truncation={truncation}")
        tensor, expected = state.inputs, (truncation, embed_dim)  # type: ignore[attr-defined]
    check_state_shape("state", tensor, expected)
    check_batch("state", tensor.shape[0], batch)


def _truncated_segment(
    kernel: Kernel,
    inputs: Tensor,
    forward: EMACoefficients,
    omega: Tensor | None,
    state: TruncatedEMAState,
    lengths: Tensor | None,
    truncation: int | None,
) -> tuple[Tensor, TruncatedEMAState]:
    remembered = state.inputs.shape[1]
    extended = torch.cat([state.inputs.to(inputs.dtype), inputs], dim=1)
    y, _ = kernel(extended, forward, omega=omega, truncation=truncation)
    if lengths is None:
        last = extended[:, -remembered:].contiguous()
    else:
        index = lengths.unsqueeze(-1) + torch.arange(remembered, device=inputs.device)
        last = extended.gather(1, index.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))
    return y[:, remembered:], TruncatedEMAState(last)
