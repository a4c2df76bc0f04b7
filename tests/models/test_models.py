"""Language model, classifier and sequence-to-sequence model: what they add to their stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megablocks import (
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    mega_decoder,
    mega_encoder,
)

SIZES = {"qk_dim": 4, "ffn_dim": 12, "ema_dim": 2}
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
MASK = torch.tensor([[False, False, False, True, True], [True, False, False, False, False]])


def language_model(**options) -> MegaLanguageModel:
    return MegaLanguageModel(mega_decoder(2, 8, chunk_size=3, **SIZES), 11, **options).eval()


def classifier(**options) -> MegaClassifier:
    return MegaClassifier(mega_encoder(1, 8, **SIZES), 3, **options).eval()


def translator(**options) -> MegaSeq2Seq:
    decoder = mega_decoder(1, 8, cross_attention=True, **SIZES)
    return MegaSeq2Seq(mega_encoder(1, 8, **SIZES), decoder, source_vocab_size=11, **options).eval()


def test_last_only_gives_the_last_real_position():
    model = language_model()
    everything, last = model(TOKENS, padding_mask=MASK), model(TOKENS, padding_mask=MASK, last_only=True)
    assert last.shape == (2, 1, 11)
    torch.testing.assert_close(last[:, 0], torch.stack([everything[0, 2], everything[1, 4]]))
    empty = torch.ones_like(MASK)
    assert model(TOKENS, padding_mask=empty, last_only=True).abs().sum() == 0
    assert everything[MASK].abs().sum() == 0


@pytest.mark.parametrize("tie", [False, True])
def test_output_shares_the_embedding_where_asked(tie):
    model = language_model(tie_output=tie)
    assert (model.output.weight is model.embedding.tokens.weight) == tie
    assert model.output.bias is None


def test_embedding_of_another_width_is_projected():
    model = language_model(input_dim=5, tie_output=False, embedding_norm="rmsnorm")
    assert model.embedding.projection.weight.shape == (8, 5)
    assert model(TOKENS).shape == (2, 5, 11)
    with pytest.raises(
        ValueError, match=r"^`tie_output` needs an embedding with a table `tokens\.weight` of shape \(11, 8\)"
    ):
        language_model(input_dim=5)


def test_own_embedding_and_output_take_their_places():
    class Bytes(nn.Module):
        def forward(self, tokens, *, padding_mask=None):
            return nn.functional.one_hot(tokens, 8).float()

    decoder = mega_decoder(1, 8, **SIZES)
    model = MegaLanguageModel(decoder, 8, embedding=Bytes(), output=nn.Sequential(nn.Linear(8, 8), nn.LogSoftmax(-1)))
    torch.testing.assert_close(model(TOKENS % 8).exp().sum(-1), torch.ones(2, 5))


def test_ids_under_padding_are_inert():
    model = language_model()
    wild = TOKENS.masked_fill(MASK, -100)
    assert torch.equal(model(wild, padding_mask=MASK), model(TOKENS, padding_mask=MASK))


def test_tokens_outside_the_vocabulary_are_named_before_the_embedding_is_asked():
    with pytest.raises(
        ValueError, match=r"^`tokens` must be in \[0, 11\), the vocabulary, but holds 11; mark padding with"
    ):
        language_model()(torch.tensor([[3, 11]]))
    with pytest.raises(ValueError, match=r"^`tokens` must be in \[0, 11\), the vocabulary, but holds -100; "):
        language_model()(torch.tensor([[3, -100]]))
    with pytest.raises(
        TypeError, match=r"^`tokens` must be an int64 or int32 tensor of token ids, but is torch\.float32\.$"
    ):
        language_model()(TOKENS.float())
    with pytest.raises(
        ValueError, match=r"^`tokens` must have shape \(batch, length\) .* has shape \(5,\); a single sequence"
    ):
        language_model()(TOKENS[0])


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_pooling_respects_padding(pooling):
    model = classifier(vocab_size=11, pooling=pooling)
    together = model(TOKENS, padding_mask=MASK)
    torch.testing.assert_close(together[:1], model(TOKENS[:1, :3]))
    torch.testing.assert_close(together[1:], model(TOKENS[1:, 1:]))
    assert model(TOKENS, padding_mask=torch.ones_like(MASK)).isfinite().all()


def test_pooling_may_be_a_function():
    model = classifier(vocab_size=11, pooling=lambda x, padding_mask: x.amax(1))
    assert model(TOKENS).shape == (2, 3)


def test_pairs_are_second_beside_first():
    model = classifier(vocab_size=11, pair=True, head_layers=0)
    first, second = TOKENS, TOKENS.flip(1)

    def represented(tokens):
        return model.encoder(model.embedding(tokens)).mean(1)

    expected = model.output(torch.cat([represented(second), represented(first)], dim=1))
    torch.testing.assert_close(model(first, second), expected)
    _, trace = model(first, second, trace=True)
    assert len(trace.attention_weights) == 2
    lonely = classifier(vocab_size=11)
    with pytest.raises(
        ValueError, match=r"^This MegaClassifier has pair=True, but was given no second sequence; pass `second`"
    ):
        model(first)
    with pytest.raises(
        ValueError, match=r"^This MegaClassifier has pair=False, but was given a second sequence; leave"
    ):
        lonely(first, second)
    with pytest.raises(
        ValueError, match=r"^`second_padding_mask` belongs to `second`, but there is none; leave it out\.$"
    ):
        lonely(first, second_padding_mask=MASK)


def test_heads_have_the_depth_and_width_asked_for():
    model = classifier(vocab_size=11, head_layers=2, head_dim=20, head_activation="relu")
    assert [tuple(layer.weight.shape) for layer in model.head] == [(20, 8), (20, 20)]
    assert model.output.weight.shape == (3, 20)


def test_continuous_inputs_have_one_or_more_values_a_position():
    assert classifier()(torch.rand(2, 5)).shape == (2, 3)
    assert classifier(input_dim=4)(torch.rand(2, 5, 4)).shape == (2, 3)
    with pytest.raises(
        ValueError, match=r"^`inputs` must have shape \(batch, length, 4\), but has shape \(2, 5, 3\); "
    ):
        classifier(input_dim=4)(torch.rand(2, 5, 3))


@pytest.mark.parametrize("share", [False, True])
def test_source_and_target_share_a_table_where_asked(share):
    model = translator(share_embeddings=share, tie_output=True)
    assert (model.source_embedding.tokens.weight is model.target_embedding.tokens.weight) == share
    assert model.output.weight is model.target_embedding.tokens.weight
    with pytest.raises(
        ValueError, match=r"^`share_embeddings` needs one vocabulary, but the source's has 11 tokens and"
    ):
        translator(share_embeddings=True, target_vocab_size=12)


def test_calls_that_cannot_be_right_are_answered():
    model = translator()
    with pytest.raises(
        ValueError, match=r"^MegaSeq2Seq needs `target`, the tokens that the decoder reads, but got none\.$"
    ):
        model(TOKENS)
    with pytest.raises(
        ValueError, match=r"^A call takes a source or a state, but got both; the state holds the source"
    ):
        model(TOKENS, TOKENS, state=model.init_state(TOKENS))
    with pytest.raises(
        ValueError, match=r"^A call with cross-attention needs a `source` or a `state`, but got neither\.$"
    ):
        model(target=TOKENS)
    with pytest.raises(ValueError, match=r"^A MegaLanguageModel needs a decoder without cross-attention"):
        MegaLanguageModel(model.decoder, 11)
    with pytest.raises(
        ValueError, match=r"^A MegaSeq2Seq needs a decoder with cross-attention, but this one has none; "
    ):
        MegaSeq2Seq(model.encoder, mega_decoder(1, 8, **SIZES), source_vocab_size=11)
    with pytest.raises(ValueError, match=r"^Encoder and decoder must have the same width, but have 8 and 12\.$"):
        MegaSeq2Seq(model.encoder, mega_decoder(1, 12, cross_attention=True, **SIZES), source_vocab_size=11)
    with pytest.raises(ValueError, match=r"^`pooling` must be one of 'mean', 'first', or a callable, but is 'max'\.$"):
        classifier(pooling="max")


def test_models_live_where_they_are_made():
    with torch.device("meta"):
        models = [language_model(), classifier(vocab_size=11), translator(share_embeddings=True, tie_output=True)]
    assert all(parameter.is_meta for model in models for parameter in model.parameters())
    half = language_model(dtype=torch.bfloat16)
    assert half.embedding.tokens.weight.dtype == torch.bfloat16
    assert half.output.weight is half.embedding.tokens.weight


def test_shared_weights_stay_shared_wherever_they_move():
    with torch.device("meta"):
        models = [language_model(), translator(share_embeddings=True, tie_output=True)]
    for model in models:
        model.to_empty(device="cpu").to(torch.bfloat16)
        embedding = model.embedding if isinstance(model, MegaLanguageModel) else model.target_embedding
        assert model.output.weight is embedding.tokens.weight
        assert model.output.weight.device.type == "cpu"
    assert models[1].source_embedding.tokens.weight is models[1].output.weight


def test_output_is_drawn_anew_as_it_was_drawn():
    decoder = mega_decoder(1, 256, **SIZES)
    output = MegaLanguageModel(decoder, 500, tie_output=False).output
    for _ in range(2):
        assert abs(output.weight.std().item() - 1 / 16) < 1e-3  # of 128,000 draws: eight standard deviations
        output.reset_parameters()


def test_embeddings_are_as_wide_under_autocast():
    """What goes through all layers is not rounded at the door."""
    narrow, values = language_model(input_dim=5, tie_output=False), classifier(input_dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert narrow.embedding(TOKENS).dtype == torch.float32
        assert values.embedding(torch.rand(2, 5, 2)).dtype == torch.float32


def test_a_causal_model_refuses_what_would_show_it_the_future():
    """D10, D11: batch statistics in an embedding's norm, and an encoder where a decoder belongs."""
    for make in (language_model, translator):
        with pytest.raises(
            ValueError, match=r"^A causal layer needs a norm of each token alone, but `.*norm` is a BatchN"
        ):
            make(embedding_norm="batchnorm")
    with pytest.raises(
        TypeError, match=r"^`decoder` must be a MegaDecoder, .* but is a MegaEncoder, which has none\.$"
    ):
        MegaLanguageModel(mega_encoder(1, 8, **SIZES), 11)
    assert classifier(vocab_size=11, embedding_norm="batchnorm")(TOKENS).shape == (2, 3)


