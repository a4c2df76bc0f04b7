"""The moving-average gated attention layer, the heart of MEGA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_flag,
    check_input,
    check_kept_shape,
    check_optional_size,
    check_padding_mask,
    check_size,
    check_state,
    check_state_shape,
    check_width,
    values_readable,
)
from megablocks.functional.activation import activation_function, rescaled, silu_gate, update_gate
from megablocks.functional.attention import chunked_attention, passed_chunks, streamed_attention
from megablocks.functional.attention_function import AttentionFunction
from megablocks.functional.padding import last_padding, last_real_position, zero_padding
from megablocks.functional.recomputation import Recomputation
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.dropout import SequenceDropout
from megablocks.layers.ema import MultiDimensionDampedEMA
from megablocks.layers.norm import sequence_norm
from megablocks.layers.parts import attention_part, bias_module, check_reach, reset_linear, reset_parts
from megablocks.layers.trace import Trace, results
from megablocks.state import AttentionState, ChunkKeys, FixedKeys, GrowingKeys, KeyState, WorkingKeys


@remembers_arguments
class MovingAverageGatedAttention(nn.Module):
    r"""Lets every token attend with queries and keys that are moving averages, and gates the result.

    $$\begin{aligned}
    X' &= \mathrm{silu}(\mathrm{EMA}(\mathrm{Norm}(X))) &
    Z &= \mathrm{silu}(X' W_z + b_z) \\
    Q &= \kappa_q \odot Z + \mu_q &
    K &= \kappa_k \odot Z + \mu_k \\
    V &= \phi(\mathrm{Norm}(X) W_v + b_v) &
    O &= f(Q K^\top / \tau + R)\, V \\
    \gamma &= \mathrm{silu}(X' W_\gamma + b_\gamma) &
    \varphi &= \sigma(X' W_\varphi + b_\varphi) \\
    \hat H &= \phi(X' W_h + (\gamma \odot O)\, U_h + b_h) &
    Y &= \varphi \odot \hat H + (1 - \varphi) \odot X
    \end{aligned}$$

    With `prenorm=False` nothing is normalised at the start and $Y$ is at the end. $\tau$ is $\sqrt Z$ for softmax,
    for other functions the number of keys that the query sees. With `chunk_size=C` attention stays inside chunks of
    $C$ consecutive real tokens, so its cost is linear in $L$; the average crosses their borders.

    Args:
        embed_dim: Model width $D$.
        qk_dim: Width $Z$ of queries and keys.
        value_dim: Width $V$ of values and reset gate; `None` for $2D$.
        ema: Number of averages $N$, or a module that is called as `ema(x, padding_mask=..., state=...)`. A causal one
            is allowed with `causal=False`; the layer then cannot stream.
        causal: Whether a token sees only tokens up to its own position.
        chunk_size: Chunk length $C$; `None` for no chunks. A plain attribute that may be set between calls; a state
            stays with the chunk size that it was made under.
        attention: `"softmax"`, `"laplace"`, `"relu2"`, an element-wise function of the scores, or an
            `AttentionFunction`.
        activation: $\phi$: `"silu"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"tanh"`, `"linear"`, or a callable.
        position_bias: `"rotary"`, a module such as `SimpleRelativeBias(max_positions)` that is called with the
            positions of queries and of keys, or `None`.
        norm: `"layernorm"`, `"scalenorm"`, `"rmsnorm"`, `"batchnorm"`, `"syncbatchnorm"`, a module, or `None`.
        prenorm: Whether to normalise the input rather than the output.
        dropout: Probability of dropout on the averages and on $\hat H$.
        attention_dropout: Probability of dropout on attention weights.
        hidden_dropout: Probability of dropout on the values.
        feature_dropout: Whether `dropout` and `hidden_dropout` drop whole channels of a row over time.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `x`: $(B, L, D)$ with any $L \ge 1$.
        - `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$ in the dtype of `x`, zeros at padding; with `last_only=True` that of each row's last real
          token alone, $(B, 1, D)$, with a state without the work for the others; with a state `(output, new_state)`;
          with `trace=True` a `Trace` of the attention weights stands second.

    Raises:
        ValueError: If a size, probability or name is not allowed, if a causal layer is given a bidirectional average or
            batch statistics, if `x` or the state do not fit, or if a simple bias is too short.
        TypeError: If `padding_mask` is not bool, or the state is of another kind.

    Note:
        Averages, scores and weights are computed in float32 or wider.

    Example:
        >>> layer = MovingAverageGatedAttention(32, 16, chunk_size=4).eval()
        >>> x = torch.randn(2, 10, 32)
        >>> whole = layer(x)
        >>> state = layer.init_state(batch_size=2)
        >>> first, state = layer(x[:, :7], state=state)
        >>> rest, state = layer(x[:, 7:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)

    References:
        Ma et al., sections 3.2 to 3.4, equations 6 to 16, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        embed_dim: int,
        qk_dim: int,
        *,
        value_dim: int | None = None,
        ema: int | nn.Module = 16,
        causal: bool = True,
        chunk_size: int | None = None,
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
        self.value_dim = check_optional_size("value_dim", value_dim, "twice `embed_dim`") or 2 * embed_dim
        self.causal = check_flag("causal", causal)
        self.chunk_size = check_optional_size("chunk_size", chunk_size, "no chunks")
        self.prenorm = check_flag("prenorm", prenorm)
        self.attention = attention_part(attention)
        self.activation = activation_function(activation)
        made_as: dict[str, Any] = {"device": device, "dtype": dtype}
        self.ema = (
            ema
            if isinstance(ema, nn.Module)
            else MultiDimensionDampedEMA(embed_dim, _ema_dim(ema), causal=causal, device=device, dtype=dtype)
        )
        check_width("ema", self.ema, embed_dim)
        self.position_bias = bias_module(position_bias, qk_dim, **made_as)
        self.norm = sequence_norm(embed_dim, norm, device=device, dtype=dtype)
        if causal:
            refuse_future(self)

        self.v_proj = nn.Linear(embed_dim, self.value_dim, **made_as)
        self._split = (embed_dim, qk_dim, self.value_dim, embed_dim)
        # Everything that is projected from the averages, in one product: update gate, Z, reset gate, candidate.
        self.mx_proj = nn.Linear(embed_dim, sum(self._split), **made_as)
        self.h_proj = nn.Linear(self.value_dim, embed_dim, **made_as)
        self.qk_weight = nn.Parameter(torch.empty(2, qk_dim, **made_as))  # kappa, mu: queries first, keys second
        self.qk_bias = nn.Parameter(torch.empty(2, qk_dim, **made_as))

        self.dropout = SequenceDropout(dropout, channels=feature_dropout)
        self.hidden_dropout = SequenceDropout(hidden_dropout, channels=feature_dropout, name="hidden_dropout")
        self.attention_dropout = SequenceDropout(attention_dropout, name="attention_dropout")
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew: normal with standard deviation 0.02, biases zero; the parts have their own way."""
        self._reset_own_parameters()
        reset_parts(self.ema, self.position_bias, self.norm, self.attention, self.activation)

    def _reset_own_parameters(self) -> None:
        reset_linear(self.v_proj, self.mx_proj, self.h_proj)
        nn.init.normal_(self.qk_weight, std=0.02)
        nn.init.zeros_(self.qk_bias)

    def init_state(self, batch_size: int, *, capacity: int | None = None) -> AttentionState:
        """Returns the state before the first token.

        Args:
            batch_size: $B$.
            capacity: Without chunks, the most tokens that the state will ever hold, in tensors of fixed shape;
                `None` for keys that grow with every call. With chunks the shape is fixed anyhow.

        Raises:
            ValueError: If the layer is not causal, or a simple bias does not reach as far as the state.
        """
        self._check_streams()
        check_size("batch_size", batch_size)
        check_optional_size("capacity", capacity, "keys that grow")
        chunk_size = check_optional_size("chunk_size", self.chunk_size, "no chunks")
        slots = chunk_size or capacity or 0
        check_reach(self.position_bias, slots)
        made_as: dict[str, Any] = {"device": self.qk_weight.device, "dtype": self.qk_weight.dtype}
        keys = torch.zeros(batch_size, slots, self.qk_dim, **made_as)
        values = torch.zeros(batch_size, slots, self.value_dim, **made_as)
        length = torch.zeros(batch_size, dtype=torch.int64, device=keys.device)
        ema_state = self.ema.init_state(batch_size)  # type: ignore[operator]
        kind = ChunkKeys if chunk_size else FixedKeys if capacity else GrowingKeys
        return AttentionState(ema_state, kind(keys, values, length))

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: None = None,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: AttentionState,
        last_only: bool = False,
        trace: Literal[False] = False,
    ) -> tuple[Tensor, AttentionState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
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
        state: AttentionState,
        last_only: bool = False,
        trace: Literal[True],
    ) -> tuple[Tensor, Trace, AttentionState]: ...
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: AttentionState | None = None,
        last_only: bool = False,
        trace: bool = False,
    ) -> Any:
        """Returns the layer's output; see the class for what `state`, `last_only` and `trace` change."""
        check_flag("trace", trace)
        check_input("x", x, self.embed_dim)
        check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
        chunk_size = check_optional_size("chunk_size", self.chunk_size, "no chunks")
        if state is not None:
            self._check_state(state, x.shape[0], chunk_size)
        check_reach(self.position_bias, self._span(x.shape[1], chunk_size, state))

        x = zero_padding(x, padding_mask)
        options: dict[str, Any] = {
            "bias": self.position_bias,
            "padding_mask": padding_mask,
            "dropout": self.attention_dropout.or_none(),
            "need_weights": trace,
        }
        with Recomputation(x) as again:
            inputs = self.norm(x, padding_mask=padding_mask) if self.norm is not None and self.prenorm else x
            held: KeyState | None = None
            if state is None:
                averages, ema_state = self.ema(inputs, padding_mask=padding_mask), None
            else:
                averages, ema_state = self.ema(inputs, padding_mask=padding_mask, state=state.ema)
                held = state.keys
                if last_only and padding_mask is None:
                    passed, held = passed_chunks(held, x.shape[1])
                    x, inputs, averages = (part[:, passed:] for part in (x, inputs, averages))
            check_kept_shape("ema", averages, tuple(inputs.shape))
            v = self.hidden_dropout(again(self.activation, self.v_proj(inputs)))
            check_kept_shape("activation", v, (*inputs.shape[:2], self.value_dim))
            moved = self.mx_proj(self.dropout(again(F.silu, averages)))
            update, shared, reset, candidate = moved.split(self._split, dim=-1)
            q, k = again(rescaled, again(F.silu, shared), self.qk_weight, self.qk_bias).unbind(-2)

            new_state = None
            if held is None:
                out, weights = chunked_attention(
                    q, k, v, self.attention, causal=self.causal, chunk_size=chunk_size, **options
                )
            else:
                out, weights, keys = streamed_attention(q, k, v, held, self.attention, last_only=last_only, **options)
                new_state = AttentionState(ema_state, keys)
            if last_only:
                x, update, reset, candidate = (
                    last_real_position(part, padding_mask) for part in (x, update, reset, candidate)
                )
                out = out if state is not None else last_real_position(out, padding_mask)
                padding_mask = last_padding(padding_mask)

            hidden = self.dropout(again(self.activation, candidate + self.h_proj(again(silu_gate, out, reset))))
            y = update_gate(x, hidden.to(x.dtype), update.to(x.dtype))
            if self.norm is not None and not self.prenorm:
                y = self.norm(y, padding_mask=padding_mask)
        y = zero_padding(y.to(x.dtype), padding_mask)
        return results(y, None if weights is None else Trace(attention_weights=(weights,)), new_state)

    def _check_streams(self) -> None:
        if not self.causal:
            raise ValueError(
                "A state needs `causal=True`, but this MovingAverageGatedAttention has causal=False: its tokens see "
                "later ones. Call it without a state on the whole sequence."
            )

    def _check_state(self, state: AttentionState, batch: int, chunk_size: int | None) -> None:
        self._check_streams()
        check_state(state, AttentionState, "MovingAverageGatedAttention")
        keys: KeyState = state.keys
        made_under = keys.keys.shape[1] if isinstance(keys, ChunkKeys) else getattr(keys, "chunk_size", None)
        if made_under != chunk_size:
            raise ValueError(
                f"`state` was made under chunk_size={made_under}, but the layer now has chunk_size={chunk_size}; "
                "a stream keeps the chunk size it began with."
            )
        if not isinstance(keys, WorkingKeys):  # made of a state that has been looked at
            check_state_shape("state.keys.keys", keys.keys, (keys.keys.shape[1], self.qk_dim))
            check_state_shape("state.keys.values", keys.values, (keys.keys.shape[1], self.value_dim))
        check_batch("state", keys.length.shape[0], batch)

    def _span(self, length: int, chunk_size: int | None, state: AttentionState | None) -> int:
        """Slots from the first to the last position that attention compares."""
        if state is None:
            return length if chunk_size is None else min(length, chunk_size)
        keys: KeyState = state.keys
        if isinstance(keys, WorkingKeys):
            if chunk_size is None and keys.begin is not None:
                return keys.begin + 1
            looks = chunk_size is None and values_readable(keys.length)
            return int(keys.length.max()) + 1 if looks else keys.room.shape[1]
        held = keys.keys.shape[1]
        return held + length if isinstance(keys, GrowingKeys) else held

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return (
            f"{self.embed_dim}, {self.qk_dim}, value_dim={self.value_dim}, causal={self.causal}, "
            f"chunk_size={self.chunk_size}, prenorm={self.prenorm}"
        )

    if TYPE_CHECKING:
        __call__ = forward


def _ema_dim(ema: object) -> int:
    if not isinstance(ema, (int, float)):
        raise TypeError(
            "`ema` must be a number of averages, or a module called like a MultiDimensionDampedEMA, but is "
            f"{ema!r}; `ema=16` is the usual number."
        )
    return check_size("ema", ema)


def refuse_future(module: nn.Module) -> None:
    """Raises if anything in a causal module would show it the future."""
    for name, part in module.named_modules():
        where = f"`{name}`" if name else type(module).__name__
        if isinstance(part, MultiDimensionDampedEMA) and not part.causal:
            raise ValueError(
                f"A causal layer needs an average that looks back only, but {where} is bidirectional; "
                "make it with causal=True."
            )
        if isinstance(part, MovingAverageGatedAttention) and not part.causal:
            raise ValueError(
                f"A causal stack needs attention that looks back only, but {where} has causal=False; "
                "make it with causal=True."
            )
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"A causal layer needs a norm of each token alone, but {where} is a {type(part).__name__}, whose "
                'statistics include later tokens; use "layernorm", "scalenorm" or "rmsnorm".'
            )
