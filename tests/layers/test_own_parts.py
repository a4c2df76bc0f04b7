"""Modules given for functions: the layer owns them and calls them, wherever it goes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import megablocks
from megablocks import GatedCrossAttention, MegaEncoder, MovingAverageGatedAttention, NormalizedFFN
from megablocks.functional.attention_function import AttentionFunction, Elementwise
from megablocks.layers.arguments import remembers_arguments


@remembers_arguments
class Learned(nn.Module):
    """Scaled scores; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def forward(self, scores, visible=None):
        """Returns the weights."""
        self.calls += 1
        weights = scores * self.scale
        return weights if visible is None else weights.masked_fill(~visible, 0.0)


WAYS = {
    "alone": lambda module: module,
    "elementwise": lambda module: AttentionFunction(Elementwise(module), divide_by_keys=True),
    "weights": lambda module: AttentionFunction(module, divide_by_keys=False),
}
LAYERS = {"self": MovingAverageGatedAttention, "cross": GatedCrossAttention}
COPIES = {"itself": lambda x: x, "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


def call(layer, x):
    """Runs either layer."""
    return layer(x, x) if isinstance(layer, GatedCrossAttention) else layer(x)


def learned(layer) -> Learned:
    """The one learned function that a layer owns."""
    (found,) = (part for part in layer.modules() if isinstance(part, Learned))
    return found


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_learned_attention_function_is_owned_and_called(kind, way, copied):
    torch.manual_seed(0)
    given = Learned()
    original = LAYERS[kind](4, 2, attention=WAYS[way](given)).eval()
    layer = COPIES[copied](original)
    own, x = learned(layer), torch.randn(2, 5, 4)
    assert (own is given) == (copied == "itself")
    calls = own.calls
    before = call(layer, x)
    assert own.calls == calls + 1
    before.sum().backward()
    assert own.scale.grad is not None
    with torch.no_grad():
        own.scale.fill_(3.0)
    assert not torch.equal(call(layer, x), before)
    if copied != "itself":
        torch.testing.assert_close(call(original, x), before, rtol=0, atol=0)

    name = next(name for name, parameter in layer.named_parameters() if parameter is own.scale)
    assert name == "attention.function.scale"
    assert name in layer.state_dict()
    layer.double().train()
    assert own.scale.dtype == torch.float64
    assert own.training
    assert call(layer, x.double()).dtype == torch.float64
    layer.to("meta")
    assert own.scale.is_meta
    assert call(layer, x.double().to("meta")).shape == x.shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_learned_attention_function_is_saved(kind, way, tmp_path):
    layer = LAYERS[kind](4, 2, attention=WAYS[way](Learned())).eval()
    with torch.no_grad():
        learned(layer).scale.fill_(3.0)
    other = LAYERS[kind](4, 2, attention=WAYS[way](Learned())).eval()
    other.load_state_dict(layer.state_dict())
    megablocks.save(layer, tmp_path)
    x = torch.randn(2, 5, 4)
    expected = call(layer, x)
    assert torch.equal(call(other, x), expected)
    assert torch.equal(call(megablocks.load(tmp_path), x), expected)


def test_a_learned_attention_function_of_another_class_is_named(tmp_path):
    layer = MovingAverageGatedAttention(4, 2, attention=nn.PReLU())
    with pytest.raises(TypeError, match=r"^A PReLU cannot be written down"):
        megablocks.save(layer, tmp_path)


def test_layers_may_share_a_learned_attention_function(tmp_path):
    given = Learned()
    stack = MegaEncoder([MovingAverageGatedAttention(4, 2, causal=False, attention=given) for _ in range(2)])
    assert sum(parameter is given.scale for parameter in stack.parameters()) == 1
    megablocks.save(stack, tmp_path)
    again = megablocks.load(tmp_path)
    assert again.layers[0].attention.function is again.layers[1].attention.function


def test_resetting_a_layer_resets_its_learned_functions():
    layer = MovingAverageGatedAttention(4, 2, attention=nn.LayerNorm(5), activation=nn.LayerNorm(4), value_dim=4)
    with torch.no_grad():
        layer.attention.function.weight.fill_(7.0)
        layer.activation.weight.fill_(7.0)
    layer.reset_parameters()
    assert (layer.attention.function.weight == 1).all()
    assert (layer.activation.weight == 1).all()


@pytest.mark.parametrize("copied", COPIES)
def test_a_learned_activation_is_owned_and_called(copied):
    layers = (cls(4, 2, activation=nn.PReLU()) for cls in (*LAYERS.values(), NormalizedFFN))
    for layer in map(COPIES[copied], layers):
        assert "activation.weight" in layer.state_dict()
        x = torch.randn(2, 5, 4)
        before = call(layer, x)
        before.sum().backward()
        assert layer.activation.weight.grad is not None
        with torch.no_grad():
            layer.activation.weight.fill_(3.0)
        assert not torch.equal(call(layer, x), before)
        assert layer.double().activation.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", LAYERS)
def test_a_learned_attention_function_compiles(kind):
    layer = LAYERS[kind](4, 2, attention=nn.PReLU()).eval()
    x = torch.randn(2, 5, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(layer, x), compiled(x, x) if kind == "cross" else compiled(x))


@pytest.mark.parametrize("cls", [*LAYERS.values(), NormalizedFFN])
def test_classes_are_refused_where_functions_are_meant(cls):
    rule = "must be an instance, but is the class ReLU; pass one, as in"
    with pytest.raises(TypeError, match=rf"^`activation` {rule} activation=ReLU\(\.\.\.\)\.$"):
        cls(4, 2, activation=nn.ReLU)
    if cls is not NormalizedFFN:
        for given in (nn.ReLU, AttentionFunction(nn.ReLU, divide_by_keys=True)):
            with pytest.raises(TypeError, match=rf"^`attention` {rule} attention=ReLU\(\.\.\.\)\.$"):
                cls(4, 2, attention=given)
