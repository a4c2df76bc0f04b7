"""The oracle against the recorded numbers of the original code, to 1e-10, gradients included.

Where the original is known to be wrong, the oracle has to differ; what it does at padding is left out.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracles
from golden_data import Case, Run, block_params, cases, ema_params, is_truth, layer_params, norm_params, runs, true_runs

ACTIVATION_NAMES = {"gelu_accurate": "gelu_tanh"}
PAD = 1


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """No number is further off than the tolerance, relative to max(1, |expected|)."""
    assert actual.shape == expected.shape
    error = ((actual - expected).abs() / expected.abs().clamp(min=1)).max().item() if expected.numel() else 0.0
    assert error <= tolerance, f"off by {error:.1e}"


def trainable(case: Case) -> dict[str, Tensor]:
    """The weights of a case, ready for gradients."""
    return {key: value.requires_grad_(value.is_floating_point()) for key, value in case.state.items()}


def batch_first(tensors: dict[str, Tensor], *names: str) -> list[Tensor]:
    """The named time-major tensors as (B, L, D) leaves, ready for gradients."""
    return [tensors[name].transpose(0, 1).contiguous().requires_grad_() for name in names]


def real_tokens(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """All real tokens of a (B, L, D) batch, one after the other."""
    return x.flatten(0, 1) if padding_mask is None else x[~padding_mask]


def assert_gradients(run: Run, state: dict[str, Tensor]) -> None:
    """The weights' `.grad` are the recorded gradients."""
    recorded = run.gradients
    assert recorded
    for key, expected in recorded.items():
        assert_close(state[key].grad, expected)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The greatest distance between two numbers in the same place, infinite where one is NaN."""
    return (actual - expected).abs().nan_to_num(float("inf")).max().item()


def block_options(args: dict) -> dict:
    """The options of an attention block that was built with `args`."""
    return {
        "attention": args["attention_activation"],
        "activation": ACTIVATION_NAMES.get(args["activation"], args["activation"]),
        "bias": args["rel_pos_bias"],
        "norm": args["norm_type"],
        "prenorm": args["prenorm"],
    }


def sight_options(args: dict) -> dict:
    """What a gated attention that was built with `args` sees."""
    chunk_size = args["chunk_size"] if args["chunk_size"] > 0 else None
    return {"causal": not args["bidirectional"], "chunk_size": chunk_size, "truncation": args["truncation"]}


def stack_options(args: dict, side: str) -> dict:
    """The options of the encoder's or decoder's layers of a model that was built with `args`."""
    return {
        "attention": args["attention_activation_fn"],
        "activation": ACTIVATION_NAMES.get(args["activation_fn"], args["activation_fn"]),
        "bias": args["rel_pos_bias"],
        "norm": args["normalization_type"],
        "prenorm": args["normalize_before"],
        "chunk_size": args[f"{side}_chunk_size"] if args[f"{side}_chunk_size"] > 0 else None,
        "truncation": args["truncation_length"],
    }


# The EMA


def fairseq_ema(x: Tensor, params: dict[str, Tensor], args: dict, padding_mask: Tensor | None = None) -> Tensor:
    """The original's EMA with its SiLU, in the oracle's words."""
    names = (params[name] for name in oracles.EMA_NAMES)
    options = {"causal": not args["bidirectional"], "truncation": args["truncation"]}
    return oracles.silu(oracles.ema(x, *names, padding_mask=padding_mask, **options)[0])


@pytest.mark.parametrize("run", true_runs("fairseq", "ema"), ids=str)
def test_ema(run):
    inputs, outputs, params = run.inputs, run.outputs, ema_params(run.case.state)
    (x,), mask = batch_first(inputs, "x"), inputs.get("mask")
    y = fairseq_ema(x, params, run.case.args, mask)
    assert_close(real_tokens(y, mask), real_tokens(outputs["y"].transpose(0, 1), mask))


@pytest.mark.parametrize("run", [run for run in true_runs("fairseq", "ema") if run.name == "inc"], ids=str)
def test_ema_streams_from_a_hidden_state(run):
    inputs, outputs, state = run.inputs, run.outputs, trainable(run.case)
    names = [ema_params(state)[name] for name in oracles.EMA_NAMES]
    (x,) = batch_first(inputs, "x")
    pieces, hidden = [], None
    for index, segment in enumerate(x.split(inputs["seg"].tolist(), dim=1)):
        y, hidden = oracles.ema(segment, *names, hidden=hidden)
        assert_close(hidden, outputs[f"state{index}"])
        pieces.append(oracles.silu(y))
    y = torch.cat(pieces, dim=1)
    assert_close(y, outputs["y"].transpose(0, 1))
    if run.grad_of:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_gradients(run, state)
        assert_close(x.grad, run.input_gradients["x"].transpose(0, 1))


@pytest.mark.parametrize("run", [run for run in runs("fairseq", "ema") if run.name == "L12_rpad"], ids=str)
def test_ema_gradients(run):
    # The cotangents are not zero at padding. But what the original computes there can be said with the oracle: the
    # averages take nothing in and go on, and the skip sees x as it is. So these gradients can be compared in full.
    inputs, state, args = run.inputs, trainable(run.case), run.case.args
    (x,), params = batch_first(inputs, "x"), ema_params(state)
    real = x * ~inputs["mask"][:, :, None]
    names = [params[name] for name in oracles.EMA_NAMES]
    averaged, _ = oracles.ema(real, *names, causal=not args["bidirectional"], truncation=args["truncation"])
    y = oracles.silu(averaged + params["ema_omega"] * (x - real))
    assert_close(y, run.outputs["y"].transpose(0, 1))
    (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
    assert_gradients(run, state)
    assert_close(x.grad, run.input_gradients["x"].transpose(0, 1))


@pytest.mark.parametrize("run", [run for run in runs("fairseq", "ema") if not is_truth(run)], ids=str)
def test_ema_where_the_original_errs(run):
    inputs, outputs, params, args = run.inputs, run.outputs, ema_params(run.case.state), run.case.args
    x, mask = inputs["x"].transpose(0, 1), inputs.get("mask")
    y = fairseq_ema(x, params, args, mask)
    recorded = outputs["y"].transpose(0, 1)
    if args["truncation"] is not None:
        assert distance(real_tokens(y, mask), real_tokens(recorded, mask)) > 1e-3
    else:
        # Padding follows the real tokens: their outputs are right, the state after them is not.
        _, hidden = oracles.ema(x, *(params[name] for name in oracles.EMA_NAMES), padding_mask=mask)
        last = outputs[f"state{len(inputs['seg']) - 1}"]
        assert_close(real_tokens(y, mask), real_tokens(recorded, mask))
        assert distance(hidden[mask.any(dim=1)], last[mask.any(dim=1)]) > 1e-3


# Biases, norms, feed-forward


@pytest.mark.parametrize("run", true_runs("fairseq", "relpos"), ids=str)
def test_position_bias(run):
    state = trainable(run.case)
    params = block_params({f"rel_pos_bias.{key}": value for key, value in state.items()})
    expected = run.outputs["b"]
    length = range(len(expected))
    if "bias_table" in params:
        bias = oracles.simple_bias(params["bias_table"], length, length)
    else:
        bias = oracles.rotary_bias(params["bias_alpha"], params["bias_beta"], length, length)
    assert_close(bias, expected)
    if run.cotangents:
        (bias * run.cotangents["b"]).sum().backward()
        assert_gradients(run, state)


@pytest.mark.parametrize("run", true_runs("fairseq", "norm"), ids=str)
def test_norm(run):
    inputs, outputs, state, args = run.inputs, run.outputs, trainable(run.case), run.case.args
    (x,), training = batch_first(inputs, "x"), run.mode == "train"
    if run.case.cls == "SequenceNorm":
        params = norm_params(state, "norm.")
        y = oracles.sequence_norm(x, params, args["norm_type"], training=training)
    else:
        norm = {"ScaleNorm": oracles.scale_norm, "RMSNorm": oracles.rms_norm}[run.case.cls]
        y = norm(x, *state.values(), eps=1e-6)
    assert_close(y, outputs["y"].transpose(0, 1))
    if training:
        running = params["norm_running_mean"], params["norm_running_var"]
        _, mean, var = oracles.batch_norm(x, *running, training=True)
        assert_close(mean, outputs["running_mean"])
        assert_close(var, outputs["running_var"])
    if run.cotangents:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_close(x.grad, run.input_gradients["x"].transpose(0, 1))
        if run.gradients:
            assert_gradients(run, state)


@pytest.mark.parametrize("run", true_runs("fairseq", "nffn"), ids=str)
def test_feed_forward(run):
    state, args = trainable(run.case), run.case.args
    (x,) = batch_first(run.inputs, "x")
    y = oracles.feed_forward(
        x,
        block_params(state),
        activation=ACTIVATION_NAMES.get(args["activation"], args["activation"]),
        norm=args["norm_type"],
        prenorm=args["prenorm"],
        training=run.mode == "train",
    )
    assert_close(y, run.outputs["y"].transpose(0, 1))
    if run.cotangents:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_gradients(run, state)
        assert_close(x.grad, run.input_gradients["x"].transpose(0, 1))


# Attention


def assert_weights(weights: list[Tensor], recorded: Tensor, mask: Tensor | None) -> None:
    """Each row's weights are the recorded ones (B, K, C, C), put together and without padding."""
    for index, row in enumerate(weights):
        whole = torch.block_diag(*recorded[index])
        real = torch.ones(len(whole), dtype=torch.bool) if mask is None else ~mask[index]
        assert_close(row, whole[real][:, real])


