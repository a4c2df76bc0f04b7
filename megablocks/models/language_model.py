"""The language model: a causal decoder between an embedding and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_flag,
    check_probability,
    check_size,
    check_streaming_part,
    check_trace,
    check_width,
)
from megablocks.functional.padding import last_padding, zero_padding
from megablocks.layers import Trace
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.gated_attention import refuse_future
from megablocks.layers.trace import Shown, call_for_last, results
from megablocks.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from megablocks.models.embedding import SharedWeights, TokenEmbedding, created_on, vocabulary_output
from megablocks.stacks import MegaDecoder
from megablocks.stacks.stack import set_chunk_size
from megablocks.state import DecoderState


@remembers_arguments
class MegaLanguageModel(SharedWeights):
    r"""Predicts the next token: embedding, causal decoder, logits.

    Args:
        decoder: A `MegaDecoder` without cross-attention.
        vocab_size: Number of tokens.
        input_dim: Width of the embedding table, projected to the decoder's; `None` for the decoder's.
        scale_embedding: Whether to multiply embeddings by the square root of the model width.
        embedding_norm: Name of a norm, or a module, behind the embedding; `None` for none.
        embedding_dropout: Probability of dropout on the embedded tokens.
        tie_output: Whether the output shares the embedding's weights.
        adaptive_cutoffs: Token ids, rising, that cut a large vocabulary into bands of falling width: the embedding is
            then an `AdaptiveEmbedding` and the output an `AdaptiveSoftmax`, which with `tie_output` share tables and
            projections. `None` for one table.
        adaptive_factor: By which each band is narrower than the one before it.
        embedding: A module of your own, called as `embedding(tokens, padding_mask=...)`, in place of the options above.
        output: A module of your own from `(B, L, D)` to `(B, L, vocab)`, in place of the linear map without bias.
        device: Where to create the parameters besides the decoder's.
        dtype: Their dtype.

    Shape:
        - `tokens`: $(B, L)$, int64 or int32; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: logits $(B, L, \text{vocab})$, log-probabilities with an adaptive output, zeros at padding; with
          `last_only=True` those of each row's last real token alone, $(B, 1, \text{vocab})$; with a state
          `(logits, new_state)`; with `trace=True` a `Trace` stands second, with `trace="hidden_states"` one without
          attention weights.

    Raises:
        ValueError: If a token is outside the vocabulary, or weights cannot be shared.
        TypeError: If tokens are not integers, or `padding_mask` is not bool.

    Example:
        >>> model = MegaLanguageModel(mega_decoder(2, 32, qk_dim=16, chunk_size=8), vocab_size=256).eval()
        >>> tokens = torch.tensor([list(b"To be, or not to be")])
        >>> logits = model(tokens)
        >>> state = model.init_state(1)
        >>> first, state = model(tokens[:, :5], state=state)
        >>> rest, state = model(tokens[:, 5:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), logits)

    References:
        Ma et al., sections 3.3 and 4.3, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        decoder: MegaDecoder,
        vocab_size: int,
        *,
        input_dim: int | None = None,
        scale_embedding: bool = True,
        embedding_norm: str | nn.Module | None = None,
        embedding_dropout: float = 0.0,
        tie_output: bool = True,
        adaptive_cutoffs: Sequence[int] | None = None,
        adaptive_factor: float = 4.0,
        embedding: nn.Module | None = None,
        output: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_streaming_part("decoder", decoder, "a MegaDecoder")
        if getattr(decoder, "takes_memory", False):
            raise ValueError(
                "A MegaLanguageModel needs a decoder without cross-attention, but this one attends to a memory; "
                "use MegaSeq2Seq."
            )
        check_flag("tie_output", tie_output)
        check_flag("scale_embedding", scale_embedding)
        check_probability("embedding_dropout", embedding_dropout)
        self.vocab_size = check_size("vocab_size", vocab_size)
        with created_on(device):
            bands: dict[str, Any] = {"cutoffs": adaptive_cutoffs, "factor": adaptive_factor}
            if embedding is None:
                options: dict[str, Any] = {
                    "input_dim": input_dim,
                    "scale": scale_embedding,
                    "norm": embedding_norm,
                    "dropout": embedding_dropout,
                }
                if adaptive_cutoffs is None:
                    embedding = TokenEmbedding(vocab_size, decoder.embed_dim, **options)
                else:
                    embedding = AdaptiveEmbedding(vocab_size, decoder.embed_dim, **bands, **options)
            check_width("embedding", embedding, decoder.embed_dim)
            if output is None and adaptive_cutoffs is not None:
                shared: dict[str, Any] = {"embedding": embedding, "tie_projections": True} if tie_output else {}
                output = AdaptiveSoftmax(decoder.embed_dim, vocab_size, **bands, **shared)
            elif output is None:
                output = vocabulary_output(decoder.embed_dim, vocab_size, embedding if tie_output else None)
        self.embedding = embedding.to(dtype=dtype)
        self.decoder = decoder
        self.output = output.to(dtype=dtype)
        refuse_future(self)

    def init_state(self, batch_size: int, *, capacity: int | None = None) -> DecoderState:
        """Returns the state before the first token; see `MegaDecoder.init_state` for `capacity`."""
        return self.decoder.init_state(batch_size, capacity=capacity)

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Sets the chunk length of every layer that has one; `None` for no chunks. States stay with theirs."""
        set_chunk_size(self, chunk_size)

    @overload
    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Shown,
    ) -> tuple[Tensor, Trace]: ...
    @overload
    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderState,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> tuple[Tensor, DecoderState]: ...
    @overload
    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderState,
        last_only: bool = False,
        trace: Shown,
    ) -> tuple[Tensor, Trace, DecoderState]: ...
    def forward(
        self,
        tokens: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderState | None = None,
        last_only: bool = False,
        trace: Shown | bool = False,
    ) -> Any:
        """Returns the logits; see the class for what `state`, `last_only` and `trace` change."""
        check_trace(trace)
        x = self.embedding(tokens, padding_mask=padding_mask)
        x, seen, new_state = call_for_last(
            self.decoder, x, state, trace, last_only=last_only, padding_mask=padding_mask
        )
        logits = output_logits(self.output, x, padding_mask, last_only, self.vocab_size)
        return results(logits, seen, new_state)

    if TYPE_CHECKING:
        __call__ = forward


def output_logits(
    output: nn.Module, x: Tensor, padding_mask: Tensor | None, last_only: bool, vocab_size: int
) -> Tensor:
    """Maps the decoder's output, of all positions or of the last real one of each row, to logits."""
    logits: Tensor = output(x)
    if tuple(logits.shape) != (*x.shape[:2], vocab_size):
        raise ValueError(
            f"`output` must give one logit for each of `vocab_size`={vocab_size} tokens at each position, "
            f"{(*x.shape[:2], vocab_size)}, but gave {tuple(logits.shape)}."
        )
    return zero_padding(logits, last_padding(padding_mask) if last_only else padding_mask)
