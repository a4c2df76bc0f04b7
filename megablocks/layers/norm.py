"""Normalisation over channels, or over the real tokens of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megablocks._checks import (
    check_features,
    check_flag,
    check_input,
    check_kept_shape,
    check_number,
    check_padding_mask,
    check_size,
    lookup,
)
from megablocks.functional.padding import zero_padding
from megablocks.functional.precision import at_least_float32
from megablocks.functional.recomputation import recomputed
from megablocks.layers.arguments import remembers_arguments

NORMS = ("layernorm", "scalenorm", "rmsnorm", "batchnorm", "syncbatchnorm")


@remembers_arguments
class ScaleNorm(nn.Module):
    r"""Divides each token by its root mean square and scales it by one learned number.

    $$y = s\, x \,/ \sqrt{\tfrac1D \textstyle\sum_d x_d^2 + \epsilon}$$

    Args:
        eps: $\epsilon$.
        affine: Whether to learn $s$.
        device: Where to create the parameter.
        dtype: Parameter dtype. The mean square is computed in float32 or wider.

    Shape:
        - `x`: $(\dots, D)$; output: the same, in the dtype of `x`.

    Example:
        >>> ScaleNorm()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]], grad_fn=<...>)

    References:
        Nguyen and Salazar, "Transformers without Tears", [arXiv:1910.05895](https://arxiv.org/abs/1910.05895).
    """

    def __init__(
        self,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = check_number("eps", eps, minimum=0)
        scale = torch.ones(1, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(scale) if check_flag("affine", affine) else None)

    def reset_parameters(self) -> None:
        """Sets the scale to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised tokens."""
        check_features("x", x, None)
        return _root_mean_square_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"eps={self.eps}, affine={self.weight is not None}"

    if TYPE_CHECKING:
        weight: nn.Parameter | None
        __call__ = forward


@remembers_arguments
class RMSNorm(nn.Module):
    r"""Divides each token by its root mean square and scales each channel.

    $$y_d = w_d\, x_d \,/ \sqrt{\tfrac1D \textstyle\sum_d x_d^2 + \epsilon}$$

    Args:
        embed_dim: $D$.
        eps: $\epsilon$.
        affine: Whether to learn $w$.
        device: Where to create the parameter.
        dtype: Parameter dtype. The mean square is computed in float32 or wider.

    Shape:
        - `x`: $(\dots, D)$; output: the same, in the dtype of `x`.

    Example:
        >>> RMSNorm(2)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]], grad_fn=<...>)

    References:
        Zhang and Sennrich, [arXiv:1910.07467](https://arxiv.org/abs/1910.07467).
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.eps = check_number("eps", eps, minimum=0)
        scale = torch.ones(embed_dim, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(scale) if check_flag("affine", affine) else None)

    def reset_parameters(self) -> None:
        """Sets the scale to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised tokens."""
        check_features("x", x, self.embed_dim)
        return _root_mean_square_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"{self.embed_dim}, eps={self.eps}, affine={self.weight is not None}"

    if TYPE_CHECKING:
        weight: nn.Parameter | None
        __call__ = forward


@remembers_arguments
class SequenceNorm(nn.Module):
    r"""Normalises a padded batch of sequences by a norm of the caller's choice; padding takes no part.

    `"layernorm"`, `"scalenorm"` and `"rmsnorm"` look at one token at a time. `"batchnorm"` and `"syncbatchnorm"`
    normalise each channel by mean and variance over all real tokens of the batch (of all processes of the default
    group, with `"syncbatchnorm"`) in training, and by running averages of these in evaluation.

    Args:
        embed_dim: $D$.
        norm: One of the names, or a module that maps $(B, L, D)$ to itself.
        affine: Whether scale and shift are learned; for named norms.
        eps: Added to the variance or mean square; for named norms.
        device: Where to create the parameters.
        dtype: Parameter dtype. Statistics are computed in float32 or wider.

    Shape:
        - `x`: $(B, L, D)$.
        - `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$ in the dtype of `x`, zeros at padding.

    Raises:
        ValueError: If the name is unknown, or `x` has another shape.
        TypeError: If `padding_mask` is not bool.

    Note:
        Batch statistics of a causal model would show it the future; causal layers refuse them.

    Example:
        >>> norm = SequenceNorm(8, norm="scalenorm")
        >>> mask = torch.tensor([[False, False, True]])
        >>> norm(torch.randn(1, 3, 8), padding_mask=mask)[0, 2].any().item()
        False
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        norm: str | nn.Module = "layernorm",
        affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.norm = norm if isinstance(norm, nn.Module) else _named_norm(embed_dim, norm, affine, eps, device, dtype)

    def reset_parameters(self) -> None:
        """Sets scales to one, shifts to zero and running averages back, as far as the norm has them."""
        reset = getattr(self.norm, "reset_parameters", None)
        if callable(reset):
            reset()

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Returns the normalised tokens."""
        check_input("x", x, self.embed_dim)
        check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
        x = zero_padding(x, padding_mask)
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            y = _batch_norm(x, self.norm, padding_mask)
        else:
            y = check_kept_shape("norm", self.norm(x), tuple(x.shape))
        return zero_padding(y, padding_mask)

    if TYPE_CHECKING:
        __call__ = forward


def sequence_norm(
    embed_dim: int,
    norm: str | nn.Module | None,
    *,
    affine: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SequenceNorm | None:
    """Returns what the `norm` argument of a layer means: a name, a module, a `SequenceNorm` as it is, or none."""
    if norm is None or isinstance(norm, SequenceNorm):
        return norm
    return SequenceNorm(embed_dim, norm=norm, affine=affine, device=device, dtype=dtype)


def _named_norm(
    embed_dim: int,
    name: str,
    affine: bool,
    eps: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    check_flag("affine", affine)
    check_number("eps", eps, minimum=0)
    makers = {
        "layernorm": lambda: LayerNorm(embed_dim, eps=eps, elementwise_affine=affine, device=device, dtype=dtype),
        "scalenorm": lambda: ScaleNorm(eps=eps, affine=affine, device=device, dtype=dtype),
        "rmsnorm": lambda: RMSNorm(embed_dim, eps=eps, affine=affine, device=device, dtype=dtype),
        "batchnorm": lambda: nn.BatchNorm1d(embed_dim, eps=eps, affine=affine, device=device, dtype=dtype),
        "syncbatchnorm": lambda: nn.SyncBatchNorm(embed_dim, eps=eps, affine=affine, device=device, dtype=dtype),
    }
    made: nn.Module = lookup("norm", name, makers, others=", a module or None")()  # type: ignore[no-untyped-call]
    return made


class LayerNorm(nn.LayerNorm):
    """The layer norm of torch; a layer that it leads into makes its result again instead of keeping it."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised tokens."""

        def normalised(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

        return recomputed(normalised, x, *(part for part in (self.weight, self.bias) if part is not None))


def _root_mean_square_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    def normalised(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return _divided_by_root_mean_square(x, weight, eps)

    return recomputed(normalised, x, *(() if weight is None else (weight,)))


def _divided_by_root_mean_square(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(at_least_float32(x.dtype))
    factor = torch.rsqrt(_sum_of_squares(wide) / wide.shape[-1] + eps)
    if weight is None or weight.numel() == 1:  # one number for each token: one product for each channel
        return (wide * (factor if weight is None else factor * weight)).to(x.dtype)
    return (wide * factor * weight).to(x.dtype)


def _sum_of_squares(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a compiler joins the two steps itself
        return x.square().sum(-1, keepdim=True)
    if not torch.is_grad_enabled():  # a step of decoding is short: what autograd asks for would take half of a norm
        return _SumOfSquares.forward(x)
    total: Tensor = _SumOfSquares.apply(x)  # type: ignore[no-untyped-call]
    return total


class _SumOfSquares(torch.autograd.Function):
    """Sum over the last axis without a tensor of squares. The norm's own derivative has none where it is zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, torch.linalg.vector_norm(x, dim=-1, keepdim=True).square())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, x * (2.0 * gradient))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, 2.0 * (x * tangent).sum(-1, keepdim=True))


def _batch_norm(x: Tensor, norm: nn.modules.batchnorm._BatchNorm, padding_mask: Tensor | None) -> Tensor:
    """Batch normalisation of (B, L, D) over the real tokens; parameters, buffers and momentum are those of `norm`."""
    wide = x.to(at_least_float32(x.dtype))
    if norm.training or norm.running_mean is None or norm.running_var is None:
        mean, variance = _batch_statistics(wide, norm, padding_mask)
    else:
        mean, variance = norm.running_mean, norm.running_var
    y = (wide - mean) * torch.rsqrt(variance + norm.eps)
    if norm.affine:
        y = y * norm.weight + norm.bias
    return y.to(x.dtype)


class _Recomputing:
    active = False


@contextmanager
def recomputing() -> Iterator[None]:
    """While activations are computed again for a backward pass, running averages have seen this batch already."""
    before, _Recomputing.active = _Recomputing.active, True
    try:
        yield
    finally:
        _Recomputing.active = before


def _batch_statistics(
    x: Tensor, norm: nn.modules.batchnorm._BatchNorm, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    real = x.new_ones(x.shape[:2]) if padding_mask is None else (~padding_mask).to(x.dtype)
    together = isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()
    count = _summed(real.sum(), together)
    present = count.clamp(min=1)
    mean = _summed(x.sum((0, 1)), together) / present
    centred = (x - mean) * real.unsqueeze(-1)
    variance = _summed(centred.square().sum((0, 1)), together) / present
    if norm.training and not _Recomputing.active and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            unbiased = variance * (present / (present - 1).clamp(min=1))
            _follow(norm, norm.running_mean, mean, count)
            _follow(norm, norm.running_var, unbiased, count)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_((count > 0).to(norm.num_batches_tracked.dtype))
    return mean, variance


def _follow(norm: nn.modules.batchnorm._BatchNorm, average: Tensor, value: Tensor, count: Tensor) -> None:
    """Moves a running average towards this batch; a batch of padding alone leaves it as it is."""
    tracked = norm.num_batches_tracked
    momentum = norm.momentum if norm.momentum is not None else 1.0 / (tracked + 1 if tracked is not None else 1)
    moved = average + momentum * (value.to(average.dtype) - average)
    average.copy_(torch.where(count > 0, moved, average))


def _summed(value: Tensor, together: bool) -> Tensor:
    if not together:
        return value
    from torch.distributed.nn.functional import all_reduce

    summed: Tensor = all_reduce(value)  # type: ignore[no-untyped-call]
    return summed
