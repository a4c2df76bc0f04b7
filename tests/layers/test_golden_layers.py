"""The layers against the recorded numbers of the original code: to 1e-10 in float64, to its own rounding in float32.

In float32 the bound is what the original's own rounding cost it, `f32_limited`. Its authors' order of operations is not
ours, so twice that is granted, and never less than 16 roundings of float32: a figure below that is luck.

Outputs of single modules at padding are no truth, and the cotangents there are not zero: gradients are compared where
the comments of `test_oracles` say that they can be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_data import Run, block_params, ema_params, layer_params, norm_params, true_runs
from laws import EXACT, assert_same
from loading import load, oracle_name
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    NormalizedFFN,
    RMSNorm,
    RotaryRelativeBias,
    ScaleNorm,
    SequenceNorm,
    SimpleRelativeBias,
)

ACTIVATION_NAMES = {"gelu_accurate": "gelu_tanh"}
ROUNDINGS = 16 * torch.finfo(torch.float32).eps

precisions = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def bound(run: Run, name: str, dtype: torch.dtype) -> float:
    """How far off an output may be."""
    if dtype == torch.float64:
        return EXACT
    # Where the untouched original was not run, and for states, what rounding costs other runs of the same weights.
    recorded = run.f32_limited.get(name) or max(other.f32_limited.get("y", 0.0) for other in run.case.runs)
    return max(2 * recorded, ROUNDINGS)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """No number is further off than the tolerance, relative to max(1, |expected|)."""
    assert actual.shape == expected.shape
    assert actual.numel() > 0
    error = ((actual.double() - expected).abs() / expected.abs().clamp(min=1)).max().item()
    assert error <= tolerance, f"off by {error:.1e}"


def real_tokens(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """All real tokens of a (B, L, D) batch, one after the other."""
    return x.flatten(0, 1) if padding_mask is None else x[~padding_mask]


def batch_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A time-major tensor as (B, L, D), ready for gradients."""
    return tensor.transpose(0, 1).contiguous().to(dtype).requires_grad_()


def assert_gradients(run: Run, modules: dict[str, nn.Module], params_of: dict[str, dict[str, Tensor]]) -> None:
    """Weights' `.grad` are the recorded gradients; both by the names of the oracle, for each module."""
    for name, module in modules.items():
        expected = params_of[name]
        assert expected
        for key, parameter in module.named_parameters():
            assert_near(parameter.grad, expected[oracle_name(module, key)], EXACT)


def ema_module(args: dict[str, Any]) -> nn.Module:
    """The EMA that fairseq's arguments describe."""
    options = {"causal": not args["bidirectional"], "truncation": args["truncation"]}
    return MultiDimensionDampedEMA(args["embed_dim"], args["ndim"], **options)


def bias_of(args: dict[str, Any], max_positions: int) -> nn.Module | str:
    """The bias that fairseq's arguments describe."""
    return SimpleRelativeBias(max_positions) if args["rel_pos_bias"] == "simple" else "rotary"


def gated_attention(args: dict[str, Any]) -> MovingAverageGatedAttention:
    """The gated attention that fairseq's arguments describe."""
    chunk_size = args["chunk_size"] if args["chunk_size"] > 0 else None
    return MovingAverageGatedAttention(
        args["embed_dim"],
        args["zdim"],
        value_dim=args["hdim"],
        ema=ema_module(args),
        causal=not args["bidirectional"],
        chunk_size=chunk_size,
        attention=args["attention_activation"],
        activation=ACTIVATION_NAMES.get(args["activation"], args["activation"]),
        position_bias=bias_of(args, chunk_size or args["max_positions"]),
        norm=args["norm_type"],
        prenorm=args["prenorm"],
    )


def cross_attention(args: dict[str, Any]) -> GatedCrossAttention:
    """The cross-attention that fairseq's arguments describe."""
    return GatedCrossAttention(
        args["embed_dim"],
        args["zdim"],
        attention=args["attention_activation"],
        activation=ACTIVATION_NAMES.get(args["activation"], args["activation"]),
        position_bias=bias_of(args, args["max_positions"]),
        norm=args["norm_type"],
        prenorm=args["prenorm"],
    )


def feed_forward(args: dict[str, Any]) -> NormalizedFFN:
    """The feed-forward layer that fairseq's arguments describe."""
    activation = ACTIVATION_NAMES.get(args["activation"], args["activation"])
    options = {"activation": activation, "norm": args["norm_type"], "prenorm": args["prenorm"]}
    return NormalizedFFN(args["embed_dim"], args["ffn_hidden_dim"], **options)


