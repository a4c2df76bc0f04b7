"""Slots: real tokens to the left, and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from laws import assert_same
from megablocks.functional.padding import packed, real_lengths, slots, zero_padding
from strategies import mask, padding_masks


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[str, ...] | None, int, int, tuple[int, ...]]:
    """A padding mask, batch, length, and each row's first slot."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    offsets = draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
    return draw(padding_masks(batch, length)), batch, length, tuple(offsets)


@given(layout=layouts(), spare=st.integers(0, 3))
def test_slots_hold_real_tokens_in_order(layout, spare):
    rows, batch, length, offsets = layout
    padded, count = mask(rows), max(offsets) + length + spare
    x = torch.arange(1.0, batch * length + 1).reshape(batch, length, 1)
    made = slots((batch, length), count, padding_mask=padded, offset=torch.tensor(offsets))
    put = made.put(x)
    assert put.shape == (batch, count, 1)
    for row, offset in enumerate(offsets):
        real = x[row] if padded is None else x[row][~padded[row]]
        expected = torch.zeros(count, 1)
        expected[offset : offset + len(real)] = real
        assert_same(put[row], expected)
        assert made.filled[row].tolist() == [offset <= slot < offset + len(real) for slot in range(count)]
    assert_same(made.back(put), zero_padding(x, padded))


@given(layout=layouts())
def test_what_stands_under_padding_does_not_move(layout):
    rows, batch, length, _ = layout
    padded = mask(rows)
    if padded is None:
        return
    x = torch.randn(batch, length, 2)
    x[padded] = float("nan")
    x.requires_grad_()
    made = packed(padded)
    y = made.back(made.put(x))
    assert_same(y.detach(), zero_padding(x.detach(), padded))
    y.sum().backward()
    assert_same(x.grad, (~padded).unsqueeze(-1).float().expand_as(x))


def test_real_lengths():
    padded = mask(("..#", "###", "..."))
    assert real_lengths((3, 3), padded, padded.device).tolist() == [2, 0, 3]
    assert real_lengths((2, 5), None, padded.device).tolist() == [5, 5]
