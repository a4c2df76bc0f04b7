"""The losses of the heads: means over what counts, or sums over a number that the caller knows better.

Each takes `num_items_in_batch`: how many labels count in all the batches whose gradients are added up, `None` for those
of this one. Padding is deletion: a label at padding, and a prediction made there, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks._checks import lookup
from megablocks.functional.precision import at_least_float32
from megablocks.huggingface.configuration import MegaConfig

IGNORED = -100
"""The label that does not count."""

Count = Tensor | int | None


def token_loss(
    *,
    logits: Tensor,
    labels: Tensor,
    padding_mask: Tensor | None = None,
    num_items_in_batch: Count = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of a label at each position: logits (B, L, classes), labels (B, L)."""
    labels = labels.to(logits.device)
    if padding_mask is None:
        return _cross_entropy(logits, labels, num_items_in_batch)
    real = labels.masked_fill(padding_mask, IGNORED)
    loss = _cross_entropy(logits, real, num_items_in_batch)
    if num_items_in_batch is None:
        return loss
    # The caller has counted labels that do not count. How many in other batches nobody knows: as many, for their size.
    counted, counts = ((part != IGNORED).sum().to(loss.dtype) for part in (labels, real))
    return loss * (counted / counts.clamp(min=1))


def next_token_loss(
    *,
    logits: Tensor,
    labels: Tensor | None,
    padding_mask: Tensor | None = None,
    num_items_in_batch: Count = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of the next token: the label of each position is predicted by the one before.

    `shift_labels`, already moved by one, stand in for `labels` where a caller has them.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]  # type: ignore[arg-type]
    if padding_mask is not None:  # of what predicts, and of what is predicted
        padding_mask = padding_mask | F.pad(padding_mask[:, 1:], (0, 1), value=False)
    return token_loss(
        logits=logits, labels=shift_labels, padding_mask=padding_mask, num_items_in_batch=num_items_in_batch
    )


def choice_loss(*, logits: Tensor, labels: Tensor, num_items_in_batch: Count = None, **kwargs: Any) -> Tensor:
    """Cross-entropy of one class for each row."""
    return _cross_entropy(logits, labels.to(logits.device), num_items_in_batch)


def classification_loss(
    *, pooled_logits: Tensor, labels: Tensor, config: MegaConfig, num_items_in_batch: Count = None, **kwargs: Any
) -> Tensor:
    """Loss of the classes of each row, or of numbers.

    Where `config.problem_type` is `None`, one logit means regression, integer labels one class, other labels several.
    What is found is not remembered: the next call may be another problem.
    """
    labels, problem = labels.to(pooled_logits.device), config.problem_type
    if problem is None:
        whole = labels.dtype in (torch.int64, torch.int32)
        several = "single_label_classification" if whole else "multi_label_classification"
        problem = "regression" if pooled_logits.shape[-1] == 1 else several
    return lookup("problem_type", problem, _PROBLEMS)(pooled_logits, labels, num_items_in_batch)


def span_loss(
    *,
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    padding_mask: Tensor | None = None,
    num_items_in_batch: Count = None,
    **kwargs: Any,
) -> Tensor:
    """Mean of the cross-entropies of where a span begins and where it ends, among the real positions.

    A row whose span lies behind the sequence, or at padding, does not count; a negative position is taken for 0.
    """
    pairs = ((start_logits, start_positions), (end_logits, end_positions))
    losses = [_position_loss(*pair, padding_mask, num_items_in_batch) for pair in pairs]
    return torch.stack(losses).mean()


def _position_loss(logits: Tensor, positions: Tensor, padding_mask: Tensor | None, count: Count) -> Tensor:
    length = logits.shape[1]
    positions = positions.to(logits.device).view(-1)
    labels = positions.clamp(min=0).masked_fill(positions >= length, IGNORED)
    if padding_mask is not None:
        at_padding = padding_mask.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        labels = labels.masked_fill(at_padding, IGNORED)
        logits = logits.masked_fill(padding_mask, torch.finfo(logits.dtype).min)
    return _cross_entropy(logits, labels, count)


def _cross_entropy(logits: Tensor, labels: Tensor, count: Count) -> Tensor:
    wide = logits.reshape(-1, logits.shape[-1]).to(at_least_float32(logits.dtype))
    reduction = "mean" if count is None else "sum"
    loss = F.cross_entropy(wide, labels.reshape(-1).long(), ignore_index=IGNORED, reduction=reduction)
    return _per_item(loss, count)


def _squares(logits: Tensor, labels: Tensor, count: Count) -> Tensor:
    wide = logits.to(at_least_float32(logits.dtype))
    loss = F.mse_loss(wide, labels.to(wide.dtype).view_as(wide), reduction="mean" if count is None else "sum")
    return _per_item(loss, count)


def _several_labels(logits: Tensor, labels: Tensor, count: Count) -> Tensor:
    wide = logits.to(at_least_float32(logits.dtype))
    reduction = "mean" if count is None else "sum"
    return _per_item(F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction=reduction), count)


def _per_item(loss: Tensor, count: Count) -> Tensor:
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


_PROBLEMS: Mapping[str, Callable[[Tensor, Tensor, Count], Tensor]] = {
    "regression": _squares,
    "single_label_classification": _cross_entropy,
    "multi_label_classification": _several_labels,
}