def assert_gradient_of_unpadded_rows(run: Run, x: Tensor, y: Tensor, name: str, mask: Tensor | None) -> None:
    """The gradient of x is the recorded one in the rows without padding.

    The recorded cotangents are not zero at padding, and what the original computes there is no truth, but it enters
    the gradients of padded rows and of all weights. Those of the weights are compared in whole models, below.
    """
    whole = slice(None) if mask is None else ~mask.any(dim=1)
    (y * run.cotangents["y"].transpose(0, 1))[whole].sum().backward()
    assert_close(x.grad[whole], run.input_gradients[name].transpose(0, 1)[whole])


def gated_attention(run: Run, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The oracle's answer to a run of gated attention."""
    options = {**sight_options(run.case.args), **block_options(run.case.args), "training": run.mode == "train"}
    return oracles.gated_attention(x, block_params(run.case.state), padding_mask=mask, **options)


gated_runs = [run for group in ("mega", "mega_opt", "mega_inc") for run in runs("fairseq", group) if "y" in run.outputs]


@pytest.mark.parametrize("run", [run for run in gated_runs if is_truth(run)], ids=str)
def test_gated_attention(run):
    inputs, outputs = run.inputs, run.outputs
    (x,), mask = batch_first(inputs, "x"), inputs.get("mask")
    y, weights = gated_attention(run, x, mask)
    assert_close(real_tokens(y, mask), real_tokens(outputs["y"].transpose(0, 1), mask))
    if "attn" in outputs:
        assert_weights(weights, outputs["attn"], mask)
    if run.cotangents:
        assert_gradient_of_unpadded_rows(run, x, y, "x", mask)


@pytest.mark.parametrize("run", [run for run in gated_runs if not is_truth(run)], ids=str)
def test_gated_attention_where_the_original_errs(run):
    x, mask, recorded = run.inputs["x"].transpose(0, 1), run.inputs["mask"], run.outputs["y"].transpose(0, 1)
    y, _ = gated_attention(run, x, mask)
    padded = mask.any(dim=1)
    assert distance(y[padded][~mask[padded]], recorded[padded][~mask[padded]]) > 1e-3
    if run.mode == "eval":
        assert_close(y[~padded], recorded[~padded])


@pytest.mark.parametrize("run", true_runs("fairseq", "cross"), ids=str)
def test_cross_attention(run):
    # The original ignores the padding of the queries; so do we here, and then all its numbers are right.
    inputs, outputs, state = run.inputs, run.outputs, trainable(run.case)
    query, memory = batch_first(inputs, "q", "k")
    mask = inputs.get("kmask")
    options = block_options(run.case.args)
    y, weights = oracles.cross_attention(query, memory, block_params(state), memory_padding_mask=mask, **options)
    assert_close(y, outputs["y"].transpose(0, 1))
    for index, row in enumerate(weights):
        recorded = outputs["attn"][index]
        assert_close(row, recorded if mask is None else recorded[:, ~mask[index]])
    if run.cotangents:
        (y * run.cotangents["y"].transpose(0, 1)).sum().backward()
        assert_gradients(run, state)
        assert_close(query.grad, run.input_gradients["q"].transpose(0, 1))
        assert_close(memory.grad, run.input_gradients["k"].transpose(0, 1))


@pytest.mark.parametrize("run", [run for run in runs("fairseq", "cross") if not is_truth(run)], ids=str)
def test_cross_attention_where_the_original_errs(run):
    inputs, recorded = run.inputs, run.outputs["y"].transpose(0, 1)
    query, memory, mask = inputs["q"].transpose(0, 1), inputs["k"].transpose(0, 1), inputs["kmask"]
    options = block_options(run.case.args)
    y, _ = oracles.cross_attention(query, memory, block_params(run.case.state), memory_padding_mask=mask, **options)
    padded = mask.any(dim=1)
    assert distance(y[padded], recorded[padded]) > 1e-3
    assert_close(y[~padded], recorded[~padded])


# Layers and stacks


@pytest.mark.parametrize("run", true_runs("fairseq", "layer"), ids=str)
def test_layer(run):
    inputs, outputs, args = run.inputs, run.outputs, run.case.args
    (x,), mask = batch_first(inputs, "x"), inputs.get("mask")
    layer = layer_params(run.case.state)
    if run.case.cls == "MegaEncoderLayer":
        y = oracles.encoder(x, [layer], padding_mask=mask, **stack_options(args, "encoder"))
    else:
        memory = inputs["enc"].transpose(0, 1) if "enc" in inputs else None
        seen = {"memory": memory, "memory_padding_mask": inputs.get("encmask")}
        y = oracles.decoder(x, [layer], padding_mask=mask, **seen, **stack_options(args, "decoder"))
    assert_close(real_tokens(y, mask), real_tokens(outputs["y"].transpose(0, 1), mask))
    if run.cotangents:
        assert_gradient_of_unpadded_rows(run, x, y, "x", mask)


def fairseq_stack(state: dict[str, Tensor], args: dict, side: str, tokens: Tensor, **memory: Tensor) -> Tensor:
    """The original's encoder or decoder from tokens to hidden states, in the oracle's words."""
    mask, options = tokens.eq(PAD), stack_options(args, side)
    x = F.embedding(tokens, state[f"{side}.embed_tokens.weight"])
    if not args["no_scale_embedding"]:
        x = x * x.shape[-1] ** 0.5
    if args["normalize_embedding"]:
        x = oracles.sequence_norm(x, norm_params(state, f"{side}.embed_norm.norm."), options["norm"])
    final_norm = norm_params(state, f"{side}.final_norm.norm.") if options["prenorm"] else None
    layers = [layer_params(state, f"{side}.layers.{index}.") for index in range(args[f"{side}_layers"])]
    stack = {"encoder": oracles.encoder, "decoder": oracles.decoder}[side]
    return stack(x, layers, padding_mask=mask, final_norm=final_norm, **memory, **options)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The summed loss over real targets."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, reduction="sum")


@pytest.mark.parametrize("run", true_runs("fairseq", "encdec"), ids=str)
def test_encoder_and_decoder(run):
    inputs, outputs, state, args = run.inputs, run.outputs, trainable(run.case), run.case.args
    source, target = inputs["src"], inputs["prev"]
    memory = fairseq_stack(state, args, "encoder", source)
    seen = {"memory": memory, "memory_padding_mask": source.eq(PAD)}
    hidden = fairseq_stack(state, args, "decoder", target, **seen)
    logits = hidden @ state["decoder.output_projection.weight"].T
    if "enc_out" in outputs:
        assert_close(memory, outputs["enc_out"].transpose(0, 1))
    assert_close(logits, outputs["logits"])
    if "ce_sum" in outputs:
        loss = cross_entropy(logits, inputs["target"])
        assert_close(loss, outputs["ce_sum"])
    if run.grad_of == "ce_sum":
        loss.backward()
        assert_gradients(run, state)


plain_language_models = [run for run in true_runs("fairseq", "lm") if not run.case.args["adaptive_input"]]


@pytest.mark.parametrize("run", plain_language_models, ids=str)
def test_decoder_without_memory(run):
    inputs, outputs, state = run.inputs, run.outputs, trainable(run.case)
    hidden = fairseq_stack(state, run.case.args, "decoder", inputs["src"])
    logits = hidden @ state["decoder.output_projection.weight"].T
    assert_close(logits, outputs["out"])
    if run.grad_of == "ce_sum":
        cross_entropy(logits, inputs["target"]).backward()
        assert_gradients(run, state)


inner_runs = [run for group in ("lra", "sc") for run in true_runs("fairseq", group) if "inner0" in run.outputs]


@pytest.mark.parametrize("run", inner_runs, ids=str)
def test_layers_of_classifiers(run):
    # `inner0` goes into the first layer and `inner2` comes out of the last, both filled up to whole chunks.
    inputs, outputs, state, args = run.inputs, run.outputs, run.case.state, run.case.args
    x, last = outputs["inner0"].transpose(0, 1), outputs["inner2"].transpose(0, 1)
    mask = torch.arange(x.shape[1]) >= inputs["lengths"][:, None]
    y = oracles.encoder(
        x,
        [layer_params(state, f"layers.{index}.") for index in range(args["num_encoder_layers"])],
        attention=args["attention_activation"],
        bias=args.get("rel_pos_bias", "simple"),
        norm=args["norm_type"],
        prenorm=args["normalize_before"],
        chunk_size=args.get("chunk_size"),
        truncation=args["truncation"],
        padding_mask=mask,
        training=run.mode == "train",
    )
    assert_close(real_tokens(y, mask), real_tokens(last, mask))


# What the numbers of others cannot show


def chunked_block() -> dict[str, Tensor]:
    """The parameters of a causal block of D = 8 with a rotary bias."""
    name = "mega.softmax_rotary_causal_chunk4_pre"
    return block_params(trainable(next(case for case in cases("fairseq", "mega") if case.name == name)))


def test_padding_is_deletion_even_where_it_holds_nan():
    params = chunked_block()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 0, 0, 1, 0, 1], [1] * 7, [0] * 7], dtype=torch.bool)
    x[mask] = float("nan")
    x.requires_grad_()
    y, weights = oracles.gated_attention(x, params, causal=True, chunk_size=3, padding_mask=mask)
    alone, _ = oracles.gated_attention(x[:1, ~mask[0]], params, causal=True, chunk_size=3)
    assert torch.equal(y[0, ~mask[0]], alone[0])
    assert torch.equal(y[mask], torch.zeros_like(y[mask]))
    assert [tuple(row.shape) for row in weights] == [(4, 4), (0, 0), (7, 7)]
    x_grad, *grads = torch.autograd.grad(y.square().sum(), [x, *params.values()])
    assert torch.equal(x_grad[mask], torch.zeros_like(x_grad[mask]))
    assert all(grad.isfinite().all() for grad in (x_grad, *grads))


