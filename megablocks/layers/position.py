"""Relative position biases as layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megablocks._checks import check_even, check_positions, check_size, check_table, values_readable
from megablocks.functional.position import rotary_bias, rotate, simple_bias
from megablocks.functional.precision import without_autocast
from megablocks.layers.arguments import remembers_arguments


@remembers_arguments
class SimpleRelativeBias(nn.Module):
    r"""Learns one bias for each relative position, $R_{ij} = w_{P - 1 + j - i}$.

    Args:
        max_positions: $P$, the most positions that it serves. With chunks only positions within a chunk count, so one
            table serves every chunk size up to $P$.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `weight`: $(2P - 1,)$; entry $P - 1$ belongs to a token's own position, later keys follow it.
        - `query`, `key`: a number of positions, or the positions themselves as integers, $(L,)$ or $(B, L)$.
        - output: $(L, S)$ or $(B, L, S)$.

    Raises:
        ValueError: If two positions lie further apart than the table reaches (said in eager mode on the CPU; elsewhere
            the outermost entries stand in). Layers count the slots of a call, padding included, and say so everywhere.

    Example:
        >>> bias = SimpleRelativeBias(8)
        >>> whole = bias(6)                         # queries 0..5, keys 0..5
        >>> last = bias(1, 6, query_offset=5)       # query 5, keys 0..5
        >>> bool((whole[5:] == last).all())
        True

    References:
        Ma et al., section 3.2, equation 11, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self, max_positions: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.max_positions = check_size("max_positions", max_positions)
        self.weight = nn.Parameter(torch.empty(2 * max_positions - 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table from a normal distribution with standard deviation 0.02."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, query: int | Tensor, key: int | Tensor | None = None, *, query_offset: int | Tensor = 0
    ) -> Tensor:
        """Returns the bias of queries, shifted by `query_offset`, for keys; without `key`, at the unshifted queries."""
        queries, keys = _positions(query, key, query_offset, self.weight.device)
        if values_readable(queries, keys):
            furthest = max(int(keys.max() - queries.min()), int(queries.max() - keys.min()))
            check_table(furthest + 1, self.max_positions)
        return simple_bias(self.weight, queries, keys)

    def relative_table(self, positions: int) -> Tensor:
        """Returns the bias of relative positions from $-(P - 1)$ to $P - 1$, for $P$ positions or all it serves."""
        return _by_relative_position(self, min(positions, self.max_positions), self.weight.device)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"max_positions={self.max_positions}"

    if TYPE_CHECKING:
        __call__ = forward


@remembers_arguments
class RotaryRelativeBias(nn.Module):
    r"""Learns a bias from two vectors turned by their positions; any length, two vectors of parameters.

    $$R_{ij} = \langle \mathrm{rot}_i\, \alpha,\; \mathrm{rot}_j\, \beta \rangle$$

    where $\mathrm{rot}_i$ turns components $k$ and $k + Z/2$ by the angle $i\, 10000^{-2k/Z}$. The bias depends on
    $i - j$ alone.

    Args:
        qk_dim: $Z$, even.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `alpha`, `beta`: $(Z,)$.
        - `query`, `key`: a number of positions, or the positions themselves as integers, $(L,)$ or $(B, L)$.
        - output: $(L, S)$ or $(B, L, S)$, float32 or wider.

    Raises:
        ValueError: If `qk_dim` is odd.

    Note:
        Angles are computed in float64 at each call, so they are right at any position and in any precision.

    Example:
        >>> bias = RotaryRelativeBias(16)
        >>> whole = bias(10_000)
        >>> torch.testing.assert_close(whole[9_999:], bias(1, 10_000, query_offset=9_999))

    References:
        Su et al., "RoFormer", [arXiv:2104.09864](https://arxiv.org/abs/2104.09864), in the form that Ma et al. use,
        section 3.2, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self, qk_dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_even("qk_dim", check_size("qk_dim", qk_dim), "a rotary bias")
        self.alpha = nn.Parameter(torch.empty(qk_dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(qk_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws both vectors from a normal distribution with standard deviation 0.02."""
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def forward(
        self, query: int | Tensor, key: int | Tensor | None = None, *, query_offset: int | Tensor = 0
    ) -> Tensor:
        """Returns the bias of queries, shifted by `query_offset`, for keys; without `key`, at the unshifted queries."""
        return rotary_bias(self.alpha, self.beta, *_positions(query, key, query_offset, self.alpha.device))

    def factors(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Returns vectors whose products are the bias, so that attention need not make it: `(L, Z)` and `(S, Z)`."""
        with without_autocast(self.alpha):
            return rotate(self.alpha, queries), rotate(self.beta, keys)

    def relative_table(self, positions: int) -> Tensor:
        """Returns the bias of relative positions from $-(P - 1)$ to $P - 1$, for $P$ positions."""
        return _by_relative_position(self, positions, self.alpha.device)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"qk_dim={self.alpha.shape[0]}"

    if TYPE_CHECKING:
        __call__ = forward


def _by_relative_position(bias: SimpleRelativeBias | RotaryRelativeBias, count: int, device: torch.device) -> Tensor:
    """The bias of the last query for keys up to it, and of the first for keys behind it, (2P - 1,)."""
    positions = torch.arange(count, device=device)
    before, behind = bias(positions[-1:], positions), bias(positions[:1], positions)
    return torch.cat([before, behind[:, 1:]], dim=1).squeeze(0)


def _positions(
    query: int | Tensor, key: int | Tensor | None, query_offset: int | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of queries and keys; an offset of shape (B,) gives each row its own."""
    check_positions("query", query)
    check_positions("key", 1 if key is None else key)
    offset = query_offset.unsqueeze(-1) if isinstance(query_offset, Tensor) else query_offset
    queries = torch.arange(query, device=device) if isinstance(query, int) else query
    keys = queries if key is None else torch.arange(key, device=device) if isinstance(key, int) else key
    return queries + offset, keys
