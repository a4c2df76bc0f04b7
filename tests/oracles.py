"""MEGA written down once more, slowly: the truth that every fast path is compared with.

Nothing here comes from megablocks. The equations stand as in the paper (arXiv 2209.10655, sections 3.1 to 3.3), one
token and one query at a time, in float64, differentiable by autograd. Two decisions keep the pages short:

* Every row of a batch is computed alone. Its padding is deleted first, and zeros take the place of the padding at the
  end, so positions, lags, chunk borders and key counts can count nothing but real tokens.
* A block takes its parameters as one flat dictionary, `params`; `_w` is a weight (out, in), `_b` its bias:

      ema_alpha ema_delta ema_beta ema_eta ema_omega    alpha and delta are logits
      v_w v_b  mx_w mx_b  h_w h_b  qk_weight qk_bias    gated attention; mx: update | shared | reset | candidate
      q_w q_b  k_w k_b  v_w v_b  h_w h_b                cross-attention; q: update | reset | query
      fc1_w fc1_b  fc2_w fc2_b                          feed-forward
      norm_{weight bias scalar running_mean running_var}    any norm, those that it has
      bias_table | bias_alpha bias_beta                 simple | rotary position bias

Axis letters: B batch, L length, M length of the memory, D width, N averages per channel, Z width of queries and keys,
V width of values. Sequences are (B, L, D); padding masks are bool, (B, L), True at padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]
Rows = list[Tensor]

EMA_NAMES = ("ema_alpha", "ema_delta", "ema_beta", "ema_eta", "ema_omega")


# Padding is deletion


def real_rows(x: Tensor, padding_mask: Tensor | None = None) -> Rows:
    """The batch as a list of float64 rows that hold their real tokens and nothing else."""
    if padding_mask is None:
        return list(x.double())
    return [row[~padded] for row, padded in zip(x.double(), padding_mask, strict=True)]


def put_back(rows: Rows, padding_mask: Tensor | None = None) -> Tensor:
    """The rows as one batch again, with zeros at padding."""
    if padding_mask is None:
        return torch.stack(rows)
    batch = []
    for row, padded in zip(rows, padding_mask.tolist(), strict=True):
        tokens = iter(row)
        zeros = row.new_zeros(row.shape[1:])
        batch.append(torch.stack([zeros if slot else next(tokens) for slot in padded]))
    return torch.stack(batch)


def _stacked(steps: list[Tensor], width: int) -> Tensor:
    """The steps as one tensor; a row without a real token gives (0, width)."""
    return torch.stack(steps) if steps else torch.zeros(0, width, dtype=torch.float64)


# The multi-dimensional damped EMA, section 3.1


def ema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    omega: Tensor,
    *,
    causal: bool = True,
    truncation: int | None = None,
    padding_mask: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The linear damped EMA with its skip: (B, L, D), and the final hidden state (B, D, N) where a single one exists.

    Parameters are (D, N), or (2D, N) with `causal=False`: the first D rows look back, the last D ahead, and both count
    lag 0. With `truncation=K` only the lags 0 to K-1 count. A causal EMA without truncation takes a starting state and
    gives a final one; the others give None.
    """
    alpha, delta, beta, eta, omega = (p.double() for p in (alpha, delta, beta, eta, omega))
    D, N = omega.shape[0], alpha.shape[1]
    stateful = causal and truncation is None
    if hidden is not None and not stateful:
        raise ValueError("only a causal EMA without truncation starts from a hidden state")

    decay = torch.sigmoid(alpha)
    q = 1 - decay * torch.sigmoid(delta)
    b = decay * beta
    g = eta / math.sqrt(N)

    outputs, finals = [], []
    for index, row in enumerate(real_rows(x, padding_mask)):
        if stateful:
            start = torch.zeros(D, N, dtype=torch.float64) if hidden is None else hidden[index].double()
            y, final = _ema_recurrent(row, q, b, g, start)
            finals.append(final)
        else:
            lags = len(row) if truncation is None else truncation
            y = _ema_lags(row, q[:D], b[:D], g[:D], lags)
            if not causal:
                y = y + _ema_lags(row.flip(0), q[D:], b[D:], g[D:], lags).flip(0)
        outputs.append(y + omega * row)
    return put_back(outputs, padding_mask), torch.stack(finals) if stateful else None


