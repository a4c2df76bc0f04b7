"""What the backward pass computes again is what it would have kept."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from megablocks import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    NormalizedFFN,
    SequenceNorm,
    mega_decoder,
    mega_encoder,
)
from megablocks.functional import recomputation
from megablocks.functional.activation import rescaled, silu_gate, update_gate
from megablocks.functional.recomputation import Recomputation

LAYERS = {
    "chunked": lambda: MovingAverageGatedAttention(16, 8, chunk_size=8),
    "dropout": lambda: MovingAverageGatedAttention(
        16, 8, causal=False, prenorm=False, dropout=0.2, attention="laplace"
    ),
    "relu": lambda: MovingAverageGatedAttention(16, 8, activation="relu", hidden_dropout=0.2, prenorm=False),
    "gelu": lambda: NormalizedFFN(16, 32, activation="gelu"),
    "gelu_tanh": lambda: NormalizedFFN(16, 32, activation="gelu_tanh", hidden_dropout=0.1),
    "layernorm stack": lambda: mega_encoder(2, 16, qk_dim=8, prenorm=False, chunk_size=8),
    "scalenorm stack": lambda: mega_encoder(2, 16, qk_dim=8, prenorm=False, norm="scalenorm", attention="relu2"),
    "rmsnorm stack": lambda: mega_decoder(2, 16, qk_dim=8, norm="rmsnorm", dropout=0.1, attention_dropout=0.1),
}


class Checkpointed(torch.nn.Module):
    """A layer of which torch keeps nothing but its input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def _gradients(module, x, *others):
    torch.manual_seed(1)
    y = module(x, *others)
    inputs = [x, *module.parameters()]
    return y, torch.autograd.grad(y.square().sum(), inputs)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("length", [1, 16, 29])
def test_gradients_are_the_same_to_the_last_bit(kind, length, monkeypatch):
    layer = LAYERS[kind]()
    x = torch.randn(2, length, 16, requires_grad=True)
    _, again = _gradients(layer, x)
    monkeypatch.setattr(recomputation, "_free_to_choose", lambda *_: False)
    _, kept = _gradients(layer, x)
    for one, other in zip(again, kept, strict=True):
        assert one.equal(other)


def test_gradients_of_cross_attention_are_the_same(monkeypatch):
    layer = GatedCrossAttention(16, 8)
    x, memory = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 7, 16)
    _, again = _gradients(layer, x, memory)
    monkeypatch.setattr(recomputation, "_free_to_choose", lambda *_: False)
    _, kept = _gradients(layer, x, memory)
    assert all(one.equal(other) for one, other in zip(again, kept, strict=True))


def _bytes_kept(layer, x):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = layer(x)
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert y.requires_grad
    return kept


@pytest.mark.compile  # counts memory, which the poison would add to
@pytest.mark.parametrize("kind", ["attention", "feed_forward"])
def test_much_less_is_kept(kind, monkeypatch):
    layer = MovingAverageGatedAttention(64, 32, chunk_size=16) if kind == "attention" else NormalizedFFN(64, 128)
    x = torch.randn(2, 512, 64, requires_grad=True)
    layer(x)
    again = _bytes_kept(layer, x)
    monkeypatch.setattr(recomputation, "_free_to_choose", lambda *_: False)
    assert again < 0.7 * _bytes_kept(layer, x)


@pytest.mark.compile  # as above
@pytest.mark.parametrize("norm", ["layernorm", "scalenorm", "rmsnorm"])
def test_what_a_norm_gives_is_not_kept(norm, monkeypatch):
    stack = torch.nn.Sequential(SequenceNorm(64, norm=norm), NormalizedFFN(64, 64, norm=None))
    x = torch.randn(2, 512, 64, requires_grad=True)
    stack(x)
    again = _bytes_kept(stack, x)
    monkeypatch.setattr(recomputation, "_brought", recomputation.WeakTensorKeyDictionary())
    monkeypatch.setattr(SequenceNorm, "forward", lambda self, x: self.norm(x) * 1.0)
    assert _bytes_kept(stack, x) - again >= x.nbytes


