"""`Trainer` of transformers: it trains, resumes, accumulates, checkpoints, lowers precision and predicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from huggingface_models import causal_config, lively, small_config
from megablocks.huggingface import (
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForMultipleChoice,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
    MegaPreTrainedModel,
)

# accelerate asks for pinned memory in its data loader, of which a machine without an accelerator has none.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

LENGTH = 9
DROPOUT = {"dropout_prob": 0.2, "hidden_dropout_prob": 0.2, "nffn_activation_dropout_prob": 0.2}
TRAINED = [MegaForCausalLM, MegaForMaskedLM, MegaForSequenceClassification]
ALL = [*TRAINED, MegaForTokenClassification, MegaForMultipleChoice, MegaForQuestionAnswering]


def small(kind: type[MegaPreTrainedModel], **changes) -> MegaPreTrainedModel:
    """A small model, the same one every time."""
    torch.manual_seed(0)
    config = causal_config if kind is MegaForCausalLM else small_config
    return kind(config(num_labels=2, **changes))


def rows_for(kind: type[MegaPreTrainedModel], count: int = 8) -> list[dict[str, torch.Tensor]]:
    """Rows that can be learnt, of different lengths, with different numbers of labels that count."""
    torch.manual_seed(1)
    rows = []
    for index in range(count):
        ids = torch.arange(LENGTH) % 5 + 3 + index % 2 * 5
        mask = (torch.arange(LENGTH) < LENGTH - index % 4).long()
        row = {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask}
        if kind is MegaForSequenceClassification:
            row["labels"] = torch.tensor(index % 2)
        elif kind is MegaForQuestionAnswering:
            row |= {"start_positions": torch.tensor(index % 3), "end_positions": torch.tensor(index % 3 + 1)}
        elif kind is MegaForMultipleChoice:
            row = {key: torch.stack([value, value.flip(0)]) for key, value in row.items()}
            row["labels"] = torch.tensor(index % 2)
        else:
            labels = ids % 2 if kind is MegaForTokenClassification else ids
            row["labels"] = labels.where((mask == 1) & (torch.arange(LENGTH) >= index), -100)
            row["labels"][1] = labels[1]
        rows.append(row)
    return rows


def trainer_of(model: MegaPreTrainedModel, folder, **changes) -> Trainer:
    """A `Trainer` that takes four rows at a time, and says and writes nothing unless it is told to."""
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data = rows_for(type(model))
    arguments = TrainingArguments(output_dir=str(folder), **options | changes)
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def assert_same_weights(ours: nn.Module, theirs: nn.Module, **tolerance) -> None:
    """Raises unless two models hold the same, to the last bit unless a tolerance is given."""
    for (name, left), right in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, **{"atol": 0, "rtol": 0} | tolerance, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_training_lowers_the_loss(kind, tmp_path):
    # Without the dense layer, with which the first steps of a language model learn no more than how often tokens are.
    model = small(kind, add_lm_hidden_dense_layer=False)
    trainer = trainer_of(model, tmp_path, max_steps=30, learning_rate=5e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.6 * before


@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.__name__)
def test_a_run_is_resumed_exactly(kind, tmp_path):
    whole = trainer_of(small(kind, **DROPOUT), tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    resumed = trainer_of(small(kind, **DROPOUT, initializer_range=0.5), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same_weights(resumed.model, whole.model)
    third = kind.from_pretrained(tmp_path / "checkpoint-3")
    with pytest.raises(AssertionError):
        assert_same_weights(third, whole.model)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_accumulated_gradients_are_those_of_one_batch(kind, tmp_path):
    trained = []
    for size, times in ((8, 1), (4, 2), (1, 8)):
        model = lively(small(kind))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
        trainer = trainer_of(model, tmp_path, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options)
        trainer.accelerator.gradient_accumulation_steps = 1  # transformers 5.4 has gradients divided once more
        trained.append((trainer.train().training_loss, model))
    (loss, model), *others = trained
    for other_loss, other in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert_same_weights(model, other, atol=1e-9)


# Newer versions of transformers call it activation checkpointing, older ones know the other name alone.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.__name__)
def test_activations_are_checkpointed(kind, reentrant, tmp_path):
    kept = trainer_of(small(kind, **DROPOUT), tmp_path, max_steps=2)
    kept.train()
    model, calls = small(kind, **DROPOUT), []
    model.mega.stack.layers[0].attention.v_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer_of(model, tmp_path, max_steps=2, **options).train()
    assert len(calls) == 4  # two steps, each forward and again for the backward pass
    assert_same_weights(model, kept.model, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.__name__)
def test_bfloat16(kind, tmp_path):
    model = small(kind)
    kinds = set()
    model.mega.stack.layers[0].attention.v_proj.register_forward_hook(lambda *given: kinds.add(given[-1].dtype))
    trainer = trainer_of(model, tmp_path, max_steps=20, learning_rate=5e-2, bf16=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", TRAINED, ids=lambda kind: kind.__name__)
def test_predictions_are_logits(kind, tmp_path):
    model = lively(small(kind))
    data = rows_for(kind)
    found = trainer_of(model, tmp_path, per_device_eval_batch_size=3).predict(data)
    assert not isinstance(found.predictions, tuple)  # logits alone, without a cache
    for row, prediction, label in zip(data, found.predictions, found.label_ids, strict=True):
        alone = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
        torch.testing.assert_close(torch.from_numpy(prediction), alone)
        assert torch.as_tensor(label).equal(row["labels"])


def test_hidden_states_are_predicted_too(tmp_path):
    model = lively(small(MegaForCausalLM, output_hidden_states=True))
    logits, hidden = trainer_of(model, tmp_path, per_device_eval_batch_size=8).predict(rows_for(MegaForCausalLM))[0]
    assert logits.shape == (8, LENGTH, 20)
    assert [states.shape for states in hidden] == [(8, LENGTH, 8)] * 3


def test_smoothed_labels_are_those_of_the_next_tokens(tmp_path):
    model = lively(small(MegaForCausalLM))
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=1e-9)
    row = {key: value[None] for key, value in rows_for(MegaForCausalLM)[0].items()}
    expected = model(**row).loss
    torch.testing.assert_close(trainer.compute_loss(model, dict(row)), expected)


def test_auto_classes_load_what_is_saved(tmp_path):
    trainer = trainer_of(small(MegaForSequenceClassification), tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_weights(loaded, trainer.model)


@pytest.mark.compile
def test_a_compiled_model_is_trained(tmp_path):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (small(MegaForCausalLM, num_hidden_layers=1) for _ in range(2))
    trainer_of(plain, tmp_path, max_steps=2).train()
    trainer_of(compiled, tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager").train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same_weights(compiled, plain, atol=1e-6)
