"""Dropout on a CPU, where the draws are the package's own."""

from __future__ import annotations

import math

import pytest
import torch

from laws import assert_same
from megablocks.layers.dropout import SequenceDropout


@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_dropped_with_that_probability_and_the_others_scaled(p, dtype):
    count = 999_999
    y = SequenceDropout(p)(torch.ones(1, count, 1, dtype=dtype))
    dropped = int((y == 0).sum())
    assert abs(dropped - p * count) < 5 * math.sqrt(p * (1 - p) * count)
    assert_same(y[y != 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype))


def test_a_probability_below_what_the_draws_can_show_drops_nothing():
    assert_same(SequenceDropout(1e-12)(torch.ones(1, 9, 1)), torch.ones(1, 9, 1))


def test_draws_are_independent():
    # Two values share 64 bits: neither they, nor values at other distances, are dropped together more often.
    dropped = (SequenceDropout(0.5)(torch.ones(1, 1 << 20, 1)) == 0).flatten().double() * 2 - 1
    for lag in (1, 2, 3, 64):
        assert abs(float((dropped[lag:] * dropped[:-lag]).mean())) < 5 / 1024


def test_seeds_reproduce():
    dropout, x = SequenceDropout(0.3), torch.randn(2, 7, 3)
    first, again, other = (dropout(x) for seed in (1, 1, 2) if torch.manual_seed(seed))
    assert_same(again, first)
    assert not torch.equal(other, first)


def test_gradients_fall_where_values_do():
    x = torch.randn(2, 7, 3, requires_grad=True)
    y = SequenceDropout(0.3)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_same(gradient, torch.where(y == 0, 0.0, 1 / 0.7))


def test_transforms_draw_for_themselves():
    dropout, x = SequenceDropout(0.5), torch.ones(64, 1, 5, 3)
    rows = torch.func.vmap(dropout, randomness="different")(x)
    assert not all(torch.equal(row, rows[0]) for row in rows)
