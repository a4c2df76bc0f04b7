"""Attention without all weights at once is the attention that makes them, whatever way is taken."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from laws import assert_close, assert_gradients_close, assert_same
from megablocks import MovingAverageGatedAttention, RotaryRelativeBias, SimpleRelativeBias
from megablocks.functional import sight
from megablocks.functional.attention_function import ATTENTION
from megablocks.functional.sight import Sight, attend_sight

WAYS = ("_whole", "_fused", "_in_pieces")
LENGTH, PIECE = 50, 16


@pytest.fixture
def ways(monkeypatch) -> list[str]:
    """The names of the ways that calls take from now on, pieces being short."""
    taken: list[str] = []
    monkeypatch.setattr(sight, "WHOLE", PIECE)
    for name in WAYS:
        original = getattr(sight, name)

        def counted(*arguments, name=name, original=original):
            taken.append(name)
            return original(*arguments)

        monkeypatch.setattr(sight, name, counted)
    return taken


def biases() -> dict[str, torch.nn.Module | None]:
    """Every bias, in float64."""
    return {"rotary": RotaryRelativeBias(8).double(), "simple": SimpleRelativeBias(64).double(), "none": None}


def outcome(layer: MovingAverageGatedAttention, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a drawn combination of it."""
    y = layer(x, padding_mask=mask)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad(
        (y * weights).sum(), [x, *layer.parameters()], allow_unused=True, materialize_grads=True
    )
    return y, list(grads)


@pytest.mark.parametrize("padding", ["none", "some", "a whole row"])
@pytest.mark.parametrize(
    ("attention", "causal", "bias", "values", "chunk"),
    [
        *itertools.product(ATTENTION, [True, False], biases(), [16, 40], [None]),
        *itertools.product(["softmax", "laplace"], [True, False], ["rotary"], [16], [30]),
    ],
)
def test_layers_give_the_same(ways, monkeypatch, attention, causal, bias, values, chunk, padding):
    torch.manual_seed(0)
    layer = MovingAverageGatedAttention(
        12, 8, value_dim=values, causal=causal, attention=attention, position_bias=biases()[bias], chunk_size=chunk
    ).double()
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64, requires_grad=True)
    mask = None if padding == "none" else torch.rand(2, LENGTH) < 0.3
    if padding == "a whole row":
        mask[0] = True
    y, grads = outcome(layer, x, mask)
    assert set(ways) - {"_whole"}, "the short way was not taken"
    monkeypatch.setattr(sight, "WHOLE", 512)
    expected, wanted = outcome(layer, x, mask)
    assert_close(y, expected)
    assert_gradients_close(grads, wanted)
    monkeypatch.setattr(sight, "PIECE", 7)
    monkeypatch.setattr(sight, "WHOLE", 64)  # few enough keys, but without gradients a causal call is cut
    ways.clear()
    with torch.no_grad():
        assert_close(layer(x, padding_mask=mask), expected)
    assert ways[0] == ("_in_pieces" if causal else "_whole")


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["growing", "fixed", "chunks"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_streams_give_the_same(ways, attention, kind, padding):
    torch.manual_seed(0)
    layer = MovingAverageGatedAttention(
        12, 8, attention=attention, chunk_size=30 if kind == "chunks" else None
    ).double()
    x = torch.randn(2, LENGTH, 12, dtype=torch.float64)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    if padding == "left":
        mask[0, :20] = True
    elif padding == "right":
        mask[0, 30:] = True
    capacity = int((~mask).sum(1).max()) if kind == "fixed" else None
    whole = layer(x, padding_mask=mask)
    state = layer.init_state(2, capacity=capacity)
    pieces = []
    for piece, hidden in zip(x.split([3, 19, 28], 1), mask.split([3, 19, 28], 1), strict=True):
        given = {} if padding == "none" else {"padding_mask": hidden}
        y, state = layer(piece, state=state, **given)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole)
    assert "_in_pieces" in ways


