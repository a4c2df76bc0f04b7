"""Compiled gates and dropout against float64, against themselves, and against the published numbers of their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from laws import assert_close, assert_same
from megablocks.kernels import numba_elementwise as compiled

EPSILON = float(np.finfo(np.float32).eps)

# Random123's table of known answers for Philox 4x32 in ten rounds: counter, key, draws.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.uint32, ...]:
    """Numbers of 32 bits from their digits."""
    return tuple(np.uint32(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "draws"), KNOWN_ANSWERS)
def test_draws_are_those_of_philox(counter, key, draws):
    assert compiled.philox(*words(counter), *words(key)) == words(draws)


def test_the_exponential_is_right_to_two_units():
    x = np.linspace(-87.0, 88.3, 20_011, dtype=np.float32)
    made = np.array([compiled.exponential(number) for number in x], np.float64)
    np.testing.assert_allclose(made, np.exp(x.astype(np.float64)), rtol=EPSILON)


def test_the_exponential_beyond_its_range():
    large = np.float32([89.0, 1e30, np.inf])
    assert [compiled.exponential(number) for number in large] == [np.inf] * 3
    assert all(0 <= compiled.exponential(-number) < 2e-38 for number in large)
    assert np.isnan(compiled.exponential(np.float32(np.nan)))


# What the compiled functions stand for, written from the formulas; gradients by autograd.
def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """The plain product."""
    return x * gate / (1 + torch.exp(-gate))


def update_gate(x: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
    """The plain mixture."""
    share = 1 / (1 + torch.exp(-update))
    return share * candidate + (1 - share) * x


GATES = {
    "silu_gate": (silu_gate, compiled.silu_gate, compiled.silu_gate_back, 2),
    "update_gate": (update_gate, compiled.update_gate, compiled.update_gate_back, 3),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying in memory in another way."""
    if layout == "slice":
        return torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every other":
        return torch.stack([x, x], dim=-1)[..., 1]
    return x


@given(
    name=st.sampled_from(sorted(GATES)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 70)),
    layouts=st.lists(st.sampled_from(["plain", "slice", "transposed", "every other"]), min_size=4, max_size=4),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 999),
)
def test_gates_are_their_formulas(name, shape, layouts, magnitude, seed):
    formula, forward, backward, count = GATES[name]
    source = torch.Generator().manual_seed(seed)
    dy, *inputs = (
        laid_out(torch.randn(shape, generator=source) * magnitude, layout) for layout in layouts[: count + 1]
    )
    wide = [part.double().requires_grad_() for part in inputs]
    expected = formula(*wide)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    # An error of a few units in what is multiplied, relative to the largest.
    assert_close(forward(*inputs), expected.detach(), 8 * EPSILON)
    for made, right in zip(backward(dy, *inputs), wanted, strict=True):
        assert_close(made, right, 8 * EPSILON, floor=magnitude * EPSILON)


@pytest.mark.parametrize("extreme", [float("nan"), float("inf"), 1e30, -1e30, 89.0, -89.0])
def test_gates_at_the_ends_of_their_range(extreme):
    gate, one = torch.tensor([[extreme]]), torch.ones(1, 1)
    assert_close_or_nan(compiled.silu_gate(one, gate), torch.nn.functional.silu(gate))
    assert_close_or_nan(compiled.update_gate(torch.zeros(1, 1), one, gate), gate.sigmoid())
    if abs(extreme) < float("inf"):  # torch's own slope is NaN at infinity
        slope = torch.ops.aten.silu_backward(one, gate)
        assert_close_or_nan(compiled.silu_gate_back(one, one, gate)[1], slope)


def assert_close_or_nan(actual: Tensor, expected: Tensor) -> None:
    """The same to a few units, below the normal numbers zero, NaN where that is right."""
    torch.testing.assert_close(actual, expected, rtol=4 * EPSILON, atol=1e-37, equal_nan=True)


SMALL = torch.Generator().manual_seed(1)
CALLS = {
    "dropout": (torch.randn(3, 5, generator=SMALL, dtype=torch.float64).requires_grad_(), 7, 0.3),
    **{
        name: tuple(torch.randn(2, 3, 5, generator=SMALL) for _ in range(count))
        for name, count in {
            "silu_gate": 2,
            "silu_gate_backward": 3,
            "update_gate": 3,
            "update_gate_backward": 4,
        }.items()
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_nothing_wrong_with_the_operators(name):
    torch.library.opcheck(getattr(torch.ops.megablocks, name).default, CALLS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_drops_what_the_draws_say(dtype):
    seed, count, p = (0x299F31D0 << 32) | 0xA4093822, 2_500, 0.3
    x = torch.arange(1, count + 1, dtype=dtype)
    # Four numbers at a time: of each 1,024 first all first numbers of 256 draws, then all second ones, and so on.
    draws = np.empty(count, np.int64)
    for i in range(count):
        group, place = divmod(i, 1024)
        number, at = divmod(place, 256)
        counter = (np.uint32(256 * group + at), np.uint32(0), np.uint32(0), np.uint32(0))
        draws[i] = int(compiled.philox(*counter, *words("a4093822 299f31d0"))[number])
    kept = torch.from_numpy(draws < round((1 - p) * 2**32))
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert_same(compiled.dropout(x, seed, p), torch.where(kept, x * scale, 0.0))


@pytest.mark.parametrize("p", [0.0, 1e-12, 1 - 1e-12])
def test_dropout_at_the_ends(p):
    x = torch.ones(9_999, dtype=torch.float64)
    kept = compiled.dropout(x, 3, p) != 0
    assert bool(kept.all()) if p < 0.5 else not bool(kept.any())


def test_dropout_is_the_same_for_any_threads_and_layout():
    x = torch.randn(130, 33, 70)
    threads = torch.get_num_threads()
    one = compiled.dropout(x, 5, 0.4)
    try:
        torch.set_num_threads(3)
        assert_same(compiled.dropout(x, 5, 0.4), one)
    finally:
        torch.set_num_threads(threads)
    assert_same(compiled.dropout(laid_out(x, "transposed"), 5, 0.4), one)
    assert not torch.equal(compiled.dropout(x, 5 + (1 << 32), 0.4), one)


def test_what_is_dropped_is_zero_whatever_it_was():
    x = torch.full((1_000,), float("nan"))
    y = compiled.dropout(x, 5, 0.5)
    assert bool(((y == 0) | y.isnan()).all())
    assert 400 < int((y == 0).sum()) < 600


def test_dropout_has_all_its_derivatives():
    x = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: compiled.dropout(x, 5, 0.4), x)
    torch.autograd.gradgradcheck(lambda x: compiled.dropout(x, 5, 0.4), x)
