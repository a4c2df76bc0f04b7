"""Whether a call is inside a transform of torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from megablocks._checks import transforming

# Of `torch.autograd.grad(..., is_grads_batched=True)`; private, as there is no other way to ask.
_batched = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda part: False)


def plain_only(*inputs: Tensor) -> bool:
    """Whether only operations of torch will do: under `torch.func`, batched gradients, or forward-mode derivatives."""
    if torch.compiler.is_compiling():
        return False
    if any(map(_batched, inputs)):
        return True
    forwards = any(forward_ad.unpack_dual(part).tangent is not None for part in inputs)  # type: ignore[no-untyped-call]
    return forwards or transforming()
