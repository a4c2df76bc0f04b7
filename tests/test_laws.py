"""Every block under every law that applies to it, over every option."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings

import laws
from law_layers import Block
from laws import BLOCKS
from megablocks.functional import ema_backend
from strategies import COVERING, TOKENWISE_NORMS, Case, cases


def under(applies: Callable[[Block], bool] = lambda block: True) -> pytest.MarkDecorator:
    """The blocks that a law is for."""
    return pytest.mark.parametrize("block", [block for block in BLOCKS if applies(block)], ids=repr)


def hold(law: Callable[..., None], block: Block, case: Case, *extra: object) -> None:
    """Holds a block to a law, its averages computed by the case's backend.

    A block of several layers takes several times as long, so of the drawn cases it looks at a quarter, besides all of
    `COVERING`: those whose seed divides by 4. The choice is the case's own, so a failing case still fails when it is
    tried again.
    """
    if block.depth == 1 or case.seed % 4 == 0:
        with ema_backend(case.backend):
            law(block, block.of(case), *extra)


def covering(applies: Callable[[Case], bool] = lambda case: True, **fixed: object) -> Callable[..., Any]:
    """Adds the cases that no law goes without to those that are drawn."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for case in filter(applies, COVERING):
            test = example(case=case.but(**fixed))(test)
        return test

    return decorate


@under(lambda block: block.sequence and block.causal and not block.pooled)
@given(case=cases(causal=True, past=True))
# Without a norm two layers may square 1e4 out of the range of float32, and infinity times a weight of zero is NaN.
@covering(lambda case: case.norm is not None)
def test_causal(block, case):
    hold(laws.causal, block, case)


@under(lambda block: block.start is not None)
@given(case=cases(causal=True))
@covering()
@example(case=Case(chunk_size=4, padding=("#..#...", ".......")))
@example(case=Case(length=6, cuts=(2, 4), capacity=6, padding=("..####", "##....")))
def test_any_cut(block, case):
    hold(laws.any_cut, block, case)


@under(lambda block: block.chunked)
@given(case=cases(bias="rotary", qk_dim=4) | cases(bias=None))
@covering(lambda case: case.bias != "simple")
def test_chunks_that_hold_everything(block, case):
    hold(laws.chunks_that_hold_everything, block, case)


@under(lambda block: block.chunked and not block.pooled)
@given(case=cases(norm=None, split=True) | cases(norm="layernorm", split=True))
@covering(lambda case: case.chunk_size is not None, norm="layernorm")
@covering(lambda case: case.chunk_size is not None, norm=None, causal=False)
def test_chunk_borders(block, case):
    hold(laws.chunk_borders, block, case)


@under(lambda block: block.sequence)
@given(case=cases(padded=True))
@covering(lambda case: case.padding is not None)
@covering(lambda case: case.padding is not None, causal=False)
@example(case=Case(padding=("###....", "#######"), memory_padding=("#....", "#####")))
def test_padding_is_deletion(block, case):
    hold(laws.padding_is_deletion, block, case)


@under(lambda block: block.normed)
@given(case=cases(causal=False, padded=True))
@covering(causal=False)
@example(case=Case(causal=False, batch=1, padding=("######.",)))
@example(case=Case(causal=False, padding=("#######", "#######")))
def test_batch_statistics(block, case):
    hold(laws.batch_statistics, block, case)


@under()
@given(case=cases())
@covering()
def test_pure(block, case):
    hold(laws.pure, block, case)


@under(lambda block: block.start is not None)
@given(case=cases(causal=True))
@covering()
def test_states_are_values(block, case):
    hold(laws.states_are_values, block, case)


@under()
@given(case=cases())
@covering()
@covering(causal=False, causal_ema=False)
@example(case=Case(batch=1, length=1, embed_dim=1, qk_dim=2, ema_dim=1, prenorm=False, causal=False, magnitude=1e3))
@example(case=Case(batch=1, length=1, embed_dim=1, qk_dim=2, value_dim=None, prenorm=False, magnitude=1e3))
def test_oracle(block, case):
    hold(laws.oracle, block, case)


@under(lambda block: block.final is not None)
@given(case=cases(causal=True))
@covering()
def test_oracle_state(block, case):
    hold(laws.oracle_state, block, case)


half_precisions = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@half_precisions
@under()
# A norm of a few channels divides by next to nothing now and then; 32 channels leave their roundings as they are.
@given(case=cases(magnitude=1.0, embed_dim=32, qk_dim=16, value_dim=32))
@covering(embed_dim=32, qk_dim=16, value_dim=32)
def test_precision(block, dtype, case):
    hold(laws.precision, block, case, dtype)


