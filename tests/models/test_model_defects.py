"""Defects of the original code that show in whole models (`D` numbers as in docs/concepts/deviations.md)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megablocks import (
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    mega_decoder,
    mega_encoder,
    preset,
)
from megablocks.models import PRESETS

SIZES = {"qk_dim": 4, "ffn_dim": 12, "ema_dim": 2, "dtype": torch.float64}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])


def language_model(**options) -> MegaLanguageModel:
    return MegaLanguageModel(mega_decoder(3, 8, **SIZES, **options), 11, dtype=torch.float64).eval()


def classifier(pooling: str = "mean", **options) -> MegaClassifier:
    encoder = mega_encoder(2, 8, **SIZES, **options)
    return MegaClassifier(encoder, 3, vocab_size=11, pooling=pooling, dtype=torch.float64).eval()


def translator(**options) -> MegaSeq2Seq:
    encoder = mega_encoder(2, 8, **SIZES, **options)
    decoder = mega_decoder(2, 8, cross_attention=True, **SIZES, **options)
    return MegaSeq2Seq(encoder, decoder, source_vocab_size=11, dtype=torch.float64).eval()


@pytest.mark.parametrize("first", range(1, 7))
def test_d9_a_long_first_target_segment_loses_nothing(first):
    """The original looks at the last token of the first call alone."""
    model, target = translator(), TOKENS.flip(1)
    mask = torch.tensor([[True] * 3 + [False] * 4, [False] * 5 + [True] * 2])
    head, state = model(target=target[:, :first], state=model.init_state(TOKENS, mask))
    tail, _ = model(target=target[:, first:], state=state)
    whole = model(TOKENS, target, source_padding_mask=mask)
    torch.testing.assert_close(torch.cat([head, tail], dim=1), whole)


@pytest.mark.parametrize("chunk_size", [2, 3, 5, 8])
def test_d18_any_length_under_any_chunk_size(chunk_size):
    """The original's LRA layers assert that C divides L, and its encoder returns the states of its chunk padding."""
    for length in range(1, 8):
        tokens = TOKENS[:, :length]
        for model in (language_model(), classifier(), translator()):
            given = (tokens, tokens) if isinstance(model, MegaSeq2Seq) else (tokens,)
            unchunked = model(*given)
            model.set_chunk_size(chunk_size)
            y, trace = model(*given, trace=True)
            assert {hidden.shape for hidden in trace.hidden_states} == {(2, length, 8)}
            assert y.shape == unchunked.shape
            if length <= chunk_size:
                torch.testing.assert_close(y, unchunked)


@pytest.mark.parametrize("name", PRESETS)
def test_d20_every_preset_builds_and_runs(name):
    """Of the original's named architectures several lack arguments that they read."""
    model, tokens = preset(name, device="meta"), torch.zeros(2, 7, dtype=torch.int64, device="meta")
    if isinstance(model, MegaClassifier):
        inputs = tokens if hasattr(model.embedding, "tokens") else torch.zeros(2, 7, device="meta")
        assert model(inputs, inputs if model.pair else None).shape == (2, model.num_classes)
    else:
        given = (tokens, tokens) if isinstance(model, MegaSeq2Seq) else (tokens,)
        assert model(*given).shape == (2, 7, model.vocab_size)


def test_d21_layer_drop_is_applied():
    """The original lists its layers in a way that never asks whether to drop one."""
    model = language_model(layer_drop=0.5).train()
    skipped = []
    for seed in range(40):
        torch.manual_seed(seed)
        logits, trace = model(TOKENS, trace=True)
        model.zero_grad()
        logits.square().sum().backward()
        for layer, (before, after) in zip(model.decoder.layers, pairwise(trace.hidden_states), strict=True):
            skipped.append(torch.equal(before, after))
            # A layer that was skipped learns nothing from this batch.
            assert skipped[-1] == (not layer.attention.mx_proj.weight.grad.any())
    assert 0.3 < sum(skipped) / len(skipped) < 0.7  # of 120 draws: more than four standard deviations
    model.eval()
    assert torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_d24_first_pooling_under_left_padding(chunk_size):
    """The original pools slot 0, which left padding zeroes."""
    model = classifier("first", chunk_size=chunk_size)
    mask = torch.tensor([[True] * 3 + [False] * 4, [True, True] + [False] * 5])
    logits = model(TOKENS, padding_mask=mask)
    for row, count in enumerate((3, 2)):
        torch.testing.assert_close(logits[row : row + 1], model(TOKENS[row : row + 1, count:]))


def test_d24_a_chunk_of_padding_is_nothing():
    """In the original a chunk of nothing but padding attends to padding."""
    for model in (language_model(chunk_size=3), classifier(chunk_size=3)):
        for start in (0, 2, 3):
            mask = torch.zeros(2, 7, dtype=torch.bool)
            mask[0, start : start + 4] = True
            y = model(TOKENS, padding_mask=mask)
            found = y[:1, ~mask[0]] if isinstance(model, MegaLanguageModel) else y[:1]
            torch.testing.assert_close(found, model(TOKENS[:1, ~mask[0]]))
            model.zero_grad()
            y.square().sum().backward()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
