"""The damped EMA as a plain loop over time: the oracle of the other kernels, and the single decoding step."""

from __future__ import annotations

import torch
from torch import Tensor

from megablocks.kernels import EMACoefficients


def recurrent(
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
    """Runs the recurrence step by step (see `megablocks.kernels` for the contract)."""
    if truncation is not None:
        y, hidden = _window(x, forward, truncation), None
    else:
        y, hidden = _loop(x, forward, hidden, lengths)
    if mirror is not None:
        reverse = x.flip(1)
        back = _loop(reverse, mirror, None, None)[0] if truncation is None else _window(reverse, mirror, truncation)
        y = y + back.flip(1)
    if omega is not None:
        y = torch.addcmul(y, omega, x)
    return y, hidden if final else None


def _loop(
    x: Tensor, coefficients: EMACoefficients, hidden: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    p, _, b, g = coefficients
    h = x.new_zeros(x.shape[0], *p.shape) if hidden is None else hidden
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        # h + (b x - p h) rather than b x + q h: rounding q to float32 would bend slow decays.
        after = h + torch.addcmul(b * x_t.unsqueeze(-1), p, h, value=-1)
        h = after if lengths is None else torch.where((t < lengths)[:, None, None], after, h)
        outputs.append((h * g).sum(-1))
    return torch.stack(outputs, dim=1), h


def _window(x: Tensor, coefficients: EMACoefficients, truncation: int) -> Tensor:
    _, log_q, b, g = coefficients
    lags = torch.arange(min(truncation, x.shape[1]), device=x.device)
    kernel = ((b * g).unsqueeze(-1) * torch.exp(log_q.unsqueeze(-1) * lags)).sum(1).T  # (lags, D)
    outputs = []
    for t in range(x.shape[1]):
        newest_first = x[:, max(0, t + 1 - truncation) : t + 1].flip(1)
        outputs.append((newest_first * kernel[: newest_first.shape[1]]).sum(1))
    return torch.stack(outputs, dim=1)
