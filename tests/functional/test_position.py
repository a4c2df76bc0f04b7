"""Position biases: relative, with an offset for the queries, for positions of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from laws import assert_close, assert_same
from megablocks.functional import rotary_bias, simple_bias
from megablocks.functional.position import rotate
from megablocks.layers import RotaryRelativeBias, SimpleRelativeBias
from strategies import seeds


@given(seed=seeds(), reach=st.integers(1, 9), data=st.data())
def test_simple_bias_is_the_table_by_distance(seed, reach, data):
    table = torch.randn(2 * reach - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    places = st.lists(st.integers(0, reach - 1), min_size=1, max_size=5)
    queries, keys = data.draw(places), data.draw(places)
    found = simple_bias(table, torch.tensor(queries), torch.tensor(keys))
    assert_same(found, oracles.simple_bias(table, queries, keys))


@given(seed=seeds(), half=st.integers(1, 5), shift=st.integers(0, 10**6), data=st.data())
def test_rotary_bias_depends_on_distance_alone(seed, half, shift, data):
    source = torch.Generator().manual_seed(seed)
    alpha, beta = (torch.randn(2 * half, generator=source, dtype=torch.float64) for _ in range(2))
    places = st.lists(st.integers(0, 3000), min_size=1, max_size=5)
    queries, keys = data.draw(places), data.draw(places)
    found = rotary_bias(alpha, beta, torch.tensor(queries) + shift, torch.tensor(keys) + shift)
    expected = oracles.rotary_bias(alpha, beta, queries, keys)
    # Angles of a million radians keep 1e-10 of a turn in float64; times the vectors' lengths.
    assert_close(found, expected, 1e-9, floor=float(alpha.norm() * beta.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotary_angles_are_exact_far_away(dtype):
    # Float32 angles would be off by 1e-1 here, half precisions by whole turns.
    positions = torch.tensor([0, 1, 1_000_000, 10_000_001])
    vector = torch.randn(8).to(dtype)
    turned = rotate(vector, positions)
    assert turned.dtype == torch.float32
    assert_close(turned, rotate(vector.double(), positions), 1e-6)


def test_positions_of_their_own_for_each_row():
    table, alpha, beta = torch.randn(11), torch.randn(6), torch.randn(6)
    queries, keys = torch.tensor([[0, 1], [3, 5]]), torch.tensor([[0, 1, 2], [3, 4, 5]])
    for bias in (lambda q, k: simple_bias(table, q, k), lambda q, k: rotary_bias(alpha, beta, q, k)):
        rows = [bias(q, k) for q, k in zip(queries, keys, strict=True)]
        assert_close(bias(queries, keys), torch.stack(rows), 1e-6)


@pytest.mark.parametrize("module", [SimpleRelativeBias(9), RotaryRelativeBias(4)], ids=["simple", "rotary"])
def test_offsets(module):
    whole = module(9)
    for offset in range(9):
        assert_close(module(9 - offset, 9, query_offset=offset), whole[offset:], 1e-6)
    rows = module(2, 9, query_offset=torch.tensor([0, 3, 7]))
    assert_close(rows, torch.stack([whole[0:2], whole[3:5], whole[7:9]]), 1e-6)


@pytest.mark.parametrize(
    "module", [SimpleRelativeBias(9).double(), RotaryRelativeBias(4).double()], ids=["simple", "rotary"]
)
def test_later_positions_do_not_change_earlier_rows(module):
    # Law 1 for a bias: how much follows a query is of no consequence to it.
    for length in range(1, 9):
        assert_close(module(9)[:length, :length], module(length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [1, 2, 9])
def test_a_relative_table_holds_the_bias(positions, dtype):
    steps = torch.arange(positions)
    for bias in (RotaryRelativeBias(8, dtype=dtype), SimpleRelativeBias(9, dtype=dtype)):
        table = bias.relative_table(positions)
        assert table.shape == (2 * positions - 1,)
        whole = bias(positions)
        assert table.dtype == whole.dtype  # a rotary one is float32 or wider
        torch.testing.assert_close(simple_bias(table, steps, steps), whole)
    assert SimpleRelativeBias(4).relative_table(9).shape == (7,), "no further than the bias itself"
