"""Compiled gates and dropout against float64, against themselves, and against the published numbers of their draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
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
    x = np.linspace(-87.3, 88.3, 20_011, dtype=np.float32)
    made = np.array([compiled.exponential(number) for number in x], np.float64)
    np.testing.assert_allclose(made, np.exp(x.astype(np.float64)), rtol=EPSILON)


def test_the_exponential_beyond_its_range():
    large = np.float32([88.8, 89.0, 1e30, np.inf])
    assert [compiled.exponential(number) for number in large] == [np.inf] * 4
    assert [compiled.exponential(-number) for number in large] == [0] * 4
    assert np.isnan(compiled.exponential(np.float32(np.nan)))


# What the compiled functions stand for, written from the formulas; gradients by autograd.
def share(x: Tensor) -> Tensor:
    """The sigmoid, in all its digits at both ends, and its derivative too."""
    return torch.exp(-torch.logaddexp(torch.zeros_like(x), -x))


def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """The plain product."""
    return x * gate * share(gate)


def update_gate(x: Tensor, candidate: Tensor, update: Tensor) -> Tensor:
    """The plain mixture."""
    return share(update) * candidate + share(-update) * x


def silu_gate_back(dy: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """All gradients of the one gate."""
    return compiled.silu_gate(dy, gate), compiled.silu_gate_slope(dy, x, gate)


def update_gate_back(dy: Tensor, x: Tensor, candidate: Tensor, update: Tensor) -> tuple[Tensor, ...]:
    """All gradients of the other."""
    return *compiled.update_gate_shares(dy, update), compiled.update_gate_slope(dy, x, candidate, update)


GATES = {
    "silu_gate": (silu_gate, compiled.silu_gate, silu_gate_back, 2),
    "update_gate": (update_gate, compiled.update_gate, update_gate_back, 3),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying in memory in another way."""
    if layout == "slice":
        return torch.cat([x, x, x], dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "every other":
        return torch.stack([x, x], dim=-1)[..., 1]
    return x


@given(
    name=st.sampled_from(sorted(GATES)),
    shape=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    layouts=st.lists(
        st.sampled_from(["plain", "slice", "transposed", "every other", "expanded"]), min_size=4, max_size=4
    ),
    magnitudes=st.lists(st.sampled_from([1e-8, 1e-3, 1.0, 30.0, 1e8]), min_size=4, max_size=4),
    seed=st.integers(0, 999),
)
@example("update_gate", [1, 3, 5], ["plain"] * 4, [1.0, 1e8, 1.0, 30.0], 0)  # what is shut out left its rounding
@example("silu_gate", [1, 3, 5], ["plain"] * 4, [1.0, 1e8, 1e8, 1.0], 0)
def test_gates_are_their_formulas(name, shape, layouts, magnitudes, seed):
    formula, forward, backward, count = GATES[name]
    source = torch.Generator().manual_seed(seed)
    dy, *inputs = (
        laid_out(torch.randn(shape, generator=source) * magnitude, layout)
        for layout, magnitude in zip(layouts[: count + 1], magnitudes[: count + 1], strict=True)
    )
    wide = [part.double().requires_grad_() for part in inputs]
    expected = formula(*wide)
    wanted = torch.autograd.grad(expected, wide, dy.double())
    made = (forward(*inputs), *backward(dy, *inputs))
    for one, right in zip(made, (expected, *wanted), strict=True):
        # Each number by itself: a few units, or what a gate below the normal numbers lets through.
        assert one.shape == right.shape
        allowed = 12 * EPSILON * right.abs() + allowance(name, one is made[0], wide, dy.double())
        assert bool(((one.double() - right).abs() <= allowed).all())


def allowance(name: str, is_output: bool, inputs: list[Tensor], dy: Tensor) -> Tensor:
    """What rounding inputs' sums and shares to float32 may cost where a result cancels."""
    tiny = 2e-38
    with torch.no_grad():
        if name == "silu_gate":
            x, gate = inputs
            size = (1 + gate.abs()) * (x.abs() if is_output else torch.maximum(dy.abs() * x.abs(), dy.abs()))
            slope_near_its_zero = 0.0 if is_output else dy.abs() * x.abs()
            return tiny * (1 + size) + 8 * EPSILON * slope_near_its_zero * share(gate) * (1 + gate.abs())
        x, candidate, update = inputs
        if is_output:
            size = share(update) * candidate.abs() + share(-update) * x.abs()
        else:
            size = dy.abs() * share(update) * share(-update) * torch.maximum(x.abs(), candidate.abs())
        return 8 * EPSILON * size + tiny * (x.abs() + candidate.abs() + 1) * (1 + dy.abs())


@pytest.mark.parametrize("extreme", [float("nan"), float("inf"), 1e30, -1e30, 89.0, -87.0])
@pytest.mark.parametrize("other", [1.0, 1e30])
def test_gates_at_the_ends_of_their_range(extreme, other):
    gate, x = torch.tensor([[extreme]]), torch.tensor([[other]])
    same = {"rtol": 8 * EPSILON, "atol": 0.0, "equal_nan": True}
    torch.testing.assert_close(compiled.silu_gate(x, gate), x * torch.nn.functional.silu(gate), **same)
    # An open gate is the candidate, to the last bit, whatever it shuts out.
    one = torch.ones(1, 1)
    torch.testing.assert_close(compiled.update_gate(x, one, gate), torch.lerp(x, one, gate.sigmoid()), **same)
    if abs(extreme) < float("inf"):  # torch's own slope is NaN at infinity
        slope = x * torch.ops.aten.silu_backward(one, gate)
        torch.testing.assert_close(compiled.silu_gate_slope(one, x, gate), slope, **same)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (0, 3), (3, 0), (2, 1, 3, 5)])