def test_a_hook_on_a_norm_is_heard():
    stack = torch.nn.Sequential(SequenceNorm(16), NormalizedFFN(16, 32))
    stack[0].norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    stack[1].norm.register_forward_hook(lambda module, inputs, output: output.mul_(2))
    x = torch.randn(2, 5, 16, requires_grad=True)
    _, found = _gradients(stack, x)
    _, expected = _gradients(Checkpointed(stack), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_under_autocast_are_the_same(monkeypatch):
    stack = mega_encoder(2, 16, qk_dim=8, prenorm=False)
    x = torch.randn(2, 9, 16, requires_grad=True)

    def gradients():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = stack(x)
        return torch.autograd.grad(y.float().square().sum(), [x, *stack.parameters()])

    again = gradients()
    monkeypatch.setattr(recomputation, "_free_to_choose", lambda *_: False)
    assert all(one.equal(other) for one, other in zip(again, gradients(), strict=True))


def test_what_comes_out_of_a_norm_can_be_saved(tmp_path):
    y = SequenceNorm(16)(torch.randn(2, 5, 16))
    torch.save(y, tmp_path / "y.pt")
    assert torch.load(tmp_path / "y.pt").equal(y)


def test_nothing_is_remembered_inside_a_checkpoint():
    x = torch.randn(2, 3, requires_grad=True)
    with Recomputation(x) as again:
        with recomputation.remembering_nothing():
            recomputation.recomputed_inside(torch.matmul, x, x.T)
        assert not again._recipes
        y = recomputation.recomputed_inside(torch.matmul, x, x.T)
        assert len(again._recipes) == 1
        z = y.square()
    assert torch.autograd.grad(z.sum(), x)[0].equal(torch.autograd.grad((x @ x.T).square().sum(), x)[0])


def test_whoever_says_what_is_kept_is_obeyed():
    layer, x = MovingAverageGatedAttention(16, 8), torch.randn(1, 9, 16, requires_grad=True)
    _, expected = _gradients(layer, x)
    seen = []

    def pack(tensor):
        seen.append(tensor)
        return len(seen) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: seen[index]):
        y = layer(x)
    assert len(seen) > 20
    found = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(found, expected)

    count = [0]
    layer.mx_proj.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    _, found = _gradients(Checkpointed(layer), x)
    assert count[0] == 2  # forwards, and once more backwards
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("victim", ["weight", "projection", "input"])
def test_writing_into_what_is_needed_raises(victim):
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with Recomputation(x) as again:
        projection = x @ weight
        y = again(F.silu, projection) @ weight
    with torch.no_grad():
        {"weight": weight, "projection": projection, "input": x}[victim].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an in-place operation .* Call backward before writing"):
        y.sum().backward()


def test_a_result_that_was_written_into_is_kept_as_it_is():
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, requires_grad=True)
    with Recomputation(x) as again:
        hidden = again(F.silu, x * 2)
        hidden.mul_(3)
        y = hidden * weight
    y.sum().backward()
    torch.testing.assert_close(weight.grad, (3 * F.silu(2 * x)).sum(0))


def test_memory_given_back_and_used_again_is_not_taken_for_the_result():
    weight = torch.randn(256, requires_grad=True)
    for _ in range(20):
        x = torch.randn(256, requires_grad=True)
        with Recomputation(x) as again:
            again(F.silu, x + 1)
            other = torch.randn(256)  # most likely where the result was
            y = other * weight
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        assert gradient.equal(other)


def test_views_and_recipes_of_recipes():
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    scale, shift = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True).unbind(0)

    def scores(x, scale, shift):
        with Recomputation(x) as again:
            q, k = again(rescaled, again(F.silu, x), scale, shift).unbind(-2)
            return q @ k.transpose(1, 2)

    assert gradcheck(scores, (x, scale, shift))
    assert gradgradcheck(scores, (x, scale, shift))


def test_a_second_backward_pass_works():
    layer, x = MovingAverageGatedAttention(16, 8), torch.randn(1, 9, 16, requires_grad=True)
    y = layer(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert first[0].equal(torch.autograd.grad(y, x)[0])


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch loads forward derivatives
def test_gradients_of_the_update_gate():
    x, candidate, update = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert gradcheck(update_gate, (x, candidate, update), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(update_gate, (x, candidate, update))
    expected = torch.lerp(x, candidate, update.sigmoid())
    assert update_gate(x, candidate, update).equal(expected)
    assert torch.func.vmap(update_gate)(x, candidate, update).equal(expected)


def test_nothing_is_noted_where_no_graph_is_made():
    x = torch.randn(2, 3)
    with torch.no_grad(), Recomputation(x) as again:
        assert again(silu_gate, x, x).equal(x * F.silu(x))
        assert not again._recipes


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_without_numbers(kind):
    layer, x = LAYERS[kind]().to("meta"), torch.randn(2, 16, 16, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert all(weight.grad.shape == weight.shape for weight in layer.parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_that_nobody_goes_back_through_is_given_back(kind):
    layer, x = LAYERS[kind](), torch.randn(1, 20, 16, requires_grad=True)
    held = weakref.ref(x)
    y = layer(x)
    del x, y
    assert held() is None


def test_an_activation_that_has_no_hash():
    class Scaled:
        __hash__ = None

        def __call__(self, x):
            return 2 * F.silu(x)

    layer, x = NormalizedFFN(16, 32, activation=Scaled()), torch.randn(1, 5, 16)
    layer(x).sum().backward()
    assert layer.fc1.weight.grad.isfinite().all()
