"""Generation against full passes without a state, and beam search against a plain one over lists."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from megablocks import (
    GenerationOutput,
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    beam_search,
    generate,
    mega_decoder,
    mega_encoder,
    stream,
)
from megablocks.models.sampling import TokenSampler, draw, keep_top_k, keep_top_p, uniforms
from megablocks.state import select_rows

VOCAB = 7
KINDS = {
    f"{kind}-{bias}-{attention}-{chunk_size}": (kind, bias, attention, chunk_size)
    for kind, bias, attention, chunk_size in [
        *itertools.product(["lm"], ["simple", "rotary"], ["softmax", "laplace"], [None, 3]),
        ("seq2seq", "simple", "softmax", None),
        ("seq2seq", "rotary", "softmax", 3),
        ("seq2seq", "rotary", "laplace", None),
    ]
}
SOME = ["lm-rotary-softmax-None", "lm-simple-laplace-3", "seq2seq-rotary-softmax-3"]
PLACES: dict[str, Callable[[int, int], list[int]]] = {
    "left": lambda length, width: list(range(width - length, width)),
    "right": lambda length, width: list(range(length)),
    "middle": lambda length, width: [0, *range(width - length + 1, width)],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps of one token are too small for threads: waiting for each other takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lively(model: nn.Module) -> Any:
    """The model in float64 with weights so large that its tokens differ from step to step."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def language_model(vocab: int = VOCAB, **options: Any) -> MegaLanguageModel:
    return lively(MegaLanguageModel(mega_decoder(2, 16, qk_dim=8, **options), vocab, tie_output=False))


def model_of(kind: str) -> Any:
    name, bias, attention, chunk_size = KINDS[kind]
    options = {"position_bias": bias, "attention": attention, "chunk_size": chunk_size}
    if bias == "simple":
        options["max_positions"] = 64
    if name == "lm":
        return language_model(**options)
    decoder = mega_decoder(2, 16, qk_dim=8, cross_attention=True, **options)
    encoder = mega_encoder(1, 16, qk_dim=8, **options)
    return lively(MegaSeq2Seq(encoder, decoder, source_vocab_size=9, target_vocab_size=VOCAB))


