"""Fused kernels as torch sees them: one operator each, with shapes and gradients of its own."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from laws import assert_close, assert_same
from megablocks import MultiDimensionDampedEMA, ema_backend
from megablocks.functional.backends import BACKENDS
from megablocks.functional.ema import coefficients, damped_ema
from megablocks.kernels import numba_host as module
from megablocks.kernels.blocked import blocked
from megablocks.kernels.numba_cpu import numba_cpu
from megablocks.kernels.registered import RegisteredKernel

KERNELS = [kernel for name in ema_backend().available if isinstance(kernel := BACKENDS[name].load(), RegisteredKernel)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


TRUNCATIONS = [kernel.truncated for kernel in KERNELS if kernel.truncated is not None]
every_truncation = pytest.mark.parametrize("operator", TRUNCATIONS, ids=lambda operator: operator.forward._name)


def arguments(
    width: int = 3, averages: int = 2, *, both: bool = False, bare: bool = False
) -> tuple[Tensor | None, ...]:
    """What the operator takes: rows of 7 and 4 real tokens, or without anything that may be left out."""
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    lengths = torch.tensor([7, 4])
    rows = 2 * width if both else width
    x = drawn(2, 7, width).masked_fill((torch.arange(7) >= lengths.view(-1, 1)).unsqueeze(-1), 0.0)
    floats = [x, -drawn(rows, averages).exp(), drawn(rows, averages), drawn(rows, averages)]
    floats = [part.requires_grad_() for part in floats]
    if bare:
        return *floats, None, None, None
    return *floats, drawn(width).requires_grad_(), drawn(2, width, averages).requires_grad_(), lengths


@every_kernel
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_torch_finds_nothing_wrong_with_the_operator(kernel, both, bare):
    torch.library.opcheck(kernel.operator.forward, arguments(both=both, bare=bare))


@every_truncation
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_torch_finds_nothing_wrong_with_truncation(operator, both, bare):
    *inputs, _, _ = arguments(both=both, bare=bare)
    torch.library.opcheck(operator.forward, (*inputs, 16))


@every_kernel
def test_a_compiler_keeps_it_as_one_node(kernel):
    backend = next(name for name in ema_backend().available if BACKENDS[name].load() is kernel)
    layer = MultiDimensionDampedEMA(5, 3, causal=False)
    seen = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(2, 9, 5)
    with ema_backend(backend):
        assert_close(torch.compile(layer, backend=collect, fullgraph=True)(x), layer(x), 1e-6)
    assert sum(kernel.name in target for target in seen) == 1


@every_kernel
def test_gradients_have_gradients(kernel):
    params = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *params: Tensor) -> Tensor:
        return kernel(x, coefficients(*params))[0]

    torch.autograd.gradgradcheck(run, [x, *params])


@every_truncation
def test_gradients_of_truncation_have_gradients(operator):
    params = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    x = torch.randn(1, 20, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *params: Tensor) -> Tensor:
        rows = coefficients(*params)
        return operator.forward(x, rows.log_q, rows.b, rows.g, None, 17)

    torch.autograd.gradgradcheck(run, [x, *params])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # of torch itself, at its first jvp
@pytest.mark.parametrize("what", ["vmap", "jvp"])
def test_transforms_of_functions_get_plain_operations(what):
    layer, x = MultiDimensionDampedEMA(4, 2).double(), torch.randn(3, 6, 4, dtype=torch.float64)
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (row.unsqueeze(0),)).square().sum()

    if what == "vmap":
        with pytest.warns(UserWarning, match="batching rule"):
            each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
        whole = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        for found, expected in zip(each.values(), whole, strict=True):
            assert_close(found.sum(0), expected)
    else:
        assert_close(torch.func.jvp(layer, (x,), (x,))[1], layer(x))  # the layer is linear in its input


def test_an_exported_program_holds_no_operator_of_this_package():
    program = torch.export.export(MultiDimensionDampedEMA(4, 2), (torch.randn(1, 6, 4),))
    assert not [node for node in program.graph.nodes if "megablocks" in str(node.target)]


def big_call() -> tuple[Tensor, ...]:
    """Enough work to wake threads."""
    source = torch.Generator().manual_seed(0)
    return torch.randn(3, 700, 70, generator=source), *torch.randn(4, 70, 16, generator=source)


def numba_on(threads: int) -> Tensor:
    """The big call on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, *params = big_call()
        return numba_cpu(x, coefficients(*params))[0]
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "Python's threads"])
def threads_of(request, monkeypatch):
    """Both ways to run on several threads."""
    if request.param == "Python's threads":
        monkeypatch.setattr(module, "_openmp", None)
    elif module._openmp is None:
        pytest.skip("torch's threads cannot be reached here")


