"""What a call is made under."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def plain_only(*inputs: Tensor) -> bool:
    """Whether only plain operations will do: in the transforms of `torch.func`, batches of gradients, and forwards."""
    if torch.compiler.is_compiling():
        return False
    if any(torch._C._functorch.is_legacy_batchedtensor(part) for part in inputs):
        return True
    forwards = any(forward_ad.unpack_dual(part).tangent is not None for part in inputs)  # type: ignore[no-untyped-call]
    return forwards or torch._C._are_functorch_transforms_active()
