"""Generation: a prompt goes in as one segment, tokens come out one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megablocks._checks import (
    check_batch,
    check_flag,
    check_generates,
    check_optional_token,
    check_prompt,
    check_size,
    check_tensor,
)
from megablocks.layers.cross_attention import check_one_memory
from megablocks.models.sampling import RowGenerators, TokenSampler
from megablocks.models.workspace import CompiledSteps, Read, Workspace
from megablocks.state import DecoderState


class GenerationStep(NamedTuple):
    """One token of each row, as `stream` yields it."""

    tokens: Tensor
    """`(B,)`, int64: the new token of each row; `end_token` in a row that had finished before."""
    finished: Tensor
    """`(B,)`, bool: whether the row has met `end_token`, now or before."""
    state: DecoderState
    """What the model had read when it chose these tokens: everything but each row's last real token."""


class GenerationOutput(NamedTuple):
    """What `generate` returns."""

    tokens: Tensor
    """`(B, T)`, int64: the new tokens, without the prompt; `end_token` from a row's own end on."""
    lengths: Tensor
    """`(B,)`, int64: new tokens of each row, its `end_token` included."""
    finished: Tensor
    """`(B,)`, bool: whether the row met `end_token`; otherwise it was cut at `max_new_tokens`."""
    state: DecoderState
    """Has read everything but each row's last token; go on with `generate(model, output.last, state=output.state)`."""

    @property
    def last(self) -> Tensor:
        """The last token of each row, `(B, 1)`: what the state has not read yet."""
        return self.tokens.gather(1, self.lengths.unsqueeze(1) - 1)

    @property
    def padding_mask(self) -> Tensor:
        """`(B, T)`, bool: `True` behind each row's end."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.lengths.unsqueeze(1)


def generate(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    padding_mask: Tensor | None = None,
    source: Tensor | None = None,
    source_padding_mask: Tensor | None = None,
    state: DecoderState | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: RowGenerators | None = None,
    end_token: int | None = None,
    compiled: bool = False,
) -> GenerationOutput:
    r"""Continues each row of a prompt: the most probable token at every step, or a draw.

    $$t_i = \arg\max_t\, p(t \mid \text{prompt}, t_{<i}) \quad\text{or}\quad
    t_i \sim \mathrm{softmax}(\text{logits} / \text{temperature})$$

    The prompt is read as one segment, and then one token at a time, in eval mode and without gradients; the model's
    modes are put back. Padding of any kind, left, right or in the middle, counts as absent: a row gives what it gives
    alone, without its padding. A row that has met `end_token` stands still, and all stop when the last one has.

    Args:
        model: A `MegaLanguageModel`, a `MegaSeq2Seq`, or a module called like one.
        prompt: What the model reads before its first token of its own. For a `MegaSeq2Seq` the beginning of the target,
            mostly a start token in each row.
        max_new_tokens: Tokens of a row at most.
        padding_mask: Padding of the prompt.
        source: What a `MegaSeq2Seq` translates.
        source_padding_mask: Padding of the source.
        state: What the model has read before the prompt: the state of an earlier output, or one of `model.init_state`,
            for keys of fixed shape with `capacity=` prompt + `max_new_tokens`. It is not changed, so that several
            continuations may start from it.
        temperature: 0 for the most probable token; otherwise what logits are divided by before a token is drawn.
        top_k: Draw from the k most probable tokens only; `None` for all.
        top_p: Draw from the smallest set of most probable tokens that reaches this probability, after `top_k`; `None`
            for all.
        generator: Where random numbers come from, one for each row and token: a `torch.Generator`, a sequence of one
            for each row, with which a row draws what it draws alone, or `None` for torch's global one on the CPU. An
            equally seeded generator draws the same tokens from the same logits on every device.
        end_token: The token that ends a row; `None` for none.
        compiled: Whether to compile the step of one token with `torch.compile`, once for a model and batch size, for
            texts of any length. That takes a minute; then steps are faster.

    Shape:
        - `prompt`: $(B, L)$, int64 or int32; `padding_mask`: $(B, L)$, bool, `True` at padding.
        - `source`: $(B, M)$; `source_padding_mask`: $(B, M)$.
        - output: a `GenerationOutput` with `tokens` $(B, T)$, $T \le$ `max_new_tokens`.

    Raises:
        ValueError: If a number is out of range, a row of the prompt is all padding, `top_k` or `top_p` comes without a
            temperature, or a model that needs a source or state gets neither or both.
        TypeError: If an argument has another type, or the model cannot generate.

    Example:
        >>> model = MegaLanguageModel(mega_decoder(2, 32, qk_dim=16, chunk_size=8), vocab_size=256)
        >>> prompt = torch.tensor([list(b"To be, or not")])
        >>> output = generate(model, prompt, max_new_tokens=6)
        >>> more = generate(model, output.last, state=output.state, max_new_tokens=4)
        >>> tokens = torch.cat([output.tokens, more.tokens], dim=1)
        >>> tokens.equal(generate(model, prompt, max_new_tokens=10).tokens)
        True
        >>> seeded = torch.Generator().manual_seed(0)
        >>> drawn = generate(model, prompt, max_new_tokens=6, temperature=0.8, top_p=0.9, generator=seeded)
    """
    check_flag("compiled", compiled)
    steps = _steps(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        padding_mask=padding_mask,
        source=source,
        source_padding_mask=source_padding_mask,
        state=state,
        sampler=TokenSampler(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator),
        end_token=end_token,
        keep_states=False,
        compiled=compiled,
    )
    tokens, finished = [], []
    for step in steps:
        tokens.append(step.tokens)
        finished.append(step.finished)
    lengths = (~torch.stack(finished, dim=1)).sum(1) + step.finished
    return GenerationOutput(torch.stack(tokens, dim=1), lengths, step.finished, step.state)


def stream(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    padding_mask: Tensor | None = None,
    source: Tensor | None = None,
    source_padding_mask: Tensor | None = None,
    state: DecoderState | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: RowGenerators | None = None,
    end_token: int | None = None,
) -> Iterator[GenerationStep]:
    """Yields the tokens that `generate` collects, each as soon as it is chosen.

    Arguments are those of `generate` but `compiled`, and are checked when `stream` is called, with the same errors.
    Between two tokens the model is in its own mode again, and gradients are as they were.

    Returns:
        An iterator over `GenerationStep`s, at most `max_new_tokens` of them. Each holds the state from which any other
        continuation can start: `generate(model, step.tokens[:, None], state=step.state)` goes on behind it, as long
        as no row had finished.

    Example:
        >>> model = MegaLanguageModel(mega_decoder(2, 32, qk_dim=16, chunk_size=8), vocab_size=256)
        >>> prompt = torch.tensor([list(b"To be, or not")])
        >>> tokens = [step.tokens for step in stream(model, prompt, max_new_tokens=6)]
        >>> torch.stack(tokens, dim=1).equal(generate(model, prompt, max_new_tokens=6).tokens)
        True
    """
    return _steps(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        padding_mask=padding_mask,
        source=source,
        source_padding_mask=source_padding_mask,
        state=state,
        sampler=TokenSampler(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator),
        end_token=end_token,
        keep_states=True,
        compiled=False,
    )


def _steps(
    model: nn.Module,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    padding_mask: Tensor | None,
    source: Tensor | None,
    source_padding_mask: Tensor | None,
    state: DecoderState | None,
    sampler: TokenSampler,
    end_token: int | None,
    keep_states: bool,
    compiled: bool,
) -> Iterator[GenerationStep]:
    """Yields steps; unless `keep_states`, the last one's state alone is of any use."""
    check_generates(model)
    vocab_size: int = model.vocab_size  # type: ignore[assignment]
    check_prompt(prompt, padding_mask, vocab_size)
    check_size("max_new_tokens", max_new_tokens)
    check_optional_token("end_token", end_token, vocab_size)
    check_start(model, prompt, source, source_padding_mask, state)

    def steps() -> Iterator[GenerationStep]:
        tokens, mask, reached = prompt, padding_mask, state
        modules = list(model.modules())
        finished = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
        working: Workspace | None = None
        read: Read = next_logits
        for count in range(max_new_tokens):
            with evaluating(modules):
                if reached is None:
                    reached = starting_state(model, prompt, source, source_padding_mask)
                logits, reached = read(model, tokens, mask, reached)
                chosen = sampler(logits, finished)
            if end_token is not None:
                chosen = chosen.masked_fill(finished, end_token)
                finished = finished | (chosen == end_token)
            ended = 0 if end_token is None else int(finished.sum())
            last = count + 1 == max_new_tokens or ended == len(finished)
            if last and working is not None:
                reached = working.settled(reached)
            yield GenerationStep(chosen, finished, reached)
            if last:
                return
            if count == 0 and not keep_states:
                working = Workspace.of(model, reached, max_new_tokens - 1)
                reached = reached if working is None else working.state
                if compiled and working is not None:  # other keys may grow: every step would be compiled anew
                    read = CompiledSteps(next_logits, _compiled_step(), model, working, ends=end_token is not None)
            # What a finished row would read is padding, so that its state stands still.
            stands = ended or (compiled and end_token is not None)
            tokens, mask = chosen.unsqueeze(1), finished.unsqueeze(1) if stands else None

    return steps()


