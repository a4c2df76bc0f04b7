"""The paper's models: their sizes, counted without making them."""

import pytest
import torch
from torch import nn

from megablocks import MegaClassifier, MegaLanguageModel, MegaSeq2Seq, MultiDimensionDampedEMA, preset
from megablocks.models import PRESETS


def millions(module: nn.Module) -> float:
    """Distinct parameters, in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


# Encoder stacks, to two decimals, and the language models as the paper and the released code count them.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lra_listops", 0.59),
        ("lra_text", 0.92),
        ("lra_retrieval", 1.39),
        ("lra_image", 2.78),
        ("lra_pathfinder", 1.35),
    ],
)
def test_encoders_have_the_papers_size(name, count):
    assert round(millions(preset(name, device="meta").encoder), 2) == count


def test_language_models_have_the_papers_size():
    assert round(millions(preset("enwik8", device="meta")), 1) == 39.1
    wikitext = preset("wikitext103", device="meta")
    assert round(millions(wikitext.decoder), 1) == 206.8
    assert round(millions(wikitext)) == 252


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name):
    model = preset(name, device="meta")
    layers, width, ffn, qk, value = PRESETS[name].sizes
    stacks = [getattr(model, side) for side in ("encoder", "decoder") if hasattr(model, side)]
    for stack in stacks:
        attention = stack.layers[0].attention
        assert len(stack.layers) == layers
        assert (stack.embed_dim, attention.qk_dim, attention.value_dim) == (width, qk, value)
        assert stack.layers[0].feed_forward.ffn_dim == ffn
        assert attention.ema.ema_dim == 16
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_at_a_small_size(name):
    model = preset(name, num_layers=1, embed_dim=8, qk_dim=4, value_dim=8, ffn_dim=8)
    assert isinstance(model, PRESETS[name].kind)
    tokens = torch.randint(2, 19, (2, 7))
    if isinstance(model, MegaSeq2Seq):
        assert model(tokens, tokens[:, :3]).shape == (2, 3, model.vocab_size)
    elif isinstance(model, MegaLanguageModel):
        assert model(tokens).shape == (2, 7, model.vocab_size)
    else:
        assert isinstance(model, MegaClassifier)
        inputs = tokens if hasattr(model.embedding, "tokens") else torch.rand(2, 7)
        assert model(inputs, inputs if model.pair else None).shape == (2, model.num_classes)


def test_averages_of_encoders_are_truncated_and_those_of_decoders_are_not():
    wmt = preset("wmt", device="meta")
    cuts = {side: {ema.truncation for ema in emas(getattr(wmt, side))} for side in ("encoder", "decoder")}
    assert cuts == {"encoder": {1024}, "decoder": {None}}
    assert {ema.truncation for ema in emas(preset("enwik8", device="meta"))} == {None}
    assert {ema.truncation for ema in emas(preset("lra_pathx", device="meta"))} == {4096}


def emas(module: nn.Module) -> list[MultiDimensionDampedEMA]:
    """All averages of a model."""
    return [part for part in module.modules() if isinstance(part, MultiDimensionDampedEMA)]


def test_chunk_size_changes_at_test_time():
    model = preset("enwik8", num_layers=2, embed_dim=8, qk_dim=4, value_dim=8, ffn_dim=8)
    model.set_chunk_size(4096)
    assert {layer.attention.chunk_size for layer in model.decoder.layers} == {4096}


def test_a_preset_with_another_bias_needs_no_table():
    model = preset("lra_text", position_bias="rotary", num_layers=1, embed_dim=8, qk_dim=4, value_dim=8, ffn_dim=8)
    assert type(model.encoder.layers[0].attention.position_bias).__name__ == "RotaryRelativeBias"


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"^`name` must be one of 'lra_listops', .*'wmt', but is 'gpt2'\.$"):
        preset("gpt2")
    with pytest.raises(TypeError, match=r"^`hidden_size` is not an option of enwik8, a MegaLanguageModel; its options"):
        preset("enwik8", hidden_size=3)
