"""Adaptive embedding and softmax: rare tokens get narrow vectors, so that a large vocabulary costs little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablocks._checks import (
    check_cutoffs,
    check_features,
    check_flag,
    check_number,
    check_optional_size,
    check_size,
    check_targets,
    check_token_ids,
)
from megablocks.functional.padding import zero_padding
from megablocks.functional.precision import at_least_float32
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.dropout import SequenceDropout
from megablocks.layers.norm import sequence_norm
from megablocks.layers.parts import reset_parts


@remembers_arguments
class AdaptiveEmbedding(nn.Module):
    r"""Looks tokens up in bands of falling width, and brings them all to the model's width.

    The vocabulary, most frequent tokens first, is cut at $c_0 < c_1 < \dots$ into bands. Band $b$ has a table $E_b$ of
    its own, of width $\lfloor W / f^b \rfloor$, at least 1, and a projection $P_b$ to the model's width:

    $$x = \mathrm{Norm}(\sqrt{D}\, E_{b, w - c_{b-1}} P_b^\top), \qquad c_{b-1} \le w < c_b.$$

    Args:
        vocab_size: Number of tokens.
        embed_dim: Model width $D$.
        cutoffs: Where bands end, rising, each below `vocab_size`; the last band ends with the vocabulary.
        factor: $f$, by which each band is narrower than the one before it.
        input_dim: Width $W$ of the first band; `None` for `embed_dim`.
        scale: Whether to multiply by $\sqrt{D}$.
        norm: Name of a norm, or a module, applied at the end; `None` for none.
        dropout: Probability of dropout.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `tokens`: $(B, L)$, int64 or int32; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding.

    Raises:
        ValueError: If cutoffs do not rise or reach beyond the vocabulary, or a token is outside the vocabulary (said
            in eager mode on the CPU).

    Example:
        >>> AdaptiveEmbedding(1000, 32, cutoffs=[100, 400])(torch.tensor([[7, 399, 999]])).shape
        torch.Size([1, 3, 32])

    References:
        Baevski and Auli, "Adaptive Input Representations", [arXiv:1809.10853](https://arxiv.org/abs/1809.10853).
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
        cutoffs: Sequence[int],
        factor: float = 4.0,
        input_dim: int | None = None,
        scale: bool = True,
        norm: str | nn.Module | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = check_size("vocab_size", vocab_size)
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.cutoffs = check_cutoffs("cutoffs", cutoffs, vocab_size)
        self.factor = check_number("factor", factor, minimum=1)
        self.input_dim = check_optional_size("input_dim", input_dim, "the width of the model") or embed_dim
        self.scale = math.sqrt(embed_dim) if check_flag("scale", scale) else 1.0
        self.tables, self.projections = nn.ModuleList(), nn.ModuleList()
        for band, (start, stop) in enumerate(_bands(self.cutoffs, vocab_size)):
            width = _width(self.input_dim, factor, band)
            self.tables.append(nn.Embedding(stop - start, width, device=device, dtype=dtype))
            self.projections.append(nn.Linear(width, embed_dim, bias=False, device=device, dtype=dtype))
        self.norm = sequence_norm(embed_dim, norm, device=device, dtype=dtype)
        self.dropout = SequenceDropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws tables from normal distributions with variance 1 over their width, projections Xavier-uniform."""
        for table in self.tables:
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)  # type: ignore[arg-type,operator]
        _draw(self.projections)
        reset_parts(self.norm)

    def forward(self, tokens: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Returns the embedded tokens."""
        check_token_ids("tokens", tokens, self.vocab_size, padding_mask)
        if padding_mask is not None:
            tokens = tokens.masked_fill(padding_mask, 0)
        bands = _bands(self.cutoffs, self.vocab_size)
        x = torch.zeros((), device=tokens.device)
        # Every band embeds every token, of which its own are kept: shapes do not depend on data, and rows that no
        # token of a band asks for get no gradient.
        for (start, stop), table, projection in zip(bands, self.tables, self.projections, strict=True):
            looked_up = table((tokens - start).clamp(0, stop - start - 1))
            embedded = projection(looked_up).to(looked_up.dtype)  # as wide as a looked-up token, under autocast too
            inside = ((tokens >= start) & (tokens < stop)).unsqueeze(-1)
            x = torch.where(inside, embedded, x.to(embedded.dtype))
        x = x * self.scale
        if self.norm is not None:
            x = self.norm(x, padding_mask=padding_mask)
        return zero_padding(self.dropout(x), padding_mask)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"{self.vocab_size}, {self.embed_dim}, cutoffs={list(self.cutoffs)}, factor={self.factor}"

    if TYPE_CHECKING:
        __call__ = forward


@remembers_arguments
class AdaptiveSoftmax(nn.Module):
    r"""Gives log-probabilities in two steps: of a frequent token or a cluster of rare ones, then within the cluster.

    With the vocabulary cut at $c_0 < c_1 < \dots$, the head scores the first $c_0$ tokens and each cluster; cluster $i$
    scores its own tokens from a projection of width $\lfloor D / f^{i+1} \rfloor$, at least 1:

    $$\log p(w) = \begin{cases} \log\mathrm{softmax}(\text{head})_w & w < c_0 \\
    \log\mathrm{softmax}(\text{head})_{c_0 + i} + \log\mathrm{softmax}(\text{tail}_i)_{w - c_i} & c_i \le w < c_{i+1}
    \end{cases}$$

    Args:
        embed_dim: Model width $D$.
        vocab_size: Number of tokens.
        cutoffs: Where head and clusters end, rising, each below `vocab_size`; the last ends with the vocabulary.
        factor: $f$, by which each cluster is narrower than what comes before it.
        embedding: An `AdaptiveEmbedding` with the same cutoffs, whose tables score the tokens; `None` for weights of
            its own.
        tie_projections: Whether the embedding's projections, transposed, serve the clusters too.
        dropout: Probability of dropout on the input of `target_log_probs` and within clusters.
        device: Where to create the parameters.
        dtype: Parameter dtype. Log-probabilities are computed in float32 or wider.

    Shape:
        - `x`: $(\dots, D)$; output: $(\dots, \text{vocab})$, log-probabilities in the dtype of `x`.
        - `targets`, of `target_log_probs`: $(\dots)$, int64; output: $(\dots)$.

    Raises:
        ValueError: If cutoffs do not rise or reach beyond the vocabulary, or the embedding has others.
        TypeError: If the embedding is no `AdaptiveEmbedding`.

    Example:
        >>> embedding = AdaptiveEmbedding(1000, 32, cutoffs=[100, 400])
        >>> softmax = AdaptiveSoftmax(32, 1000, cutoffs=[100, 400], embedding=embedding, tie_projections=True)
        >>> x, targets = torch.randn(2, 5, 32), torch.randint(1000, (2, 5))
        >>> log_probs = softmax(x)
        >>> torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 5))
        >>> picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        >>> torch.testing.assert_close(softmax.target_log_probs(x, targets), picked)   # without the other tokens

    References:
        Grave et al., "Efficient softmax approximation for GPUs",
        [arXiv:1609.04309](https://arxiv.org/abs/1609.04309); tied as in Baevski and Auli,
        [arXiv:1809.10853](https://arxiv.org/abs/1809.10853).
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        cutoffs: Sequence[int],
        factor: float = 4.0,
        embedding: AdaptiveEmbedding | None = None,
        tie_projections: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.vocab_size = check_size("vocab_size", vocab_size)
        self.cutoffs = check_cutoffs("cutoffs", cutoffs, vocab_size)
        self.factor = check_number("factor", factor, minimum=1)
        self.tie_projections = check_flag("tie_projections", tie_projections)
        self.dropout = SequenceDropout(dropout)
        self._check_embedding(embedding)
        # In a tuple: its tables are weights of this module, the embedding is not a part of it.
        self._embedding = None if embedding is None else (embedding,)

        made_as = {"device": device, "dtype": dtype}
        if embedding is None:
            self.head, tail = _own_parts(embed_dim, _bands(self.cutoffs, vocab_size), factor, made_as)
        else:
            self.head, tail = _tied_parts(embedding, tie_projections, made_as)
        self.tail = nn.ModuleList(
            nn.Sequential(projection, SequenceDropout(dropout), words) for projection, words in tail
        )
        self.reset_parameters()

    @property
    def embedding(self) -> AdaptiveEmbedding | None:
        """The embedding whose weights this module shares, `None` if all are its own."""
        return None if self._embedding is None else self._embedding[0]

    def reset_parameters(self) -> None:
        """Draws all weights that are not the embedding's Xavier-uniform."""
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the log-probabilities of all tokens."""
        check_features("x", x, self.embed_dim)
        head = _log_softmax(self.head(x))
        first = self.cutoffs[0]
        parts = [head[..., :first]]
        for index, cluster in enumerate(self.tail):
            parts.append(_log_softmax(cluster(x)) + head[..., first + index, None])
        return torch.cat(parts, dim=-1).to(x.dtype)

    def target_log_probs(self, x: Tensor, targets: Tensor) -> Tensor:
        """Returns the log-probability of one token for each position; a cluster is computed where it is asked for."""
        check_features("x", x, self.embed_dim)
        check_targets("targets", targets, tuple(x.shape[:-1]), self.vocab_size)
        flat, wanted = self.dropout(x).reshape(-1, self.embed_dim), targets.reshape(-1).long()
        first = self.cutoffs[0]
        cluster_of = torch.bucketize(wanted, wanted.new_tensor(self.cutoffs), right=True)
        column = torch.where(wanted < first, wanted, first - 1 + cluster_of)
        found = _log_softmax(self.head(flat)).gather(1, column.unsqueeze(1)).squeeze(1)
        for index, (cluster, start) in enumerate(zip(self.tail, self.cutoffs, strict=True)):
            rows = (cluster_of == index + 1).nonzero().squeeze(1)
            inside = _log_softmax(cluster(flat[rows])).gather(1, (wanted[rows] - start).unsqueeze(1))
            found = found.index_add(0, rows, inside.squeeze(1))
        return found.reshape(targets.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        tied = f", tie_projections={self.tie_projections}" if self._embedding else ""
        return f"{self.embed_dim}, {self.vocab_size}, cutoffs={list(self.cutoffs)}, factor={self.factor}{tied}"

    def _check_embedding(self, embedding: object) -> None:
        if embedding is None:
            if self.tie_projections:
                raise ValueError("`tie_projections` needs the `embedding` whose projections are shared, but got none.")
            return
        if not isinstance(embedding, AdaptiveEmbedding):
            raise TypeError(f"`embedding` must be an AdaptiveEmbedding, but is a {type(embedding).__name__}.")
        ours = (self.embed_dim, self.vocab_size, self.cutoffs)
        theirs = (embedding.embed_dim, embedding.vocab_size, embedding.cutoffs)
        if ours != theirs:
            raise ValueError(
                "`embedding` must have the width, vocabulary and cutoffs of the softmax that shares its tables, "
                f"{ours}, but has {theirs}."
            )

    if TYPE_CHECKING:
        __call__ = forward


class SharedLinear(nn.Module):
    """A linear map without bias by the weights of another module, as they are or transposed."""

    def __init__(self, weight: nn.Parameter, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.transposed = transposed

    def reset_parameters(self) -> None:
        """Leaves the weights to the module that they belong to, which draws them."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mapped vectors."""
        return F.linear(x, self.weight.T if self.transposed else self.weight)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"{tuple(self.weight.shape)}, transposed={self.transposed}"


class TiedHead(nn.Module):
    """Scores frequent tokens by the first table of an embedding, and clusters by weights of its own."""

    def __init__(self, words: nn.Module, clusters: nn.Module) -> None:
        super().__init__()
        self.words = words
        self.clusters = clusters

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores, tokens first."""
        return torch.cat([self.words(x), self.clusters(x)], dim=-1)


Cluster = tuple[nn.Module, nn.Module]
"""What brings a vector to a cluster's width, and what scores the cluster's tokens."""


def _own_parts(
    embed_dim: int, bands: list[tuple[int, int]], factor: float, made_as: dict[str, Any]
) -> tuple[nn.Module, list[Cluster]]:
    """Head and clusters with weights of their own."""
    (_, first), *rest = bands
    tail: list[Cluster] = []
    for index, (start, stop) in enumerate(rest, 1):
        width = _width(embed_dim, factor, index)
        projection = nn.Linear(embed_dim, width, bias=False, **made_as)
        tail.append((projection, nn.Linear(width, stop - start, bias=False, **made_as)))
    return nn.Linear(embed_dim, first + len(rest), bias=False, **made_as), tail


def _tied_parts(
    embedding: AdaptiveEmbedding, tie_projections: bool, made_as: dict[str, Any]
) -> tuple[nn.Module, list[Cluster]]:
    """Head and clusters that score tokens by the tables of an embedding."""
    tables: list[nn.Parameter] = [table.weight for table in embedding.tables]  # type: ignore[misc]
    projections: list[nn.Parameter] = [part.weight for part in embedding.projections]  # type: ignore[misc]
    width, (words, *others) = embedding.embed_dim, [SharedLinear(table) for table in tables]
    tail: list[Cluster] = []
    for shared, table, scores in zip(projections[1:], tables[1:], others, strict=True):
        own = not tie_projections
        bring = (
            nn.Linear(width, table.shape[1], bias=False, **made_as) if own else SharedLinear(shared, transposed=True)
        )
        tail.append((bring, scores))
    head: nn.Module = words
    if embedding.input_dim != width:
        head = nn.Sequential(nn.Linear(width, embedding.input_dim, bias=False, **made_as), words)
    return TiedHead(head, nn.Linear(width, len(others), bias=False, **made_as)), tail


def _bands(cutoffs: Sequence[int], vocab_size: int) -> list[tuple[int, int]]:
    """First token of each band, and the one after its last."""
    return list(pairwise([0, *cutoffs, vocab_size]))


def _width(widest: int, factor: float, band: int) -> int:
    return max(1, int(widest // factor**band))


def _draw(part: nn.Module) -> None:
    """Draws the weights of all linear maps Xavier-uniform."""
    for linear in part.modules():
        if isinstance(linear, nn.Linear):
            nn.init.xavier_uniform_(linear.weight)


def _log_softmax(scores: Tensor) -> Tensor:
    return F.log_softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype))
