"""Decoder layers: tokens see what came before them, and a memory where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_input,
    check_module,
    check_one_width,
    check_state,
    check_streaming_part,
)
from megablocks.functional.padding import last_padding, last_real_position
from megablocks.layers import Trace
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.cross_attention import check_one_memory
from megablocks.layers.gated_attention import refuse_future
from megablocks.layers.trace import call_for, call_for_last, results
from megablocks.stacks.stack import merged_trace
from megablocks.state import DecoderLayerState


@remembers_arguments
class MegaDecoderLayer(nn.Module):
    """Puts cross-attention and a feed-forward layer, where given, behind a causal self-attention layer.

    Args:
        attention: A causal `MovingAverageGatedAttention`, or a module called like one.
        cross_attention: A `GatedCrossAttention`, or a module called like one; `None` for none.
        feed_forward: A `NormalizedFFN`, or a module called like one; `None` for none.

    Shape:
        - `x`: $(B, L, D)$; `memory`: $(B, M, D)$, required with cross-attention and without a state.
        - `padding_mask`: $(B, L)$; `memory_padding_mask`: $(B, M)$; bool, `True` at padding.
        - output: $(B, L, D)$, zeros at padding; with `last_only=True` that of each row's last real token alone,
          $(B, 1, D)$; with a state `(output, new_state)`; with `trace=True` a `Trace` stands second.

    Raises:
        ValueError: If a part would see the future (bidirectional averages or attention, batch statistics), or if a
            memory is missing, superfluous, or given together with a state.

    Example:
        >>> layer = MegaDecoderLayer(MovingAverageGatedAttention(32, 16), GatedCrossAttention(32, 16)).eval()
        >>> x, memory = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
        >>> whole = layer(x, memory)
        >>> state = layer.init_state(2, memory)
        >>> first, state = layer(x[:, :2], state=state)
        >>> rest, state = layer(x[:, 2:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)

    References:
        Ma et al., section 3.3, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        attention: nn.Module,
        cross_attention: nn.Module | None = None,
        feed_forward: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_module("attention", attention, "a MovingAverageGatedAttention")
        if cross_attention is not None:
            check_streaming_part("cross_attention", cross_attention, "a GatedCrossAttention")
        if feed_forward is not None:
            check_module("feed_forward", feed_forward, "a NormalizedFFN")
        check_one_width({"attention": attention, "cross_attention": cross_attention, "feed_forward": feed_forward})
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward
        refuse_future(self)

    @property
    def embed_dim(self) -> int:
        """Model width $D$, that of the attention layer."""
        width: int = self.attention.embed_dim  # type: ignore[assignment]
        return width

    @property
    def takes_memory(self) -> bool:
        """Whether the layer attends to a memory."""
        return self.cross_attention is not None

    def init_state(
        self,
        batch_size: int,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> DecoderLayerState:
        """Returns the state before the first token; see `MegaDecoder.init_state`."""
        self._check_memory(memory, memory_padding_mask)
        if memory is not None:
            check_input("memory", memory, getattr(self.attention, "embed_dim", None))
            check_batch("memory", memory.shape[0], batch_size)
        fixed = {} if capacity is None else {"capacity": capacity}
        attention = self.attention.init_state(batch_size, **fixed)  # type: ignore[operator]
        cross = None
        if self.cross_attention is not None:
            cross = self.cross_attention.init_state(memory, memory_padding_mask)  # type: ignore[operator]
        return DecoderLayerState(attention, cross)

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
        trace: Literal[True],
    ) -> tuple[Tensor, Trace]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderLayerState,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> tuple[Tensor, DecoderLayerState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: DecoderLayerState,
        last_only: bool = False,
        trace: Literal[True],
    ) -> tuple[Tensor, Trace, DecoderLayerState]: ...
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: DecoderLayerState | None = None,
        last_only: bool = False,
        trace: bool = False,
    ) -> Any:
        """Returns the layer's output; see the class for what `state`, `last_only` and `trace` change."""
        if state is None:
            self._check_memory(memory, memory_padding_mask)
        else:
            check_one_memory(memory, memory_padding_mask, state)
            check_state(state, DecoderLayerState, "MegaDecoderLayer")
        inner, cross = (None, None) if state is None else state
        # Cross-attention counts the queries that it sees, so it sees them all.
        early = last_only and self.cross_attention is None
        x, seen, inner = call_for_last(self.attention, x, inner, trace, last_only=early, padding_mask=padding_mask)
        traces = [seen]
        if self.cross_attention is not None:
            given = {} if state is not None else {"memory": memory, "memory_padding_mask": memory_padding_mask}
            x, seen, cross = call_for(self.cross_attention, x, cross, trace, padding_mask=padding_mask, **given)
            traces.append(seen)
            x = last_real_position(x, padding_mask) if last_only else x
        if last_only:
            padding_mask = last_padding(padding_mask)
        if self.feed_forward is not None:
            x = self.feed_forward(x, padding_mask=padding_mask)
        new_state = None if state is None else DecoderLayerState(inner, cross)
        return results(x, merged_trace([], traces) if trace else None, new_state)

    def _check_memory(self, memory: Tensor | None, memory_padding_mask: Tensor | None) -> None:
        check_memory("MegaDecoderLayer", self.takes_memory, memory, memory_padding_mask)

    if TYPE_CHECKING:
        __call__ = forward


def check_memory(owner: str, takes: bool, memory: Tensor | None, memory_padding_mask: Tensor | None) -> None:
    """Raises unless a memory is given where one is attended to, and only there, and its mask only with it."""
    if takes:
        check_one_memory(memory, None, None)
    elif memory is not None or memory_padding_mask is not None:
        what = "memory" if memory is not None else "memory_padding_mask"
        raise ValueError(
            f"This {owner} has no cross-attention, but got a `{what}`; make its layers with "
            f"`cross_attention=GatedCrossAttention(...)`, or leave the {what} out."
        )