def given_to(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """What the model needs besides a prompt: a source with padding, if it reads one."""
    if isinstance(model, MegaLanguageModel):
        return {}
    source = torch.randint(9, (batch, 5))
    return {"source": source, "source_padding_mask": torch.arange(5) >= torch.arange(2, 2 + batch).unsqueeze(1)}


def row(given: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor[index : index + 1] for name, tensor in given.items()}


def full_pass(model: nn.Module, tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Logits behind `tokens`, by one pass over all of them without a state."""
    with torch.no_grad():
        if "source" in given:
            logits = model(given["source"], tokens, source_padding_mask=given["source_padding_mask"])
        else:
            logits = model(tokens)
    return logits[:, -1]


def mixed_prompts(place: str, lengths: tuple[int, ...] = (2, 7, 4)) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts of different lengths, and the same in one batch with anything under the padding."""
    prompts = [torch.randint(VOCAB, (1, length)) for length in lengths]
    batch = torch.randint(VOCAB, (len(lengths), max(lengths)))
    mask = torch.ones_like(batch, dtype=torch.bool)
    for index, prompt in enumerate(prompts):
        slots = PLACES[place](prompt.shape[1], max(lengths))
        batch[index, slots] = prompt[0]
        mask[index, slots] = False
    return prompts, batch, mask


def assert_same_state(one: Any, other: Any) -> None:
    for left, right in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Greedy


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_full_passes(kind: str) -> None:
    model = model_of(kind)
    given, prompt = given_to(model, 2), torch.randint(VOCAB, (2, 4))
    tokens = prompt
    for _ in range(9):
        tokens = torch.cat([tokens, full_pass(model, tokens, given).argmax(-1, keepdim=True)], dim=1)
    output = generate(model, prompt, max_new_tokens=9, **given)
    assert output.tokens.equal(tokens[:, 4:])
    assert len(output.tokens.unique()) > 1, "a model that repeats itself shows nothing"
    assert output.lengths.tolist() == [9, 9]
    assert not output.finished.any()


@pytest.mark.parametrize(
    ("kind", "place"), [*((kind, "left") for kind in KINDS), *itertools.product(SOME, ["right", "middle"])]
)
def test_prompts_of_different_lengths_give_what_each_gives_alone(kind: str, place: str) -> None:
    model = model_of(kind)
    given = given_to(model, 3)
    prompts, batch, mask = mixed_prompts(place)
    together = generate(model, batch, padding_mask=mask, max_new_tokens=8, end_token=2, **given)
    beams = beam_search(model, batch, padding_mask=mask, max_new_tokens=5, beams=3, end_token=2, **given)
    for index, prompt in enumerate(prompts):
        alone = generate(model, prompt, max_new_tokens=8, end_token=2, **row(given, index))
        length = int(alone.lengths)
        assert together.tokens[index, :length].tolist() == alone.tokens[0].tolist()
        assert int(together.lengths[index]) == length
        assert bool(together.finished[index]) is bool(alone.finished)
        best = beam_search(model, prompt, max_new_tokens=5, beams=3, end_token=2, **row(given, index))
        width = best.tokens.shape[-1]
        assert beams.tokens[index, :, :width].equal(best.tokens[0])
        assert beams.lengths[index].equal(best.lengths[0])
        torch.testing.assert_close(beams.scores[index], best.scores[0])


def test_the_prompt_is_one_segment_and_asks_for_the_last_logits_alone() -> None:
    model, calls = language_model(), []

    def seen(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0].shape[1], kwargs["last_only"]))

    model.register_forward_pre_hook(seen, with_kwargs=True)
    generate(model, torch.randint(VOCAB, (2, 9)), max_new_tokens=3)
    beam_search(model, torch.randint(VOCAB, (2, 9)), beams=2, max_new_tokens=3)
    assert calls == [(9, True), (1, True), (1, True)] * 2


def test_log_probabilities_serve_as_logits() -> None:
    model, prompt = language_model(), torch.randint(VOCAB, (2, 3))
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 5, "top_p": 0.9}
    drawn = generate(model, prompt, generator=seeded(1), **options)
    best = beam_search(model, prompt, beams=3, max_new_tokens=4)
    model.output = nn.Sequential(model.output, nn.LogSoftmax(-1))
    assert generate(model, prompt, generator=seeded(1), **options).tokens.equal(drawn.tokens)
    torch.testing.assert_close(beam_search(model, prompt, beams=3, max_new_tokens=4), best)


# Streaming


@pytest.mark.parametrize("kind", SOME)
def test_streaming_yields_what_generate_collects(kind: str) -> None:
    model = model_of(kind)
    given, prompt = given_to(model, 3), torch.randint(VOCAB, (3, 4))
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "end_token": 1, **given}
    steps = list(stream(model, prompt, generator=seeded(5), **options))
    output = generate(model, prompt, generator=seeded(5), **options)
    assert torch.stack([step.tokens for step in steps], dim=1).equal(output.tokens)
    assert steps[-1].finished.equal(output.finished)
    assert_same_state(steps[-1].state, output.state)


def test_the_caller_of_a_stream_keeps_modes_and_gradients() -> None:
    model = language_model().train()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    for step in stream(model, torch.randint(VOCAB, (1, 4)), max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
        leaves = [leaf for leaf in pytree.tree_leaves(step.state) if isinstance(leaf, Tensor)]
        assert not any(leaf.requires_grad for leaf in leaves)


def test_training_mode_changes_no_token() -> None:
    model = language_model(dropout=0.5, layer_drop=0.5)
    prompt = torch.randint(VOCAB, (2, 4))
    greedy, best = generate(model, prompt, max_new_tokens=6), beam_search(model, prompt, beams=2, max_new_tokens=4)
    model.train()
    assert generate(model, prompt, max_new_tokens=6).tokens.equal(greedy.tokens)
    assert beam_search(model, prompt, beams=2, max_new_tokens=4).tokens.equal(best.tokens)
    assert all(module.training for module in model.modules())


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = language_model().train()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    model.output.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        generate(model, torch.randint(VOCAB, (1, 4)), max_new_tokens=2)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_state_from_generation_serves_training() -> None:
    model, prompt = language_model(), torch.randint(VOCAB, (2, 4))
    output = generate(model, prompt, max_new_tokens=3)
    logits, _ = model(output.last, state=output.state)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.output.parameters())


