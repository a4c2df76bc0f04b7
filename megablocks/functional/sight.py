"""Attention from queries to the keys that they see, in the way that their number asks for.

* Whole: up to 512 keys the plain product is fastest.
* Fused: torch's `scaled_dot_product_attention` makes no L x S weights. It serves softmax, and a bias that is a product
  of vectors, which are appended to queries and keys. Its values may not be wider than its queries, so wider ones are
  cut, and scores are computed for each cut: on a CPU it is three times faster than the whole with one cut, and not the
  fastest with more; on a GPU it is what makes length affordable.
* In pieces: 512 queries at a time, their weights computed again where gradients are. A causal piece leaves out the keys
  behind it; without gradients, on a CPU, pieces are of 128 queries, and chunks are cut too. It serves every function,
  every bias and dropout.

`docs/benchmarks.md` says what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megablocks._checks import check_kept_shape
from megablocks.functional.attention_function import Attention, softmax
from megablocks.functional.precision import at_least_float32
from megablocks.functional.recomputation import recomputed_inside, remembering_nothing
from megablocks.functional.transforms import plain_only
from megablocks.kernels.blocked import exporting

WHOLE = 512
"""Keys up to which all weights are made at once, and queries of a piece where they are not."""

PIECE = 128
"""Queries of a causal piece where no gradients are asked for, on a CPU: the smaller, the fewer keys behind it."""

FEW = 128
"""Keys up to which the backward pass makes outputs from weights again: the product is small, what it gives is not."""

PositionBias = Callable[[Tensor, Tensor], Tensor]
"""Maps positions of queries (L,) or (B, L) and of keys (S,) or (B, S) to a bias (L, S) or (B, L, S)."""


@runtime_checkable
class FactoredBias(Protocol):
    """A bias that is a product of vectors of queries and vectors of keys."""

    def factors(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (L, R) and (S, R) of any common width R, whose products are the bias."""


class Sight(NamedTuple):
    """What queries see: keys at no later position, where `causal`, that are not hidden."""

    queries: Tensor
    """Positions, (L,) or (B, L); where `causal`, (L,) are consecutive, and each has a key from the first on."""
    keys: Tensor
    """Positions, (S,) or (B, S)."""
    causal: bool
    shown: Tensor | None = None
    """(B, 1, S), bool, `False` at keys that no query sees; `None` for none."""

    def visible(self) -> Tensor | None:
        """Which key each query sees, (L, S), (B, 1, S) or (B, L, S); `None` where all see all."""
        if not self.causal:
            return self.shown
        past = self.keys.unsqueeze(-2) <= self.queries.unsqueeze(-1)
        return past if self.shown is None else past & self.shown

    def piece(self, first: int, last: int) -> Sight:
        """What queries `first` to `last` see."""
        length, end = self.queries.shape[-1], self.keys.shape[-1]
        if self.causal and self.queries.dim() == 1:  # rows of their own may stand anywhere, behind padding too
            end = end - length + min(last, length)
        shown = None if self.shown is None else self.shown[..., :end]
        return Sight(self.queries[..., first:last], self.keys[..., :end], self.causal, shown)


def relative_bias(bias: PositionBias, queries: Tensor, keys: Tensor) -> Tensor:
    """Returns the bias of these positions, (L, S), or (B, L, S) where rows have positions of their own."""
    relative = bias(queries, keys)
    expected = (*max(queries.shape[:-1], keys.shape[:-1], key=len), queries.shape[-1], keys.shape[-1])
    if tuple(relative.shape) not in (expected, expected[-2:]):
        raise ValueError(
            f"A position bias must return shape {expected} for these positions, a number for each query and key, but "
            f"returned shape {tuple(relative.shape)}; there is one head, and no axis for it."
        )
    return relative


def relative_table(bias: PositionBias, positions: int) -> Tensor | None:
    """Returns what `simple_bias` looks a bias up in, from its method `relative_table`, for so many positions.

    `None` if it has none, or one that it inherits from a class whose `forward` it does not share: that is another bias.
    """
    for kind in type(bias).__mro__:
        if callable(vars(kind).get("relative_table")):
            table: Tensor = bias.relative_table(positions)  # type: ignore[attr-defined]
            return _checked_table(table.detach())
        if "forward" in vars(kind):
            break
    return None


