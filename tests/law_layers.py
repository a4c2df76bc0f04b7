"""The layers under the laws: how each is made and called, and what the oracle says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
from strategies import Case, Sample


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
    oracle: Callable[[Any, Case, Sample], Tensor]
    """What it should give, from `params(module)`."""
    params: Callable[[nn.Module], Any] = oracle_params
    call: Callable[..., Any] = call_with_mask
    draw: Callable[[Case, torch.dtype], Sample] = Case.sample
    """Draws what it is called with."""
    of: Callable[[Case], Case] = lambda case: case
    """The case as this block can be made: a causal one, say."""
    start: Callable[[nn.Module, Case, Sample], Any] | None = None
    """Makes the state before the first token; `None` for a block that does not stream."""
    final: Callable[[Any, Case, Sample], list[Tensor | None]] | None = None
    """The leaves that the final state should have; `None` for a leaf that is left open."""
    sequence: bool = True
    """Whether it takes a padded sequence."""
    pooled: bool = False
    """Whether it gives one vector for a row, instead of one for each token."""
    logits: bool = False
    """Whether a linear map comes last: under autocast its output is of autocast's dtype, as torch has it."""
    causal: bool = True
    """Whether it looks back only when the case is causal."""
    memory: bool = False
    chunked: bool = False
    normed: bool = False
    """Whether it has the case's norm, batch-norm included."""
    depth: int = 1
    """Layers in a row, each of which adds its roundings. Above 1, a quarter of the cases is looked at."""
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


LAYERS = [
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
