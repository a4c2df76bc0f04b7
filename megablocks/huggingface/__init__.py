"""MEGA for Hugging Face transformers: its configuration, its eight classes, its cache.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelFor...` and `pipeline` find the classes, and old
checkpoints load. Needs the extra `transformers`.
"""

from megablocks.huggingface.cache import MegaCache
from megablocks.huggingface.checkpoint import register_checkpoint_names
from megablocks.huggingface.classifiers import (
    MegaForMultipleChoice,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
)
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.language_models import MegaForCausalLM, MegaForMaskedLM
from megablocks.huggingface.modeling import MegaModel, MegaPreTrainedModel
from megablocks.huggingface.registration import register_auto_classes

register_auto_classes()
register_checkpoint_names()

__all__ = [
    "MegaCache",
    "MegaConfig",
    "MegaForCausalLM",
    "MegaForMaskedLM",
    "MegaForMultipleChoice",
    "MegaForQuestionAnswering",
    "MegaForSequenceClassification",
    "MegaForTokenClassification",
    "MegaModel",
    "MegaPreTrainedModel",
]
