"""The machinery of a worker: a process that solves the benchmark's problems when it is asked to.

Requests and answers are lines of JSON on stdin and stdout. A worker first says what it runs on, and then answers

    {"do": "prepare", "problem": {...}}    {"shape": [...]}    builds a problem and solves it once, to warm up
    {"do": "turn", "problem": {...}}       {"seconds": ...}    solves a prepared problem again
    {"do": "memory", "problem": {...}}     {"mib": [...]}      the peak of one solution, in a process of its own
    {"do": "forget"}                       {}                  drops what was prepared

A problem is a kind and the arguments of what makes it. This module needs torch alone, whatever else a worker imports.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Solve = Callable[[], Tensor]
"""Solves a prepared problem once."""
Makers = Mapping[str, Callable[..., Solve]]
"""What prepares a problem of each kind."""

SHORT = 256
"""Length of the problem that loads libraries and starts threads before memory is measured."""


def serve(makers: Makers, **about: object) -> None:
    """Answers requests until there are no more; `about` is told besides what every worker tells of itself."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(torch=torch.__version__, threads=torch.get_num_threads(), **about)
    prepared: dict[str, Solve] = {}
    for line in sys.stdin:
        request = json.loads(line)
        problem = request.get("problem")
        key = json.dumps(problem)
        if request["do"] == "prepare":
            prepared[key] = prepare(makers, problem)
            answer(shape=list(prepared[key]().shape))
        elif request["do"] == "turn":
            answer(seconds=seconds(prepared[key]))
        elif request["do"] == "memory":
            answer(mib=peak_memory(makers, problem))
        else:
            prepared.clear()
            answer()


def prepare(makers: Makers, problem: Mapping[str, Any]) -> Solve:
    """Makes a problem, the same numbers at every time."""
    torch.manual_seed(0)
    return makers[problem["kind"]](**{name: value for name, value in problem.items() if name != "kind"})


def seconds(solve: Solve) -> float:
    """How long one solution takes."""
    start = time.perf_counter()
    solve()
    return time.perf_counter() - start


def peak_memory(makers: Makers, problem: Mapping[str, Any]) -> list[float]:
    """MiB that a solution takes at its peak, above its inputs and parameters; nothing where no Linux tells.

    It is measured in a copy of this process. Where many problems are measured, that saves the seconds of importing;
    a process that has itself computed nothing yet, and so started no threads, can be copied safely.
    """
    if not Path("/proc/self/clear_refs").exists():
        return []
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as copy:
        return [copy.submit(_peak_here, makers, problem).result()]


def _peak_here(makers: Makers, problem: Mapping[str, Any]) -> float:
    c = ctypes.CDLL(None)
    c.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is given back is gone, so that holes between tensors do not count
    for length in (SHORT, problem["length"]):
        solve = prepare(makers, {**problem, "length": length})
        c.malloc_trim(0)  # memory that is free, but kept, would not count again
        before = _resident_mib("VmRSS", reset=True)
        solve()
        peak = _resident_mib("VmHWM") - before
    return peak


def _resident_mib(entry: str, *, reset: bool = False) -> float:
    """Memory that this process holds (VmRSS), or has held at its peak since the last `reset` (VmHWM)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def training_step(
    call: Callable[[Tensor], Tensor], inputs: Tensor, gradient: Tensor, learned: Iterable[Tensor]
) -> Solve:
    """Forward and backward pass, without an optimizer; the gradients of the step before are dropped first."""
    leaves = [*learned, inputs]

    def solve() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = call(inputs)
        y.backward(gradient)
        return y

    return solve


def inference(call: Callable[[Tensor], Tensor], inputs: Tensor) -> Solve:
    """Forward pass without gradients."""

    def solve() -> Tensor:
        with torch.no_grad():
            return call(inputs)

    return solve