@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
def test_a_query_that_sees_nothing_gets_nothing(attention):
    queries, none = torch.ones(2, 4, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64)
    mixed, weights = oracles.attend(queries, none, none, [[], []], attention=attention)
    assert torch.equal(mixed, torch.zeros(2, 4, dtype=torch.float64))
    assert weights.shape == (2, 0)


def test_a_truncation_beyond_the_row_changes_nothing():
    params = chunked_block()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    names = [params[name] for name in oracles.EMA_NAMES]
    assert_close(oracles.ema(x, *names, truncation=9)[0], oracles.ema(x, *names)[0], 1e-14)


def test_the_rotary_bias_is_a_product_of_turned_vectors():
    alpha, beta = torch.randn(2, 6, dtype=torch.float64)

    def turned(vector: Tensor, position: int) -> Tensor:
        angle = position * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
        first, second = vector.split(3)
        return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()])

    expected = torch.stack([torch.stack([turned(alpha, i) @ turned(beta, j) for j in range(5)]) for i in range(7)])
    assert_close(oracles.rotary_bias(alpha, beta, range(7), range(5)), expected, 1e-14)


@pytest.mark.parametrize("source", ["fairseq", "hf"])
def test_every_recorded_case_can_be_read(source):
    for case in cases(source):
        assert case.state or case.name.endswith("noaff")
        for run in case.runs:
            assert set(run.inputs) == set(run.record["in"])
            assert set(run.outputs) == set(run.record["out"])
            assert bool(run.gradients or run.input_gradients) == bool(run.grad_of)
