"""What the original code got wrong, defect by defect (`docs/concepts/deviations.md`), and that it is right here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
from laws import assert_close, assert_same
from loading import oracle_params
from megablocks.functional import damped_ema, ema_kernel
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    RotaryRelativeBias,
    SequenceNorm,
    SimpleRelativeBias,
)
from megablocks.layers.dropout import SequenceDropout
from megablocks.state import select_rows
from strategies import mask

ATTENTION = ("softmax", "laplace", "relu2")
every_function = pytest.mark.parametrize("attention", ATTENTION)


def loud(module: nn.Module) -> nn.Module:
    """The module in float64, with parameters large enough for a mistake to show."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def attention_layer(**options: Any) -> MovingAverageGatedAttention:
    """A small gated attention."""
    return loud(MovingAverageGatedAttention(6, 4, value_dim=5, **options))


def sequences(*shape: int) -> Tensor:
    """Random inputs."""
    return torch.randn(*shape, dtype=torch.float64)


def streamed(layer: nn.Module, x: Tensor, *cuts: int, padding_mask: Tensor | None = None) -> Tensor:
    """The output of a stream of segments."""
    state, outputs, start = layer.init_state(len(x)), [], 0
    for length in cuts:
        padded = None if padding_mask is None else padding_mask[:, start : start + length]
        y, state = layer(x[:, start : start + length], padding_mask=padded, state=state)
        outputs.append(y)
        start += length
    return torch.cat(outputs, dim=1)


def assert_rows_alone(layer: nn.Module, x: Tensor, padding_mask: Tensor) -> None:
    """Every row gives what it gives without its padding."""
    y = layer(x, padding_mask=padding_mask)
    for row, padded in enumerate(padding_mask):
        assert_close(y[row, ~padded], layer(x[row : row + 1, ~padded])[0])


def test_d1_truncation_holds_in_a_stream():
    layer = attention_layer(ema=MultiDimensionDampedEMA(6, 2, truncation=3))
    untruncated = attention_layer(ema=2)
    untruncated.load_state_dict(layer.state_dict())
    x = sequences(2, 9, 6)
    assert_close(streamed(layer, x, *[1] * 9), layer(x))
    assert (layer(x) - untruncated(x)).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_d2_no_truncation_of_zero(causal):
    with pytest.raises(
        ValueError, match=r"^`truncation` must be at least 1, but is 0; use `None` for no truncation\.$"
    ):
        MultiDimensionDampedEMA(4, causal=causal, truncation=0)
    # The least there is keeps a token's own step.
    ema, x = loud(MultiDimensionDampedEMA(4, 2, causal=causal, truncation=1)), sequences(1, 5, 4)
    assert_close(ema(x), torch.cat([ema(x[:, t : t + 1]) for t in range(5)], dim=1))


@every_function
@pytest.mark.parametrize("rows", [("###....", "......."), ("..##.#.", "#.#.#.#")])
def test_d3_a_stream_remembers_padding(attention, rows):
    layer, x, padded = attention_layer(attention=attention), sequences(2, 7, 6), mask(rows)
    assert_close(streamed(layer, x, 2, 1, 3, 1, padding_mask=padded), layer(x, padding_mask=padded))
    assert_rows_alone(layer, x, padded)


