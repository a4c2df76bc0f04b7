"""Beam search: several hypotheses of each row are followed at once.

Axis letters are those of `megablocks.functional`; W is the number of beams, V the size of the vocabulary, T the
number of new tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megablocks._checks import check_generates, check_number, check_optional_token, check_prompt, check_size
from megablocks.functional.precision import at_least_float32
from megablocks.models.generation import check_start, evaluating, next_logits, starting_state
from megablocks.state import DecoderState, select_rows


class BeamSearchOutput(NamedTuple):
    """The hypotheses of each row, best first."""

    tokens: Tensor
    """`(B, W, T)`, int64: the new tokens, without the prompt; behind their end `end_token`, or 0 without one."""
    lengths: Tensor
    """`(B, W)`, int64: new tokens of each hypothesis, its `end_token` included; 0 where there is no hypothesis."""
    scores: Tensor
    """`(B, W)`: log-probability over `length ** length_penalty`; minus infinity where there is no hypothesis."""
    finished: Tensor
    """`(B, W)`, bool: whether the hypothesis met `end_token`; otherwise it was cut at `max_new_tokens`."""


def beam_search(
    model: nn.Module,
    prompt: Tensor,
    *,
    beams: int,
    max_new_tokens: int,
    padding_mask: Tensor | None = None,
    source: Tensor | None = None,
    source_padding_mask: Tensor | None = None,
    state: DecoderState | None = None,
    length_penalty: float = 1.0,
    end_token: int | None = None,
) -> BeamSearchOutput:
    r"""Searches the most probable continuations of each row, following several at once.

    $$\text{score} = \frac{1}{n^{\text{length\_penalty}}} \sum_{i=1}^{n} \log p(t_i \mid \text{prompt}, t_{<i})$$

    At each step the W most probable continuations of a row's running hypotheses are looked at. Those that end with
    `end_token` are set apart as finished, and the beam is filled up with the next best ones. A row is done when W
    hypotheses have finished; at `max_new_tokens` those still running compete with the finished ones by their score.
    One beam is greedy search; as many beams as there are continuations is exhaustive search.

    Args:
        model: A `MegaLanguageModel`, a `MegaSeq2Seq`, or a module called like one.
        prompt: As for `generate`.
        beams: Hypotheses W that are followed, and returned.
        max_new_tokens: Tokens of a hypothesis at most.
        padding_mask: Padding of the prompt; a row gives what it gives alone, without its padding.
        source: What a `MegaSeq2Seq` translates.
        source_padding_mask: Padding of the source.
        state: What the model has read before the prompt, as for `generate`.
        length_penalty: 0 scores by log-probability, which favours short hypotheses, 1 by its mean over the tokens;
            above 1 favours long ones.
        end_token: The token that ends a hypothesis; `None` for none.

    Shape:
        - `prompt`: $(B, L)$, int64 or int32; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - `source`: $(B, M)$; `source_padding_mask`: $(B, M)$.
        - output: a `BeamSearchOutput` with `tokens` $(B, W, T)$, $T \le$ `max_new_tokens`.

    Raises:
        ValueError: If a number is out of range, a row of the prompt is all padding, or a model that needs a source or
            state gets neither or both.
        TypeError: If an argument has another type, or the model cannot generate.

    Example:
        >>> model = MegaLanguageModel(mega_decoder(2, 32, qk_dim=16, chunk_size=8), vocab_size=256)
        >>> prompt = torch.tensor([list(b"To be, or not")])
        >>> found = beam_search(model, prompt, beams=4, max_new_tokens=6, end_token=ord("."))
        >>> found.tokens.shape, found.scores.shape
        (torch.Size([1, 4, 6]), torch.Size([1, 4]))
        >>> best = found.tokens[0, 0, : found.lengths[0, 0]]

    References:
        Graves, "Sequence Transduction with Recurrent Neural Networks", section 2.4,
        [arXiv:1211.3711](https://arxiv.org/abs/1211.3711).
    """
    check_generates(model)
    vocab_size: int = model.vocab_size  # type: ignore[assignment]
    check_prompt(prompt, padding_mask, vocab_size)
    check_size("beams", beams)
    check_size("max_new_tokens", max_new_tokens)
    check_number("length_penalty", length_penalty)
    check_optional_token("end_token", end_token, vocab_size)
    check_start(model, prompt, source, source_padding_mask, state)

    B, T = prompt.shape[0], max_new_tokens
    first_beam = torch.arange(B, device=prompt.device).unsqueeze(1) * beams
    found = _none_found(B, beams, prompt.device)
    with evaluating(model.modules()):
        if state is None:
            state = starting_state(model, prompt, source, source_padding_mask)
        logits, state = next_logits(model, prompt, padding_mask, state)
        running = _Running.start(B, beams, prompt.device)
        rows = torch.arange(B, device=prompt.device).repeat_interleave(beams)
        logits, state = logits.index_select(0, rows), select_rows(state, rows)
        for length in range(1, T + 1):
            candidates, parents = _continuations(running, logits)
            if end_token is not None:
                ended = candidates.tokens[..., -1] == end_token
                among_best = torch.arange(ended.shape[1], device=ended.device) < beams
                found = _merged(found, candidates.only(ended & among_best), length_penalty, finished=True)
                candidates = candidates.only(~ended & ~_complete(found))
            running, order = candidates.best(beams)
            if length == T or not (running.log_probs > -torch.inf).any():
                break
            rows = (first_beam + parents.gather(1, order)).flatten()
            tokens = running.tokens[..., -1].reshape(-1, 1)
            logits, state = next_logits(model, tokens, None, select_rows(state, rows))
    return _padded(_merged(found, running, length_penalty, finished=False), end_token)


class _Running(NamedTuple):
    """Hypotheses of equal length, any number of each row; those with log-probability minus infinity are none."""

    tokens: Tensor
    """`(B, n, length)`, int64."""
    log_probs: Tensor
    """`(B, n)`."""

    @classmethod
    def start(cls, B: int, beams: int, device: torch.device) -> _Running:
        """The empty hypothesis in the first beam, and none in the others, so that beams differ from the first step."""
        log_probs = torch.full((B, beams), -torch.inf, device=device)
        log_probs[:, 0] = 0
        return cls(torch.zeros(B, beams, 0, dtype=torch.int64, device=device), log_probs)

    def only(self, where: Tensor) -> _Running:
        """Those marked; the others become none."""
        return self._replace(log_probs=self.log_probs.masked_fill(~where, -torch.inf))

    def best(self, count: int) -> tuple[_Running, Tensor]:
        """The most probable ones, best first, and which they are, `(B, count)`."""
        log_probs, order = self.log_probs.topk(count)
        return _Running(_pick(self.tokens, order), log_probs), order


def _continuations(running: _Running, logits: Tensor) -> tuple[_Running, Tensor]:
    """The most probable continuations by one token, best first, and which beam each continues.

    There are 2 W of them: each beam can end in one way, so that W are left where W end.
    """
    B, beams = running.log_probs.shape
    vocab_size = logits.shape[-1]
    log_probs = logits.log_softmax(-1, dtype=at_least_float32(logits.dtype)).view(B, beams, vocab_size)
    total = (running.log_probs.unsqueeze(-1) + log_probs).flatten(1)
    best, index = total.topk(min(2 * beams, total.shape[1]))
    parents, chosen = index // vocab_size, index % vocab_size
    return _Running(torch.cat([_pick(running.tokens, parents), chosen.unsqueeze(-1)], dim=-1), best), parents


def _none_found(B: int, beams: int, device: torch.device) -> BeamSearchOutput:
    empty = _Running.start(B, beams, device)
    lengths = torch.zeros(B, beams, dtype=torch.int64, device=device)
    scores = torch.full((B, beams), -torch.inf, device=device)
    return BeamSearchOutput(empty.tokens, lengths, scores, lengths.bool())


def _complete(found: BeamSearchOutput) -> Tensor:
    """Whether a row has W finished hypotheses, `(B, 1)`."""
    return (found.scores > -torch.inf).all(1, keepdim=True)


def _merged(found: BeamSearchOutput, more: _Running, length_penalty: float, *, finished: bool) -> BeamSearchOutput:
    """The W hypotheses of best score among those found and those that now come to their end."""
    length = more.tokens.shape[-1]
    lengths = torch.full_like(more.log_probs, length, dtype=torch.int64)
    scores = more.log_probs / length**length_penalty
    other = BeamSearchOutput(more.tokens, lengths, scores, torch.full_like(lengths, finished, dtype=torch.bool))
    known = found._replace(tokens=F.pad(found.tokens, (0, length - found.tokens.shape[-1])))
    both = [torch.cat(pair, dim=1) for pair in zip(known, other, strict=True)]
    order = both[2].topk(found.scores.shape[1]).indices
    return BeamSearchOutput(*(_pick(part, order) for part in both))


def _padded(found: BeamSearchOutput, end_token: int | None) -> BeamSearchOutput:
    """Cuts tokens to the longest hypothesis and says plainly what lies behind an end, or is no hypothesis."""
    there = found.scores > -torch.inf
    lengths = found.lengths.masked_fill(~there, 0)
    tokens = found.tokens[..., : int(lengths.max())]
    behind = torch.arange(tokens.shape[-1], device=tokens.device) >= lengths.unsqueeze(-1)
    return BeamSearchOutput(tokens.masked_fill(behind, end_token or 0), lengths, found.scores, found.finished & there)


def _pick(x: Tensor, order: Tensor) -> Tensor:
    """Takes hypotheses `order[b]` of each row `b`."""
    return x.take_along_dim(order if x.dim() == 2 else order.unsqueeze(-1), 1)
