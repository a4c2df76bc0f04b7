"""What a Mega model computes otherwise than transformers 4.40.2 did, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from megablocks.huggingface.classifiers import MegaForQuestionAnswering, MegaForSequenceClassification
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.language_models import MegaForCausalLM, MegaForMaskedLM
from megablocks.huggingface.modeling import MegaPreTrainedModel


class Subject(NamedTuple):
    """A model and the configuration that was written beside its weights."""

    model: MegaPreTrainedModel
    written: MegaConfig

    @property
    def config(self) -> MegaConfig:
        """What the model goes by."""
        config: MegaConfig = self.model.config
        return config


class Difference(NamedTuple):
    """One thing that transformers 4.40.2 did otherwise."""

    when: str
    """In which calls."""
    what: str
    """What happens now, and what happened then."""
    applies: Callable[[Subject], bool]
    """Whether a model is concerned."""
    always: bool = False
    """Whether every call is concerned, and not a situation alone."""


def differences(model: MegaPreTrainedModel, written: MegaConfig) -> list[Difference]:
    """Returns what a model computes otherwise than transformers 4.40.2 did, what concerns every call first.

    Args:
        model: As it was loaded.
        written: The configuration that stands beside its weights.
    """
    subject = Subject(model, written)
    found = [difference for difference in DIFFERENCES if difference.applies(subject)]
    return sorted(found, key=lambda difference: not difference.always)


def _heads_apart(of: Subject) -> bool:
    """Whether weights that the configuration ties were loaded with values of their own."""
    if not of.config.tie_word_embeddings or not isinstance(of.model, MegaForCausalLM | MegaForMaskedLM):
        return False
    return of.model.get_output_embeddings().weight is not of.model.get_input_embeddings().weight


def _pools(of: Subject) -> bool:
    pooler = getattr(of.model.base_model, "pooler", None)
    return pooler is not None or isinstance(of.model, MegaForSequenceClassification)


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "in every call",
        "the norm normalises; 4.40.2 multiplied by its weight alone. To reproduce that, load with "
        "`legacy_rms_norm=True`.",
        lambda of: of.config.normalization_type == "rmsnorm" and not of.config.legacy_rms_norm,
        always=True,
    ),
    Difference(
        "in every call",
        "attention is causal, though the configuration says `is_decoder=False`; in 4.40.2 every token saw the next "
        "ones, with a warning.",
        lambda of: isinstance(of.model, MegaForCausalLM) and not of.written.is_decoder,
        always=True,
    ),
    Difference(
        "in every call",
        "the head has the weights of its own that the files hold; in 4.40.2 it silently got those of the embedding, "
        "because the configuration says `tie_word_embeddings=True`. Say False to make the files agree.",
        _heads_apart,
        always=True,
    ),
    Difference(
        "in every step with a cache",
        "scores are divided by the number of keys, as without a cache; in 4.40.2 by 1.",
        lambda of: of.config.is_decoder and of.config.attention_activation != "softmax",
    ),
    Difference(
        "with a cache",
        "averages are truncated, as without a cache; in 4.40.2 they were not.",
        lambda of: of.config.is_decoder and of.config.truncation is not None,
    ),
    Difference(
        "in every step with a cache",
        "cross-attention knows which step it is; in 4.40.2 it was one ahead.",
        lambda of: of.config.add_cross_attention,
    ),
    Difference(
        "with left padding",
        "a row gives what it gives alone; in 4.40.2 it was NaN, or padding came into sight.",
        lambda of: of.config.is_decoder,
    ),
    Difference(
        "with several new tokens and a cache",
        "they are read at once; 4.40.2 raised an error.",
        lambda of: of.config.is_decoder,
    ),
    Difference(
        "in lengths that the chunk does not divide",
        "the last chunk is short; 4.40.2 raised an error.",
        lambda of: of.config.use_chunking,
    ),
    Difference(
        "with left padding",
        "chunks count real tokens; in 4.40.2 padding moved their borders.",
        lambda of: of.config.use_chunking and not of.config.is_decoder,
    ),
    Difference(
        "beyond `chunk_size`, without chunking",
        "a simple bias serves `max_positions` slots; in 4.40.2 `chunk_size`.",
        lambda of: (
            of.config.relative_positional_bias == "simple"
            and not of.config.use_chunking
            and of.config.bias_centre != of.config.max_positions
        ),
    ),
    Difference(
        "with left padding",
        "the first real token is pooled; in 4.40.2 position 0, padding or not.",
        _pools,
    ),
    Difference(
        "in the loss, with padding",
        "an answer is sought among real tokens; in 4.40.2 among padding too.",
        lambda of: isinstance(of.model, MegaForQuestionAnswering),
    ),
    Difference(
        "in training, with padding",
        "batch statistics leave padding out; in 4.40.2 they counted it.",
        lambda of: of.config.normalization_type in ("batchnorm", "syncbatchnorm"),
    ),
    Difference(
        "in training",
        "feature dropout drops channels of the values; in 4.40.2 whole chunks.",
        lambda of: of.config.use_feature_dropout,
    ),
)
"""All known ones; `docs/concepts/deviations.md` explains them."""
