"""The Mega language models for transformers.

Logits at padding come from zeros, not from tokens. Losses leave padding out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, MaskedLMOutput
from transformers.utils import logging

from megablocks.huggingface import losses
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.masks import own_padding
from megablocks.huggingface.modeling import MegaModel, MegaPreTrainedModel, inside

logger = logging.get_logger(__name__)

_EMBEDDING = "mega.embedding_layer.word_embeddings.weight"


class MegaForCausalLM(MegaPreTrainedModel, GenerationMixin):
    r"""Predicts the next token, and generates.

    Attention is always causal: a configuration that says otherwise is copied with `is_decoder=True`. With
    `add_cross_attention` it is the decoder of an `EncoderDecoderModel`.

    Args:
        config: Says what the model is like; `bidirectional` must be `False`.

    Shape:
        - Inputs and hidden states: as in `MegaModel`; `labels`: $(B, L)$, the input itself, -100 where it does not
          count: each token is predicted by the one before.
        - `logits_to_keep`: how many of the last positions get logits, or which; 0 for all.
        - `logits`: $(B, L, \text{vocab})$.

    Raises:
        ValueError: If the configuration has `bidirectional=True`, or arguments do not fit together.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaForCausalLM
        >>> config = MegaConfig(vocab_size=100, hidden_size=32, bidirectional=False, use_chunking=True, chunk_size=8)
        >>> model = MegaForCausalLM(config).eval()
        >>> tokens = torch.randint(3, 100, (2, 10))
        >>> model(tokens, labels=tokens).loss.shape
        torch.Size([])
        >>> new = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
        >>> new.shape[1] <= 15
        True
    """

    _tied_weights_keys = {"lm_head.weight": _EMBEDDING}  # noqa: RUF012
    _loss_function = staticmethod(losses.next_token_loss)

    def __init__(self, config: MegaConfig) -> None:
        config = config.causal()
        super().__init__(config)
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = _lm_dense(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Returns the map to logits."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Puts another map to logits in its place."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """Returns logits, with `labels` a loss, in evaluation without them a cache, and what was asked for."""
        if labels is not None and use_cache is None:
            use_cache = False
        outputs = self.mega(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(_through(self.dense, x[:, kept]))
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            padding_mask = own_padding(attention_mask, x)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                padding_mask=None if padding_mask is None else padding_mask[:, kept],
                **kwargs,
            )
        return self._returned(
            CausalLMOutputWithCrossAttentions(
                loss=loss,
                logits=logits,
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                cross_attentions=outputs.cross_attentions,
            ),
            return_dict,
        )


class MegaForMaskedLM(MegaPreTrainedModel):
    r"""Predicts tokens that were masked.

    Args:
        config: Says what the model is like.

    Shape:
        - Inputs and hidden states: as in `MegaModel`; `labels`: $(B, L)$, -100 where they do not count.
        - `logits`: $(B, L, \text{vocab})$.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaForMaskedLM
        >>> model = MegaForMaskedLM(MegaConfig(vocab_size=100, hidden_size=32))
        >>> model(torch.randint(100, (2, 10))).logits.shape
        torch.Size([2, 10, 100])
    """

    _tied_weights_keys = {"mlm_head.weight": _EMBEDDING}  # noqa: RUF012
    _loss_function = staticmethod(losses.token_loss)

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if config.is_decoder:
            logger.warning_once(
                "A MegaForMaskedLM with `is_decoder=True` sees what stands before a masked token only; use "
                "`is_decoder=False` for attention to both sides."
            )
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dense = _lm_dense(config)
        self.mlm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Returns the map to logits."""
        return self.mlm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Puts another map to logits in its place."""
        self.mlm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Returns logits, with `labels` a loss, and what was asked for."""
        outputs = self._encoded(
            input_ids,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        x = outputs.last_hidden_state
        logits = self.mlm_head(_through(self.dense, x))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                padding_mask=own_padding(attention_mask, x),
                **kwargs,
            )
        return self._returned(MaskedLMOutput(loss=loss, logits=logits, **inside(outputs)), return_dict)


def _lm_dense(config: MegaConfig) -> nn.Linear | None:
    return nn.Linear(config.hidden_size, config.hidden_size) if config.add_lm_hidden_dense_layer else None


def _through(dense: nn.Linear | None, x: Tensor) -> Tensor:
    return x if dense is None else torch.tanh(dense(x))
