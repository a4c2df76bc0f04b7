"""Layers: parameters, their initialisation, and one call down to `megablocks.functional`. Each is usable alone."""

from megablocks.layers.cross_attention import GatedCrossAttention
from megablocks.layers.ema import MultiDimensionDampedEMA
from megablocks.layers.feed_forward import NormalizedFFN
from megablocks.layers.gated_attention import MovingAverageGatedAttention
from megablocks.layers.norm import RMSNorm, ScaleNorm, SequenceNorm
from megablocks.layers.position import RotaryRelativeBias, SimpleRelativeBias
from megablocks.layers.trace import Trace

__all__ = [
    "GatedCrossAttention",
    "MovingAverageGatedAttention",
    "MultiDimensionDampedEMA",
    "NormalizedFFN",
    "RMSNorm",
    "RotaryRelativeBias",
    "ScaleNorm",
    "SequenceNorm",
    "SimpleRelativeBias",
    "Trace",
]
