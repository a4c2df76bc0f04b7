"""Where float32 is the least that will do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 for half precisions, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which autocast does not lower the precision of matrix products on the device of `x`."""
    device = x.device.type
    if device == "meta" or not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
