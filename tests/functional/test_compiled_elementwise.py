"""Gates and dropout of a layer's size go through compiled kernels, and nobody can tell but by the time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from laws import assert_close, assert_same
from megablocks import GatedCrossAttention, MovingAverageGatedAttention, NormalizedFFN, ema_backend
from megablocks.functional import backends
from megablocks.functional.activation import silu_gate, update_gate
from megablocks.functional.dropout import dropout
from megablocks.kernels import numba_elementwise

LARGE = (1, 300, 256)


class Own(Tensor):
    """A tensor of a class that is not torch's."""


FUNCTIONS = {"silu_gate": (silu_gate, 2), "update_gate": (update_gate, 3)}
BACKWARD = {
    "silu_gate": ["silu_gate_slope", "silu_gate"],
    "update_gate": ["update_gate_slope", "update_gate_shares"],
}
GATES = sorted({*FUNCTIONS, *BACKWARD["silu_gate"], *BACKWARD["update_gate"]})
every_gate = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture
def served(monkeypatch):
    """Which compiled functions have been called."""
    calls: list[str] = []

    def counted(name, function):
        return lambda *arguments: (calls.append(name), function(*arguments))[1]

    for name in (*GATES, "dropout"):
        monkeypatch.setattr(numba_elementwise, name, counted(name, getattr(numba_elementwise, name)))
    return calls


def tensors(count: int, **kwargs: object) -> list[Tensor]:
    """As large as is worth compiled calls."""
    return [torch.randn(LARGE, **kwargs) for _ in range(count)]


@every_gate
def test_large_gates_are_compiled_forward_and_backward(name, served):
    function, count = FUNCTIONS[name]
    inputs = [part.requires_grad_() for part in tensors(count)]
    function(*inputs).sum().backward()
    with torch.no_grad():
        function(*inputs)
    assert served == [name, *BACKWARD[name], name]


@every_gate
@pytest.mark.parametrize(
    "change",
    {
        "small": lambda part: part[:, :9],
        "float64": lambda part: part.double(),
        "bfloat16": lambda part: part.bfloat16(),
        "meta": lambda part: part.to("meta"),
        "a class of its own": lambda part: part.as_subclass(Own),
    }.items(),
    ids=lambda change: change[0],
)
def test_others_are_not(name, change, served):
    function, count = FUNCTIONS[name]
    inputs = [change[1](part).requires_grad_() for part in tensors(count)]
    function(*inputs).sum().backward()
    assert not served


@every_gate
def test_without_numba_nothing_is_compiled(name, served, monkeypatch):
    monkeypatch.setitem(backends._INSTALLED, "numba", False)
    function, count = FUNCTIONS[name]
    function(*tensors(count))
    dropout(tensors(1)[0], 0.1)
    assert not served


@every_gate
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, at its first jvp
def test_transforms_and_forward_derivatives_are_right(name, served):
    function, count = FUNCTIONS[name]
    inputs, tangents = tuple(tensors(count)), tuple(tensors(count))
    rows = torch.func.vmap(function)(*inputs)
    assert not served  # batches are not plain tensors
    value, tangent = torch.func.jvp(function, inputs, tangents)
    wide = torch.func.jvp(function, *(tuple(part.double() for part in parts) for parts in (inputs, tangents)))
    for made, wanted in ((rows, wide[0]), (value, wide[0]), (tangent, wide[1])):
        assert_close(made, wanted, 1e-6)


@every_gate
def test_gradients_of_gradients_are_right(name, served):
    function, count = FUNCTIONS[name]
    results = []
    given = tensors(count)
    for dtype in (torch.float32, torch.float64):
        inputs = [part.to(dtype).requires_grad_() for part in given]
        first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(part.square().sum() for part in first), inputs))
    assert served[0] == name
    for made, wanted in zip(*results, strict=True):
        assert_close(made, wanted, 1e-6)


def test_dropout_draws_the_same_in_the_backward_pass_and_keeps_a_seed(served):
    kept: list[Tensor] = []
    x = torch.ones(LARGE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda part: (kept.append(part), part)[1], lambda part: part):
        y = dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert served == ["dropout", "dropout"]
    assert [part.numel() for part in kept] == [1]
    assert_same(gradient, y.detach())