@every_function
def test_d4_left_padding_gives_no_nan(attention):
    layer, x = attention_layer(attention=attention), sequences(2, 6, 6)
    y = layer(layer(x, padding_mask=mask(("####..", "######"))), padding_mask=mask(("####..", "######")))
    assert bool(y.isfinite().all())
    gradients = torch.autograd.grad(y.sum(), list(layer.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("attention", ["laplace", "relu2"])
def test_d5_padding_is_not_counted_as_a_key(attention):
    layer, x = attention_layer(attention=attention), sequences(1, 6, 6)
    for rows in (("###...",), ("..#.#.",)):
        assert_rows_alone(layer, x, mask(rows))


@every_function
@pytest.mark.parametrize("bias", ["rotary", "simple"])
def test_d6_cross_attention_compares_places_among_real_tokens(attention, bias):
    bias = SimpleRelativeBias(8) if bias == "simple" else bias
    layer = loud(GatedCrossAttention(6, 4, attention=attention, position_bias=bias))
    x, memory = sequences(1, 5, 6), sequences(1, 7, 6)
    real = torch.tensor([4, 5, 6])
    alone = layer(x, memory[:, real])
    assert_close(layer(x, memory, memory_padding_mask=mask(("####...",))), alone)
    with_padded_queries = torch.cat([sequences(1, 3, 6), x], dim=1)
    y = layer(
        with_padded_queries,
        memory,
        padding_mask=mask(("###.....",)),
        memory_padding_mask=mask(("####...",)),
    )
    assert_close(y[:, 3:], alone)


def test_d7_no_coefficients_outlive_their_parameters():
    ema, other, x = loud(MultiDimensionDampedEMA(4, 2)).eval(), loud(MultiDimensionDampedEMA(4, 2)), sequences(1, 5, 4)
    with torch.no_grad():
        ema(x)
    ema(x).sum().backward()
    assert bool(ema.eta.grad.any())
    y = ema(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    ema.load_state_dict(other.state_dict())
    assert_same(ema(x), other(x))
    assert_same(ema.float()(x.float()), other.float()(x.float()))


@every_function
@pytest.mark.parametrize("cuts", [(6, 6), (5, 7), (1, 10, 1), (3, 4, 5), (12,)])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_d8_segments_need_not_fit_chunks(attention, cuts, chunk_size):
    layer, x = attention_layer(attention=attention, chunk_size=chunk_size), sequences(2, 12, 6)
    assert_close(streamed(layer, x, *cuts), layer(x))


def test_d10_batch_statistics_skip_padding():
    norm, plain = SequenceNorm(4, norm="batchnorm").double(), nn.BatchNorm1d(4).double()
    x, padded = sequences(3, 6, 4), mask(("..####", "......", "#.#.#."))
    x[padded] = 1e3
    y = norm(x, padding_mask=padded)
    assert_close(y[~padded], plain(x[~padded]))
    assert_close(norm.norm.running_mean, plain.running_mean)
    assert_close(norm.norm.running_var, plain.running_var)
    with pytest.raises(
        ValueError, match=r"^A causal layer needs a norm of each token alone, but `norm\.norm` is a Batch"
    ):
        attention_layer(norm="batchnorm")


def test_d11_no_bidirectional_average_in_a_causal_layer():
    with pytest.raises(ValueError, match=r"^A causal layer needs an average that looks back only, but `ema` is bidir"):
        attention_layer(ema=MultiDimensionDampedEMA(6, 2, causal=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_d12_decays_neither_saturate_nor_lose_lags(dtype):
    # (a) The original's kernel is NaN once alpha and delta exceed 16.75 (float32), 8.5 (float16), 6.25 (bfloat16).
    for logit in (6.25, 8.5, 16.75, 88.0):
        params = [torch.full((2, 2), value, dtype=dtype).requires_grad_() for value in (logit, logit, 1.0, 1.0)]
        y = damped_ema(torch.ones(1, 9, 2, dtype=dtype), *params)
        assert bool(y.isfinite().all())
        assert all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(y.float().sum(), params))
    # (b), (c) A slow decay, as its parameters say, at a lag where the original is off by 640% in bfloat16.
    params = [torch.tensor([[value]], dtype=dtype) for value in (-9.0, 2.0, 1.0, 1.0)]
    for lag in (257, 3000, 16_383):
        found = ema_kernel(*params, lag + 1)[0, -1].double()
        expected = ema_kernel(*(parameter.double() for parameter in params), lag + 1)[0, -1]
        assert abs(found / expected - 1) < 1e-4


def test_d13_float64_is_float64_and_the_future_is_not_felt():
    params, x = [sequences(3, 4) for _ in range(4)], sequences(1, 1000, 3)
    expected, _ = oracles.ema(x, *params, torch.zeros(3))
    assert_close(damped_ema(x, *params), expected)
    params, x = [parameter.float() for parameter in params], x.float()
    y = damped_ema(x, *params)
    for size in (1e4, 1e6, 1e30):
        disturbed = x.clone()
        disturbed[:, 600:] = size
        assert_same(damped_ema(disturbed, *params)[:, :600], y[:, :600])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_d14_the_state_of_a_half_precision_stream_does_not_drift(dtype):
    ema = MultiDimensionDampedEMA(4, 4).to(dtype)
    with torch.no_grad():
        ema.alpha.sub_(4.0)  # averages over hundreds of tokens
    x = torch.randn(2, 300, 4).to(dtype)
    state, outputs = ema.init_state(2), []
    truncated = MultiDimensionDampedEMA(4, 4, truncation=3, dtype=dtype).init_state(2)
    assert state.hidden.dtype == truncated.inputs.dtype == torch.float32
    for token in x.unbind(1):
        y, state = ema(token.unsqueeze(1), state=state)
        outputs.append(y)
    assert state.hidden.dtype == torch.float32
    exact = MultiDimensionDampedEMA(4, 4).double()
    exact.load_state_dict(ema.state_dict())
    # Only the output is rounded: one rounding of the dtype at most, and of float32 for the averages.
    assert_close(torch.cat(outputs, dim=1), exact(x.double()), 1.01 * torch.finfo(dtype).eps)


def test_d15_rotary_angles_survive_other_precisions_and_are_not_saved():
    bias = RotaryRelativeBias(8)
    before = bias(64)
    assert set(bias.state_dict()) == {"alpha", "beta"}
    rounded = RotaryRelativeBias(8)
    rounded.load_state_dict({key: value.bfloat16() for key, value in bias.state_dict().items()})
    bias.bfloat16()(64)
    bias.float()
    assert_same(bias(64), rounded(64))
    assert_close(before, rounded(64), 4 * torch.finfo(torch.bfloat16).eps)
    # At 16k float32 angles are off by 1.5e-4; these are not.
    far = RotaryRelativeBias(8).double()
    expected = oracles.rotary_bias(far.alpha, far.beta, range(16_000, 16_003), range(3))
    assert_close(far(3, 3, query_offset=16_000), expected)
    assert_close(far.float()(3, 3, query_offset=16_000), expected, 1e-6, floor=1e-3)


def test_d16_feature_dropout_drops_channels():
    dropout, x = SequenceDropout(0.5, channels=True), torch.ones(50, 7, 40)
    y = dropout(x)
    kept = y[:, 0] != 0
    assert_same(y, (kept * 2.0).unsqueeze(1).expand_as(y))
    # 2000 draws with a deviation of 0.011 around one half; and no row is kept or dropped as a whole.
    assert 0.45 < kept.double().mean() < 0.55
    assert not kept.all(1).any()
    assert kept.any(1).all()


def test_d16_values_lose_channels_in_chunked_attention():
    layer = attention_layer(hidden_dropout=0.5, feature_dropout=True, chunk_size=2, activation="linear")
    seen = []
    layer.hidden_dropout.register_forward_hook(lambda part, args, y: seen.append((args[0], y)))
    layer(sequences(3, 6, 6))
    ((values, dropped),) = seen
    assert values.shape == (3, 6, 5)
    ratio = dropped / values
    assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert 0 < (ratio == 0).double().mean() < 1


@every_function
def test_d17_a_memory_of_padding_gives_attention_of_zero(attention):
    layer = loud(GatedCrossAttention(6, 4, attention=attention))
    x, memory, padded = sequences(2, 3, 6), sequences(2, 4, 6), mask(("####", "...."))
    memory.requires_grad_()
    y, trace = layer(x, memory, memory_padding_mask=padded, trace=True)
    assert not trace.cross_attention_weights[0][0].any()
    expected, _ = oracles.cross_attention(
        x, memory, oracle_params(layer), attention=attention, memory_padding_mask=padded
    )
    assert_close(y, expected)
    gradients = torch.autograd.grad(y.sum(), [memory, *layer.parameters()])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_d17_padded_queries_give_zeros_and_rows_can_be_reordered():
    layer = loud(GatedCrossAttention(6, 4))
    x, memory, padded = sequences(2, 3, 6), sequences(2, 4, 6), mask(("#..", "..#"))
    y = layer(x, memory, padding_mask=padded)
    assert_same(y[padded], torch.zeros_like(y[padded]))
    order = torch.tensor([1, 0])
    state = select_rows(layer.init_state(memory, mask(("#...", "...."))), order)
    swapped, _ = layer(x[order], state=state)
    assert_close(swapped, layer(x, memory, memory_padding_mask=mask(("#...", "....")))[order])


@every_function
@pytest.mark.parametrize("causal", [True, False])
def test_d18_lengths_need_not_fit_chunks(attention, causal):
    layer = attention_layer(attention=attention, chunk_size=8, causal=causal)
    for length in (1, 3, 7, 8, 9, 15, 17):
        x = sequences(1, length, 6)
        options = {"causal": causal, "chunk_size": 8, "attention": attention}
        assert_close(layer(x), oracles.gated_attention(x, oracle_params(layer), **options)[0])


def test_d22_one_simple_table_serves_every_chunk_size():
    layer, x = attention_layer(position_bias=SimpleRelativeBias(12)), sequences(1, 12, 6)
    for chunk_size in (1, 3, 5, 12, None):
        layer.chunk_size = chunk_size
        options = {"causal": True, "chunk_size": chunk_size, "bias": "simple"}
        assert_close(layer(x), oracles.gated_attention(x, oracle_params(layer), **options)[0])


@pytest.mark.parametrize("keys", [258, 301, 514])
def test_d23_keys_are_counted_exactly_in_half_precision(keys):
    # Every score is `keys` before the division: bfloat16 counts of 260, 300 or 512 would not give 1.
    layer = MovingAverageGatedAttention(2, 1, attention="relu2", causal=False, position_bias=None, norm=None).bfloat16()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.qk_bias.copy_(torch.tensor([[16.0], [16.0]]))
    x = torch.randn(1, keys + 1, 2).bfloat16()
    padded = torch.arange(keys + 1)[None] == 5
    _, trace = layer(x, padding_mask=padded, trace=True)
    weights = trace.attention_weights[0][0, 0][~padded[0]][:, ~padded[0]]
    expected = torch.full_like(weights, (256.0 / keys) ** 2)
    assert_close(weights, expected, 4 * torch.finfo(torch.float32).eps)


def test_d24_a_chunk_of_padding_is_not_there():
    layer, x = attention_layer(chunk_size=3), sequences(1, 9, 6)
    padded = mask(("...######",))
    y, trace = layer(x, padding_mask=padded, trace=True)
    assert not trace.attention_weights[0][:, 1:].any()
    assert_same(y[padded], torch.zeros_like(y[padded]))
    assert_rows_alone(layer, x, mask(("...###...",)))


def test_d25_a_padded_step_is_no_step():
    for truncation in (None, 3):
        ema, x = loud(MultiDimensionDampedEMA(4, 2, truncation=truncation)), sequences(2, 7, 4)
        assert_rows_alone(ema, x, mask(("..##...", "####..#")))
        _, state = ema(x[:, :4], padding_mask=mask(("..##", "####")), state=ema.init_state(2))
        _, alone = ema(x[:1, :2], state=ema.init_state(1))
        assert_close(state[0][:1], alone[0])
        assert not state[0][1].any()


@every_function
def test_d26_padding_moves_no_chunk_border(attention):
    layer, x = attention_layer(attention=attention, chunk_size=4), sequences(2, 11, 6)
    assert_rows_alone(layer, x, mask(("###........", "..#..##...#")))
    bidirectional = attention_layer(attention=attention, chunk_size=4, causal=False)
    assert_rows_alone(bidirectional, x, mask(("###........", "..#..##...#")))
