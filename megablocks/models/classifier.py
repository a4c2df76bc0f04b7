"""The classifier: an encoder, pooled, under a small head; for one sequence or a pair."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_flag,
    check_input,
    check_module,
    check_optional_size,
    check_padding_mask,
    check_probability,
    check_size,
    check_tensor,
    check_trace,
    check_width,
    lookup,
)
from megablocks.functional.activation import activation_function
from megablocks.functional.padding import zero_padding
from megablocks.functional.precision import at_least_float32
from megablocks.layers import Trace
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.dropout import SequenceDropout
from megablocks.layers.norm import sequence_norm
from megablocks.layers.parts import reset_parts
from megablocks.layers.trace import Shown, call_for
from megablocks.models.embedding import TokenEmbedding, created_on
from megablocks.stacks import MegaEncoder
from megablocks.stacks.stack import set_chunk_size


@remembers_arguments
class ContinuousEmbedding(nn.Module):
    r"""Brings continuous values, such as pixels or samples of sound, to the model's width by a linear map.

    Args:
        input_dim: Values per position.
        embed_dim: Model width $D$.
        norm: Name of a norm, or a module, applied at the end; `None` for none.
        dropout: Probability of dropout.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `inputs`: $(B, L, \text{input})$, or $(B, L)$ for one value per position.
        - `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding.

    Example:
        >>> ContinuousEmbedding(1, 32)(torch.rand(2, 784)).shape
        torch.Size([2, 784, 32])
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int,
        *,
        norm: str | nn.Module | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_dim = check_size("input_dim", input_dim)
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.projection = nn.Linear(input_dim, embed_dim, device=device, dtype=dtype)
        self.norm = sequence_norm(embed_dim, norm, device=device, dtype=dtype)
        self.dropout = SequenceDropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights with standard deviation 1 over the square root of the input's width, biases with 0.1."""
        nn.init.normal_(self.projection.weight, std=self.input_dim**-0.5)
        nn.init.normal_(self.projection.bias, std=0.1)
        reset_parts(self.norm)

    def forward(self, inputs: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Returns the embedded values."""
        if isinstance(inputs, Tensor) and inputs.dim() == 2 and self.input_dim == 1:
            inputs = inputs.unsqueeze(-1)
        check_input("inputs", inputs, self.input_dim)
        check_padding_mask("padding_mask", padding_mask, (inputs.shape[0], inputs.shape[1]))
        x = self.projection(zero_padding(inputs, padding_mask)).to(inputs.dtype)  # as wide, under autocast too
        if self.norm is not None:
            x = self.norm(x, padding_mask=padding_mask)
        return zero_padding(self.dropout(x), padding_mask)

    if TYPE_CHECKING:
        __call__ = forward


def _mean(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Mean over real positions; zeros for a row of padding."""
    if padding_mask is None:
        return x.mean(1)
    count = (~padding_mask).sum(1, keepdim=True).clamp(min=1)
    # Summed widely: in half precision a long row would overflow.
    total = zero_padding(x, padding_mask).sum(1, dtype=at_least_float32(x.dtype))
    return (total / count).to(x.dtype)


def _first(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The first real position; zeros for a row of padding."""
    if padding_mask is None:
        return x[:, 0]
    first = padding_mask.to(torch.uint8).argmin(1)
    picked = x.gather(1, first.view(-1, 1, 1).expand(-1, 1, x.shape[2]))
    return zero_padding(picked, padding_mask.all(1, keepdim=True)).squeeze(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"mean": _mean, "first": _first}


@remembers_arguments
class MegaClassifier(nn.Module):
    r"""Sorts sequences, or pairs of sequences, into classes: embedding, encoder, pooling, head.

    Args:
        encoder: A `MegaEncoder`.
        num_classes: Number of classes.
        vocab_size: Number of tokens; `None` for continuous inputs.
        input_dim: Values per position of continuous inputs.
        pair: Whether a second sequence is compared with the first: both are encoded and pooled alike, and the head
            sees the pooled second one and the pooled first one, side by side.
        pooling: `"mean"` over the real positions, `"first"` real position, or a callable of the encoder's output and
            the padding mask (or `None`).
        head_layers: Hidden layers between pooling and output.
        head_dim: Their width; `None` for the encoder's.
        head_activation: Their activation.
        scale_embedding: Whether to multiply token embeddings by the square root of the model width.
        embedding_norm: Name of a norm, or a module, behind the embedding; `None` for none.
        embedding_dropout: Probability of dropout on the embedded inputs.
        embedding: A module of your own, called as `embedding(inputs, padding_mask=...)`.
        device: Where to create the parameters besides the encoder's.
        dtype: Their dtype.

    Shape:
        - `inputs`, `second`: $(B, L)$ token ids; continuous $(B, L, \text{input})$, or $(B, L)$ for one value each.
        - `padding_mask`, `second_padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: class logits, $(B, \text{classes})$; with `trace=True` `(logits, trace)`, the trace of the encoder,
          for pairs of both sequences one after the other; with `trace="hidden_states"` it has no attention weights.

    Raises:
        ValueError: If a second sequence is missing or superfluous, or a token is outside the vocabulary.
        TypeError: If inputs have the wrong dtype, or a mask is not bool.

    Example:
        >>> encoder = mega_encoder(2, 32, qk_dim=16, ffn_dim=64)
        >>> model = MegaClassifier(encoder, num_classes=10)     # continuous: pixel by pixel
        >>> model(torch.rand(4, 64)).shape
        torch.Size([4, 10])

    References:
        Ma et al., sections 4.1 and 4.2, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        encoder: MegaEncoder,
        num_classes: int,
        *,
        vocab_size: int | None = None,
        input_dim: int = 1,
        pair: bool = False,
        pooling: str | Callable[[Tensor, Tensor | None], Tensor] = "mean",
        head_layers: int = 1,
        head_dim: int | None = None,
        head_activation: str | Callable[[Tensor], Tensor] = "gelu",
        scale_embedding: bool = False,
        embedding_norm: str | nn.Module | None = None,
        embedding_dropout: float = 0.0,
        embedding: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_module("encoder", encoder, "a MegaEncoder")
        check_flag("scale_embedding", scale_embedding)
        check_probability("embedding_dropout", embedding_dropout)
        width = encoder.embed_dim
        self.num_classes = check_size("num_classes", num_classes)
        self.pair = check_flag("pair", pair)
        self.pooling = pooling if callable(pooling) else lookup("pooling", pooling, POOLINGS, others=", or a callable")
        self.head_activation = activation_function(head_activation)
        check_optional_size("vocab_size", vocab_size, "continuous inputs")
        pooled = 2 * width if pair else width
        hidden = check_optional_size("head_dim", head_dim, "the encoder's width") or width
        count = check_size("head_layers", head_layers, minimum=0)
        widths = [pooled] + [hidden] * count
        with created_on(device):
            if embedding is None:
                extras: dict[str, Any] = {"norm": embedding_norm, "dropout": embedding_dropout}
                if vocab_size is None:
                    embedding = ContinuousEmbedding(input_dim, width, **extras)
                else:
                    embedding = TokenEmbedding(vocab_size, width, scale=scale_embedding, **extras)
            head = [nn.Linear(wide, narrow) for wide, narrow in pairwise(widths)]
            output = nn.Linear(widths[-1], num_classes, bias=False)
            check_width("embedding", embedding, width)
        self.embedding = embedding.to(dtype=dtype)
        self.encoder = encoder
        self.head = nn.ModuleList(head).to(dtype=dtype)
        self.output = output.to(dtype=dtype)

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Sets the chunk length of every layer that has one; `None` for no chunks."""
        set_chunk_size(self, chunk_size)

    @overload
    def forward(
        self,
        inputs: Tensor,
        second: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        second_padding_mask: Tensor | None = None,
        trace: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        inputs: Tensor,
        second: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        second_padding_mask: Tensor | None = None,
        trace: Shown,
    ) -> tuple[Tensor, Trace]: ...
    def forward(
        self,
        inputs: Tensor,
        second: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        second_padding_mask: Tensor | None = None,
        trace: Shown | bool = False,
    ) -> Any:
        """Returns the class logits, and with `trace` what happened in the encoder."""
        if self.pair != (second is not None):
            raise ValueError(
                f"This MegaClassifier has pair={self.pair}, but was given {'no' if second is None else 'a'} second "
                f"sequence; {'pass `second`' if self.pair else 'leave `second` out, or make it with pair=True'}."
            )
        if second is None and second_padding_mask is not None:
            raise ValueError("`second_padding_mask` belongs to `second`, but there is none; leave it out.")
        check_trace(trace)
        representation, seen = self._represent(inputs, padding_mask, trace)
        if second is not None:
            check_tensor("second", second)
            check_batch("second", second.shape[0], inputs.shape[0])
            other, seen_other = self._represent(second, second_padding_mask, trace)
            representation = torch.cat([other, representation], dim=-1)
            if seen is not None and seen_other is not None:
                seen = Trace(*(mine + others for mine, others in zip(seen, seen_other, strict=True)))
        for layer in self.head:
            representation = self.head_activation(layer(representation))
        logits = self.output(representation)
        return logits if seen is None else (logits, seen)

    def _represent(
        self, inputs: Tensor, padding_mask: Tensor | None, trace: Shown | bool
    ) -> tuple[Tensor, Trace | None]:
        x = self.embedding(inputs, padding_mask=padding_mask)
        x, seen, _ = call_for(self.encoder, x, None, trace, padding_mask=padding_mask)
        return self.pooling(x, padding_mask), seen

    if TYPE_CHECKING:
        __call__ = forward