def _checked_table(table: Tensor) -> Tensor:
    """Returns what a bias's `relative_table` gave if it holds one number for each relative position."""
    if table.dim() != 1 or table.shape[0] % 2 == 0:
        raise ValueError(
            "`relative_table(positions)` of a position bias must return shape (2 * positions - 1,), a number for each "
            f"relative position, but returned shape {tuple(table.shape)}; `RotaryRelativeBias` shows how."
        )
    return table


def attend_sight(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    sight: Sight,
    *,
    bias: PositionBias | None,
    dropout: Callable[[Tensor], Tensor] | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attends as `attend` does, and makes the weights only where they are needed.

    Args:
        q: Queries, $(B, L, Z)$.
        k: Keys, $(B, S, Z)$.
        v: Values, $(B, S, V)$.
        function: What `attention_function` returns, or what has its members.
        sight: Which queries see which keys.
        bias: Maps positions to the relative bias; one that is a `FactoredBias` is never made.
        dropout: Applied to the weights; `None` where nothing is dropped.
        need_weights: Whether to return the weights.

    Returns:
        The output $(B, L, V)$ and the weights $(B, L, S)$ before dropout, or `None`.
    """
    length, seen = q.shape[1], k.shape[1]
    # Dropout is drawn piece by piece: whether gradients are asked for must not make other pieces.
    size = PIECE if dropout is None and _leaves_keys_out(q, sight) else WHOLE
    if need_weights or any_length(length) or length * seen <= size * WHOLE or plain_only(q, k, v):
        out, weights = _whole(q, k, v, function, sight, bias, dropout)
        return out, weights if need_weights else None
    cuts = _fused_cuts(q, v, function, sight, bias, dropout) if length * seen > WHOLE * WHOLE else 0
    if cuts == 1 or (cuts and (q.is_cuda or torch.compiler.is_compiling())):
        return _fused(q, k, v, sight, bias, cuts), None
    if torch.compiler.is_compiling():  # the number of pieces would make a graph for every length
        return _whole(q, k, v, function, sight, bias, dropout)[0], None
    return _in_pieces(q, k, v, function, sight, bias, dropout, size), None


def any_length(length: int) -> bool:
    """Whether a program is exported that serves lengths of any kind, and so must not choose by them."""
    return exporting() and isinstance(length, torch.SymInt)


def _leaves_keys_out(q: Tensor, sight: Sight) -> bool:
    """Whether small pieces pay: where they are causal, and nothing need be made for a backward pass or a graph."""
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and sight.causal and sight.queries.dim() == 1 and q.device.type == "cpu"


def _whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    sight: Sight,
    bias: PositionBias | None,
    dropout: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    relative = None if bias is None else relative_bias(bias, sight.queries, sight.keys)
    visible = sight.visible()
    if function.weights is softmax and sight.causal and sight.shown is None and visible is not None:
        # Every query sees itself, so that no row is empty: what is not seen may be said by the bias, in one step.
        hidden = torch.zeros_like(visible, dtype=at_least_float32(q.dtype)) if relative is None else relative
        relative, visible = hidden.masked_fill(~visible, -torch.inf), None
    return attend(q, k, v, function, bias=relative, visible=visible, dropout=dropout)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    *,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attends from queries to keys, $O = f(q k^\top / \tau + R)\, v$.

    $\tau$ is $\sqrt Z$ for softmax, and the number of keys that the query sees, at least 1, for the other functions.

    Args:
        q: Queries, $(\dots, L, Z)$.
        k: Keys, $(\dots, S, Z)$.
        v: Values, $(\dots, S, V)$.
        function: What `attention_function` returns, or what has its members.
        bias: $R$, broadcasting to $(\dots, L, S)$. It is not divided.
        visible: Bool, $(\dots, 1, S)$ or $(\dots, L, S)$, `True` where the query sees the key; `None` for everywhere.
        dropout: Applied to the weights.

    Returns:
        The output $(\dots, L, V)$ and the weights before dropout $(\dots, L, S)$. Scores and weights are computed in
        float32 or wider.
    """
    if function.divide_by_keys:
        scores = (q @ k.transpose(-1, -2)).to(at_least_float32(q.dtype))
        if visible is None:
            scores = scores / k.shape[-2]
        else:
            scores = scores / visible.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    elif bias is not None and q.dim() == 3 and q.dtype == bias.dtype:
        relative = bias.expand(*q.shape[:2], k.shape[1])
        scores = torch.baddbmm(relative, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        bias = None
    else:
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).to(at_least_float32(q.dtype))
    if bias is not None:
        scores = scores + bias
    weights = check_kept_shape("attention", function.weights(scores, visible), tuple(scores.shape))
    return apply_weights(weights, v, dropout), weights


def apply_weights(weights: Tensor, v: Tensor, dropout: Callable[[Tensor], Tensor] | None) -> Tensor:
    r"""Returns what weights $(\dots, L, S)$ make of values $(\dots, S, V)$, after dropout where there is any."""
    applied = weights.to(v.dtype)
    if dropout is not None:
        applied = dropout(applied)
    if torch.compiler.is_compiling() or v.shape[-2] > FEW:  # asked in this order: no graph for each side of FEW
        return _product(applied, v)
    return recomputed_inside(_product, applied, v)


def _product(weights: Tensor, v: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and weights.dim() == 3 and weights.shape[1] == 1 and v.device.type == "cpu":
        # As `bmm` a compiler would make sums of it, fused with the softmax: an exponential for every value of a key.
        return torch.baddbmm(v.new_zeros(1, 1, 1).expand(v.shape[0], 1, v.shape[2]), weights, v, beta=0)
    return weights @ v


def _fused_cuts(
    q: Tensor,
    v: Tensor,
    function: Attention,
    sight: Sight,
    bias: PositionBias | None,
    dropout: Callable[[Tensor], Tensor] | None,
) -> int:
    """Cuts of the values that fused attention needs, 0 where it does not give what is asked for."""
    square = sight.queries.dim() == 1 and sight.keys.dim() == 1 and q.shape[1] == sight.keys.shape[0]
    if (
        function.weights is not softmax
        or dropout is not None
        or (sight.causal and (not square or sight.shown is not None))
    ):
        return 0
    width = q.shape[-1]
    if bias is not None:
        # Half precisions would round the factors of a bias that is otherwise computed in float32.
        if not isinstance(bias, FactoredBias) or sight.queries.dim() > 1 or sight.keys.dim() > 1:
            return 0
        if q.dtype != at_least_float32(q.dtype):
            return 0
        width += bias.factors(sight.queries[:1], sight.keys[:1])[0].shape[-1]
    return -(-v.shape[-1] // width)


def _fused(q: Tensor, k: Tensor, v: Tensor, sight: Sight, bias: PositionBias | None, cuts: int) -> Tensor:
    batch, width, scale = q.shape[0], v.shape[-1], q.shape[-1] ** -0.5
    if isinstance(bias, FactoredBias):
        of_queries, of_keys = (
            factor.to(q.dtype).expand(batch, -1, -1) for factor in bias.factors(sight.queries, sight.keys)
        )
        q, k, scale = torch.cat([q * scale, of_queries], -1), torch.cat([k, of_keys], -1), 1.0
    v = rearrange(F.pad(v, (0, cuts * q.shape[-1] - width)), "b s (n v) -> b n s v", n=cuts)
    mask = blind = None
    if sight.shown is not None:
        blind = ~sight.shown.any(-1, keepdim=True)  # rows that show nothing: softmax of nothing is no number
        mask = (sight.shown | blind).unsqueeze(1)
    q, k = (x.unsqueeze(1).expand(-1, cuts, -1, -1) for x in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=sight.causal, scale=scale)
    out = rearrange(out, "b n l v -> b l (n v)")[..., :width]
    return out if blind is None else out.masked_fill(blind, 0.0)


def _in_pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Attention,
    sight: Sight,
    bias: PositionBias | None,
    dropout: Callable[[Tensor], Tensor] | None,
    size: int,
) -> Tensor:
    def attended(sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with remembering_nothing():
            return _whole(q, k, v, function, sight, bias, dropout)[0]

    pieces = []
    for first in range(0, q.shape[1], size):
        seen = sight.piece(first, first + size)
        end = seen.keys.shape[-1]
        given = (seen, q[:, first : first + size], k[:, :end], v[:, :end])
        if torch.is_grad_enabled():
            piece: Tensor = checkpoint(attended, *given, use_reentrant=False, preserve_rng_state=dropout is not None)
        else:
            piece = attended(*given)
        pieces.append(piece)
    return torch.cat(pieces, dim=1)