# The EMA


@precisions
@pytest.mark.parametrize("run", true_runs("fairseq", "ema"), ids=str)
def test_ema(run, dtype):
    inputs, outputs = run.inputs, run.outputs
    layer = load(ema_module(run.case.args).to(dtype), ema_params(run.case.state))
    x, mask = batch_first(inputs["x"], dtype), inputs.get("mask")
    y = F.silu(layer(x, padding_mask=mask))
    assert_near(real_tokens(y, mask), real_tokens(outputs["y"].transpose(0, 1), mask), bound(run, "y", dtype))


@precisions
@pytest.mark.parametrize("run", [run for run in true_runs("fairseq", "ema") if run.name == "inc"], ids=str)
def test_ema_stream(run, dtype):
    inputs, outputs = run.inputs, run.outputs
    layer = load(ema_module(run.case.args).to(dtype), ema_params(run.case.state))
    x, state, pieces = batch_first(inputs["x"], dtype), layer.init_state(inputs["x"].shape[1]), []
    for index, segment in enumerate(x.split(inputs["seg"].tolist(), dim=1)):
        y, state = layer(segment, state=state)
        assert_near(state.hidden, outputs[f"state{index}"], bound(run, "y", dtype))
        pieces.append(F.silu(y))
    y = torch.cat(pieces, dim=1)
    assert_near(y, outputs["y"].transpose(0, 1), bound(run, "y", dtype))
    if run.grad_of and dtype == torch.float64:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_gradients(run, {"": layer}, {"": ema_params(run.gradients)})
        assert_near(x.grad, run.input_gradients["x"].transpose(0, 1), EXACT)


# Biases, norms, feed-forward


@precisions
@pytest.mark.parametrize("run", true_runs("fairseq", "relpos"), ids=str)
def test_position_bias(run, dtype):
    def params_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return block_params({f"rel_pos_bias.{key}": value for key, value in state.items()})

    params, expected = params_of(run.case.state), run.outputs["b"]
    if "bias_table" in params:
        module = SimpleRelativeBias(run.case.args["max_positions"])
    else:
        module = RotaryRelativeBias(params["bias_alpha"].shape[0])
    module = load(module.to(dtype), params)
    bias = module(len(expected))
    assert_near(bias, expected, bound(run, "b", dtype))
    if run.cotangents and dtype == torch.float64:
        (bias * run.cotangents["b"]).sum().backward()
        assert_gradients(run, {"": module}, {"": params_of(run.gradients)})


@precisions
@pytest.mark.parametrize("run", true_runs("fairseq", "norm"), ids=str)
def test_norm(run, dtype):
    args, state = run.case.args, run.case.state
    affine = args.get("affine", True)
    alone = run.case.cls != "SequenceNorm"
    if run.case.cls == "SequenceNorm":
        layer = SequenceNorm(args["embedding_dim"], norm=args["norm_type"], affine=affine)
    elif run.case.cls == "ScaleNorm":
        layer = ScaleNorm(affine=affine)
    else:
        layer = RMSNorm(args["number_features"], affine=affine)

    def params_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return norm_params(tensors, "" if alone else "norm.")

    layer = load(layer.to(dtype), params_of(state)).train(run.mode == "train")
    x = batch_first(run.inputs["x"], dtype)
    y = layer(x)
    assert_near(y, run.outputs["y"].transpose(0, 1), bound(run, "y", dtype))
    if run.mode == "train":
        for name in ("running_mean", "running_var"):
            assert_near(getattr(layer.norm, name), run.outputs[name], bound(run, name, dtype))
    if run.cotangents and dtype == torch.float64:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_near(x.grad, run.input_gradients["x"].transpose(0, 1), EXACT)
        if run.gradients:
            assert_gradients(run, {"": layer}, {"": params_of(run.gradients)})


@precisions
@pytest.mark.parametrize("run", true_runs("fairseq", "nffn"), ids=str)
def test_feed_forward(run, dtype):
    layer = load(feed_forward(run.case.args).to(dtype), block_params(run.case.state)).train(run.mode == "train")
    x = batch_first(run.inputs["x"], dtype)
    y = layer(x)
    assert_near(y, run.outputs["y"].transpose(0, 1), bound(run, "y", dtype))
    if run.cotangents and dtype == torch.float64:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_gradients(run, {"": layer}, {"": block_params(run.gradients)})
        assert_near(x.grad, run.input_gradients["x"].transpose(0, 1), EXACT)