@pytest.mark.usefixtures("threads_of")
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_number_of_threads_changes_nothing(threads):
    x, *params = big_call()
    one = numba_on(1)
    assert_close(one, blocked(x, coefficients(*params))[0], 1e-6)
    assert_same(numba_on(threads), one)


@pytest.mark.usefixtures("threads_of")
def test_threads_follow_torch(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(module, "_in_parallel", lambda threads, work: (seen.append(threads), work()))
    numba_on(1)
    numba_on(4)
    assert seen == [4]


@pytest.mark.usefixtures("threads_of")
def test_an_error_on_another_thread_is_raised_on_this_one(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def failing(row: int, first: int, last: int, array: object) -> None:
        if last > first:  # not the call that compiles
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        module.share_out(failing, 3, 2, module.SMALL, np.zeros(1))


@pytest.mark.usefixtures("threads_of")
def test_two_python_threads_may_call_at_once():
    expected = numba_on(2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            x, *params = big_call()
            for found in pool.map(lambda _: numba_cpu(x, coefficients(*params))[0], range(12)):
                assert_same(found, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    # Torch itself stays on one thread: its own threads do not survive a fork.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, *params = big_call()

    def total() -> float:
        return float(numba_cpu(x, coefficients(*params))[0].numpy().sum(dtype=np.float64))

    expected = total()
    context = multiprocessing.get_context("fork")
    answer, question = context.Pipe(duplex=False)
    child = context.Process(target=lambda: question.send(total()))
    child.start()
    assert answer.poll(60), "no answer from the forked process"
    assert answer.recv() == expected
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.parametrize("patience", [0.0, 60.0])
def test_a_first_call_that_takes_long_says_that_it_compiles(monkeypatch, patience):
    said: list[str] = []
    told = threading.Event()
    monkeypatch.setattr(module, "PATIENCE", patience)
    monkeypatch.setattr(module, "_compiled", set())
    monkeypatch.setattr(module._LOGGER, "warning", lambda message: (said.append(message), told.set()))

    def compiling(*arguments: object) -> None:
        if patience == 0.0:
            assert told.wait(timeout=60)

    for _ in range(2):  # the second call has nothing to compile
        module._compile_for(compiling, (False, np.zeros(1)))
    assert said == (
        ["Compiling a kernel for this CPU, or loading it from the cache; later calls need not wait."]
        if patience == 0.0
        else []
    )


@pytest.mark.parametrize("rows", [70, 140], ids=["forwards", "both ways"])
def test_the_callers_numpy_does_not_decide_what_overflows(rows):
    params = [torch.randn(rows, 4) for _ in range(4)]
    x, dy = torch.randn(2, 50, 70, requires_grad=True), torch.ones(2, 50, 70)
    dy[0, 3:30] = 3e38
    with np.errstate(all="raise"):
        damped_ema(x, *params, backend="numba_cpu").backward(dy)
    assert not bool(x.grad[0].isfinite().all())
    assert bool(x.grad[1].isfinite().all())


@pytest.mark.parametrize("backend", ["recurrent", "blocked", "numba_cpu"])
@pytest.mark.parametrize("truncation", [None, 20])
def test_infinite_parameters_forget_at_once(backend, truncation):
    beta, eta = torch.randn(2, 3, 2)
    forgets = torch.full((3, 2), torch.inf)
    x = torch.randn(2, 100, 3, requires_grad=True)
    y = damped_ema(x, forgets, forgets, beta, eta, truncation=truncation, backend=backend)
    torch.testing.assert_close(y, x * (beta * eta).sum(-1) * 2**-0.5)
    assert bool(torch.autograd.grad(y.sum(), x)[0].isfinite().all())
