"""The gate that keeps only what came in is the product that it stands for, in all its derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from laws import assert_same
from megablocks.functional.activation import silu_gate

first_jvp = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # torch's own, at its first one


def pair() -> list[torch.Tensor]:
    """A tensor and its gate, in float64."""
    source = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=source, dtype=torch.float64).requires_grad_() for _ in range(2)]


def test_it_is_the_product():
    x, gate = pair()
    assert_same(silu_gate(x, gate), x * F.silu(gate))


@first_jvp
def test_derivatives_are_those_of_the_product():
    torch.autograd.gradcheck(silu_gate, pair(), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(silu_gate, pair())


@first_jvp
def test_it_goes_through_transforms():
    x, gate = (part.detach() for part in pair())
    each = torch.func.vmap(torch.func.grad(lambda x, gate: silu_gate(x, gate).sum()))(x, gate)
    assert_same(each, F.silu(gate))


def test_it_keeps_nothing_but_its_inputs():
    x, gate = pair()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda part: (kept.append(part.data_ptr()), part)[1], lambda part: part
    ):
        silu_gate(x, gate)
    assert set(kept) == {x.data_ptr(), gate.data_ptr()}
