"""Models: embeddings, heads and presets around the stacks. torch alone is enough."""

from megablocks.models.classifier import ContinuousEmbedding, MegaClassifier
from megablocks.models.embedding import TokenEmbedding
from megablocks.models.language_model import MegaLanguageModel
from megablocks.models.presets import PRESETS, preset
from megablocks.models.saving import load, save
from megablocks.models.seq2seq import MegaSeq2Seq

__all__ = [
    "PRESETS",
    "ContinuousEmbedding",
    "MegaClassifier",
    "MegaLanguageModel",
    "MegaSeq2Seq",
    "TokenEmbedding",
    "load",
    "preset",
    "save",
]