# Draws


def test_a_seed_reproduces() -> None:
    model, prompt = language_model(), torch.randint(VOCAB, (3, 4))

    def drawn(**given: Any) -> list[list[int]]:
        return generate(model, prompt, max_new_tokens=12, temperature=2.0, **given).tokens.tolist()

    assert drawn(generator=seeded(1)) == drawn(generator=seeded(1)) != drawn(generator=seeded(2))
    torch.manual_seed(1)
    first = drawn()
    assert drawn() != first, "the global generator moves on"
    torch.manual_seed(1)
    assert drawn() == first


@pytest.mark.parametrize("kind", SOME)
def test_with_a_generator_of_its_own_a_row_draws_what_it_draws_alone(kind: str) -> None:
    model = model_of(kind)
    given = given_to(model, 3)
    prompts, batch, mask = mixed_prompts("left")
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.95, "end_token": 4}
    generators = [seeded(seed) for seed in (4, 5, 6)]
    together = generate(model, batch, padding_mask=mask, generator=generators, **options, **given)
    for index, prompt in enumerate(prompts):
        own = seeded(4 + index)
        alone = generate(model, prompt, generator=[own], **options, **row(given, index))
        assert together.tokens[index, : int(alone.lengths)].tolist() == alone.tokens[0].tolist()
        assert generators[index].get_state().equal(own.get_state()), "a finished row draws no further"


def plain_distribution(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The probabilities that tokens should be drawn with, by sorting a list."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-weights[token], token))[:top_k]
    if top_p is not None:
        total, kept, reached = sum(weights[token] for token in order), [], 0.0
        for token in order:
            kept.append(token)
            reached += weights[token] / total
            if reached >= top_p:
                break
        order = kept
    total = sum(weights[token] for token in order)
    return [weights[token] / total if token in order else 0.0 for token in range(len(logits))]


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=9),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.none() | st.integers(1, 10),
    st.none() | st.floats(0.01, 1.0),
)
def test_draws_follow_the_narrowed_distribution(
    logits: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    given = [0.37 * logit for logit in logits]
    expected = plain_distribution(given, temperature, top_k, top_p)
    narrowed = torch.tensor([given], dtype=torch.float64) / temperature
    narrowed = narrowed if top_k is None else keep_top_k(narrowed, top_k)
    narrowed = narrowed if top_p is None else keep_top_p(narrowed, top_p)
    torch.testing.assert_close(narrowed.softmax(-1)[0].tolist(), expected, rtol=1e-9, atol=1e-12)
    # Evenly spread numbers meet every token as often as its probability says, to one of them.
    count = 4096
    sampler_sees = narrowed.expand(count, -1)
    tokens = draw(sampler_sees, torch.arange(count, dtype=torch.float64) / count)
    counts = torch.bincount(tokens, minlength=len(logits))
    assert max(abs(int(found) - p * count) for found, p in zip(counts, expected, strict=True)) <= 1 + 1e-6
    assert not any(int(found) for found, p in zip(counts, expected, strict=True) if p == 0)


def test_frequencies_of_a_sampler() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0])
    sampler = TokenSampler(temperature=0.8, top_k=4, top_p=0.9, generator=seeded(0))
    tokens = sampler(logits.expand(40_000, -1))
    expected = plain_distribution(logits.tolist(), 0.8, 4, 0.9)
    found = torch.bincount(tokens, minlength=5) / 40_000
    torch.testing.assert_close(found.tolist(), expected, rtol=0, atol=0.01)