@cache
def _compiled_step() -> Read:
    # Kernels of one token are so small that calling them from Python would take a third of the time.
    step: Read = torch.compile(next_logits, fullgraph=True, dynamic=False, options={"cpp_wrapper": True})
    return step


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which modules are in eval mode and gradients are off; afterwards every module is as it was."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_start(
    model: nn.Module,
    prompt: Tensor,
    source: Tensor | None,
    source_padding_mask: Tensor | None,
    state: DecoderState | None,
) -> None:
    """Raises unless a model that reads a source has one, or a state that holds it, and another has none."""
    if _reads_source(model):
        check_one_memory(source, source_padding_mask, state, name="source")
        if source is not None:
            check_tensor("source", source, 2)
            check_batch("source", source.shape[0], prompt.shape[0])
    elif source is not None or source_padding_mask is not None:
        raise ValueError(
            f"A {type(model).__name__} reads no `source`, but got one; put it into the prompt, or use a MegaSeq2Seq."
        )


def starting_state(
    model: nn.Module, prompt: Tensor, source: Tensor | None, source_padding_mask: Tensor | None
) -> DecoderState:
    """Returns the state before the prompt."""
    given = (source, source_padding_mask) if _reads_source(model) else (prompt.shape[0],)
    state: DecoderState = model.init_state(*given)  # type: ignore[operator]
    return state


def next_logits(
    model: nn.Module, tokens: Tensor, padding_mask: Tensor | None, state: DecoderState
) -> tuple[Tensor, DecoderState]:
    """Reads a segment and returns the logits behind each row's last real token, `(B, vocab)`, and the new state."""
    called: Any = model
    if _reads_source(model):
        logits, state = called(target=tokens, target_padding_mask=padding_mask, state=state, last_only=True)
    else:
        logits, state = called(tokens, padding_mask=padding_mask, state=state, last_only=True)
    return logits.squeeze(1), state


def _reads_source(model: nn.Module) -> bool:
    return hasattr(model, "encode")
