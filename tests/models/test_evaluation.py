"""Scoring a long text: the same numbers for any segments, resumed or not, in the memory of one segment."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from megablocks import Evaluation, MegaLanguageModel, evaluate, mega_decoder
from megablocks.state import size_in_bytes

TEXT = torch.randint(20, (1, 61), generator=torch.Generator().manual_seed(3))


def language_model(adaptive: bool = False) -> MegaLanguageModel:
    decoder = mega_decoder(2, 8, qk_dim=4, ema_dim=2, chunk_size=4, dropout=0.5, dtype=torch.float64)
    cutoffs = [5, 9] if adaptive else None
    return MegaLanguageModel(decoder, 20, adaptive_cutoffs=cutoffs, adaptive_factor=2, dtype=torch.float64)


def last(results) -> Evaluation:
    *_, result = results
    return result


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("cuts", [[61], [1, 60], [20, 1, 1, 39], [7] * 8 + [5], [1] * 61])
def test_any_segments_give_the_loss_of_one_pass(cuts, adaptive):
    model = language_model(adaptive).eval()
    logits = model(TEXT[:, :-1])
    nats = F.cross_entropy(logits[0], TEXT[0, 1:], reduction="sum").item()
    found = last(evaluate(model, TEXT.split(cuts, dim=1)))
    assert found.tokens == 60
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert found.mean == pytest.approx(nats / 60)
    assert found.perplexity == pytest.approx(math.exp(nats / 60))
    assert found.bits_per_token == pytest.approx(nats / 60 / math.log(2))


def test_a_longer_chunk_for_the_text_alone():
    model = language_model()
    found = last(evaluate(model, TEXT.split(9, dim=1), chunk_size=16))
    assert model.training
    assert {layer.attention.chunk_size for layer in model.decoder.layers} == {4}
    model.set_chunk_size(16)
    assert found.nats == pytest.approx(last(evaluate(model, [TEXT])).nats, rel=1e-12)
    model.set_chunk_size(4)
    assert found.nats != pytest.approx(last(evaluate(model, [TEXT])).nats, rel=1e-6)


def test_between_segments_the_model_is_as_it_was():
    model = language_model()
    for _ in evaluate(model, TEXT.split(9, dim=1), chunk_size=16):
        assert model.training
        assert {layer.attention.chunk_size for layer in model.decoder.layers} == {4}


def test_resumed_from_a_file(tmp_path):
    model = language_model()
    whole = last(evaluate(model, TEXT.split(10, dim=1)))
    result = last(islice(evaluate(model, TEXT.split(10, dim=1)), 3))
    torch.save(tuple(result), tmp_path / "result.pt")
    again = Evaluation(*torch.load(tmp_path / "result.pt", weights_only=True))
    resumed = last(evaluate(model, TEXT[:, 30:].split(10, dim=1), after=again))
    assert (resumed.nats, resumed.tokens) == (whole.nats, whole.tokens)


def test_memory_is_that_of_a_segment():
    model, sizes = language_model(), set()
    for result in evaluate(model, (TEXT[:, :20] for _ in range(20))):
        sizes.add(size_in_bytes(result.state))
        assert not result.state.layers[0].attention.ema.hidden.requires_grad
    assert len(sizes) == 1
    assert result.tokens == 399


def test_what_cannot_be_scored_is_refused():
    model = language_model()
    with pytest.raises(TypeError, match=r"^`model` must be a MegaLanguageModel, but is a Linear\.$"):
        evaluate(torch.nn.Linear(2, 2), [TEXT])
    with pytest.raises(
        ValueError,
        match=r"^Each of `segments` must have shape \(1, length\), but one has \(2, 3\); score each row",
    ):
        next(evaluate(model, [torch.zeros(2, 3, dtype=torch.int64)]))
    with pytest.raises(ValueError, match=r"^`segments` must be in \[0, 20\), the vocabulary, but holds 20;"):
        next(evaluate(model, [torch.full((1, 3), 20)]))
    with pytest.raises(ValueError, match=r"^`chunk_size` must be at least 1, but is 0; use `None` for the model's own"):
        evaluate(model, [TEXT], chunk_size=0)
