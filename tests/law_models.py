"""The stacks and models under the laws: how each is made and called, and what the oracle says of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import oracles
from law_layers import (
    Block,
    attention_final,
    call_with_memory,
    cross_final,
    ema_causal,
    gated_options,
    make_attention,
    make_cross_attention,
    make_feed_forward,
)
from loading import oracle_params
from megablocks.layers import SequenceNorm
from megablocks.models import MegaClassifier, MegaLanguageModel, MegaSeq2Seq
from megablocks.stacks import MegaDecoder, MegaDecoderLayer, MegaEncoder, MegaEncoderLayer
from strategies import Case, Sample

VOCABULARY = 11
CUTOFFS = [4, 7]
CLASSES = 3
LAYERS_OF_A_STACK = Case.num_layers


def looking_back(case: Case) -> Case:
    """The case of a decoder: causal, and without the norm that would see the future."""
    return case.but(causal=True, norm="layernorm" if case.norm == "batchnorm" else case.norm)


def source_case(case: Case) -> Case:
    """The case of the encoder that reads the memory of this one."""
    return case.but(causal=False, length=case.memory_length)


# Stacks


def make_encoder_layer(case: Case, dtype: torch.dtype, device: str) -> MegaEncoderLayer:
    """The encoder layer of a case."""
    feed_forward = make_feed_forward(case, dtype, device) if case.feed_forward else None
    return MegaEncoderLayer(make_attention(case, dtype, device), feed_forward)


def make_decoder_layer(case: Case, dtype: torch.dtype, device: str, *, memory: bool = False) -> MegaDecoderLayer:
    """The decoder layer of a case, with cross-attention if there is a memory."""
    return MegaDecoderLayer(
        make_attention(case, dtype, device),
        make_cross_attention(case, dtype, device) if memory else None,
        make_feed_forward(case, dtype, device) if case.feed_forward else None,
    )


def final_norm(case: Case, dtype: torch.dtype, device: str) -> SequenceNorm | None:
    """The norm behind the last layer, which pre-norm layers need."""
    if case.norm is None or not case.prenorm:
        return None
    return SequenceNorm(case.embed_dim, norm=case.norm, dtype=dtype, device=device)


def make_encoder(case: Case, dtype: torch.dtype, device: str) -> MegaEncoder:
    """The encoder of a case."""
    layers = [make_encoder_layer(case, dtype, device) for _ in range(case.num_layers)]
    return MegaEncoder(layers, final_norm=final_norm(case, dtype, device))


def make_decoder(case: Case, dtype: torch.dtype, device: str, *, memory: bool = False) -> MegaDecoder:
    """The decoder of a case."""
    layers = [make_decoder_layer(case, dtype, device, memory=memory) for _ in range(case.num_layers)]
    return MegaDecoder(layers, final_norm=final_norm(case, dtype, device))


def start_decoder(module: nn.Module, case: Case, sample: Sample, *, memory: bool = False) -> Any:
    """The state before the first token."""
    given = (sample.memory, sample.memory_padding_mask) if memory else ()
    return module.init_state(case.batch, *given, capacity=None if case.chunk_size else case.capacity)


def layer_params(layer: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The parameters of each part that a layer has."""
    return {name: oracle_params(part) for name, part in layer.named_children()}


def stack_params(stack: nn.Module) -> dict[str, Any]:
    """What the oracle takes of a stack, or of one layer, besides options."""
    if not hasattr(stack, "layers"):
        return {"layers": [layer_params(stack)]}
    norm = None if stack.final_norm is None else oracle_params(stack.final_norm)
    return {"layers": [layer_params(layer) for layer in stack.layers], "final_norm": norm}


def stack_options(case: Case) -> dict[str, Any]:
    """The options of a case, as the oracle of a stack takes them."""
    return {
        "causal": case.causal,
        "ema_causal": ema_causal(case),
        "chunk_size": case.chunk_size,
        "truncation": case.truncation,
        "bias": case.bias,
        "training": case.training,
        **gated_options(case),
    }


def stack_oracle(params: dict[str, Any], case: Case, sample: Sample) -> Tensor:
    """The stack, slowly."""
    memory = {"memory": sample.memory, "memory_padding_mask": sample.memory_padding_mask}
    return oracles.decoder(sample.x, padding_mask=sample.padding_mask, **memory, **params, **stack_options(case))


