"""From logits to the next token: the most probable one, or a draw.

Axis letters are those of `megablocks.functional`; $V$ here is the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megablocks._checks import check_generator, check_number, check_optional_share, check_optional_size
from megablocks.functional.precision import at_least_float32

RowGenerators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True, kw_only=True)
class TokenSampler:
    r"""Chooses one token for each row of logits.

    $$t = \arg\max_v \text{logits}_v \quad\text{or}\quad t \sim \mathrm{softmax}(\text{logits} / \text{temperature})$$

    With temperature 0 it is the most probable token; otherwise a draw, narrowed first to `top_k` tokens and then to
    `top_p` of the probability. Half precisions are drawn from in float32.

    Args:
        temperature: 0 for the most probable token; below 1 sharpens the distribution, above 1 flattens it.
        top_k: Draw from the k most probable tokens only; `None` for all.
        top_p: Draw from the smallest set of most probable tokens that reaches this probability; `None` for all.
        generator: Where the random numbers come from, one for each row and token: a `torch.Generator` for all rows, a
            sequence of one for each row, or `None` for torch's global one on the CPU.

    Shape:
        - `logits`: $(B, V)$, floating point; log-probabilities serve as well.
        - `finished`: $(B,)$, bool; a generator of its own is not drawn from for a row that has finished.
        - output: $(B,)$, int64.

    Raises:
        ValueError: If a number is out of range, or `top_k` or `top_p` is given with temperature 0.
        TypeError: If an argument has another type.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
        >>> TokenSampler()(logits)
        tensor([1])
        >>> TokenSampler(temperature=0.7, top_k=2, generator=torch.Generator().manual_seed(0))(logits).shape
        torch.Size([1])

    References:
        Holtzman et al., section 3.1 (top-p), [arXiv:1904.09751](https://arxiv.org/abs/1904.09751);
        Fan et al., section 5.4 (top-k), [arXiv:1805.04833](https://arxiv.org/abs/1805.04833).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: RowGenerators | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, minimum=0, hint="; use 0 for the most probable token")
        check_optional_size("top_k", self.top_k, "all tokens")
        check_optional_share("top_p", self.top_p, "all tokens")
        check_generator("generator", self.generator)
        narrowed = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        if narrowed and self.temperature == 0:
            raise ValueError(
                f"`{narrowed[0]}` narrows a draw, but with temperature=0 nothing is drawn; "
                f"pass `temperature=1.0`, or leave `{narrowed[0]}` out."
            )

    def __call__(self, logits: Tensor, finished: Tensor | None = None) -> Tensor:
        """Returns the chosen tokens."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.to(at_least_float32(logits.dtype))
        # From zero down, and never by a zero of this precision: no temperature overflows.
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits, uniforms(logits.shape[0], self.generator, finished))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Returns the logits with all but the k largest of each row at minus infinity; of equals, lower ids stay.

    Example:
        >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)
        tensor([[-inf, 3., 2., -inf]])
    """
    if k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    above, level = logits > smallest, logits == smallest
    room = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (level & (level.cumsum(-1) <= room))), -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Returns the logits with all outside the smallest set that reaches probability `p` at minus infinity.

    The set is taken from the most probable token down, of equals the lower id first, and holds at least one token.

    Example:
        >>> keep_top_p(torch.tensor([[0.2, 0.5, 0.3]]).log(), 0.6).exp()
        tensor([[0.0000, 0.5000, 0.3000]])
    """
    if p == 1:  # rounding must not cut the tail
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    reached = _probabilities(ordered).cumsum(-1)
    before = F.pad(reached[..., :-1], (1, 0))
    return torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(before >= p, -torch.inf))


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Returns for each row the token at which the cumulated probability passes the row's number from [0, 1)."""
    reached = _probabilities(logits).cumsum(-1)
    total = reached[:, -1:]
    level = numbers.to(reached).unsqueeze(-1) * total
    # Rounding may lift the level to the total, which no token passes.
    level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, level, right=True).squeeze(-1)


def uniforms(rows: int, generator: RowGenerators | None, finished: Tensor | None = None) -> Tensor:
    """Returns one random number in [0, 1) for each row, float64."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.rand(rows, generator=generator, device=device, dtype=torch.float64)
    if len(generator) != rows:
        raise ValueError(
            f"`generator` must be one for all rows or one for each of {rows} rows, but holds {len(generator)}."
        )
    idle = [False] * rows if finished is None else finished.tolist()
    numbers = [
        0.0 if done else float(torch.rand((), generator=own, device=own.device, dtype=torch.float64))
        for own, done in zip(generator, idle, strict=True)
    ]
    return torch.tensor(numbers, dtype=torch.float64)


def _probabilities(logits: Tensor) -> Tensor:
    # A sum over a large vocabulary wants float64, which Apple's GPUs lack.
    return logits.softmax(-1, dtype=torch.float32 if logits.device.type == "mps" else torch.float64)
