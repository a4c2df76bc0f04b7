"""The Mega model under a classifier, for transformers: of sequences, of tokens, of choices, of where an answer stands.

Rows are pooled at their first real token. Losses leave padding out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from megablocks.huggingface import losses
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.masks import first_real, own_padding
from megablocks.huggingface.modeling import MegaModel, MegaPreTrainedModel, inside


class MegaClassificationHead(nn.Module):
    r"""Returns $W_2 \tanh(W_1 x_t + b_1) + b_2$ at the first real token of each row, dropout before each map.

    Args:
        config: The model's configuration.

    Shape:
        - `x`: $(B, L, D)$; `padding_mask`: $(B, L)$, bool, `True` at padding; output: $(B, \text{labels})$.
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = _classifier_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Returns the logits of each row."""
        hidden = torch.tanh(self.dense(self.dropout(first_real(x, padding_mask))))
        logits: Tensor = self.out_proj(self.dropout(hidden))
        return logits


class MegaForSequenceClassification(MegaPreTrainedModel):
    r"""Sorts sequences into classes, one or several, or predicts numbers.

    Args:
        config: Says what the model is like; `num_labels` how many logits there are, `problem_type` what they mean
            (`None` to tell from the labels of each call).

    Shape:
        - Inputs and hidden states: as in `MegaModel`; `labels`: $(B,)$ integers for one class of each row,
          $(B, \text{labels})$ for several, numbers for a regression.
        - `logits`: $(B, \text{labels})$.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaForSequenceClassification
        >>> model = MegaForSequenceClassification(MegaConfig(vocab_size=100, hidden_size=32, num_labels=3))
        >>> model(torch.randint(100, (2, 10)), labels=torch.tensor([2, 0])).logits.shape
        torch.Size([2, 3])
    """

    _loss_function = staticmethod(losses.classification_loss)

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.classifier = MegaClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Returns logits, with `labels` a loss, and what was asked for."""
        outputs = self._encoded(
            input_ids, attention_mask, token_type_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        x = outputs.last_hidden_state
        logits = self.classifier(x, own_padding(attention_mask, x))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return self._returned(SequenceClassifierOutput(loss=loss, logits=logits, **inside(outputs)), return_dict)


class MegaForMultipleChoice(MegaPreTrainedModel):
    r"""Chooses among several continuations of each row: each is pooled and gets one logit.

    Args:
        config: Says what the model is like.

    Shape:
        - `input_ids`, `token_type_ids`, `attention_mask`: $(B, \text{choices}, L)$; `inputs_embeds`:
          $(B, \text{choices}, L, D)$; `labels`: $(B,)$.
        - `logits`: $(B, \text{choices})$; hidden states and attentions: those of all choices, one row each.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaForMultipleChoice
        >>> model = MegaForMultipleChoice(MegaConfig(vocab_size=100, hidden_size=32))
        >>> model(torch.randint(100, (2, 4, 10))).logits.shape
        torch.Size([2, 4])
    """

    _loss_function = staticmethod(losses.choice_loss)

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.mega = MegaModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Returns logits, with `labels` a loss, and what was asked for."""
        choices = next((given.shape[1] for given in (input_ids, inputs_embeds) if given is not None), 1)
        outputs = self._encoded(
            _one_row_each(input_ids),
            _one_row_each(attention_mask),
            _one_row_each(token_type_ids),
            _one_row_each(inputs_embeds),
            output_attentions,
            output_hidden_states,
        )
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, **kwargs)
        return self._returned(MultipleChoiceModelOutput(loss=loss, logits=logits, **inside(outputs)), return_dict)


class MegaForTokenClassification(MegaPreTrainedModel):
    r"""Sorts each token into one of several classes.

    Args:
        config: Says what the model is like; `num_labels` how many classes there are.

    Shape:
        - Inputs and hidden states: as in `MegaModel`; `labels`: $(B, L)$, -100 where they do not count.
        - `logits`: $(B, L, \text{labels})$.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaForTokenClassification
        >>> model = MegaForTokenClassification(MegaConfig(vocab_size=100, hidden_size=32, num_labels=5))
        >>> model(torch.randint(100, (2, 10))).logits.shape
        torch.Size([2, 10, 5])
    """

    _loss_function = staticmethod(losses.token_loss)

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Returns logits, with `labels` a loss, and what was asked for."""
        outputs = self._encoded(
            input_ids, attention_mask, token_type_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        x = outputs.last_hidden_state
        logits = self.classifier(self.dropout(x))
        loss = None
        if labels is not None:
            padding_mask = own_padding(attention_mask, x)
            loss = self.loss_function(
                logits=logits, labels=labels, config=self.config, padding_mask=padding_mask, **kwargs
            )
        return self._returned(TokenClassifierOutput(loss=loss, logits=logits, **inside(outputs)), return_dict)


class MegaForQuestionAnswering(MegaPreTrainedModel):
    r"""Finds where in a sequence an answer begins and ends.

    Args:
        config: Says what the model is like; `num_labels` must be 2.

    Shape:
        - Inputs and hidden states: as in `MegaModel`; `start_positions`, `end_positions`: $(B,)$, slots of the
          sequence; what lies outside of it, or at padding, does not count.
        - `start_logits`, `end_logits`: $(B, L)$.

    Raises:
        ValueError: If `num_labels` is not 2, or arguments do not fit together.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaForQuestionAnswering
        >>> model = MegaForQuestionAnswering(MegaConfig(vocab_size=100, hidden_size=32))
        >>> model(torch.randint(100, (2, 10))).start_logits.shape
        torch.Size([2, 10])
    """

    _loss_function = staticmethod(losses.span_loss)

    def __init__(self, config: MegaConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(
                f"`num_labels` must be 2 for question answering, a start and an end, but is {config.num_labels}."
            )
        self.num_labels = config.num_labels
        self.mega = MegaModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Returns logits, with both positions a loss, and what was asked for."""
        outputs = self._encoded(
            input_ids, attention_mask, token_type_ids, inputs_embeds, output_attentions, output_hidden_states
        )
        x = outputs.last_hidden_state
        start_logits, end_logits = self.qa_outputs(x).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(
                start_logits=start_logits,
                end_logits=end_logits,
                start_positions=start_positions,
                end_positions=end_positions,
                padding_mask=own_padding(attention_mask, x),
                **kwargs,
            )
        return self._returned(
            QuestionAnsweringModelOutput(
                loss=loss,
                start_logits=start_logits.contiguous(),
                end_logits=end_logits.contiguous(),
                **inside(outputs),
            ),
            return_dict,
        )


def _classifier_dropout(config: MegaConfig) -> nn.Dropout:
    given = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if given is None else given)


def _one_row_each(given: Tensor | None) -> Tensor | None:
    """Puts choices (B, choices, ...) among the rows."""
    return None if given is None else given.flatten(0, 1)
