"""What transformers 4.40.2 got wrong, E1 to E21 of its known defects, is right here."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import EncoderDecoderModel

from huggingface_models import causal_config, lively, padded, small_config, tokens
from megablocks.huggingface import (
    MegaConfig,
    MegaForCausalLM,
    MegaForMaskedLM,
    MegaForQuestionAnswering,
    MegaForSequenceClassification,
    MegaForTokenClassification,
    MegaModel,
)

FUNCTIONS = ["softmax", "laplace", "relu2"]
CHUNKS = {"use_chunking": True, "chunk_size": 4}


def same(ours: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, other, atol=tolerance, rtol=0)


def stepped(model: MegaForCausalLM, ids: torch.Tensor, first: int, **given) -> torch.Tensor:
    """Logits of a prompt read at once and of the tokens behind it, read one by one."""
    output = model(ids[:, :first], use_cache=True, **given)
    logits = [output.logits]
    for index in range(first, ids.shape[1]):
        output = model(ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True, **given)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def test_e1_rmsnorm_normalises():
    torch.manual_seed(0)
    model = MegaModel(small_config(normalization_type="rmsnorm"))
    norm = model.stack.layers[0].attention.norm
    x = 5 * torch.randn(2, 3, 8)
    same(norm(x).square().mean(-1), torch.ones(2, 3), 1e-4)
    legacy = MegaModel(small_config(normalization_type="rmsnorm", legacy_rms_norm=True)).stack.layers[0].attention.norm
    same(legacy(x), x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_e2_cached_steps_divide_by_the_number_of_keys(function):
    model = lively(MegaForCausalLM(causal_config(attention_activation=function)))
    ids = tokens(2, 9)
    same(stepped(model, ids, 4), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_e3_cached_cross_attention_knows_its_step(function):
    options = {"attention_activation": function, "relative_positional_bias": "simple", "max_positions": 9}
    model = lively(MegaForCausalLM(causal_config(add_cross_attention=True, **options)))
    ids, memory = tokens(2, 9), torch.randn(2, 5, 8, dtype=torch.float64)
    same(
        stepped(model, ids, 1, encoder_hidden_states=memory),
        model(ids, encoder_hidden_states=memory, use_cache=False).logits,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_e4_padding_of_the_prompt_stays_out_of_sight(function):
    model = lively(MegaForCausalLM(causal_config(attention_activation=function)))
    rows, after = [tokens(1, length)[0] for length in (6, 3)], tokens(2, 3)
    for side in ("left", "right"):
        prompt, mask = padded(rows, side)
        cache = model(prompt, attention_mask=mask).past_key_values
        for index in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            logits = model(after[:, index : index + 1], attention_mask=mask, past_key_values=cache).logits
            for row, ids, found in zip(rows, after, logits, strict=True):
                alone = model(torch.cat([row, ids[: index + 1]])[None], use_cache=False).logits
                same(found[0], alone[0, -1])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_e5_left_padding_is_absent(function):
    model = lively(MegaForCausalLM(causal_config(attention_activation=function)))
    rows = [tokens(1, length)[0] for length in (6, 2)]
    prompt, mask = padded(rows)
    logits = model(prompt, attention_mask=mask).logits
    for row, found in zip(rows, logits, strict=True):
        same(found[-len(row) :], model(row[None], use_cache=False).logits[0])
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=1)
    alone = model.generate(
        rows[1][None], attention_mask=mask[1:, -2:], max_new_tokens=5, do_sample=False, pad_token_id=1
    )
    assert found[1, -5:].equal(alone[0, -5:])


@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9])
def test_e6_chunked_decoders_take_any_length(length):
    model = lively(MegaForCausalLM(causal_config(add_cross_attention=True, **CHUNKS)))
    ids, memory = tokens(2, length), torch.randn(2, 6, 8, dtype=torch.float64)
    whole = model(ids, encoder_hidden_states=memory, use_cache=False).logits
    same(stepped(model, ids, 1, encoder_hidden_states=memory), whole)
    cache = model(ids, encoder_hidden_states=memory).past_key_values
    cache.reorder_cache(torch.tensor([1, 1]))
    logits = model(ids[:1, :1].expand(2, 1), past_key_values=cache).logits
    same(logits[0], logits[1])
    encoder = lively(MegaModel(small_config(**CHUNKS)))
    assert encoder(ids).last_hidden_state.shape == (2, length, 8)


def test_e7_too_long_an_input_is_said_in_words():
    model = MegaModel(small_config(relative_positional_bias="simple", max_positions=6))
    with pytest.raises(ValueError, match=r"cannot serve 7 positions \(padding included\); make a larger table"):
        model(tokens(1, 7))
    chunked = MegaModel(small_config(relative_positional_bias="simple", max_positions=6, **CHUNKS))
    assert chunked(tokens(1, 7)).last_hidden_state.shape == (1, 7, 8)


def test_e8_averages_are_truncated_with_a_cache_too():
    model = lively(MegaForCausalLM(causal_config(truncation=3)))
    ids = tokens(2, 9)
    same(model(ids, use_cache=True).logits, model(ids, use_cache=False).logits)
    same(model(ids, use_cache=True).logits, model(ids, labels=ids).logits)
    same(stepped(model, ids, 2), model(ids, use_cache=False).logits)


def test_e9_the_future_is_not_seen():
    with pytest.raises(ValueError, match="use `bidirectional=False`, or `is_decoder=False` for an encoder"):
        MegaForCausalLM(MegaConfig())
    with pytest.raises(ValueError, match="A causal model needs averages that look back only"):
        MegaModel(MegaConfig(is_decoder=True))
    config = small_config(bidirectional=False)
    model = lively(MegaForCausalLM(config))
    assert model.config.is_decoder
    assert not config.is_decoder
    ids = tokens(2, 8)
    changed = torch.cat([ids[:, :5], tokens(2, 3)], dim=1)
    same(model(ids).logits[:, :5], model(changed).logits[:, :5])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_e10_masks_work_in_half_precision(function, dtype):
    model = lively(MegaModel(small_config(attention_activation=function)))
    prompt, mask = padded([tokens(1, 6)[0], tokens(1, 3)[0]], "right")
    exact = model(prompt, attention_mask=mask).last_hidden_state.detach()
    narrow = model.to(dtype)(prompt, attention_mask=mask).last_hidden_state
    assert narrow.dtype == dtype
    same(narrow.double(), exact, 0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "rmsnorm", "batchnorm"])
def test_e11_norms_without_parameters(norm):
    model = MegaModel(small_config(normalization_type=norm, norm_affine=False))
    assert not any("norm" in name for name, _ in model.named_parameters())
    assert model(tokens(1, 3)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_e12_masks_of_any_kind(function):
    model = lively(MegaModel(small_config(attention_activation=function)))
    prompt, mask = padded([tokens(1, 6)[0], tokens(1, 3)[0]], "right")
    expected = model(prompt, attention_mask=mask).last_hidden_state
    for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        same(model(prompt, attention_mask=mask.to(dtype)).last_hidden_state, expected)


def test_e13_new_weights_take_effect_at_once():
    model, other = (lively(MegaModel(small_config())) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    ids = tokens(2, 6)
    model(ids)
    model.load_state_dict(other.state_dict())
    same(model(ids).last_hidden_state, other(ids).last_hidden_state)
    for _ in range(2):
        model(ids).last_hidden_state.sum().backward()


@pytest.mark.parametrize("kind", [MegaForCausalLM, MegaForMaskedLM])
def test_e14_an_untied_head_stays_untied(kind, tmp_path):
    model = lively(kind(small_config(bidirectional=False, tie_word_embeddings=False)))
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    for part in (kind.get_input_embeddings, kind.get_output_embeddings):
        assert part(loaded).weight.equal(part(model).weight)
    assert not loaded.get_output_embeddings().weight.equal(loaded.get_input_embeddings().weight)


def test_e15_chunk_size_limits_chunks_alone():
    simple = {"relative_positional_bias": "simple", "max_positions": 12}
    model = lively(MegaModel(small_config(chunk_size=4, **simple)))
    assert model(tokens(1, 12)).last_hidden_state.shape == (1, 12, 8)
    decoder = lively(MegaForCausalLM(causal_config(add_cross_attention=True, **CHUNKS, **simple)))
    memory = torch.randn(1, 11, 8, dtype=torch.float64)
    ids = tokens(1, 9)
    same(
        stepped(decoder, ids, 3, encoder_hidden_states=memory),
        decoder(ids, encoder_hidden_states=memory, use_cache=False).logits,
    )


@pytest.mark.parametrize("cuts", [(2, 3, 4), (1, 8), (5, 4)])
def test_e16_several_new_tokens_at_once(cuts):
    model = lively(MegaForCausalLM(causal_config()))
    ids = tokens(2, 9)
    cache, pieces = None, []
    for piece in ids.split(cuts, dim=1):
        output = model(piece, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    same(torch.cat(pieces, dim=1), model(ids, use_cache=False).logits)


def test_e17_the_kind_of_problem_is_told_anew():
    model = lively(MegaForSequenceClassification(small_config(num_labels=3)))
    ids = tokens(2, 5)
    model(ids, labels=torch.tensor([2, 0]))
    assert model.config.problem_type is None
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    output = model(ids, labels=several)
    same(output.loss, torch.nn.functional.binary_cross_entropy_with_logits(output.logits, several))
    model.config.problem_type = "regression"
    output = model(ids, labels=several)
    same(output.loss, (output.logits - several).square().mean())


def test_e18_the_first_real_token_is_pooled():
    rows = [tokens(1, length)[0] for length in (6, 2)]
    prompt, mask = padded(rows)
    for model in (lively(MegaForSequenceClassification(small_config())), lively(MegaModel(small_config()))):
        pooled = "logits" if isinstance(model, MegaForSequenceClassification) else "pooler_output"
        together = model(prompt, attention_mask=mask)[pooled]
        for row, found in zip(rows, together, strict=True):
            same(found, model(row[None])[pooled][0])


def test_e19_tuples_hold_what_is_there():
    ids = tokens(2, 5)
    model = MegaForCausalLM(causal_config()).eval()
    found = model(ids, return_dict=False)
    assert len(found) == 2
    assert found[1].get_seq_length() == 5
    assert len(model(ids, labels=ids, return_dict=False)) == 2
    assert len(MegaModel(small_config(), add_pooling_layer=False)(ids, return_dict=False)) == 1
    assert len(MegaForTokenClassification(small_config())(ids, output_attentions=True, return_dict=False)) == 2


def test_e20_feature_dropout_drops_channels():
    config = small_config(use_feature_dropout=True, hidden_dropout_prob=0.5, intermediate_size=64, **CHUNKS)
    layer = MegaModel(config).train().stack.layers[0].attention
    dropped = layer.hidden_dropout(torch.ones(2, 12, 64))
    assert dropped.equal(dropped[:, :1].expand(-1, 12, -1))  # the same at every time
    assert 0 < int((dropped[0, 0] == 0).sum()) < 64  # some channels, not all or none


@pytest.mark.parametrize("function", FUNCTIONS)
def test_e20_a_memory_of_padding_alone(function):
    model = lively(MegaForCausalLM(causal_config(add_cross_attention=True, attention_activation=function)))
    memory, mask = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[1] * 5, [0] * 5])
    logits = model(tokens(2, 4), encoder_hidden_states=memory, encoder_attention_mask=mask).logits
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


# Newer versions of transformers speak of activation checkpointing, older ones know the other name alone.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", ["scalenorm", "batchnorm"])
def test_e20_activations_are_checkpointed(norm):
    model = MegaForMaskedLM(small_config(dropout_prob=0.2, normalization_type=norm)).train()
    ids, calls = tokens(2, 6), []
    model.mega.stack.layers[0].attention.v_proj.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    start = copy.deepcopy(model.state_dict())
    kept, after = gradients(), copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ours, other in zip(gradients(), kept, strict=True):
        same(ours, other, 1e-6)
    assert len(calls) == 3  # once, then once and again for the backward pass
    for name, value in model.state_dict().items():  # statistics of a batch are counted once
        same(value.double(), after[name].double(), 1e-6)


def test_e20_rotary_bias_needs_an_even_shared_representation():
    with pytest.raises(ValueError, match="`shared_representation_size` must be even for a rotary bias, but is 5"):
        small_config(shared_representation_size=5)
    MegaModel(small_config(hidden_size=7))
    small_config(shared_representation_size=5, relative_positional_bias="simple")


def test_e20_token_types_have_no_limit_of_length():
    model = lively(MegaModel(small_config(add_token_type_embeddings=True, max_positions=4)))
    ids = tokens(1, 9)
    same(model(ids).last_hidden_state, model(ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state)


def test_e20_every_dropout_of_a_masked_language_model_is_used():
    model = MegaForMaskedLM(small_config())
    assert not hasattr(model, "dropout")


def test_e21_answers_are_sought_among_real_tokens():
    model = lively(MegaForQuestionAnswering(small_config()))
    rows = [tokens(1, length)[0] for length in (7, 4)]
    starts, ends = torch.tensor([5, 1]), torch.tensor([6, 3])
    alone = [
        model(row[None], start_positions=start[None], end_positions=end[None]).loss
        for row, start, end in zip(rows, starts, ends, strict=True)
    ]
    for side, shift in (("right", torch.tensor([0, 0])), ("left", torch.tensor([0, 3]))):
        ids, mask = padded(rows, side)
        loss = model(ids, attention_mask=mask, start_positions=starts + shift, end_positions=ends + shift).loss
        same(loss, torch.stack(alone).mean())


def test_e21_losses_of_tokens_leave_padding_out():
    rows = [tokens(1, length)[0] for length in (7, 4)]
    for kind in (MegaForCausalLM, MegaForMaskedLM):
        model = lively(kind(small_config(bidirectional=False)))
        right, left = (padded(rows, side) for side in ("right", "left"))
        for ids, mask in (right, left):
            same(model(ids, attention_mask=mask, labels=ids).loss, loss := _token_loss(model, *right))
            same(_token_loss(model, ids, mask), loss)
            # As `Trainer` counts: every label but the first of a row, which under left padding nothing predicts.
            labels = ids.masked_fill(mask == 0, -100)
            counted = (labels if kind is MegaForMaskedLM else labels[:, 1:]) != -100
            given = {"labels": labels, "num_items_in_batch": counted.sum()}
            same(model(ids, attention_mask=mask, **given).loss, loss)


def _token_loss(model, ids, mask):
    return model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def test_losses_of_kept_positions_leave_padding_out():
    model = lively(MegaForCausalLM(causal_config()))
    ids, mask = padded([tokens(1, length)[0] for length in (7, 4)], "left")
    whole = model(ids, attention_mask=mask, labels=ids).loss
    kept = model(ids, attention_mask=mask, labels=ids[:, -5:], logits_to_keep=5).loss
    assert not torch.equal(whole, kept)
    same(
        kept, model(ids, attention_mask=mask, labels=ids[:, -5:].where(mask[:, -5:] == 1, -100), logits_to_keep=5).loss
    )


def test_an_encoder_and_decoder_model_reads_its_memory_once():
    decoder = lively(MegaForCausalLM(causal_config(add_cross_attention=True)))
    model = EncoderDecoderModel(encoder=lively(MegaModel(small_config())), decoder=decoder)
    source, target = tokens(2, 5), tokens(2, 4)
    whole = model(input_ids=source, decoder_input_ids=target, use_cache=False).logits
    first = model(input_ids=source, decoder_input_ids=target[:, :1], use_cache=True)
    held = copy.deepcopy(first.past_key_values).state.layers[0].cross_attention.keys
    rest = model(input_ids=source, decoder_input_ids=target[:, 1:], past_key_values=first.past_key_values)
    same(torch.cat([first.logits, rest.logits], dim=1), whole)
    assert first.past_key_values.state.layers[0].cross_attention.keys is held
