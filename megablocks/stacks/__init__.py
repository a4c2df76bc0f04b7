"""Stacks: the order of layers, their residuals and states. They know no vocabulary."""

from megablocks.stacks.decoder import MegaDecoder, mega_decoder
from megablocks.stacks.decoder_layer import MegaDecoderLayer
from megablocks.stacks.encoder import MegaEncoder, MegaEncoderLayer, mega_encoder

__all__ = [
    "MegaDecoder",
    "MegaDecoderLayer",
    "MegaEncoder",
    "MegaEncoderLayer",
    "mega_decoder",
    "mega_encoder",
]
