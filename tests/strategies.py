"""Strategies: sizes, cuts, padding masks, options, magnitudes and seeds. Tensors come from the seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from megablocks.functional import ema_backend

TOKENWISE_NORMS = ("layernorm", "scalenorm", "rmsnorm", None)
"""Norms that look at one token at a time."""

Mask = tuple[str, ...] | None
"""A padding mask that can be read: one string for each row, `#` at padding and `.` at real tokens."""


class Sample(NamedTuple):
    """What a block is called with."""

    x: Tensor
    padding_mask: Tensor | None = None
    memory: Tensor | None = None
    memory_padding_mask: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """One way to build a block and to call it; a block reads the fields that concern it."""

    seed: int = 0
    batch: int = 2
    length: int = 7
    memory_length: int = 5
    embed_dim: int = 4
    qk_dim: int = 4
    value_dim: int | None = 6
    ffn_dim: int = 5
    ema_dim: int = 2
    causal: bool = True
    causal_ema: bool = True
    """With `causal=False`: whether the average looks back only all the same."""
    chunk_size: int | None = None
    truncation: int | None = None
    capacity: int | None = None
    attention: str = "softmax"
    activation: str = "silu"
    bias: str | None = "rotary"
    spare_positions: int = 0
    """Entries that a simple bias has beyond those it needs."""
    norm: str | None = "layernorm"
    prenorm: bool = True
    magnitude: float = 1.0
    padding: Mask = None
    memory_padding: Mask = None
    num_layers: int = 2
    """Layers of a stack."""
    feed_forward: bool = True
    """Whether the layers of a stack have a feed-forward layer."""
    tied: bool = True
    """Whether a model's tables are one; if not, the embedding's has a width of its own."""
    input_dim: int = 3
    """That width, or the number of continuous inputs at a position."""
    embedding_norm: bool = False
    """Whether the embedding ends in the norm of the layers."""
    pooling: str = "mean"
    """How a classifier pools."""
    training: bool = False
    """Training mode, without dropout; batch statistics have a law of their own."""
    backend: str = "auto"
    """What computes the average."""
    cuts: tuple[int, ...] = (3, 1, 3)
    """Lengths of the segments of a stream, `length` together."""
    at: int = 3
    """A position: where a disturbance begins."""

    @property
    def max_positions(self) -> int:
        """The size of a simple bias that just serves this case, and what is to spare."""
        return (self.chunk_size or max(self.length, self.capacity or 0)) + self.spare_positions

    @property
    def max_cross_positions(self) -> int:
        """The same for cross-attention."""
        return max(self.length, self.memory_length) + self.spare_positions

    def but(self, **changes: Any) -> Case:
        """This case with other values in some fields."""
        return replace(self, **changes)

    def sample(self, dtype: torch.dtype = torch.float64, *, width: int | None = None) -> Sample:
        """The inputs of this case."""
        width = self.embed_dim if width is None else width
        source = torch.Generator().manual_seed(self.seed)

        def draw(length: int) -> Tensor:
            drawn = torch.randn(self.batch, length, width, generator=source, dtype=torch.float64)
            return (drawn * self.magnitude).to(dtype)

        return Sample(draw(self.length), mask(self.padding), draw(self.memory_length), mask(self.memory_padding))


COVERING = (
    Case(seed=0, chunk_size=3, padding=("..#....", "#....#."), memory_padding=("..#..", "....#")),
    Case(seed=4, attention="laplace", bias="simple", truncation=4, norm="scalenorm", prenorm=False, cuts=(1, 4, 2)),
    Case(
        seed=8, attention="relu2", bias=None, chunk_size=4, truncation=3, norm="rmsnorm", padding=("....###", ".#.#...")
    ),
    Case(
        seed=12, attention="laplace", chunk_size=2, norm="rmsnorm", prenorm=False, feed_forward=False, pooling="first"
    ),
    Case(seed=16, attention="relu2", norm=None, capacity=8, padding=("#######", ".......")),
    Case(seed=20, bias="simple", chunk_size=5, truncation=9, norm="scalenorm", tied=False, embedding_norm=True, at=6),
)
"""Cases that no law goes without: every option, with something before `at` and behind a chunk."""


def mask(rows: Mask) -> Tensor | None:
    """The tensor that the strings stand for, (B, L), True at `#`."""
    return None if rows is None else torch.tensor([[slot == "#" for slot in row] for row in rows])


def seeds() -> st.SearchStrategy[int]:
    """Any seed."""
    return st.integers(0, 2**32 - 1)


def magnitudes() -> st.SearchStrategy[float]:
    """How large the inputs are."""
    return st.sampled_from([1.0, 1e-3, 30.0, 1e3])


def lengths(least: int = 1) -> st.SearchStrategy[int]:
    """Lengths from the least on, some beyond the blocks that averages are computed in."""
    return st.one_of(st.integers(least, 20), st.sampled_from([63, 64, 65, 130]))


def segment_lengths(length: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Every way to cut a sequence into segments; whole and token by token first."""
    whole, single = st.just((length,)), st.just((1,) * length)
    if length == 1:
        return whole
    borders = st.sets(st.integers(1, length - 1), max_size=min(length - 1, 20)).map(sorted)
    anywhere = borders.map(lambda cut: tuple(b - a for a, b in zip([0, *cut], [*cut, length], strict=True)))
    return st.one_of(anywhere, whole, single) if length <= 20 else st.one_of(anywhere, whole)


