"""Norms by the root mean square: all their derivatives, at tokens of zeros too, and what they keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws import assert_close, assert_same
from megablocks import RMSNorm, ScaleNorm

every_norm = pytest.mark.parametrize("norm", [ScaleNorm(), RMSNorm(4), ScaleNorm(affine=False)], ids=repr)
first_jvp = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning"
)  # torch's own, at its first one


def tokens() -> Tensor:
    """Five tokens in float64, one of them zeros, as at padding."""
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.index_fill(0, torch.tensor(1), 0.0).requires_grad_()


@every_norm
def test_it_is_the_formula(norm):
    x = tokens()
    expected = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert_close(norm.double()(x), expected)


@first_jvp
@every_norm
def test_derivatives(norm):
    norm = norm.double()
    torch.autograd.gradcheck(norm, tokens(), check_forward_ad=True)
    torch.autograd.gradgradcheck(norm, tokens())


@first_jvp
def test_it_goes_through_transforms():
    norm, x = ScaleNorm().double(), tokens().detach()
    each = torch.func.vmap(torch.func.grad(lambda row: norm(row).square().sum()))(x)
    whole = torch.func.grad(lambda x: norm(x).square().sum())(x)
    assert_close(each, whole)


def test_a_scale_norm_keeps_its_input_and_one_number_for_each_token():
    norm, x = ScaleNorm().double(), tokens()
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda part: (kept.update({part.data_ptr(): part.numel()}), part)[1], lambda part: part
    ):
        y = norm(x)
    assert kept.pop(x.data_ptr()) == x.numel()
    assert max(kept.values()) <= x.shape[0]
    assert_same(y, norm(x))
