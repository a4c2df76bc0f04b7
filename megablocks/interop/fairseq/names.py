"""What the original code calls each weight, and state dicts both ways.

Its `delta` is the paper's alpha, and the reverse: the two cross here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from megablocks._checks import check_module
from megablocks.layers import (
    GatedCrossAttention,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    RotaryRelativeBias,
    ScaleNorm,
    SimpleRelativeBias,
)
from megablocks.models import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    ContinuousEmbedding,
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    TokenEmbedding,
)
from megablocks.models.adaptive import TiedHead
from megablocks.stacks import MegaDecoderLayer, MegaEncoderLayer

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LAYER = {r"attention": "mega_layer", r"cross_attention": "cross_attn", r"feed_forward": "nffn"}
_BIAS = {r"position_bias": "rel_pos_bias"}
_OUTPUT = {r"output\.weight": "decoder.output_projection.weight", r"output": "decoder.adaptive_softmax"}
_EMBEDDING = {r"norm": "embed_norm"}

_NAMES: dict[type[nn.Module], dict[str, str]] = {
    MegaLanguageModel: {r"embedding": "decoder", **_OUTPUT},
    MegaSeq2Seq: {r"source_embedding": "encoder", r"target_embedding": "decoder", **_OUTPUT},
    MegaClassifier: {
        r"embedding\.tokens": "encoder.encoder.embed_tokens.embed",
        r"embedding": "encoder.encoder",
        r"encoder": "encoder.encoder",
        r"head\.(\d+)": r"classifier.\1.0",
        r"output": "sentence_projection_layer",
    },
    TokenEmbedding: {r"tokens": "embed_tokens", r"projection": "project_in_dim", **_EMBEDDING},
    ContinuousEmbedding: {r"projection": "embed_tokens", **_EMBEDDING},
    AdaptiveEmbedding: {
        r"tables\.(\d+)": r"embed_tokens.embeddings.\1.0",
        r"projections\.(\d+)": r"embed_tokens.embeddings.\1.1",
        **_EMBEDDING,
    },
    TiedHead: {r"words": "word_proj", r"clusters": "class_proj"},
    MegaEncoderLayer: _LAYER,
    MegaDecoderLayer: _LAYER,
    MovingAverageGatedAttention: {r"ema": "move", r"qk_weight": "gamma", r"qk_bias": "beta", **_BIAS},
    GatedCrossAttention: _BIAS,
    MultiDimensionDampedEMA: {r"alpha": "delta", r"delta": "alpha", r"eta": "gamma"},
    SimpleRelativeBias: {r"weight": "rel_pos_bias"},
    ScaleNorm: {r"weight": "scalar"},
}
"""What the original calls the parts and weights of a module, by patterns of the path within it, first match first."""

_EXTRA_AXES: dict[tuple[type[nn.Module], str], int] = {
    **{(MultiDimensionDampedEMA, name): -1 for name in ("alpha", "delta", "beta")},
    **{(RotaryRelativeBias, name): 0 for name in ("alpha", "beta")},
}
"""Weights that have an axis of length 1 more in the original, and where."""

_NO_WEIGHTS = ("_float_tensor", "version", "uuid")
"""Entries of the original's state dicts that carry no information."""


class _Place(NamedTuple):
    """A weight, where it stands here and there."""

    ours: str
    theirs: str
    owner: nn.Module
    tensor: Tensor


def fairseq_name(module: nn.Module, key: str) -> str:
    """Returns what the original calls the entry `key` of the module's state dict."""
    owner, parts = module, []
    while key:
        taken, theirs = _step(owner, key)
        parts.append(theirs)
        key = key[len(taken) + 1 :]
        if key:
            owner = owner.get_submodule(taken)
    return ".".join(parts)


def convert(state_dict: Mapping[str, Tensor], module: ModuleT, *, prefix: str = "") -> ModuleT:
    """Fills a layer, stack or model with weights of the original code.

    All is checked before anything is written. Buffers without information (`version`, `_float_tensor`) are passed over.
    A table of simple biases that the original cut to its chunk length may go into the middle of a longer one, if the
    layer's `chunk_size` is not beyond it; entries further out, which this chunk size never reads, stay as they are.

    Args:
        state_dict: Weights by the original's names.
        module: What to fill, in its own precision, on its own device.
        prefix: What the names of this module's weights begin with, for instance `"encoder.layers.0."`; others are not
            looked at.

    Returns:
        The module.

    Raises:
        ValueError: If weights are missing, not wanted or of another shape, or shared ones differ; all are listed, and
            nothing is written.

    Example:
        >>> layer = MovingAverageGatedAttention(32, 16)
        >>> weights = export(layer)
        >>> weights["move.delta"].shape                        # the paper's alpha
        torch.Size([32, 16, 1])
        >>> again = convert(weights, MovingAverageGatedAttention(32, 16))
        >>> bool((again.ema.alpha == layer.ema.alpha).all())
        True

    References:
        The released code of Ma et al., [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """
    check_module("module", module, "a layer, stack or model of megablocks")
    found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    places = list(_places(module))
    reach = _chunk_reach(module)
    problems: dict[str, list[str]] = {
        "missing": [],
        "not wanted": [],
        "of another shape": [],
        "shared, but different": [],
    }
    filling: dict[int, tuple[Tensor, Tensor]] = {}
    shared = {id(place.tensor) for place in places if place.theirs in found}
    for place in places:
        value = found.get(place.theirs)
        if value is None:
            if id(place.tensor) not in shared:
                problems["missing"].append(place.theirs)
            continue
        target = _fitting(place.tensor, value, reach.get(id(place.owner)))
        if target is None:
            problems["of another shape"].append(
                f"{place.theirs} {tuple(value.shape)} instead of {tuple(_as_theirs(place).shape)}"
            )
        elif id(place.tensor) in filling and not torch.equal(filling[id(place.tensor)][1], value):
            problems["shared, but different"].append(place.theirs)
        else:
            filling[id(place.tensor)] = (target, value)
    names = {place.theirs for place in places}
    problems["not wanted"] = [key for key in found if key not in names and key.split(".")[-1] not in _NO_WEIGHTS]
    listed = "; ".join(f"{what}: {', '.join(sorted(set(keys)))}" for what, keys in problems.items() if keys)
    if listed:
        raise ValueError(f"The weights do not fit this {type(module).__name__}: {listed}.")
    with torch.no_grad():
        for target, value in filling.values():
            target.copy_(value.reshape(target.shape))
    return module


