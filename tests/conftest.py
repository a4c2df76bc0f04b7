"""How the tests run: seeds, poisoned memory, and how many examples hypothesis tries.

`HYPOTHESIS_PROFILE` is `dev` (few examples, the same ones every time), `ci` (more, the same ones every time) or
`nightly` (many, new ones every time).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._device
from hypothesis import HealthCheck, settings

from megablocks.kernels import numba_cpu, numba_elementwise
from megablocks.kernels.numba_host import reserve

# Tensors are built from a drawn seed, so generating is cheap and shrinking works on sizes; only slow laws are slow.
_ALWAYS: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# Read once by torch: `with torch.device(...)` must know the real `torch.empty`, not the wrapper below.
torch.utils._device._device_constructors()

# The tensors here are small: sharing one out among threads costs more than it saves, above all on a busy machine.
torch.set_num_threads(1)

settings.register_profile("dev", max_examples=15, derandomize=True, **_ALWAYS)
settings.register_profile("ci", max_examples=60, derandomize=True, **_ALWAYS)
settings.register_profile("nightly", max_examples=1000, **_ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line("markers", "compile: compiles, and looks `torch.empty` up by identity while it does")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same random state."""
    torch.manual_seed(0)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make`, with NaN in the memory that it leaves uninitialised."""

    def make_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if made.is_floating_point():
            with torch.no_grad():
                made.fill_(float("nan"))
        return made

    return make_poisoned


def _reserved(x: torch.Tensor, *, zeros: bool) -> np.ndarray:
    """Memory of the compiled kernels, which NumPy gives; numba must find `np.empty` itself unchanged."""
    made = reserve(x, zeros=zeros)
    if not zeros:
        made.fill(np.nan)
    return made


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Makes uninitialised memory show: it holds NaN instead of what happens to lie there, mostly zeros."""
    if "compile" not in request.keywords:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    for module in (numba_cpu, numba_elementwise):
        monkeypatch.setattr(module, "reserve", _reserved)
