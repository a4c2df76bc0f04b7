"""Models of megablocks built from the recorded arguments of the original's models, with their weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from golden_data import Case, Tensors
from megablocks import (
    AdaptiveEmbedding,
    AdaptiveSoftmax,
    MegaClassifier,
    MegaDecoder,
    MegaEncoder,
    MegaLanguageModel,
    MegaSeq2Seq,
    SimpleRelativeBias,
    mega_decoder,
    mega_encoder,
)

PAD = 1

ACTIVATIONS = {"gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def language_model(case: Case) -> MegaLanguageModel:
    """The language model of a case."""
    args = case.args
    decoder = stack(args, "decoder", args["max_target_positions"], False)
    if args["adaptive_input"]:
        return adaptive_language_model(case, decoder)
    model = MegaLanguageModel(
        decoder,
        case.state["decoder.embed_tokens.weight"].shape[0],
        input_dim=args["decoder_input_dim"],
        scale_embedding=not args["no_scale_embedding"],
        embedding_norm=args["normalization_type"] if args["normalize_embedding"] else None,
        tie_output=args["share_decoder_input_output_embed"] or args["share_all_embeddings"],
    )
    return filled(model, case.state, {"embedding.": "decoder.embedding.", "output.": "decoder.output."})


ADAPTIVE_PREFIXES = {
    "embedding.tables.": "decoder.embed_tokens.embeddings.",
    "embedding.projections.": "decoder.embed_tokens.embeddings.",
    "output.head.words.": "decoder.adaptive_softmax.head.word_proj.",
    "output.head.clusters.": "decoder.adaptive_softmax.head.class_proj.",
    "output.": "decoder.adaptive_softmax.",
}


def adaptive_language_model(case: Case, decoder: MegaDecoder) -> MegaLanguageModel:
    """The language model of a case with bands."""
    args, state = case.args, case.state
    bands = [state[f"decoder.embed_tokens.embeddings.{band}.0.weight"] for band in range(3)]
    size, width = sum(len(table) for table in bands), args["decoder_embed_dim"]
    cuts = {side: [int(cut) for cut in args[f"adaptive_{side}_cutoff"].split(",")] for side in ("input", "softmax")}
    embedding = AdaptiveEmbedding(
        size, width, cutoffs=cuts["input"], factor=args["adaptive_input_factor"], input_dim=args["decoder_input_dim"]
    )
    output = AdaptiveSoftmax(
        width,
        size,
        cutoffs=cuts["softmax"],
        factor=args["adaptive_softmax_factor"],
        embedding=embedding if args["tie_adaptive_weights"] else None,
        tie_projections=args["tie_adaptive_proj"],
    )
    model = MegaLanguageModel(decoder, size, embedding=embedding, output=output)
    return filled(model, state, ADAPTIVE_PREFIXES)


def seq2seq(case: Case) -> MegaSeq2Seq:
    """The translation model of a case."""
    args, state = case.args, case.state
    longest = max(args["max_source_positions"], args["max_target_positions"])
    model = MegaSeq2Seq(
        stack(args, "encoder", args["max_source_positions"], False),
        stack(args, "decoder", args["max_target_positions"], True, longest),
        source_vocab_size=state["encoder.embed_tokens.weight"].shape[0],
        target_vocab_size=state["decoder.embed_tokens.weight"].shape[0],
        share_embeddings=args["share_all_embeddings"],
        target_input_dim=args["decoder_input_dim"],
        scale_embedding=not args["no_scale_embedding"],
        embedding_norm=args["normalization_type"] if args["normalize_embedding"] else None,
        tie_output=args["share_decoder_input_output_embed"] or args["share_all_embeddings"],
    )
    prefixes = {
        "source_embedding.": "encoder.embedding.",
        "target_embedding.": "decoder.embedding.",
        "output.": "decoder.output.",
    }
    return filled(model, state, prefixes)


def classifier(case: Case) -> MegaClassifier:
    """The classifier of a case of LRA or of speech; an encoder alone gets a head that nothing is asked of."""
    args, state = case.args, case.state
    whole = case.cls == "LRAModel.build_model"
    names = {
        "encoder_embed_dim": "embedding_dim",
        "encoder_hidden_dim": "hidden_dim",
        "encoder_ffn_embed_dim": "ffn_hidden_dim",
        "encoder_layers": "num_encoder_layers",
        "max_positions": "max_seq_len",
        "activation_fn": "activation",
        "attention_activation_fn": "attention_activation",
        "truncation_length": "truncation",
        "encoder_normalize_before": "normalize_before",
    }
    args = args if whole else {**args, **{new: args[old] for new, old in names.items() if old in args}}
    args = {"activation_fn": "silu", "rel_pos_bias": "simple", "chunk_size": -1, "normalize_embedding": False, **args}
    renamed = {
        **args,
        "encoder_z_dim": args["z_dim"],
        "encoder_n_dim": args["n_dim"],
        "encoder_chunk_size": args["chunk_size"],
        "normalization_type": args["norm_type"],
        "normalize_before": args["encoder_normalize_before"],
    }
    prefix = "encoder.encoder." if whole else ""
    tokens = state.get(f"{prefix}embed_tokens.embed.weight")
    model = MegaClassifier(
        stack(renamed, "encoder", args["max_positions"], False),
        args.get("sentence_class_num", 2),
        vocab_size=None if tokens is None else tokens.shape[0],
        pooling={"mp": "mean", "cls": "first"}[args["sen_rep_type"]],
        head_layers=args.get("classifier_layers", 1),
        head_dim=args.get("classifier_out_dim"),
        head_activation=args.get("classifier_activation_fn", "gelu"),
        embedding_norm=args["norm_type"] if args["normalize_embedding"] else None,
    )
    prefixes = {
        "embedding.tokens.": f"{prefix}embed_tokens.embed.",
        "embedding.projection.": f"{prefix}embed_tokens.",
        "embedding.norm.": f"{prefix}embed_norm.",
        "encoder.": prefix,
        "output.": "sentence_projection_layer.",
    }
    return filled(model, state, prefixes, optional=() if whole else ("head.", "output."))


def stack(
    args: dict[str, Any], side: str, max_positions: int, cross: bool, cross_positions: int = 0
) -> MegaEncoder | MegaDecoder:
    """The encoder or decoder of the original's arguments."""
    chunk_size = args[f"{side}_chunk_size"]
    simple = args["rel_pos_bias"] == "simple"
    activation = args["activation_fn"]
    options = {
        "qk_dim": args[f"{side}_z_dim"],
        "value_dim": args[f"{side}_hidden_dim"],
        "ffn_dim": args[f"{side}_ffn_embed_dim"] or None,
        "ema_dim": args[f"{side}_n_dim"],
        "truncation": args["truncation_length"],
        "chunk_size": chunk_size if chunk_size > 0 else None,
        "attention": args["attention_activation_fn"],
        "activation": ACTIVATIONS.get(activation, activation),
        "position_bias": args["rel_pos_bias"],
        # The original ties a table to the chunk size; cross-attention has one for whole sequences.
        "max_positions": (chunk_size if chunk_size > 0 else max_positions) if simple else None,
        "norm": args["normalization_type"],
        "prenorm": args["normalize_before"],
        "final_norm_affine": not args.get("no_affine_final_norm", False),
    }
    sizes = (args[f"{side}_layers"], args[f"{side}_embed_dim"])
    if side == "encoder":
        return mega_encoder(*sizes, **options)
    decoder = mega_decoder(*sizes, cross_attention=cross, **options)
    if cross and simple:
        for layer in decoder.layers:
            layer.cross_attention.position_bias = SimpleRelativeBias(cross_positions)
    return decoder


