"""Gated cross-attention: a decoder's tokens attend to a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_flag,
    check_input,
    check_kept_shape,
    check_padding_mask,
    check_size,
    check_state,
    check_state_shape,
    values_readable,
)
from megablocks.functional.activation import activation_function, silu_gate, update_gate
from megablocks.functional.attention_function import AttentionFunction
from megablocks.functional.padding import real_lengths, zero_padding
from megablocks.functional.recomputation import Recomputation
from megablocks.functional.sight import Sight, attend_sight
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.dropout import SequenceDropout
from megablocks.layers.norm import sequence_norm
from megablocks.layers.parts import attention_part, bias_module, check_reach, reset_linear, reset_parts
from megablocks.layers.trace import Trace, results
from megablocks.state import CrossAttentionState


@remembers_arguments
class GatedCrossAttention(nn.Module):
    r"""Lets every token attend to a memory, such as an encoder's output, and gates the result.

    $$\begin{aligned}
    Q &= \mathrm{Norm}(X) W_q + b_q &
    K &= M W_k + b_k &
    V &= \phi(M W_v + b_v) \\
    O &= f(Q K^\top / \tau + R)\, V &
    \gamma &= \mathrm{silu}(\mathrm{Norm}(X) W_\gamma + b_\gamma) &
    \varphi &= \sigma(\mathrm{Norm}(X) W_\varphi + b_\varphi) \\
    \hat H &= \phi((\gamma \odot O)\, U_h + b_h) &
    Y &= \varphi \odot \hat H + (1 - \varphi) \odot X
    \end{aligned}$$

    The bias $R$ compares the position of a query among the real queries with that of a key among the real tokens of
    the memory. With `prenorm=False` the input is not normalised and $Y$ is.

    Args:
        embed_dim: Model width $D$, of queries and memory.
        qk_dim: Width $Z$ of queries and keys.
        attention: `"softmax"`, `"laplace"`, `"relu2"`, an element-wise function of the scores, or an
            `AttentionFunction`.
        activation: $\phi$: `"silu"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"tanh"`, `"linear"`, or a callable.
        position_bias: `"rotary"`, a module such as `SimpleRelativeBias(max_positions)`, or `None`.
        norm: `"layernorm"`, `"scalenorm"`, `"rmsnorm"`, a module, or `None`; `"batchnorm"` and `"syncbatchnorm"` too,
            which a decoder layer refuses.
        prenorm: Whether to normalise the input rather than the output.
        dropout: Probability of dropout on $\hat H$.
        attention_dropout: Probability of dropout on attention weights.
        hidden_dropout: Probability of dropout on the values.
        feature_dropout: Whether `dropout` and `hidden_dropout` drop whole channels of a row.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `x`: $(B, L, D)$; `memory`: $(B, M, D)$.
        - `padding_mask`: $(B, L)$, `memory_padding_mask`: $(B, M)$, bool, `True` at padding. A row whose memory is all
          padding gets attention output zero.
        - output: $(B, L, D)$ in the dtype of `x`, zeros at padding; with a state `(output, new_state)`; with
          `trace=True` a `Trace` of the weights $(B, L, M)$ stands second.

    Raises:
        ValueError: If a size, probability or name is not allowed, if `x`, `memory` or the state do not fit, if a
            simple bias is too short, or unless exactly one of memory and state is given.
        TypeError: If a mask is not bool.

    Example:
        >>> layer = GatedCrossAttention(32, 16).eval()
        >>> x, memory = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
        >>> whole = layer(x, memory)
        >>> state = layer.init_state(memory)      # projects the memory once
        >>> first, state = layer(x[:, :3], state=state)
        >>> rest, state = layer(x[:, 3:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)

    References:
        Ma et al., section 3.2 and the cross-attention of the released code,
        [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        embed_dim: int,
        qk_dim: int,
        *,
        attention: str | Callable[[Tensor], Tensor] | AttentionFunction = "softmax",
        activation: str | Callable[[Tensor], Tensor] = "silu",
        position_bias: str | nn.Module | None = "rotary",
        norm: str | nn.Module | None = "layernorm",
        prenorm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feature_dropout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.qk_dim = check_size("qk_dim", qk_dim)
        self.prenorm = check_flag("prenorm", prenorm)
        self.attention = attention_part(attention)
        self.activation = activation_function(activation)
        made_as: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position_bias = bias_module(position_bias, qk_dim, **made_as)
        self.norm = sequence_norm(embed_dim, norm, device=device, dtype=dtype)

        self.k_proj = nn.Linear(embed_dim, qk_dim, **made_as)
        self.v_proj = nn.Linear(embed_dim, embed_dim, **made_as)
        self._split = (embed_dim, embed_dim, qk_dim)
        # Everything that is projected from the input, in one product: update gate, reset gate, queries.
        self.q_proj = nn.Linear(embed_dim, sum(self._split), **made_as)
        self.h_proj = nn.Linear(embed_dim, embed_dim, **made_as)

        self.dropout = SequenceDropout(dropout, channels=feature_dropout)
        self.hidden_dropout = SequenceDropout(hidden_dropout, channels=feature_dropout, name="hidden_dropout")
        self.attention_dropout = SequenceDropout(attention_dropout, name="attention_dropout")
        reset_linear(self.k_proj, self.v_proj, self.q_proj, self.h_proj)

    def reset_parameters(self) -> None:
        """Draws all parameters anew: normal with standard deviation 0.02, biases zero; bias and norm have their own."""
        reset_linear(self.k_proj, self.v_proj, self.q_proj, self.h_proj)
        reset_parts(self.position_bias, self.norm, self.attention, self.activation)

    def init_state(self, memory: Tensor, padding_mask: Tensor | None = None) -> CrossAttentionState:
        """Projects a memory once, for every later call.

        Args:
            memory: $(B, M, D)$.
            padding_mask: Of the memory, $(B, M)$, bool, `True` at padding.
        """
        check_input("memory", memory, self.embed_dim)
        batch, length = memory.shape[:2]
        check_padding_mask("memory_padding_mask", padding_mask, (batch, length))
        check_reach(self.position_bias, length)
        memory = zero_padding(memory, padding_mask)
        if padding_mask is None:
            padding_mask = torch.zeros(batch, length, dtype=torch.bool, device=memory.device)
        keys = self.k_proj(memory)
        values = self.hidden_dropout(self.activation(self.v_proj(memory)))
        check_kept_shape("activation", values, tuple(memory.shape))
        position = torch.zeros(batch, dtype=torch.int64, device=memory.device)
        return CrossAttentionState(keys, values, padding_mask, position)

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: None = None,
        trace: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: None = None,
        trace: Literal[True],
    ) -> tuple[Tensor, Trace]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        memory: None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: None = None,
        state: CrossAttentionState,
        trace: Literal[False] = False,
    ) -> tuple[Tensor, CrossAttentionState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        memory: None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: None = None,
        state: CrossAttentionState,
        trace: Literal[True],
    ) -> tuple[Tensor, Trace, CrossAttentionState]: ...
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        padding_mask: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
        state: CrossAttentionState | None = None,
        trace: bool = False,
    ) -> Any:
        """Returns the layer's output; see the class for what `state` and `trace` add."""
        check_flag("trace", trace)
        check_input("x", x, self.embed_dim)
        check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
        check_one_memory(memory, memory_padding_mask, state)
        check_reach(self.position_bias, x.shape[1])
        if memory is not None:
            check_input("memory", memory, self.embed_dim)
            check_batch("memory", memory.shape[0], x.shape[0])
            start = self.init_state(memory, memory_padding_mask)
        else:
            start = self._check_state(state, x)

        x = zero_padding(x, padding_mask)
        inputs = self.norm(x, padding_mask=padding_mask) if self.norm is not None and self.prenorm else x
        update, reset, q = self.q_proj(inputs).split(self._split, dim=-1)
        shown = None
        if memory_padding_mask is not None or state is not None:
            shown = ~start.padding_mask.unsqueeze(1)
        positions = self._positions(x, padding_mask, start, memory_padding_mask, state)
        out, weights = attend_sight(
            q,
            start.keys.to(q.dtype),
            start.values.to(q.dtype),
            self.attention,
            Sight(*positions, causal=False, shown=shown),
            bias=self.position_bias,
            dropout=self.attention_dropout.or_none(),
            need_weights=trace,
        )
        with Recomputation(x, out) as again:
            hidden = self.dropout(again(self.activation, self.h_proj(again(silu_gate, out, reset))))
            y = update_gate(x, hidden.to(x.dtype), update.to(x.dtype))
            if self.norm is not None and not self.prenorm:
                y = self.norm(y, padding_mask=padding_mask)
        y = zero_padding(y.to(x.dtype), padding_mask)

        seen = None if weights is None else Trace(cross_attention_weights=(zero_padding(weights, padding_mask),))
        new_state = None
        if state is not None:
            length = real_lengths((x.shape[0], x.shape[1]), padding_mask, x.device)
            new_state = start._replace(position=start.position + length)
        return results(y, seen, new_state)

    def _positions(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        start: CrossAttentionState,
        memory_padding_mask: Tensor | None,
        state: CrossAttentionState | None,
    ) -> tuple[Tensor, Tensor]:
        """Positions of queries and keys among the real ones, (L,) or (B, L), and (M,) or (B, M)."""
        queries = torch.arange(x.shape[1], device=x.device)
        if padding_mask is not None:
            queries = ((~padding_mask).cumsum(1) - 1).clamp(min=0)
        if state is not None:
            queries = queries + state.position.unsqueeze(-1)
        if memory_padding_mask is None and state is None:
            return queries, torch.arange(start.keys.shape[1], device=x.device)
        return queries, ((~start.padding_mask).cumsum(1) - 1).clamp(min=0)

    def _check_state(self, state: object, x: Tensor) -> CrossAttentionState:
        check_state(state, CrossAttentionState, "GatedCrossAttention")
        known: CrossAttentionState = state  # type: ignore[assignment]
        length = known.keys.shape[1]
        check_state_shape("state.keys", known.keys, (length, self.qk_dim))
        check_state_shape("state.values", known.values, (length, self.embed_dim))
        for part in known:
            check_batch("state", part.shape[0], x.shape[0])
        if values_readable(known.position):
            check_reach(self.position_bias, int(known.position.max()) + x.shape[1])
        return known

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"{self.embed_dim}, {self.qk_dim}, prenorm={self.prenorm}"

    if TYPE_CHECKING:
        __call__ = forward


def check_one_memory(memory: object, mask: object, state: object, *, name: str = "memory") -> None:
    """Raises unless exactly one of memory and state is given, the mask going with the memory."""
    if state is not None and (memory is not None or mask is not None):
        raise ValueError(
            f"A call takes a {name} or a state, but got both; the state holds the {name} since `init_state`."
        )
    if state is None and memory is None:
        raise ValueError(f"A call with cross-attention needs a `{name}` or a `state`, but got neither.")
