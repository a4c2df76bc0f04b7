"""The damped EMA, computed in different ways behind one signature, one file each; gates and dropout for the CPU.

Every kernel is a function

    kernel(x, forward, mirror=None, *, omega=None, hidden=None, lengths=None, truncation=None, final=False)
        -> (y, hidden)

that computes, for each row and channel, with N averages,

    h_t = q h_{t-1} + b x_t        y_t = sum_n g h_t + omega x_t        q = 1 - p

from `x` of shape (B, L, D), and adds the same sum run backwards in time with the coefficients `mirror`, where given.
`omega`, (D,), is the weight of the skip connection, none where it is `None`.

* Real tokens stand first in each row: from `lengths` (B,) on, `x` is zero. Outputs there are never looked at.
* `hidden` (B, D, N) is the state before the first token, zeros where it is `None`.
* `truncation=K` keeps lags 0 to K-1 only. It goes with neither `hidden` nor `final`: a truncated average needs no
  state but its last K inputs, which the caller prepends.
* `final=True` returns the state after the last real token of each row, else `None`.

Everything is computed in the dtype of the coefficients, float32 or float64, in which `x` already is.
"""

from typing import NamedTuple, Protocol

from torch import Tensor


class EMACoefficients(NamedTuple):
    """Coefficients of the recurrence for one direction of time, each `(D, N)`, float32 or float64."""

    p: Tensor
    """How much of an average is forgotten in a step, alpha delta."""
    log_q: Tensor
    """The logarithm of what is kept, log(1 - alpha delta), exact where p rounds to 1."""
    b: Tensor
    """Weight of the input, alpha beta."""
    g: Tensor
    """Weight of the average in the output, eta / sqrt(N)."""


class Kernel(Protocol):
    """What computes the average, as said above."""

    def __call__(
        self,
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
        """Runs the kernel."""


__all__ = ["EMACoefficients", "Kernel"]
