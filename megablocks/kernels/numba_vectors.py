"""Vectors for the compiled kernels: as many numbers, side by side in memory, as fit into one register.

Numba makes vector instructions of innermost loops by itself, but of half the width that newer processors have, and
each turn of such a loop reads from memory what it computes with. Here a vector is a value like a number. It is loaded,
computed with and stored by name, and stays in its register as long as there are enough of them:

    h = load(states, at)
    for i in range(count):
        h = h - forget * h + load(x, i * TILE)
    store(states, at, h)

*Rows* are a tuple of vectors that stand one after another in memory; operations on rows are unrolled. *Powers* are the
rows q^0, q^1, ..., of which the first are ones and never read. Arrays have one axis and are contiguous; `at` counts
numbers, and nothing checks whether they are there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, models, overload, register_model


def _registers_of_512_bits() -> bool:
    try:
        return bool(llvm.get_host_cpu_features().get("avx512f", False))
    except RuntimeError:  # LLVM cannot tell
        return False


TILE = 16 if _registers_of_512_bits() else 8
"""Numbers in a vector, and channels that are worked on together: a register of float32, two of float64."""

_FUSED = ("contract",)
"""A product and a sum may become one instruction, which rounds once; nothing else may change."""

# Of any type: what they make is called with other arguments than those that stand in the definitions below.
_operation: Any = intrinsic
_with_constants: Any = intrinsic(prefer_literal=True)


class Vector(types.Type):
    """`TILE` numbers of a type."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        number = manager.lookup(kind.dtype).get_data_type()
        super().__init__(manager, kind, ir.VectorType(number, TILE))


@_operation
def load(typing: Any, array: Any, at: Any) -> Any:
    """Returns the vector that begins at `array[at]`."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return _Memory(context, builder, signature, given).load(0)

    return _vector_of(array)(array, at), build


@_operation
def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    """Writes a vector to where `array[at]` begins."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> None:
        _Memory(context, builder, signature, given).store(0, given[2])

    return types.void(array, at, vector), build


@_with_constants
def load_rows(typing: Any, array: Any, at: Any, count: Any) -> Any:
    """Returns `count` rows, a constant, from `array[at]` on."""
    rows = types.UniTuple(_vector_of(array), count.literal_value)

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        memory = _Memory(context, builder, signature, given)
        return context.make_tuple(builder, rows, [memory.load(row) for row in range(rows.count)])

    return rows(array, at, count), build


@_operation
def store_rows(typing: Any, array: Any, at: Any, rows: Any) -> Any:
    """Writes rows from `array[at]` on."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> None:
        memory = _Memory(context, builder, signature, given)
        for row, vector in enumerate(cgutils.unpack_tuple(builder, given[2])):
            memory.store(row, vector)

    return types.void(array, at, rows), build


@_operation
def filled(typing: Any, array: Any, number: Any) -> Any:
    """Returns a vector of one number, in the type of `array`."""
    vector = _vector_of(array)

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        value = context.cast(builder, given[1], number, vector.dtype)
        made = ir.Constant(ir.VectorType(value.type, TILE), ir.Undefined)
        for lane in range(TILE):
            made = builder.insert_element(made, value, ir.Constant(ir.IntType(32), lane))
        return made

    return vector(array, number), build


@_operation
def zeros(typing: Any, rows: Any) -> Any:
    """Returns as many rows of zeros."""
    return _unrolled(rows, (rows,), lambda _, rows: [ir.Constant(row.type, [0.0] * TILE) for row in rows])


@_operation
def flipped(typing: Any, rows: Any) -> Any:
    """Returns the rows in reverse."""
    return _unrolled(rows, (rows,), lambda builder, rows: rows[::-1])


@_with_constants
def add_powers(typing: Any, rows: Any, powers: Any, vector: Any, first: Any) -> Any:
    """Returns `rows[s] + q^(first + s) * vector`."""

    def compute(builder: Any, rows: Any, powers: Any, vector: Any, _: Any) -> list[Any]:
        return [
            _add_product(builder, row, None if power == 0 else powers[power], vector)
            for power, row in enumerate(rows, first.literal_value)
        ]

    return _unrolled(rows, (rows, powers, vector, first), compute)


@_with_constants
def power_sum(typing: Any, powers: Any, rows: Any, first: Any) -> Any:
    """Returns the sum of `q^(first + s) * rows[s]`."""

    def compute(builder: Any, powers: Any, rows: Any, _: Any) -> Any:
        return _power_totals(builder, powers, rows, first.literal_value)[-1]

    return _unrolled(rows.dtype, (powers, rows, first), compute)


@_with_constants
def power_sum_and_slope(typing: Any, powers: Any, rows: Any, first: Any) -> Any:
    """Returns that sum and its derivative by log q, the sum of `(first + s) * q^(first + s) * rows[s]`."""

    def compute(builder: Any, powers: Any, rows: Any, _: Any) -> list[Any]:
        totals = _power_totals(builder, powers, rows, first.literal_value)
        slope = ir.Constant(totals[0].type, [0.0] * TILE)
        for part in [*totals[:-1], *totals[-1:] * first.literal_value]:  # the last row is in all, the first in one
            slope = builder.fadd(slope, part, flags=_FUSED)
        return [totals[-1], slope]

    return _unrolled(types.UniTuple(rows.dtype, 2), (powers, rows, first), compute)


@_with_constants
def convolve(typing: Any, y: Any, k: Any, x: Any, ahead: Any) -> Any:
    """Returns `y[s] + sum_r k[ahead + s - r] * x[r]`, over the rows that `k` has."""
    return _products_added("sjr", y, k, x, ahead)


@_with_constants
def convolve_back(typing: Any, dx: Any, k: Any, dy: Any, ahead: Any) -> Any:
    """Returns `dx[r] + sum_s k[ahead + s - r] * dy[s]`: the gradient of `x`."""
    return _products_added("rjs", dx, k, dy, ahead)


@_with_constants
def correlate(typing: Any, dk: Any, dy: Any, x: Any, ahead: Any) -> Any:
    """Returns `dk[ahead + s - r]` plus every `dy[s] * x[r]` that belongs there: the gradient of `k`."""
    return _products_added("jsr", dk, dy, x, ahead)


def _vector_of(array: Any) -> Vector:
    """The type of vectors in an array."""
    if not isinstance(array, types.Array) or array.ndim != 1 or array.layout != "C":
        raise TypingError(f"vectors are read from contiguous arrays of one axis, not from {array}")
    return Vector(array.dtype)


class _Memory:
    """Where a load or a store begins, given an array and a place first."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any) -> None:
        array, at = signature.args[:2]
        data = context.make_array(array)(context, builder, given[0]).data
        self._builder = builder
        self._start = builder.gep(data, [context.cast(builder, given[1], at, types.intp)])
        self._kind = context.get_value_type(Vector(array.dtype))
        self._align = context.get_abi_sizeof(self._kind) // TILE

    def load(self, row: int) -> Any:
        return self._builder.load(self._place(row), align=self._align)

    def store(self, row: int, vector: Any) -> None:
        self._builder.store(vector, self._place(row), align=self._align)

    def _place(self, row: int) -> Any:
        start = self._builder.bitcast(self._start, self._kind.as_pointer())
        return self._builder.gep(start, [ir.Constant(ir.IntType(64), row)])


