"""The paper's models by name, as data: tables 8 to 11 of its appendix D and the released recipes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

from megablocks._checks import lookup
from megablocks.models.classifier import MegaClassifier
from megablocks.models.language_model import MegaLanguageModel
from megablocks.models.seq2seq import MegaSeq2Seq
from megablocks.stacks import mega_decoder, mega_encoder
from megablocks.stacks.options import LayerOptions

Model = MegaLanguageModel | MegaClassifier | MegaSeq2Seq


class Preset(NamedTuple):
    """A model of the paper."""

    kind: type[MegaLanguageModel] | type[MegaClassifier] | type[MegaSeq2Seq]
    """What `preset` returns."""
    sizes: tuple[int, int, int, int, int]
    """Layers, D, F, Z, V."""
    options: Mapping[str, Any]
    """Options of layers and model that differ from their defaults."""


_LRA_TEXT = {"position_bias": "simple", "prenorm": False, "truncation": 1024}
_LRA_VISION = {"attention": "laplace", "position_bias": "simple", "norm": "batchnorm", "truncation": 1024}
_SPEECH = {**_LRA_VISION, "truncation": 1000, "max_positions": 16000, "chunk_size": 1000, "num_classes": 10}
_BYTE_PAIRS = {"norm": "scalenorm", "max_positions": 4002, "vocab_size": 257, "num_classes": 2, "head_dim": 256}

# The averages of language models and decoders are not truncated: streamed over any length they then need a state of
# fixed size, and the released recipe's 8,192 lags never cut anything in training.
PRESETS: Mapping[str, Preset] = {
    "lra_listops": Preset(
        MegaClassifier,
        (6, 80, 160, 64, 160),
        {**_LRA_TEXT, "max_positions": 2002, "vocab_size": 32, "num_classes": 10, "head_dim": 160},
    ),
    "lra_text": Preset(MegaClassifier, (4, 128, 256, 64, 256), {**_LRA_TEXT, **_BYTE_PAIRS}),
    "lra_retrieval": Preset(MegaClassifier, (6, 128, 256, 64, 256), {**_LRA_TEXT, **_BYTE_PAIRS, "pair": True}),
    "lra_image": Preset(
        MegaClassifier,
        (8, 160, 320, 96, 320),
        {**_LRA_VISION, "max_positions": 1024, "num_classes": 10, "head_dim": 320},
    ),
    "lra_pathfinder": Preset(
        MegaClassifier,
        (6, 128, 256, 64, 256),
        {**_LRA_VISION, "max_positions": 1024, "num_classes": 2, "head_dim": 256},
    ),
    "lra_pathx": Preset(
        MegaClassifier,
        (4, 64, 128, 32, 128),
        {
            **_LRA_VISION,
            "truncation": 4096,
            "max_positions": 16384,
            "chunk_size": 4096,
            "num_classes": 2,
            "head_dim": 128,
        },
    ),
    "speech_commands_base": Preset(MegaClassifier, (6, 60, 120, 30, 120), {**_SPEECH, "head_dim": 120}),
    "speech_commands_big": Preset(MegaClassifier, (6, 72, 144, 36, 144), {**_SPEECH, "head_dim": 144}),
    "enwik8": Preset(
        MegaLanguageModel,
        (12, 512, 1024, 128, 1024),
        {"final_norm_affine": False, "chunk_size": 2048, "vocab_size": 205},
    ),
    "wikitext103": Preset(
        MegaLanguageModel,
        (16, 1024, 2048, 256, 2048),
        {
            "final_norm_affine": False,
            "chunk_size": 1024,
            "vocab_size": 267744,
            "adaptive_cutoffs": (20000, 60000),
        },
    ),
    "wmt": Preset(
        MegaSeq2Seq,
        (6, 512, 1024, 128, 1024),
        {
            "position_bias": "simple",
            "max_positions": 1024,
            "prenorm": False,
            "truncation": 1024,
            "source_vocab_size": 32768,
            "share_embeddings": True,
            "tie_output": True,
        },
    ),
}

_SIZES = ("num_layers", "embed_dim", "ffn_dim", "qk_dim", "value_dim")
_STACK_OPTIONS = {*_SIZES, *LayerOptions.__annotations__, "layer_drop", "checkpoint", "final_norm_affine"}


@overload
def preset(name: Literal["enwik8", "wikitext103"], **overrides: Any) -> MegaLanguageModel:
    """Language models."""


@overload
def preset(name: Literal["wmt"], **overrides: Any) -> MegaSeq2Seq:
    """Translation."""


@overload
def preset(
    name: Literal[
        "lra_listops",
        "lra_text",
        "lra_retrieval",
        "lra_image",
        "lra_pathfinder",
        "lra_pathx",
        "speech_commands_base",
        "speech_commands_big",
    ],
    **overrides: Any,
) -> MegaClassifier:
    """Long Range Arena and speech commands."""


@overload
def preset(name: str, **overrides: Any) -> Model:
    """A name that is known only when the program runs."""


def preset(name: str, **overrides: Any) -> Model:
    """Builds a model of the paper, with random weights.

    Args:
        name: One of `PRESETS`: `lra_listops`, `lra_text`, `lra_retrieval`, `lra_image`, `lra_pathfinder`, `lra_pathx`,
            `speech_commands_base`, `speech_commands_big`, `enwik8`, `wikitext103`, `wmt`.
        **overrides: Any option of the layers (`megablocks.stacks.options.LayerOptions`), of the stack (`num_layers`,
            `embed_dim`, `layer_drop`, `checkpoint`, `final_norm_affine`) or of the model. `truncation` is that of an
            encoder; decoders are not truncated unless it is given here.

    Raises:
        ValueError: If no preset has this name; the message lists those that there are.
        TypeError: If an override is not an option of this model; the message lists those that are.

    Note:
        Vocabularies are those of the usual preparations of the data; override `vocab_size` for yours (of `wmt`
        `source_vocab_size`), and with `wikitext103` also `adaptive_cutoffs` if it is small: `None` for one table.
        Widths do not follow one another: whoever overrides `embed_dim` overrides `qk_dim`, `value_dim` and `ffn_dim`
        as well. The widths of `wikitext103` are those of the released code, with which the paper's 252M parameters come
        out; the paper's table says 1536 where the code has 2048.

    Example:
        >>> model = preset("enwik8", num_layers=2, embed_dim=64, qk_dim=32, value_dim=128, ffn_dim=128)
        >>> model.set_chunk_size(4096)        # as the paper does at test time
    """
    entry = lookup("name", name, PRESETS)
    options = {**dict(zip(_SIZES, entry.sizes, strict=True)), **entry.options, **overrides}
    if options.get("position_bias") != "simple" and "max_positions" not in overrides:
        options.pop("max_positions", None)  # the preset's table goes with the preset's bias
    model_options = set(inspect.signature(entry.kind).parameters) - {"encoder", "decoder"}
    unknown = sorted(set(options) - _STACK_OPTIONS - model_options)
    if unknown:
        known = ", ".join(sorted(_STACK_OPTIONS | model_options))
        raise TypeError(f"`{unknown[0]}` is not an option of {name}, a {entry.kind.__name__}; its options are {known}.")
    where = {key: options[key] for key in ("device", "dtype") if key in options}
    stack = {key: value for key, value in options.items() if key in _STACK_OPTIONS} | where
    rest = {key: value for key, value in options.items() if key in model_options}
    if entry.kind is MegaClassifier:
        return MegaClassifier(mega_encoder(**stack), **rest)
    decoder = mega_decoder(
        cross_attention=entry.kind is MegaSeq2Seq, **stack | {"truncation": overrides.get("truncation")}
    )
    if entry.kind is MegaLanguageModel:
        return MegaLanguageModel(decoder, **rest)
    return MegaSeq2Seq(mega_encoder(**stack), decoder, **rest)