@half_precisions
@under(lambda block: block.sequence)
# A norm of a few channels divides by next to nothing now and then; 32 channels leave their roundings as they are.
@given(case=cases(magnitude=1.0, embed_dim=32, qk_dim=16, value_dim=32))
@covering(embed_dim=32, qk_dim=16, value_dim=32)
def test_autocast(block, dtype, case):
    hold(laws.autocast, block, case, dtype)


@under()
@given(case=cases())
@covering()
def test_seeds_reproduce(block, case):
    hold(laws.seeds_reproduce, block, case)


@under()
@given(case=cases())
@covering()
def test_copies(block, case):
    hold(laws.copies, block, case)


@under(lambda block: block.start is not None)
@given(case=cases(causal=True))
@covering()
def test_states_travel(block, case):
    hold(laws.states_travel, block, case)


# Compiling takes seconds, so these are chosen: padding, chunks and keys of fixed shape; biases of both kinds; stacks of
# one layer, as every further one is compiled likewise.
TO_COMPILE = {
    "chunked": Case(num_layers=1, chunk_size=3, padding=("..#....", "......."), memory_padding=("#....", ".....")),
    "bidirectional": Case(
        num_layers=1, causal=False, causal_ema=False, attention="laplace", bias="simple", norm="rmsnorm"
    ),
    "truncated": Case(num_layers=1, truncation=4, capacity=8, attention="relu2", norm="scalenorm", prenorm=False),
}
WHOLE_MODELS = ("language_model", "classifier", "seq2seq")


def compiles(block: Block) -> bool:
    """Whether a block is compiled on its own: all but `nightly` compile stacks within models."""
    return block.depth == 1 or block.name in WHOLE_MODELS or settings.get_current_profile_name() == "nightly"


@pytest.mark.compile
@pytest.mark.parametrize("name", ["chunked", "bidirectional"])
@under(lambda block: block.sequence and compiles(block))
def test_compiled(block, name):
    hold(laws.compiled, block, TO_COMPILE[name])


@pytest.mark.compile
@under(lambda block: not block.sequence)
def test_compiled_without_padding(block):
    hold(laws.compiled, block, Case())


@pytest.mark.compile
@pytest.mark.parametrize("name", ["chunked", "truncated"])
@under(lambda block: block.start is not None and compiles(block))
def test_compiled_stream(block, name):
    hold(laws.compiled_stream, block, TO_COMPILE[name])


def test_every_law_is_tested():
    assert {f"test_{name}" for name in laws.LAWS} <= set(globals())


def test_covering_cases_leave_nothing_out():
    """Stacks and models look at them, and no law is empty in all of them."""
    assert all(case.seed % 4 == 0 and 0 < case.at < case.length and sum(case.cuts) == case.length for case in COVERING)
    values = {name: {getattr(case, name) for case in COVERING} for name in ("attention", "bias", "norm", "prenorm")}
    assert values == {
        "attention": {"softmax", "laplace", "relu2"},
        "bias": {"rotary", "simple", None},
        "norm": set(TOKENWISE_NORMS),
        "prenorm": {True, False},
    }
    for there in (lambda case: case.chunk_size, lambda case: case.truncation, lambda case: case.padding):
        assert {there(case) is None for case in COVERING} == {True, False}
    assert all(case.chunk_size is None or case.chunk_size < case.length for case in COVERING)


def test_strategies_reach_every_option():
    """The strategies draw what they promise."""
    options = {
        "causal": lambda case: case.causal,
        "a causal average in a bidirectional layer": lambda case: not case.causal and case.causal_ema,
        "chunks of one": lambda case: case.chunk_size == 1,
        "one lag": lambda case: case.truncation == 1,
        "fixed keys": lambda case: case.capacity is not None and case.chunk_size is None,
        "padding beyond a block": lambda case: case.length > 64 and case.padding is not None,
        "token by token": lambda case: len(case.cuts) == case.length > 2,
        "a row of padding": lambda case: case.padding is not None and "#" * case.length in case.padding,
        "a memory of padding": lambda case: "#" * case.memory_length in (case.memory_padding or ()),
        **{name: lambda case, name=name: name in vars(case).values() for name in (*TOKENWISE_NORMS[:3], "batchnorm")},
        **{name: lambda case, name=name: case.attention == name for name in ("softmax", "laplace", "relu2")},
        **{f"bias {name}": lambda case, name=name: case.bias == name for name in ("simple", "rotary", None)},
    }
    reached = set()

    @settings(max_examples=300, phases=[Phase.generate], database=None)
    @given(case=cases())
    def draw(case: Case) -> None:
        reached.update(name for name, holds in options.items() if holds(case))

    draw()
    assert reached == set(options)
