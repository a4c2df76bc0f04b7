"""The stack that a configuration describes, made of megablocks' own layers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from megablocks.huggingface.configuration import MegaConfig
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    RotaryRelativeBias,
    SequenceNorm,
    SimpleRelativeBias,
)
from megablocks.stacks import MegaDecoder, MegaDecoderLayer, MegaEncoder, MegaEncoderLayer
from megablocks.stacks.stack import recomputing_options


class UnnormalizedRMSNorm(nn.Module):
    r"""What transformers 4.40.2 calls RMSNorm: $y_d = w_d\, x_d$, without a norm.

    Args:
        embed_dim: $D$.
        affine: Whether to learn $w$; without it the input is returned as it is.

    Shape:
        - `x`: $(\dots, D)$; output: the same.
    """

    def __init__(self, embed_dim: int, *, affine: bool = True) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(embed_dim)) if affine else None
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scaled tokens."""
        return x if self.weight is None else x * self.weight

    if TYPE_CHECKING:
        weight: nn.Parameter | None
        __call__ = forward


class _Checkpointed(GradientCheckpointingLayer):
    """A layer that transformers may compute again in the backward pass; batches are then not counted twice."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_gradient_checkpointing_func" and not getattr(value, "keywords", {}).get("use_reentrant", True):
            options = recomputing_options(self)
            value = partial(value, **options) if options else value
        super().__setattr__(name, value)


class EncoderLayer(MegaEncoderLayer, _Checkpointed):
    """A `MegaEncoderLayer` whose activations transformers may checkpoint."""


class DecoderLayer(MegaDecoderLayer, _Checkpointed):
    """A `MegaDecoderLayer` whose activations transformers may checkpoint."""

    def __call__(self, x: Tensor, memory: Tensor | None = None, **given: Any) -> Any:
        """Calls the layer: checkpoints ask for gradients of what stands first, and so the memory does."""
        return super().__call__(x, memory, **given)


def mega_stack(config: MegaConfig) -> MegaEncoder | MegaDecoder:
    """Returns a decoder where the configuration says `is_decoder`, else an encoder; neither has a final norm."""
    if not config.is_decoder:
        return MegaEncoder(
            EncoderLayer(_self_attention(config), _feed_forward(config)) for _ in range(config.num_hidden_layers)
        )
    return MegaDecoder(
        DecoderLayer(
            _self_attention(config),
            _cross_attention(config) if config.add_cross_attention else None,
            _feed_forward(config),
        )
        for _ in range(config.num_hidden_layers)
    )


def _self_attention(config: MegaConfig) -> MovingAverageGatedAttention:
    return MovingAverageGatedAttention(
        config.hidden_size,
        config.shared_representation_size,
        value_dim=config.intermediate_size,
        ema=MultiDimensionDampedEMA(
            config.hidden_size,
            config.ema_projection_size,
            causal=not config.bidirectional,
            truncation=config.truncation,
        ),
        causal=config.is_decoder,
        chunk_size=config.attention_chunk,
        **_attention_options(config),
    )


def _cross_attention(config: MegaConfig) -> GatedCrossAttention:
    return GatedCrossAttention(config.hidden_size, config.shared_representation_size, **_attention_options(config))


def _feed_forward(config: MegaConfig) -> NormalizedFFN | None:
    if not config.use_normalized_ffn:
        return None
    return NormalizedFFN(
        config.hidden_size,
        config.nffn_hidden_size,
        prenorm=config.normalize_before_ffn,
        hidden_dropout=config.nffn_activation_dropout_prob,
        **_layer_options(config),
    )


def _attention_options(config: MegaConfig) -> dict[str, Any]:
    return {
        "attention": config.attention_activation,
        "position_bias": _position_bias(config),
        "prenorm": config.normalize_before_mega,
        "attention_dropout": config.attention_probs_dropout_prob,
        "hidden_dropout": config.hidden_dropout_prob,
        **_layer_options(config),
    }


def _layer_options(config: MegaConfig) -> dict[str, Any]:
    return {
        "activation": ACT2FN[config.activation],
        "norm": _norm(config),
        "dropout": config.dropout_prob,
        "feature_dropout": config.use_feature_dropout,
    }


def _position_bias(config: MegaConfig) -> nn.Module:
    if config.relative_positional_bias == "simple":
        return SimpleRelativeBias(config.max_positions)
    return RotaryRelativeBias(config.shared_representation_size)


def _norm(config: MegaConfig) -> SequenceNorm:
    norm: str | nn.Module = config.normalization_type
    if config.legacy_rms_norm and norm == "rmsnorm":
        norm = UnnormalizedRMSNorm(config.hidden_size, affine=config.norm_affine)
    return SequenceNorm(config.hidden_size, norm=norm, affine=config.norm_affine)
