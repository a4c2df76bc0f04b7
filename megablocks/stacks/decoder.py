"""Decoders: layers in a row, their states, and a memory for those that attend to one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_input,
    check_padding_mask,
    check_size,
    check_state,
    check_trace,
)
from megablocks.functional.padding import last_padding, last_real_position, zero_padding
from megablocks.layers import Trace
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.cross_attention import check_one_memory
from megablocks.layers.gated_attention import refuse_future
from megablocks.layers.trace import Shown, call_for_last, results
from megablocks.stacks.decoder_layer import MegaDecoderLayer, check_memory
from megablocks.stacks.options import LayerOptions, layer_parts
from megablocks.stacks.stack import Stack, merged_trace
from megablocks.state import DecoderState

if TYPE_CHECKING:
    from typing_extensions import Unpack


@remembers_arguments
class MegaDecoder(Stack):
    """Runs a sequence through a list of causal layers, whole or piece by piece.

    Args:
        layers: Modules called as `layer(x, padding_mask=...)`, with `state=...` when streaming, first to last:
            `MegaDecoderLayer`s, bare causal `MovingAverageGatedAttention`s, your own. A layer with a true attribute
            `takes_memory` is also given `memory` and `memory_padding_mask`. To stream, each must have
            `init_state(batch_size)`, and take `capacity=...` there if you ask for one.
        final_norm: Name of a norm, or a module, applied after the last layer, as pre-norm layers need; `None` for none.
        layer_drop: Probability that a layer is skipped, for the whole batch, in training.
        checkpoint: Whether layers are computed again in the backward pass instead of keeping their activations.

    Shape:
        - `x`: $(B, L, D)$; `memory`: $(B, M, D)$.
        - `padding_mask`: $(B, L)$; `memory_padding_mask`: $(B, M)$; bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding; with `last_only=True` that of each row's last real token alone,
          $(B, 1, D)$; with a state `(output, new_state)`; with `trace=True` a `Trace` stands second: its
          `hidden_states` hold the input and the output of each layer, the last before the final norm.
          `trace="hidden_states"` shows them alone and makes no attention weights, which for long unchunked sequences
          would not fit into memory.

    Raises:
        ValueError: If there is no layer, if a layer would see the future (bidirectional averages or attention, batch
            statistics), if a memory is missing, superfluous, or given together with a state.
        TypeError: If something in `layers` is not a module, or a mask is not bool.

    Note:
        Reading a prompt with `last_only=True` and a state, in eval mode, leaves out what the last layer would do for
        other tokens: it averages them all and attends in the last chunk alone, or with the last query alone. Hooks on
        it then see $(B, 1, D)$.

    Example:
        >>> decoder = MegaDecoder([MovingAverageGatedAttention(32, 16, chunk_size=4) for _ in range(2)]).eval()
        >>> x = torch.randn(2, 10, 32)
        >>> state = decoder.init_state(2)
        >>> first, state = decoder(x[:, :7], state=state)
        >>> rest, state = decoder(x[:, 7:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), decoder(x))

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
        refuse_future(self)

    @property
    def takes_memory(self) -> bool:
        """Whether any layer attends to a memory."""
        return any(_takes_memory(layer) for layer in self.layers)

    def init_state(
        self,
        batch_size: int,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> DecoderState:
        """Returns the state before the first token; each cross-attention projects the memory here, once.

        Args:
            batch_size: $B$.
            memory: $(B, M, D)$, if the layers attend to one.
            memory_padding_mask: $(B, M)$, bool, `True` at padding.
            capacity: Without chunks, the most tokens that the state will ever hold, in tensors of fixed shape;
                `None` for keys that grow with every call.
        """
        self._check_memory(memory, memory_padding_mask)
        if memory is not None:
            check_input("memory", memory, self._width)
            check_batch("memory", memory.shape[0], batch_size)
        fixed = {} if capacity is None else {"capacity": capacity}
        states = []
        for layer in self.layers:
            given = (memory, memory_padding_mask) if _takes_memory(layer) else ()
            states.append(layer.init_state(batch_size, *given, **fixed))  # type: ignore[operator]
        return DecoderState(tuple(states))

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Shown,
    ) -> tuple[Tensor, Trace]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderState,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> tuple[Tensor, DecoderState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderState,
        last_only: bool = False,
        trace: Shown,
    ) -> tuple[Tensor, Trace, DecoderState]: ...
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: DecoderState | None = None,
        last_only: bool = False,
        trace: Shown | bool = False,
    ) -> Any:
        """Returns the decoded sequence; see the class for what `state`, `last_only` and `trace` change."""
        check_input("x", x, self._width)
        check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
        if state is None:
            self._check_memory(memory, memory_padding_mask)
        else:
            check_one_memory(memory, memory_padding_mask, state)
            check_state(state, DecoderState, "MegaDecoder")
            if len(state.layers) != len(self.layers):
                raise ValueError(
                    f"`state` must hold one state for each of {len(self.layers)} layers, but holds "
                    f"{len(state.layers)}; it was made by another stack."
                )
        check_trace(trace)
        hidden_states: list[Tensor] | None = [] if trace else None
        # In training the output of a layer that is dropped is its whole input; a trace shows whole hidden states.
        early = last_only and state is not None and x.shape[1] > 1 and not trace and not self.training

        def call(layer: nn.Module, index: int, x: Tensor) -> tuple[Any, ...]:
            given: dict[str, Any] = {"padding_mask": padding_mask}
            if state is None and _takes_memory(layer):
                given |= {"memory": memory, "memory_padding_mask": memory_padding_mask}
            before = None if state is None else state.layers[index]
            last = early and index == len(self.layers) - 1
            return call_for_last(layer, x, before, trace is True, last_only=last, **given)

        x, extras = self._through(zero_padding(x, padding_mask), call, hidden_states)
        if last_only:
            x = x if early else last_real_position(x, padding_mask)
            padding_mask = last_padding(padding_mask)
        x = self._finished(x, padding_mask)
        seen = (
            None if hidden_states is None else merged_trace(hidden_states, filter(None, [seen for seen, _ in extras]))
        )
        new_state = None if state is None else DecoderState(tuple(after for _, after in extras))
        return results(x, seen, new_state)

    def _check_memory(self, memory: Tensor | None, memory_padding_mask: Tensor | None) -> None:
        check_memory("MegaDecoder", self.takes_memory, memory, memory_padding_mask)

    if TYPE_CHECKING:
        __call__ = forward


