"""Attention as functions: what is seen is said of the set of keys that a query sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from laws import assert_close, assert_same
from megablocks.functional.attention import chunked_attention, streamed_attention
from megablocks.functional.attention_function import (
    ATTENTION,
    AttentionFunction,
    Elementwise,
    attention_function,
    laplace,
    relu2,
)
from megablocks.functional.sight import attend
from megablocks.state import ChunkKeys, FixedKeys, GrowingKeys
from strategies import cases, mask

every_function = pytest.mark.parametrize("name", ATTENTION)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(batch: int, length: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Queries and keys of width 4, values of width 3."""
    return tuple(drawn(batch, length, width, seed=seed + at, dtype=dtype) for at, width in enumerate((4, 4, 3)))


def bias_between(queries: Tensor, keys: Tensor) -> Tensor:
    """A bias that tells every distance from every other."""
    return torch.sin(1.0 + queries.unsqueeze(-1) - 2.0 * keys.unsqueeze(-2)).double()


@every_function
@given(case=cases())
def test_chunked_attention_is_the_oracle(name, case):
    q, k, v = inputs(case.batch, case.length, seed=case.seed)
    padded = mask(case.padding)
    out, weights = chunked_attention(
        q,
        k,
        v,
        ATTENTION[name],
        causal=case.causal,
        chunk_size=case.chunk_size,
        bias=bias_between,
        padding_mask=padded,
    )
    size = case.chunk_size or case.length
    for row in range(case.batch):
        real = torch.ones(case.length, dtype=torch.bool) if padded is None else ~padded[row]
        count = int(real.sum())
        sight = [oracles.visible_keys(i, count, causal=case.causal, chunk_size=case.chunk_size) for i in range(count)]
        expected, seen = oracles.attend(
            q[row, real],
            k[row, real],
            v[row, real],
            sight,
            attention=name,
            bias=lambda i, keys: bias_between(torch.tensor([i % size]), torch.tensor(keys) % size)[0],
        )
        assert_close(out[row, real], expected)
        assert not out[row, ~real].any()
        whole = torch.block_diag(*weights[row])
        if weights.shape[1] == 1:  # one chunk: weights stand at the tokens' own places
            assert_close(whole[real][:, real], seen)
            assert not whole[~real].any()
            assert not whole[:, ~real].any()
        else:
            assert_close(whole[:count, :count], seen)
            assert not whole[count:].any()


@every_function
@given(case=cases(causal=True))
def test_streamed_attention_is_chunked_attention(name, case):
    q, k, v = inputs(case.batch, case.length, seed=case.seed)
    padded = mask(case.padding)
    options = {"bias": bias_between}
    whole, _ = chunked_attention(
        q, k, v, ATTENTION[name], causal=True, chunk_size=case.chunk_size, padding_mask=padded, **options
    )
    kind = ChunkKeys if case.chunk_size else FixedKeys if case.capacity else GrowingKeys
    slots = case.chunk_size or case.capacity or 0
    none = torch.zeros(case.batch, dtype=torch.int64)
    state = kind(q.new_zeros(case.batch, slots, 4), q.new_zeros(case.batch, slots, 3), none)
    start, outputs = 0, []
    for length in case.cuts:
        now = slice(start, start + length)
        hidden = None if padded is None else padded[:, now]
        out, _, state = streamed_attention(
            q[:, now], k[:, now], v[:, now], state, ATTENTION[name], padding_mask=hidden, **options
        )
        outputs.append(out)
        start += length
        # What a state holds beyond its length is nothing, and a chunked one never holds a whole chunk.
        empty = torch.arange(state.keys.shape[1]) >= state.length.unsqueeze(-1)
        assert not state.keys[empty].any()
        assert not state.values[empty].any()
        if case.chunk_size:
            assert bool((state.length < case.chunk_size).all())
            assert state.keys.shape[1] == case.chunk_size
    assert_close(torch.cat(outputs, dim=1), whole)


@every_function
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_what_comes_later_is_not_felt(name, chunk_size):
    # Law 1 for the attention functions: later queries, keys and values of any size, to the last bit.
    q, k, v = inputs(2, 8, dtype=torch.float32)
    out, _ = chunked_attention(q, k, v, ATTENTION[name], causal=True, chunk_size=chunk_size)
    for at in range(1, 8):
        for size in (1.0, 1e4, 1e30):
            later = [x.clone() for x in (q, k, v)]
            for seed, x in enumerate(later):
                x[:, at:] = drawn(*x[:, at:].shape, seed=seed + 10, dtype=torch.float32) * size
            moved, _ = chunked_attention(*later, ATTENTION[name], causal=True, chunk_size=chunk_size)
            assert_same(moved[:, :at], out[:, :at])


