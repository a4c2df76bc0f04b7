"""Which class transformers' `Auto...` classes find for a Mega configuration."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto as names

from megablocks.huggingface.classifiers import (
    MegaForMultipleChoice,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
)
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.language_models import MegaForCausalLM, MegaForMaskedLM
from megablocks.huggingface.modeling import MegaModel

AUTO_CLASSES: dict[Any, Any] = {
    AutoModel: MegaModel,
    AutoModelForPreTraining: MegaForMaskedLM,
    AutoModelForCausalLM: MegaForCausalLM,
    AutoModelForMaskedLM: MegaForMaskedLM,
    AutoModelForSequenceClassification: MegaForSequenceClassification,
    AutoModelForMultipleChoice: MegaForMultipleChoice,
    AutoModelForTokenClassification: MegaForTokenClassification,
    AutoModelForQuestionAnswering: MegaForQuestionAnswering,
}


CLASS_NAMES: tuple[tuple[Any, Any], ...] = (
    (names.MODEL_MAPPING_NAMES, MegaModel),
    (names.MODEL_FOR_PRETRAINING_MAPPING_NAMES, MegaForMaskedLM),
    (names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MegaForCausalLM),
    (names.MODEL_FOR_MASKED_LM_MAPPING_NAMES, MegaForMaskedLM),
    (names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, MegaForSequenceClassification),
    (names.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, MegaForMultipleChoice),
    (names.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, MegaForTokenClassification),
    (names.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, MegaForQuestionAnswering),
)
"""Where transformers looks a class up by its name: `Trainer`, to know whose labels are those of the next tokens."""


def register_auto_classes() -> None:
    """Makes the `Auto...` classes of transformers find those of this package, and the rest of it know their names."""
    for mapping, model in CLASS_NAMES:
        mapping[MegaConfig.model_type] = model.__name__
    AutoConfig.register(MegaConfig.model_type, MegaConfig, exist_ok=True)
    for auto, model in AUTO_CLASSES.items():
        auto.register(MegaConfig, model, exist_ok=True)
