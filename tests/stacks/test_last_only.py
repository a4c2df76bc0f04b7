"""`last_only=True`: the output of the last real tokens, the same state, and less work."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from laws import assert_states_close
from megablocks import MegaDecoder, MegaLanguageModel, MovingAverageGatedAttention, mega_decoder
from megablocks.functional.padding import last_real_position

WIDTH = 16
SEGMENTS = [(0, 1), (0, 4), (0, 9), (3, 5), (3, 1), (5, 3), (2, 13)]
"""Tokens before a segment, and its own."""


def decoder(chunk_size: int | None = None, **options: object) -> MegaDecoder:
    torch.manual_seed(0)
    return mega_decoder(2, WIDTH, qk_dim=8, chunk_size=chunk_size, **options).double().eval()


def given(padded: bool, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Any padding, all of the first row's tokens among it."""
    return {"padding_mask": (torch.rand(batch, length) < 0.4).index_fill(0, torch.tensor([0]), True)} if padded else {}


def tokens(length: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("padded", ["nowhere", "before", "now", "everywhere"])
@pytest.mark.parametrize("options", [{}, {"attention": "laplace", "ffn_dim": 24}, {"prenorm": False}], ids=str)
@pytest.mark.parametrize("bias", ["rotary", "simple"])
@pytest.mark.parametrize("chunk_size", [None, 4, 7, 64])
def test_it_is_the_last_of_the_whole(chunk_size, bias, options, padded):
    table = {"max_positions": 64} if bias == "simple" else {}
    stack = decoder(chunk_size, position_bias=bias, **table, **options)
    for (before, length), capacity in itertools.product(SEGMENTS, (None,) if chunk_size else (None, 30)):
        state = stack.init_state(3, capacity=capacity)
        if before:
            _, state = stack(tokens(before), state=state, **given(padded in ("before", "everywhere"), 3, before))
        x, mask = tokens(length), given(padded in ("now", "everywhere"), 3, length)
        unknown = x.masked_fill(mask["padding_mask"].unsqueeze(-1), torch.nan) if mask else x
        last, after_last = stack(unknown, state=state, last_only=True, **mask)
        y, after = stack(x, state=state, **mask)  # from a state that the call before must not have written into
        torch.testing.assert_close(last, last_real_position(y, mask.get("padding_mask")), rtol=1e-11, atol=1e-12)
        assert_states_close(after_last, after)


def test_without_a_state_and_in_training_too():
    stack = decoder(4, layer_drop=0.5)
    x, mask = tokens(9), given(True, 3, 9)
    wanted = last_real_position(stack(x, **mask), mask["padding_mask"])
    torch.testing.assert_close(stack(x, last_only=True, **mask), wanted)
    stack.train()
    torch.manual_seed(1)
    y, _ = stack(x, state=stack.init_state(3))
    torch.manual_seed(1)
    last, _ = stack(x, state=stack.init_state(3), last_only=True)
    torch.testing.assert_close(last, y[:, -1:])


def test_gradients_are_those_of_the_last_output():
    stack = decoder(4)
    found = []
    for last_only in (False, True):
        torch.manual_seed(1)
        x = tokens(11).requires_grad_()
        y, _ = stack(x, state=stack.init_state(3), last_only=last_only)
        y[:, -1].square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_layers_alone():
    layer = MovingAverageGatedAttention(WIDTH, 8, chunk_size=4, causal=False).double().eval()
    x, mask = tokens(9), given(True, 3, 9)
    y, trace = layer(x, trace=True, **mask)
    last, same = layer(x, trace=True, last_only=True, **mask)
    torch.testing.assert_close(last, last_real_position(y, mask["padding_mask"]))
    torch.testing.assert_close(same, trace)
    causal = MovingAverageGatedAttention(WIDTH, 8).double().eval()
    _, whole, _ = causal(x, state=causal.init_state(3), trace=True)
    _, trace, _ = causal(x, state=causal.init_state(3), trace=True, last_only=True)
    torch.testing.assert_close(trace.attention_weights[0], whole.attention_weights[0][:, :, -1:])


@pytest.mark.parametrize("last_only", [False, True])
def test_with_a_memory(last_only):
    stack = decoder(4, cross_attention=True, ffn_dim=24)
    memory, x = tokens(5), tokens(11)
    state = stack.init_state(3, memory)
    first, state = stack(x[:, :9], state=state, last_only=last_only)
    rest, _ = stack(x[:, 9:], state=state)
    whole = stack(x, memory)
    torch.testing.assert_close(first, whole[:, 8:9] if last_only else whole[:, :9])
    torch.testing.assert_close(rest, whole[:, 9:])


def test_a_trace_shows_whole_hidden_states():
    stack = decoder(4)
    y, trace, _ = stack(tokens(9), state=stack.init_state(3), last_only=True, trace=True)
    assert y.shape[1] == 1
    assert [hidden.shape[1] for hidden in trace.hidden_states] == [9, 9, 9]


class Own(nn.Module):
    """A layer that knows nothing of it."""

    def __init__(self):
        super().__init__()
        self.inner = MovingAverageGatedAttention(WIDTH, 8, chunk_size=4)

    def init_state(self, batch_size):
        return self.inner.init_state(batch_size)

    def forward(self, x, *, padding_mask=None, state=None):
        return self.inner(x, padding_mask=padding_mask, state=state)


def test_layers_and_decoders_of_ones_own_need_not_take_it():
    torch.manual_seed(0)
    stack = MegaDecoder([Own()]).double().eval()
    x = tokens(9)
    y, _ = stack(x, state=stack.init_state(3))
    last, _ = stack(x, state=stack.init_state(3), last_only=True)
    torch.testing.assert_close(last, y[:, -1:])

    class Plain(nn.Module):
        embed_dim = WIDTH

        def init_state(self, batch_size, capacity=None):
            return stack.init_state(batch_size)

        def forward(self, x, *, padding_mask=None, state=None):
            return stack(x, padding_mask=padding_mask, state=state)

    model = MegaLanguageModel(Plain(), vocab_size=11).double().eval()
    ids = torch.randint(11, (2, 7))
    torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


def test_a_forward_put_in_the_place_of_another_need_not_take_it():
    stack, x = decoder(4), tokens(9)
    wanted, _ = stack(x, state=stack.init_state(3), last_only=True)
    layer = stack.layers[-1]
    original = layer.forward
    layer.forward = lambda x, *, padding_mask=None, state=None: original(x, padding_mask=padding_mask, state=state)
    torch.testing.assert_close(stack(x, state=stack.init_state(3), last_only=True)[0], wanted)


def test_the_last_layer_does_no_more_than_the_last_chunk():
    stack, seen = decoder(4, ffn_dim=24), {}

    def note(name):
        return lambda module, inputs, output: seen.setdefault(name, []).append(inputs[0].shape[1])

    for index, layer in enumerate(stack.layers):
        layer.attention.ema.register_forward_hook(note(f"average {index}"))
        layer.attention.mx_proj.register_forward_hook(note(f"projection {index}"))
        layer.feed_forward.register_forward_hook(note(f"feed-forward {index}"))
    stack(tokens(11), state=stack.init_state(3), last_only=True)
    assert seen == {
        "average 0": [11],
        "projection 0": [11],
        "feed-forward 0": [11],
        "average 1": [11],
        "projection 1": [3],
        "feed-forward 1": [1],
    }


def test_compiled():
    torch._dynamo.reset()
    stack = decoder(4)
    fast, x = torch.compile(stack, fullgraph=True, backend="aot_eager"), tokens(9)
    with torch.no_grad():
        wanted = stack(x, state=stack.init_state(3), last_only=True)[0]
        torch.testing.assert_close(fast(x, state=stack.init_state(3), last_only=True)[0], wanted)