@every_function
def test_a_bias_towards_later_keys_is_not_felt(name):
    q, k, v = inputs(2, 8, dtype=torch.float32)

    def wild(queries: Tensor, keys: Tensor) -> Tensor:
        later = keys.unsqueeze(-2) > queries.unsqueeze(-1)
        return torch.where(later, 1e30, bias_between(queries, keys).float())

    calm, _ = chunked_attention(q, k, v, ATTENTION[name], causal=True, bias=lambda i, j: bias_between(i, j).float())
    moved, _ = chunked_attention(q, k, v, ATTENTION[name], causal=True, bias=wild)
    assert_same(moved, calm)


@every_function
def test_a_query_that_sees_nothing_gets_nothing(name):
    q, k, v = (x.requires_grad_() for x in inputs(2, 4))
    out, weights = attend(q, k, v, ATTENTION[name], visible=torch.zeros(2, 1, 4, dtype=torch.bool))
    assert not out.any()
    assert not weights.any()
    for gradient in torch.autograd.grad(out.sum(), [q, k, v]):
        assert_same(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softmax_is_summed_in_float32(dtype):
    # 4096 equal scores: a sum in bfloat16 would stop growing at 256, one in float16 at 2048.
    keys = 4096
    q, k, v = (
        torch.zeros(1, 1, 4, dtype=dtype),
        torch.zeros(1, keys, 4, dtype=dtype),
        torch.ones(1, keys, 1, dtype=dtype),
    )
    out, weights = attend(q, k, v, ATTENTION["softmax"])
    assert weights.dtype == torch.float32
    assert_close(weights.sum(-1), torch.ones(1, 1), 1e-5)
    assert out.dtype == dtype
    assert_close(out, torch.ones(1, 1, 1), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("keys", [257, 301, 515])
@pytest.mark.parametrize("name", ["laplace", "relu2"])
def test_keys_are_counted_in_float32(name, keys):
    # 257, 301 and 515 have no bfloat16: the count would be 256, 300 and 516.
    q = torch.full((1, 1, 1), 16.0, dtype=torch.bfloat16)
    k, v = q.expand(1, keys, 1), q.expand(1, keys, 1)
    _, weights = attend(q, k, v, ATTENTION[name])
    expected = oracles.ATTENTION[name](torch.tensor(256.0 / keys, dtype=torch.float64))
    assert_close(weights, expected.expand(1, 1, keys), 1e-6)


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_functions_of_scores(values):
    scores = torch.tensor(values, dtype=torch.float64)
    for name, function in (("relu2", relu2), ("laplace", laplace)):
        assert_close(function(scores), oracles.ATTENTION[name](scores), 1e-14)
    assert bool(((laplace(scores) >= 0) & (laplace(scores) <= 1)).all())


def test_laplace_follows_the_squared_relu():
    # Paper, appendix C: value and slope of both are 1/2 and sqrt 2 where their curves meet, at sqrt(1/2).
    at = torch.tensor([0.5**0.5], dtype=torch.float64, requires_grad=True)
    for function in (relu2, laplace):
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
        # The constants have six decimals.
        assert_close(value.detach(), torch.tensor([0.5], dtype=torch.float64), 2e-6)
        assert_close(slope, torch.tensor([2**0.5], dtype=torch.float64), 2e-6)


def test_a_callable_is_taken_as_a_function_of_each_score():
    q, k, v = inputs(2, 5)
    own = attention_function(lambda scores: scores.relu().square())
    assert isinstance(own, AttentionFunction)
    named, _ = chunked_attention(q, k, v, ATTENTION["relu2"], causal=True)
    assert_same(chunked_attention(q, k, v, own, causal=True)[0], named)
    whole = AttentionFunction(Elementwise(relu2), divide_by_keys=True)
    assert attention_function(whole) is whole


@every_function
def test_dropout_falls_on_weights_after_they_are_shown(name):
    q, k, v = inputs(1, 4)
    out, weights = attend(q, k, v, ATTENTION[name], dropout=torch.zeros_like)
    assert not out.any()
    assert_same(weights, attend(q, k, v, ATTENTION[name])[1])


@every_function
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_that_are_shown_are_those_that_were_applied(name, chunk_size, padded):
    q, k, v = (x.requires_grad_() for x in inputs(2, 7))
    padding_mask = torch.tensor([[True, False, False, True, False, False, False], [False] * 7]) if padded else None
    options = {"causal": False, "chunk_size": chunk_size, "padding_mask": padding_mask}
    out, weights = chunked_attention(q, k, v, ATTENTION[name], **options)
    (gradient,) = torch.autograd.grad(out.sum(), weights)
    assert gradient.abs().sum() > 0
    unseen, nothing = chunked_attention(q, k, v, ATTENTION[name], **options, need_weights=False)
    assert nothing is None
    assert_close(out.detach(), unseen.detach(), 1e-12)
