"""The Triton kernel, on a GPU where there is one, else in Triton's interpreter.

Triton decides whether a function is interpreted when it is decorated, and decorates its own functions (`tl.sum`) when
it is first imported, which in a process with other tests may happen anywhere. `TRITON_INTERPRET=1` would come too late
here, so the functions are decorated once more, for each test.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import check_recurrence, drawn, parameters
from torch import Tensor
from torch.utils import _pytree as pytree

from laws import assert_close, assert_same
from megablocks.functional.ema import coefficients
from megablocks.kernels import EMACoefficients
from megablocks.kernels.blocked import blocked
from strategies import seeds

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from megablocks.kernels import triton_gpu, triton_programs  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
busy = pytest.mark.parametrize("resident", [triton_gpu.RESIDENT, 0], ids=["an idle chip", "a busy chip"])
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}


class Interpreted(InterpretedFunction):
    """What `triton.jit` makes for the interpreter, but free to call: it trusts the launch to have patched Triton."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Without a GPU, has every test but those that compile run in the interpreter."""
    if not GPU and "compile" not in request.keywords:
        for module in (triton.language, triton_programs):
            for name, function in list(vars(module).items()):
                if isinstance(function, JITFunction):
                    monkeypatch.setattr(module, name, Interpreted(function.fn))


@contextmanager
def small() -> Iterator[None]:
    """Makes blocks, spans and groups of channels so small that there are several in 10 steps of 3 channels."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"THREADS": 2, "HELD": 8, "BLOCK": 2, "SHORTEST": 4, "AHEAD": 2}.items():
            patch.setattr(triton_gpu, name, value)
        yield


def kernel(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The kernel where it runs, for tensors that are on the CPU."""
    arguments, options = pytree.tree_map_only(Tensor, lambda part: part.to(DEVICE), (arguments, options))
    return pytree.tree_map_only(Tensor, lambda part: part.cpu(), triton_gpu.triton_gpu(*arguments, **options))


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """log q, b and g, as the operator takes them."""
    _, log_q, b, g = coefficients(*(parameter.detach() for parameter in parameters(seed, *shape)))
    return log_q.to(dtype), b.to(dtype), g.to(dtype)


