"""MEGA (Moving Average Equipped Gated Attention) as independent PyTorch building blocks."""

from megablocks import state
from megablocks.functional.ema import EMABackends, damped_ema, ema_backend
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    RMSNorm,
    RotaryRelativeBias,
    ScaleNorm,
    SequenceNorm,
    SimpleRelativeBias,
    Trace,
)
from megablocks.models import (
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    load,
    preset,
    save,
)
from megablocks.stacks import (
    MegaDecoder,
    MegaDecoderLayer,
    MegaEncoder,
    MegaEncoderLayer,
    mega_decoder,
    mega_encoder,
)

__all__ = [
    "EMABackends",
    "GatedCrossAttention",
    "MegaClassifier",
    "MegaDecoder",
    "MegaDecoderLayer",
    "MegaEncoder",
    "MegaEncoderLayer",
    "MegaLanguageModel",
    "MegaSeq2Seq",
    "MovingAverageGatedAttention",
    "MultiDimensionDampedEMA",
    "NormalizedFFN",
    "RMSNorm",
    "RotaryRelativeBias",
    "ScaleNorm",
    "SequenceNorm",
    "SimpleRelativeBias",
    "Trace",
    "damped_ema",
    "ema_backend",
    "load",
    "mega_decoder",
    "mega_encoder",
    "preset",
    "save",
    "state",
]