def test_a_full_state_is_seen_behind_padding(ways):
    torch.manual_seed(0)
    layer = MovingAverageGatedAttention(12, 8).double()
    x = torch.randn(1, LENGTH + 2, 12, dtype=torch.float64)
    state = layer.init_state(1, capacity=LENGTH)
    whole = layer(x[:, :LENGTH])
    y, state = layer(x[:, : LENGTH - 2], state=state)
    padding = torch.arange(LENGTH) >= 2
    rest = torch.cat([x[:, LENGTH - 2 : LENGTH], x[:, : LENGTH - 2]], dim=1)
    z, _ = layer(rest, state=state, padding_mask=padding.unsqueeze(0))
    assert_close(torch.cat([y, z[:, :2]], 1), whole)


def taken_for(ways: list[str], *, attention: str, bias: object, values: int, causal: bool = True, **options) -> str:
    """The way that a call takes."""
    q, k, v = torch.randn(2, LENGTH, 8), torch.randn(2, LENGTH, 8), torch.randn(2, LENGTH, values)
    at = torch.arange(LENGTH)
    asked = {"dropout": None, "need_weights": False, **options}
    attend_sight(q, k, v, ATTENTION[attention], Sight(at, at, causal), bias=bias, **asked)
    return ways[0]


def test_the_way_is_the_one_that_serves(ways):
    rotary, simple = RotaryRelativeBias(8), SimpleRelativeBias(64)
    for bias, values, options, expected in (
        (rotary, 16, {}, "_fused"),
        (rotary, 17, {}, "_in_pieces"),  # a second cut of the values would compute scores again
        (None, 8, {}, "_fused"),
        (simple, 8, {}, "_in_pieces"),
        (rotary, 16, {"dropout": torch.nn.Identity()}, "_in_pieces"),
        (rotary, 16, {"need_weights": True}, "_whole"),
    ):
        ways.clear()
        assert taken_for(ways, attention="softmax", bias=bias, values=values, **options) == expected
    ways.clear()
    assert taken_for(ways, attention="relu2", bias=rotary, values=16) == "_in_pieces"


def test_pieces_drop_the_same_weights_forwards_and_backwards(ways):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, 8, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    at = torch.arange(LENGTH)
    out, _ = attend_sight(
        q,
        k,
        v,
        ATTENTION["softmax"],
        Sight(at, at, True),
        bias=None,
        dropout=torch.nn.Dropout(0.5),
        need_weights=False,
    )
    # The output is linear in the values: its gradient gives the output back only if the same weights were dropped.
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert_close((gradient * v.detach()).sum(), out.detach().sum())


@pytest.mark.parametrize("attention", ATTENTION)
def test_a_later_key_never_meets_an_earlier_query(ways, attention):
    q, k, v = (torch.randn(1, LENGTH, 8) for _ in range(3))
    at = torch.arange(LENGTH)

    loud = [torch.cat([x[:, :40], x[:, 40:] * 1e30], dim=1) for x in (k, v)]
    options = {"bias": RotaryRelativeBias(8), "dropout": None, "need_weights": False}
    y, moved = (
        attend_sight(q, *keys, ATTENTION[attention], Sight(at, at, True), **options)[0] for keys in ((k, v), loud)
    )
    assert_same(moved[:, :40], y[:, :40])


def test_no_tensor_grows_with_the_square_of_the_length():
    largest: dict[int, int] = {}

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for part in torch.utils._pytree.tree_leaves(out):
                if isinstance(part, Tensor):
                    self.most = max(self.most, part.numel())
            return out

    for attention, values in (("softmax", 128), ("softmax", 512), ("laplace", 512)):
        layer = MovingAverageGatedAttention(64, 64, value_dim=values, attention=attention)
        for length in (2048, 4096):
            mode = Largest()
            mode.most = 0
            with mode:
                layer(torch.randn(1, length, 64)).sum().backward()
            largest[length] = mode.most
        assert largest[4096] <= 2 * largest[2048], (attention, values)
