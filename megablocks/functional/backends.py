"""Which kernel computes the damped EMA: what there is, what a call gets, and how to choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from megablocks._checks import lookup
from megablocks.functional.transforms import plain_only
from megablocks.kernels import Kernel
from megablocks.kernels.blocked import exporting


class Backend(NamedTuple):
    """A kernel that may or may not be there."""

    load: Callable[[], Kernel]
    """Imports the kernel."""
    device: str | None = None
    """The type of device that it runs on; `None` for any."""
    needs: tuple[str, ...] = ()
    """Packages that must be installed."""
    remedy: str = ""
    """How to install them."""
    truncates: int | None = None
    """Lags from which on it is faster than `blocked` at truncated averages; `None` if it is not."""


def _recurrent() -> Kernel:
    from megablocks.kernels.recurrent import recurrent

    return recurrent


def _blocked() -> Kernel:
    from megablocks.kernels.blocked import blocked

    return blocked


def _numba_cpu() -> Kernel:
    from megablocks.kernels.numba_cpu import numba_cpu

    return numba_cpu


def _triton_gpu() -> Kernel:
    from megablocks.kernels.triton_gpu import triton_gpu

    return triton_gpu


BACKENDS: Mapping[str, Backend] = {
    "recurrent": Backend(_recurrent),
    "blocked": Backend(_blocked),
    "numba_cpu": Backend(_numba_cpu, "cpu", ("numba",), 'pip install "megablocks-torch[cpu]"', truncates=64),
    "triton_gpu": Backend(_triton_gpu, "cuda", ("triton",), "pip install triton"),
}


# Looked up once: a compiler that traces a call cannot look for packages.
_INSTALLED = {package: find_spec(package) is not None for backend in BACKENDS.values() for package in backend.needs}
_FUSED = {
    backend.device: name
    for name, backend in BACKENDS.items()
    if backend.device is not None and all(_INSTALLED[package] for package in backend.needs)
}


class EMABackends(NamedTuple):
    """What computes the damped EMA on this machine."""

    available: tuple[str, ...]
    """Names that `ema_backend(name)` and `backend=name` accept here."""
    default: str
    """What calls with `backend="auto"` use; `"auto"` picks per call."""
    last_used: str | None
    """What served the last call."""


class _Choice:
    default = "auto"
    last_used: str | None = None


class _Restore:
    """Puts the previous default back at the end of a `with` block."""

    def __init__(self, previous: str) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _Choice.default = self._previous


@overload
def ema_backend(name: None = None) -> EMABackends:
    """Without a name: what there is."""


@overload
def ema_backend(name: str) -> _Restore:
    """With a name: sets the default, for a `with` block or for good."""


def ema_backend(name: str | None = None) -> EMABackends | _Restore:
    """Tells which EMA backends there are, or sets the default one.

    Without a name, returns what is available, the default and what served the last call. With a name, makes it the
    default for the whole process, or, in a `with` statement, until the end of the block.

    Args:
        name: `"auto"` for the fastest that can serve each call, or a backend's name; `None` to ask.

    Raises:
        ValueError: If no backend has this name; the message lists those that there are.
        ImportError: If the backend is not available here; the message says what is missing.

    Example:
        >>> import megablocks
        >>> megablocks.ema_backend().available
        ('recurrent', 'blocked'...)
        >>> with megablocks.ema_backend("recurrent"):
        ...     megablocks.ema_backend().default
        'recurrent'
    """
    if name is None:
        here = tuple(known for known in BACKENDS if _missing(known) is None)
        return EMABackends(here, _Choice.default, _Choice.last_used)
    if name != "auto":
        _named(name)
    previous, _Choice.default = _Choice.default, name
    return _Restore(previous)


def _missing(name: str) -> str | None:
    """What a backend lacks to run on this machine."""
    backend = BACKENDS[name]
    for package in backend.needs:
        if not _INSTALLED[package]:
            return f"the package {package}, which is not installed here; {backend.remedy}"
    if backend.device == "cuda" and not torch.cuda.is_available():
        return "a CUDA device, and this machine has none; use 'auto'"
    return None


def _named(name: str) -> Backend:
    backend = lookup("backend", name, BACKENDS, others=", or 'auto'")
    if not torch.compiler.is_compiling():
        missing = _missing(name)
        if missing is not None:
            raise ImportError(f"The backend {name!r} needs {missing}.")
    return backend


def choose(name: str, x: Tensor, truncation: int | None, *others: Tensor) -> Kernel:
    """Returns the kernel for an input: of the backend of a name, or for `"auto"` the fastest that can serve.

    Args:
        name: As in `damped_ema`.
        x: The input.
        truncation: As in `damped_ema`.
        *others: What else the kernel will read, and may have to differentiate.

    Raises:
        ValueError: If no backend has this name, or it does not run where the input is.
        ImportError: If the backend is not available here.
    """
    name = _Choice.default if name == "auto" else name
    if name == "auto":
        name = _fastest(x, truncation, others)
    backend = _named(name)
    if backend.device not in (None, x.device.type) and x.device.type != "meta":  # shapes alone run anywhere
        raise ValueError(f"The backend {name!r} runs on {backend.device}, but `x` is on {x.device.type}; use 'auto'.")
    if not torch.compiler.is_compiling():
        _Choice.last_used = name
    return backend.load()


def _fastest(x: Tensor, truncation: int | None, others: tuple[Tensor, ...]) -> str:
    if truncation is None and x.shape[1] == 1:
        return "recurrent"
    fused = _FUSED.get(x.device.type)
    if fused is None or plain_only(x, *others) or exporting():
        return "blocked"
    shortest = 0 if truncation is None else BACKENDS[fused].truncates
    return "blocked" if shortest is None or (truncation or 0) < shortest else fused


ENOUGH = 1 << 16
"""Numbers that are worth a call of a compiled elementwise function."""


def compiled_elementwise(*inputs: Tensor, dtypes: tuple[torch.dtype, ...]) -> Any:
    """Returns `megablocks.kernels.numba_elementwise` if it can serve these tensors of one shape, else `None`."""
    if torch.compiler.is_compiling() or exporting():  # first: a size that is looked at is a size that is fixed
        return None
    x = inputs[0]
    if x.numel() < ENOUGH or x.dtype not in dtypes or not _INSTALLED["numba"]:
        return None
    alike = all(
        type(part) is Tensor
        and part.is_cpu
        and part.layout is torch.strided
        and part.dtype == x.dtype
        and part.shape == x.shape
        for part in inputs
    )
    if not alike or plain_only(*inputs):
        return None
    from megablocks.kernels import numba_elementwise

    return numba_elementwise


def compiled_gates(*inputs: Tensor) -> Any:
    """The same for gates. Who has named a default backend that compiles nothing gets no compiled gate either."""
    if _Choice.default not in ("auto", "numba_cpu"):
        return None
    return compiled_elementwise(*inputs, dtypes=(torch.float32,))