@st.composite
def padded_rows(draw: st.DrawFn, length: int) -> str:
    """A row without padding, or with padding left, right, in the middle, scattered, or everywhere."""
    kind = draw(st.sampled_from(["none", "left", "right", "middle", "scattered", "everywhere"]))
    if kind == "none":
        return "." * length
    if kind == "everywhere":
        return "#" * length
    if kind == "scattered":
        bits = draw(st.integers(0, 2**length - 1))
        return "".join("#" if bits >> slot & 1 else "." for slot in range(length))
    count = draw(st.integers(1, length))
    start = draw(st.integers(0, length - count)) if kind == "middle" else 0 if kind == "left" else length - count
    return "." * start + "#" * count + "." * (length - count - start)


@st.composite
def padding_masks(draw: st.DrawFn, batch: int, length: int, *, always: bool = False) -> Mask:
    """Any padding of a batch, or none at all unless `always`."""
    if not always and draw(st.booleans()):
        return None
    return tuple(draw(padded_rows(length)) for _ in range(batch))


def optional_sizes(length: int) -> st.SearchStrategy[int | None]:
    """`None`, or a size from 1 to a little beyond the length."""
    return st.one_of(st.none(), st.integers(1, length + 2))


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Every combination of sizes and options; `fixed` fields are as given.

    With `padded`, there is padding or there is none; with `past`, something stands before `at`; with `split`, there is
    more than one chunk.
    """
    padded, past, split = (fixed.pop(name, None) for name in ("padded", "past", "split"))

    def take(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy, label=name)

    batch, length = take("batch", st.integers(1, 3)), take("length", lengths(2 if past or split else 1))
    memory_length = take("memory_length", st.integers(1, 9))
    causal = take("causal", st.booleans())
    bias = take("bias", st.sampled_from(["rotary", "simple", None]))
    chunk_size = take("chunk_size", st.integers(1, length - 1) if split else optional_sizes(length))
    norm = take("norm", st.sampled_from(TOKENWISE_NORMS if causal else (*TOKENWISE_NORMS, "batchnorm")))
    no_padding = st.none()
    return Case(
        seed=take("seed", seeds()),
        batch=batch,
        length=length,
        memory_length=memory_length,
        embed_dim=take("embed_dim", st.integers(1, 6)),
        qk_dim=take("qk_dim", st.integers(1, 3).map(lambda half: 2 * half) if bias == "rotary" else st.integers(1, 5)),
        value_dim=take("value_dim", st.one_of(st.none(), st.integers(1, 7))),
        ffn_dim=take("ffn_dim", st.integers(1, 7)),
        ema_dim=take("ema_dim", st.integers(1, 4)),
        causal=causal,
        causal_ema=take("causal_ema", st.booleans()),
        chunk_size=chunk_size,
        truncation=take("truncation", optional_sizes(length)),
        capacity=take("capacity", st.one_of(st.none(), st.integers(length, length + 3))),
        attention=take("attention", st.sampled_from(["softmax", "laplace", "relu2"])),
        activation=take("activation", st.sampled_from(["silu", "relu", "gelu", "gelu_tanh", "tanh", "linear"])),
        bias=bias,
        spare_positions=take("spare_positions", st.integers(0, 2)),
        norm=norm,
        prenorm=take("prenorm", st.booleans()),
        magnitude=take("magnitude", magnitudes()),
        padding=take("padding", no_padding if padded is False else padding_masks(batch, length, always=bool(padded))),
        memory_padding=take(
            "memory_padding",
            no_padding if padded is False else padding_masks(batch, memory_length, always=bool(padded)),
        ),
        feed_forward=take("feed_forward", st.booleans()),
        tied=take("tied", st.booleans()),
        input_dim=take("input_dim", st.integers(1, 4)),
        embedding_norm=take("embedding_norm", st.booleans()),
        pooling=take("pooling", st.sampled_from(["mean", "first"])),
        training=take("training", st.just(False) if norm == "batchnorm" else st.booleans()),
        backend=take("backend", st.sampled_from(["auto", *ema_backend().available])),
        cuts=take("cuts", segment_lengths(length)),
        at=take("at", st.integers(1 if past else 0, length - 1)),
    )
