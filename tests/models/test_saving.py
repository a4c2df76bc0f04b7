"""Models as files: whole or not at all."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import megablocks
from megablocks import (
    MegaDecoder,
    MegaEncoder,
    MegaLanguageModel,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    SequenceNorm,
    SimpleRelativeBias,
    mega_decoder,
    preset,
)
from megablocks.functional.attention_function import attention_function
from megablocks.layers.arguments import remembers_arguments


def small_model(**options) -> MegaLanguageModel:
    """A language model of a few thousand parameters."""
    return MegaLanguageModel(mega_decoder(2, 8, qk_dim=4, ffn_dim=12, chunk_size=4, **options), vocab_size=11).eval()


@pytest.mark.parametrize("name", megablocks.models.PRESETS)
def test_every_preset_comes_back_as_it_was(name, tmp_path):
    model = preset(name, num_layers=1, embed_dim=8, qk_dim=4, value_dim=8, ffn_dim=8)
    megablocks.save(model, tmp_path / "model")
    again = megablocks.load(tmp_path / "model")
    assert type(again) is type(model)
    assert not again.training
    own, theirs = model.state_dict(), again.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_what_is_shared_stays_shared(tmp_path):
    bias = SimpleRelativeBias(16)
    encoder = MegaEncoder(
        [MovingAverageGatedAttention(8, 4, causal=False, position_bias=bias) for _ in range(2)], final_norm="rmsnorm"
    )
    megablocks.save(encoder, tmp_path)
    again = megablocks.load(tmp_path)
    assert again.layers[0].position_bias is again.layers[1].position_bias

    model = small_model()
    megablocks.save(model, tmp_path)
    again = megablocks.load(tmp_path)
    assert again.output.weight is again.embedding.tokens.weight
    tokens = torch.randint(11, (2, 9))
    assert torch.equal(again(tokens), model(tokens))


def test_chunk_size_and_precision_are_those_of_now(tmp_path):
    model = small_model().to(torch.bfloat16)
    model.set_chunk_size(7)
    model.decoder.layers[0].attention.ema.float()
    megablocks.save(model, tmp_path)
    again = megablocks.load(tmp_path)
    assert {layer.attention.chunk_size for layer in again.decoder.layers} == {7}
    assert again.decoder.layers[0].attention.ema.alpha.dtype == torch.float32
    assert again.decoder.layers[1].attention.ema.alpha.dtype == torch.bfloat16


def test_layers_from_a_generator_are_remembered(tmp_path):
    decoder = MegaDecoder(MovingAverageGatedAttention(8, 4, chunk_size=size) for size in (2, 3))
    megablocks.save(decoder, tmp_path)
    assert [layer.chunk_size for layer in megablocks.load(tmp_path).layers] == [2, 3]


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    megablocks.save(small_model(), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    megablocks.load(tmp_path)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_an_interrupted_save_leaves_the_old_model_whole(tmp_path, monkeypatch, fails):
    old, new = small_model(), small_model()
    megablocks.save(old, tmp_path)
    calls = []

    def interrupt(*args):
        calls.append(args)
        if fails == "save_file" or len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    real = getattr(megablocks.models.saving.os, "replace")  # noqa: B009
    owner = safetensors.torch if fails == "save_file" else megablocks.models.saving.os
    with monkeypatch.context() as patch:
        patch.setattr(owner, fails, interrupt)
        with pytest.raises(KeyboardInterrupt):
            megablocks.save(new, tmp_path)
    again = megablocks.load(tmp_path)
    assert torch.equal(again.output.weight, old.output.weight)
    megablocks.save(new, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_what_cannot_be_written_down_is_refused_before_anything_is_written(tmp_path):
    target = tmp_path / "model"
    model = small_model(activation=torch.tanh)
    with pytest.raises(
        TypeError, match=r"^`decoder\.layers\.0\.attention\.activation` cannot be written down, because "
    ):
        megablocks.save(model, target)
    foreign = MegaEncoder([MovingAverageGatedAttention(8, 4, causal=False), nn.Identity()])
    with pytest.raises(
        TypeError, match=r"^A Identity cannot be written down, because its class is not one of megablocks"
    ):
        megablocks.save(foreign, target)
    changed = small_model()
    changed.decoder.layers[0].attention.v_proj = nn.Linear(8, 99)
    with pytest.raises(
        TypeError, match=r"^The model was changed since it was made in a way that cannot be written down"
    ):
        megablocks.save(changed, target)
    assert not target.exists()


def test_other_peoples_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(FileExistsError, match="holds files, but no model of megablocks; name another directory"):
        megablocks.save(small_model(), tmp_path)
    with pytest.raises(FileExistsError, match=r"is a file; name a directory\.$"):
        megablocks.save(small_model(), tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_broken_and_foreign_directories_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model of megablocks: there is no model\.json in it"):
        megablocks.load(tmp_path)
    megablocks.save(small_model(), tmp_path)
    description, (weights,) = tmp_path / "model.json", tmp_path.glob("*.safetensors")
    whole, content = weights.read_bytes(), json.loads(description.read_text())

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is broken \(.*\); save the model again\.$"):
        megablocks.load(tmp_path)
    weights.write_bytes(whole)

    for change, message in [
        ({"version": 99}, "has version 99, but this megablocks reads version 1; update it"),
        ({"weights": "gone.safetensors"}, "its description names gone.safetensors, which is missing"),
        ({"model": {"class": "Virus", "arguments": {}}}, "unknown class 'Virus'; known are .*MegaLanguageModel"),
    ]:
        description.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            megablocks.load(tmp_path)
    description.write_text("{")
    with pytest.raises(ValueError, match="is broken"):
        megablocks.load(tmp_path)
    description.write_text(json.dumps({"format": "other"}))
    with pytest.raises(FileNotFoundError, match=r"its model\.json is something else"):
        megablocks.load(tmp_path)

    content["model"]["arguments"]["vocab_size"] = 12
    content["model"]["arguments"]["embedding"]["arguments"]["vocab_size"] = 12
    description.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"do not fit .*of another shape: embedding\.tokens\.weight \(11, 8\) instead of"
    ):
        megablocks.load(tmp_path)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_torch_save])
def test_copies_can_be_saved(tmp_path, copied):
    model = small_model(activation="gelu_tanh", attention="laplace", norm="scalenorm")
    twin = copied(model)
    megablocks.save(twin, tmp_path)
    tokens = torch.randint(11, (2, 9))
    assert torch.equal(megablocks.load(tmp_path)(tokens), model(tokens))


def layer_after(change, **options) -> MovingAverageGatedAttention:
    """A layer on which something has been done since it was made."""
    layer = MovingAverageGatedAttention(16, 4, **options).eval()
    change(layer)
    return layer


def put(path, value):
    """Returns surgery: sets the attribute at a dotted path of a module."""

    def change(module):
        *parts, name = path.split(".")
        setattr(module.get_submodule(".".join(parts)), name, value() if callable(value) else value)

    return change


WRITTEN = {
    "a flag": put("prenorm", False),
    "another norm": put("norm", lambda: SequenceNorm(16, eps=10.0)),
    "the norm within": put("norm.norm", lambda: megablocks.RMSNorm(16, eps=10.0)),
    "no norm": put("norm", None),
    "an option of a part": put("ema.truncation", 2),
    "another average": put("ema", lambda: MultiDimensionDampedEMA(16, 4, truncation=2)),
    "another bias": put("position_bias", lambda: SimpleRelativeBias(32)),
    "a chunk size": put("chunk_size", 3),
    "a probability": put("hidden_dropout.p", 0.25),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_surgery_is_written_down(tmp_path, what):
    plain = layer_after(lambda layer: None, ema=4)
    layer = layer_after(WRITTEN[what], ema=4)
    megablocks.save(layer, tmp_path)
    again = megablocks.load(tmp_path)
    x = torch.randn(2, 9, 16)
    assert torch.equal(again(x), layer(x))
    assert repr(again) == repr(layer).replace("  (norm): None\n", "") != repr(plain)


REFUSED = {
    "activation": put("activation", lambda: torch.tanh),
    "attention": put("attention", lambda: attention_function("laplace")),
    "norm.norm.eps": put("norm.norm.eps", 10.0),
    "dropout.channels": put("dropout.channels", True),
    "forward": put("forward", lambda: torch.tanh),
    "ema": put("ema", lambda: nn.Identity()),
    "dropout": put("dropout", lambda: nn.Dropout(0.1)),
    "v_proj": put("v_proj", lambda: nn.Linear(16, 32, bias=False)),
    "addition": put("addition", lambda: nn.Identity()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_surgery_that_no_argument_expresses_is_refused(tmp_path, what):
    layer = layer_after(REFUSED[what])
    with pytest.raises(TypeError, match=rf"changed since it was made in a way that cannot be .*\b{what}\b"):
        megablocks.save(layer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_surgery_on_models_is_written_down_or_refused(tmp_path):
    model = small_model()
    put("decoder.layer_drop", 0.5)(model)
    put("decoder.checkpoint", True)(model)
    put("decoder.layers.1.feed_forward", lambda: NormalizedFFN(8, 20, activation="relu"))(model)
    megablocks.save(model, tmp_path)
    again, tokens = megablocks.load(tmp_path), torch.randint(11, (2, 9))
    assert torch.equal(again(tokens), model.eval()(tokens))
    assert (again.decoder.layer_drop, again.decoder.checkpoint) == (0.5, True)

    for scale in (9.0, 1.0):
        model.embedding.scale = scale
        with pytest.raises(TypeError, match=r"cannot be written down \(`?scale`?"):
            megablocks.save(model, tmp_path / "other")
    model.embedding.scale = 8**0.5
    model.embedding.norm = SequenceNorm(8, norm="rmsnorm")
    megablocks.save(model, tmp_path)
    assert torch.equal(megablocks.load(tmp_path)(tokens), model.eval()(tokens))
    assert not (tmp_path / "other").exists()


@remembers_arguments
class Wider(nn.Module):
    """Whose attributes mean other things than its arguments, and which makes functions of its own."""

    def __init__(self, width: int, *layers: nn.Module, act=torch.tanh, **options: object) -> None:
        super().__init__()
        self.width = 2 * width
        self.scaled = lambda x: x * width
        self.act = act
        self.layer = nn.Linear(width, self.width)


def test_modules_of_ones_own_are_taken_as_they_were_given(tmp_path):
    own = Wider(3)
    own.note = "for its owner"
    megablocks.save(own, tmp_path)
    again = megablocks.load(tmp_path)
    assert (again.width, again.scaled(2)) == (6, 6)
    own.width = 8
    with pytest.raises(TypeError, match="changed since it was made"):
        megablocks.save(own, tmp_path)


def test_leftovers_of_a_killed_save_are_no_obstacle(tmp_path):
    (tmp_path / ".writing-ab12_cd3").mkdir()
    (tmp_path / ".writing-ab12_cd3" / "weights").write_bytes(b"half")
    (tmp_path / "model-0123456789abcdef.safetensors").write_bytes(b"whole")
    megablocks.save(small_model(), tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    megablocks.load(tmp_path)


def test_weights_of_others_are_neither_overwritten_nor_removed(tmp_path):
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        megablocks.save(small_model(), tmp_path)
    shard.rename(tmp_path / "aside")
    (tmp_path / "mine").mkdir()
    megablocks.save(small_model(), tmp_path / "mine")
    (tmp_path / "aside").rename(tmp_path / "mine" / shard.name)
    megablocks.save(small_model(), tmp_path / "mine")
    assert (tmp_path / "mine" / shard.name).exists()