def stack_final(params: dict[str, Any], case: Case, sample: Sample) -> list[Tensor | None]:
    """The final states of all parts, each of what comes into it."""
    leaves = []
    for layer in params["layers"]:
        leaves += attention_final(layer["attention"], case, sample)
        attended = stack_oracle({"layers": [{"attention": layer["attention"]}]}, case, sample)
        crossing = layer.get("cross_attention")
        leaves += [None] if crossing is None else cross_final(crossing, case, sample._replace(x=attended))
        sample = sample._replace(x=stack_oracle({"layers": [layer]}, case, sample))
    return leaves


def decoder_blocks(memory: bool) -> list[Block]:
    """Decoder layer and decoder, with or without cross-attention."""
    parts = 3 if memory else 2
    common = {
        "of": looking_back,
        "params": stack_params,
        "oracle": stack_oracle,
        "start": partial(start_decoder, memory=memory),
        "final": stack_final,
        "memory": memory,
        "chunked": True,
    }
    if memory:
        common["call"] = call_with_memory
    name = "crossing_decoder" if memory else "decoder"
    return [
        Block(name=f"{name}_layer", make=partial(make_decoder_layer, memory=memory), depth=parts, **common),
        Block(name=name, make=partial(make_decoder, memory=memory), depth=parts * LAYERS_OF_A_STACK + 1, **common),
    ]


STACKS = [
    Block(
        name="encoder_layer",
        make=make_encoder_layer,
        params=stack_params,
        oracle=stack_oracle,
        chunked=True,
        normed=True,
        depth=2,
    ),
    Block(
        name="encoder",
        make=make_encoder,
        params=stack_params,
        oracle=stack_oracle,
        chunked=True,
        normed=True,
        depth=2 * LAYERS_OF_A_STACK + 1,
    ),
    *decoder_blocks(memory=False),
    *decoder_blocks(memory=True),
]


# Models


def draw_tokens(case: Case, dtype: torch.dtype) -> Sample:
    """Tokens, and tokens to remember; no dtype changes them."""
    source = torch.Generator().manual_seed(case.seed)
    drawn = case.sample(dtype)
    x, memory = (torch.randint(VOCABULARY, t.shape[:2], generator=source) for t in (drawn.x, drawn.memory))
    return drawn._replace(x=x, memory=memory)


def draw_values(case: Case, dtype: torch.dtype) -> Sample:
    """Continuous inputs, `input_dim` values at each position, a pair of sequences."""
    return case.sample(dtype, width=case.input_dim)


def embedding_norm(case: Case) -> str | None:
    """The name of the norm behind the embedding: that of the layers, where the case asks for one."""
    return case.norm if case.embedding_norm else None


def embedding_params(embedding: nn.Module) -> dict[str, Any]:
    """What the oracle takes of an embedding of tokens or of values."""
    return {
        "table": embedding.tokens.weight if hasattr(embedding, "tokens") else None,
        "projection": None if embedding.projection is None else embedding.projection.weight,
        "shift": getattr(embedding.projection, "bias", None),
        "norm_params": None if embedding.norm is None else oracle_params(embedding.norm),
    }


def embedded(
    params: dict[str, Any], case: Case, x: Tensor, padding_mask: Tensor | None, *, scale: bool = True
) -> Tensor:
    """The embedded inputs, slowly."""
    options = {"scale": scale, "norm": embedding_norm(case), "padding_mask": padding_mask, "training": case.training}
    return oracles.embedding(x, **params, **options)


def make_language_model(case: Case, dtype: torch.dtype, device: str, *, adaptive: bool = False) -> MegaLanguageModel:
    """The language model of a case."""
    return MegaLanguageModel(
        make_decoder(case, dtype, device),
        VOCABULARY,
        input_dim=None if case.tied else case.input_dim,
        tie_output=case.tied,
        adaptive_cutoffs=CUTOFFS if adaptive else None,
        adaptive_factor=2,
        embedding_norm=embedding_norm(case),
        device=device,
        dtype=dtype,
    )


def language_model_params(model: MegaLanguageModel) -> dict[str, Any]:
    """What the oracle takes of a language model."""
    return {
        "embedding": embedding_params(model.embedding),
        "decoder": stack_params(model.decoder),
        "output": model.output.weight,
    }


