"""`pipeline` and the `Auto...` classes, from a directory with a model and a tokenizer in it."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Pipeline,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils import logging

from huggingface_models import SMALL, causal_config, lively, small_config
from megablocks.huggingface import (
    MegaConfig,
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
    MegaModel,
    MegaPreTrainedModel,
)

SPECIAL = ["<s>", "<pad>", "</s>", "<mask>", "<unk>"]
WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "in", "mind", "and", "who"]
TEXTS = ["to be or not to be", "that is the question", "who"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *WORDS]
    assert len(words) <= SMALL["vocab_size"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["bos_token", "pad_token", "eos_token", "mask_token", "unk_token"]
    # Tokenizers name token types unless they are told which inputs a model takes.
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=inputs, **dict(zip(names, SPECIAL, strict=True))
    )


@pytest.fixture
def saved(tokenizer, tmp_path):
    """Saves a model of a class, and the tokenizer beside it, and returns the model and the directory."""

    def save(kind: type[MegaPreTrainedModel], config: MegaConfig | None = None) -> tuple[MegaPreTrainedModel, str]:
        model = lively(kind(config or small_config())).float()
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model, str(tmp_path)

    return save


def pipe(task: str, folder: str, **options) -> Pipeline:
    return pipeline(task, model=folder, device="cpu", **options)


def inputs_of(tokenizer, text: str) -> dict[str, torch.Tensor]:
    return dict(tokenizer(text, return_tensors="pt"))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-generation", MegaForCausalLM),
        ("fill-mask", MegaForMaskedLM),
        ("text-classification", MegaForSequenceClassification),
        ("token-classification", MegaForTokenClassification),
    ],
)
def test_a_task_knows_its_class(task, kind, saved, caplog):
    _, folder = saved(kind, causal_config() if kind is MegaForCausalLM else None)
    logging.enable_propagation()
    made = pipe(task, folder)
    logging.disable_propagation()
    assert type(made.model) is kind
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize("chunking", [{}, {"use_chunking": True, "chunk_size": 3}], ids=["whole", "chunked"])
def test_text_is_generated(chunking, saved, tokenizer):
    model, folder = saved(MegaForCausalLM, causal_config(**chunking))
    made = pipe("text-generation", folder)
    made.tokenizer.padding_side = "left"
    options = {"max_new_tokens": 4, "do_sample": False}
    for text, (found,) in zip(TEXTS, made(TEXTS, batch_size=3, **options), strict=True):
        new = model.generate(**inputs_of(tokenizer, text), **options, pad_token_id=1)[0, len(text.split()) :]
        assert found["generated_text"].startswith(text)
        assert found["generated_text"].removeprefix(text).split() == tokenizer.convert_ids_to_tokens(new)


def test_a_mask_is_filled(saved, tokenizer):
    model, folder = saved(MegaForMaskedLM)
    text = "to be or <mask> to be"
    found = pipe("fill-mask", folder, top_k=3)(text)
    probabilities = model(**inputs_of(tokenizer, text)).logits[0, 3].softmax(-1)
    best = probabilities.topk(3)
    assert [each["token"] for each in found] == best.indices.tolist()
    assert [each["score"] for each in found] == pytest.approx(best.values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({"num_labels": 3}, lambda logits: logits.softmax(-1)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"num_labels": 1, "problem_type": "regression"}, lambda logits: logits),
    ],
    ids=["one_label", "several_labels", "regression"],
)
def test_texts_are_classified(options, activation, saved, tokenizer):
    model, folder = saved(MegaForSequenceClassification, small_config(**options))
    made = pipe("text-classification", folder, top_k=None)
    for text, found in zip(TEXTS, made(TEXTS, batch_size=3), strict=True):
        scores = {each["label"]: each["score"] for each in found}
        expected = activation(model(**inputs_of(tokenizer, text)).logits[0])
        labels = model.config.id2label
        assert scores == pytest.approx(
            {labels[index]: score for index, score in enumerate(expected.tolist())}, rel=1e-4
        )


def test_labels_have_the_names_of_the_configuration(saved):
    names = {0: "verse", 1: "prose"}
    config = small_config(id2label=names, label2id={name: index for index, name in names.items()})
    _, folder = saved(MegaForSequenceClassification, config)
    assert pipe("text-classification", folder)(TEXTS[0])[0]["label"] in names.values()


def test_tokens_are_classified(saved, tokenizer):
    model, folder = saved(MegaForTokenClassification, small_config(num_labels=4))
    found = pipe("token-classification", folder, ignore_labels=[])(TEXTS[0])
    expected = model(**inputs_of(tokenizer, TEXTS[0])).logits[0].softmax(-1)
    assert [each["word"] for each in found] == TEXTS[0].split()
    assert [each["entity"] for each in found] == [f"LABEL_{index}" for index in expected.argmax(-1).tolist()]
    assert [each["score"] for each in found] == pytest.approx(expected.amax(-1).tolist(), rel=1e-4)


def test_features_are_extracted(saved, tokenizer):
    model, folder = saved(MegaModel)
    found = pipe("feature-extraction", folder, return_tensors=True)(TEXTS[1])
    torch.testing.assert_close(found, model(**inputs_of(tokenizer, TEXTS[1])).last_hidden_state)


def test_classes_are_told_by_what_follows_from_a_text(saved):
    config = small_config(num_labels=3)
    config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
    config.id2label = {index: name for name, index in config.label2id.items()}
    _, folder = saved(MegaForSequenceClassification, config)
    found = pipe("zero-shot-classification", folder)(TEXTS[0], candidate_labels=["question", "mind"])
    assert sorted(found["labels"]) == ["mind", "question"]
    assert sum(found["scores"]) == pytest.approx(1)


def test_a_question_is_answered(saved, tokenizer):
    model, folder = saved(MegaForQuestionAnswering)
    loaded = AutoModelForQuestionAnswering.from_pretrained(folder)
    assert type(loaded) is MegaForQuestionAnswering
    batch = AutoTokenizer.from_pretrained(folder)(["who is", "that"], ["to be or not", "question"], padding=True)
    batch = {key: torch.tensor(value) for key, value in batch.items()}
    found, expected = loaded(**batch), model(**batch)
    torch.testing.assert_close(found.start_logits, expected.start_logits)
    torch.testing.assert_close(found.end_logits, expected.end_logits)


def test_what_a_tokenizer_gives_fits(saved):
    model, folder = saved(MegaForCausalLM, causal_config(add_token_type_embeddings=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=True)
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("kind", [MegaForCausalLM, MegaForMaskedLM], ids=lambda kind: kind.__name__)
def test_what_a_collator_gives_is_learnt(kind, saved, tokenizer):
    model, _ = saved(kind, causal_config() if kind is MegaForCausalLM else None)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=kind is MegaForMaskedLM, mlm_probability=0.5)
    batch = collator([tokenizer(text) for text in TEXTS])
    loss = model(**batch).loss
    assert loss.isfinite()
    counted = batch["labels"].clone()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    if kind is MegaForCausalLM:
        counted, logits = counted[:, 1:], logits[:, :-1]
    real = counted != -100
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[real], counted[real]))
