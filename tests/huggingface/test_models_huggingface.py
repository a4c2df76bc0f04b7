"""The eight classes as people use them: arguments, outputs, auto classes, pipelines, compilation."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from huggingface_models import causal_config, lively, padded, small_config, tokens
from megablocks import huggingface
from megablocks.huggingface import (
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForMultipleChoice,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
    MegaModel,
)

HEADS = {
    MegaForMaskedLM: ("logits", "last"),
    MegaForTokenClassification: ("logits", "last"),
    MegaForSequenceClassification: ("logits", "row"),
    MegaForQuestionAnswering: ("start_logits", "last"),
    MegaModel: ("last_hidden_state", "last"),
}
OPTIONS = {
    "rotary": {},
    "simple_laplace": {"relative_positional_bias": "simple", "attention_activation": "laplace"},
    "chunked": {"use_chunking": True, "chunk_size": 4},
    "chunked_relu2": {"use_chunking": True, "chunk_size": 3, "attention_activation": "relu2"},
    "truncated": {"truncation": 3},
    "causal_averages": {"bidirectional": False},
    "token_types": {"add_token_type_embeddings": True, "type_vocab_size": 3},
    "post_norm": {"normalize_before_mega": False, "normalize_before_ffn": False},
    "batchnorm": {"normalization_type": "batchnorm"},
}
ARGUMENTS = {
    MegaModel: [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "inputs_embeds",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "past_key_values",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ],
    MegaForCausalLM: [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "inputs_embeds",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "labels",
        "past_key_values",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ],
    MegaForMaskedLM: [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "inputs_embeds",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "labels",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ],
    MegaForSequenceClassification: [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "inputs_embeds",
        "labels",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ],
    MegaForMultipleChoice: [
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "labels",
        "inputs_embeds",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ],
    MegaForQuestionAnswering: [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    ],
}
ARGUMENTS[MegaForTokenClassification] = ARGUMENTS[MegaForSequenceClassification]


@pytest.mark.parametrize("kind", ARGUMENTS, ids=lambda kind: kind.__name__)
def test_arguments_are_those_of_the_older_code(kind):
    found = list(inspect.signature(kind.forward).parameters)[1:]
    assert found[: len(ARGUMENTS[kind])] == ARGUMENTS[kind]


def test_everything_public_is_documented():
    for name in huggingface.__all__:
        thing = getattr(huggingface, name)
        assert "Example:" in thing.__doc__ or name == "MegaPreTrainedModel"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
def test_padding_is_deletion(kind, options, side):
    model = lively(kind(small_config(**options)))
    rows = [tokens(1, length)[0] for length in (9, 4, 1)]
    ids, mask = padded(rows, side)
    types = torch.randint(0, 2, ids.shape)
    key, reach = HEADS[kind]
    together = model(ids, attention_mask=mask, token_type_ids=types)[key]
    inert = model(ids.masked_fill(mask == 0, 17), attention_mask=mask, token_type_ids=types)[key]
    for index, row in enumerate(rows):
        real = mask[index].bool()
        alone = model(row[None], token_type_ids=types[index][real][None])[key][0]
        found = together[index] if reach == "row" else together[index][real]
        torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(inert, together, atol=0, rtol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_embedded_tokens_stand_for_tokens(options):
    model = lively(MegaModel(small_config(**options)))
    ids = tokens(2, 7)
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded)[0], model(ids)[0])


def test_inputs_that_do_not_fit_are_refused():
    model = MegaModel(small_config())
    ids = tokens(2, 5)
    with pytest.raises(
        ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, but got neither"
    ):
        model()
    with pytest.raises(ValueError, match="but got both"):
        model(ids, inputs_embeds=torch.zeros(2, 5, 8))
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(batch, length\) = \(2, 5\)"):
        model(ids, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"but has shape \(2, 1, 5, 5\)"):
        model(ids, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match=r"must be 1 at real tokens and 0 at padding, but holds -10000\.0"):
        model(ids, attention_mask=torch.tensor([[0.0] * 4 + [-10000.0]] * 2))
    with pytest.raises(ValueError, match=r"`input_ids` must be in \[0, 20\), the vocabulary, but holds 20"):
        model(ids + 20 - ids)
    with pytest.raises(ValueError, match="attends to its own tokens only, but got `encoder_hidden_states`"):
        model(ids, encoder_hidden_states=torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="needs `encoder_hidden_states`, but got none"):
        MegaForCausalLM(causal_config(add_cross_attention=True))(ids)
    with pytest.raises(ValueError, match="`num_labels` must be 2 for question answering"):
        MegaForQuestionAnswering(small_config(num_labels=3))


def test_everything_inside_is_shown_and_keeps_its_gradient():
    ids, mask = padded([tokens(1, 6)[0], tokens(1, 4)[0]])
    for given in ({}, {"attention_mask": mask}):
        model = lively(MegaForMaskedLM(small_config()))
        output = model(ids, output_hidden_states=True, output_attentions=True, **given)
        assert len(output.hidden_states) == 3
        assert all(weights.shape == (2, 1, 6, 6) for weights in output.attentions)
        inside = [*output.hidden_states, *output.attentions]
        for tensor in inside:
            tensor.retain_grad()
        output.logits.sum().backward()
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in inside)
    assert output.attentions[0][1, 0, :2].eq(0).all()  # padding attends to nothing
    assert output.hidden_states[1][1, :2].eq(0).all()


def test_hidden_states_alone_need_no_attention_weights():
    model, ids, asked = lively(MegaForMaskedLM(small_config())), tokens(2, 6), []
    model.mega.stack.register_forward_pre_hook(
        lambda stack, args, given: asked.append(given["trace"]), with_kwargs=True
    )
    alone = model(ids, output_hidden_states=True)
    both = model(ids, output_hidden_states=True, output_attentions=True)
    assert asked == ["hidden_states", True]
    assert "attentions" not in alone
    torch.testing.assert_close(alone.hidden_states, both.hidden_states)


def test_cross_attention_is_shown():
    model = lively(MegaForCausalLM(causal_config(add_cross_attention=True)))
    memory = torch.randn(2, 3, 8, dtype=torch.float64)
    output = model(tokens(2, 5), encoder_hidden_states=memory, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(2, 1, 5, 3)] * 2


def test_logits_that_nobody_asks_for_are_not_made():
    model = lively(MegaForCausalLM(causal_config()))
    ids = tokens(2, 6)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_a_loss_may_be_shared_out_among_batches():
    ids = tokens(4, 6)
    labels = ids.clone()
    labels[2:, :4] = -100
    for kind in (MegaForCausalLM, MegaForMaskedLM):
        model = lively(kind(small_config(bidirectional=False)))
        counted = labels[:, 1:] if kind is MegaForCausalLM else labels
        count = (counted != -100).sum()
        parts = sum(
            model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss for rows in (slice(2), slice(2, 4))
        )
        torch.testing.assert_close(parts, model(ids, labels=labels).loss)


def test_a_loss_may_be_replaced():
    model = lively(MegaForCausalLM(causal_config()))
    ids = tokens(2, 5)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * vocab_size
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, output.logits.sum() * 20)


AUTO = {
    AutoModel: MegaModel,
    AutoModelForCausalLM: MegaForCausalLM,
    AutoModelForMaskedLM: MegaForMaskedLM,
    AutoModelForSequenceClassification: MegaForSequenceClassification,
    AutoModelForMultipleChoice: MegaForMultipleChoice,
    AutoModelForTokenClassification: MegaForTokenClassification,
    AutoModelForQuestionAnswering: MegaForQuestionAnswering,
}


@pytest.mark.parametrize(("auto", "kind"), AUTO.items(), ids=lambda kind: kind.__name__)
def test_auto_classes_find_the_models(auto, kind, tmp_path):
    model = kind(small_config(bidirectional=False))
    assert type(auto.from_config(model.config)) is kind
    model.save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is kind


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<s>",
        "<pad>",
        "</s>",
        "<mask>",
        "<unk>",
        *["to", "be", "or", "not", "that", "is", "the", "question", "answer"],
    ]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
    )


@pytest.mark.parametrize(
    ("task", "kind", "given"),
    [
        ("text-generation", MegaForCausalLM, "to be or"),
        ("fill-mask", MegaForMaskedLM, "to <mask> or"),
        ("text-classification", MegaForSequenceClassification, "to be or"),
        ("token-classification", MegaForTokenClassification, "to be or"),
        ("feature-extraction", MegaModel, "to be or"),
    ],
)
def test_pipelines_find_the_models(task, kind, given, tokenizer, tmp_path):
    kind(small_config(bidirectional=False)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"max_new_tokens": 3} if task == "text-generation" else {}
    found = pipeline(task, model=str(tmp_path), device="cpu")(given, **options)
    assert json.dumps(found, default=float)


def test_embeddings_are_resized(tmp_path):
    for kind in (MegaForCausalLM, MegaForMaskedLM):
        model = kind(small_config(bidirectional=False)).eval()
        ids = tokens(2, 5)
        before = model(ids).logits
        model.resize_token_embeddings(25)
        assert model.config.vocab_size == 25
        after = model(ids).logits
        assert after.shape[-1] == 25
        torch.testing.assert_close(after[..., :20], before)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(kind.from_pretrained(tmp_path).eval()(ids).logits, after)
        assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"use_chunking": True, "chunk_size": 4}], ids=["whole", "chunked"])
def test_graphs_are_whole(options):
    torch.compiler.reset()
    model = lively(MegaForCausalLM(causal_config(**options)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = padded([tokens(1, 6)[0], tokens(1, 4)[0]])
    expected = model(ids, attention_mask=mask, labels=ids)
    found = compiled(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    with torch.no_grad():
        cache, other = (model(ids, attention_mask=mask).past_key_values for _ in range(2))
        counts = []
        for _ in range(5):
            after = tokens(2, 1)
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            found = compiled(after, attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(found, model(after, attention_mask=mask, past_key_values=other).logits)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counts[-1] == counts[1]  # the steps after the second need no other graph
        assert cache.get_seq_length() == other.get_seq_length() == 11