def _ema_recurrent(row: Tensor, q: Tensor, b: Tensor, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = q h_{t-1} + b x_t and y_t = sum over n of g h_t, for one row (L, D): outputs and the last h (D, N)."""
    outputs = []
    for token in row:
        h = q * h + b * token[:, None]
        outputs.append((g * h).sum(-1))
    return _stacked(outputs, row.shape[1]), h


def _ema_lags(row: Tensor, q: Tensor, b: Tensor, g: Tensor, lags: int) -> Tensor:
    """y_t = sum over lags l < `lags` of (sum over n of g q^l b) x_{t-l}, for one row (L, D)."""
    kernel = [(g * q**lag * b).sum(-1) for lag in range(min(lags, len(row)))]
    outputs = []
    for t in range(len(row)):
        terms = [kernel[lag] * row[t - lag] for lag in range(min(lags, t + 1))]
        outputs.append(torch.stack(terms).sum(0))
    return _stacked(outputs, row.shape[1])


# Position biases


def simple_bias(table: Tensor, query_positions: Iterable[int], key_positions: Iterable[int]) -> Tensor:
    """One learned number per distance, table[j - i] counted from the middle of the table (2 max_positions - 1)."""
    middle = (len(table) - 1) // 2
    i, j = _positions(query_positions), _positions(key_positions)
    index = middle + j[None, :] - i[:, None]
    if ((index < 0) | (index >= len(table))).any():
        raise ValueError("two positions are further apart than the table reaches")
    return table.double()[index]


def rotary_bias(alpha: Tensor, beta: Tensor, query_positions: Iterable[int], key_positions: Iterable[int]) -> Tensor:
    """Alpha, turned by the query's position i, times beta, turned by the key's position j; only i - j matters."""
    half = alpha.numel() // 2
    a1, a2 = alpha.double().flatten().split(half)
    b1, b2 = beta.double().flatten().split(half)
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    i, j = _positions(query_positions), _positions(key_positions)
    angle = (i[:, None] - j[None, :])[..., None] * theta
    return ((a1 * b1 + a2 * b2) * torch.cos(angle) - (a2 * b1 - a1 * b2) * torch.sin(angle)).sum(-1)


def _positions(positions: Iterable[int]) -> Tensor:
    return torch.tensor([int(position) for position in positions], dtype=torch.long)


def _bias_between(params: Params, name: str | None) -> Callable[[int, Sequence[int]], Tensor | float]:
    """The bias as a function of one query position and the positions of the keys it sees."""
    if name is None:
        return lambda query, keys: 0.0
    if name == "simple":
        return lambda query, keys: simple_bias(params["bias_table"], [query], keys)[0]
    if name == "rotary":
        return lambda query, keys: rotary_bias(params["bias_alpha"], params["bias_beta"], [query], keys)[0]
    raise ValueError(f"unknown position bias {name!r}")


# Norms


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the channels of each token."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    return _affine(centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps), weight, bias)


def scale_norm(x: Tensor, scalar: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """scalar * x / sqrt(mean of x^2 + eps), one scalar for all channels."""
    return rms_norm(x, scalar, eps=eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """weight * x / sqrt(mean of x^2 + eps) over the channels of each token."""
    x = x.double()
    return _affine(x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps), weight, None)


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    padding_mask: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel normalised over all real tokens of the batch: (y, new running mean, new running variance)."""
    rows = real_rows(x, padding_mask)
    mean, var = running_mean.double(), running_var.double()
    running = mean, var
    tokens = torch.cat(rows)
    if training and len(tokens) > 0:
        mean, var = tokens.mean(0), tokens.var(0, unbiased=False)
        # The running variance is the unbiased one. A single token has none; its biased variance, 0, stands in.
        unbiased = var * len(tokens) / max(len(tokens) - 1, 1)
        running = tuple(
            (1 - momentum) * old + momentum * new.detach() for old, new in zip(running, (mean, unbiased), strict=True)
        )
    outputs = [_affine((row - mean) / torch.sqrt(var + eps), weight, bias) for row in rows]
    return put_back(outputs, padding_mask), *running


def sequence_norm(
    x: Tensor, params: Params, name: str | None, *, padding_mask: Tensor | None = None, training: bool = False
) -> Tensor:
    """The norm called `name` ("layernorm", "scalenorm", "rmsnorm", "batchnorm" or None), with zeros at padding."""
    weight, bias, scalar = (params.get(f"norm_{key}") for key in ("weight", "bias", "scalar"))
    if name == "batchnorm":
        running = params["norm_running_mean"], params["norm_running_var"]
        return batch_norm(x, *running, weight, bias, training=training, padding_mask=padding_mask)[0]
    norm = {
        None: lambda row: row,
        "layernorm": lambda row: layer_norm(row, weight, bias),
        "scalenorm": lambda row: scale_norm(row, scalar),
        "rmsnorm": lambda row: rms_norm(row, weight),
    }[name]
    return put_back([norm(row) for row in real_rows(x, padding_mask)], padding_mask)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.double()
    return x if bias is None else x + bias.double()


# Activations and attention functions


def silu(x: Tensor) -> Tensor:
    """x times its logistic."""
    return x * torch.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "relu": torch.relu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": torch.tanh,
    "linear": lambda x: x,
}

