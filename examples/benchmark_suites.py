"""What the benchmark compares, as data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

SUITES = {
    "ema": "The moving average alone",
    "train": "A training step in chunks",
    "decode": "Reading and writing",
    "scaling": "Long sequences",
}


@dataclass(frozen=True)
class Contender:
    """One of those that take turns."""

    problem: dict[str, Any]
    """A kind, and the arguments of the function of that name in `benchmark_ours.py` or `benchmark_peer.py`."""
    side: Literal["ours", "peer"] = "ours"
    tokens: int = 1
    """What its times are divided by, where contenders do not do the same work."""


@dataclass(frozen=True)
class Ratio:
    """A row of the results: the time, or peak memory, of one contender over that of another."""

    above: str
    below: str
    aim: str = ""
    """What we want it to be, at full size."""
    measure: Literal["time", "memory"] = "time"


@dataclass(frozen=True)
class Contest:
    """Contenders that take turns, and what is reported of them."""

    title: str
    contenders: dict[str, Contender]
    ratios: list[Ratio]
    most_turns: int | None = None
    """Fewer turns than were asked for, where one takes long."""

    def turns(self, asked: int) -> int:
        """How many turns of each contender count."""
        return asked if self.most_turns is None else min(asked, self.most_turns)

    @property
    def weighed(self) -> list[str]:
        """Contenders whose memory is compared."""
        ratios = [ratio for ratio in self.ratios if ratio.measure == "memory"]
        return list(dict.fromkeys(name for ratio in ratios for name in (ratio.above, ratio.below)))

    def among(self, sides: Collection[str]) -> Contest:
        """The same contest among the contenders of these sides."""
        contenders = {name: contender for name, contender in self.contenders.items() if contender.side in sides}
        ratios = [ratio for ratio in self.ratios if {ratio.above, ratio.below} <= contenders.keys()]
        return replace(self, contenders=contenders, ratios=ratios)


def contests(suite: str, quick: bool, backends: Sequence[str]) -> list[Contest]:
    """What a suite compares, at full or small size; `backends` are those of the average on this machine."""
    if suite == "ema":
        return ema(quick, backends)
    return {"train": train, "decode": decode, "scaling": scaling}[suite](quick)


AVERAGES = {
    "peer": Contender({"way": "training"}, "peer"),
    "peer, kernel kept": Contender({"way": "eval"}, "peer"),
    "FFT": Contender({"way": "FFT"}),
    "copying": Contender({"way": "copy"}),
    "copying into used memory": Contender({"way": "copy again"}),
}
"""What our backends of the moving average are compared with."""
AVERAGE_AIMS = {
    ("forward", "peer", "numba_cpu"): "at least 20",
    ("forward", "peer", "blocked"): "at least 4",
    ("forward", "copying", "numba_cpu"): "at least 0.5",
    ("forward and backward", "peer", "numba_cpu"): "at least 12",
    ("forward and backward", "numba_cpu", "peer"): "at most 0.5",
}


def ema(quick: bool, backends: Sequence[str]) -> list[Contest]:
    """The moving average alone."""
    sizes = {"batch": 4, "length": 4096, "width": 512, "averages": 16}
    if quick:
        sizes = {"batch": 2, "length": 512, "width": 64, "averages": 16}
    ours = [name for name in backends if name not in ("recurrent", "triton_gpu")]  # one is an oracle, one for GPUs

    def contest(title: str, others: list[str], *, backward: bool) -> Contest:
        ways = {name: Contender({"way": name}) for name in ours} | {name: AVERAGES[name] for name in others}
        contenders = {
            name: replace(way, problem={"kind": "ema", **sizes, "backward": backward, **way.problem})
            for name, way in ways.items()
        }
        pairs = list(product(others, ours))
        ratios = [Ratio(other, name, AVERAGE_AIMS.get((title, other, name), "")) for other, name in pairs]
        if backward:
            ratios += [
                Ratio(name, other, AVERAGE_AIMS.get((title, name, other), ""), "memory") for other, name in pairs
            ]
        return Contest(title, contenders, ratios)

    return [
        contest("forward", list(AVERAGES), backward=False),
        contest("forward and backward", ["peer", "FFT"], backward=True),
    ]


def train(quick: bool) -> list[Contest]:
    """A training step of a small stack in chunks."""
    sizes = {"layers": 2, "width": 256, "inner": 512, "qk": 64, "chunk": 128, "batch": 2, "length": 4096}
    if quick:
        sizes = {"layers": 2, "width": 32, "inner": 64, "qk": 16, "chunk": 64, "batch": 2, "length": 512}

    def contest(causal: bool, dropout: float) -> Contest:
        problem = {"kind": "train", **sizes, "causal": causal, "dropout": dropout}
        contenders = {
            "ours": Contender(problem),
            "peer": Contender(problem, "peer"),
            "its matrix products": Contender({"kind": "products", **sizes}),
        }
        ratios = [
            Ratio("peer", "ours", "at least 2" if causal else "at least 3"),
            Ratio("ours", "its matrix products", "at most 1.4"),
            Ratio("ours", "peer", "at most 0.5", "memory"),
        ]
        return Contest(f"{'causal' if causal else 'bidirectional'}, dropout {dropout:g}", contenders, ratios)

    return [contest(causal, dropout) for causal in (False, True) for dropout in (0.0, 0.1)]


def decode(quick: bool) -> list[Contest]:
    """A language model that reads and writes."""
    sizes = {"layers": 4, "width": 256, "inner": 512, "qk": 64}
    prompt, tokens, batches = 64, 256, (1, 8)
    length, chunk, positions, behind = 4096, 512, (1024, 65_536), 64
    if quick:
        sizes = {"layers": 2, "width": 32, "inner": 64, "qk": 16}
        prompt, tokens, batches = 8, 8, (1, 2)
        length, chunk, positions, behind = 256, 64, (128, 512), 8

    def against_peer(title: str, aim: str, problem: dict[str, Any]) -> Contest:
        contenders = {"ours": Contender(problem), "peer": Contender(problem, "peer")}
        return Contest(title, contenders, [Ratio("peer", "ours", aim)])

    def writing(batch: int) -> Contest:
        title = f"{tokens} tokens, batch {batch}"
        problem = {"kind": "decode", **sizes, "batch": batch, "prompt": prompt, "tokens": tokens}
        plain = against_peer(title, "", problem)
        if quick:  # compiling takes a minute
            return plain
        contenders = {**plain.contenders, "ours, compiled": Contender({**problem, "compiled": True})}
        return Contest(title, contenders, [*plain.ratios, Ratio("peer", "ours, compiled", "at least 3")])

    reading = against_peer(
        f"prompt of {length:,} tokens, chunk {chunk}",
        "at least 1.8",
        {"kind": "read_prompt", **sizes, "chunk": chunk, "batch": 1, "length": length},
    )
    near, far = (f"at {position:,}" for position in positions)
    problem = {"kind": "decode_from", **sizes, "chunk": chunk, "tokens": behind}
    places = {name: Contender({**problem, "position": at}) for name, at in zip((near, far), positions, strict=True)}
    going_on = Contest(f"{behind} tokens, chunk {chunk}", places, [Ratio(far, near, "at most 1.1")])
    return [*map(writing, batches), reading, going_on]


def scaling(quick: bool) -> list[Contest]:
    """Long sequences."""
    lengths = (256, 512, 1024) if quick else (4096, 16_384, 65_536, 131_072)
    return [
        longer_averages(lengths, width=64 if quick else 512),
        against_transformer(lengths[0], "at least 3.5", unfused=True, most_turns=3),
        against_transformer(lengths[1], "at least 10", unfused=False, most_turns=2),
    ]


def longer_averages(lengths: Sequence[int], width: int) -> Contest:
    """Time per token of the moving average, forward and backward."""
    problem = {"kind": "ema", "way": "auto", "batch": 1, "width": width, "averages": 16, "backward": True}
    averages = {f"at {length:,}": Contender({**problem, "length": length}, tokens=length) for length in lengths}
    first, *others = averages
    ratios = [Ratio(name, first, "at most 1.2") for name in others]
    return Contest("average, per token", averages, ratios, most_turns=5)


def against_transformer(length: int, aim: str, *, unfused: bool, most_turns: int) -> Contest:
    """A training step of the paper's text classifier, in chunks, and of a Transformer of the same widths and depth."""
    contenders = {
        "ours": Contender({"kind": "text_encoder", "length": length, "chunk": 128}),
        "Transformer": Contender({"kind": "transformer", "length": length, "fused": True}),
    }
    ratios = [Ratio("Transformer", "ours", aim), Ratio("ours", "Transformer", "at most 1.5", "memory")]
    if unfused:
        contenders["unfused one"] = Contender({"kind": "transformer", "length": length, "fused": False})
        ratios += [Ratio("unfused one", "ours"), Ratio("ours", "unfused one", "at most 0.13", "memory")]
    return Contest(f"training step at {length:,}", contenders, ratios, most_turns)