def language_model_oracle(params: dict[str, Any], case: Case, sample: Sample) -> Tensor:
    """The language model, slowly."""
    x = embedded(params["embedding"], case, sample.x, sample.padding_mask)
    x = stack_oracle(params["decoder"], case, sample._replace(x=x))
    return oracles.linear(x, params["output"], padding_mask=sample.padding_mask)


def language_model_final(params: dict[str, Any], case: Case, sample: Sample) -> list[Tensor | None]:
    """The final state of the decoder."""
    x = embedded(params["embedding"], case, sample.x, sample.padding_mask)
    return stack_final(params["decoder"], case, sample._replace(x=x))


def adaptive_params(model: MegaLanguageModel) -> dict[str, Any]:
    """What the oracle takes of a language model with bands: one whole table, and the output as plain matrices."""
    bands, output = model.embedding, model.output
    pairs = zip(bands.tables, bands.projections, strict=True)
    table = torch.cat([rows.weight.double() @ projection.weight.double().T for rows, projection in pairs])
    norm = None if bands.norm is None else oracle_params(bands.norm)
    tied = output.embedding is not None
    head = torch.cat([output.head.words.weight, output.head.clusters.weight]) if tied else output.head.weight
    tail = [(narrow.weight.T if tied else narrow.weight, words.weight) for narrow, _, words in output.tail]
    return {
        "embedding": {"table": table, "norm_params": norm},
        "decoder": stack_params(model.decoder),
        "output": {"head": head, "tail": tail},
    }


def adaptive_oracle(params: dict[str, Any], case: Case, sample: Sample) -> Tensor:
    """The language model with bands, slowly."""
    x = embedded(params["embedding"], case, sample.x, sample.padding_mask)
    x = stack_oracle(params["decoder"], case, sample._replace(x=x))
    return oracles.adaptive_log_probs(x, **params["output"], padding_mask=sample.padding_mask)


def make_seq2seq(case: Case, dtype: torch.dtype, device: str) -> MegaSeq2Seq:
    """The sequence-to-sequence model of a case; tied, all three tables are one."""
    return MegaSeq2Seq(
        make_encoder(source_case(case), dtype, device),
        make_decoder(case, dtype, device, memory=True),
        source_vocab_size=VOCABULARY,
        target_input_dim=None if case.tied else case.input_dim,
        share_embeddings=case.tied,
        tie_output=case.tied,
        embedding_norm=embedding_norm(case),
        device=device,
        dtype=dtype,
    )


def call_seq2seq(module: nn.Module, sample: Sample, state: Any = None) -> Any:
    """Calls a model with source and target, or, in a stream, with the target: the state holds the source."""
    target = {"target": sample.x, "target_padding_mask": sample.padding_mask}
    if state is not None:
        return module(**target, state=state)
    return module(sample.memory, source_padding_mask=sample.memory_padding_mask, **target)


def start_seq2seq(module: nn.Module, case: Case, sample: Sample) -> Any:
    """The state before the first target token."""
    capacity = None if case.chunk_size else case.capacity
    return module.init_state(sample.memory, sample.memory_padding_mask, capacity=capacity)


def seq2seq_params(model: MegaSeq2Seq) -> dict[str, Any]:
    """What the oracle takes of a sequence-to-sequence model."""
    return {
        "source": embedding_params(model.source_embedding),
        "target": embedding_params(model.target_embedding),
        "encoder": stack_params(model.encoder),
        "decoder": stack_params(model.decoder),
        "output": model.output.weight,
    }


def decoder_sample(params: dict[str, Any], case: Case, sample: Sample) -> Sample:
    """What comes into the decoder of a sequence-to-sequence model."""
    source = embedded(params["source"], case, sample.memory, sample.memory_padding_mask)
    memory = stack_oracle(params["encoder"], source_case(case), Sample(source, sample.memory_padding_mask))
    return sample._replace(x=embedded(params["target"], case, sample.x, sample.padding_mask), memory=memory)


def seq2seq_oracle(params: dict[str, Any], case: Case, sample: Sample) -> Tensor:
    """The sequence-to-sequence model, slowly."""
    x = stack_oracle(params["decoder"], case, decoder_sample(params, case, sample))
    return oracles.linear(x, params["output"], padding_mask=sample.padding_mask)


