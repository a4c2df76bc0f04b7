"""Adaptive embedding and softmax: against torch's, against the original's numbers, and where the original is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablocks import AdaptiveEmbedding, AdaptiveSoftmax, MegaLanguageModel, generate, load, mega_decoder, save

CUTOFFS = [5, 9]
SIZES = {"cutoffs": CUTOFFS, "factor": 2, "dtype": torch.float64}


def tied(*, input_dim: int | None = None, tie_projections: bool = False) -> tuple[AdaptiveEmbedding, AdaptiveSoftmax]:
    embedding = AdaptiveEmbedding(20, 8, input_dim=input_dim, **SIZES)
    return embedding, AdaptiveSoftmax(8, 20, embedding=embedding, tie_projections=tie_projections, **SIZES)


def language_model(**options) -> MegaLanguageModel:
    decoder = mega_decoder(2, 8, qk_dim=4, ema_dim=2, chunk_size=4, dtype=torch.float64)
    return MegaLanguageModel(decoder, 20, adaptive_cutoffs=CUTOFFS, adaptive_factor=2, dtype=torch.float64, **options)


def full_table(embedding: AdaptiveEmbedding) -> Tensor:
    return torch.cat([t.weight @ p.weight.T for t, p in zip(embedding.tables, embedding.projections, strict=True)])


def test_the_untied_softmax_is_that_of_torch():
    ours = AdaptiveSoftmax(8, 20, **SIZES)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(8, 20, CUTOFFS, div_value=2).double()
    with torch.no_grad():
        theirs.head.weight.copy_(ours.head.weight)
        for mine, their in zip(ours.tail, theirs.tail, strict=True):
            their[0].weight.copy_(mine[0].weight)
            their[1].weight.copy_(mine[2].weight)
    x, targets = torch.randn(7, 8, dtype=torch.float64), torch.tensor([0, 4, 5, 8, 9, 19, 12])
    torch.testing.assert_close(ours(x), theirs.log_prob(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.target_log_probs(x, targets), theirs(x, targets).output, rtol=0, atol=1e-14)


@pytest.mark.parametrize("tie_projections", [False, True])
@pytest.mark.parametrize("input_dim", [None, 6])
def test_tied_weights_are_shared_and_learn_from_both_sides(input_dim, tie_projections):
    embedding, softmax = tied(input_dim=input_dim, tie_projections=tie_projections)
    x, targets = torch.randn(2, 12, 8, dtype=torch.float64), torch.randint(20, (2, 12))
    log_probs = softmax(x)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 12, dtype=torch.float64))
    picked = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(softmax.target_log_probs(x, targets), picked)
    picked.sum().backward()
    assert all(table.weight.grad is not None for table in embedding.tables)
    learned = [projection.weight.grad is not None for projection in embedding.projections]
    assert learned == [False, tie_projections, tie_projections]

    head = softmax.head
    brought = x if input_dim is None else head.words[0](x)
    scores = torch.cat([F.linear(brought, embedding.tables[0].weight), head.clusters(x)], dim=-1)
    torch.testing.assert_close(log_probs[..., :5], scores.log_softmax(-1)[..., :5])
    narrow = x @ embedding.projections[1].weight if tie_projections else softmax.tail[0][0](x)
    inside = F.linear(narrow, embedding.tables[1].weight).log_softmax(-1) + scores.log_softmax(-1)[..., 5:6]
    torch.testing.assert_close(log_probs[..., 5:9], inside)


def test_both_ways_to_a_loss_have_the_same_gradients():
    _, softmax = tied(tie_projections=True)
    x, targets = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True), torch.randint(20, (2, 9))
    whole = torch.autograd.grad(F.nll_loss(softmax(x).flatten(0, 1), targets.flatten()), [x, *softmax.parameters()])
    picked = torch.autograd.grad(-softmax.target_log_probs(x, targets).mean(), [x, *softmax.parameters()])
    torch.testing.assert_close(picked, whole)


def test_the_embedding_looks_up_every_band():
    embedding = AdaptiveEmbedding(20, 8, input_dim=6, **SIZES)
    assert [table.embedding_dim for table in embedding.tables] == [6, 3, 1]
    tokens, mask = torch.arange(20).reshape(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    mask[1, 7:] = True
    y = embedding(tokens.masked_fill(mask, 10**9), padding_mask=mask)
    expected = (8**0.5 * full_table(embedding))[tokens].masked_fill(mask.unsqueeze(-1), 0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    y.square().sum().backward()
    assert not embedding.tables[2].weight.grad[17 - 9 :].any()  # tokens 17 to 19 stand under padding
    assert embedding.tables[2].weight.grad[: 17 - 9].all()


def test_d19_every_word_of_a_tail_is_learned():
    """The original skips the word with relative index 1 in every tail, and starts that row of every band at zero."""
    embedding, softmax = tied(tie_projections=True)
    assert all(table.weight[1].any() for table in embedding.tables)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    log_probs = softmax.target_log_probs(x, torch.arange(20).unsqueeze(0))
    head = softmax.head(x).log_softmax(-1)
    for token, cluster in ((6, 0), (10, 1)):
        assert log_probs[0, token] < head[0, token, 5 + cluster]
        softmax.zero_grad()
        softmax.target_log_probs(x[:, :1], torch.tensor([[token]])).sum().backward()
        assert embedding.tables[cluster + 1].weight.grad[1].any()


@pytest.mark.parametrize("tie_output", [False, True])
def test_a_language_model_with_bands(tie_output, tmp_path):
    model = language_model(tie_output=tie_output).eval()
    tokens, mask = torch.randint(20, (2, 10)), torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :3] = True
    log_probs = model(tokens, padding_mask=mask)
    torch.testing.assert_close(log_probs[~mask].exp().sum(-1), torch.ones(17, dtype=torch.float64))
    assert not log_probs[mask].any()
    torch.testing.assert_close(model(tokens[:1, 3:]), log_probs[:1, 3:])
    state, pieces = model.init_state(2), []
    for piece in tokens.split([3, 6, 1], dim=1):
        y, state = model(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))
    assert generate(model, tokens, max_new_tokens=3).tokens.shape == (2, 3)

    shared = len(model.state_dict()) - len(list(model.parameters()))
    assert shared == (5 if tie_output else 0)
    save(model, tmp_path)
    for again in (load(tmp_path), copy.deepcopy(model), language_model(tie_output=tie_output, device="meta")):
        if next(again.parameters()).is_meta:
            again = again.to_empty(device="cpu")
            again.load_state_dict(model.state_dict())
        assert len(list(again.parameters())) == len(list(model.parameters()))
        assert again.eval()(tokens).equal(model(tokens))


def test_dropout_is_there_in_training_only():
    softmax = AdaptiveSoftmax(8, 20, cutoffs=CUTOFFS, dropout=0.5)
    x, targets = torch.randn(1, 6, 8), torch.full((1, 6), 12)
    assert not softmax.target_log_probs(x, targets).equal(softmax.target_log_probs(x, targets))
    softmax.eval()
    assert softmax.target_log_probs(x, targets).equal(softmax.target_log_probs(x, targets))


def test_half_precision_is_summed_in_float32():
    softmax = AdaptiveSoftmax(8, 20, cutoffs=CUTOFFS, dtype=torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    y = softmax(x)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(softmax).double()(x.double())
    assert (y.double() - wide).abs().max() < 0.05


def test_what_does_not_fit_is_refused():
    embedding = AdaptiveEmbedding(20, 8, cutoffs=[5])
    with pytest.raises(
        ValueError, match=r"^`cutoffs` must rise and stay below the vocabulary of 20 tokens, but are \[9"
    ):
        AdaptiveEmbedding(20, 8, cutoffs=[9, 5])
    with pytest.raises(ValueError, match=r"but are \[5, 20\]; leave out those that cut nothing off\.$"):
        AdaptiveSoftmax(8, 20, cutoffs=[5, 20])
    with pytest.raises(TypeError, match=r"^`cutoffs` must be a list of at least one token id, but is \[\]\.$"):
        AdaptiveEmbedding(20, 8, cutoffs=[])
    with pytest.raises(ValueError, match=r"^`embedding` must have the width, .* but has \(8, 20, \(5,\)\)\.$"):
        AdaptiveSoftmax(8, 20, cutoffs=[6], embedding=embedding)
    with pytest.raises(TypeError, match=r"^`embedding` must be an AdaptiveEmbedding, but is a Embedding\.$"):
        AdaptiveSoftmax(8, 20, cutoffs=[5], embedding=nn.Embedding(20, 8))
    with pytest.raises(ValueError, match=r"^`tie_projections` needs the `embedding` whose projections"):
        AdaptiveSoftmax(8, 20, cutoffs=[5], tie_projections=True)
    softmax = AdaptiveSoftmax(8, 20, cutoffs=[5])
    with pytest.raises(ValueError, match=r"^`targets` must be in \[0, 20\), the vocabulary, but holds 20; leave"):
        softmax.target_log_probs(torch.randn(1, 8), torch.tensor([20]))
    with pytest.raises(ValueError, match=r"^`targets` must hold one token for each position, shape \(1,\), but has"):
        softmax.target_log_probs(torch.randn(1, 8), torch.tensor([[2]]))
    with pytest.raises(TypeError, match=r"^`targets` must be an int64 or int32 tensor of token ids, but is torch\.f"):
        softmax.target_log_probs(torch.randn(1, 8), torch.randn(1))