# Both reference codes write the Laplace constants as these decimals, not as sqrt(1/2) and sqrt(1/(4 pi)).
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: torch.relu(x) ** 2,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
}


def attention_weights(products: Tensor, bias: Tensor | float, name: str, qk_dim: int) -> Tensor:
    """Weights of one query on the m keys it sees: softmax(products / sqrt(Z) + bias) or f(products / m + bias)."""
    if name == "softmax":
        return torch.softmax(products / math.sqrt(qk_dim) + bias, dim=0)
    return ATTENTION[name](products / len(products) + bias)


def visible_keys(query: int, length: int, *, causal: bool, chunk_size: int | None = None) -> list[int]:
    """The keys that a query of a row of `length` real tokens sees: those of its chunk, up to itself if causal."""
    first = 0 if chunk_size is None else query // chunk_size * chunk_size
    end = length if chunk_size is None else min(first + chunk_size, length)
    return list(range(first, query + 1 if causal else end))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sight: list[list[int]],
    *,
    attention: str,
    bias: Callable[[int, Sequence[int]], Tensor | float] = lambda query, keys: 0.0,
) -> tuple[Tensor, Tensor]:
    """One row of attention, query i seeing the keys `sight[i]`: outputs (L, V) and weights (L, M), zero where unseen.

    A query that sees no key gets zeros. `bias(i, keys)` gives the position bias between query i and those keys.
    """
    outputs, weights = [], []
    for i, visible in enumerate(sight):
        index = torch.tensor(visible, dtype=torch.long)
        seen = attention_weights(keys[index] @ queries[i], bias(i, visible), attention, queries.shape[1])
        outputs.append(seen @ values[index])
        weights.append(torch.zeros(len(keys), dtype=torch.float64).scatter(0, index, seen))
    return _stacked(outputs, values.shape[1]), _stacked(weights, len(keys))


# The blocks, sections 3.2 and 3.3


