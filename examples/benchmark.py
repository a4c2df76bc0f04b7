"""Times the moving average against the way of the references: a kernel as long as the sequence, convolved by FFT.

    python examples/benchmark.py                  # both suites, a few minutes on two cores
    python examples/benchmark.py --suite ema      # one layer, forward and backward, time and peak memory
    python examples/benchmark.py --suite scaling  # time per token from 4,096 to 131,072 tokens
    python examples/benchmark.py --quick          # small sizes, to see whether it runs

Contenders take turns, so that a machine that changes its speed changes it for all; what counts are the ratios, given
as median and range over the turns. Peak memory is that of a process of its own above what its inputs take. Results go
to `--out` as JSON and, as a figure, PNG.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import megablocks
from megablocks import MultiDimensionDampedEMA

Layer = Callable[[Tensor], Tensor]


def fft_way(ema: MultiDimensionDampedEMA) -> Layer:
    """The average as the references compute it: D x N x L powers, summed to a kernel, convolved by FFT in float32."""

    def call(x: Tensor) -> Tensor:
        length = x.shape[1]
        p = ema.alpha.sigmoid()
        log_q = torch.log(1 - p * ema.delta.sigmoid())
        powers = torch.exp(log_q.unsqueeze(-1) * torch.arange(length))
        weights = (p * ema.beta).unsqueeze(-1) * powers
        kernel = torch.einsum("dnl,dn->dl", weights, ema.eta * ema.ema_dim**-0.5)
        signal = torch.fft.rfft(x.transpose(1, 2).float(), n=2 * length)
        y = torch.fft.irfft(signal * torch.fft.rfft(kernel.float(), n=2 * length), n=2 * length)[..., :length]
        return y.transpose(1, 2) + x * ema.omega

    return call


def megablocks_way(name: str) -> Callable[[MultiDimensionDampedEMA], Layer]:
    """The layer itself, on a backend by name."""

    def made(ema: MultiDimensionDampedEMA) -> Layer:
        def call(x: Tensor) -> Tensor:
            with megablocks.ema_backend(name):
                return ema(x)

        return call

    return made


CONTENDERS: dict[str, Callable[[MultiDimensionDampedEMA], Layer]] = {
    "FFT, as the references": fft_way,
    "megablocks, blocked": megablocks_way("blocked"),
}
REFERENCE, OURS = CONTENDERS


def run_once(layer: Layer, x: Tensor, gradient: Tensor | None) -> None:
    """One forward pass, and a backward pass where a gradient is given."""
    if gradient is None:
        with torch.no_grad():
            layer(x)
    else:
        layer(x).backward(gradient)


def problem(sizes: dict[str, int], backward: bool) -> tuple[MultiDimensionDampedEMA, Tensor, Tensor | None]:
    """Layer, input and gradient."""
    torch.manual_seed(0)
    ema = MultiDimensionDampedEMA(sizes["width"], sizes["averages"])
    x = torch.randn(sizes["batch"], sizes["length"], sizes["width"], requires_grad=backward)
    return ema, x, torch.randn_like(x) if backward else None


def timed(sizes: dict[str, int], backward: bool, turns: int) -> dict[str, list[float]]:
    """Seconds of each contender, turn by turn, after one turn to warm up."""
    ema, x, gradient = problem(sizes, backward)
    layers = {name: make(ema) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    what = "forward and backward" if backward else "forward"
    for turn in tqdm(range(turns + 1), desc=f"{what}, length {sizes['length']}", leave=False):
        for name, layer in layers.items():
            start = time.perf_counter()
            run_once(layer, x, gradient)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(name: str, sizes: dict[str, int], backward: bool) -> float:
    """MiB that one pass takes at its peak, above its inputs, in a process of its own; NaN where Linux does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    request = json.dumps({"name": name, "sizes": sizes, "backward": backward})
    answer = subprocess.run(
        [sys.executable, __file__, "--measure-memory", request], capture_output=True, text=True, check=True
    )
    return float(answer.stdout)


def measure_memory(request: str) -> None:
    """The other side of `peak_memory`."""
    asked = json.loads(request)
    for length in (64, asked["sizes"]["length"]):  # the short one loads libraries and starts threads
        ema, x, gradient = problem({**asked["sizes"], "length": length}, asked["backward"])
        before = resident_mib(reset=True)
        run_once(CONTENDERS[asked["name"]](ema), x, gradient)
        peak = resident_mib(peak=True) - before
    print(peak)


