"""Encoder and decoder stacks: what a list of layers adds to its layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from megablocks import (
    GatedCrossAttention,
    MegaDecoder,
    MegaDecoderLayer,
    MegaEncoder,
    MegaEncoderLayer,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    SequenceNorm,
    mega_decoder,
    mega_encoder,
)

SIZES = {"qk_dim": 4, "ffn_dim": 12, "ema_dim": 2}


class Smoother(nn.Module):
    """A layer of somebody's own: an average and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.ema = MultiDimensionDampedEMA(8, 2)

    def init_state(self, batch_size):
        return self.ema.init_state(batch_size)

    def forward(self, x, *, padding_mask=None, state=None):
        if state is None:
            return x + self.ema(x, padding_mask=padding_mask)
        y, state = self.ema(x, padding_mask=padding_mask, state=state)
        return x + y, state


def test_layer_drop_skips_layers_in_training_alone():
    encoder = mega_encoder(3, 8, layer_drop=0.5, **SIZES).train()
    x = torch.randn(2, 5, 8)
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        _, trace = encoder(x, trace=True)
        before = trace.hidden_states
        seen.add(tuple(bool(torch.equal(a, b)) for a, b in pairwise(before)))
    assert len(seen) == 8  # every choice of skipped layers comes up
    encoder.eval()
    _, trace = encoder(x, trace=True)
    assert not any(torch.equal(a, b) for a, b in pairwise(trace.hidden_states))


def test_layer_drop_keeps_the_asked_share():
    encoder = MegaEncoder([Smoother()], layer_drop=0.25).train()
    x = torch.randn(1, 2, 8)
    torch.manual_seed(0)
    skipped = sum(torch.equal(encoder(x), x) for _ in range(2000))
    assert abs(skipped / 2000 - 0.25) < 0.04  # four standard deviations


@pytest.mark.parametrize("streams", [False, True])
def test_checkpointing_changes_memory_and_nothing_else(streams):
    torch.manual_seed(0)
    plain = mega_decoder(2, 8, chunk_size=3, dropout=0.2, attention_dropout=0.2, **SIZES).train()
    saving = mega_decoder(2, 8, chunk_size=3, dropout=0.2, attention_dropout=0.2, checkpoint=True, **SIZES).train()
    saving.load_state_dict(plain.state_dict())
    x, results = torch.randn(2, 7, 8), []
    for decoder in (plain, saving):
        inputs = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = decoder(inputs, state=decoder.init_state(2))[0] if streams else decoder(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *(parameter.grad for parameter in decoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_checkpointing_keeps_no_activations_of_layers():
    kept = []
    for checkpoint in (False, True):
        encoder = mega_encoder(2, 8, checkpoint=checkpoint, **SIZES).train()
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(torch.randn(2, 50, 8))
        kept.append(count[0])
    assert kept[1] < kept[0] / 5


def test_hidden_states_are_the_input_and_each_layers_output():
    encoder = mega_encoder(3, 8, **SIZES).eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [True, False, False, True, False]])
    y, trace = encoder(x, padding_mask=mask, trace=True)
    hidden = x.masked_fill(mask.unsqueeze(-1), 0.0)
    for layer, (before, after) in zip(encoder.layers, pairwise(trace.hidden_states), strict=True):
        assert torch.equal(before, hidden)
        hidden = layer(hidden, padding_mask=mask)
        assert torch.equal(after, hidden)
    assert torch.equal(encoder.final_norm(hidden, padding_mask=mask), y)
    assert len(trace.attention_weights) == 3
    assert trace.cross_attention_weights == ()


@pytest.mark.parametrize("streamed", [False, True])
def test_hidden_states_alone_need_no_weights(streamed):
    decoder = mega_decoder(2, 8, **SIZES).eval()
    given = {"state": decoder.init_state(2)} if streamed else {}
    x = torch.randn(2, 5, 8)
    y, trace, *_ = decoder(x, trace=True, **given)
    alone, seen, *_ = decoder(x, trace="hidden_states", **given)
    torch.testing.assert_close(alone, y)
    torch.testing.assert_close(seen.hidden_states, trace.hidden_states)
    assert seen.attention_weights == ()


@pytest.mark.parametrize("build", [mega_encoder, mega_decoder])
def test_stacks_know_what_they_are_asked_to_show(build):
    with pytest.raises(ValueError, match=r"^`trace` must be True, False or \"hidden_states\", but is 'weights'\.$"):
        build(1, 8, **SIZES)(torch.randn(1, 3, 8), trace="weights")


