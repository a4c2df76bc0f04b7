"""The multi-dimensional damped EMA as a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from megablocks._checks import check_flag, check_input, check_optional_size, check_size
from megablocks.functional.ema import damped_ema, ema_kernel
from megablocks.functional.precision import at_least_float32
from megablocks.layers.arguments import remembers_arguments
from megablocks.state import EMAState, TruncatedEMAState


@remembers_arguments
class MultiDimensionDampedEMA(nn.Module):
    r"""Smooths every channel over time with several learned, damped moving averages.

    Channel $j$ is spread over $N$ running averages, each average forgets at a rate of its own, and the $N$ averages
    are mixed back to a single value:

    $$h_t = \alpha_j \odot (\beta_j\, x_{t,j}) + (1 - \alpha_j \odot \delta_j) \odot h_{t-1},
    \qquad y_{t,j} = \eta_j^\top h_t / \sqrt{N} + \omega_j\, x_{t,j}, \qquad h_0 = 0.$$

    $\alpha$ and $\delta$ lie in (0, 1); the parameters `alpha` and `delta` hold them before the logistic function.
    The layer is linear in `x`: the activation that follows it in MEGA belongs to the block. An average with weights
    $\alpha, \delta$ halves its memory every $\ln 2 / -\ln(1 - \alpha\delta)$ tokens.

    Args:
        embed_dim: Width $D$ of input and output.
        ema_dim: Averages $N$ kept for each channel. Cost and state grow linearly with it.
        causal: If `True`, position $t$ sees positions up to $t$. If `False`, a second set of averages runs backwards
            in time, the two are added (both count position $t$ itself), and streaming is not offered.
        truncation: Number of lags kept, 0 to `truncation` - 1, in both directions; `None` for all of them.
        device: Where to create the parameters.
        dtype: Parameter dtype. Coefficients and state are float32 or wider.

    Shape:
        - `alpha`, `delta`, `beta`, `eta`: $(D, N)$; not causal: $(2D, N)$, the second half runs backwards.
        - `omega`: $(D,)$.
        - `x`: $(B, L, D)$ with $L \ge 1$.
        - `padding_mask`: $(B, L)$, bool, `True` at padding; padded steps count as absent.
        - `state.hidden`: $(B, D, N)$, float32 or wider: $4 B D N$ bytes. With truncation `state.inputs`, $(B, K, D)$:
          $4 B K D$ bytes, K being `truncation`.
        - output: $(B, L, D)$ in the dtype of `x`, zeros at padding; with a state `(output, new_state)`.

    Raises:
        ValueError: If a size is below 1, if `x` is not $(B, L, D)$, if the state was made for another batch size or
            by another layer, or if a state is passed to a layer with `causal=False`.
        TypeError: If `padding_mask` is not bool.

    Note:
        The projection is divided by $\sqrt{N}$, as in the original code; the paper's equation does not show it.

    Example:
        >>> ema = MultiDimensionDampedEMA(8, 4)
        >>> x = torch.randn(2, 10, 8)
        >>> whole = ema(x)
        >>> state = ema.init_state(batch_size=2)
        >>> first, state = ema(x[:, :7], state=state)
        >>> rest, state = ema(x[:, 7:], state=state)
        >>> torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)

    References:
        Ma et al., "Mega: Moving Average Equipped Gated Attention", section 3.1, equations 3 to 5,
        [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(
        self,
        embed_dim: int,
        ema_dim: int = 16,
        *,
        causal: bool = True,
        truncation: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = check_size("embed_dim", embed_dim)
        self.ema_dim = check_size("ema_dim", ema_dim)
        self.causal = check_flag("causal", causal)
        self.truncation = check_optional_size("truncation", truncation, "no truncation")
        rows = embed_dim if causal else 2 * embed_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.alpha = parameter(rows, ema_dim)
        self.delta = parameter(rows, ema_dim)
        self.beta = parameter(rows, ema_dim)
        self.eta = parameter(rows, ema_dim)
        self.omega = parameter(embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters as the original code does; `beta` alternates around +1 and -1 over the averages."""
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        self.beta[:, 0::2] += 1.0
        self.beta[:, 1::2] -= 1.0
        nn.init.normal_(self.eta, std=1.0)
        nn.init.normal_(self.omega, std=1.0)

    def kernel(self, length: int) -> Tensor:
        r"""Returns the impulse response of every average, $k_{j,l} = \sum_n \alpha\beta\eta\, q^l / \sqrt N$.

        For looking at: the layer never makes it. The skip connection and truncation are not in it.

        Args:
            length: Number of lags.

        Returns:
            $(D, \text{length})$; not causal: $(2D, \text{length})$, lags into the future in the second half.
        """
        return ema_kernel(self.alpha, self.delta, self.beta, self.eta, check_size("length", length))

    def init_state(self, batch_size: int) -> EMAState | TruncatedEMAState:
        """Returns the state before the first token.

        Raises:
            ValueError: If the layer is bidirectional.
        """
        self._check_streams()
        check_size("batch_size", batch_size)
        # Not of the parameter's own kind, which may be one of many processes' shares of a tensor.
        made_as: dict[str, Any] = {"device": self.alpha.device, "dtype": at_least_float32(self.alpha.dtype)}
        if self.truncation is None:
            return EMAState(torch.zeros(batch_size, self.embed_dim, self.ema_dim, **made_as))
        return TruncatedEMAState(torch.zeros(batch_size, self.truncation, self.embed_dim, **made_as))

    @overload
    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None, state: None = None) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, state: EMAState | TruncatedEMAState
    ) -> tuple[Tensor, EMAState | TruncatedEMAState]: ...
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        state: EMAState | TruncatedEMAState | None = None,
    ) -> Tensor | tuple[Tensor, EMAState | TruncatedEMAState]:
        """Returns the averaged sequence, and with a state the state after it."""
        check_input("x", x, self.embed_dim)
        parameters = (self.alpha, self.delta, self.beta, self.eta, self.omega)
        if state is None:
            return damped_ema(x, *parameters, truncation=self.truncation, padding_mask=padding_mask)
        self._check_streams()
        return damped_ema(x, *parameters, truncation=self.truncation, padding_mask=padding_mask, state=state)

    def _check_streams(self) -> None:
        if not self.causal:
            raise ValueError(
                "A state needs `causal=True`, but this MultiDimensionDampedEMA has causal=False: its backward averages "
                "would have to know the future. Call it without a state on the whole sequence."
            )

    def extra_repr(self) -> str:
        """Returns what `print` shows."""
        return f"{self.embed_dim}, {self.ema_dim}, causal={self.causal}, truncation={self.truncation}"

    if TYPE_CHECKING:
        __call__ = forward
