"""Parts that are not ours inside our layers: what they do with what they get, and what they may give back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megablocks import (
    GatedCrossAttention,
    MegaClassifier,
    MegaDecoderLayer,
    MegaEncoder,
    MegaEncoderLayer,
    MegaLanguageModel,
    MovingAverageGatedAttention,
    NormalizedFFN,
    RotaryRelativeBias,
    SequenceNorm,
    ema_backend,
    mega_decoder,
    mega_encoder,
)
from megablocks.models.embedding import TokenEmbedding
from megablocks.state import select_rows


class ComplexAverage(nn.Module):
    """Reads real numbers as complex ones, as state-space layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.cfloat))

    def forward(self, x, *, padding_mask=None, state=None):
        """Returns the weighted numbers."""
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * self.weight).flatten(-2)


class Pruned(nn.Module):
    """A linear map behind a sparse one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("kept", torch.eye(linear.out_features).to_sparse())

    def forward(self, x):
        """Returns what the maps make of x."""
        return torch.sparse.mm(self.kept, self.linear(x).flatten(0, 1).T).T.unflatten(0, x.shape[:2])


class Heads(nn.Module):
    """A bias for each of three heads, as other libraries have it."""

    def forward(self, queries, keys):
        """Returns (3, L, S)."""
        return torch.randn(3, queries.shape[-1], keys.shape[-1])


class Mean(nn.Module):
    """Forgets positions."""

    embed_dim = 8

    def forward(self, x, **given):
        """Returns (B, 1, D)."""
        return x.mean(1, keepdim=True)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_a_part_that_reads_numbers_as_complex_ones(norm, prenorm):
    layer = MovingAverageGatedAttention(8, 4, ema=ComplexAverage(), norm=norm, prenorm=prenorm)
    x = torch.randn(2, 5, 8)
    found = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):  # everything is kept as it is
        y = layer(x)
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), layer.parameters()), strict=True):
        torch.testing.assert_close(one, other)


def test_a_part_that_keeps_sparse_tensors():
    layer = MovingAverageGatedAttention(8, 4)
    x = torch.randn(2, 5, 8, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    layer.v_proj = Pruned(layer.v_proj)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], expected)


def test_who_forbids_hooks_gets_none():
    layer, x = MovingAverageGatedAttention(8, 4), torch.randn(2, 5, 8, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    with disable_saved_tensors_hooks("forbidden"):
        y = layer(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("chunk_size", [None, 280])
def test_dropout_of_weights_is_the_same_with_and_without_gradients(chunk_size):
    layer, x = MovingAverageGatedAttention(8, 4, chunk_size=chunk_size, attention_dropout=0.3), torch.randn(1, 300, 8)
    torch.manual_seed(1)
    once = layer(x)
    with torch.no_grad():
        torch.manual_seed(1)
        again = layer(x)
    torch.testing.assert_close(again, once)
    x.requires_grad_()
    gradients = []
    for reentrant in (True, False):
        torch.manual_seed(1)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        (gradient,) = torch.autograd.grad(y.square().sum(), x) if not reentrant else (_accumulated(y, x),)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


def _accumulated(y, x):
    y.square().sum().backward()
    gradient, x.grad = x.grad, None
    return gradient


@pytest.mark.parametrize("attention", ["softmax", "laplace"])
def test_a_bias_with_heads_is_refused(attention):
    layer = MovingAverageGatedAttention(8, 4, position_bias=Heads(), attention=attention).eval()
    crossing = GatedCrossAttention(8, 4, position_bias=Heads(), attention=attention)
    chunked = MovingAverageGatedAttention(8, 4, position_bias=Heads(), attention=attention, chunk_size=2)
    x = torch.randn(1, 6, 8)
    rule = r"^A position bias must return shape \(.*\) for these positions, .* but returned shape \(3, .*; there is one"
    for call in (
        partial(layer, x),
        partial(layer, x, state=layer.init_state(1)),
        partial(crossing, x, x),
        partial(chunked, x),
    ):
        with pytest.raises(ValueError, match=rule):
            call()


@pytest.mark.parametrize("width", [4, 32])
def test_a_rotary_bias_of_another_width(width):
    layer = MovingAverageGatedAttention(8, 16, value_dim=40, position_bias=RotaryRelativeBias(width)).double().eval()
    x = torch.randn(1, 520, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x, trace=True)[0])


def test_parts_that_change_shapes_are_refused():
    x, tokens = torch.randn(2, 5, 8), torch.randint(8, (2, 5))

    def first_row(x):
        return x.mean(0, keepdim=True)

    def one_weight(scores):
        return scores.sum(-1, keepdim=True)

    calls = {
        "norm": partial(MovingAverageGatedAttention(8, 4, norm=Mean()), x),
        "ema": partial(MovingAverageGatedAttention(8, 4, ema=Mean()), x),
        "activation": partial(MovingAverageGatedAttention(8, 4, activation=first_row), x),
        "attention": partial(MovingAverageGatedAttention(8, 4, attention=one_weight), x),
    }
    more = {
        "norm": partial(SequenceNorm(8, norm=Mean()), x),
        "activation": partial(NormalizedFFN(8, 4, activation=first_row), x),
    }
    for name, call in [*calls.items(), *more.items()]:
        with pytest.raises(
            ValueError, match=rf"^`{name}` must return shape \(2, .*, but returned shape .*; nothing is"
        ):
            call()
    with pytest.raises(ValueError, match=r"^`activation` must return shape"):
        GatedCrossAttention(8, 4, activation=first_row)(x, x)
    model = MegaLanguageModel(mega_decoder(1, 8, qk_dim=4), 8, output=Mean())
    with pytest.raises(ValueError, match=r"^`output` must give one logit .* \(2, 5, 8\), but gave \(2, 1, 8\)\.$"):
        model(tokens)


def test_parts_of_other_widths_are_refused_when_they_are_put_together():
    attention, narrow = MovingAverageGatedAttention(8, 4), NormalizedFFN(4, 4)
    rule = r"^`{}` must have the width of what it is part of, 8, but is a {} of width 4; make both of one width\.$"
    with pytest.raises(ValueError, match=rule.format("feed_forward", "NormalizedFFN")):
        MegaEncoderLayer(attention, narrow)
    with pytest.raises(ValueError, match=rule.format("cross_attention", "GatedCrossAttention")):
        MegaDecoderLayer(attention, GatedCrossAttention(4, 4))
    with pytest.raises(ValueError, match=rule.format(r"layers\[1\]", "NormalizedFFN")):
        MegaEncoder([attention, narrow])
    with pytest.raises(ValueError, match=rule.format("embedding", "TokenEmbedding")):
        MegaLanguageModel(mega_decoder(1, 8, qk_dim=4), 8, embedding=TokenEmbedding(8, 4))


def test_states_of_other_batches_and_rows():
    layer, x = GatedCrossAttention(8, 4), torch.randn(2, 5, 8)
    state = layer.init_state(torch.randn(2, 3, 8))
    for name in state._fields:
        with pytest.raises(
            ValueError, match=r"^`state` must have the batch size of the input, 2, but was made for 1; "
        ):
            layer(x, state=state._replace(**{name: getattr(state, name)[:1]}))
    for rows in ([0], torch.tensor([True, False])):
        with pytest.raises(TypeError, match=r"^`rows` must be an int64 tensor of row numbers, .*nonzero\(\)"):
            select_rows(state, rows)
    decoder = MegaDecoderLayer(MovingAverageGatedAttention(8, 4), layer)
    with pytest.raises(ValueError, match=r"^`memory` must have the batch size of the input, 2, but has 1; "):
        decoder.init_state(2, x[:1])
    stack = mega_decoder(1, 8, qk_dim=4, cross_attention=True)
    with pytest.raises(TypeError, match=r"^`memory` must be a tensor of shape \(batch, length, 8\), but is list\."):
        stack.init_state(2, [1])


def test_what_a_trace_is_asked_for():
    tokens = torch.randint(8, (2, 5))
    classifier = MegaClassifier(mega_encoder(2, 8, qk_dim=4), 3, vocab_size=8)
    language_model = MegaLanguageModel(mega_decoder(2, 8, qk_dim=4), 8)
    for model in (classifier, language_model):
        _, seen = model(tokens, trace="hidden_states")
        assert (len(seen.hidden_states), seen.attention_weights) == (3, ())
        with pytest.raises(ValueError, match=r'^`trace` must be True, False or "hidden_states", but is \'all\'\.$'):
            model(tokens, trace="all")
    with pytest.raises(TypeError, match=r"^`trace` must be True or False, but is 'all'\.$"):
        MovingAverageGatedAttention(8, 4)(torch.randn(2, 5, 8), trace="all")


@pytest.mark.parametrize("backend", ["auto", "blocked", "recurrent"])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"causal": False}, {"attention": "laplace"}], ids=str)
def test_a_batch_without_rows(backend, options):
    layer = MovingAverageGatedAttention(8, 4, **options)
    x, mask = torch.randn(0, 20, 8, requires_grad=True), torch.zeros(0, 20, dtype=torch.bool)
    with ema_backend(backend):
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape == layer(x, padding_mask=mask).shape
        if layer.causal:
            none = select_rows(layer.init_state(1), torch.zeros(0, dtype=torch.int64))
            first, state = layer(x[:, :7], state=none)
            assert (first.shape, state.ema.hidden.shape[0]) == ((0, 7, 8), 0)
