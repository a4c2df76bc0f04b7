"""What transformers asks of every model: saving, loading, outputs, gradients, generation, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.trainer_utils import load_sharded_checkpoint

from huggingface_models import causal_config, lively, padded, small_config, tokens, written
from megablocks.huggingface import (
    MegaCache,
    MegaConfig,
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForMultipleChoice,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
    MegaModel,
    MegaPreTrainedModel,
)

HEADED = [
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForSequenceClassification,
    MegaForTokenClassification,
    MegaForMultipleChoice,
    MegaForQuestionAnswering,
]
LANGUAGE_MODELS = [MegaForCausalLM, MegaForMaskedLM]
every_class = pytest.mark.parametrize("kind", [MegaModel, *HEADED], ids=lambda kind: kind.__name__)
every_head = pytest.mark.parametrize("kind", HEADED, ids=lambda kind: kind.__name__)
every_language_model = pytest.mark.parametrize("kind", LANGUAGE_MODELS, ids=lambda kind: kind.__name__)


def config_for(kind: type[MegaPreTrainedModel], **changes) -> MegaConfig:
    return (causal_config if kind is MegaForCausalLM else small_config)(**changes)


def inputs_for(kind: type[MegaPreTrainedModel], batch: int = 3, *, labels: bool = False) -> dict[str, Tensor]:
    """A batch of rows of different lengths, padded on the right."""
    ids, mask = padded([tokens(1, 7 - row)[0] for row in range(batch)], "right")
    given = {"input_ids": ids, "attention_mask": mask}
    if kind is MegaForMultipleChoice:
        given = {name: torch.stack([value, value.flip(0)], dim=1) for name, value in given.items()}
    if not labels or kind is MegaModel:
        return given
    if kind is MegaForQuestionAnswering:
        return given | {"start_positions": torch.arange(batch), "end_positions": torch.arange(batch) + 1}
    if kind in LANGUAGE_MODELS:
        return given | {"labels": ids.where(mask.bool(), -100)}
    if kind is MegaForTokenClassification:
        return given | {"labels": (ids % 2).where(mask.bool(), -100)}
    return given | {"labels": torch.arange(batch) % 2}


def assert_same_outputs(ours: MegaPreTrainedModel, theirs: MegaPreTrainedModel, **tolerance) -> None:
    given = inputs_for(type(ours))
    with torch.no_grad():
        found, expected = ours.eval()(**given), theirs.eval()(**given)
    torch.testing.assert_close(found[0], expected[0], **tolerance)


# Saving and loading


@every_class
def test_a_model_is_saved_in_shards(kind, tmp_path):
    model = lively(kind(config_for(kind)))
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, found = kind.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(found.values())
    assert_same_outputs(loaded, model, atol=0, rtol=0)
    other = kind(config_for(kind)).double()
    load_sharded_checkpoint(other, str(tmp_path), strict=False)
    assert_same_outputs(other, model, atol=0, rtol=0)


@every_class
def test_nothing_stays_on_the_meta_device(kind, tmp_path):
    with torch.device("meta"):
        model = kind(config_for(kind))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    original = lively(kind(config_for(kind)))
    original.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float64, device_map="cpu")
    held = [*loaded.parameters(), *loaded.buffers()]
    held += [value for part in loaded.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    assert all(tensor.device.type == "cpu" for tensor in held)
    assert_same_outputs(loaded, original, atol=0, rtol=0)
    with torch.device("cpu"):
        assert_same_outputs(kind.from_pretrained(tmp_path, dtype=torch.float64), original, atol=0, rtol=0)


@every_class
def test_weights_are_loaded_in_the_dtype_that_is_asked_for(kind, tmp_path):
    kind(config_for(kind)).bfloat16().save_pretrained(tmp_path)
    expected = {"auto": torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float32: torch.float32}
    for asked, dtype in expected.items():
        loaded = kind.from_pretrained(tmp_path, dtype=asked).eval()
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        output = loaded(**inputs_for(kind))[0]
        assert output.dtype == dtype
        assert output.isfinite().all()


def test_the_older_name_of_dtype_is_known(tmp_path):
    MegaModel(small_config()).save_pretrained(tmp_path)
    assert MegaModel.from_pretrained(tmp_path, torch_dtype=torch.float16).dtype == torch.float16


OPTIONS = {
    "rotary": {},
    "simple": {"relative_positional_bias": "simple"},
    "chunked_simple": {"relative_positional_bias": "simple", "use_chunking": True, "chunk_size": 4},
    "layernorm": {"normalization_type": "layernorm"},
    "batchnorm": {"normalization_type": "batchnorm"},
    "one_average": {"ema_projection_size": 1},
    "no_feed_forward": {"use_normalized_ffn": False},
    "cross_attention": {"is_decoder": True, "bidirectional": False, "add_cross_attention": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_file_is_taken_as_a_state_dict(options, tmp_path):
    model = lively(MegaModel(small_config(**options)))
    model.save_pretrained(tmp_path)
    other = MegaModel(small_config(**options)).double()
    other.load_state_dict(written(tmp_path), strict=True)
    for name, value in model.state_dict().items():
        assert other.state_dict()[name].equal(value), name
    other.load_state_dict(model.state_dict(), strict=True)  # names of memory as well


@every_head
def test_a_file_is_taken_as_a_state_dict_under_a_head(kind, tmp_path):
    model = lively(kind(config_for(kind)))
    model.save_pretrained(tmp_path)
    other = kind(config_for(kind)).double()
    found = other.load_state_dict(written(tmp_path), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= set(other.all_tied_weights_keys)
    assert_same_outputs(other, model, atol=0, rtol=0)


def test_a_head_of_another_size_is_drawn_anew(tmp_path):
    model = lively(MegaForSequenceClassification(small_config(num_labels=2)))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        MegaForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    loaded = MegaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, dtype=torch.float64
    )
    assert loaded.classifier.out_proj.weight.shape[0] == 5
    assert loaded.classifier.out_proj.weight.std() < 0.1  # as the configuration says, not as in the file
    ids = tokens(2, 6)
    torch.testing.assert_close(loaded.mega(ids)[0], model.mega(ids)[0])


@every_class
def test_a_model_is_copied_and_pickled(kind):
    model = lively(kind(config_for(kind)))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert_same_outputs(other, model, atol=0, rtol=0)
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            assert ours is not theirs


# Embeddings


@every_language_model
def test_tied_weights_are_one(kind, tmp_path):
    model = kind(config_for(kind))
    model.save_pretrained(tmp_path)
    for each in (model, kind.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    stored = [name for name in written(tmp_path) if name.endswith(("word_embeddings.weight", "_head.weight"))]
    assert len(stored) == 1


@every_language_model
def test_untied_embeddings_are_resized(kind, tmp_path):
    model = lively(kind(config_for(kind, tie_word_embeddings=False)))
    head, ids = model.get_output_embeddings(), tokens(2, 5)
    assert not head.weight.equal(model.get_input_embeddings().weight)
    before = model(ids).logits
    model.resize_token_embeddings(23)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(model(ids).logits[..., :20], before)
    model(tokens(2, 5) * 0 + 22)
    model.resize_token_embeddings(20)
    torch.testing.assert_close(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(kind.from_pretrained(tmp_path, dtype=torch.float64).eval()(ids).logits, before)


@every_class
def test_embeddings_are_got_and_set(kind):
    model = kind(config_for(kind))
    assert model.base_model is (model if kind is MegaModel else model.mega)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    table = torch.nn.Embedding(30, 8)
    model.set_input_embeddings(table)
    assert model.base_model.embedding_layer.word_embeddings is table
    if kind in LANGUAGE_MODELS:
        head = torch.nn.Linear(8, 30)
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is head
    else:
        assert model.get_output_embeddings() is None


# Outputs


@every_class
def test_rows_do_not_depend_on_their_batch(kind):
    model = lively(kind(config_for(kind)))
    given = inputs_for(kind)
    together = model(**given)[0]
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in given.items()})[0]
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)


@every_class
def test_evaluation_is_deterministic_and_training_is_not(kind):
    model = kind(config_for(kind, dropout_prob=0.5))
    given = inputs_for(kind)
    first, second = model.eval()(**given)[0], model(**given)[0]
    assert first.equal(second)
    first, second = model.train()(**given)[0], model(**given)[0]
    assert not first.equal(second)


@every_class
def test_tuples_hold_what_names_hold(kind):
    model = lively(kind(config_for(kind)))
    asked = inputs_for(kind, labels=True) | {"output_hidden_states": True, "output_attentions": True}
    named = model(**asked)
    plain = model(**asked, return_dict=False)
    assert isinstance(plain, tuple)
    model.config.return_dict = False
    by_configuration = model(**asked)
    for found in (plain, by_configuration):
        assert len(found) == len(named)
        for ours, theirs in zip(found, named.values(), strict=True):
            if isinstance(theirs, MegaCache):
                assert isinstance(ours, MegaCache)
            else:
                torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@every_class
def test_a_configuration_asks_as_an_argument_does(kind):
    model = lively(kind(config_for(kind, output_hidden_states=True, output_attentions=True)))
    given = inputs_for(kind)
    asked = model(**given)
    assert len(asked.hidden_states) == model.config.num_hidden_layers + 1
    assert len(asked.attentions) == model.config.num_hidden_layers
    refused = model(**given, output_hidden_states=False, output_attentions=False)
    assert refused.get("hidden_states") is None
    assert refused.get("attentions") is None


def cross_entropy_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(1, labels[:, None]).mean()


PROBLEMS = {
    "regression": (1, lambda: torch.randn(3), lambda logits, labels: ((logits[:, 0] - labels) ** 2).mean()),
    "single_label_classification": (4, lambda: torch.tensor([0, 3, 1]), cross_entropy_of_rows),
    "multi_label_classification": (
        4,
        lambda: torch.randint(0, 2, (3, 4)).double(),
        lambda logits, labels: -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)).mean(),
    ),
}


@pytest.mark.parametrize("said", [True, False], ids=["said", "found"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_kinds_of_problem(problem, said, tmp_path):
    classes, labels_of, expected = PROBLEMS[problem]
    config = small_config(num_labels=classes, problem_type=problem if said else None)
    model = lively(MegaForSequenceClassification(config))
    labels = labels_of()
    output = model(**inputs_for(type(model)), labels=labels)
    torch.testing.assert_close(
        output.loss, expected(output.logits, labels.to(output.logits.dtype) if classes == 1 else labels)
    )
    model.save_pretrained(tmp_path)
    assert MegaConfig.from_pretrained(tmp_path).problem_type == (problem if said else None)


# Gradients


@every_head
def test_every_parameter_is_trained(kind):
    model = lively(kind(config_for(kind, add_token_type_embeddings=True))).train()
    model(**inputs_for(kind, labels=True)).loss.backward()
    idle = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    assert not idle


# Newer versions of transformers speak of activation checkpointing, older ones know the other name alone.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@every_head
def test_checkpointing_changes_no_gradient(kind):
    model = lively(kind(config_for(kind))).train()
    given = inputs_for(kind, labels=True)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**given).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients()
    model.gradient_checkpointing_enable()
    assert all(ours.equal(theirs) for ours, theirs in zip(gradients(), kept, strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@every_head
def test_checkpointing_is_switched_on_and_off(kind):
    model, runs = kind(config_for(kind)).train(), []
    model.base_model.stack.layers[0].attention.v_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    for switch, times in (
        (None, 1),
        (model.gradient_checkpointing_enable, 2),
        (model.gradient_checkpointing_disable, 1),
    ):
        if switch is not None:
            switch()
        assert model.is_gradient_checkpointing == (times == 2)
        runs.clear()
        model(**inputs_for(kind, labels=True)).loss.backward()
        assert len(runs) == times


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@every_head
def test_a_part_may_be_trained_alone(kind):
    model = lively(kind(config_for(kind))).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = model.base_model.stack.layers[1].attention.v_proj.weight.requires_grad_(True)
    model.enable_input_require_grads()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        trained.grad = None
        model(**inputs_for(kind, labels=True)).loss.backward()
        assert trained.grad.abs().sum() > 0
        assert all(other.grad is None for other in model.parameters() if other is not trained)


# Generation


def test_only_the_causal_model_generates():
    assert [kind for kind in [MegaModel, *HEADED] if issubclass(kind, GenerationMixin)] == [MegaForCausalLM]
    assert MegaForCausalLM(causal_config()).can_generate()


WAYS = {
    "greedy": ({"do_sample": False}, 1),
    "sampling": ({"do_sample": True, "num_return_sequences": 2}, 2),
    "beam": ({"do_sample": False, "num_beams": 3}, 3),
    "beam_sample": ({"do_sample": True, "num_beams": 2}, 2),
}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(("way", "times"), WAYS.values(), ids=WAYS.keys())
def test_dictionaries_of_generation(way, times, use_cache):
    model = lively(MegaForCausalLM(causal_config()))
    prompt = tokens(2, 5)
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=3,
        pad_token_id=1,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        **way,
    )
    rows = 2 * times
    assert [tuple(each.shape) for each in found.scores] == [(rows, 20)] * 3
    assert [tuple(each.shape) for each in found.logits] == [(rows, 20)] * 3
    for step in range(3):
        new, seen = (5, 5) if step == 0 else (1, 5 + step) if use_cache else (5 + step, 5 + step)
        assert [tuple(each.shape) for each in found.hidden_states[step]] == [(rows, new, 8)] * 3
        assert [tuple(each.shape[:3]) for each in found.attentions[step]] == [(rows, 1, new)] * 2
        assert all(each.shape[3] >= seen for each in found.attentions[step])
    assert isinstance(found.past_key_values, MegaCache) == use_cache
    if "num_beams" in way and not way["do_sample"]:
        # What a beam is worth is what the model says of its tokens.
        logits = model(found.sequences, use_cache=False).logits.log_softmax(-1)
        worth = logits[:, 4:-1].gather(2, found.sequences[:, 5:, None]).squeeze(2).mean(1)
        torch.testing.assert_close(found.sequences_scores, worth.to(found.sequences_scores.dtype))
        scores = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
        torch.testing.assert_close(scores.mean(1).to(worth.dtype), worth)


def test_arguments_reach_the_model():
    model = lively(MegaForCausalLM(causal_config(add_token_type_embeddings=True)))
    prompt = tokens(2, 5)
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 1, "pad_token_id": 1, "do_sample": False}
    asked = {"return_dict_in_generate": True, "output_logits": True}
    for types in (torch.zeros_like(prompt), torch.ones_like(prompt)):
        found = model.generate(prompt, token_type_ids=types, **given, **asked)
        expected = model(prompt, token_type_ids=types).logits[:, -1]
        torch.testing.assert_close(found.logits[0], expected.float())
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(prompt, tokn_type_ids=types, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_generation_in_half_precision(dtype):
    model = MegaForCausalLM(causal_config(initializer_range=0.5)).to(dtype).eval()
    prompt, mask = padded([tokens(1, 6)[0], tokens(1, 3)[0]])
    given = {"attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 1}
    found = model.generate(prompt, **given, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert all(logits.isfinite().all() for logits in found.logits)
    assert found.sequences.shape == (2, 10)
    assert model.generate(prompt, **given, num_beams=2, do_sample=True).shape == (2, 10)


def test_generation_stops_where_a_row_ends():
    model = lively(MegaForCausalLM(causal_config(eos_token_id=2)))
    with torch.no_grad():
        model.lm_head.bias.zero_()[2] = 1e6
    prompt = tokens(2, 4)
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    assert found[:, 4:].tolist() == [[2], [2]]
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=3)
    assert (found[:, 4:7] != 2).all()


# Compilation


@pytest.mark.compile
@pytest.mark.parametrize("kind", [MegaForMaskedLM, MegaForSequenceClassification], ids=lambda kind: kind.__name__)
def test_training_and_scoring_are_whole_graphs(kind):
    torch.compiler.reset()
    model = lively(kind(config_for(kind, num_hidden_layers=1)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = inputs_for(kind, labels=True)

    def gradients(called) -> list[Tensor]:
        model.zero_grad()
        called(**given).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.train()
    for ours, theirs in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)


@pytest.mark.compile
@pytest.mark.parametrize(
    ("options", "capacity"), [({}, 16), ({"use_chunking": True, "chunk_size": 3}, None)], ids=["capacity", "chunked"]
)
def test_a_step_of_fixed_shape_is_compiled_once(options, capacity):
    torch.compiler.reset()
    model = lively(MegaForCausalLM(causal_config(num_hidden_layers=1, **options)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(2, 13)
    cache = MegaCache(model.config, capacity=capacity)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :5], past_key_values=cache)
        for place in range(5, 13):
            # Of steps after the first, across the borders of chunks, none may need a graph of its own.
            with torch._dynamo.config.patch(error_on_recompile=place > 5):
                found = compiled(ids[:, place : place + 1], past_key_values=cache).logits
            torch.testing.assert_close(found[:, 0], expected[:, place])
