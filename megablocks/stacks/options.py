"""The options that the builders of encoder and decoder share, and the parts that they make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from torch import Tensor, nn

from megablocks._checks import check_size, lookup
from megablocks.functional.attention_function import AttentionFunction
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    RotaryRelativeBias,
    SequenceNorm,
    SimpleRelativeBias,
)
from megablocks.layers.norm import sequence_norm


class LayerOptions(TypedDict, total=False):
    """Keyword options of `mega_encoder` and `mega_decoder` that say what each layer is like."""

    qk_dim: int
    """Width $Z$ of queries and keys. Required."""
    value_dim: int | None
    """Width $V$ of values; `None`, the default, for $2D$."""
    ffn_dim: int | None
    """Inner width $F$ of the feed-forward layers; `None`, the default, for none."""
    ema_dim: int
    """Averages $N$ per channel. Default 16."""
    truncation: int | None
    """Lags that the averages keep; `None`, the default, for all."""
    chunk_size: int | None
    """Chunk length $C$ of self-attention; `None`, the default, for no chunks."""
    attention: str | Callable[[Tensor], Tensor] | AttentionFunction
    """Attention function, as in `MovingAverageGatedAttention`. Default `"softmax"`."""
    activation: str | Callable[[Tensor], Tensor]
    """Activation of all layers. Default `"silu"`."""
    position_bias: str | None
    """`"rotary"` (default), `"simple"`, which needs `max_positions`, or `None`."""
    max_positions: int | None
    """Size of each layer's simple bias."""
    norm: str | None
    """Name of the norm of all layers. Default `"layernorm"`."""
    prenorm: bool
    """Whether layers normalise their input rather than their output. Default `True`."""
    dropout: float
    """Probability of dropout on what each layer adds. Default 0."""
    attention_dropout: float
    """Probability of dropout on attention weights. Default 0."""
    hidden_dropout: float
    """Probability of dropout on values and inside the feed-forward layers. Default 0."""
    feature_dropout: bool
    """Whether `dropout` and `hidden_dropout` drop whole channels of a row over time. Default `False`."""


class Parts:
    """Makes the layers of a stack from one set of options.

    Args:
        options: See `LayerOptions`.
    """

    def __init__(
        self,
        *,
        qk_dim: int,
        value_dim: int | None = None,
        ffn_dim: int | None = None,
        ema_dim: int = 16,
        truncation: int | None = None,
        chunk_size: int | None = None,
        attention: str | Callable[[Tensor], Tensor] | AttentionFunction = "softmax",
        activation: str | Callable[[Tensor], Tensor] = "silu",
        position_bias: str | None = "rotary",
        max_positions: int | None = None,
        norm: str | None = "layernorm",
        prenorm: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feature_dropout: bool = False,
    ) -> None:
        function = attention.weights if isinstance(attention, AttentionFunction) else attention
        for name, value in {"norm": norm, "activation": activation, "attention": function}.items():
            if isinstance(value, nn.Module):
                raise TypeError(
                    f"`{name}` must be a name or a function here, because all layers would share one module, but is a "
                    f"{type(value).__name__}; make the layers yourself, each with a module of its own."
                )
        self.qk_dim, self.value_dim, self.ffn_dim = qk_dim, value_dim, ffn_dim
        self.ema_dim, self.truncation, self.chunk_size = ema_dim, truncation, chunk_size
        self.attention = attention
        self.make_bias = _bias_maker(position_bias, qk_dim, max_positions)
        self.norm, self.prenorm = norm, prenorm
        # Arguments by the name that every layer that has them gives them.
        self.common: dict[str, Any] = {"activation": activation, "norm": norm, "prenorm": prenorm}
        self.dropouts: dict[str, Any] = {
            "dropout": dropout,
            "hidden_dropout": hidden_dropout,
            "feature_dropout": feature_dropout,
        }
        self.attention_dropout = attention_dropout

    def self_attention(self, embed_dim: int, *, causal: bool) -> MovingAverageGatedAttention:
        """Returns a new moving-average gated attention layer."""
        ema = MultiDimensionDampedEMA(embed_dim, self.ema_dim, causal=causal, truncation=self.truncation)
        return MovingAverageGatedAttention(
            embed_dim,
            self.qk_dim,
            value_dim=self.value_dim,
            ema=ema,
            causal=causal,
            chunk_size=self.chunk_size,
            attention=self.attention,
            position_bias=self.make_bias(),
            attention_dropout=self.attention_dropout,
            **self.common,
            **self.dropouts,
        )

    def cross_attention(self, embed_dim: int) -> GatedCrossAttention:
        """Returns a new gated cross-attention layer."""
        return GatedCrossAttention(
            embed_dim,
            self.qk_dim,
            attention=self.attention,
            position_bias=self.make_bias(),
            attention_dropout=self.attention_dropout,
            **self.common,
            **self.dropouts,
        )

    def feed_forward(self, embed_dim: int) -> NormalizedFFN | None:
        """Returns a new feed-forward layer, or none where the options ask for none."""
        if self.ffn_dim is None:
            return None
        return NormalizedFFN(embed_dim, self.ffn_dim, **self.common, **self.dropouts)

    def final_norm(self, embed_dim: int, *, affine: bool) -> SequenceNorm | None:
        """Returns the norm that ends a pre-norm stack; a post-norm stack needs none."""
        return sequence_norm(embed_dim, self.norm, affine=affine) if self.prenorm else None


def layer_parts(options: Mapping[str, Any]) -> Parts:
    """Returns what makes layers with these options.

    Raises:
        TypeError: If an option is unknown, or `qk_dim` is missing.
    """
    known = LayerOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"`{name}` is not an option of a layer; those are {', '.join(known)}.")
    if "qk_dim" not in options:
        raise TypeError("`qk_dim` must be given: it is the width of queries and keys.")
    return Parts(**options)


def _bias_maker(name: str | None, qk_dim: int, max_positions: int | None) -> Callable[[], nn.Module | None]:
    if name == "simple" and max_positions is None:
        raise ValueError('`max_positions` must be given for position_bias="simple", but is None.')
    if name != "simple" and max_positions is not None:
        raise ValueError(
            f"`max_positions` is the size of a simple bias, but position_bias is {name!r}, which has no such limit; "
            'leave it out, or use position_bias="simple".'
        )
    size = None if max_positions is None else check_size("max_positions", max_positions)
    makers: dict[str, Callable[[], nn.Module]] = {
        "rotary": lambda: RotaryRelativeBias(qk_dim),
        "simple": lambda: SimpleRelativeBias(size or 1),
    }
    return (lambda: None) if name is None else lookup("position_bias", name, makers, others=", or None")