def reference(
    x: Tensor, log_q: Tensor, b: Tensor, g: Tensor, omega: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What the operator computes, by `blocked`, in float64."""
    x, log_q, b, g, omega, hidden = (part.double() for part in (x, log_q, b, g, omega, hidden))
    both = (part.split(x.shape[-1]) for part in (-torch.expm1(log_q), log_q, b, g))
    directions = [EMACoefficients(*parts) for parts in zip(*both, strict=True)]
    return blocked(x, *directions, omega=omega, hidden=hidden, final=True)


@settings(max_examples=settings.default.max_examples // 2)  # an example takes a second or two
@given(
    seed=seeds(),
    length=st.integers(1, 10),
    averages=st.integers(1, 4),
    start=st.booleans(),
    mirror=st.booleans(),
    data=st.data(),
)
def test_recurrence(seed, length, averages, start, mirror, data):
    counts = st.none() | st.lists(st.integers(0, length), min_size=1, max_size=2).map(tuple)
    options = {"start": start, "mirror": mirror, "lengths": data.draw(counts, label="lengths")}
    with small():
        check_recurrence(kernel, seed=seed, length=length, averages=averages, **options)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_borders_of_blocks_and_spans(length):
    with small():
        check_recurrence(kernel, seed=length, length=length, averages=2, start=True, lengths=(0, length - 1, length))


def test_blocks_and_spans_as_they_are():
    check_recurrence(kernel, seed=0, length=85, averages=5, start=True, lengths=(85, 66))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_inputs_of_lower_precision(dtype):
    # Sums are in float32; y and dx are rounded to the dtype of x, and once, though each is a sum of two directions.
    batch, length, width, averages = 2, 7, 3, 2
    x, dy = (drawn(seed, batch, length, width).detach().to(dtype) for seed in (0, 1))
    given, dfinal = (drawn(seed, batch, width, averages).detach().float() for seed in (2, 3))
    omega, weights = drawn(4, width).detach().float(), rows(5, 2 * width, averages, dtype=torch.float32)
    moved = [part.to(DEVICE) for part in (x, *weights, omega, given)]
    with small():
        outputs = triton_gpu.forward(*moved, None)
        gradients = triton_gpu.backward(dy.to(DEVICE), dfinal.to(DEVICE), *moved, None)
    leaves = [part.double().requires_grad_() for part in (x, *weights, omega, given)]
    expected = reference(*leaves)
    wanted = torch.autograd.grad(expected, leaves, [dy.double(), dfinal.double()])
    for index, (found, exact) in enumerate(zip((*outputs, *gradients), (*expected, *wanted), strict=True)):
        assert found.dtype == (dtype if index in (0, 2) else torch.float32)  # y and dx, or states and coefficients
        # Half of this where numbers are rounded to the nearest one; but the interpreter cuts bfloat16 off.
        assert_close(found.cpu(), exact.detach(), torch.finfo(found.dtype).eps + 1e-6)


@pytest.mark.parametrize("expanded", [False, True])
def test_strides_do_not_matter(expanded):
    x, params = drawn(0, 2, 5, 7), coefficients(*parameters(1, 5, 2))
    weights = torch.ones(()) if expanded else torch.randn(2, 5, 7, dtype=torch.float64)
    with small():
        # x comes transposed, and the gradient of y: transposed, or one number for all.
        y, _ = kernel(x.transpose(1, 2), params)
        (found,) = torch.autograd.grad((y.transpose(1, 2) * weights).sum(), x, retain_graph=True)
    other, _ = blocked(x.transpose(1, 2), params)
    (expected,) = torch.autograd.grad((other.transpose(1, 2) * weights).sum(), x)
    assert_close(y, other)
    assert_close(found, expected)


def test_a_later_input_never_meets_an_earlier_output():
    params = coefficients(*(parameter.detach().float() for parameter in parameters(0, 3, 2)))
    x = drawn(0, 1, 14, 3).detach().float()
    with small():
        y, _ = kernel(x, params)
        for at in (1, 6, 13):
            disturbed = x.clone()
            disturbed[:, at:] = 1e30
            assert_same(kernel(disturbed, params)[0][:, :at], y[:, :at])


@busy
@pytest.mark.parametrize(("lag", "tolerance"), [(500, 5e-5), pytest.param(65_536, 1e-3, marks=needs_gpu)])
def test_float32_over_a_long_time(monkeypatch, lag, tolerance, resident):
    # Law 7: at lag 65,536 the error stays under 1e-3 of the impulse response, for decays that are felt so far away.
    monkeypatch.setattr(triton_gpu, "RESIDENT", resident)
    alpha = torch.linspace(-16.0, -9.0, 32).unsqueeze(-1)
    params = [alpha, *(torch.ones(32, 1) for _ in range(3))]
    x = torch.zeros(1, lag + 1, 32)
    x[:, 0] = 1.0
    y, final = kernel(x, coefficients(*params), final=True)
    _, log_q, b, g = coefficients(*(parameter.double() for parameter in params))
    expected = b * torch.exp(log_q * lag)
    assert (y[0, -1].double() / (g * expected)[:, 0] - 1).abs().max() < tolerance
    assert (final[0].double() / expected - 1).abs().max() < tolerance


def test_torch_knows_the_operator():
    arguments = [drawn(0, 2, 5, 3), *rows(1, 3, 2), drawn(2, 3), drawn(3, 2, 3, 2)]
    moved = [part.detach().to(DEVICE).requires_grad_() for part in arguments]
    with small():
        torch.library.opcheck(triton_gpu.triton_gpu.operator.forward, (*moved, torch.tensor([3, 5], device=DEVICE)))


def test_numerical_gradients():
    x, params, hidden = drawn(0, 1, 4, 1), parameters(1, 1, 2), drawn(2, 1, 1, 2)

    def run(x: Tensor, hidden: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(x, coefficients(*params), hidden=hidden, final=True)

    with small():
        torch.autograd.gradcheck(run, [x, hidden, *params])
        torch.autograd.gradgradcheck(run, [x, hidden, *params])


@needs_gpu
@busy
@pytest.mark.parametrize("mirror", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_large_inputs(monkeypatch, dtype, mirror, resident):
    monkeypatch.setattr(triton_gpu, "RESIDENT", resident)
    batch, length, width, averages = 2, 5003, 500, 16
    wide = torch.promote_types(dtype, torch.float32)
    x, dy = (drawn(seed, batch, length, width).detach().to(DEVICE, dtype) for seed in (0, 1))
    given, dfinal = (drawn(seed, batch, width, averages).detach().to(DEVICE, wide) for seed in (2, 3))
    omega, weights = drawn(4, width).detach().to(DEVICE, wide), rows(5, width * (1 + mirror), averages, dtype=wide)
    leaves = [x, *(part.to(DEVICE) for part in weights), omega, given]
    found = (*triton_gpu.forward(*leaves, None), *triton_gpu.backward(dy, dfinal, *leaves, None))
    leaves = [part.double().requires_grad_() for part in leaves]
    expected = reference(*leaves)
    wanted = torch.autograd.grad(expected, leaves, [dy.double(), dfinal.double()])
    for part, exact in zip(found, (*expected, *wanted), strict=True):
        assert_close(
            part, exact.detach(), 1e-10 if dtype == wide == torch.float64 else max(5e-5, torch.finfo(part.dtype).eps)
        )


def compiled(x: torch.dtype, wide: torch.dtype, averages: int, *, mirror: bool, path: Path) -> list[Path]:
    """What Triton makes, for a Hopper GPU that need not be there, of all that a call and its gradients launch."""
    if not isinstance(triton_programs.run, JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    launches: dict[str, tuple[Any, ...]] = {}

    def launch(kernel: JITFunction, programs: int, *arguments: Tensor | int | None, **flags: int) -> None:
        there = [part is not None for part in arguments]
        launches.setdefault(f"{kernel.__name__} {there} {flags}", (kernel, arguments, flags))

    length, width = 300, 40
    leaves = [torch.zeros(1, length, width, dtype=x), *rows(0, width * (1 + mirror), averages, dtype=wide)]
    leaves += [torch.zeros(width, dtype=wide), torch.zeros(1, width, averages, dtype=wide)]
    lengths = torch.tensor([length]) if mirror else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gpu, "_launch", launch)
        y, final = triton_gpu.forward(*leaves, lengths)
        triton_gpu.backward(y, final, *leaves, lengths)
        patch.setenv("TRITON_CACHE_DIR", str(path))
        return [binary(*launch, path / str(index)) for index, launch in enumerate(launches.values())]


def binary(kernel: JITFunction, arguments: tuple[Any, ...], flags: dict[str, int], path: Path) -> Path:
    """The compiled kernel, as a file."""
    assert all(parameter.is_constexpr or parameter.do_not_specialize for parameter in kernel.params)
    signature, constants = dict.fromkeys(flags, "constexpr"), dict(flags)
    for name, value in zip(kernel.arg_names, arguments, strict=False):
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
        if value is None:
            signature[name], constants[name] = "constexpr", None
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 1, "enable_fp_fusion": True}
    path = path.with_name(path.name + kernel.__name__)
    path.write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"])
    return path


@pytest.mark.compile
def test_registers_hold_everything(tmp_path):
    # Neither spilled nor passed from thread to thread through shared memory: each thread has channels of its own.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for path in compiled(torch.float32, torch.float32, 16, mirror=False, path=tmp_path):
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        numbers = {name: int(value) for name, value in re.findall(r"(STACK|LOCAL|SHARED):(\d+)", usage)}
        assert numbers == {"STACK": 0, "LOCAL": 0, "SHARED": 0}, path.name


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_compiles(dtype, tmp_path):
    with small():
        wide, mirror = torch.promote_types(dtype, torch.float32), dtype == torch.bfloat16
        assert compiled(dtype, wide, 3, mirror=mirror, path=tmp_path)
