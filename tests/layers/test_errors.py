"""What the layers say when they are called wrongly: the rule, the value, the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megablocks.functional import AttentionFunction
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    RMSNorm,
    RotaryRelativeBias,
    SequenceNorm,
    SimpleRelativeBias,
)
from megablocks.layers.arguments import remembers_arguments
from megablocks.stacks import MegaEncoder, mega_encoder

X = torch.randn(2, 5, 8)
MEMORY = torch.randn(2, 4, 8)
LAYERS: dict[str, Callable[..., Any]] = {
    "ema": MultiDimensionDampedEMA(8),
    "attention": MovingAverageGatedAttention(8, 4),
    "cross_attention": lambda x, **options: GatedCrossAttention(8, 4)(x, MEMORY, **options),
    "feed_forward": NormalizedFFN(8, 4),
    "norm": SequenceNorm(8),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def raises(kind: type[Exception], text: str) -> Any:
    """Expects exactly this text, `...` standing for anything."""
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    return pytest.raises(kind, match=rf"\A{pattern}\Z")


# Inputs


@every_layer
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 7), (1, 2, 5, 8)])
def test_wrong_shape(layer, shape):
    text = (
        f"`x` must have shape (batch, length, 8), but has shape {shape}; "
        "inputs are batch-first, with the features last."
    )
    with raises(ValueError, text):
        layer(torch.randn(shape))


@every_layer
def test_wrong_kind_of_input(layer):
    with raises(ValueError, "`x` must hold at least one position, but has shape (2, 0, 8)."):
        layer(torch.randn(2, 0, 8))
    text = "`x` must have a floating-point dtype, but is torch.int64; convert it, e.g. by `.float()`."
    with raises(TypeError, text):
        layer(torch.zeros(2, 5, 8, dtype=torch.int64))
    with raises(TypeError, "`x` must be a tensor of shape (batch, length, 8), but is list."):
        layer([[1.0]])


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_mask_that_is_not_bool(layer, dtype):
    text = (
        f"`padding_mask` must be a bool tensor, True at padding and False at real tokens, but is {dtype}; "
        "from a mask with 1 at real tokens, pass `padding_mask=mask == 0`."
    )
    with raises(TypeError, text):
        layer(X, padding_mask=torch.ones(2, 5, dtype=dtype))


@every_layer
@pytest.mark.parametrize("shape", [(2, 4), (5, 2), (2, 5, 1)])
def test_mask_of_another_shape(layer, shape):
    text = (
        f"`padding_mask` must have shape (batch, length) = (2, 5), but has shape {shape}; "
        "it covers the tokens of this call only."
    )
    with raises(ValueError, text):
        layer(X, padding_mask=torch.ones(shape, dtype=torch.bool))


# Sizes, probabilities, names


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("embed_dim", lambda size: MultiDimensionDampedEMA(size)),
        ("ema_dim", lambda size: MultiDimensionDampedEMA(8, size)),
        ("embed_dim", lambda size: MovingAverageGatedAttention(size, 4)),
        ("qk_dim", lambda size: MovingAverageGatedAttention(8, size)),
        ("ema", lambda size: MovingAverageGatedAttention(8, 4, ema=size)),
        ("embed_dim", lambda size: GatedCrossAttention(size, 4)),
        ("qk_dim", lambda size: GatedCrossAttention(8, size)),
        ("embed_dim", lambda size: NormalizedFFN(size, 4)),
        ("ffn_dim", lambda size: NormalizedFFN(8, size)),
        ("embed_dim", lambda size: SequenceNorm(size)),
        ("embed_dim", lambda size: RMSNorm(size)),
        ("max_positions", lambda size: SimpleRelativeBias(size)),
        ("qk_dim", lambda size: RotaryRelativeBias(size)),
        ("batch_size", lambda size: MultiDimensionDampedEMA(8).init_state(size)),
        ("batch_size", lambda size: MovingAverageGatedAttention(8, 4).init_state(size)),
    ],
)
def test_sizes(name, make):
    for size in (0, -1):
        with raises(ValueError, f"`{name}` must be at least 1, but is {size}."):
            make(size)
    with raises(TypeError, f"`{name}` must be an int, but is 2.5 (float)."):
        make(2.5)
    with raises(TypeError, f"`{name}` must be an int, but is True (bool)."):
        make(True)


@pytest.mark.parametrize(
    ("name", "off", "make"),
    [
        ("truncation", "no truncation", lambda size: MultiDimensionDampedEMA(8, truncation=size)),
        ("chunk_size", "no chunks", lambda size: MovingAverageGatedAttention(8, 4, chunk_size=size)),
        ("value_dim", "twice `embed_dim`", lambda size: MovingAverageGatedAttention(8, 4, value_dim=size)),
        ("capacity", "keys that grow", lambda size: MovingAverageGatedAttention(8, 4).init_state(1, capacity=size)),
    ],
)
def test_sizes_that_may_be_off(name, off, make):
    for size in (0, -1):
        with raises(ValueError, f"`{name}` must be at least 1, but is {size}; use `None` for {off}."):
            make(size)
    with raises(TypeError, f"`{name}` must be an int, but is 2.5 (float)."):
        make(2.5)


def test_chunk_size_is_read_at_each_call():
    layer = MovingAverageGatedAttention(8, 4)
    layer.chunk_size = 0
    for call in (lambda: layer(X), lambda: layer.init_state(2)):
        with raises(ValueError, "`chunk_size` must be at least 1, but is 0; use `None` for no chunks."):
            call()


def test_odd_rotary_size():
    text = "`qk_dim` must be even for a rotary bias, but is 63."
    for make in (
        lambda: RotaryRelativeBias(63),
        lambda: MovingAverageGatedAttention(8, 63),
        lambda: GatedCrossAttention(8, 63),
    ):
        with raises(ValueError, text):
            make()


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "hidden_dropout"])
@pytest.mark.parametrize("make", [MovingAverageGatedAttention, GatedCrossAttention, NormalizedFFN])
def test_probabilities(make, name):
    if make is NormalizedFFN and name == "attention_dropout":
        return
    for value in (1, 1.5, -0.1):
        with raises(ValueError, f"`{name}` must be in [0, 1), but is {value}."):
            make(8, 4, **{name: value})
    with raises(TypeError, f"`{name}` must be a number in [0, 1), but is 'half' (str)."):
        make(8, 4, **{name: "half"})


@pytest.mark.parametrize("make", [MovingAverageGatedAttention, GatedCrossAttention, NormalizedFFN])
def test_flags(make):
    for name in ("prenorm", "feature_dropout"):
        with raises(TypeError, f"`{name}` must be True or False, but is 'yes'."):
            make(8, 4, **{name: "yes"})


NAMES = {
    "attention": "'softmax', 'relu2', 'laplace', an element-wise callable or an AttentionFunction",
    "activation": "'silu', 'relu', 'gelu', 'gelu_tanh', 'tanh', 'linear', or a callable",
    "position_bias": "'rotary', a module such as SimpleRelativeBias(1024), or None",
    "norm": "'layernorm', 'scalenorm', 'rmsnorm', 'batchnorm', 'syncbatchnorm', a module or None",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [MovingAverageGatedAttention, GatedCrossAttention, NormalizedFFN])
def test_unknown_names_are_answered_with_the_known(make, name):
    if make is NormalizedFFN and name in ("attention", "position_bias"):
        return
    with raises(ValueError, f"`{name}` must be one of {NAMES[name]}, but is 'swish'."):
        make(8, 4, **{name: "swish"})


# States


def test_state_of_another_batch_size():
    ema, attention, cross = MultiDimensionDampedEMA(8), MovingAverageGatedAttention(8, 4), GatedCrossAttention(8, 4)
    text = (
        "`state` must have the batch size of the input, 2, but was made for 3; "
        "use `init_state(2)` or `megablocks.state.select_rows`."
    )
    states = [ema.init_state(3), attention.init_state(3), cross.init_state(torch.randn(3, 4, 8))]
    for layer, state in zip((ema, attention, cross), states, strict=True):
        with raises(ValueError, text):
            layer(X, state=state)


def test_memory_of_another_batch_size():
    with raises(ValueError, "`memory` must have the batch size of the input, 2, but ...3..."):
        GatedCrossAttention(8, 4)(X, torch.randn(3, 4, 8))


def test_state_of_another_kind():
    plain, truncated = MultiDimensionDampedEMA(8), MultiDimensionDampedEMA(8, truncation=3)
    remedy = "pass what this layer's `init_state` or its last call returned."
    with raises(
        TypeError,
        f"`state` of MultiDimensionDampedEMA without truncation must be EMAState, but is TruncatedEMAState; {remedy}",
    ):
        plain(X, state=truncated.init_state(2))
    with raises(
        TypeError,
        f"`state` of MultiDimensionDampedEMA with truncation=3 must be TruncatedEMAState, but is EMAState; {remedy}",
    ):
        truncated(X, state=plain.init_state(2))
    with raises(TypeError, f"`state` of MovingAverageGatedAttention must be AttentionState, but is EMAState; {remedy}"):
        MovingAverageGatedAttention(8, 4)(X, state=plain.init_state(2))
    with raises(TypeError, f"`state` of GatedCrossAttention must be CrossAttentionState, but is EMAState; {remedy}"):
        GatedCrossAttention(8, 4)(X, state=plain.init_state(2))


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (MultiDimensionDampedEMA(8, 4), MultiDimensionDampedEMA(8, 5)),
        (MultiDimensionDampedEMA(8, 4), MultiDimensionDampedEMA(7, 4)),
        (MultiDimensionDampedEMA(8, truncation=3), MultiDimensionDampedEMA(8, truncation=4)),
        (MovingAverageGatedAttention(8, 4, chunk_size=3), MovingAverageGatedAttention(8, 6, chunk_size=3)),
        (MovingAverageGatedAttention(8, 4, chunk_size=3), MovingAverageGatedAttention(8, 4, chunk_size=3, value_dim=5)),
        (MovingAverageGatedAttention(8, 4), MovingAverageGatedAttention(8, 6)),
        (MovingAverageGatedAttention(8, 4), MovingAverageGatedAttention(8, 4, value_dim=5)),
        (MovingAverageGatedAttention(8, 4, ema=4), MovingAverageGatedAttention(8, 4, ema=5)),
    ],
    ids=["averages", "width", "truncation", "chunk keys", "chunk values", "keys", "values", "averages within"],
)
def test_state_of_another_layer(layer, other):
    with raises(
        ValueError, "`state...` must have shape ('batch', ...), but has shape ...; the state was made by another layer."
    ):
        layer(X, state=other.init_state(2))


def test_cross_attention_state_of_another_layer():
    for other, name, own, found in (
        (GatedCrossAttention(8, 6), "keys", ("batch", 4, 4), (2, 4, 6)),
        (GatedCrossAttention(7, 4), "values", ("batch", 4, 8), (2, 4, 7)),
    ):
        state = other.init_state(torch.randn(2, 4, other.embed_dim))
        text = f"`state.{name}` must have shape {own}, but has shape {found}; the state was made by another layer."
        with raises(ValueError, text):
            GatedCrossAttention(8, 4)(X, state=state)


def test_state_of_another_chunk_size():
    layer = MovingAverageGatedAttention(8, 4, chunk_size=3)
    state = layer.init_state(2)
    for made, now in ((3, 4), (3, None)):
        layer.chunk_size = now
        text = (
            f"`state` was made under chunk_size={made}, but the layer now has chunk_size={now}; "
            "a stream keeps the chunk size it began with."
        )
        with raises(ValueError, text):
            layer(X, state=state)


def test_no_state_for_a_bidirectional_layer():
    ema = MultiDimensionDampedEMA(8, causal=False)
    start = "A state needs `causal=True`, but this MultiDimensionDampedEMA has causal=False"
    why = "its backward averages would have to know the future. Call it without a state on the whole sequence."
    with raises(ValueError, f"{start}: {why}"):
        ema.init_state(2)
    with raises(ValueError, f"{start}: {why}"):
        ema(X, state=MultiDimensionDampedEMA(8).init_state(2))
    for average in (16, MultiDimensionDampedEMA(8)):  # a causal average does not help
        layer = MovingAverageGatedAttention(8, 4, causal=False, ema=average)
        text = (
            "A state needs `causal=True`, but this MovingAverageGatedAttention has causal=False: its tokens see later "
            "ones. Call it without a state on the whole sequence."
        )
        with raises(ValueError, text):
            layer.init_state(2)
        with raises(ValueError, text):
            layer(X, state=MovingAverageGatedAttention(8, 4).init_state(2))


def test_memory_or_state():
    layer = GatedCrossAttention(8, 4)
    state = layer.init_state(MEMORY)
    text = "A call takes a memory or a state, but got both; the state holds the memory since `init_state`."
    with raises(ValueError, text):
        layer(X, MEMORY, state=state)
    with raises(ValueError, text):
        layer(X, memory_padding_mask=torch.zeros(2, 4, dtype=torch.bool), state=state)
    with raises(ValueError, "A call with cross-attention needs a `memory` or a `state`, but got neither."):
        layer(X)


def test_memory_and_its_mask():
    layer = GatedCrossAttention(8, 4)
    for call in (lambda memory, mask: layer(X, memory, memory_padding_mask=mask), layer.init_state):
        with raises(ValueError, "`memory` must have shape (batch, length, 8), but has shape (2, 4, 7); ..."):
            call(torch.randn(2, 4, 7), None)
        with raises(TypeError, "`memory_padding_mask` must be a bool tensor, ...`memory_padding_mask=mask == 0`."):
            call(MEMORY, torch.ones(2, 4))
        with raises(
            ValueError, "`memory_padding_mask` must have shape (batch, length) = (2, 4), but has shape (2, 5); ..."
        ):
            call(MEMORY, torch.ones(2, 5, dtype=torch.bool))


# What a simple table and a full state cannot hold


def table_error(positions: int) -> str:
    """What is said of a table of four entries each way."""
    return (
        f"A simple relative bias with `max_positions=4` cannot serve {positions} positions (padding included); make a "
        "larger table, set a smaller `chunk_size`, or use a rotary bias, which has no limit."
    )


def test_input_longer_than_a_simple_table():
    bias = SimpleRelativeBias(4)
    for call in (lambda: bias(5), lambda: bias(2, 5), lambda: bias(1, 4, query_offset=4)):
        with raises(ValueError, table_error(5)):
            call()
    layer = MovingAverageGatedAttention(8, 4, position_bias=SimpleRelativeBias(4))
    with raises(ValueError, table_error(5)):
        layer(X)
    # The limit counts slots, never data: padding does not shorten the input.
    with raises(ValueError, table_error(5)):
        layer(X, padding_mask=torch.tensor([[True] * 4 + [False]] * 2))
    _, state = layer(X[:, :3], state=layer.init_state(2))
    with raises(ValueError, table_error(5)):
        layer(X[:, 3:], state=state)
    with raises(ValueError, table_error(6)):
        layer.init_state(2, capacity=6)
    layer.chunk_size = 4
    assert layer(X).shape == X.shape
    layer.chunk_size = 6
    with raises(ValueError, table_error(6)):
        layer.init_state(2)


def test_cross_attention_beyond_a_simple_table():
    layer = GatedCrossAttention(8, 4, position_bias=SimpleRelativeBias(4))
    with raises(ValueError, table_error(5)):
        layer(X, MEMORY)
    with raises(ValueError, table_error(5)):
        layer(X[:, :2], torch.randn(2, 5, 8))
    state = layer.init_state(MEMORY)
    _, state = layer(X[:, :3], state=state)
    with raises(ValueError, table_error(5)):
        layer(X[:, :2], state=state)


def test_capacity_overflow():
    layer = MovingAverageGatedAttention(8, 4)
    _, state = layer(X, state=layer.init_state(2, capacity=6))
    text = (
        "A state with `capacity=6` is full; make a larger one, or one without `capacity`, which grows. "
        "The longest row has come to 7 tokens."
    )
    with raises(ValueError, text):
        layer(X[:, :2], state=state)
    # Padding takes no room.
    y, state = layer(X[:, :3], padding_mask=torch.tensor([[True, True, False]] * 2), state=state)
    assert y.shape == (2, 3, 8)
    assert state.keys.length.tolist() == [6, 6]


# What would show the future


def test_a_causal_layer_refuses_a_bidirectional_average():
    average = MultiDimensionDampedEMA(8, causal=False)
    text = "A causal layer needs an average that looks back only, but {} is bidirectional; make it with causal=True."
    with raises(ValueError, text.format("`ema`")):
        MovingAverageGatedAttention(8, 4, ema=average)
    with raises(ValueError, text.format("`ema.0`")):
        MovingAverageGatedAttention(8, 4, ema=torch.nn.Sequential(average))
    assert MovingAverageGatedAttention(8, 4, causal=False, ema=average)(X).shape == X.shape


@pytest.mark.parametrize(
    ("norm", "name"),
    [("batchnorm", "BatchNorm1d"), ("syncbatchnorm", "SyncBatchNorm"), (torch.nn.BatchNorm1d(8), "BatchNorm1d")],
    ids=["batchnorm", "syncbatchnorm", "module"],
)
def test_a_causal_layer_refuses_batch_statistics(norm, name):
    text = (
        f"A causal layer needs a norm of each token alone, but `norm.norm` is a {name}, whose statistics include later "
        'tokens; use "layernorm", "scalenorm" or "rmsnorm".'
    )
    with raises(ValueError, text):
        MovingAverageGatedAttention(8, 4, norm=norm)


# Mistakes that newcomers make


def test_a_tensor_for_a_batch_size():
    with raises(TypeError, "`batch_size` must be an int, but is a tensor of shape (2, 5, 8)."):
        MovingAverageGatedAttention(8, 4).init_state(X)


def test_an_average_of_another_width():
    text = (
        "`ema` must have the width of what it is part of, 8, but is a MultiDimensionDampedEMA of width 4; "
        "make both of one width."
    )
    with raises(ValueError, text):
        MovingAverageGatedAttention(8, 4, ema=MultiDimensionDampedEMA(4))


def test_a_state_of_other_queries():
    state = MovingAverageGatedAttention(8, 2, chunk_size=6).init_state(2)
    text = (
        "`state.keys.keys` must have shape ('batch', 6, 4), but has shape (2, 6, 2); "
        "the state was made by another layer."
    )
    with raises(ValueError, text):
        MovingAverageGatedAttention(8, 4, chunk_size=6)(X, state=state)


def test_a_class_in_a_list_of_layers():
    with raises(TypeError, "`layers[0]` must be a torch.nn.Module, but is the class MovingAverageGatedAttention."):
        MegaEncoder([MovingAverageGatedAttention])


def test_a_class_of_a_name_that_is_taken():
    text = (
        "A class called RMSNorm cannot remember its arguments, because `save` and `load` know classes by name, and "
        "megablocks has one of this name; call it otherwise."
    )
    with raises(ValueError, text):
        remembers_arguments(type("RMSNorm", (torch.nn.Module,), {}))


def test_a_module_inside_an_attention_function_that_all_layers_would_share():
    text = (
        "`attention` must be a name or a function here, because all layers would share one module, but is a Softmax; "
        "make the layers yourself, each with a module of its own."
    )
    with raises(TypeError, text):
        mega_encoder(2, 8, qk_dim=4, attention=AttentionFunction(torch.nn.Softmax(-1), divide_by_keys=False))
