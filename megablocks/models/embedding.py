"""Token embeddings and the output that may share their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megablocks._checks import check_flag, check_optional_size, check_size, check_token_ids
from megablocks.functional.padding import zero_padding
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.dropout import SequenceDropout
from megablocks.layers.norm import sequence_norm
from megablocks.layers.parts import reset_parts

if TYPE_CHECKING:
    from typing_extensions import Self


@remembers_arguments
class TokenEmbedding(nn.Module):
    r"""Looks tokens up, scales them, and brings them to the model's width.

    $$x = \mathrm{Norm}(\sqrt{D}\, E_{\text{token}}\, W)$$

    Args:
        vocab_size: Number of tokens.
        embed_dim: Model width $D$.
        input_dim: Width of the table; another width than `embed_dim` adds the projection $W$. `None` for `embed_dim`.
        scale: Whether to multiply by $\sqrt{D}$.
        norm: Name of a norm, or a module, applied at the end; `None` for none.
        dropout: Probability of dropout.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `tokens`: $(B, L)$, int64 or int32; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding.

    Raises:
        ValueError: If a token is outside the vocabulary (said in eager mode on the CPU).

    Example:
        >>> TokenEmbedding(256, 32)(torch.tensor([[72, 105]])).shape
        torch.Size([1, 2, 32])
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        *,
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
        self.input_dim = check_optional_size("input_dim", input_dim, "the width of the model") or embed_dim
        self.scale = math.sqrt(embed_dim) if check_flag("scale", scale) else 1.0
        self.tokens = nn.Embedding(vocab_size, self.input_dim, device=device, dtype=dtype)
        projected = self.input_dim != embed_dim
        self.projection = (
            nn.Linear(self.input_dim, embed_dim, bias=False, device=device, dtype=dtype) if projected else None
        )
        self.norm = sequence_norm(embed_dim, norm, device=device, dtype=dtype)
        self.dropout = SequenceDropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table from a normal distribution with variance 1 over its width, the projection Xavier-uniform."""
        nn.init.normal_(self.tokens.weight, std=self.input_dim**-0.5)
        if self.projection is not None:
            nn.init.xavier_uniform_(self.projection.weight)
        reset_parts(self.norm)

    def forward(self, tokens: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Returns the embedded tokens."""
        check_token_ids("tokens", tokens, self.vocab_size, padding_mask)
        if padding_mask is not None:
            tokens = tokens.masked_fill(padding_mask, 0)
        x = self.tokens(tokens) * self.scale
        if self.projection is not None:
            x = self.projection(x).to(x.dtype)  # as wide as a looked-up token, under autocast too
        if self.norm is not None:
            x = self.norm(x, padding_mask=padding_mask)
        return zero_padding(self.dropout(x), padding_mask)

    if TYPE_CHECKING:
        __call__ = forward


class VocabularyOutput(nn.Linear):
    r"""The linear map to logits, without bias; its weights have variance $1 / D$."""

    def reset_parameters(self) -> None:
        """Draws the weights from a normal distribution with variance 1 over the model width."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)


def vocabulary_output(embed_dim: int, vocab_size: int, embedding: nn.Module | None) -> nn.Linear:
    """Returns the linear map to logits, sharing its weights with an embedding where one is given."""
    output = VocabularyOutput(embed_dim, vocab_size, bias=False)
    if embedding is not None:
        output.weight = _table(embedding, tuple(output.weight.shape), "tie_output")
    return output


class SharedWeights(nn.Module):
    """A module whose parts may share parameters, and go on sharing them wherever they move."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch makes a new parameter in each place of an old one, above all on the way from the meta device.
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for part in self.modules():
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(parameter), []).append((part, name))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for (first, name), *others in places.values():
            for part, other in others:
                setattr(part, other, getattr(first, name))
        return self


def share_table(source: nn.Module, target: nn.Module) -> None:
    """Makes one embedding look tokens up in the table of another."""
    shape = tuple(_table(target, None, "share_embeddings").shape)
    _table(source, shape, "share_embeddings")
    source.tokens.weight = target.tokens.weight  # type: ignore[union-attr]


def created_on(device: torch.device | str | None) -> AbstractContextManager[object]:
    """Returns a context in which modules are created on a device; `None` for wherever they would be."""
    return nullcontext() if device is None else torch.device(device)


def _table(embedding: nn.Module, shape: tuple[int, ...] | None, option: str) -> nn.Parameter:
    table = getattr(getattr(embedding, "tokens", None), "weight", None)
    if isinstance(table, nn.Parameter) and shape in (None, tuple(table.shape)):
        return table
    found = tuple(table.shape) if isinstance(table, nn.Parameter) else f"a {type(embedding).__name__}"
    raise ValueError(
        f"`{option}` needs an embedding with a table `tokens.weight` of shape {shape or '(vocabulary, width)'}, "
        f"but has {found}; use {option}=False."
    )
