"""What a caller's attention mask says: where padding is."""

from __future__ import annotations

import torch
from torch import Tensor

from megablocks._checks import check_tensor, values_readable


def padding_of(name: str, mask: Tensor | None, batch: int, length: int, *, past: bool = False) -> Tensor | None:
    """Returns the padding mask of this call's tokens, bool, `True` at padding; `None` where nothing is padding.

    Args:
        name: What the mask is called, for errors.
        mask: $(B, L)$, or $(B, S + L)$ with the slots of the past in front; bool, integer or float, 1 at real tokens.
        batch: $B$.
        length: $L$, tokens of this call.
        past: Whether a cache has read slots before; only then may the mask be longer than this call.

    Raises:
        ValueError: If the mask has another shape, or is one to be added to scores.
        TypeError: If it is not a tensor.
    """
    if mask is None:
        return None
    check_tensor(name, mask)
    fits = mask.dim() == 2 and mask.shape[0] == batch and (mask.shape[1] == length or (past and mask.shape[1] > length))
    if not fits:
        more = ", with the past in front if at all" if past else ""
        raise ValueError(
            f"`{name}` must have shape (batch, length) = {(batch, length)}{more}, but has shape {tuple(mask.shape)}; "
            "who sees whom besides is up to the model."
        )
    mask = mask[:, -length:]
    padding_mask = ~mask if mask.dtype == torch.bool else mask == 0
    if values_readable(mask):
        if mask.dtype != torch.bool and bool((mask < 0).any()):
            raise ValueError(
                f"`{name}` must be 1 at real tokens and 0 at padding, but holds {mask.min().item()}; from a mask that "
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
    """Where this call's tokens (B, L, D) are padding, the mask having been checked by the model."""
    return padding_of("attention_mask", attention_mask, x.shape[0], x.shape[1], past=True)
