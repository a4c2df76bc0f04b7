"""Dropout of single values, or of whole channels over time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megablocks._checks import check_flag, check_probability
from megablocks.functional.dropout import dropout


class SequenceDropout(nn.Module):
    r"""Zeroes values of a sequence at random in training and scales the others by $1 / (1 - p)$.

    Args:
        p: Probability of zero, in [0, 1).
        channels: If `True`, one draw serves a channel of a row at all its positions (feature dropout).
        name: What the argument that `p` comes from is called, for errors.

    Shape:
        - `x`: $(B, L, D)$; output: the same.
    """

    def __init__(self, p: float, *, channels: bool = False, name: str = "dropout") -> None:
        super().__init__()
        self.p = check_probability(name, p)
        self.channels = check_flag("feature_dropout", channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` with values, or channels, dropped."""
        if not self.training or self.p == 0.0:
            return x
        if self.channels:
            return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)
        return dropout(x, self.p)

    def or_none(self) -> SequenceDropout | None:
        """Returns the module where it drops anything now, else `None`."""
        return self if self.training and self.p > 0.0 else None

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"p={self.p}, channels={self.channels}"
