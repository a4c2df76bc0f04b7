"""`generate` of transformers: with a cache as without, padded as alone, continued as in one go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import DynamicCache, EncoderDecoderModel, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from huggingface_models import causal_config, lively, padded, small_config, tokens
from megablocks.huggingface import MegaCache, MegaForCausalLM, MegaModel

OPTIONS = {
    "softmax_rotary": {},
    "chunked": {"use_chunking": True, "chunk_size": 4},
    "laplace_simple": {"attention_activation": "laplace", "relative_positional_bias": "simple", "max_positions": 32},
    "relu2_truncated": {"attention_activation": "relu2", "truncation": 5},
    "chunked_laplace_simple": {
        "use_chunking": True,
        "chunk_size": 3,
        "attention_activation": "laplace",
        "relative_positional_bias": "simple",
    },
    "post_norm": {"normalize_before_mega": False, "normalize_before_ffn": False, "normalization_type": "scalenorm"},
}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def model(request) -> MegaForCausalLM:
    return lively(MegaForCausalLM(causal_config(**request.param)))


def generated(model, prompt, mask=None, *, new=9, **options):
    torch.manual_seed(1)
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(prompt, attention_mask=mask, max_new_tokens=new, pad_token_id=1, **options)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_cache_changes_nothing(model, way):
    prompt = tokens(2, 6)
    assert generated(model, prompt, **way).equal(generated(model, prompt, use_cache=False, **way))


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["beam"]], ids=["greedy", "beam"])
def test_left_padding_changes_nothing(model, way):
    rows = [tokens(1, length)[0] for length in (7, 3, 5)]
    prompt, mask = padded(rows)
    together = generated(model, prompt, mask, **way)
    for row, found in zip(rows, together, strict=True):
        assert found[-9:].equal(generated(model, row[None], **way)[0, -9:])


def test_greedy_is_what_the_model_finds_most_probable(model):
    found = generated(model, tokens(2, 6), do_sample=False)
    logits = model(found[:, :-1], use_cache=False).logits
    assert found[:, 6:].equal(logits[:, 5:].argmax(-1))


def test_a_returned_cache_is_continued(model):
    prompt = tokens(2, 6)
    whole = generated(model, prompt, do_sample=False)
    first = generated(model, prompt, new=4, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, MegaCache)
    assert first.past_key_values.get_seq_length() == 9  # all but the last token
    more = generated(model, first.sequences, new=5, do_sample=False, past_key_values=first.past_key_values)
    assert more.equal(whole)


@pytest.mark.parametrize("capacity", [None, 20])
def test_an_empty_cache_may_be_given(model, capacity):
    prompt = tokens(2, 6)
    cache = MegaCache(model.config, capacity=capacity)
    assert generated(model, prompt, do_sample=False, past_key_values=cache).equal(
        generated(model, prompt, do_sample=False)
    )
    assert cache.get_seq_length() == 14


def test_a_prompt_may_be_read_in_pieces(model):
    prompt = tokens(2, 7)
    found = generated(model, prompt, do_sample=False, prefill_chunk_size=3, past_key_values=MegaCache(model.config))
    assert found.equal(generated(model, prompt, do_sample=False))


def test_a_prompt_may_be_embedded(model):
    prompt = tokens(2, 6)
    embedded = model.get_input_embeddings()(prompt)
    found = model.generate(
        inputs_embeds=embedded,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=1,
    )
    assert found[:, -9:].equal(generated(model, prompt, do_sample=False)[:, -9:])


class Collected(BaseStreamer):
    """Remembers what comes."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed(model):
    streamer = Collected()
    found = generated(model, tokens(1, 6), do_sample=False, streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended
    assert issubclass(TextIteratorStreamer, BaseStreamer)


@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_generation_is_refused(model, helper):
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(model, tokens(1, 6), **{helper: model if helper == "assistant_model" else 2})


def test_everything_may_be_asked_for(model):
    found = generated(
        model,
        tokens(2, 6),
        new=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    assert len(found.scores) == len(found.logits) == len(found.attentions) == len(found.hidden_states) == 3
    assert found.hidden_states[0][0].shape == (2, 6, 8)
    assert all(weights.dim() == 4 for step in found.attentions for weights in step)
    assert all(hidden.shape == (2, 1, 8) for hidden in found.hidden_states[1])


def test_cuts_of_a_padded_sequence_agree_with_the_whole(model):
    prompt, mask = padded([tokens(1, length)[0] for length in (11, 4, 8)])
    whole = model(prompt, attention_mask=mask, use_cache=False).logits
    cache, pieces = None, []
    for first, last in ((0, 3), (3, 4), (4, 9), (9, 11)):
        output = model(prompt[:, first:last], attention_mask=mask[:, :last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()], atol=1e-12, rtol=0)
    assert cache.get_seq_length() == 11
    assert cache.layers[0].state.attention.ema is not None


def test_states_are_not_written_into(model):
    prompt = tokens(2, 6)
    cache = model(prompt[:, :4]).past_key_values
    held, copied = cache.state, copy.deepcopy(cache)
    before = pytree.tree_map_only(torch.Tensor, torch.clone, held)
    model(prompt[:, 4:], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(held, before, rtol=0, atol=0)
    assert cache.state is not held
    assert (copied.get_seq_length(), cache.get_seq_length()) == (4, 6)
    torch.testing.assert_close(copied.state, before, rtol=0, atol=0)


def test_rows_of_a_cache_are_selected(model):
    prompt = tokens(3, 6)
    cache = model(prompt).past_key_values
    assert cache.layers[0].batch_size == 3
    after = tokens(3, 2)
    alone = model(after[1:2], past_key_values=model(prompt[1:2]).past_key_values).logits

    selected = copy.deepcopy(cache)
    selected.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(model(after[1:2], past_key_values=selected).logits, alone)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    logits = model(after.repeat_interleave(2, 0), past_key_values=repeated).logits
    torch.testing.assert_close(logits[2:4], alone.expand(2, -1, -1))
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(prompt, past_key_values=cache).logits, model(prompt, use_cache=False).logits)


def test_caches_of_another_kind():
    model = lively(MegaForCausalLM(causal_config()))
    prompt = tokens(1, 4)
    assert isinstance(model(prompt, past_key_values=DynamicCache()).past_key_values, MegaCache)
    used = DynamicCache()
    used.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    with pytest.raises(TypeError, match="`past_key_values` must be a MegaCache, but is a DynamicCache"):
        model(prompt, past_key_values=used)
    with pytest.raises(TypeError, match="`past_key_values` must be a MegaCache, but is a tuple"):
        model(prompt, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(ValueError, match="must hold one state for each of 2 layers, but holds 3"):
        model(prompt, past_key_values=MegaCache(causal_config(num_hidden_layers=3)))
    with pytest.raises(ValueError, match="`past_key_values` needs a causal model"):
        MegaModel(small_config())(prompt, past_key_values=MegaCache(small_config()))
    with pytest.raises(ValueError, match="cannot be cropped"):
        model(prompt).past_key_values.crop(-1)


@pytest.fixture(params=["softmax", "laplace"])
def translator(request) -> EncoderDecoderModel:
    options = {"attention_activation": request.param, "relative_positional_bias": "simple", "max_positions": 24}
    model = EncoderDecoderModel(
        encoder=lively(MegaModel(small_config(**options))),
        decoder=lively(MegaForCausalLM(causal_config(add_cross_attention=True, **options))),
    )
    model.generation_config.decoder_start_token_id = 2
    model.generation_config.pad_token_id = 1
    return model.eval()


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["beam"]], ids=["greedy", "beam"])
def test_encoder_and_decoder(translator, way):
    rows = [tokens(1, length)[0] for length in (7, 4)]
    source, mask = padded(rows)
    found = generated(translator, source, mask, **way)
    assert found.equal(generated(translator, source, mask, use_cache=False, **way))
    for row, target in zip(rows, found, strict=True):
        assert target.equal(generated(translator, row[None], **way)[0])


def test_encoder_and_decoder_are_saved(translator, tmp_path):
    translator.save_pretrained(tmp_path)
    loaded, found = EncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    source = tokens(2, 5)
    assert generated(loaded.eval(), source, do_sample=False).equal(generated(translator, source, do_sample=False))
