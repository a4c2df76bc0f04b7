"""Times megablocks against the ways of the references, against a Transformer and against its own lower bounds.

    python examples/benchmark.py                  # all suites, some minutes on two cores
    python examples/benchmark.py --suite train    # one suite: ema, train, decode or scaling
    python examples/benchmark.py --quick          # small sizes, to see whether it runs
    python examples/benchmark.py --peer PYTHON    # also against Hugging Face's MEGA, the port in transformers 4.40.2

PYTHON is an interpreter that has torch, best of the same version, and transformers 4.40.2. Contenders take turns, so
that a machine that changes its speed changes it for all; what counts are the ratios, given as median and range over
the turns. While one works all others rest, in processes that are warm. Peak memory is that of a process of its own
above what inputs and parameters take, on Linux. Everything runs on the CPU, with the threads that torch takes by
itself. Results go to `--out` as JSON and, as a figure, PNG.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import matplotlib
from benchmark_suites import SUITES, Contest, Ratio, contests
from tqdm import tqdm

matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).resolve().parent
REST = 0.05
"""Seconds before each turn: for some milliseconds after the last one its threads still look out for more to do."""
STYLES = {"time": ("#4c72b0", "o"), "memory": ("#dd8452", "s")}
"""Color and marker in the figure."""


class WorkerError(Exception):
    """A worker could not do what it was asked; shown without a traceback."""


class Worker:
    """A process that solves problems; see `benchmark_worker.py` for what can be asked."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._name, self._process, self._errors = name, process, errors

    def ask(self, do: str, problem: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Sends a request and waits for the answer."""
        with suppress(BrokenPipeError):  # nobody listens: then nobody answers, either
            self._process.stdin.write(json.dumps({"do": do, "problem": problem}).encode() + b"\n")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Waits for an answer; the first one is not asked for and tells what the worker runs on."""
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last_words = self._errors.read().decode(errors="replace").strip()
        raise WorkerError(f"{self._name} ended with code {code}; its last words:\n{last_words}")


@contextmanager
def worker(interpreter: str, script: str) -> Iterator[Worker]:
    """A worker, until the end of the block."""
    with tempfile.TemporaryFile() as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        try:
            process = subprocess.Popen([interpreter, HERE / script], bufsize=0, **pipes)
        except OSError as error:
            raise WorkerError(f"cannot run {interpreter}: {error.strerror}") from error
        with process:
            try:
                yield Worker(f"{script}, run by {interpreter},", process, errors)
            finally:
                process.terminate()  # it has nothing to lose


class Side:
    """The workers of one interpreter; they end with `stack`."""

    def __init__(self, interpreter: str, script: str, stack: ExitStack) -> None:
        self._start = lambda: stack.enter_context(worker(interpreter, script))
        self.timer = self._start()
        """Takes turns."""

    @cached_property
    def gauge(self) -> Worker:
        """Measures memory, in copies of itself, and so never computes; started when it is needed."""
        gauge = self._start()
        gauge.answer()
        return gauge


@dataclass(frozen=True)
class Row:
    """A ratio and its values: of time one for each turn, of memory one."""

    title: str
    ratio: Ratio
    values: list[float]

    @property
    def what(self) -> str:
        """What is divided by what."""
        return f"{self.ratio.measure}, {self.ratio.above} / {self.ratio.below}"

    @property
    def median(self) -> str:
        """The middle value, as shown."""
        return f"{statistics.median(self.values):.3g}"

    @property
    def range(self) -> str:
        """The least and the greatest value, as shown."""
        return "" if len(self.values) == 1 else f" ({min(self.values):.3g} to {max(self.values):.3g})"


@dataclass(frozen=True)
class Result:
    """What came of a contest."""

    contest: Contest
    seconds: dict[str, list[float]]
    """Of each contender, turn by turn; over its tokens, where it has any."""
    peak_mib: dict[str, list[float]]
    """One number for each whose memory is compared; none where the system does not tell."""

    def rows(self) -> Iterator[Row]:
        """The ratios that could be measured."""
        for ratio in self.contest.ratios:
            measured = self.seconds if ratio.measure == "time" else self.peak_mib
            above, below = measured[ratio.above], measured[ratio.below]
            if above and below:
                yield Row(self.contest.title, ratio, [a / b for a, b in zip(above, below, strict=True)])


def hold(contest: Contest, sides: Mapping[str, Side], turns: int, done: Callable[[], object]) -> Result:
    """Holds a contest and calls `done` after each of its `steps`."""
    prepare(contest, sides)
    seconds: dict[str, list[float]] = {name: [] for name in contest.contenders}
    for _ in range(contest.turns(turns)):
        for name, contender in contest.contenders.items():
            time.sleep(REST)
            answer = sides[contender.side].timer.ask("turn", contender.problem)
            seconds[name].append(answer["seconds"] / contender.tokens)
            done()
    for side in sides.values():
        side.timer.ask("forget")
    peak_mib: dict[str, list[float]] = {}
    for name in contest.weighed:
        contender = contest.contenders[name]
        peak_mib[name] = sides[contender.side].gauge.ask("memory", contender.problem)["mib"]
        done()
    return Result(contest, seconds, peak_mib)


def steps(contest: Contest, turns: int) -> int:
    """How often `hold` calls `done`."""
    return contest.turns(turns) * len(contest.contenders) + len(contest.weighed)


def prepare(contest: Contest, sides: Mapping[str, Side]) -> None:
    """Lets every contender take a turn that does not count, and sees that the peer makes what we make."""
    shapes: dict[str, list[int]] = {}
    for name, contender in contest.contenders.items():
        shapes[name] = sides[contender.side].timer.ask("prepare", contender.problem)["shape"]
        ours = next(iter(shapes.values()))
        if contender.side == "peer" and shapes[name] != ours:
            raise WorkerError(f"in {contest.title}, {name} made a result of shape {shapes[name]}, we one of {ours}")


def run(
    suites: Mapping[str, list[Contest]], sides: Mapping[str, Side], turns: int, show_aims: bool
) -> dict[str, list[Result]]:
    """Holds all contests, under a progress bar, and prints each result as soon as it is there."""
    results: dict[str, list[Result]] = {}
    total = sum(steps(contest, turns) for held in suites.values() for contest in held)
    with tqdm(total=total, unit="turn", leave=False) as bar:
        for suite, held in suites.items():
            bar.write(f"{SUITES[suite]}\n\n| what | ratio | median (range) | aim |\n|---|---|---|---|")
            results[suite] = []
            for contest in held:
                bar.set_description(contest.title)
                result = hold(contest, sides, turns, bar.update)
                results[suite].append(result)
                bar.write(table(result.rows(), show_aims))
            bar.write("")
    return results


def table(rows: Iterable[Row], show_aims: bool) -> str:
    """Lines of the printed table."""
    lines = (
        f"| {row.title} | {row.what} | {row.median}{row.range} | {row.ratio.aim if show_aims else ''} |" for row in rows
    )
    return "\n".join(lines)


def as_data(results: Mapping[str, list[Result]]) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return {
        suite: [
            {
                "title": result.contest.title,
                "problems": {name: contender.problem for name, contender in result.contest.contenders.items()},
                "seconds": result.seconds,
                "peak_mib": result.peak_mib,
                "ratios": [asdict(row.ratio) | {"values": row.values} for row in result.rows()],
            }
            for result in held
        ]
        for suite, held in results.items()
    }


def draw(results: Mapping[str, list[Result]], path: Path) -> None:
    """One panel for each suite: its ratios as points, their ranges as lines."""
    rows = {suite: [row for result in held for row in result.rows()] for suite, held in results.items()}
    heights = [len(of_suite) + 2 for of_suite in rows.values()]
    size = (12, 0.3 * sum(heights) + 0.5)
    figure, axes = plt.subplots(
        len(rows), 1, figsize=size, height_ratios=heights, sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (suite, of_suite) in zip(axes[:, 0], rows.items(), strict=True):
        draw_rows(axis, of_suite)
        axis.set_title(SUITES[suite], loc="left")
    axes[-1, 0].set_xlabel("ratio: a point and, at the right, a number for the median; a line for the range over turns")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_rows(axis: Axes, rows: list[Row]) -> None:
    """Draws the first row on top."""
    right_of_axis = axis.get_yaxis_transform()
    axis.axvline(1, color="black", linewidth=0.8, zorder=0)
    for height, row in enumerate(rows):
        color, marker = STYLES[row.ratio.measure]
        ends = [min(row.values), max(row.values)]
        axis.plot(ends, [height, height], color=color, linewidth=2, solid_capstyle="butt")
        axis.plot(statistics.median(row.values), height, color=color, marker=marker)
        axis.text(1.01, height, row.median, transform=right_of_axis, verticalalignment="center")
    labels = [f"{row.title}: {row.what}" for row in rows]
    axis.set(xscale="log", yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.4, -0.6))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(labelbottom=True)
    axis.grid(axis="x", which="both", alpha=0.3)


def benchmark(args: argparse.Namespace, sides: Mapping[str, Side]) -> None:
    """Holds the contests that the command line asks for and writes what came of them."""
    about = {name: side.timer.answer() for name, side in sides.items()}
    for name, facts in about.items():
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items() if key != 'backends')}")
    if not args.peer:
        print("Without --peer, what is compared with Hugging Face's MEGA is left out.")
    print()
    suites = {}
    for suite in [args.suite] if args.suite else SUITES:
        possible = (contest.among(sides) for contest in contests(suite, args.quick, about["ours"]["backends"]))
        suites[suite] = [contest for contest in possible if contest.ratios]
    turns = args.turns or (3 if args.quick else 9)
    results = run(suites, sides, turns, show_aims=not args.quick)

    args.out.mkdir(parents=True, exist_ok=True)
    data = {"machine": about, "quick": args.quick, "suites": as_data(results)}
    (args.out / "benchmark.json").write_text(json.dumps(data, indent=1))
    draw(results, args.out / "benchmark.png")
    print(f"written: {args.out / 'benchmark.json'}, {args.out / 'benchmark.png'}")


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, runs what it asks for, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="one suite alone")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has transformers 4.40.2")
    parser.add_argument("--quick", action="store_true", help="small sizes and few turns")
    parser.add_argument("--turns", type=int, help="counted turns of each contender, where they are not slow")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="directory for JSON and PNG")
    args = parser.parse_args(arguments)
    if args.turns is not None and args.turns < 1:
        parser.error(f"argument --turns: must be at least 1, but is {args.turns}")
    try:
        with ExitStack() as stack:
            sides = {"ours": Side(sys.executable, "benchmark_ours.py", stack)}
            if args.peer:
                sides["peer"] = Side(args.peer, "benchmark_peer.py", stack)
            benchmark(args, sides)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
