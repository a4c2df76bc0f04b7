"""Generation works on keys of its own; what goes in and what comes out are states as anyone makes them."""

from __future__ import annotations

import pytest
import torch

from laws import assert_same, assert_states_close, tensors
from megablocks import MegaLanguageModel, generate, mega_decoder, stream
from megablocks.models.workspace import Workspace
from megablocks.state import ChunkKeys, FixedKeys, GrowingKeys

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
PADDED = torch.tensor([[True, True, False, False, False, False], [False] * 6])


def model(chunk_size: int | None = None, **options: object) -> MegaLanguageModel:
    """A small model with an end token that some rows meet."""
    torch.manual_seed(0)
    decoder = mega_decoder(2, 16, qk_dim=8, value_dim=12, chunk_size=chunk_size, **options)
    return MegaLanguageModel(decoder, vocab_size=11).double()


@pytest.mark.parametrize("padding_mask", [None, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("end_token", [None, 7])
@pytest.mark.parametrize("kind", ["growing", "fixed", "chunk of 4", "chunk of 5", "chunk of 64"])
def test_what_comes_out_is_what_single_steps_come_to(kind, end_token, padding_mask):
    chunk_size = int(kind.split()[-1]) if kind.startswith("chunk") else None
    language_model = model(chunk_size)
    given = language_model.init_state(2, capacity=30 if kind == "fixed" else None)
    before = [tensor.clone() for tensor in tensors(given)]
    options = {"max_new_tokens": 13, "end_token": end_token, "padding_mask": padding_mask, "state": given}
    output = generate(language_model, PROMPT, **options)
    *_, last = stream(language_model, PROMPT, **options)
    assert_states_close(output.state, last.state)
    assert_same(output.tokens[:, -1], last.tokens)
    for tensor, unchanged in zip(tensors(given), before, strict=True):
        assert_same(tensor, unchanged)
    kept = output.state.layers[0].attention.keys
    assert isinstance(kept, ChunkKeys if chunk_size else FixedKeys if kind == "fixed" else GrowingKeys)


def test_a_full_state_says_so_when_it_is_full():
    language_model = model()
    state = language_model.init_state(2, capacity=8)
    assert generate(language_model, PROMPT, max_new_tokens=3, state=state).tokens.shape == (2, 3)
    with pytest.raises(ValueError, match=r"^A state with `capacity=8` is full"):
        generate(language_model, PROMPT, max_new_tokens=4, state=state)


def test_a_short_simple_bias_says_so_only_when_it_is_reached():
    language_model = model(position_bias="simple", max_positions=10)
    wanted = generate(language_model, PROMPT[:1], max_new_tokens=5).tokens
    end_token = int(wanted[0, 2])
    assert generate(language_model, PROMPT[:1], max_new_tokens=50, end_token=end_token).tokens.shape[1] <= 3
    with pytest.raises(ValueError, match="10"):
        generate(language_model, PROMPT, max_new_tokens=6)


def test_keys_of_other_layers_are_left_alone():
    language_model = model()
    state = language_model.init_state(2)
    assert Workspace.of(language_model, state, 4, rounded=False) is not None
    assert Workspace.of(torch.nn.Linear(1, 1), state, 4, rounded=False) is None


def test_room_for_compiled_steps_comes_in_few_sizes():
    language_model = model()
    sizes = set()
    for steps in (3, 40, 100):
        workspace = Workspace.of(language_model, language_model.init_state(2), steps, rounded=True)
        sizes.add(workspace.state.layers[0].attention.keys.keys.shape[1])
    assert sizes == {128}


def test_a_compiled_step_generates_the_same(monkeypatch):
    from megablocks.models import generation

    monkeypatch.setattr(
        generation, "_compiled_step", lambda: torch.compile(generation.next_logits, backend="aot_eager", fullgraph=True)
    )
    for chunk_size in (None, 4):
        language_model = model(chunk_size)
        options = {"max_new_tokens": 9, "padding_mask": PADDED, "end_token": 7}
        plain, compiled = (generate(language_model, PROMPT, **options, compiled=way) for way in (False, True))
        assert_same(compiled.tokens, plain.tokens)
        assert_states_close(compiled.state, plain.state)


def test_compiled_must_be_a_flag():
    with pytest.raises(TypeError, match="`compiled`"):
        generate(model(), PROMPT, max_new_tokens=1, compiled="yes")