def _unrolled(result: Any, arguments: tuple[Any, ...], compute: Callable[..., Any]) -> Any:
    """What an intrinsic returns whose code `compute(builder, ...)` makes, with lists for rows."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        parts = [
            cgutils.unpack_tuple(builder, part) if isinstance(kind, types.BaseTuple) else part
            for kind, part in zip(signature.args, given, strict=True)
        ]
        made = compute(builder, *parts)
        return context.make_tuple(builder, result, made) if isinstance(result, types.BaseTuple) else made

    return result(*arguments), build


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Total plus the product; `left` may be `None` for one."""
    product = right if left is None else builder.fmul(left, right, flags=_FUSED)
    return builder.fadd(total, product, flags=_FUSED)


def _power_totals(builder: Any, powers: Any, rows: Any, first: int) -> list[Any]:
    """The sums of `q^(first + s) * rows[s]` over the last row, the last two, and so on."""
    last = len(rows) - 1
    totals = [rows[0] if first + last == 0 else builder.fmul(powers[first + last], rows[last], flags=_FUSED)]
    for s in range(last - 1, -1, -1):
        power = first + s
        totals.append(_add_product(builder, totals[-1], None if power == 0 else powers[power], rows[s]))
    return totals


def _products_added(indices: str, total: Any, left: Any, right: Any, ahead: Any) -> Any:
    """Adds up products wherever `j = ahead + s - r`; `indices` says which of the three counts the rows of each."""

    def compute(builder: Any, total: Any, left: Any, right: Any, _: Any) -> list[Any]:
        made = list(total)
        count = {index: len(rows) for index, rows in zip(indices, (total, left, right), strict=True)}
        for s, r in product(range(count["s"]), range(count["r"])):
            at = {"s": s, "r": r, "j": ahead.literal_value + s - r}
            if 0 <= at["j"] < count["j"]:
                place, of_left, of_right = (at[index] for index in indices)
                made[place] = _add_product(builder, made[place], left[of_left], right[of_right])
        return made

    return _unrolled(total, (total, left, right, ahead), compute)


def _define(symbol: Callable[..., Any], instruction: str) -> None:
    """Gives vectors an operator."""

    @_operation
    def compute(typing: Any, left: Any, right: Any) -> Any:
        return left(left, right), lambda _, builder, __, given: getattr(builder, instruction)(*given, flags=_FUSED)

    def of_vectors(left: Any, right: Any) -> Any:
        return compute(left, right)

    @overload(symbol)
    def chosen(left: Any, right: Any) -> Any:
        return of_vectors if isinstance(left, Vector) and left == right else None


_define(operator.add, "fadd")
_define(operator.iadd, "fadd")
_define(operator.sub, "fsub")
_define(operator.mul, "fmul")