def seq2seq_final(params: dict[str, Any], case: Case, sample: Sample) -> list[Tensor | None]:
    """The final state of the decoder."""
    return stack_final(params["decoder"], case, decoder_sample(params, case, sample))


def make_classifier(
    case: Case, dtype: torch.dtype, device: str, *, tokens: bool = False, pair: bool = False
) -> MegaClassifier:
    """The classifier of a case."""
    longest = max(case.length, case.memory_length) if pair else case.length
    return MegaClassifier(
        make_encoder(case.but(length=longest), dtype, device),
        CLASSES,
        vocab_size=VOCABULARY if tokens else None,
        input_dim=case.input_dim,
        pair=pair,
        pooling=case.pooling,
        scale_embedding=case.tied,
        head_activation=case.activation,
        embedding_norm=embedding_norm(case),
        device=device,
        dtype=dtype,
    )


def call_pair(module: nn.Module, sample: Sample, state: Any = None) -> Tensor:
    """Calls a classifier of pairs; the memory is the second sequence."""
    masks = {"padding_mask": sample.padding_mask, "second_padding_mask": sample.memory_padding_mask}
    return module(sample.x, sample.memory, **masks)


def classifier_params(model: MegaClassifier) -> dict[str, Any]:
    """What the oracle takes of a classifier."""
    return {
        "embedding": embedding_params(model.embedding),
        "encoder": stack_params(model.encoder),
        "head": [(layer.weight, layer.bias) for layer in model.head],
        "output": model.output.weight,
    }


def classifier_oracle(params: dict[str, Any], case: Case, sample: Sample, *, pair: bool = False) -> Tensor:
    """The classifier, slowly."""
    pooled = []
    for x, mask in ((sample.x, sample.padding_mask), (sample.memory, sample.memory_padding_mask))[: 2 if pair else 1]:
        inputs = embedded(params["embedding"], case, x, mask, scale=case.tied)
        encoded = stack_oracle(params["encoder"], case, Sample(inputs, mask))
        pooled.insert(0, oracles.pool(encoded, case.pooling, padding_mask=mask))
    hidden = torch.cat(pooled, dim=-1)
    for weight, bias in params["head"]:
        hidden = oracles.ACTIVATIONS[case.activation](oracles.linear(hidden, weight, bias))
    return oracles.linear(hidden, params["output"])


def classifier_block(name: str, *, tokens: bool, pair: bool) -> Block:
    """A classifier of tokens or values, of one sequence or two."""
    options = {"call": call_pair} if pair else {}
    return Block(
        name=name,
        make=partial(make_classifier, tokens=tokens, pair=pair),
        params=classifier_params,
        oracle=partial(classifier_oracle, pair=pair),
        draw=draw_tokens if tokens else draw_values,
        pooled=True,
        logits=True,
        memory=pair,
        chunked=True,
        normed=True,
        depth=2 * LAYERS_OF_A_STACK + 5,
        **options,
    )


MODELS = [
    Block(
        name="language_model",
        make=make_language_model,
        of=looking_back,
        params=language_model_params,
        oracle=language_model_oracle,
        draw=draw_tokens,
        start=start_decoder,
        final=language_model_final,
        logits=True,
        chunked=True,
        depth=2 * LAYERS_OF_A_STACK + 3,
    ),
    Block(
        name="adaptive_language_model",
        make=partial(make_language_model, adaptive=True),
        of=looking_back,
        params=adaptive_params,
        oracle=adaptive_oracle,
        draw=draw_tokens,
        start=start_decoder,
        final=language_model_final,
        chunked=True,
        depth=2 * LAYERS_OF_A_STACK + 4,
    ),
    classifier_block("classifier", tokens=True, pair=False),
    classifier_block("continuous_classifier", tokens=False, pair=False),
    classifier_block("pair_classifier", tokens=False, pair=True),
    Block(
        name="seq2seq",
        make=make_seq2seq,
        of=looking_back,
        params=seq2seq_params,
        oracle=seq2seq_oracle,
        call=call_seq2seq,
        draw=draw_tokens,
        start=start_seq2seq,
        final=seq2seq_final,
        memory=True,
        logits=True,
        chunked=True,
        depth=5 * LAYERS_OF_A_STACK + 4,
    ),
]