def test_somebodys_own_layers_stream_with_the_others():
    decoder = MegaDecoder([Smoother(), MovingAverageGatedAttention(8, 4, chunk_size=3), Smoother()]).eval()
    x = torch.randn(2, 8, 8)
    first, state = decoder(x[:, :5], state=decoder.init_state(2))
    rest, _ = decoder(x[:, 5:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), decoder(x))


def test_layers_with_and_without_cross_attention_mix():
    layers = [
        MegaDecoderLayer(MovingAverageGatedAttention(8, 4)),
        MegaDecoderLayer(MovingAverageGatedAttention(8, 4), GatedCrossAttention(8, 4)),
    ]
    decoder = MegaDecoder(layers).eval()
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    whole, trace = decoder(x, memory, trace=True)
    assert [weights.shape for weights in trace.cross_attention_weights] == [(2, 5, 6)]
    first, state = decoder(x[:, :2], state=decoder.init_state(2, memory))
    rest, _ = decoder(x[:, 2:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)


def test_builders_make_what_the_options_say():
    decoder = mega_decoder(2, 8, cross_attention=True, position_bias="simple", max_positions=9, prenorm=False, **SIZES)
    assert decoder.final_norm is None
    assert decoder.layers[0].attention.position_bias is not decoder.layers[1].attention.position_bias
    assert decoder.layers[0].cross_attention.position_bias.max_positions == 9
    plain = mega_encoder(1, 8, qk_dim=4, final_norm_affine=False, position_bias=None, dtype=torch.float64)
    assert plain.layers[0].feed_forward is None
    assert list(plain.final_norm.parameters()) == []
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float64}


def bidirectional():
    return MovingAverageGatedAttention(8, 4, causal=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MegaEncoder([]), r"^`layers` must hold at least one layer, but is empty\.$"),
        (lambda: MegaEncoder(["layer"]), r"^`layers\[0\]` must be a torch\.nn\.Module, but is a str\.$"),
        (lambda: mega_encoder(0, 8, qk_dim=4), r"^`num_layers` must be at least 1, but is 0\.$"),
        (lambda: mega_encoder(1, 8, qk_dim=4, layer_drop=1.0), r"^`layer_drop` must be in \[0, 1\), but is 1\.0\.$"),
        (
            lambda: MegaDecoder([bidirectional()]),
            r"^A causal stack needs attention that looks back only, but `layers\.0`",
        ),
        (
            lambda: MegaDecoderLayer(bidirectional()),
            r"^A causal stack needs attention .* `attention` has causal=False; ",
        ),
        (
            lambda: MegaDecoder([Smoother(), NormalizedFFN(8, 12, norm="batchnorm")]),
            r"^A causal layer needs a norm of each token alone, but `layers\.1\.norm\.norm` is a BatchNorm1d",
        ),
        (
            lambda: MegaDecoder([Smoother()], final_norm=SequenceNorm(8, norm="batchnorm")),
            r"but `final_norm\.norm` is a BatchNorm1d, whose statistics include later tokens; use \"layernorm\"",
        ),
        (lambda: mega_decoder(1, 8, qk_dim=4, norm="batchnorm"), r"^A causal layer needs a norm of each token alone"),
        (
            lambda: MegaEncoder([nn.Identity()], final_norm="layernorm"),
            r"^MegaEncoder needs a layer with an attribute `embed_dim`",
        ),
        (
            lambda: mega_encoder(1, 8, qk_dim=4, position_bias="simple"),
            r"^`max_positions` must be given for position_bias=\"simple\", but is None\.$",
        ),
        (
            lambda: mega_encoder(1, 8, qk_dim=4, max_positions=7),
            r"^`max_positions` is the size of a simple bias, but position_bias is 'rotary', which has no such limit; ",
        ),
        (
            lambda: mega_encoder(1, 8, qk_dim=4, position_bias="alibi"),
            r"^`position_bias` must be one of 'rotary', 'simple', or None, but is 'alibi'\.$",
        ),
    ],
)
def test_what_cannot_be_a_stack_is_said_when_it_is_made(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_calls_that_cannot_be_right_are_answered():
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    plain = MegaDecoder([Smoother()])
    crossed = mega_decoder(1, 8, cross_attention=True, **SIZES)
    with pytest.raises(ValueError, match=r"^This MegaDecoder has no cross-attention, but got a `memory`; "):
        plain(x, memory)
    with pytest.raises(ValueError, match=r"^This MegaDecoderLayer has no cross-attention, but got a `memory`; "):
        mega_decoder(1, 8, **SIZES).layers[0](x, memory)
    with pytest.raises(
        ValueError, match=r"^A call with cross-attention needs a `memory` or a `state`, but got neither\.$"
    ):
        crossed(x)
    with pytest.raises(ValueError, match=r"^A call takes a memory or a state, but got both; "):
        crossed(x, memory, state=crossed.init_state(2, memory))
    with pytest.raises(ValueError, match=r"^`state` must hold one state for each of 1 layers, but holds 2; "):
        plain(x, state=MegaDecoder([Smoother(), Smoother()]).init_state(2))
    with pytest.raises(TypeError, match=r"^`state` of MegaDecoder must be DecoderState, but is EMAState; "):
        plain(x, state=plain.layers[0].init_state(2))
    with pytest.raises(ValueError, match=r"^`x` must have shape \(batch, length, 8\), but has shape \(2, 5, 9\); "):
        crossed(torch.randn(2, 5, 9), memory)
    with pytest.raises(ValueError, match=r"^`chunk_size` must be at least 1, but is 0; use `None` for no chunks\.$"):
        crossed.set_chunk_size(0)
    with pytest.raises(
        TypeError, match=r"^`padding_mask` must be a bool tensor, True at padding and False at real tokens"
    ):
        MegaEncoder([MegaEncoderLayer(bidirectional())])(x, padding_mask=torch.ones(2, 5))


def test_checkpointing_counts_a_batch_once():
    encoders = [mega_encoder(2, 8, norm="batchnorm", checkpoint=checkpoint, **SIZES) for checkpoint in (False, True)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [True, False, False, True, False]])
    for encoder in encoders:
        encoder.train()(x, padding_mask=mask).sum().backward()
    for (name, one), other in zip(encoders[0].named_buffers(), encoders[1].buffers(), strict=True):
        assert torch.equal(one, other), name


