"""Results that the backward pass computes again instead of keeping them.

Half of what a layer keeps for its backward pass are results of cheap functions of something that is kept anyway: the
activation of a projection, which the next product needs, beside the projection, which the activation's own derivative
needs; what a norm gives, which the next layer needs, beside what it got. Keeping the one and computing the other again
takes two fifths off a training step's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from megablocks.functional.activation import gelu_tanh, rescaled, silu_gate
from megablocks.functional.transforms import plain_only

CHEAP = (F.silu, F.gelu, gelu_tanh, silu_gate, rescaled)
"""Deterministic functions whose derivatives need their inputs, not their results."""


@dataclass
class _Recipe:
    """How a result was made."""

    result: weakref.ref[Tensor]
    version: int
    function: Callable[..., Tensor]
    inputs: tuple[_Kept | _Again, ...]
    waiting: int = 0
    """How many are to need the result again; from the first to the last of them it is held."""
    held: Tensor | None = None

    def make(self) -> Tensor:
        made = self.held
        if made is None:
            with torch.no_grad():
                made = self.function(*(part.unchanged() for part in self.inputs))
        self.waiting -= 1
        self.held = made if self.waiting > 0 else None
        return made


class _Kept(NamedTuple):
    """A tensor as it was when it was kept; with hooks torch leaves it to them to notice that it was written into."""

    tensor: Tensor
    version: int

    def unchanged(self) -> Tensor:
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "A tensor that the backward pass needs was modified by an in-place operation after the forward pass: "
                f"a {self.tensor.dtype} of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}, but "
                f"version {self.version} was used. Call backward before writing into it, or write into a copy."
            )
        return self.tensor


class _Again(NamedTuple):
    """A view of a result that is to be made again."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def unchanged(self) -> Tensor:
        return self.recipe.make().as_strided(self.size, self.stride, self.offset)


class Recomputation:
    """A context in which the backward pass keeps recipes of cheap results.

        with Recomputation(x) as again:
            hidden = again(F.silu, fc1(x))      # F.silu(fc1(x)), of which nothing is kept but fc1(x)
            y = fc2(hidden)

    Norms of ours inside take part by themselves (see `recomputed`), and what they give brings its recipe along to the
    next context, as an input. Functions other than those of `CHEAP`, graphs of compilers, the transforms of
    `torch.func`, and whoever has said already what is to be kept (`torch.utils.checkpoint`,
    `torch.autograd.graph.save_on_cpu`) are left alone.

    Args:
        inputs: Of what is computed inside.
    """

    def __init__(self, *inputs: Tensor) -> None:
        self._recipes: dict[int, _Recipe] = {}
        self._hooks = saved_tensors_hooks(self._keep, _unkept) if _free_to_choose(*inputs) else None
        if self._hooks is not None:
            for part in inputs:
                if (recipe := _brought.get(part)) is not None:  # type: ignore[no-untyped-call]
                    self._recipes[_address(part)] = recipe

    def __enter__(self) -> Recomputation:
        if self._hooks is not None:
            self._hooks.__enter__()
            self._outside = _around.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks is not None:
            _around.reset(self._outside)
            self._hooks.__exit__(kind, error, trace)
            self._recipes.clear()

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns `function(*inputs)`."""
        result = function(*inputs)
        if self._hooks is not None and any(function is known for known in CHEAP):
            self._remember(result, function, inputs)
        return result

    def _remember(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> _Recipe | None:
        recipe = _recipe(result, function, tuple(map(self._keep, inputs)))
        if recipe is not None:
            self._recipes[_address(result)] = recipe
        return recipe

    def _keep(self, tensor: Tensor) -> _Kept | _Again:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        recipe = self._recipes.get(_address(tensor)) if plain else None
        result = None if recipe is None else recipe.result()
        # Memory that was given back may hold something else by now, and a view may read it as another type.
        if recipe is None or result is None or tensor.dtype != result.dtype or tensor._version != recipe.version:
            return _keep(tensor)
        recipe.waiting += 1
        return _Again(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())


_around: ContextVar[Recomputation | None] = ContextVar("around", default=None)
_brought: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Recipes of results that may be inputs of a context, as long as those live."""


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Returns `function(*inputs)`; a `Recomputation` that it is made in or goes into need not keep it.

    The function must be deterministic and its derivative need its inputs, not its result. Where types differ nothing is
    remembered: under autocast, which is over when the backward pass begins, it may have been another function.
    """
    result = function(*inputs)
    if not _same_outside(result, inputs):
        return result
    recipe = None
    if (around := _around.get()) is not None:
        recipe = around._remember(result, function, inputs)
    elif _free_to_choose(*inputs):
        recipe = _recipe(result, function, tuple(map(_keep, inputs)))
    if recipe is not None:
        _brought[result] = recipe
    return result


def recomputed_inside(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The same for results that serve the `Recomputation` that they are made in, and no other."""
    result = function(*inputs)
    if _same_outside(result, inputs) and (around := _around.get()) is not None:
        around._remember(result, function, inputs)
    return result


@contextmanager
def remembering_nothing() -> Iterator[None]:
    """A context without recipes, inside one with: for whoever keeps nothing anyway, as checkpoints do."""
    outside = _around.set(None)
    try:
        yield
    finally:
        _around.reset(outside)


def _same_outside(result: Tensor, inputs: tuple[Tensor, ...]) -> bool:
    """Whether there is a backward pass that may call the function again and get the same."""
    if torch.compiler.is_compiling() or not result.requires_grad or plain_only(*inputs):
        return False
    return all(part.dtype == result.dtype for part in inputs)


def _recipe(result: Tensor, function: Callable[..., Tensor], inputs: tuple[_Kept | _Again, ...]) -> _Recipe | None:
    """How the result was made; `None` if it is no tensor of its own, or has no memory (on the meta device, empty)."""
    if type(result) is not Tensor or result.storage_offset() or not _address(result):
        return None
    return _Recipe(weakref.ref(result), result._version, function, inputs)


def _keep(tensor: Tensor) -> _Kept:
    # Detached: what an operation keeps of its own result would hold its graph, which holds what is kept.
    return _Kept(tensor.detach(), _version(tensor))


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; nobody counts that for those of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _unkept(kept: _Kept | _Again) -> Tensor:
    return kept.unchanged()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _free_to_choose(*inputs: Tensor) -> bool:
    """Whether a graph is recorded, by torch itself, and nobody else has said what it keeps."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or plain_only(*inputs):
        return False
    if not getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", bool)():
        return False
    probe = torch.ones((), requires_grad=True).square()
    # What is saved does not keep alive the node that it belongs to; the probe does.
    saved = getattr(probe.grad_fn, "_raw_saved_self", None)
    if saved is None:  # a torch that calls it otherwise: nothing is computed again then
        return False
    try:  # which works once only
        saved.register_hooks(_same, _same)
    except RuntimeError:
        return False
    return True


def _same(tensor: Tensor) -> Tensor:
    return tensor