# Gated attention


def assert_weights(run: Run, weights: Tensor, mask: Tensor | None, dtype: torch.dtype) -> None:
    """The weights are the recorded ones, wherever a real token looks at real tokens."""
    recorded = run.outputs["attn"]
    assert weights.shape == recorded.shape
    chunk = recorded.shape[-1]
    real = torch.ones(len(recorded), recorded.shape[1] * chunk, dtype=torch.bool) if mask is None else ~mask
    real = real.reshape(len(recorded), -1, chunk)
    seen = real.unsqueeze(-1) & real.unsqueeze(-2)
    if mask is None or bool((mask.long().diff(dim=1) >= 0).all()) or recorded.shape[1] == 1:
        assert_near(weights[seen], recorded[seen], bound(run, "attn", dtype))


gated_runs = [
    run for group in ("mega", "mega_opt", "mega_inc") for run in true_runs("fairseq", group) if "attn" in run.outputs
]


@precisions
@pytest.mark.parametrize("run", gated_runs, ids=str)
def test_gated_attention(run, dtype):
    inputs, outputs = run.inputs, run.outputs
    layer = load(gated_attention(run.case.args).to(dtype), block_params(run.case.state)).train(run.mode == "train")
    x, mask = batch_first(inputs["x"], dtype), inputs.get("mask")
    y, trace = layer(x, padding_mask=mask, trace=True)
    recorded = outputs["y"].transpose(0, 1)
    assert_near(real_tokens(y, mask), real_tokens(recorded, mask), bound(run, "y", dtype))
    assert_weights(run, trace.attention_weights[0], mask, dtype)
    if run.cotangents and dtype == torch.float64:
        whole = slice(None) if mask is None else ~mask.any(dim=1)
        (y * run.cotangents["y"].transpose(0, 1))[whole].sum().backward()
        assert_near(x.grad[whole], run.input_gradients["x"].transpose(0, 1)[whole], EXACT)


streamed_runs = [run for run in true_runs("fairseq", "mega_inc") if "seg" in run.inputs]


@precisions
@pytest.mark.parametrize("run", streamed_runs, ids=str)
def test_gated_attention_stream(run, dtype):
    inputs, outputs = run.inputs, run.outputs
    layer = load(gated_attention(run.case.args).to(dtype), block_params(run.case.state))
    x, tolerance = batch_first(inputs["x"], dtype), bound(run, "y", dtype)
    state, pieces = layer.init_state(len(x)), []
    for index, segment in enumerate(x.split(inputs["seg"].tolist(), dim=1)):
        y, state = layer(segment, state=state)
        pieces.append(y)
        step = f"step{index}/"
        assert_near(state.ema.hidden, outputs[f"{step}ema"], tolerance)
        length = int(outputs[f"{step}kv_len"])
        assert state.keys.length.tolist() == [length] * len(x)
        for name, held in (("prev_key", state.keys.keys), ("prev_value", state.keys.values)):
            if step + name in outputs:
                assert_near(held[:, :length], outputs[step + name], bound(run, step + name, dtype))
            assert_same(held[:, length:], torch.zeros_like(held[:, length:]))
    assert_near(torch.cat(pieces, dim=1), outputs["y"].transpose(0, 1), tolerance)


# Cross-attention


def stepwise(run: Run) -> bool:
    """Whether the run took one query at a time."""
    return run.name == "inc"


@precisions
@pytest.mark.parametrize("run", [run for run in true_runs("fairseq", "cross") if not stepwise(run)], ids=str)
def test_cross_attention(run, dtype):
    # The original ignores the padding of the queries; so do we here, and then all its numbers are right.
    inputs, outputs = run.inputs, run.outputs
    layer = load(cross_attention(run.case.args).to(dtype), block_params(run.case.state))
    query, memory, mask = batch_first(inputs["q"], dtype), batch_first(inputs["k"], dtype), inputs.get("kmask")
    y, trace = layer(query, memory, memory_padding_mask=mask, trace=True)
    assert_near(y, outputs["y"].transpose(0, 1), bound(run, "y", dtype))
    assert_near(trace.cross_attention_weights[0], outputs["attn"], bound(run, "attn", dtype))
    if run.cotangents and dtype == torch.float64:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_gradients(run, {"": layer}, {"": block_params(run.gradients)})
        assert_near(query.grad, run.input_gradients["q"].transpose(0, 1), EXACT)
        assert_near(memory.grad, run.input_gradients["k"].transpose(0, 1), EXACT)