def test_any_number_of_axes_and_nothing_at_all(shape):
    inputs = [torch.randn(shape) for _ in range(4)]
    assert_close(compiled.silu_gate(*inputs[:2]), silu_gate(*inputs[:2]), 1e-6)
    for made, wanted in zip(update_gate_back(*inputs), inputs[1:], strict=True):
        assert made.shape == wanted.shape
    assert compiled.dropout(inputs[0], torch.tensor(3), 0.5).shape == shape


@pytest.mark.parametrize("other", [torch.randn(2, 2), torch.randn(4, 4, dtype=torch.float64)])
def test_gates_of_tensors_that_differ_are_refused(other):
    message = r"^Tensors of a compiled gate must be float32 and of one shape, but are torch.float32 \(4, 4\), .*; use"
    with pytest.raises(ValueError, match=message):
        compiled.silu_gate(torch.randn(4, 4), other)


SMALL = torch.Generator().manual_seed(1)
CALLS = {
    "dropout": (torch.randn(3, 5, generator=SMALL, dtype=torch.float64), torch.tensor(7), 0.3),
    **{
        name: tuple(torch.randn(2, 3, 5, generator=SMALL) for _ in range(count))
        for name, count in {
            "silu_gate": 2,
            "silu_gate_slope": 3,
            "update_gate": 3,
            "update_gate_slope": 4,
            "update_gate_shares": 2,
        }.items()
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_torch_finds_nothing_wrong_with_the_operators(name):
    torch.library.opcheck(getattr(torch.ops.megablocks, name).default, CALLS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_drops_what_the_draws_say(dtype):
    seed, count, p = torch.tensor((0x299F31D0 << 32) | 0xA4093822), 2_500, 0.3
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
    kept = compiled.dropout(x, torch.tensor(3), p) != 0
    assert bool(kept.all()) if p < 0.5 else not bool(kept.any())


def test_dropout_is_the_same_for_any_threads_and_layout():
    x, seed = torch.randn(130, 33, 70), torch.tensor(5)
    threads = torch.get_num_threads()
    one = compiled.dropout(x, seed, 0.4)
    try:
        torch.set_num_threads(3)
        assert_same(compiled.dropout(x, seed, 0.4), one)
    finally:
        torch.set_num_threads(threads)
    assert_same(compiled.dropout(laid_out(x, "transposed"), seed, 0.4), one)
    for other in (6, 5 + (1 << 32), -5):
        assert not torch.equal(compiled.dropout(x, torch.tensor(other), 0.4), one)


def test_what_is_dropped_is_zero_whatever_it_was():
    seed = torch.tensor(5)
    kept = compiled.dropout(torch.ones(1_000), seed, 0.5) != 0
    made = compiled.dropout(torch.full((1_000,), float("nan")), seed, 0.5)
    assert_same(made, torch.where(kept, float("nan"), 0.0))