def fairseq_key(key: str, prefixes: dict[str, str]) -> str:
    """What the original calls a weight of megablocks."""
    for ours, theirs in prefixes.items():
        if key.startswith(ours):
            # A band is a table and what projects it.
            part = {"embedding.tables.": ".0.weight", "embedding.projections.": ".1.weight"}.get(ours)
            key = theirs + (key.removeprefix(ours) if part is None else key.split(".")[2] + part)
            break
    renamings = {
        r"\bembedding\.tokens\.": "embed_tokens.",
        r"\bembedding\.projection\.": "project_in_dim.",
        r"\bembedding\.norm\.": "embed_norm.",
        r"\boutput\.": "output_projection.",
        r"\bhead\.(\d+)\.": r"classifier.\1.0.",
        r"\bcross_attention\.": "cross_attn.",
        r"\bfeed_forward\.": "nffn.",
        r"\battention\.ema\.alpha$": "mega_layer.move.delta",
        r"\battention\.ema\.delta$": "mega_layer.move.alpha",
        r"\battention\.ema\.eta$": "mega_layer.move.gamma",
        r"\battention\.ema\.": "mega_layer.move.",
        r"\battention\.qk_weight$": "mega_layer.gamma",
        r"\battention\.qk_bias$": "mega_layer.beta",
        r"\battention\.": "mega_layer.",
        r"\bposition_bias\.weight$": "rel_pos_bias.rel_pos_bias",
        r"\bposition_bias\.": "rel_pos_bias.",
    }
    for pattern, replacement in renamings.items():
        key = re.sub(pattern, replacement, key)
    return key


@torch.no_grad()
def filled(model: nn.Module, state: Tensors, prefixes: dict[str, str], optional: tuple[str, ...] = ()) -> Any:
    """The model in float64 eval mode with the original's weights, of which none may be left over."""
    model, used = model.double(), set()
    for key, tensor in model.state_dict().items():
        theirs = fairseq_key(key, prefixes)
        if theirs not in state:
            theirs = theirs.removesuffix("weight") + "scalar"
        if theirs in state:
            tensor.copy_(state[theirs].reshape(tensor.shape))
            used.add(theirs)
        elif not key.startswith(optional):
            raise KeyError(f"{key}: the original has no {theirs}")
    left = [key for key in state if key not in used and not key.endswith(("_float_tensor", "version"))]
    if left:
        raise KeyError(f"not used: {left}")
    return model.eval()
