"""From the original's arguments and weights to a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megablocks._checks import lookup
from megablocks.functional.precision import at_least_float32
from megablocks.interop.fairseq.names import convert
from megablocks.interop.fairseq.reading import Checkpoint, read
from megablocks.layers import NormalizedFFN, SimpleRelativeBias
from megablocks.models import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    TokenEmbedding,
)
from megablocks.stacks import MegaDecoder, MegaEncoder, mega_decoder, mega_encoder

Model = MegaLanguageModel | MegaClassifier | MegaSeq2Seq
Truncation = Literal["auto", "keep"]

_ACTIVATIONS = {"gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_POOLINGS = {"mp": "mean", "cls": "first"}

_WITHOUT_DEFAULT: Mapping[str, Any] = {
    "activation_dropout": 0.0,
    "act_dropout": 0.0,
    "hidden_dropout": 0.0,
    "adaptive_softmax_factor": 4,
    "tie_adaptive_proj": False,
    "no_affine_final_norm": False,
    "normalize_embedding": False,
    "feature_dropout": False,
    "norm_type": "scalenorm",
    "layer_type": "mega",
    "rel_pos_bias": "simple",
}
"""What some architectures read without having a default for it (D20), or have under another name."""

_RENAMED = {
    "encoder_z_dim": "z_dim",
    "encoder_n_dim": "n_dim",
    "encoder_chunk_size": "chunk_size",
    "normalization_type": "norm_type",
    "normalize_before": "encoder_normalize_before",
    "hidden_dropout": "act_dropout",
    "activation_dropout": "act_dropout",
}
"""What classifiers call the arguments that all stacks have."""


def load_checkpoint(path: str | os.PathLike[str], *, truncation: Truncation = "auto") -> Model:
    """Returns the model in a checkpoint of the original code, in eval mode.

    `mega_lm*` becomes a `MegaLanguageModel`, `mega_lra_*` and `mega_sc_*` a `MegaClassifier`, other `mega*` a
    `MegaSeq2Seq`. Options come from the arguments in the file, those that are missing from the defaults of their
    architecture; vocabularies, bias tables and the classifier's head have the sizes of the weights. Weights are float32
    or wider. Nothing in the file is run.

    Args:
        path: A `.pt` of the original code: a dictionary with `args` or `cfg`, and `model`.
        truncation: `"auto"` leaves the averages of language models untruncated, as the original evaluates them whatever
            their arguments say; `"keep"` truncates them as in the original's training. Encoders and translation models
            keep their truncation.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, holds something else, asks for classes that are not known to be harmless, or
            its weights do not fit its arguments; missing and superfluous ones are listed.

    Example:
        >>> import argparse, pathlib, tempfile
        >>> from megablocks.interop.fairseq import export
        >>> decoder = mega_decoder(1, 8, qk_dim=4, value_dim=16)
        >>> weights = export(MegaLanguageModel(decoder, vocab_size=11))    # or what the original's training wrote
        >>> args = argparse.Namespace(
        ...     arch="mega_lm", decoder_layers=1, decoder_embed_dim=8, decoder_input_dim=8, decoder_z_dim=4,
        ...     decoder_hidden_dim=16, decoder_ffn_embed_dim=0, rel_pos_bias="rotary", normalize_before=True,
        ...     share_decoder_input_output_embed=True,
        ... )
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = pathlib.Path(directory, "checkpoint_best.pt")
        ...     torch.save({"args": args, "model": weights}, file)
        ...     model = load_checkpoint(file)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 11])

    References:
        The released code of Ma et al., [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """
    return build(read(path), truncation=truncation)


def build(checkpoint: Checkpoint, *, truncation: Truncation = "auto") -> Model:
    """Returns the model that a checkpoint describes; see `load_checkpoint`."""
    lookup("truncation", truncation, {"auto": None, "keep": None})
    kind = kind_of(str(checkpoint.arguments.get("arch")))
    args, state = completed(checkpoint), checkpoint.weights
    with torch.device("meta"):
        if kind is MegaLanguageModel:
            model: Model = _language_model(args, state, truncation)
        elif kind is MegaClassifier:
            model = _classifier(args, state)
        else:
            model = _seq2seq(args, state)
    widest = torch.float32
    for tensor in state.values():
        if tensor.is_floating_point():
            widest = torch.promote_types(widest, at_least_float32(tensor.dtype))
    model = model.to(widest).to_empty(device="cpu")
    return convert(state, model).eval()


def kind_of(architecture: str) -> type[Model]:
    """Returns what a model of an architecture becomes."""
    kinds = {r"mega_lm(_|$)": MegaLanguageModel, r"mega_(lra|sc)_": MegaClassifier, r"mega(_|$)": MegaSeq2Seq}
    for pattern, kind in kinds.items():
        if re.match(pattern, architecture):
            return kind
    raise ValueError(
        f"The file holds a model of architecture {architecture!r}, but only those of MEGA are read: "
        f"{', '.join(_defaults())}."
    )


def completed(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Returns all arguments: those of the file, before the defaults of its architecture, before those of none."""
    architecture = str(checkpoint.arguments.get("arch"))
    kind = kind_of(architecture)
    # Architectures of one's own are registered as variants of the original's.
    fitting = [name for name in _defaults() if f"{architecture}_".startswith(f"{name}_") and kind_of(name) is kind]
    defaults = _defaults()[max(fitting, key=len)] if fitting else {}
    args = {**_WITHOUT_DEFAULT, **defaults, **checkpoint.arguments}
    if kind is MegaClassifier:
        args |= {name: args[theirs] for name, theirs in _RENAMED.items() if theirs in args}
    return _Arguments(architecture, args)


class _Arguments(dict[str, Any]):
    """Arguments that say whose they are when one is missing."""

    def __init__(self, architecture: str, args: Mapping[str, Any]) -> None:
        super().__init__(args)
        self.architecture = architecture

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"The file has no argument `{name}`, and no defaults for the architecture {self.architecture!r} are known."
        )


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    text = files("megablocks.interop.fairseq").joinpath("defaults.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def _language_model(args: Mapping[str, Any], state: Mapping[str, Tensor], truncation: Truncation) -> MegaLanguageModel:
    kept = args["truncation_length"] if truncation == "keep" else None
    decoder = _decoder({**args, "truncation_length": kept}, state, cross_attention=False)
    embedding = _embedding(args, state, "decoder", decoder.embed_dim)
    size = embedding.vocab_size
    return MegaLanguageModel(
        decoder, size, embedding=embedding, output=_adaptive_output(args, embedding, size), tie_output=_ties(args)
    )


def _seq2seq(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> MegaSeq2Seq:
    encoder = _encoder(args, state, "encoder.")
    decoder = _decoder(args, state, cross_attention=True)
    source = _embedding(args, state, "encoder", encoder.embed_dim)
    target = _embedding(args, state, "decoder", decoder.embed_dim)
    return MegaSeq2Seq(
        encoder,
        decoder,
        source_vocab_size=source.vocab_size,
        target_vocab_size=target.vocab_size,
        source_embedding=source,
        target_embedding=target,
        share_embeddings=bool(args["share_all_embeddings"]),
        tie_output=_ties(args),
        output=_adaptive_output(args, target, target.vocab_size),
    )


def _classifier(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> MegaClassifier:
    if args["layer_type"] != "mega":
        raise ValueError(f"The file holds layers of type {args['layer_type']!r}, but only those of MEGA are read.")
    prefix = "encoder.encoder."
    tokens = state.get(f"{prefix}embed_tokens.embed.weight")
    head = [state[key] for key in sorted(state) if re.fullmatch(r"classifier\.\d+\.0\.weight", key)]
    encoder = _encoder(args, state, prefix)
    return MegaClassifier(
        encoder,
        _weight(state, "sentence_projection_layer.weight").shape[0],
        vocab_size=None if tokens is None else tokens.shape[0],
        pair=bool(head) and head[0].shape[1] == 2 * encoder.embed_dim,
        pooling=lookup("sen_rep_type", args["sen_rep_type"], _POOLINGS),
        head_layers=len(head),
        head_dim=head[0].shape[0] if head else None,
        head_activation=_activation(args["classifier_activation_fn"]),
        embedding_norm=args["normalization_type"] if args["normalize_embedding"] else None,
        embedding_dropout=args["dropout"],
    )


def _encoder(args: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str) -> MegaEncoder:
    sizes = (args["encoder_layers"], args["encoder_embed_dim"])
    encoder = mega_encoder(*sizes, **_options(args, state, "encoder", prefix))
    _set_activation_dropout(encoder, args)
    return encoder


def _decoder(args: Mapping[str, Any], state: Mapping[str, Tensor], *, cross_attention: bool) -> MegaDecoder:
    sizes = (args["decoder_layers"], args["decoder_embed_dim"])
    options = _options(args, state, "decoder", "decoder.")
    decoder = mega_decoder(*sizes, cross_attention=cross_attention, **options)
    table = state.get("decoder.layers.0.cross_attn.rel_pos_bias.rel_pos_bias")
    if table is not None and cross_attention and args["rel_pos_bias"] == "simple":
        # The original's cross-attention has a table for whole sequences, whatever the chunks.
        for layer in decoder.layers:
            layer.cross_attention.position_bias = SimpleRelativeBias(_reach(table))  # type: ignore[union-attr]
    _set_activation_dropout(decoder, args)
    return decoder


def _options(args: Mapping[str, Any], state: Mapping[str, Tensor], side: str, prefix: str) -> Any:
    """The options of a stack, as its builder takes them."""
    chunk_size, ffn_dim = args[f"{side}_chunk_size"], args[f"{side}_ffn_embed_dim"]
    table = None
    if args["rel_pos_bias"] == "simple":
        table = _weight(state, f"{prefix}layers.0.mega_layer.rel_pos_bias.rel_pos_bias")
    return {
        "qk_dim": args[f"{side}_z_dim"],
        "value_dim": args[f"{side}_hidden_dim"],
        "ffn_dim": ffn_dim if ffn_dim > 0 else None,
        "ema_dim": args[f"{side}_n_dim"],
        # None at all where the original would fail or forget the averages (D2).
        "truncation": args["truncation_length"] or None,
        "chunk_size": chunk_size if chunk_size > 0 else None,
        "attention": args["attention_activation_fn"],
        "activation": _activation(args["activation_fn"]),
        "position_bias": args["rel_pos_bias"],
        "max_positions": None if table is None else _reach(table),
        "norm": args["normalization_type"],
        "prenorm": bool(args["normalize_before"]),
        "final_norm_affine": not args["no_affine_final_norm"],
        "dropout": args["dropout"],
        "attention_dropout": args["attention_dropout"],
        "hidden_dropout": args["hidden_dropout"],
        "feature_dropout": bool(args["feature_dropout"]),
    }


def _set_activation_dropout(stack: nn.Module, args: Mapping[str, Any]) -> None:
    """The feed-forward layers of the original drop their activations at a rate of their own."""
    for part in stack.modules():
        if isinstance(part, NormalizedFFN):
            part.hidden_dropout.p = float(args["activation_dropout"])


def _embedding(
    args: Mapping[str, Any], state: Mapping[str, Tensor], side: str, embed_dim: int
) -> TokenEmbedding | AdaptiveEmbedding:
    options: dict[str, Any] = {
        "scale": not args["no_scale_embedding"],
        "norm": args["normalization_type"] if args["normalize_embedding"] else None,
        "dropout": args["dropout"],
    }
    if side == "decoder":
        options["input_dim"] = args["decoder_input_dim"]
    if not args["adaptive_input"]:
        size = _weight(state, f"{side}.embed_tokens.weight").shape[0]
        return TokenEmbedding(size, embed_dim, **options)
    bands = [value for key, value in state.items() if re.search(r"embed_tokens\.embeddings\.\d+\.0\.weight$", key)]
    size = sum(len(band) for band in bands)
    cutoffs = _cutoffs(args["adaptive_input_cutoff"], size)
    return AdaptiveEmbedding(size, embed_dim, cutoffs=cutoffs, factor=args["adaptive_input_factor"], **options)


def _adaptive_output(
    args: Mapping[str, Any], embedding: TokenEmbedding | AdaptiveEmbedding, vocab_size: int
) -> AdaptiveSoftmax | None:
    cutoffs = args.get("adaptive_softmax_cutoff")
    if cutoffs is None:
        return None
    tied = isinstance(embedding, AdaptiveEmbedding) and bool(args["tie_adaptive_weights"])
    return AdaptiveSoftmax(
        embedding.embed_dim,
        vocab_size,
        cutoffs=_cutoffs(cutoffs, vocab_size),
        factor=args["adaptive_softmax_factor"],
        embedding=embedding if isinstance(embedding, AdaptiveEmbedding) and tied else None,
        tie_projections=tied and bool(args["tie_adaptive_proj"]),
        dropout=args["adaptive_softmax_dropout"],
    )


def _cutoffs(given: str | list[int], vocab_size: int) -> list[int]:
    listed = given.split(",") if isinstance(given, str) else given
    return [int(cutoff) for cutoff in listed if int(cutoff) != vocab_size]


def _ties(args: Mapping[str, Any]) -> bool:
    return bool(args["share_decoder_input_output_embed"] or args["share_all_embeddings"])


def _activation(name: str) -> str:
    return _ACTIVATIONS.get(name, name)


def _reach(table: Tensor) -> int:
    return (len(table) + 1) // 2


def _weight(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise ValueError(f"The weights do not fit: missing: {key}.")
    return state[key]
