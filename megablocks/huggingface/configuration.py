"""The configuration of the Hugging Face classes, in the names that transformers 4.40.2 gave its parameters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from megablocks._checks import (
    check_even,
    check_flag,
    check_number,
    check_optional_size,
    check_probability,
    check_size,
    lookup,
)
from megablocks.functional.attention_function import ATTENTION
from megablocks.layers.norm import NORMS

POSITION_BIASES = ("rotary", "simple")

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "ema_projection_size",
    "shared_representation_size",
    "nffn_hidden_size",
    "max_positions",
    "type_vocab_size",
)
_PROBABILITIES = (
    "dropout_prob",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "nffn_activation_dropout_prob",
)
_FLAGS = (
    "bidirectional",
    "use_chunking",
    "normalize_before_mega",
    "norm_affine",
    "use_feature_dropout",
    "use_normalized_ffn",
    "normalize_before_ffn",
    "add_token_type_embeddings",
    "add_lm_hidden_dense_layer",
    "is_decoder",
    "add_cross_attention",
    "tie_word_embeddings",
    "legacy_rms_norm",
)
_DEVIATIONS = ("initializer_range", "ema_delta_alpha_range", "ema_beta_range", "ema_gamma_omega_range")


class MegaConfig(PreTrainedConfig):
    r"""Says what a Mega model is like; files written by transformers 4.40.2 are read as they are.

    Args:
        vocab_size: Number of tokens.
        hidden_size: Model width $D$.
        num_hidden_layers: Number of layers.
        intermediate_size: Width $V$ of values and reset gate.
        ema_projection_size: Averages $N$ kept for each channel.
        bidirectional: Whether the averages run both ways. A model with causal attention needs `False`.
        shared_representation_size: Width $Z$ of queries and keys; even, for the rotary bias.
        use_chunking: Whether attention stays inside chunks.
        chunk_size: Chunk length $C$, if `use_chunking`.
        truncation: Lags that the averages keep; `None` for all.
        normalize_before_mega: Whether self- and cross-attention normalise their input rather than their output.
        normalization_type: `"scalenorm"`, `"layernorm"`, `"rmsnorm"`, `"batchnorm"` or `"syncbatchnorm"`; the last two
            not in causal models.
        norm_affine: Whether norms learn a scale (and `"layernorm"` a shift).
        activation: Name of the activation of values, candidates and feed-forward layers, as in transformers' `ACT2FN`.
        attention_activation: `"softmax"`, `"laplace"` or `"relu2"`.
        dropout_prob: Probability of dropout on averages and on what each layer adds.
        hidden_dropout_prob: Probability of dropout on values, and before the head of `MegaForMultipleChoice`.
        attention_probs_dropout_prob: Probability of dropout on attention weights.
        use_feature_dropout: Whether dropout drops whole channels of a row over time.
        use_normalized_ffn: Whether layers have a feed-forward part.
        nffn_hidden_size: Its inner width $F$.
        normalize_before_ffn: Whether it normalises its input rather than its output.
        nffn_activation_dropout_prob: Probability of dropout on its activations.
        max_positions: Size of the simple bias: the most slots, padding included, that attention compares. The rotary
            bias has no limit.
        add_token_type_embeddings: Whether tokens have types, which are embedded and added.
        type_vocab_size: Number of types.
        initializer_range: Standard deviation of new weights.
        ema_delta_alpha_range: Standard deviation of new decays and dampings.
        ema_beta_range: Standard deviation of new expansions around +1 and -1.
        ema_gamma_omega_range: Standard deviation of new projections and skips.
        pad_token_id: Token of padding, whose embedding stays zero; `None` for none. It is the attention mask that says
            where padding is.
        bos_token_id: Token of the beginning.
        eos_token_id: Token, or tokens, of the end.
        relative_positional_bias: `"rotary"` or `"simple"`.
        classifier_dropout: Probability of dropout in the heads of sequence and token classification; `None` for
            `hidden_dropout_prob`.
        use_cache: Whether a causal model returns a cache.
        add_lm_hidden_dense_layer: Whether the heads of language models begin with a dense layer.
        is_decoder: Whether attention is causal. `MegaForCausalLM` makes it so.
        add_cross_attention: Whether layers attend to `encoder_hidden_states`; needs `is_decoder`.
        tie_word_embeddings: Whether the heads of language models share the embedding's weights.
        legacy_rms_norm: Whether `"rmsnorm"` multiplies by its weight without normalising, as in transformers 4.40.2.

    Raises:
        ValueError: If a size, probability or name is not allowed.
        TypeError: If a value has another type.

    Example:
        >>> from megablocks.huggingface import MegaConfig
        >>> MegaConfig(hidden_size=64, relative_positional_bias="simple").max_positions
        2048
    """

    model_type = "mega"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 30522
    hidden_size: int = 128
    num_hidden_layers: int = 4
    intermediate_size: int = 256
    ema_projection_size: int = 16
    bidirectional: bool = True
    shared_representation_size: int = 64
    use_chunking: bool = False
    chunk_size: int | None = -1
    truncation: int | None = None
    normalize_before_mega: bool = True
    normalization_type: str = "scalenorm"
    norm_affine: bool = True
    activation: str = "silu"
    attention_activation: str = "softmax"
    dropout_prob: float = 0.1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    use_feature_dropout: bool = False
    use_normalized_ffn: bool = True
    nffn_hidden_size: int = 256
    normalize_before_ffn: bool = True
    nffn_activation_dropout_prob: float = 0.1
    max_positions: int = 2048
    add_token_type_embeddings: bool = False
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    ema_delta_alpha_range: float = 0.2
    ema_beta_range: float = 0.02
    ema_gamma_omega_range: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    relative_positional_bias: str = "rotary"
    classifier_dropout: float | None = None
    use_cache: bool = True
    add_lm_hidden_dense_layer: bool = True
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    legacy_rms_norm: bool = False
    num_attention_heads: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks what stands for itself; what depends on the model is checked when one is built."""
        super().__post_init__(**kwargs)
        if self.chunk_size is None:  # transformers 4.40.2 compares it with 0
            self.chunk_size = -1
        self.check_values()

    @property
    def attention_chunk(self) -> int | None:
        """Chunk length of self-attention, `None` where it is not chunked."""
        return self.chunk_size if self.use_chunking else None

    @property
    def bias_centre(self) -> int:
        """Positions on each side of the middle of a simple bias's table, as transformers 4.40.2 stores it.

        It indexed the table around `chunk_size` wherever that was given, with or without chunking.
        """
        given = self.chunk_size is not None and self.chunk_size >= 0
        return self.chunk_size if given else self.max_positions  # type: ignore[return-value]

    def check_values(self) -> None:
        """Raises unless sizes, probabilities and names are allowed."""
        for name in _SIZES:
            check_size(name, getattr(self, name))
        for name in _PROBABILITIES:
            check_probability(name, getattr(self, name))
        for name in _DEVIATIONS:
            check_number(name, getattr(self, name), minimum=0)
        if self.classifier_dropout is not None:
            check_probability("classifier_dropout", self.classifier_dropout)
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        check_optional_size("truncation", self.truncation, "all lags")
        lookup("normalization_type", self.normalization_type, dict.fromkeys(NORMS))
        lookup("attention_activation", self.attention_activation, ATTENTION)
        lookup("activation", self.activation, ACT2FN)
        lookup("relative_positional_bias", self.relative_positional_bias, dict.fromkeys(POSITION_BIASES))
        if self.relative_positional_bias == "rotary":
            check_even("shared_representation_size", self.shared_representation_size, "a rotary bias")
        if self.use_chunking and not (isinstance(self.chunk_size, int) and self.chunk_size >= 1):
            raise ValueError(
                f"`chunk_size` must be at least 1 with `use_chunking=True`, but is {self.chunk_size!r}; "
                "set it, or use `use_chunking=False`."
            )
        known = isinstance(self.pad_token_id, int) and -self.vocab_size <= self.pad_token_id < self.vocab_size
        if self.pad_token_id is not None and not known:
            raise ValueError(
                f"`pad_token_id` must be in [0, {self.vocab_size}), the vocabulary, but is {self.pad_token_id!r}; "
                "use `None` for none."
            )

    def check_direction(self) -> None:
        """Raises unless the parts of a model agree on who sees whom."""
        if self.is_decoder and self.bidirectional:
            raise ValueError(
                "A causal model needs averages that look back only, but has `bidirectional=True`, with which every "
                "token would see the next ones; use `bidirectional=False`, or `is_decoder=False` for an encoder."
            )
        if self.is_decoder and self.normalization_type in ("batchnorm", "syncbatchnorm"):
            raise ValueError(
                f"A causal model needs a norm of each token alone, but has `normalization_type` "
                f'{self.normalization_type!r}, whose statistics include later tokens; use "layernorm", "scalenorm" or '
                '"rmsnorm".'
            )
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError(
                "`add_cross_attention` needs a causal model, but `is_decoder` is False; use `is_decoder=True` and "
                "`bidirectional=False`, or `add_cross_attention=False`."
            )

    def causal(self) -> MegaConfig:
        """Returns the configuration of a causal model: itself, or a copy with `is_decoder=True`."""
        if self.is_decoder:
            return self
        made = copy.deepcopy(self)
        made.is_decoder = True
        return made

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the configuration that a dictionary describes, and warns where its weights mean something else.

        Warns:
            UserWarning: If it stems from transformers 4.40.2, whose `"rmsnorm"` does not normalise.
        """
        if config_dict.get("normalization_type") == "rmsnorm" and "legacy_rms_norm" not in config_dict | kwargs:
            warnings.warn(
                "This configuration says `normalization_type='rmsnorm'` and was written by transformers 4.40.2 or "
                "earlier, whose RMSNorm multiplies by its weight without normalising. It is loaded with a norm that "
                "normalises. To reproduce what the weights were trained with, pass `legacy_rms_norm=True`; pass "
                "`legacy_rms_norm=False` to be told no more.",
                UserWarning,
                stacklevel=2,
            )
        return super().from_dict(config_dict, **kwargs)
