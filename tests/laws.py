"""The laws, each a function of a block and a case, and the blocks that they are for.

A block is described by a small adapter: how to make the module, how to call it, how to start a stream, what the oracle
says. A block that is entered in `BLOCKS` is held to every law that applies to it.

Claims of exactness are made in float64, where rounding stays below 1e-10 of the numbers' scale.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils import _pytree as pytree

import oracles
from loading import oracle_params
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
from megablocks.state import detach, select_rows
from strategies import Case, Sample

EXACT = 1e-10


# Adapters


def call_with_mask(module: nn.Module, sample: Sample, state: Any = None) -> Any:
    """Calls `module(x, padding_mask=...)`, in a stream with its state."""
    streaming = {} if state is None else {"state": state}
    return module(sample.x, padding_mask=sample.padding_mask, **streaming)


def call_with_memory(module: nn.Module, sample: Sample, state: Any = None) -> Any:
    """Calls `module(x, memory, ...)`, or, in a stream, `module(x, state=...)`: the state holds the memory."""
    if state is not None:
        return module(sample.x, padding_mask=sample.padding_mask, state=state)
    masks = {"padding_mask": sample.padding_mask, "memory_padding_mask": sample.memory_padding_mask}
    return module(sample.x, sample.memory, **masks)


@dataclass(frozen=True, kw_only=True, repr=False)
class Block:
    """A module under the laws."""

    name: str
    make: Callable[[Case, torch.dtype, str], nn.Module]
    """Makes the module of a case, in a precision, on a device."""
    oracle: Callable[[dict[str, Tensor], Case, Sample], Tensor]
    """What it should give, from `params(module)`."""
    params: Callable[[nn.Module], Any] = oracle_params
    call: Callable[..., Any] = call_with_mask
    start: Callable[[nn.Module, Case, Sample], Any] | None = None
    """Makes the state before the first token; `None` for a block that does not stream."""
    final: Callable[[dict[str, Tensor], Case, Sample], list[Tensor | None]] | None = None
    """The leaves that the final state should have; `None` for a leaf that is left open."""
    sequence: bool = True
    """Whether it maps a padded (B, L, D) to another."""
    causal: bool = True
    """Whether it looks back only when the case is causal."""
    memory: bool = False
    chunked: bool = False
    normed: bool = False
    """Whether it has the case's norm."""
    largest: tuple[tuple[torch.dtype, float], ...] = ((torch.float32, 1e4), (torch.float64, 1e12))
    """How large a later input may be without an earlier output feeling it: beyond, a row's own norm overflows."""

    def build(self, case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module of a case, with parameters large enough for every term to matter."""
        torch.manual_seed(case.seed)
        module = self.make(case, dtype, "cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 2.0) if name.endswith("var") else buffer.normal_()
        return module.train(case.training)

    def __repr__(self) -> str:
        return self.name

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)  # for hypothesis, which would print every field


def gated_options(case: Case) -> dict[str, Any]:
    """Options of both kinds of attention."""
    return {
        "attention": case.attention,
        "activation": case.activation,
        "norm": case.norm,
        "prenorm": case.prenorm,
    }


def position_bias(case: Case, max_positions: int, made_as: dict[str, Any]) -> nn.Module | str | None:
    """The case's bias, as an argument."""
    return SimpleRelativeBias(max_positions, **made_as) if case.bias == "simple" else case.bias


def ema_causal(case: Case) -> bool:
    """Whether the average within the case's attention looks back only."""
    return case.causal or case.causal_ema


def make_ema(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The EMA of a case."""
    options = {"causal": case.causal, "truncation": case.truncation, "device": device, "dtype": dtype}
    return MultiDimensionDampedEMA(case.embed_dim, case.ema_dim, **options)


def make_attention(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The gated attention of a case."""
    made_as = {"device": device, "dtype": dtype}
    return MovingAverageGatedAttention(
        case.embed_dim,
        case.qk_dim,
        value_dim=case.value_dim,
        ema=make_ema(case.but(causal=ema_causal(case)), dtype, device),
        causal=case.causal,
        chunk_size=case.chunk_size,
        position_bias=position_bias(case, case.max_positions, made_as),
        **gated_options(case),
        **made_as,
    )


def make_cross_attention(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The cross-attention of a case."""
    made_as = {"device": device, "dtype": dtype}
    bias = position_bias(case, case.max_cross_positions, made_as)
    return GatedCrossAttention(case.embed_dim, case.qk_dim, position_bias=bias, **gated_options(case), **made_as)


def make_feed_forward(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The feed-forward layer of a case."""
    options = {key: value for key, value in gated_options(case).items() if key != "attention"}
    return NormalizedFFN(case.embed_dim, case.ffn_dim, **options, device=device, dtype=dtype)


def make_norm(case: Case, dtype: torch.dtype, device: str) -> nn.Module:
    """The norm of a case; a layer norm where it has none."""
    return SequenceNorm(case.embed_dim, norm=case.norm or "layernorm", device=device, dtype=dtype)


def ema_oracle(params: dict[str, Tensor], case: Case, sample: Sample) -> Tensor:
    """The EMA, slowly."""
    names = (params[name] for name in oracles.EMA_NAMES)
    options = {"causal": case.causal, "truncation": case.truncation, "padding_mask": sample.padding_mask}
    return oracles.ema(sample.x, *names, **options)[0]


def ema_final(params: dict[str, Tensor], case: Case, sample: Sample) -> list[Tensor | None]:
    """The averages after the last real token, or the last real tokens that a truncated average still needs."""
    if case.truncation is None:
        names = (params[name] for name in oracles.EMA_NAMES)
        return [oracles.ema(sample.x, *names, padding_mask=sample.padding_mask)[1]]
    nothing = torch.zeros(case.truncation, case.embed_dim, dtype=torch.float64)
    rows = oracles.real_rows(sample.x, sample.padding_mask)
    return [torch.stack([torch.cat([nothing, row])[-case.truncation :] for row in rows])]


def attention_oracle(params: dict[str, Tensor], case: Case, sample: Sample) -> Tensor:
    """Gated attention, slowly."""
    return oracles.gated_attention(
        sample.x,
        params,
        causal=case.causal,
        ema_causal=ema_causal(case),
        chunk_size=case.chunk_size,
        truncation=case.truncation,
        bias=case.bias,
        padding_mask=sample.padding_mask,
        training=case.training,
        **gated_options(case),
    )[0]


def attention_final(params: dict[str, Tensor], case: Case, sample: Sample) -> list[Tensor | None]:
    """The EMA's final state, keys and values of the chunk that is being filled, and its length."""
    normed = oracles.sequence_norm(sample.x, params, case.norm, padding_mask=sample.padding_mask)
    normed = normed if case.prenorm else sample.x
    averages = ema_oracle(params, case, sample._replace(x=normed))
    D, Z = case.embed_dim, case.qk_dim
    shared = oracles.silu(oracles.silu(averages) @ params["mx_w"][D : D + Z].T + params["mx_b"][D : D + Z])
    keys = shared * params["qk_weight"][1] + params["qk_bias"][1]
    values = oracles.ACTIVATIONS[case.activation](normed @ params["v_w"].T + params["v_b"])
    slots = case.chunk_size or case.capacity or case.length

    def kept(x: Tensor) -> tuple[Tensor, Tensor]:
        filled = []
        for row in oracles.real_rows(x, sample.padding_mask):
            first = 0 if case.chunk_size is None else len(row) // case.chunk_size * case.chunk_size
            filled.append(row[first:])
        lengths = torch.tensor([len(row) for row in filled])
        empty = torch.zeros(slots, x.shape[-1], dtype=torch.float64)
        return torch.stack([torch.cat([row, empty])[:slots] for row in filled]), lengths

    (keys, lengths), (values, _) = kept(keys), kept(values)
    return [*ema_final(params, case, sample._replace(x=normed)), keys, values, lengths]


def cross_oracle(params: dict[str, Tensor], case: Case, sample: Sample) -> Tensor:
    """Cross-attention, slowly."""
    masks = {"padding_mask": sample.padding_mask, "memory_padding_mask": sample.memory_padding_mask}
    options = {"bias": case.bias, "training": case.training, **gated_options(case)}
    return oracles.cross_attention(sample.x, sample.memory, params, **masks, **options)[0]


def cross_final(params: dict[str, Tensor], case: Case, sample: Sample) -> list[Tensor | None]:
    """The projected memory, open at its padding, and how many real queries have come."""
    memory, padded = sample.memory, sample.memory_padding_mask
    keys = memory @ params["k_w"].T + params["k_b"]
    values = oracles.ACTIVATIONS[case.activation](memory @ params["v_w"].T + params["v_b"])
    if padded is None:
        padded = torch.zeros(memory.shape[:2], dtype=torch.bool)
    rows = oracles.real_rows(sample.x, sample.padding_mask)
    open_at_padding = [None, None] if padded.any() else [keys, values]
    return [*open_at_padding, padded, torch.tensor([len(row) for row in rows])]


def feed_forward_oracle(params: dict[str, Tensor], case: Case, sample: Sample) -> Tensor:
    """The feed-forward layer, slowly."""
    options = {key: value for key, value in gated_options(case).items() if key != "attention"}
    return oracles.feed_forward(sample.x, params, padding_mask=sample.padding_mask, training=case.training, **options)


def norm_oracle(params: dict[str, Tensor], case: Case, sample: Sample) -> Tensor:
    """The norm, slowly."""
    name = case.norm or "layernorm"
    return oracles.sequence_norm(sample.x, params, name, padding_mask=sample.padding_mask, training=case.training)


def call_alone(module: nn.Module, sample: Sample, state: Any = None) -> Tensor:
    """Calls a module that knows of no padding."""
    return module(sample.x)


def call_bias(module: nn.Module, sample: Sample, state: Any = None) -> Tensor:
    """Calls a bias for as many positions as there are tokens."""
    return module(sample.x.shape[1])


BLOCKS = [
    Block(
        name="ema",
        make=make_ema,
        oracle=ema_oracle,
        start=lambda module, case, sample: module.init_state(case.batch),
        final=ema_final,
        # A sum of products: the largest disturbance may be as large as float32 bears.
        largest=((torch.float32, 1e30), (torch.float64, 1e200)),
    ),
    Block(
        name="attention",
        make=make_attention,
        oracle=attention_oracle,
        start=lambda module, case, sample: module.init_state(
            case.batch, capacity=None if case.chunk_size else case.capacity
        ),
        final=attention_final,
        chunked=True,
        normed=True,
    ),
    Block(
        name="cross_attention",
        make=make_cross_attention,
        oracle=cross_oracle,
        call=call_with_memory,
        start=lambda module, case, sample: module.init_state(sample.memory, sample.memory_padding_mask),
        final=cross_final,
        memory=True,
        normed=True,
    ),
    Block(name="feed_forward", make=make_feed_forward, oracle=feed_forward_oracle, normed=True),
    Block(name="sequence_norm", make=make_norm, oracle=norm_oracle, normed=True),
    Block(
        name="scale_norm",
        make=lambda case, dtype, device: ScaleNorm(dtype=dtype, device=device),
        params=lambda module: module.weight,
        oracle=lambda weight, case, sample: oracles.scale_norm(sample.x, weight, eps=1e-6),
        call=call_alone,
        sequence=False,
    ),
    Block(
        name="rms_norm",
        make=lambda case, dtype, device: RMSNorm(case.embed_dim, dtype=dtype, device=device),
        params=lambda module: module.weight,
        oracle=lambda weight, case, sample: oracles.rms_norm(sample.x, weight, eps=1e-6),
        call=call_alone,
        sequence=False,
    ),
    Block(
        name="simple_bias",
        make=lambda case, dtype, device: SimpleRelativeBias(
            case.length + case.spare_positions, dtype=dtype, device=device
        ),
        oracle=lambda params, case, sample: oracles.simple_bias(
            params["bias_table"], range(case.length), range(case.length)
        ),
        call=call_bias,
        sequence=False,
    ),
    Block(
        name="rotary_bias",
        make=lambda case, dtype, device: RotaryRelativeBias(2 * case.qk_dim, dtype=dtype, device=device),
        oracle=lambda params, case, sample: oracles.rotary_bias(
            params["bias_alpha"], params["bias_beta"], range(case.length), range(case.length)
        ),
        call=call_bias,
        sequence=False,
    ),
]


# Comparing


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = EXACT, *, floor: float = 0.0) -> None:
    """No number is further off than the tolerance times the largest expected number, which `floor` stands in for."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not expected.is_floating_point() or expected.numel() == 0:
        assert torch.equal(actual, expected)
        return
    assert bool(actual.isfinite().all()), "not finite"
    scale = max(expected.abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"off by {error:.1e} of the scale {scale:.1e}"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same numbers to the last bit, NaN in the same places."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_states_close(actual: Any, expected: Any) -> None:
    """Two states of one kind hold the same numbers."""
    found, structure = pytree.tree_flatten(actual)
    wanted, same_structure = pytree.tree_flatten(expected)
    assert structure == same_structure
    for leaf, other in zip(found, wanted, strict=True):
        assert leaf.dtype == other.dtype
        assert_close(leaf, other)


def gradients(y: Tensor, module: nn.Module, *inputs: Tensor, retain_graph: bool = False) -> list[Tensor]:
    """Gradients of a drawn combination of the outputs: inputs first, then every parameter that requires one."""
    if not y.requires_grad:  # the oracle's answer to nothing but padding
        return [torch.zeros_like(tensor) for tensor in (*inputs, *module.parameters())]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    wanted = [*inputs, *module.parameters()]
    found = torch.autograd.grad(
        (y * weights).sum(), wanted, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)


def assert_gradients_close(
    actual: list[Tensor], expected: list[Tensor], tolerance: float = EXACT, *, size: float = 1.0
) -> None:
    """Each gradient is right to the tolerance times its own scale, where its terms cancel 1% of the largest.

    A norm that subtracts a mean leaves the rounding of inputs of `size` behind: it may cancel all but that.
    """
    floor = (
        1e-2
        * max(1.0, size)
        * max((gradient.abs().max().item() for gradient in expected if gradient.numel()), default=0.0)
    )
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found, wanted, tolerance, floor=floor)


def leaf(sample: Sample) -> Sample:
    """The sample with float tensors that want gradients."""
    return sample._replace(
        x=sample.x.clone().requires_grad_(),
        memory=None if sample.memory is None else sample.memory.clone().requires_grad_(),
    )


def centred_size(case: Case) -> float:
    """The size of what the case's norm subtracts a mean from."""
    return case.magnitude if case.norm in ("layernorm", "batchnorm") else 1.0


def float_inputs(block: Block, sample: Sample) -> list[Tensor]:
    """The inputs of a block that may have gradients."""
    return [tensor for tensor in (sample.x, sample.memory if block.memory else None) if tensor is not None]


def piece(sample: Sample, start: int, end: int) -> Sample:
    """A segment of the sample."""
    padded = sample.padding_mask
    return sample._replace(x=sample.x[:, start:end], padding_mask=None if padded is None else padded[:, start:end])


def stream(block: Block, module: nn.Module, case: Case, sample: Sample, cuts: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The output of the sample given piece by piece, and the final state."""
    state, done, outputs = block.start(module, case, sample), 0, []
    for length in cuts:
        y, state = block.call(module, piece(sample, done, done + length), state)
        outputs.append(y)
        done += length
    return torch.cat(outputs, dim=1), state


# The laws


def causal(block: Block, case: Case) -> None:
    """Law 1: what comes from `at` on moves no earlier output, however large it is."""
    for dtype, size in block.largest:
        module, sample = block.build(case, dtype), leaf(case.sample(dtype))
        later = case.but(seed=case.seed + 1, magnitude=size).sample(dtype).x
        y = block.call(module, sample)
        disturbed = torch.cat([sample.x[:, : case.at], later[:, case.at :]], dim=1)
        before = block.call(module, sample._replace(x=disturbed))[:, : case.at]
        if case.at:
            # Other lengths of sums may round otherwise: a bound of a few roundings that knows nothing of `size`.
            assert_close(before, y[:, : case.at], 32 * torch.finfo(dtype).eps)
            (gradient, *_) = gradients(y[:, : case.at], module, sample.x)
            assert_same(gradient[:, case.at :], torch.zeros_like(gradient[:, case.at :]))


def any_cut(block: Block, case: Case) -> None:
    """Law 2: a stream cut anywhere equals one pass, gradients included, and ends in the same state."""
    module, sample = block.build(case), leaf(case.sample())
    whole = block.call(module, sample)
    once, last = stream(block, module, case, sample, (case.length,))
    pieces, final = stream(block, module, case, sample, case.cuts)
    assert_close(once, whole)
    assert_close(pieces, whole)
    assert_states_close(final, last)
    inputs = float_inputs(block, sample)
    found, expected = gradients(pieces, module, *inputs), gradients(whole, module, *inputs)
    assert_gradients_close(found, expected, size=centred_size(case))


def chunks_that_hold_everything(block: Block, case: Case) -> None:
    """Law 3: a chunk size of at least the length equals no chunking."""
    whole = case.but(chunk_size=None, capacity=None)
    y = block.call(block.build(whole), case.sample())
    for chunk_size in (case.length, case.length + 1, case.length + 64):
        chunked = block.build(whole)
        chunked.chunk_size = chunk_size
        assert_close(block.call(chunked, case.sample()), y)


def chunk_borders(block: Block, case: Case) -> None:
    """Law 3: attention does not cross a chunk border; an average of one lag leaves no other way across."""
    case = case.but(truncation=1, padding=None, chunk_size=case.chunk_size or 3)
    module, sample = block.build(case), case.sample()
    chunk = case.at // case.chunk_size
    start, end = chunk * case.chunk_size, min((chunk + 1) * case.chunk_size, case.length)
    other = case.but(seed=case.seed + 1).sample().x
    disturbed = sample.x.clone()
    disturbed[:, start:end] = other[:, start:end]
    y, moved = (block.call(module, sample._replace(x=x)) for x in (sample.x, disturbed))
    assert_close(moved[:, :start], y[:, :start])
    assert_close(moved[:, end:], y[:, end:])


def padding_is_deletion(block: Block, case: Case) -> None:
    """Law 4: each row gives what it gives alone and without its padding; at padding, zeros; NaN there is inert."""
    module, sample = block.build(case), case.sample()
    y = block.call(module, sample)
    for row in range(case.batch):
        real = torch.ones(case.length, dtype=torch.bool)
        if sample.padding_mask is not None:
            real = ~sample.padding_mask[row]
        assert_same(y[row, ~real], torch.zeros_like(y[row, ~real]))
        if not real.any():
            continue
        alone = Sample(sample.x[row : row + 1, real], None, sample.memory[row : row + 1])
        if block.memory and sample.memory_padding_mask is not None:
            padded = sample.memory_padding_mask[row]
            # A memory of nothing but padding cannot be deleted: one slot of padding is left of it.
            kept = ~padded if not padded.all() else torch.arange(len(padded)) == 0
            alone = alone._replace(memory=alone.memory[:, kept], memory_padding_mask=padded[kept][None])
        assert_close(y[row : row + 1, real], block.call(module, alone))

    calm, wild = leaf(hidden_padding(sample, 0.0)), leaf(hidden_padding(sample, float("nan")))
    y_calm, y_wild = block.call(module, calm), block.call(module, wild)
    assert_same(y_wild, y_calm)
    inputs, wild_inputs = float_inputs(block, calm), float_inputs(block, wild)
    for calm_gradient, gradient in zip(
        gradients(y_calm, module, *inputs), gradients(y_wild, module, *wild_inputs), strict=True
    ):
        assert bool(gradient.isfinite().all())
        assert_same(gradient, calm_gradient)
    gradient = gradients(block.call(module, wild), module, wild.x)[0]
    if sample.padding_mask is not None:
        assert not gradient[sample.padding_mask].any()


def hidden_padding(sample: Sample, value: float) -> Sample:
    """The sample with another value under its padding."""
    x, memory = sample.x.clone(), sample.memory.clone()
    if sample.padding_mask is not None:
        x[sample.padding_mask] = value
    if sample.memory_padding_mask is not None:
        memory[sample.memory_padding_mask] = value
    return sample._replace(x=x, memory=memory)


def batch_statistics(block: Block, case: Case) -> None:
    """Law 4: in training, batch-norm statistics are those of the real tokens; a batch of padding leaves them alone."""
    case = case.but(norm="batchnorm", training=True, magnitude=min(case.magnitude, 30.0))
    module = block.build(case)
    params = {name: value.detach().clone() for name, value in block.params(module).items()}
    seen = []
    norm = next(part for part in module.modules() if isinstance(part, SequenceNorm))
    norm.register_forward_pre_hook(lambda part, args: seen.append(args[0].detach()))
    sample = case.sample()
    y = block.call(module, hidden_padding(sample, float("nan")))
    assert_close(y, block.oracle(params, case, sample))
    # The padding of what came into the norm is no concern of the oracle's, unless the numbers there are.
    running = params["norm_running_mean"], params["norm_running_var"]
    _, mean, var = oracles.batch_norm(seen[0], *running, training=True, padding_mask=sample.padding_mask)
    assert_close(norm.norm.running_mean, mean)
    assert_close(norm.norm.running_var, var)


def pure(block: Block, case: Case) -> None:
    """Law 5: a call writes into nothing, old states stay valid, changed weights take effect at once."""
    module, sample = block.build(case), case.sample()
    tensors = [*module.parameters(), *module.buffers(), *(tensor for tensor in sample if tensor is not None)]
    before = [tensor.detach().clone() for tensor in tensors]
    attributes = [dict(vars(part)) for part in module.modules()]
    with torch.no_grad():
        first = block.call(module, sample)
    second = block.call(module, sample)
    assert_same(second.detach(), first)
    for tensor, old in zip(tensors, before, strict=True):
        assert_same(tensor.detach(), old)
    for part, old in zip(module.modules(), attributes, strict=True):
        assert list(vars(part)) == list(old)
        assert all(vars(part)[key] is old[key] for key in old)

    # Gradients after a call without them, twice through one graph, and through two graphs.
    once = gradients(second, module, retain_graph=True)
    again = gradients(second, module)
    other = gradients(block.call(module, sample), module)
    for gradient, same, third in zip(once, again, other, strict=True):
        assert_same(same, gradient)
        assert_same(third, gradient)

    stranger = block.build(case.but(seed=case.seed + 1))
    module.load_state_dict(stranger.state_dict())
    assert_same(block.call(module, sample).detach(), block.call(stranger, sample).detach())
    with torch.no_grad():
        for parameter in [*module.parameters(), *stranger.parameters()]:
            parameter.mul_(0.5)
    fresh = block.build(case)
    fresh.load_state_dict(stranger.state_dict())
    assert_same(block.call(module, sample).detach(), block.call(fresh, sample).detach())
    # A trip to another precision and back leaves nothing of it behind.
    module.to(torch.bfloat16)
    block.call(module, case.sample(torch.bfloat16))
    module.to(torch.float64).load_state_dict(fresh.state_dict())
    assert_same(block.call(module, sample).detach(), block.call(fresh, sample).detach())


def states_are_values(block: Block, case: Case) -> None:
    """Law 5: a state is never written into; what was computed from it once comes again."""
    module, sample = block.build(case), case.sample()
    head, tail = piece(sample, 0, case.at), piece(sample, case.at, case.length)
    with torch.no_grad():
        state = block.start(module, case, sample)
        if case.at:
            _, state = block.call(module, head, state)
        kept = pytree.tree_map_only(Tensor, torch.clone, state)
        y, after = block.call(module, tail, state)
        y_again, after_again = block.call(module, tail, state)
    for old, new in ((kept, state), (after, after_again)):
        for leaf_before, leaf_after in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
            assert_same(leaf_after, leaf_before)
    assert_same(y_again, y)


def oracle(block: Block, case: Case) -> None:
    """Law 6: forward, every gradient and the final state are those of the plain loop."""
    module, sample = block.build(case), leaf(case.sample())
    slow = leaf(sample)
    y, expected = block.call(module, sample), block.oracle(block.params(module), case, slow)
    assert_close(y, expected)
    inputs, slow_inputs = float_inputs(block, sample), float_inputs(block, slow)
    found, wanted = gradients(y, module, *inputs), gradients(expected, module, *slow_inputs)
    assert_gradients_close(found, wanted, size=centred_size(case))


def oracle_state(block: Block, case: Case) -> None:
    """Law 6: the state after a stream is the one that the plain loop ends in."""
    module, sample = block.build(case), case.sample()
    with torch.no_grad():
        _, state = stream(block, module, case, sample, case.cuts)
        expected = block.final(block.params(module), case, sample)
    for found, wanted in zip(pytree.tree_leaves(state), expected, strict=True):
        if wanted is not None:
            assert_close(found, wanted)


def precision(block: Block, case: Case, dtype: torch.dtype) -> None:
    """Law 7: in half precision the output has the input's dtype and the error of a few roundings."""
    torch.manual_seed(case.seed)
    module = block.make(case, dtype, "cpu").eval()
    exact = block.make(case, torch.float64, "cpu").eval()
    exact.load_state_dict(module.state_dict())
    sample = case.sample(dtype)
    y = block.call(module, sample)
    wide = sample._replace(x=sample.x.double(), memory=sample.memory.double())
    assert y.dtype == dtype or not block.sequence
    assert_close(y, block.call(exact, wide), 8 * torch.finfo(dtype).eps, floor=1.0)


def autocast(block: Block, case: Case, dtype: torch.dtype) -> None:
    """Law 7: under autocast too the output has the input's dtype and the error of a few roundings."""
    torch.manual_seed(case.seed)
    module, sample = block.make(case, torch.float32, "cpu").eval(), case.sample(torch.float32)
    y = block.call(module, sample)
    with torch.autocast("cpu", dtype):
        lower = block.call(module, sample)
        state = None if block.start is None or not case.causal else stream(block, module, case, sample, case.cuts)[1]
    assert lower.dtype == torch.float32
    assert_close(lower, y, 8 * torch.finfo(dtype).eps, floor=1.0)
    if block.name == "ema":
        assert_same(lower, y)
    ema_state = state if block.name == "ema" else getattr(state, "ema", None)
    assert all(tensor.dtype == torch.float32 for tensor in pytree.tree_leaves(ema_state) if tensor is not None)


def seeds_reproduce(block: Block, case: Case) -> None:
    """Law 9: the seed decides the parameters, `reset_parameters` draws them likewise."""
    one, same, other = (block.build(case.but(seed=seed)).state_dict() for seed in (case.seed, case.seed, case.seed + 1))
    for name, tensor in one.items():
        assert_same(same[name], tensor)
        assert not tensor.is_floating_point() or not torch.equal(other[name], tensor)
    torch.manual_seed(case.seed)
    made = block.make(case, torch.float64, "cpu")
    reset = copy.deepcopy(made)
    with torch.no_grad():
        for tensor in [*reset.parameters(), *reset.buffers()]:
            tensor.fill_(7)
    reset.reset_parameters()
    for name, tensor in made.state_dict().items():
        found = reset.state_dict()[name]
        assert bool((found != 7).all()), name
        # What is not drawn at random is what it was.
        if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()) and tensor.numel() > 1:
            assert_same(found, tensor)


def copies(block: Block, case: Case) -> None:
    """Law 9: `state_dict`, `copy.deepcopy`, `pickle` and the `meta` device."""
    module, sample = block.build(case).eval(), case.sample()
    y = block.call(module, sample)
    loaded = block.make(case, torch.float64, "cpu").eval()
    loaded.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    saved = block.make(case, torch.float64, "cpu").eval()
    saved.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for twin in (loaded, saved, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(block.call(twin, sample), y)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))

    on_meta = block.make(case, torch.float64, "meta").eval()
    on_meta_sample = Sample(*(None if tensor is None else tensor.to("meta") for tensor in sample))
    shape = block.call(on_meta, on_meta_sample)
    assert (shape.shape, shape.device.type) == (y.shape, "meta")
    materialised = on_meta.to_empty(device="cpu")
    materialised.reset_parameters()
    materialised.load_state_dict(module.state_dict())
    assert_same(block.call(materialised, sample), y)


def states_travel(block: Block, case: Case) -> None:
    """Law 9: states survive `torch.save`, and `select_rows` picks, reorders and repeats their rows."""
    module, sample = block.build(case), case.sample()
    with torch.no_grad():
        state = block.start(module, case, sample)
        if case.at:
            _, state = block.call(module, piece(sample, 0, case.at), state)
        tail = piece(sample, case.at, case.length)
        y, final = block.call(module, tail, state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        assert type(loaded) is type(state)
        y_loaded, final_loaded = block.call(module, tail, detach(loaded))
        assert_same(y_loaded, y)
        assert_states_close(final_loaded, final)

        rows = torch.tensor([case.batch - 1, 0, case.batch - 1, case.batch // 2])
        picked = Sample(*(None if tensor is None else tensor[rows] for tensor in tail))
        y_rows, final_rows = block.call(module, picked, select_rows(state, rows))
        assert_close(y_rows, y[rows])
        assert_states_close(final_rows, select_rows(final, rows))


def compiled(block: Block, case: Case) -> None:
    """Law 9: `torch.compile(fullgraph=True)` gives the same outputs and gradients."""
    torch._dynamo.reset()
    module, sample = block.build(case, torch.float32).eval(), leaf(case.sample(torch.float32))

    def call(sample: Sample) -> Any:
        return block.call(module, sample)

    fast = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, expected = fast(sample), block.call(module, sample)
    inputs = float_inputs(block, sample)
    # Graphs may order sums otherwise: a few dozen roundings of float32.
    bound = 64 * torch.finfo(torch.float32).eps
    assert_close(y, expected, bound)
    assert_gradients_close(gradients(y, module, *inputs), gradients(expected, module, *inputs), bound)


def compiled_stream(block: Block, case: Case) -> None:
    """Law 9: one graph serves every step of a stream whose state has a fixed shape."""
    torch._dynamo.reset()
    module, sample = block.build(case, torch.float32).eval(), case.sample(torch.float32)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(token: Sample, state: Any) -> Any:
        return block.call(module, token, state)

    fast = torch.compile(step, fullgraph=True, backend=count)
    with torch.no_grad():
        state = slow_state = block.start(module, case, sample)
        for start in range(case.length):
            token = piece(sample, start, start + 1)
            y, state = fast(token, state)
            expected, slow_state = block.call(module, token, slow_state)
            assert_close(y, expected, 64 * torch.finfo(torch.float32).eps)
    assert len(graphs) == 1


LAWS = {
    law.__name__: law
    for law in (
        causal,
        any_cut,
        chunks_that_hold_everything,
        chunk_borders,
        padding_is_deletion,
        batch_statistics,
        pure,
        states_are_values,
        oracle,
        oracle_state,
        precision,
        autocast,
        seeds_reproduce,
        copies,
        states_travel,
        compiled,
        compiled_stream,
    )
}
