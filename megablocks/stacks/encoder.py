"""Encoder layers and stacks: every token sees every other."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_input,
    check_module,
    check_one_width,
    check_padding_mask,
    check_size,
    check_trace,
)
from megablocks.functional.padding import zero_padding
from megablocks.layers import Trace
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.trace import Shown, call_for, results
from megablocks.stacks.options import LayerOptions, layer_parts
from megablocks.stacks.stack import Stack, merged_trace

if TYPE_CHECKING:
    from typing_extensions import Unpack


@remembers_arguments
class MegaEncoderLayer(nn.Module):
    """Puts a feed-forward layer behind a self-attention layer.

    Args:
        attention: A `MovingAverageGatedAttention`, or a module called like one.
        feed_forward: A `NormalizedFFN`, or a module called like one; `None` for none.

    Shape:
        - `x`: $(B, L, D)$; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding; with `trace=True` `(output, trace)`.

    Example:
        >>> attention = MovingAverageGatedAttention(32, 16, causal=False)
        >>> MegaEncoderLayer(attention, NormalizedFFN(32, 64))(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])

    References:
        Ma et al., section 3.3, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        check_module("attention", attention, "a MovingAverageGatedAttention")
        if feed_forward is not None:
            check_module("feed_forward", feed_forward, "a NormalizedFFN")
        check_one_width({"attention": attention, "feed_forward": feed_forward})
        self.attention = attention
        self.feed_forward = feed_forward

    @property
    def embed_dim(self) -> int:
        """Model width $D$, that of the attention layer."""
        width: int = self.attention.embed_dim  # type: ignore[assignment]
        return width

    @overload
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, trace: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, trace: Literal[True]
    ) -> tuple[Tensor, Trace]: ...
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, trace: bool = False) -> Any:
        """Returns the layer's output, and with `trace=True` its attention weights."""
        seen = None
        if trace:
            x, seen = self.attention(x, padding_mask=padding_mask, trace=True)
        else:
            x = self.attention(x, padding_mask=padding_mask)
        if self.feed_forward is not None:
            x = self.feed_forward(x, padding_mask=padding_mask)
        return results(x, seen, None)

    if TYPE_CHECKING:
        __call__ = forward


@remembers_arguments
class MegaEncoder(Stack):
    """Runs a sequence through a list of encoder layers.

    Args:
        layers: Modules called as `layer(x, padding_mask=...)`, first to last: `MegaEncoderLayer`s, bare
            `MovingAverageGatedAttention`s, your own. Under `trace=True` they are called with `trace=True` as well.
        final_norm: Name of a norm, or a module, applied after the last layer, as pre-norm layers need; `None` for none.
        layer_drop: Probability that a layer is skipped, for the whole batch, in training.
        checkpoint: Whether layers are computed again in the backward pass instead of keeping their activations.

    Shape:
        - `x`: $(B, L, D)$; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding; with `trace=True` `(output, trace)`; `trace.hidden_states` holds the
          input and the output of each layer, the last one before the final norm. `trace="hidden_states"` shows them
          alone and makes no attention weights, which for long unchunked sequences would not fit into memory.

    Raises:
        ValueError: If there is no layer, a probability is not in [0, 1), or `x` has another shape.
        TypeError: If something in `layers` is not a module, or `padding_mask` is not bool.

    Example:
        >>> layers = [MovingAverageGatedAttention(32, 16, causal=False, chunk_size=size) for size in (4, 8, None)]
        >>> encoder = MegaEncoder(layers, final_norm="layernorm")
        >>> y, trace = encoder(torch.randn(2, 10, 32), trace=True)
        >>> y.shape, len(trace.hidden_states)
        (torch.Size([2, 10, 32]), 4)

    References:
        Ma et al., section 3.3, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        final_norm: str | nn.Module | None = None,
        layer_drop: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(layers, final_norm, layer_drop, checkpoint)

    @overload
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, trace: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, trace: Shown) -> tuple[Tensor, Trace]: ...
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, trace: Shown | bool = False) -> Any:
        """Returns the encoded sequence, and with `trace=True` what happened inside."""
        check_input("x", x, self._width)
        check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
        check_trace(trace)
        hidden_states: list[Tensor] | None = [] if trace else None

        def call(layer: nn.Module, _: int, x: Tensor) -> tuple[Any, ...]:
            return call_for(layer, x, None, trace is True, padding_mask=padding_mask)[:2]

        x, extras = self._through(zero_padding(x, padding_mask), call, hidden_states)
        x = self._finished(x, padding_mask)
        if hidden_states is None:
            return x
        return x, merged_trace(hidden_states, (seen for (seen,) in extras if seen is not None))

    if TYPE_CHECKING:
        __call__ = forward


def mega_encoder(
    num_layers: int,
    embed_dim: int,
    *,
    layer_drop: float = 0.0,
    checkpoint: bool = False,
    final_norm_affine: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Unpack[LayerOptions],
) -> MegaEncoder:
    """Builds an encoder of equal layers from sizes, with a final norm if its layers are pre-norm.

    Args:
        num_layers: Number of layers.
        embed_dim: Model width $D$.
        layer_drop: Probability that a layer is skipped in training.
        checkpoint: Whether to compute activations again in the backward pass.
        final_norm_affine: Whether the final norm learns scale and shift.
        device: Where to create the parameters.
        dtype: Parameter dtype.
        **options: What each layer is like, see `megablocks.stacks.options.LayerOptions`; `qk_dim` is required.

    Example:
        >>> encoder = mega_encoder(2, 32, qk_dim=16, ffn_dim=64, chunk_size=128)
        >>> encoder(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """
    check_size("num_layers", num_layers)
    parts = layer_parts(options)
    with nullcontext() if device is None else torch.device(device):
        layers = [
            MegaEncoderLayer(parts.self_attention(embed_dim, causal=False), parts.feed_forward(embed_dim))
            for _ in range(num_layers)
        ]
        norm = parts.final_norm(embed_dim, affine=final_norm_affine)
        encoder = MegaEncoder(layers, final_norm=norm, layer_drop=layer_drop, checkpoint=checkpoint)
    return encoder if dtype is None else encoder.to(dtype)
