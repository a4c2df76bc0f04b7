"""The sequence-to-sequence model: encoder, decoder with cross-attention, logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_flag,
    check_module,
    check_optional_size,
    check_padding_mask,
    check_probability,
    check_size,
    check_streaming_part,
    check_tensor,
    check_trace,
    check_width,
)
from megablocks.layers import Trace
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.cross_attention import check_one_memory
from megablocks.layers.gated_attention import refuse_future
from megablocks.layers.trace import Shown, call_for_last, results
from megablocks.models.embedding import SharedWeights, TokenEmbedding, created_on, share_table, vocabulary_output
from megablocks.models.language_model import output_logits
from megablocks.stacks import MegaDecoder, MegaEncoder
from megablocks.stacks.stack import set_chunk_size
from megablocks.state import DecoderState


@remembers_arguments
class MegaSeq2Seq(SharedWeights):
    r"""Turns one sequence into another: the encoder reads the source, the decoder predicts the target token by token.

    Args:
        encoder: A `MegaEncoder`.
        decoder: A `MegaDecoder` with cross-attention, of the encoder's width.
        source_vocab_size: Number of source tokens.
        target_vocab_size: Number of target tokens; `None` for the source's.
        share_embeddings: Whether source and target share one table; they then have one vocabulary. Norms and
            projections behind it stay their own.
        target_input_dim: Width of the target's embedding table, projected to the model's; `None` for the model's.
        scale_embedding: Whether to multiply embeddings by the square root of the model width.
        embedding_norm: Name of a norm behind each embedding; `None` for none.
        embedding_dropout: Probability of dropout on the embedded tokens.
        tie_output: Whether the output shares the target embedding's weights.
        source_embedding: A module of your own, called as `embedding(tokens, padding_mask=...)`.
        target_embedding: Likewise for the target.
        output: A module of your own from `(B, L, D)` to `(B, L, vocab)`, in place of the linear map without bias.
        device: Where to create the parameters besides those of encoder and decoder.
        dtype: Their dtype.

    Shape:
        - `source`: $(B, M)$, `target`: $(B, L)$, int64 or int32; the target is what the decoder reads, shifted by one
          against what it should predict.
        - `source_padding_mask`: $(B, M)$, `target_padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: logits $(B, L, \text{vocab})$, zeros at padding; with `last_only=True` those of each row's last
          real token alone; with a state, and then without source, `(logits, new_state)`; with `trace=True` the
          decoder's `Trace` stands second, with `trace="hidden_states"` one without attention weights.

    Raises:
        ValueError: If source and state are both given or both missing, if a token is outside its vocabulary, or if
            weights cannot be shared.
        TypeError: If tokens are not integers, or a mask is not bool.

    Example:
        >>> encoder = mega_encoder(2, 32, qk_dim=16)
        >>> decoder = mega_decoder(2, 32, qk_dim=16, cross_attention=True)
        >>> model = MegaSeq2Seq(encoder, decoder, source_vocab_size=100).eval()
        >>> source, target = torch.randint(100, (2, 7)), torch.randint(100, (2, 5))
        >>> logits = model(source, target)
        >>> state = model.init_state(source)      # encodes the source once
        >>> first, state = model(target=target[:, :2], state=state)
        >>> rest, state = model(target=target[:, 2:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), logits)

    References:
        Ma et al., section 4.4, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        encoder: MegaEncoder,
        decoder: MegaDecoder,
        *,
        source_vocab_size: int,
        target_vocab_size: int | None = None,
        share_embeddings: bool = False,
        target_input_dim: int | None = None,
        scale_embedding: bool = True,
        embedding_norm: str | None = None,
        embedding_dropout: float = 0.0,
        tie_output: bool = False,
        source_embedding: nn.Module | None = None,
        target_embedding: nn.Module | None = None,
        output: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_module("encoder", encoder, "a MegaEncoder")
        check_streaming_part("decoder", decoder, "a MegaDecoder")
        check_size("source_vocab_size", source_vocab_size)
        check_flag("tie_output", tie_output)
        check_flag("scale_embedding", scale_embedding)
        check_probability("embedding_dropout", embedding_dropout)
        same = "the source's vocabulary"
        target_size = check_optional_size("target_vocab_size", target_vocab_size, same) or source_vocab_size
        self.vocab_size = target_size
        self._check_parts(encoder, decoder)
        if check_flag("share_embeddings", share_embeddings) and target_size != source_vocab_size:
            raise ValueError(
                f"`share_embeddings` needs one vocabulary, but the source's has {source_vocab_size} tokens and the "
                f"target's {target_size}."
            )

        def embedding(size: int, width: int | None) -> TokenEmbedding:
            return TokenEmbedding(
                size,
                decoder.embed_dim,
                input_dim=width,
                scale=scale_embedding,
                norm=embedding_norm,
                dropout=embedding_dropout,
            )

        with created_on(device):
            if source_embedding is None:
                source_embedding = embedding(source_vocab_size, target_input_dim if share_embeddings else None)
            if target_embedding is None:
                target_embedding = embedding(target_size, target_input_dim)
            check_width("source_embedding", source_embedding, decoder.embed_dim)
            check_width("target_embedding", target_embedding, decoder.embed_dim)
            if share_embeddings:
                share_table(source_embedding, target_embedding)
            if output is None:
                tied = target_embedding if tie_output else None
                output = vocabulary_output(decoder.embed_dim, target_size, tied)
        self.source_embedding = source_embedding.to(dtype=dtype)
        self.target_embedding = target_embedding.to(dtype=dtype)
        self.encoder = encoder
        self.decoder = decoder
        self.output = output.to(dtype=dtype)
        for part in (self.target_embedding, self.decoder, self.output):
            refuse_future(part)

    @staticmethod
    def _check_parts(encoder: MegaEncoder, decoder: MegaDecoder) -> None:
        if not getattr(decoder, "takes_memory", True):
            raise ValueError(
                "A MegaSeq2Seq needs a decoder with cross-attention, but this one has none; "
                "build it with mega_decoder(..., cross_attention=True)."
            )
        if encoder.embed_dim != decoder.embed_dim:
            raise ValueError(
                f"Encoder and decoder must have the same width, but have {encoder.embed_dim} and {decoder.embed_dim}."
            )

    def encode(self, source: Tensor, source_padding_mask: Tensor | None = None) -> Tensor:
        """Returns the memory of a source, $(B, M, D)$."""
        check_tensor("source", source, 2)
        check_padding_mask("source_padding_mask", source_padding_mask, (source.shape[0], source.shape[1]))
        x = self.source_embedding(source, padding_mask=source_padding_mask)
        memory: Tensor = self.encoder(x, padding_mask=source_padding_mask)
        return memory

    def init_state(
        self, source: Tensor, source_padding_mask: Tensor | None = None, *, capacity: int | None = None
    ) -> DecoderState:
        """Encodes a source and returns the decoder's state before the first target token.

        Args:
            source: $(B, M)$, token ids.
            source_padding_mask: $(B, M)$, bool, `True` at padding.
            capacity: Without chunks, the most target tokens that the state will ever hold, in tensors of fixed shape.
        """
        memory = self.encode(source, source_padding_mask)
        return self.decoder.init_state(source.shape[0], memory, source_padding_mask, capacity=capacity)

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Sets the chunk length of every layer that has one; `None` for no chunks. States stay with theirs."""
        set_chunk_size(self, chunk_size)

    @overload
    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Shown,
    ) -> tuple[Tensor, Trace]: ...
    @overload
    def forward(
        self,
        *,
        target: Tensor,
        target_padding_mask: Tensor | None = None,
        state: DecoderState,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> tuple[Tensor, DecoderState]: ...
    @overload
    def forward(
        self,
        *,
        target: Tensor,
        target_padding_mask: Tensor | None = None,
        state: DecoderState,
        last_only: bool = False,
        trace: Shown,
    ) -> tuple[Tensor, Trace, DecoderState]: ...
    def forward(
        self,
        source: Tensor | None = None,
        target: Tensor | None = None,
        *,
        source_padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        state: DecoderState | None = None,
        last_only: bool = False,
        trace: Shown | bool = False,
    ) -> Any:
        """Returns the logits; see the class for what `state`, `last_only` and `trace` change."""
        if target is None:
            raise ValueError("MegaSeq2Seq needs `target`, the tokens that the decoder reads, but got none.")
        check_tensor("target", target, 2)
        check_padding_mask("target_padding_mask", target_padding_mask, (target.shape[0], target.shape[1]))
        check_one_memory(source, source_padding_mask, state, name="source")
        check_trace(trace)
        x = self.target_embedding(target, padding_mask=target_padding_mask)
        given: dict[str, Any] = {"last_only": last_only, "padding_mask": target_padding_mask}
        if source is not None:
            check_tensor("source", source, 2)
            check_batch("source", source.shape[0], target.shape[0])
            given["memory"] = self.encode(source, source_padding_mask)
            given["memory_padding_mask"] = source_padding_mask
        x, seen, new_state = call_for_last(self.decoder, x, state, trace, **given)
        return results(output_logits(self.output, x, target_padding_mask, last_only, self.vocab_size), seen, new_state)

    if TYPE_CHECKING:
        __call__ = forward