@precisions
@pytest.mark.parametrize("run", [run for run in true_runs("fairseq", "cross") if stepwise(run)], ids=str)
def test_cross_attention_stream(run, dtype):
    inputs, outputs = run.inputs, run.outputs
    layer = load(cross_attention(run.case.args).to(dtype), block_params(run.case.state))
    query, memory = batch_first(inputs["q"], dtype), batch_first(inputs["k"], dtype)
    state, pieces, weights = layer.init_state(memory, inputs["kmask"]), [], []
    real = ~inputs["kmask"]
    if "prev_key" in outputs:
        assert_near(state.keys[real], outputs["prev_key"][real], bound(run, "prev_key", dtype))
        assert_near(state.values[real], outputs["prev_value"][real], bound(run, "prev_value", dtype))
    for token in query.unbind(1):
        y, trace, state = layer(token.unsqueeze(1), state=state, trace=True)
        pieces.append(y)
        weights.append(trace.cross_attention_weights[0])
    assert state.position.tolist() == [query.shape[1]] * len(query)
    assert_near(torch.cat(pieces, dim=1), outputs["y"].transpose(0, 1), bound(run, "y", dtype))
    assert_near(torch.cat(weights, dim=1), outputs["attn"], bound(run, "attn", dtype))


# Layers: attention, cross-attention and feed-forward by hand


def side_args(args: dict[str, Any], side: str) -> dict[str, Any]:
    """The arguments of a layer's parts, from those of a model."""
    return {
        "embed_dim": args[f"{side}_embed_dim"],
        "zdim": args[f"{side}_z_dim"],
        "hdim": args[f"{side}_hidden_dim"],
        "ndim": args[f"{side}_n_dim"],
        "ffn_hidden_dim": args[f"{side}_ffn_embed_dim"],
        "bidirectional": side == "encoder",
        "chunk_size": args[f"{side}_chunk_size"],
        "truncation": args["truncation_length"],
        "activation": args["activation_fn"],
        "attention_activation": args["attention_activation_fn"],
        "norm_type": args["normalization_type"],
        "prenorm": args["normalize_before"],
        "rel_pos_bias": args["rel_pos_bias"],
        "max_positions": max(args["max_source_positions"], args["max_target_positions"]),
    }


@precisions
@pytest.mark.parametrize("run", true_runs("fairseq", "layer"), ids=str)
def test_layer(run, dtype):
    inputs, params = run.inputs, layer_params(run.case.state)
    args = side_args(run.case.args, "encoder" if run.case.cls == "MegaEncoderLayer" else "decoder")
    makers = {"attention": gated_attention, "cross_attention": cross_attention, "feed_forward": feed_forward}
    parts = {name: load(makers[name](args).to(dtype), params[name]) for name in params}
    x, mask = batch_first(inputs["x"], dtype), inputs.get("mask")
    memory, memory_mask = inputs.get("enc"), inputs.get("encmask")

    states: dict[str, Any] = {}
    if run.name == "inc":
        states["attention"] = parts["attention"].init_state(len(x))
        if memory is not None:
            states["cross_attention"] = parts["cross_attention"].init_state(batch_first(memory, dtype), memory_mask)

    def forward(x: Tensor, mask: Tensor | None) -> Tensor:
        for name, part in parts.items():
            if name in states:
                x, states[name] = part(x, padding_mask=mask, state=states[name])
            elif name == "cross_attention":
                x = part(x, batch_first(memory, dtype), padding_mask=mask, memory_padding_mask=memory_mask)
            else:
                x = part(x, padding_mask=mask)
        return x

    segments = x.split(1, dim=1) if states else [x]
    y = torch.cat([forward(segment, None if states else mask) for segment in segments], dim=1)
    recorded = run.outputs["y"].transpose(0, 1)
    assert_near(real_tokens(y, mask), real_tokens(recorded, mask), bound(run, "y", dtype))
    if run.cotangents and dtype == torch.float64:
        whole = slice(None) if mask is None else ~mask.any(dim=1)
        (y * run.cotangents["y"].transpose(0, 1))[whole].sum().backward()
        assert_near(x.grad[whole], run.input_gradients["x"].transpose(0, 1)[whole], EXACT)
