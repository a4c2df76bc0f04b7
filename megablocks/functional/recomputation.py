"""Results that the backward pass computes again instead of keeping them.

Half of what a layer keeps for its backward pass are results of cheap functions of something that is kept anyway: the
activation of a projection, which the next product needs, beside the projection, which the activation's own derivative
needs. Keeping the one and computing the other again takes a third off a training step's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megablocks.functional.activation import gelu_tanh, rescaled, silu_gate
from megablocks.functional.transforms import plain_only

CHEAP = (F.silu, F.gelu, gelu_tanh, silu_gate, rescaled)
"""Deterministic functions whose derivatives need their inputs, not their results."""


class _Recipe(NamedTuple):
    """How a result was made."""

    result: weakref.ref[Tensor]
    version: int
    function: Callable[..., Tensor]
    inputs: tuple[_Kept | _Again, ...]


class _Kept(NamedTuple):
    """A tensor as it was when it was kept; with hooks torch leaves it to them to notice that it was written into."""

    tensor: Tensor
    version: int

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
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
        with torch.no_grad():
            made = self.recipe.function(*(part.unchanged() for part in self.recipe.inputs))
        return made.as_strided(self.size, self.stride, self.offset)


class Recomputation:
    """A context in which the backward pass keeps recipes of cheap results.

        with Recomputation(x) as again:
            hidden = again(F.silu, fc1(x))      # F.silu(fc1(x)), of which nothing is kept but fc1(x)
            y = fc2(hidden)

    Functions other than those of `CHEAP`, graphs of compilers, the transforms of `torch.func`, and whoever has said
    already what is to be kept (`torch.utils.checkpoint`, `torch.autograd.graph.save_on_cpu`) are left alone.

    Args:
        inputs: Of what is computed inside.
    """

    def __init__(self, *inputs: Tensor) -> None:
        self._recipes: dict[int, _Recipe] = {}
        self._hooks = saved_tensors_hooks(self._keep, _unkept) if _free_to_choose(*inputs) else None

    def __enter__(self) -> Recomputation:
        if self._hooks is not None:
            self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(kind, error, trace)
            self._recipes.clear()

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns `function(*inputs)`."""
        result = function(*inputs)
        cheap = self._hooks is not None and any(function is known for known in CHEAP)
        if cheap and type(result) is Tensor and result.storage_offset() == 0:
            kept = tuple(self._keep(part) for part in inputs)
            self._recipes[_address(result)] = _Recipe(weakref.ref(result), result._version, function, kept)
        return result

    def _keep(self, tensor: Tensor) -> _Kept | _Again:
        recipe = self._recipes.get(_address(tensor)) if type(tensor) in (Tensor, torch.nn.Parameter) else None
        # Memory that was given back may hold something else by now.
        if recipe is not None and recipe.result() is not None and tensor._version == recipe.version:
            return _Again(recipe, tensor.size(), tensor.stride(), tensor.storage_offset())
        # Detached: what an operation keeps of its own result would hold its graph, which holds what is kept.
        return _Kept(tensor.detach(), tensor._version)


def _unkept(kept: _Kept | _Again) -> Tensor:
    return kept.unchanged()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _free_to_choose(*inputs: Tensor) -> bool:
    """Whether a graph is recorded, by torch itself, and nobody else has said what it keeps."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or plain_only(*inputs):
        return False
    probe = torch.ones((), requires_grad=True)
    try:  # which works once only
        probe.square().grad_fn._raw_saved_self.register_hooks(_same, _same)  # type: ignore[union-attr]
    except RuntimeError:
        return False
    return True


def _same(tensor: Tensor) -> Tensor:
    return tensor
