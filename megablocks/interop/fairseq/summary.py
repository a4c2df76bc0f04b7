"""What was read from a checkpoint, and where the model will not do as the original did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from megablocks.interop.fairseq.architecture import completed
from megablocks.interop.fairseq.reading import Checkpoint
from megablocks.layers import MultiDimensionDampedEMA
from megablocks.models import AdaptiveEmbedding, AdaptiveSoftmax, MegaLanguageModel, MegaSeq2Seq

_SHOWN = (
    "embed_dim",
    "layers",
    "hidden_dim",
    "ffn_embed_dim",
    "z_dim",
    "n_dim",
    "chunk_size",
    "input_dim",
)
_SHARED = (
    "rel_pos_bias",
    "attention_activation_fn",
    "activation_fn",
    "normalization_type",
    "normalize_before",
    "truncation_length",
    "sen_rep_type",
    "adaptive_input_cutoff",
    "adaptive_softmax_cutoff",
    "tie_adaptive_weights",
    "tie_adaptive_proj",
)


def summary(checkpoint: Checkpoint, model: nn.Module) -> str:
    """Returns architecture, parameters, options, and the deviations that matter for this model, as lines of text."""
    args = completed(checkpoint)
    names = [f"{side}_{name}" for side in ("encoder", "decoder") for name in _SHOWN] + list(_SHARED)
    options = [f"  {name}: {args[name]}" for name in names if args.get(name) not in (None, False)]
    count = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join(
        [
            f"architecture: {checkpoint.arguments['arch']}, a {type(model).__name__}",
            f"parameters: {count:,}",
            "options:",
            *options,
            "deviations (see docs/concepts/deviations.md):",
            *(f"  {line}" for line in deviations(args, model)),
        ]
    )


def deviations(args: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    """Yields what this model does otherwise than the original, on purpose, a line each."""
    kept = {part.truncation for part in model.modules() if isinstance(part, MultiDimensionDampedEMA)}
    asked = args["truncation_length"]
    if asked == 0:
        yield "D2: a truncation of 0, with which the original fails or forgets its averages, is none"
    elif isinstance(model, MegaLanguageModel) and asked and kept == {None}:
        yield f"D1: averages are not truncated to {asked} lags; the original ignores that too when it evaluates"
    elif asked and kept != {None} and isinstance(model, (MegaLanguageModel, MegaSeq2Seq)):
        yield f"D1: averages are truncated to {asked} lags in streams too, where the original forgets it"
    if isinstance(model, (MegaLanguageModel, MegaSeq2Seq)):
        yield "D3, D4, D8: segments of any length, and padding anywhere, give what one pass without padding gives"
    if isinstance(model, MegaSeq2Seq):
        yield "D6, D26: results do not depend on left padding of the source"
    if "batchnorm" in str(args["normalization_type"]):
        yield "D10: in training, batch statistics skip padding"
    if any(isinstance(part, (AdaptiveEmbedding, AdaptiveSoftmax)) for part in model.modules()):
        yield "D19: the loss counts every word of every tail; log-probabilities have gradients"
    yield "D18, D21: any length under any chunk size; layer drop, where it is asked for, drops layers"
