"""MEGA (Moving Average Equipped Gated Attention) as independent PyTorch building blocks."""

from megablocks import state
from megablocks.functional.backends import EMABackends, ema_backend
from megablocks.functional.ema import damped_ema
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
    BeamSearchOutput,
    GenerationOutput,
    GenerationStep,
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    beam_search,
    generate,
    load,
    preset,
    save,
    stream,
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
    "BeamSearchOutput",
    "EMABackends",
    "GatedCrossAttention",
    "GenerationOutput",
    "GenerationStep",
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
    "beam_search",
    "damped_ema",
    "ema_backend",
    "generate",
    "load",
    "mega_decoder",
    "mega_encoder",
    "preset",
    "save",
    "state",
    "stream",
]