def test_a_long_row_in_half_precision_does_not_overflow():
    x, mask = torch.full((1, 20_000, 2), 15.0, dtype=torch.float16), torch.zeros(1, 20_000, dtype=torch.bool)
    pooled = classifier(vocab_size=11).pooling(x, mask)
    assert torch.equal(pooled, torch.full((1, 2), 15.0, dtype=torch.float16))


def test_what_is_no_model_part_is_named():
    with pytest.raises(
        TypeError, match=r"^`encoder` must be a MegaEncoder, or a module called like one, but is a NoneType\.$"
    ):
        MegaClassifier(None, 3)
    with pytest.raises(
        TypeError, match=r"^`source` must be a tensor, but is list; make it one by `torch\.as_tensor`\.$"
    ):
        translator()([[1, 2]], TOKENS)
    with pytest.raises(
        TypeError, match=r"^`target_padding_mask` must be a bool tensor, True at padding and False at real"
    ):
        translator()(TOKENS, TOKENS, target_padding_mask=MASK.float())
    with pytest.raises(ValueError, match=r"^`embedding_dropout` must be in \[0, 1\), but is 1\.5\.$"):
        language_model(embedding_dropout=1.5)
    with pytest.raises(
        ValueError,
        match=r"^`output` must give one logit for each of `vocab_size`=11 tokens at .*, 11\), but gave .*, 5\)\.$",
    ):
        language_model(output=nn.Linear(8, 5))(TOKENS)
