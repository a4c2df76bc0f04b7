"""Vectors of the compiled kernels: on processors of another width, and beside numbers that are hardly there."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.errors import TypingError

from megablocks import MultiDimensionDampedEMA, ema_backend
from megablocks.kernels.numba_vectors import TILE, load

WIDTHS = """
import llvmlite.binding, torch
features = llvmlite.binding.get_host_cpu_features
others = {"avx512f": not features().get("avx512f", False)}
llvmlite.binding.get_host_cpu_features = lambda: others
from megablocks.kernels.numba_vectors import TILE
llvmlite.binding.get_host_cpu_features = features  # what is compiled is for this processor all the same
from megablocks import MultiDimensionDampedEMA, ema_backend

torch.manual_seed(0)
for truncation in (None, 20):
    ema = MultiDimensionDampedEMA(21, 3, causal=False, truncation=truncation).double()
    x = torch.randn(2, 83, 21, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("blocked", "numba_cpu"):
        with ema_backend(backend):
            y = ema(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *ema.parameters()])])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
print(TILE)
"""


@pytest.mark.compile
def test_the_other_width_gives_the_same(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", WIDTHS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {int(done.stdout), TILE} == {8, 16}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("flushing", [False, True])
def test_small_numbers_are_treated_as_before(threads, flushing):
    tiny = float(np.finfo(np.float32).tiny)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if not torch.set_flush_denormal(flushing):
            pytest.skip("this processor cannot flush small numbers to zero")
        with ema_backend("numba_cpu"), np.errstate(all="raise"):
            MultiDimensionDampedEMA(64, 16)(torch.randn(4, 256, 64)).sum().backward()
        halves = torch.full((1_000_000,), tiny) / 2  # by all threads
        assert np.float32(tiny) / 2 == 0 if flushing else np.float32(tiny) / 2 > 0
        assert flushing or bool(halves.ne(0).all())
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def test_silence_decays_to_nothing():
    ema = MultiDimensionDampedEMA(4, 2)
    x = torch.zeros(1, 5000, 4)
    x[:, 0] = 1
    with ema_backend("numba_cpu"), torch.no_grad(), np.errstate(all="raise"):
        y = ema(x)
        ema.truncation = 1024
        truncated = ema(x)
    assert (y[:, -1] == 0).all()
    assert (truncated[:, 1024:] == 0).all()


def test_vectors_are_read_from_flat_arrays_only():
    @njit
    def first(array):
        return load(array, 0)

    with pytest.raises(TypingError, match="contiguous arrays of one axis"):
        first(np.zeros((4, TILE)))
