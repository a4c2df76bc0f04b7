"""What a caller's attention mask says: where padding is."""

from __future__ import annotations

import torch
from torch import Tensor

from megablocks._checks import check_tensor, values_readable


def padding_of(name: str, mask: Tensor | None, batch: int, length: int, slots: int) -> Tensor | None:
    """Returns the padding mask of this call's tokens, bool, `True` at padding; `None` where nothing is padding.

    Args:
        name: What the mask is called, for errors.
        mask: $(B, L)$, or $(B, S + L)$ with the slots of the past in front; bool, integer or float, 1 at real tokens.
        batch: $B$.
        length: $L$, tokens of this call.
        slots: $S$, slots that a cache has read before.

    Raises:
        ValueError: If the mask has another shape, or is one to be added to scores.
        TypeError: If it is not a tensor.
    """
    if mask is None:
        return None
    check_tensor(name, mask)
    shapes = {(batch, length), (batch, slots + length)}
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in sorted(shapes))
        raise ValueError(
            f"`{name}` must have shape (batch, length) = {allowed}, but has shape {tuple(mask.shape)}; what a token may "
            "see besides is up to the model."
        )
    mask = mask[:, -length:]
    padding_mask = ~mask if mask.dtype == torch.bool else mask == 0
    if values_readable(mask):
        if mask.dtype.is_floating_point and bool((mask < 0).any()):
            raise ValueError(
                f"`{name}` must be 1 at real tokens and 0 at padding, but holds {float(mask.min())}; from a mask that "
                f"is added to scores, pass `{name}=mask == 0`."
            )
        if not bool(padding_mask.any()):
            return None
    return padding_mask


def first_real(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Returns the first real position of each row of (B, L, D), the first of all where none is real."""
    if padding_mask is None:
        return x[:, 0]
    first = (~padding_mask).int().argmax(1)
    return x.gather(1, first.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


def own_padding(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Where this call's tokens are padding, the mask having been checked by the model."""
    slots = 0 if attention_mask is None else attention_mask.shape[1] - x.shape[1]
    return padding_of("attention_mask", attention_mask, x.shape[0], x.shape[1], slots)
