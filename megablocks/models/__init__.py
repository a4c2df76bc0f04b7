"""Models: embeddings, heads and presets around the stacks. torch alone is enough."""

from megablocks.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from megablocks.models.beam_search import BeamSearchOutput, beam_search
from megablocks.models.classifier import ContinuousEmbedding, MegaClassifier
from megablocks.models.embedding import TokenEmbedding
from megablocks.models.evaluation import Evaluation, evaluate
from megablocks.models.generation import GenerationOutput, GenerationStep, generate, stream
from megablocks.models.language_model import MegaLanguageModel
from megablocks.models.presets import PRESETS, preset
from megablocks.models.saving import load, save
from megablocks.models.seq2seq import MegaSeq2Seq

__all__ = [
    "PRESETS",
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "BeamSearchOutput",
    "ContinuousEmbedding",
    "Evaluation",
    "GenerationOutput",
    "GenerationStep",
    "MegaClassifier",
    "MegaLanguageModel",
    "MegaSeq2Seq",
    "TokenEmbedding",
    "beam_search",
    "evaluate",
    "generate",
    "load",
    "preset",
    "save",
    "stream",
]