def gated_attention(
    x: Tensor,
    params: Params,
    *,
    causal: bool,
    chunk_size: int | None = None,
    attention: str = "softmax",
    activation: str = "silu",
    bias: str | None = "rotary",
    norm: str | None = "layernorm",
    prenorm: bool = True,
    ema_causal: bool | None = None,
    truncation: int | None = None,
    padding_mask: Tensor | None = None,
    training: bool = False,
) -> tuple[Tensor, Rows]:
    """Moving-average gated attention: (B, L, D), and for every row its weights (real tokens, real tokens).

    A chunk is `chunk_size` consecutive real tokens, the last may be short. `training` matters to the batch norm alone.
    """
    params, phi, bias_between = _double(params), ACTIVATIONS[activation], _bias_between(params, bias)
    normalise = {"name": norm, "padding_mask": padding_mask, "training": training}
    D, V, Z = x.shape[-1], params["v_w"].shape[0], params["qk_weight"].shape[1]

    normed = sequence_norm(x, params, **normalise) if prenorm else x
    averaged, _ = ema(
        normed,
        *(params[name] for name in EMA_NAMES),
        causal=causal if ema_causal is None else ema_causal,
        truncation=truncation,
        padding_mask=padding_mask,
    )
    outputs, weights = [], []
    for own, source, smooth in zip(*(real_rows(t, padding_mask) for t in (x, normed, averaged)), strict=True):
        update, shared, reset, candidate = _linear(silu(smooth), params, "mx").split([D, Z, V, D], dim=-1)
        shared = silu(shared)
        queries = shared * params["qk_weight"][0] + params["qk_bias"][0]
        keys = shared * params["qk_weight"][1] + params["qk_bias"][1]
        values = phi(_linear(source, params, "v"))

        sight = [visible_keys(i, len(own), causal=causal, chunk_size=chunk_size) for i in range(len(own))]
        mixed, seen = attend(queries, keys, values, sight, attention=attention, bias=bias_between)
        candidate = phi(candidate + _linear(mixed * silu(reset), params, "h"))
        outputs.append(own + torch.sigmoid(update) * (candidate - own))
        weights.append(seen)
    y = put_back(outputs, padding_mask)
    return (y if prenorm else sequence_norm(y, params, **normalise)), weights


def cross_attention(
    x: Tensor,
    memory: Tensor,
    params: Params,
    *,
    attention: str = "softmax",
    activation: str = "silu",
    bias: str | None = "rotary",
    norm: str | None = "layernorm",
    prenorm: bool = True,
    padding_mask: Tensor | None = None,
    memory_padding_mask: Tensor | None = None,
    training: bool = False,
) -> tuple[Tensor, Rows]:
    """Gated cross-attention: (B, L, D), and for every row its weights (real tokens, real tokens of the memory).

    Query i and key j are compared by their places among the real tokens of their own sequence. Where the memory is all
    padding the attention output is zero, and the gates do the rest.
    """
    params, phi, bias_between = _double(params), ACTIVATIONS[activation], _bias_between(params, bias)
    normalise = {"name": norm, "padding_mask": padding_mask, "training": training}
    D, Z = x.shape[-1], params["k_w"].shape[0]

    normed = sequence_norm(x, params, **normalise) if prenorm else x
    rows = zip(
        real_rows(x, padding_mask), real_rows(normed, padding_mask), real_rows(memory, memory_padding_mask), strict=True
    )
    outputs, weights = [], []
    for own, source, remembered in rows:
        update, reset, queries = _linear(source, params, "q").split([D, D, Z], dim=-1)
        keys, values = _linear(remembered, params, "k"), phi(_linear(remembered, params, "v"))
        sight = [list(range(len(remembered)))] * len(own)
        mixed, seen = attend(queries, keys, values, sight, attention=attention, bias=bias_between)
        candidate = phi(_linear(mixed * silu(reset), params, "h"))
        outputs.append(own + torch.sigmoid(update) * (candidate - own))
        weights.append(seen)
    y = put_back(outputs, padding_mask)
    return (y if prenorm else sequence_norm(y, params, **normalise)), weights


