"""Scoring a long text with a language model: a state goes from segment to segment, so memory does not grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablocks._checks import check_optional_size, check_token_ids
from megablocks.functional.precision import at_least_float32
from megablocks.models.adaptive import AdaptiveSoftmax
from megablocks.models.generation import evaluating
from megablocks.models.language_model import MegaLanguageModel
from megablocks.state import DecoderState

_POSITIONS = 1024
"""Positions whose scores over the whole vocabulary are held at a time."""


class Evaluation(NamedTuple):
    """How well a model has predicted the text so far, and what it takes to go on."""

    nats: float
    """The negative log-likelihood of all tokens counted, in nats."""
    tokens: int
    """Tokens counted: all but the first of the text, which nothing predicts."""
    state: DecoderState
    """What the model has read."""
    last: Tensor
    """`(1, 1)`: the last token, which the model has not read yet."""

    @property
    def mean(self) -> float:
        """Nats for each token."""
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """Of a token: that of WikiText-103 counts words, and its tokens are words."""
        return math.exp(self.mean)

    @property
    def bits_per_token(self) -> float:
        """Bits for each token: bits per byte, as for enwik8, where tokens are bytes."""
        return self.mean / math.log(2)


def evaluate(
    model: MegaLanguageModel,
    segments: Iterable[Tensor],
    *,
    chunk_size: int | None = None,
    after: Evaluation | None = None,
) -> Iterator[Evaluation]:
    r"""Scores a text that comes in segments, and yields the result so far after each of them.

    $$\text{nats} = -\sum_t \log p(w_t \mid w_{<t}), \qquad \text{perplexity} = e^{\text{nats} / T}, \qquad
    \text{bits} = \frac{\text{nats}}{T \ln 2}$$

    Each token is predicted from all before it, whatever the segments: the model's state is carried along, so that
    memory depends on the length of a segment and not of the text. Neither mode nor chunk size of the model are changed
    for good; nothing is kept for gradients.

    Args:
        model: A `MegaLanguageModel`.
        segments: Pieces of one text, in order.
        chunk_size: The chunk length for this text, which may be larger than in training, as the paper does; `None` for
            the model's own.
        after: An earlier result, to go on with the segments behind it; with the chunk size that it was made with.

    Shape:
        - each of `segments`: $(1, L)$ with any $L \ge 1$, int64 or int32.

    Raises:
        ValueError: If a segment is not $(1, L)$, or a token is outside the vocabulary.
        TypeError: If `model` is no `MegaLanguageModel`, or tokens are not integers.

    Note:
        Scores are summed in float64 on the processor.

    Example:
        >>> import math
        >>> model = MegaLanguageModel(mega_decoder(2, 32, qk_dim=16, chunk_size=8), vocab_size=256)
        >>> text = torch.randint(256, (1, 100))
        >>> *_, whole = evaluate(model, text.split(40, dim=1), chunk_size=16)
        >>> whole.tokens
        99
        >>> half = next(evaluate(model, [text[:, :50]], chunk_size=16))
        >>> *_, again = evaluate(model, [text[:, 50:]], chunk_size=16, after=half)     # resumed
        >>> math.isclose(again.perplexity, whole.perplexity, rel_tol=1e-5)
        True

    References:
        Ma et al., section 4.3, [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """
    if not isinstance(model, MegaLanguageModel):
        raise TypeError(f"`model` must be a MegaLanguageModel, but is a {type(model).__name__}.")
    check_optional_size("chunk_size", chunk_size, "the model's own")
    if after is not None and not isinstance(after, Evaluation):
        raise TypeError(f"`after` must be what an earlier `evaluate` yielded, but is {after!r}; leave it out to begin.")
    return _evaluations(model, segments, chunk_size, after)


def _evaluations(
    model: MegaLanguageModel, segments: Iterable[Tensor], chunk_size: int | None, after: Evaluation | None
) -> Iterator[Evaluation]:
    for segment in segments:
        check_token_ids("segments", segment, model.vocab_size)
        if segment.shape[0] != 1:
            raise ValueError(
                f"Each of `segments` must have shape (1, length), but one has {tuple(segment.shape)}; "
                "score each row as a text of its own."
            )
        with evaluating(list(model.modules())), _chunked(model, chunk_size):
            after = _scored(model, segment, after)
        yield after


def _scored(model: MegaLanguageModel, segment: Tensor, after: Evaluation | None) -> Evaluation:
    """The result after one more segment."""
    if after is None:
        after = Evaluation(0.0, 0, model.init_state(1), segment[:, :0])
    tokens = torch.cat([after.last.to(segment), segment], dim=1)
    if tokens.shape[1] == 1:
        return after._replace(last=tokens)
    hidden, state = model.decoder(model.embedding(tokens[:, :-1]), state=after.state)
    nats = after.nats
    for start in range(0, hidden.shape[1], _POSITIONS):
        piece = slice(start, start + _POSITIONS)
        nats -= float(target_log_probs(model.output, hidden[:, piece], tokens[:, 1:][:, piece]).double().sum())
    return Evaluation(nats, after.tokens + tokens.shape[1] - 1, state, tokens[:, -1:])


def target_log_probs(output: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-probability of one token for each position of a decoder's output, float32 or wider.

    Args:
        output: The `output` of a language model, to logits or log-probabilities.
        x: $(B, L, D)$.
        targets: $(B, L)$.
    """
    if isinstance(output, AdaptiveSoftmax):
        return output.target_log_probs(x, targets)
    logits: Tensor = output(x)
    scores = F.log_softmax(logits, dim=-1, dtype=at_least_float32(logits.dtype))
    return scores.gather(-1, targets.unsqueeze(-1).long()).squeeze(-1)


@contextmanager
def _chunked(model: MegaLanguageModel, chunk_size: int | None) -> Iterator[None]:
    """Another chunk size for a while."""
    sizes = [(part, part.__dict__["chunk_size"]) for part in model.modules() if "chunk_size" in part.__dict__]
    try:
        if chunk_size is not None:
            model.set_chunk_size(chunk_size)
        yield
    finally:
        for part, size in sizes:
            part.chunk_size = size
