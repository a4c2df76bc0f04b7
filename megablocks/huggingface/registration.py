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


def register_auto_classes() -> None:
    """Makes the `Auto...` classes of transformers find those of this package."""
    AutoConfig.register(MegaConfig.model_type, MegaConfig, exist_ok=True)
    for auto, model in AUTO_CLASSES.items():
        auto.register(MegaConfig, model, exist_ok=True)