def test_the_smallest_set_that_reaches_a_probability() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).double().log()

    def kept(p: float) -> list[int]:
        return keep_top_p(logits, p).isfinite().nonzero()[:, 1].tolist()

    assert [kept(p) for p in (1e-9, 0.49, 0.51, 0.74, 0.76, 0.88, 1.0)] == [
        [1],
        [1],
        [1, 3],
        [1, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_all_of_the_probability_keeps_even_what_rounds_to_none() -> None:
    assert keep_top_p(torch.tensor([[0.0, -60.0]]), 1.0).isfinite().all()


def test_of_equals_the_lower_ids_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert keep_top_k(logits, 3).isfinite().tolist() == [[True, True, True, False, False], [True] * 3 + [False] * 2]
    assert keep_top_p(logits, 0.59).isfinite().tolist() == [[True, True] + [False] * 3, [True] * 3 + [False] * 2]


def test_the_ends_of_the_unit_interval_draw_what_is_left() -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, 0.7, -torch.inf, -torch.inf]]).expand(2, -1)
    below_one = torch.nextafter(torch.tensor(1.0).double(), torch.tensor(0.0).double())
    assert draw(logits, torch.stack([torch.zeros_like(below_one), below_one])).tolist() == [1, 3]
    assert draw(logits, torch.tensor([0.0, 1.0])).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_drawn_from_in_float32(dtype: torch.dtype) -> None:
    logits = torch.linspace(-60000, 60000, 6).to(dtype).unsqueeze(0)
    for temperature in (1e-300, 1e-30, 1.0):
        assert TokenSampler(temperature=temperature, top_p=0.5)(logits).tolist() == [5]
    flat = torch.zeros(1, 5000, dtype=dtype)
    tokens = TokenSampler(temperature=1.0, top_p=0.999999, generator=seeded(0))(flat.expand(500, -1))
    assert len(tokens.unique()) > 400
    assert tokens.max() > 4900


def test_low_temperature_is_greedy() -> None:
    model, prompt = language_model(), torch.randint(VOCAB, (2, 4))
    greedy = generate(model, prompt, max_new_tokens=8)
    for narrowed in ({"temperature": 1e-20}, {"temperature": 1.0, "top_k": 1}, {"temperature": 3.0, "top_p": 1e-12}):
        assert generate(model, prompt, max_new_tokens=8, **narrowed).tokens.equal(greedy.tokens)


# Ends and limits


@pytest.mark.parametrize("kind", SOME)
def test_a_finished_row_stands_still(kind: str) -> None:
    model = model_of(kind)
    given, prompt = given_to(model, 4), torch.randint(VOCAB, (4, 3))
    free = generate(model, prompt, max_new_tokens=8, **given)
    end = int(free.tokens[0, 2])
    output = generate(model, prompt, max_new_tokens=8, end_token=end, **given)
    for index in range(4):
        wanted = free.tokens[index].tolist()
        length = wanted.index(end) + 1 if end in wanted else 8
        assert int(output.lengths[index]) == length
        assert bool(output.finished[index]) is (end in wanted)
        found = output.tokens[index].tolist()
        assert found == (wanted[:length] + [end] * 8)[: len(found)]
        assert output.padding_mask[index].tolist() == [step >= length for step in range(len(found))]
        assert int(output.last[index]) == wanted[length - 1]
    assert output.tokens.shape[1] == int(output.lengths.max())
    if not KINDS[kind][3]:  # keys that grow have as many slots as the batch needed; what follows is the same
        return
    alone = generate(model, prompt[:1], max_new_tokens=8, end_token=end, **row(given, 0))
    assert_same_state(select_rows(output.state, torch.tensor([0])), alone.state)