def test_a_bare_average_is_a_layer_too():
    decoder = MegaDecoder([MultiDimensionDampedEMA(8, 2), MovingAverageGatedAttention(8, 4, chunk_size=3)]).eval()
    x = torch.randn(2, 8, 8)
    first, state = decoder(x[:, :5], state=decoder.init_state(2))
    rest, _ = decoder(x[:, 5:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), decoder(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mega_encoder(2, 8), r"^`qk_dim` must be given: it is the width of queries and keys\.$"),
        (
            lambda: mega_encoder(2, 8, qk_dim=4, ema=8),
            r"^`ema` is not an option of a layer; those are qk_dim, value_dim, ",
        ),
        (
            lambda: mega_encoder(2, 8, qk_dim=4, norm=nn.LayerNorm(8)),
            r"^`norm` must be a name or a function here, because all layers would share one module, but is a LayerNo",
        ),
        (
            lambda: MegaEncoder(bidirectional()),
            r"^`layers` must be a list of modules, but is MovingAverageGatedAttention; ",
        ),
        (lambda: MegaEncoder(3), r"^`layers` must be a list of modules, but is int; a single one goes in a list"),
        (
            lambda: MegaEncoderLayer("attention"),
            r"^`attention` must be a MovingAverageGatedAttention, or a module called like one, but is a str\.$",
        ),
        (
            lambda: MegaDecoderLayer(MovingAverageGatedAttention(8, 4), NormalizedFFN(8, 12)),
            r"^`cross_attention` must be a GatedCrossAttention, .* but is a NormalizedFFN, which has none\.$",
        ),
    ],
)
def test_parts_that_are_none_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_memory_of_another_batch_is_refused():
    crossed = mega_decoder(1, 8, cross_attention=True, **SIZES)
    with pytest.raises(
        ValueError, match=r"^`memory` must have the batch size of the input, 3, but has 2; give each row one"
    ):
        crossed.init_state(3, torch.randn(2, 6, 8))
    with pytest.raises(
        ValueError, match=r"^This MegaDecoder has no cross-attention, but got a `memory_padding_mask`; "
    ):
        mega_decoder(1, 8, **SIZES)(torch.randn(2, 5, 8), memory_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