def resident_mib(*, peak: bool = False, reset: bool = False) -> float:
    """Memory that this process holds, or has held at its peak since the last `reset`, as Linux tells it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    wanted = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(wanted)) / 1024


def ratio(seconds: dict[str, list[float]]) -> list[float]:
    """How many times longer the reference took, turn by turn."""
    return [theirs / ours for theirs, ours in zip(seconds[REFERENCE], seconds[OURS], strict=True)]


def shown(ratios: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def suite_ema(sizes: dict[str, int], turns: int) -> dict[str, object]:
    """One layer, forward alone and with backward, time and memory."""
    rows: dict[str, object] = {}
    print("| pass | FFT time over ours | FFT peak memory over ours |\n|---|---|---|")
    for backward in (False, True):
        what = "forward and backward" if backward else "forward"
        seconds = timed(sizes, backward, turns)
        memory = {name: peak_memory(name, sizes, backward) for name in CONTENDERS}
        rows[what] = {"seconds": seconds, "ratios": ratio(seconds), "peak_mib": memory}
        print(f"| {what} | {shown(ratio(seconds))} | {memory[REFERENCE] / memory[OURS]:.1f} |", flush=True)
    return rows


def suite_scaling(sizes: dict[str, int], lengths: list[int], turns: int) -> dict[str, object]:
    """Time per token of our forward and backward pass as the sequence grows, the batch being one."""
    rows: dict[str, object] = {}
    print("| length | microseconds per token, forward and backward | over that of the shortest |\n|---|---|---|")
    first = 0.0
    for length in lengths:
        ema, x, gradient = problem({**sizes, "batch": 1, "length": length}, True)
        times = []
        for turn in range(turns + 1):
            start = time.perf_counter()
            run_once(CONTENDERS[OURS](ema), x, gradient)
            if turn:
                times.append((time.perf_counter() - start) / length * 1e6)
        first = first or statistics.median(times)
        rows[str(length)] = times
        print(f"| {length} | {statistics.median(times):.1f} | {statistics.median(times) / first:.2f} |", flush=True)
    return rows


def draw(results: dict[str, dict[str, object]], path: Path) -> None:
    """One panel for each suite."""
    suites = [name for name in ("ema", "scaling") if name in results]
    figure, axes = plt.subplots(1, len(suites), figsize=(5.5 * len(suites), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], suites, strict=True):
        rows = results[name]
        if name == "ema":
            values = [statistics.median(row["ratios"]) for row in rows.values()]  # type: ignore[index]
            bars = axis.bar(list(rows), values, width=0.5, color="#4c72b0")
            axis.bar_label(bars, fmt="%.1f×")
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(title="The average: FFT time over ours", ylabel="times faster")
        else:
            axis.plot([int(key) for key in rows], [statistics.median(row) for row in rows.values()], marker="o")  # type: ignore[arg-type]
            axis.set(title="Forward and backward, batch 1", xlabel="length", ylabel="microseconds per token")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Reads the command line and runs what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("ema", "scaling"), help="one suite alone")
    parser.add_argument("--quick", action="store_true", help="small sizes and few turns")
    parser.add_argument("--turns", type=int, default=None, help="counted turns of each contender")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="directory for JSON and PNG")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        measure_memory(args.measure_memory)
        return
    sizes = {"batch": 4, "length": 4096, "width": 512, "averages": 16}
    if args.quick:
        sizes = {"batch": 2, "length": 512, "width": 64, "averages": 16}
    turns = args.turns or (3 if args.quick else 9)
    lengths = [512, 1024, 2048] if args.quick else [4096, 16384, 65536, 131072]
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; batch {sizes['batch']}, width {sizes['width']}, {sizes['averages']} averages, {turns} turns\n")
    results: dict[str, dict[str, object]] = {}
    if args.suite in (None, "ema"):
        results["ema"] = suite_ema(sizes, turns)
        print()
    if args.suite in (None, "scaling"):
        results["scaling"] = suite_scaling(sizes, lengths, max(2, turns // 3))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmark.json").write_text(json.dumps({"machine": machine, "sizes": sizes, **results}, indent=1))
    draw(results, args.out / "benchmark.png")
    print(f"\nwritten: {args.out / 'benchmark.json'}, {args.out / 'benchmark.png'}")


if __name__ == "__main__":
    main()