def test_an_end_at_once_stops_at_once() -> None:
    model, prompt = language_model(), torch.tensor([[1, 2]])
    end = int(generate(model, prompt, max_new_tokens=1).tokens)
    output = generate(model, prompt, max_new_tokens=50, end_token=end)
    assert (output.tokens.tolist(), output.lengths.tolist(), output.finished.tolist()) == ([[end]], [1], [True])


def test_an_end_at_the_limit_is_finished() -> None:
    model, prompt = language_model(), torch.tensor([[1, 2]])
    end = int(generate(model, prompt, max_new_tokens=1).tokens)
    output = generate(model, prompt, max_new_tokens=1, end_token=end)
    assert bool(output.finished)
    assert not output.padding_mask.any()


# States


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_going_on_from_a_state_is_one_longer_run(kind: str, temperature: float) -> None:
    model = model_of(kind)
    given, prompt = given_to(model, 2), torch.randint(VOCAB, (2, 4))

    def run(prompt: Tensor, steps: int, generator: torch.Generator, **given: Any) -> GenerationOutput:
        return generate(model, prompt, max_new_tokens=steps, temperature=temperature, generator=generator, **given)

    whole, generator = run(prompt, 9, seeded(2), **given), seeded(2)
    first = run(prompt, 4, generator, **given)
    rest = run(first.last, 5, generator, state=first.state)
    assert torch.cat([first.tokens, rest.tokens], dim=1).equal(whole.tokens)
    again = generate(model, first.last, max_new_tokens=5, state=first.state)
    assert generate(model, first.last, max_new_tokens=5, state=first.state).tokens.equal(again.tokens)


def test_a_dialogue_goes_on_with_a_new_prompt_behind_rows_of_any_length() -> None:
    model = language_model(chunk_size=3)
    prompts, batch, mask = mixed_prompts("right")
    free = generate(model, batch, padding_mask=mask, max_new_tokens=6)
    end, question = int(free.tokens[0, 1]), torch.randint(VOCAB, (3, 2))
    answer = generate(model, batch, padding_mask=mask, max_new_tokens=6, end_token=end)
    reply = generate(model, torch.cat([answer.last, question], dim=1), state=answer.state, max_new_tokens=4)
    for index, prompt in enumerate(prompts):
        said = answer.tokens[index : index + 1, : int(answer.lengths[index])]
        whole = torch.cat([prompt, said, question[index : index + 1]], dim=1)
        assert generate(model, whole, max_new_tokens=4).tokens.equal(reply.tokens[index : index + 1])


def test_any_step_of_a_stream_can_be_branched_from() -> None:
    model, prompt = language_model(), torch.randint(VOCAB, (2, 4))
    whole = generate(model, prompt, max_new_tokens=8).tokens
    for at, step in enumerate(stream(model, prompt, max_new_tokens=7), start=1):
        rest = generate(model, step.tokens.unsqueeze(1), max_new_tokens=8 - at, state=step.state)
        assert rest.tokens.equal(whole[:, at:])


def test_states_of_fixed_shape() -> None:
    model = language_model()
    _, batch, mask = mixed_prompts("left")
    grown = generate(model, batch, padding_mask=mask, max_new_tokens=6)
    state = model.init_state(3, capacity=batch.shape[1] + 6)
    fixed = generate(model, batch, padding_mask=mask, max_new_tokens=6, state=state)
    assert fixed.tokens.equal(grown.tokens)
    assert pytree.tree_map_only(Tensor, Tensor.size, fixed.state) == pytree.tree_map_only(Tensor, Tensor.size, state)
    beams = beam_search(model, batch, padding_mask=mask, max_new_tokens=6, beams=2, state=state)
    assert beams.tokens.equal(beam_search(model, batch, padding_mask=mask, max_new_tokens=6, beams=2).tokens)


def test_a_state_that_holds_the_source() -> None:
    model = model_of("seq2seq-rotary-softmax-3")
    given, prompt = given_to(model, 2), torch.randint(VOCAB, (2, 1))
    with torch.no_grad():
        state = model.init_state(given["source"], given["source_padding_mask"])
    whole = generate(model, prompt, max_new_tokens=5, **given)
    assert generate(model, prompt, max_new_tokens=5, state=state).tokens.equal(whole.tokens)