def export(module: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a layer, stack or model by the original's names and in its shapes, for its own loader.

    A table of simple biases that is longer than the layer's `chunk_size` reaches is cut to what the original has.
    Buffers without information that its loader asks for (`version`, `_float_tensor`) are there too.

    Args:
        module: What to export.

    Returns:
        Copies of all weights; shared ones under each of their names.

    Example:
        >>> sorted(export(RotaryRelativeBias(4)))
        ['_float_tensor', 'alpha', 'beta']
    """
    check_module("module", module, "a layer, stack or model of megablocks")
    reach = _chunk_reach(module)
    exported: dict[str, Tensor] = {}
    for place in _places(module):
        value = _as_theirs(place).detach()
        chunk_size = reach.get(id(place.owner))
        if chunk_size is not None and isinstance(place.owner, SimpleRelativeBias):
            value = _middle(value, chunk_size)
        exported[place.theirs] = value.clone()
    exported.update(_uninformative(module))
    return exported


def _step(owner: nn.Module, key: str) -> tuple[str, str]:
    """The first part of a path within a module, here and there."""
    for kind, names in _NAMES.items():
        if isinstance(owner, kind):
            for pattern, theirs in names.items():
                match = re.match(rf"{pattern}(?=\.|$)", key)
                if match:
                    return match.group(), match.expand(theirs)
    taken = key.partition(".")[0]
    return taken, taken


def _places(module: nn.Module) -> Iterator[_Place]:
    for key, tensor in module.state_dict(keep_vars=True).items():
        owner = module.get_submodule(key.rpartition(".")[0])
        yield _Place(key, fairseq_name(module, key), owner, tensor)


def _as_theirs(place: _Place) -> Tensor:
    """The weight in the original's shape."""
    leaf = place.ours.rpartition(".")[2]
    if ".projection." in f".{place.ours}" and place.theirs.endswith("embed_tokens.weight"):
        return place.tensor.squeeze(1) if place.tensor.shape[1] == 1 else place.tensor
    axis = _EXTRA_AXES.get((type(place.owner), leaf))
    return place.tensor if axis is None else place.tensor.unsqueeze(axis)


def _fitting(tensor: Tensor, value: Tensor, chunk_size: int | None) -> Tensor | None:
    """What of a weight a value fills, `None` if it does not fit; axes of length 1 do not count."""
    if [size for size in tensor.shape if size != 1] == [size for size in value.shape if size != 1]:
        return tensor
    if (
        chunk_size is not None
        and value.dim() == 1
        and 2 * chunk_size - 1 <= len(value) < len(tensor)
        and len(value) % 2
    ):
        return _middle(tensor, (len(value) + 1) // 2)
    return None


def _middle(table: Tensor, positions: int) -> Tensor:
    """The part of a table of simple biases that serves so many positions; the table if it has no more."""
    cut = (len(table) + 1) // 2 - positions
    return table[cut : len(table) - cut] if cut > 0 else table


def _chunk_reach(module: nn.Module) -> dict[int, int]:
    """The chunk size of each simple bias that belongs to a layer with chunks, by its id."""
    return {
        id(part.position_bias): part.chunk_size
        for part in module.modules()
        if isinstance(part, MovingAverageGatedAttention)
        and part.chunk_size is not None
        and isinstance(part.position_bias, SimpleRelativeBias)
    }


def _uninformative(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that the original's modules have besides weights."""
    buffers: dict[str, Tensor] = {}
    if isinstance(module, (MegaLanguageModel, MegaSeq2Seq)):
        buffers["decoder.version"] = torch.tensor([3.0])
    if isinstance(module, MegaSeq2Seq):
        buffers["encoder.version"] = torch.tensor([3.0])
    for path, part in module.named_modules():
        inner = f"{fairseq_name(module, path)}." if path else ""
        if isinstance(part, RotaryRelativeBias):
            buffers[f"{inner}_float_tensor"] = torch.zeros(1)
        elif isinstance(part, AdaptiveEmbedding):
            buffers[f"{inner}embed_tokens._float_tensor"] = torch.zeros(1)
        elif isinstance(part, AdaptiveSoftmax):
            buffers[f"{inner}version"] = torch.ones(1, dtype=torch.int64)
        elif isinstance(part, TiedHead):
            buffers[f"{inner}_float_tensor"] = torch.zeros(1)
    return buffers