def test_gradients_of_any_kind_fall_where_values_do():
    x = torch.ones(LARGE, requires_grad=True)
    y = dropout(x, 0.3)
    mask, given = y.detach(), torch.randn(2, *LARGE)
    (rows,) = torch.autograd.grad(y, x, given, is_grads_batched=True, retain_graph=True)
    assert_same(rows, given * mask)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(y, x, forward_ad.make_dual(*given), retain_graph=True)
        assert_same(forward_ad.unpack_dual(dual).tangent, given[1] * mask)
    leaf = given[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(y, x, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, given[1])
    assert_same(second, given[1] * mask)


def test_sparse_gradients_fall_where_values_do():
    x = torch.ones(300, 256, requires_grad=True)
    y = dropout(x * 1.0, 0.3)
    torch.nn.functional.embedding(torch.tensor([3, 5]), y, sparse=True).sum().backward()
    expected = torch.zeros(300, 256)
    expected[[3, 5]] = y.detach()[[3, 5]]
    assert_same(x.grad.to_dense() if x.grad.is_sparse else x.grad, expected)


def test_a_dropout_goes_back_under_another_default(served):
    x = torch.ones(LARGE, requires_grad=True)
    with ema_backend("blocked"):
        y = torch.utils.checkpoint.checkpoint(lambda x: dropout(x, 0.3) * 1.0, x, use_reentrant=True)
    y.sum().backward()
    assert_same(x.grad, y.detach())


def test_a_traced_dropout_goes_on_drawing():
    traced = make_fx(lambda x: dropout(x, 0.5))(torch.ones(LARGE))
    assert not torch.equal(traced(torch.ones(LARGE)), traced(torch.ones(LARGE)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds_reproduce_large_dropout(dtype, served):
    x = torch.ones(LARGE, dtype=dtype)
    first, again, other = (dropout(x, 0.3) for seed in (1, 1, 2) if torch.manual_seed(seed))
    assert len(served) == 3
    assert_same(again, first)
    assert not torch.equal(other, first)
    assert not torch.equal(dropout(x, 0.3), other)  # nor the same twice


def test_recomputing_draws_the_same():
    x = torch.ones(LARGE, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: dropout(x, 0.3) * x, x, use_reentrant=False)
    y.sum().backward()
    assert_same(x.grad, 2 * y.detach())


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_layers_are_what_they_are_in_float64(aligned, dropped, monkeypatch, served):
    monkeypatch.setattr(backends, "ENOUGH", 1)
    width = 16 if aligned else 13
    rates = {"dropout": 0.2, "hidden_dropout": 0.2} if dropped else {}
    blocks = torch.nn.ModuleList(
        [
            MovingAverageGatedAttention(width, 6, value_dim=2 * width, chunk_size=8, **rates),
            NormalizedFFN(width, 3 * width, **rates),
            GatedCrossAttention(width, 6, **rates),
        ]
    )
    mask = torch.arange(21) >= torch.tensor([[21], [17]])
    x, memory = torch.randn(2, 21, width), torch.randn(2, 9, width)
    made, wanted = (
        outputs_and_gradients(copy.deepcopy(blocks).to(dtype), x.to(dtype), memory.to(dtype), mask)
        for dtype in (torch.float32, torch.float64)
    )
    assert set(served) == {*GATES, *(["dropout"] if dropped else [])}
    largest = max(part.abs().max().item() for part in wanted)
    for one, other in zip(made, wanted, strict=True):
        assert_close(one, other, 2e-5, floor=1e-3 * largest)


def outputs_and_gradients(blocks: torch.nn.ModuleList, x: Tensor, memory: Tensor, mask: Tensor) -> list[Tensor]:
    """What blocks make of an input, with the same draws every time, and all gradients."""
    torch.manual_seed(5)
    x.requires_grad_()
    y = blocks[2](blocks[1](blocks[0](x, padding_mask=mask), padding_mask=mask), memory, padding_mask=mask)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *blocks.parameters()])]


@pytest.mark.compile
def test_a_compiler_sees_torch_alone(served):
    inputs = tensors(3)
    whole = torch.compile(
        lambda x, candidate, update: silu_gate(x, update) + update_gate(x, candidate, update) + dropout(x, 0.0),
        backend="aot_eager",
        fullgraph=True,
    )
    made = whole(*inputs)
    assert not served
    assert_close(made, silu_gate(inputs[0], inputs[2]) + update_gate(*inputs) + inputs[0], 1e-6)


@pytest.mark.compile
def test_compiled_and_exported_programs_know_no_border():
    layer = MovingAverageGatedAttention(16, 8, value_dim=32).eval()
    x = torch.randn(3, 40, 16)
    with torch.no_grad():
        rows = {0: torch.export.Dim("rows", min=2, max=100_000)}
        program = torch.export.export(layer, (x,), dynamic_shapes=(rows,)).module()
        many = torch.randn(120, 40, 16)
        assert many.numel() > backends.ENOUGH > x.numel()
        assert_close(program(many), layer(many), 1e-5)
        counter = CompileCounterWithBackend("aot_eager")
        whole = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
        graphs = []
        for given in (x, torch.randn(5, 40, 16), many):
            assert_close(whole(given), layer(given), 1e-5)
            graphs.append(counter.frame_count)
    assert graphs[2] == graphs[1]


@pytest.mark.parametrize("name", ["blocked", "recurrent"])
def test_a_default_that_compiles_nothing_holds_for_gates(name, served):
    with ema_backend(name):
        silu_gate(*tensors(2))
    assert not served
    with ema_backend("numba_cpu"):
        silu_gate(*tensors(2))
    assert served == ["silu_gate"]