# Beams


def plain_beam_search(
    log_probs: Callable[[tuple[int, ...]], list[float]], beams: int, steps: int, penalty: float, end: int | None
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search of one row over lists: pairs of score and tokens, best first."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    found: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, steps + 1):
        grown = [
            (total + step, (*tokens, token))
            for total, tokens in running
            for token, step in enumerate(log_probs(tokens))
        ]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        found += [(total / length**penalty, tokens) for total, tokens in grown[:beams] if tokens[-1] == end]
        found = sorted(found, reverse=True)[:beams]
        running = [] if len(found) == beams else [one for one in grown if one[1][-1] != end][:beams]
    found += [(total / steps**penalty, tokens) for total, tokens in running]
    return sorted(found, reverse=True)[:beams]


def next_log_probs(
    model: nn.Module, prompt: Tensor, given: dict[str, Tensor]
) -> Callable[[tuple[int, ...]], list[float]]:
    """Log-probabilities of the next token behind a prompt and some tokens, by a full pass each."""
    known: dict[tuple[int, ...], list[float]] = {}

    def of(tokens: tuple[int, ...]) -> list[float]:
        if tokens not in known:
            whole = torch.cat([prompt, torch.tensor([tokens], dtype=torch.int64)], dim=1)
            known[tokens] = full_pass(model, whole, given).log_softmax(-1)[0].tolist()
        return known[tokens]

    return of


@pytest.mark.parametrize("kind", SOME)
def test_beam_search_is_the_plain_one(kind: str) -> None:
    model = model_of(kind)
    given, prompt = given_to(model, 2), torch.randint(VOCAB, (2, 4))
    oracles = [next_log_probs(model, prompt[index : index + 1], row(given, index)) for index in range(2)]
    for beams, penalty, end in itertools.product((2, 5), (0.0, 1.0, 2.0), (None, 2)):
        output = beam_search(
            model, prompt, beams=beams, max_new_tokens=5, length_penalty=penalty, end_token=end, **given
        )
        for index, oracle in enumerate(oracles):
            expected = plain_beam_search(oracle, beams, 5, penalty, end)
            lengths = output.lengths[index].tolist()
            found = [tuple(output.tokens[index, beam, : lengths[beam]].tolist()) for beam in range(beams)]
            assert found == [tokens for _, tokens in expected]
            torch.testing.assert_close(output.scores[index].tolist(), [score for score, _ in expected])
            assert output.finished[index].tolist() == [tokens[-1] == end for tokens in found]


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("end", [None, 1])
def test_enough_beams_search_exhaustively(penalty: float, end: int | None) -> None:
    vocab, steps = 3, 3
    model, prompt = language_model(vocab), torch.tensor([[0, 2, 1]])
    log_probs = next_log_probs(model, prompt, {})
    all_sequences = set()
    for tokens in itertools.product(range(vocab), repeat=steps):
        cut = tokens.index(end) + 1 if end in tokens else steps
        all_sequences.add(tokens[:cut])
    expected = sorted(
        (sum(log_probs(tokens[:at])[token] for at, token in enumerate(tokens)) / len(tokens) ** penalty, tokens)
        for tokens in all_sequences
    )[::-1]
    output = beam_search(model, prompt, beams=30, max_new_tokens=steps, length_penalty=penalty, end_token=end)
    count = len(expected)
    found = [tuple(output.tokens[0, beam, : output.lengths[0, beam]].tolist()) for beam in range(count)]
    assert found == [tokens for _, tokens in expected]
    torch.testing.assert_close(output.scores[0, :count].tolist(), [score for score, _ in expected])
    assert output.lengths[0, count:].tolist() == [0] * (30 - count)
    assert output.scores[0, count:].tolist() == [-math.inf] * (30 - count)
    assert not output.finished[0, count:].any()


@pytest.mark.parametrize("kind", SOME)
def test_one_beam_is_greedy(kind: str) -> None:
    model = model_of(kind)
    given, prompt = given_to(model, 3), torch.randint(VOCAB, (3, 4))
    for end in (None, *range(VOCAB)):
        greedy = generate(model, prompt, max_new_tokens=7, end_token=end, **given)
        best = beam_search(model, prompt, beams=1, max_new_tokens=7, end_token=end, **given)
        assert best.tokens[:, 0].equal(greedy.tokens)
        assert best.lengths[:, 0].equal(greedy.lengths)
        assert best.finished[:, 0].equal(greedy.finished)


def test_a_vocabulary_of_one_token() -> None:
    model = language_model(1)
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    output = beam_search(model, prompt, beams=3, max_new_tokens=4)
    assert (output.lengths.tolist(), output.tokens.shape) == ([[4, 0, 0]], (1, 3, 4))
    output = beam_search(model, prompt, beams=3, max_new_tokens=4, end_token=0)
    assert (output.lengths.tolist(), output.finished.tolist()) == ([[1, 0, 0]], [[True, False, False]])


# What callers get wrong

PROMPT = [[1, 2, 3], [4, 5, 6]]
WRONG_OF_BOTH: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "limit": ({"max_new_tokens": 0}, ValueError, r"^`max_new_tokens` must be at least 1, but is 0\.$"),
    "end": (
        {"end_token": 7},
        ValueError,
        r"^`end_token` must be in \[0, 7\), the vocabulary, but is 7; use `None` for none\.$",
    ),
    "end type": ({"end_token": "."}, TypeError, r"^`end_token` must be a token id, an int, but is '\.' \(str\)\.$"),
    "one sequence": (
        {"prompt": torch.tensor([1, 2])},
        ValueError,
        r"^`prompt` must have shape \(batch, length\) with length >= 1, but has shape \(2,\); "
        r"a single sequence needs `prompt\[None\]`\.$",
    ),
    "no prompt": ({"prompt": torch.ones(2, 0, dtype=torch.int64)}, ValueError, r"^`prompt` must have shape \(batch, "),
    "all padding": (
        {"padding_mask": torch.tensor([[False, True, True], [True, True, True]])},
        ValueError,
        r"^`prompt` must hold a real token in every row, but row 1 is all padding; begin it with a start token\.$",
    ),
    "source": (
        {"source": torch.tensor(PROMPT)},
        ValueError,
        r"^A MegaLanguageModel reads no `source`, but got one; put it into the prompt, or use a MegaSeq2Seq\.$",
    ),
    "state": ({"state": ()}, TypeError, r"^`state` of MegaDecoder must be DecoderState, but is tuple; "),
}
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "temperature": (
        {"temperature": -1.0},
        ValueError,
        r"^`temperature` must be a finite number of at least 0, but is -1\.0; use 0 for the most probable token\.$",
    ),
    "temperature nan": ({"temperature": math.nan}, ValueError, r"^`temperature` must be .* but is nan; use 0 for the"),
    "temperature type": ({"temperature": "hot"}, TypeError, r"^`temperature` must be .* but is 'hot' \(str\); use 0"),
    "top_k": (
        {"temperature": 1.0, "top_k": 0},
        ValueError,
        r"^`top_k` must be at least 1, but is 0; use `None` for all tokens\.$",
    ),
    "top_k type": ({"temperature": 1.0, "top_k": 2.0}, TypeError, r"^`top_k` must be an int, but is 2\.0 \(float\)\.$"),
    "top_p": (
        {"temperature": 1.0, "top_p": 0.0},
        ValueError,
        r"^`top_p` must be in \(0, 1\], but is 0\.0; use `None` for all tokens\.$",
    ),
    "top_p above": ({"temperature": 1.0, "top_p": 1.5}, ValueError, r"^`top_p` must be in \(0, 1\], but is 1\.5; "),
    "top_p type": (
        {"temperature": 1.0, "top_p": "most"},
        TypeError,
        r"^`top_p` must be a number in \(0, 1\], but is 'most' \(str\)\.$",
    ),
    "no draw": (
        {"top_k": 3},
        ValueError,
        r"^`top_k` narrows a draw, but with temperature=0 nothing is drawn; pass `temperature=1\.0`, or leave "
        r"`top_k` out\.$",
    ),
    "seed": (
        {"temperature": 1.0, "generator": 3},
        TypeError,
        r"^`generator` must be a torch\.Generator or a sequence of one for each row, but is 3 \(int\); make one by "
        r"`torch\.Generator\(\)\.manual_seed\(seed\)`\.$",
    ),
    "seeds": ({"temperature": 1.0, "generator": [3]}, TypeError, r"^`generator` must be .*, but holds 3 \(int\); make"),
    "generators": (
        {"temperature": 1.0, "generator": [torch.Generator()]},
        ValueError,
        r"^`generator` must be one for all rows or one for each of 2 rows, but holds 1\.$",
    ),
}
WRONG_OF_BEAMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "beams": ({"beams": 0}, ValueError, r"^`beams` must be at least 1, but is 0\.$"),
    "penalty": (
        {"length_penalty": math.inf},
        ValueError,
        r"^`length_penalty` must be a finite number, but is inf\.$",
    ),
}