def feed_forward(
    x: Tensor,
    params: Params,
    *,
    activation: str = "silu",
    norm: str | None = "layernorm",
    prenorm: bool = True,
    padding_mask: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """The normalised feed-forward network with its residual: (B, L, D)."""
    params, normalise = _double(params), {"name": norm, "padding_mask": padding_mask, "training": training}
    normed = sequence_norm(x, params, **normalise) if prenorm else x
    outputs = []
    for own, source in zip(real_rows(x, padding_mask), real_rows(normed, padding_mask), strict=True):
        outputs.append(own + _linear(ACTIVATIONS[activation](_linear(source, params, "fc1")), params, "fc2"))
    y = put_back(outputs, padding_mask)
    return y if prenorm else sequence_norm(y, params, **normalise)


def _linear(x: Tensor, params: Params, name: str) -> Tensor:
    return x @ params[f"{name}_w"].T + params[f"{name}_b"]


def _double(params: Params) -> Params:
    return {name: value.double() for name, value in params.items()}


# Stacks


def encoder(x: Tensor, layers: list[dict[str, Params]], *, causal: bool = False, **options: object) -> Tensor:
    """Layers `{"attention": params, "feed_forward": params or absent}` in turn: (B, L, D); options as in `decoder`."""
    return decoder(x, layers, causal=causal, **options)


def decoder(
    x: Tensor,
    layers: list[dict[str, Params]],
    *,
    memory: Tensor | None = None,
    memory_padding_mask: Tensor | None = None,
    causal: bool = True,
    ema_causal: bool | None = None,
    chunk_size: int | None = None,
    truncation: int | None = None,
    attention: str = "softmax",
    activation: str = "silu",
    bias: str | None = "rotary",
    norm: str | None = "layernorm",
    prenorm: bool = True,
    final_norm: Params | None = None,
    padding_mask: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """Layers of "attention" and, where present, "cross_attention" and "feed_forward", in this order: (B, L, D).

    `final_norm` holds the parameters of a norm of the same kind after the last layer; `{}` is one without affine part.
    """
    common = {"norm": norm, "padding_mask": padding_mask, "training": training}
    block = {"activation": activation, "prenorm": prenorm, **common}
    attends = {"attention": attention, "bias": bias, **block}
    sight = {"causal": causal, "ema_causal": ema_causal, "chunk_size": chunk_size, "truncation": truncation}
    for layer in layers:
        x, _ = gated_attention(x, layer["attention"], **sight, **attends)
        if "cross_attention" in layer:
            x, _ = cross_attention(
                x, memory, layer["cross_attention"], memory_padding_mask=memory_padding_mask, **attends
            )
        if "feed_forward" in layer:
            x = feed_forward(x, layer["feed_forward"], **block)
    return x if final_norm is None else sequence_norm(x, final_norm, norm, padding_mask=padding_mask, training=training)


# Models


def embedding(
    x: Tensor,
    table: Tensor | None = None,
    projection: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    scale: bool = True,
    norm: str | None = None,
    norm_params: Params | None = None,
    padding_mask: Tensor | None = None,
    training: bool = False,
) -> Tensor:
    """Tokens (B, L) looked up in a table, maybe times sqrt(D), or values (B, L, inputs); projected, normalised."""
    if table is not None:
        width = table.shape[1] if projection is None else projection.shape[0]
        real = x if padding_mask is None else x.masked_fill(padding_mask, 0)  # any id may stand under padding
        x = torch.stack([table.double()[row] for row in real]) * (math.sqrt(width) if scale else 1.0)
    x = put_back(real_rows(x, padding_mask), padding_mask)
    if projection is not None:
        x = linear(x, projection, shift, padding_mask=padding_mask)
    if norm_params is None:
        return x
    return sequence_norm(x, norm_params, norm, padding_mask=padding_mask, training=training)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding_mask: Tensor | None = None) -> Tensor:
    """A linear map of each token, such as that to the logits of a vocabulary, with zeros at padding."""
    shift = 0.0 if bias is None else bias.double()
    return put_back([row @ weight.double().T + shift for row in real_rows(x, padding_mask)], padding_mask)


def adaptive_log_probs(
    x: Tensor, head: Tensor, tail: list[tuple[Tensor, Tensor]], *, padding_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities: `head` scores frequent tokens, then clusters; each of `tail` projects and scores its own."""
    rows = []
    for row in real_rows(x, padding_mask):
        scores = (row @ head.double().T).log_softmax(1)
        first = head.shape[0] - len(tail)
        inside = [((row @ narrow.double().T) @ words.double().T).log_softmax(1) for narrow, words in tail]
        rows.append(torch.cat([scores[:, :first], *(scores[:, [first + i]] + y for i, y in enumerate(inside))], dim=1))
    return put_back(rows, padding_mask)


def pool(x: Tensor, name: str, *, padding_mask: Tensor | None = None) -> Tensor:
    """The mean of each row's real tokens, or the first of them: (B, D); zeros for a row of padding."""
    pooled = []
    for row in real_rows(x, padding_mask):
        empty = row.new_zeros(row.shape[1])
        pooled.append(empty if len(row) == 0 else {"mean": row.mean(0), "first": row[0]}[name])
    return torch.stack(pooled)
