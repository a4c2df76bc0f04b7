"""Generation works on keys of its own; what goes in and what comes out are states as anyone makes them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from laws import assert_same, assert_states_close, tensors
from megablocks import (
    MegaDecoder,
    MegaLanguageModel,
    MegaSeq2Seq,
    MovingAverageGatedAttention,
    SimpleRelativeBias,
    generate,
    mega_decoder,
    mega_encoder,
    stream,
)
from megablocks.functional.position import simple_bias
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
    assert Workspace.of(language_model, state, 4) is not None
    assert Workspace.of(torch.nn.Linear(1, 1), state, 4) is None


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that are compiled; they are run without inductor, which the tests of inductor are for."""
    from megablocks.models import generation

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(generation.next_logits, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(generation, "_compiled_step", lambda: step)
    return counter


@pytest.mark.parametrize("position_bias", ["rotary", "simple"])
@pytest.mark.parametrize("padding_mask", [None, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("end_token", [None, 7])
@pytest.mark.parametrize("chunk_size", [None, 4, 40])
def test_a_compiled_step_generates_the_same(graphs, chunk_size, end_token, padding_mask, position_bias):
    options = {"max_positions": 128} if position_bias == "simple" else {}
    language_model = model(chunk_size, position_bias=position_bias, **options)
    for new in (3, 75):
        given = {"max_new_tokens": new, "padding_mask": padding_mask, "end_token": end_token}
        plain, compiled = (generate(language_model, PROMPT, **given, compiled=way) for way in (False, True))
        assert_same(compiled.tokens, plain.tokens)
        assert_states_close(compiled.state, plain.state)
    assert graphs.frame_count <= 1


def test_one_compiled_step_serves_every_length(graphs):
    language_model = model()
    for prompt, new in ((PROMPT, 40), (PROMPT.repeat(1, 9), 90), (PROMPT.repeat(1, 20), 10)):
        plain, compiled = (generate(language_model, prompt, max_new_tokens=new, compiled=way) for way in (False, True))
        assert_same(compiled.tokens, plain.tokens)
    state = language_model.init_state(2, capacity=77)
    assert generate(language_model, PROMPT, max_new_tokens=60, state=state, compiled=True).tokens.shape == (2, 60)
    assert graphs.frame_count == 1


def test_any_number_of_rows_and_models_may_be_compiled(graphs):
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):  # torch's are 8 and 256
        for rows in range(1, 4):
            language_model, prompt = model(), PROMPT[:1].expand(rows, -1)
            plain, fast = (generate(language_model, prompt, max_new_tokens=4, compiled=way) for way in (False, True))
            assert_same(fast.tokens, plain.tokens)
    assert graphs.frame_count == 3


def test_a_compiled_step_does_not_go_beyond_a_bias(graphs):
    language_model = model(position_bias="simple", max_positions=50)
    wanted = generate(language_model, PROMPT, max_new_tokens=45)
    assert_same(generate(language_model, PROMPT, max_new_tokens=45, compiled=True).tokens, wanted.tokens)
    with pytest.raises(ValueError, match="`max_positions=50` cannot serve 51"):
        generate(language_model, PROMPT, max_new_tokens=46, compiled=True)


def test_compiled_steps_of_layers_with_chunks_of_their_own(graphs):
    torch.manual_seed(0)
    for sizes in ((33, 40), (40, 70), (None, 40)):
        layers = [MovingAverageGatedAttention(16, 8, chunk_size=size) for size in sizes]
        language_model = MegaLanguageModel(MegaDecoder(layers), vocab_size=11).double()
        prompt = torch.randint(11, (2, 50))
        plain, fast = (generate(language_model, prompt, max_new_tokens=80, compiled=way) for way in (False, True))
        assert_same(fast.tokens, plain.tokens)
        assert_states_close(fast.state, plain.state)


@pytest.mark.parametrize("cross", ["rotary", "simple"])
def test_a_short_bias_of_an_encoder_is_none_of_the_steps(graphs, cross):
    torch.manual_seed(0)
    encoder = mega_encoder(1, 16, qk_dim=8, position_bias="simple", max_positions=10)
    table = {"max_positions": 64} if cross == "simple" else {}
    decoder = mega_decoder(2, 16, qk_dim=8, cross_attention=True, position_bias=cross, **table)
    seq2seq = MegaSeq2Seq(encoder, decoder, source_vocab_size=11).double()
    given = {"source": torch.randint(11, (2, 7)), "max_new_tokens": 40}
    plain, fast = (generate(seq2seq, PROMPT[:, :2], **given, compiled=way) for way in (False, True))
    assert_same(fast.tokens, plain.tokens)


def test_rows_that_end_before_a_bias_does_are_read_on(graphs):
    language_model = model(position_bias="simple", max_positions=50)
    free = generate(language_model, PROMPT, max_new_tokens=20).tokens
    end_token = next(int(token) for token in free[0] if token not in free[1])
    given = {"max_new_tokens": 44, "end_token": end_token, "padding_mask": PADDED}
    plain, fast = (generate(language_model, PROMPT, **given, compiled=way) for way in (False, True))
    assert_same(fast.tokens, plain.tokens)


def test_a_model_without_keys_may_be_compiled(graphs):
    class Bigrams(torch.nn.Module):
        vocab_size = 11

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Embedding(11, 11)

        def init_state(self, batch_size):
            return (torch.zeros(batch_size),)

        def forward(self, tokens, padding_mask=None, state=None, last_only=False):
            return self.logits(tokens)[:, -1:], (state[0] + 1,)

    bigrams = Bigrams()
    plain, fast = (generate(bigrams, PROMPT, max_new_tokens=9, compiled=way).tokens for way in (False, True))
    assert_same(fast, plain)


def own_tokens(bias, chunk_size=None, padding_mask=None):
    """What a model with a bias writes."""
    torch.manual_seed(0)
    layer = MovingAverageGatedAttention(16, 8, position_bias=bias, chunk_size=chunk_size)
    language_model = MegaLanguageModel(MegaDecoder([layer]), vocab_size=11)
    for parameter in language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return generate(language_model.double(), PROMPT, padding_mask=padding_mask, max_new_tokens=20).tokens


class Slope(torch.nn.Module):
    """The further away, the less."""

    def forward(self, queries, keys):
        return (keys - queries.unsqueeze(-1)).double()


@pytest.mark.parametrize("padding_mask", [None, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_bias_of_ones_own_may_have_a_table(padding_mask, chunk_size):
    class Tabled(Slope):
        asked = 0

        def forward(self, queries, keys):
            self.asked += 1
            return super().forward(queries, keys)

        def relative_table(self, positions):
            return torch.arange(1 - positions, positions).double()

    tabled = Tabled()
    wanted = own_tokens(Slope(), chunk_size, padding_mask)
    assert_same(own_tokens(tabled, chunk_size, padding_mask), wanted)
    assert tabled.asked == 1, "for the prompt, and for no token behind it"


def test_a_bias_that_changes_another_is_not_the_table_of_that():
    class Steeper(SimpleRelativeBias):
        def forward(self, queries, keys):
            return super().forward(queries, keys) * -20

    class Absolute(SimpleRelativeBias):
        def forward(self, queries, keys):
            return super().forward(queries, keys) + 3 * (keys % 3)

    for kind in (Steeper, Absolute):
        bias = kind(64)
        plain = Slope()  # a stand-in that has no table, and so is asked at every step
        plain.forward = bias.forward
        plain.weight = bias.weight
        assert_same(own_tokens(bias), own_tokens(plain))
    hooked, plain = SimpleRelativeBias(64), Slope()
    hooked.register_forward_hook(lambda module, inputs, output: output * -20)
    plain.weight, plain.forward = hooked.weight, lambda queries, keys: simple_bias(hooked.weight, queries, keys) * -20
    assert_same(own_tokens(hooked), own_tokens(plain))


def test_what_is_called_like_a_table_but_is_none():
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.relative_table = torch.nn.Parameter(torch.randn(127))

        def forward(self, queries, keys):
            return self.relative_table[keys.unsqueeze(-2) - queries.unsqueeze(-1) + 63]

    assert own_tokens(Learned()).shape == (2, 20)

    class Square(Slope):
        def relative_table(self, positions):
            return torch.zeros(positions, positions)

    with pytest.raises(ValueError, match=r"^`relative_table\(positions\)` of a position bias must return shape"):
        own_tokens(Square())


def test_compiled_must_be_a_flag():
    with pytest.raises(TypeError, match="`compiled`"):
        generate(model(), PROMPT, max_new_tokens=1, compiled="yes")
