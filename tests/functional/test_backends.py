"""Which kernel a call gets, and what is said when it cannot have it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megablocks import MultiDimensionDampedEMA
from megablocks.functional import backends, ema_backend
from megablocks.functional.backends import BACKENDS, choose


def test_available_are_those_that_can_run_here():
    here = ema_backend().available
    assert here[:3] == ("recurrent", "blocked", "numba_cpu")  # the extra `test` brings numba
    assert ("triton_gpu" in here) == torch.cuda.is_available()


def test_the_fastest_is_chosen_for_each_call():
    layer = MultiDimensionDampedEMA(4, 2)
    layer(torch.randn(1, 5, 4))
    assert ema_backend().last_used == "numba_cpu"
    layer(torch.randn(1, 1, 4))
    assert ema_backend().last_used == "recurrent"
    for truncation, name in ((3, "blocked"), (100, "numba_cpu")):
        MultiDimensionDampedEMA(4, 2, truncation=truncation)(torch.randn(1, 120, 4))
        assert ema_backend().last_used == name
    layer.to("meta")(torch.empty(1, 5, 4, device="meta"))
    assert ema_backend().last_used == "blocked"


@pytest.mark.parametrize("ask", [ema_backend, lambda name: choose(name, torch.randn(1, 5, 4), None)])
def test_a_backend_whose_package_is_missing_says_what_to_install(monkeypatch, ask):
    monkeypatch.setitem(backends._INSTALLED, "numba", False)
    with pytest.raises(
        ImportError,
        match=r"^The backend 'numba_cpu' needs the package numba, which is not installed here; "
        r'pip install "megablocks-torch\[cpu\]"\.$',
    ):
        ask("numba_cpu")
    assert "numba_cpu" not in ema_backend().available


def test_without_packages_calls_are_served_all_the_same(monkeypatch):
    monkeypatch.setattr(backends, "_FUSED", {})
    MultiDimensionDampedEMA(4, 2)(torch.randn(1, 5, 4))
    assert ema_backend().last_used == "blocked"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_backend_without_its_device_says_so():
    with pytest.raises(ImportError, match=r"^The backend 'triton_gpu' needs .*\.$"):
        ema_backend("triton_gpu")


def test_a_backend_of_another_device_says_so():
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    with pytest.raises(ValueError, match=r"^The backend 'numba_cpu' runs on cpu, but `x` is on cuda; use 'auto'\.$"):
        choose("numba_cpu", elsewhere, None)


def test_every_backend_names_what_it_needs():
    for name, backend in BACKENDS.items():
        assert not backend.needs or backend.remedy, name