@pytest.mark.parametrize("case", WRONG_OF_BOTH | WRONG)
def test_errors_of_generate(case: str) -> None:
    wrong, kind, text = (WRONG_OF_BOTH | WRONG)[case]
    with pytest.raises(kind, match=text):
        generate(language_model(), **{"prompt": torch.tensor(PROMPT), "max_new_tokens": 2, **wrong})


@pytest.mark.parametrize("case", WRONG_OF_BOTH | WRONG_OF_BEAMS)
def test_errors_of_beam_search(case: str) -> None:
    wrong, kind, text = (WRONG_OF_BOTH | WRONG_OF_BEAMS)[case]
    with pytest.raises(kind, match=text):
        beam_search(language_model(), **{"prompt": torch.tensor(PROMPT), "max_new_tokens": 2, "beams": 2, **wrong})


@pytest.mark.parametrize("case", [case for case in WRONG if case != "generators"])
def test_a_stream_complains_when_it_is_made(case: str) -> None:
    wrong, kind, text = WRONG[case]
    with pytest.raises(kind, match=text):
        stream(language_model(), torch.tensor(PROMPT), max_new_tokens=2, **wrong)


def test_a_model_that_reads_a_source_needs_one() -> None:
    model, prompt = model_of("seq2seq-rotary-softmax-3"), torch.tensor(PROMPT)
    with pytest.raises(ValueError, match=r"needs a `source` or a `state`, but got neither\.$"):
        generate(model, prompt, max_new_tokens=2)
    state = model.init_state(prompt)
    with pytest.raises(ValueError, match=r"^A call takes a source or a state, but got both;"):
        generate(model, prompt, max_new_tokens=2, source=prompt, state=state)
    with pytest.raises(
        ValueError, match=r"^`source` must have the batch size of the input, 2, but has 1; give each row one"
    ):
        generate(model, prompt, max_new_tokens=2, source=prompt[:1])


def test_what_cannot_generate() -> None:
    model = MegaClassifier(mega_encoder(1, 16, qk_dim=8), vocab_size=5, num_classes=2)
    text = (
        r"^`model` must be a MegaLanguageModel, a MegaSeq2Seq or a module called like one, but is MegaClassifier, "
        r"which has no `\w+`\.$"
    )
    with pytest.raises(TypeError, match=text):
        generate(model, torch.tensor(PROMPT), max_new_tokens=2)


def test_uniforms_are_the_same_on_every_device_and_lie_below_one() -> None:
    numbers = uniforms(1000, seeded(0))
    assert numbers.dtype == torch.float64
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
