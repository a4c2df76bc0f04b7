"""The normalised feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megablocks._checks import check_flag, check_input, check_kept_shape, check_padding_mask, check_size
from megablocks.functional.activation import activation_function
from megablocks.functional.padding import zero_padding
from megablocks.functional.recomputation import Recomputation
from megablocks.layers.arguments import remembers_arguments
from megablocks.layers.dropout import SequenceDropout
from megablocks.layers.norm import sequence_norm
from megablocks.layers.parts import reset_linear, reset_parts


@remembers_arguments
class NormalizedFFN(nn.Module):
    r"""Two linear maps with an activation between them, a residual connection and a norm.

    $$Y = X + \phi(\mathrm{Norm}(X) W_1 + b_1) W_2 + b_2$$

    With `prenorm=False` the input is not normalised and $Y$ is.

    Args:
        embed_dim: Model width $D$.
        ffn_dim: Inner width $F$.
        activation: $\phi$: `"silu"`, `"relu"`, `"gelu"`, `"gelu_tanh"`, `"tanh"`, `"linear"`, or a callable.
        norm: `"layernorm"`, `"scalenorm"`, `"rmsnorm"`, `"batchnorm"`, `"syncbatchnorm"`, a module, or `None`.
        prenorm: Whether to normalise the input rather than the output.
        dropout: Probability of dropout on the second map's output.
        hidden_dropout: Probability of dropout on the activations.
        feature_dropout: Whether both drop whole channels of a row over time.
        device: Where to create the parameters.
        dtype: Parameter dtype.

    Shape:
        - `x`: $(B, L, D)$.
        - `padding_mask`: $(B, L)$, bool, `True` at padding.
        - output: $(B, L, D)$ in the dtype of `x`, zeros at padding.

    Raises:
        ValueError: If a size, probability or name is not allowed, or `x` has another shape.
        TypeError: If `padding_mask` is not bool.

    Example:
        >>> NormalizedFFN(32, 64)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])

    References:
        Ma et al., section 3.3, equation 17, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        norm: str | nn.Module | None = "layernorm",
        prenorm: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feature_dropout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.ffn_dim = check_size("ffn_dim", ffn_dim)
        self.prenorm = check_flag("prenorm", prenorm)
        self.activation = activation_function(activation)
        self.norm = sequence_norm(embed_dim, norm, device=device, dtype=dtype)
        self.fc1 = nn.Linear(embed_dim, ffn_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(ffn_dim, embed_dim, device=device, dtype=dtype)
        self.dropout = SequenceDropout(dropout, channels=feature_dropout)
        self.hidden_dropout = SequenceDropout(hidden_dropout, channels=feature_dropout, name="hidden_dropout")
        reset_linear(self.fc1, self.fc2)

    def reset_parameters(self) -> None:
        """Draws weights from a normal distribution with standard deviation 0.02 and sets biases to zero."""
        reset_linear(self.fc1, self.fc2)
        reset_parts(self.norm, self.activation)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Returns the layer's output."""
        check_input("x", x, self.embed_dim)
        check_padding_mask("padding_mask", padding_mask, (x.shape[0], x.shape[1]))
        x = zero_padding(x, padding_mask)
        with Recomputation(x) as again:
            inputs = self.norm(x, padding_mask=padding_mask) if self.norm is not None and self.prenorm else x
            hidden = self.hidden_dropout(again(self.activation, self.fc1(inputs)))
            check_kept_shape("activation", hidden, (*x.shape[:2], self.ffn_dim))
            y = x + self.dropout(self.fc2(hidden))
            if self.norm is not None and not self.prenorm:
                y = self.norm(y, padding_mask=padding_mask)
        return zero_padding(y.to(x.dtype), padding_mask)

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"{self.embed_dim}, {self.ffn_dim}, prenorm={self.prenorm}"

    if TYPE_CHECKING:
        __call__ = forward