def mega_decoder(
    num_layers: int,
    embed_dim: int,
    *,
    cross_attention: bool = False,
    layer_drop: float = 0.0,
    checkpoint: bool = False,
    final_norm_affine: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Unpack[LayerOptions],
) -> MegaDecoder:
    """Builds a causal decoder of equal layers from sizes, with a final norm if its layers are pre-norm.

    Args:
        num_layers: Number of layers.
        embed_dim: Model width $D$.
        cross_attention: Whether each layer attends to a memory.
        layer_drop: Probability that a layer is skipped in training.
        checkpoint: Whether to compute activations again in the backward pass.
        final_norm_affine: Whether the final norm learns scale and shift.
        device: Where to create the parameters.
        dtype: Parameter dtype.
        **options: What each layer is like, see `megablocks.stacks.options.LayerOptions`; `qk_dim` is required.

    Example:
        >>> decoder = mega_decoder(2, 32, qk_dim=16, ffn_dim=64, chunk_size=128)
        >>> decoder(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """
    check_size("num_layers", num_layers)
    parts = layer_parts(options)
    with nullcontext() if device is None else torch.device(device):
        layers = [
            MegaDecoderLayer(
                parts.self_attention(embed_dim, causal=True),
                parts.cross_attention(embed_dim) if cross_attention else None,
                parts.feed_forward(embed_dim),
            )
            for _ in range(num_layers)
        ]
        norm = parts.final_norm(embed_dim, affine=final_norm_affine)
        decoder = MegaDecoder(layers, final_norm=norm, layer_drop=layer_drop, checkpoint=checkpoint)
    return decoder if dtype is None else decoder.to(dtype)


def _takes_memory(layer: nn.Module) -> bool:
    return bool(getattr(layer, "takes_memory", False))
