"""Our side of the benchmark, together with what needs torch alone: FFT, copying, matrix products, a Transformer."""

from __future__ import annotations

import mmap
import platform
from typing import Any

import torch
from benchmark_worker import Makers, Solve, inference, serve, training_step
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import megablocks
from megablocks import MegaLanguageModel, MultiDimensionDampedEMA, generate, mega_decoder, mega_encoder, preset

SEGMENT = 4096
"""Tokens of a long context that one call reads."""
HEADS = 4
"""Those of the Transformer in the Long Range Arena."""


def ema(*, way: str, batch: int, length: int, width: int, averages: int, backward: bool) -> Solve:
    """The moving average on a backend, or `way` "FFT", or nothing but a copy: "copy" and "copy again"."""
    layer = MultiDimensionDampedEMA(width, averages)
    x = torch.randn(batch, length, width, requires_grad=backward)

    def on_backend(x: Tensor) -> Tensor:
        with megablocks.ema_backend(way):
            return layer(x)

    others = {"copy": into_new_memory, "copy again": torch.empty_like(x).copy_, "FFT": lambda x: fft_average(layer, x)}
    call = others.get(way, on_backend)
    return training_step(call, x, torch.randn_like(x), layer.parameters()) if backward else inference(call, x)


def into_new_memory(x: Tensor) -> Tensor:
    """A copy in memory that comes from the system, as that of results this large does, whatever was given back."""
    return torch.frombuffer(mmap.mmap(-1, x.nbytes, mmap.MAP_PRIVATE), dtype=x.dtype).view_as(x).copy_(x)


def fft_average(ema: MultiDimensionDampedEMA, x: Tensor) -> Tensor:
    """The average as the references compute it: D x N x L powers, summed to a kernel, convolved by FFT in float32."""
    length = x.shape[1]
    p = ema.alpha.sigmoid()
    log_q = torch.log(1 - p * ema.delta.sigmoid())
    powers = torch.exp(log_q.unsqueeze(-1) * torch.arange(length))
    weights = (p * ema.beta).unsqueeze(-1) * powers
    kernel = torch.einsum("dnl,dn->dl", weights, ema.eta * ema.ema_dim**-0.5)
    signal = torch.fft.rfft(x.transpose(1, 2).float(), n=2 * length)
    y = torch.fft.irfft(signal * torch.fft.rfft(kernel.float(), n=2 * length), n=2 * length)[..., :length]
    return y.transpose(1, 2) + x * ema.omega


def train(
    *, causal: bool, layers: int, width: int, inner: int, qk: int, chunk: int, dropout: float, batch: int, length: int
) -> Solve:
    """A training step from tokens to hidden states."""
    build = mega_decoder if causal else mega_encoder
    dropouts = {"dropout": dropout, "attention_dropout": dropout, "hidden_dropout": dropout}
    stack = build(layers, width, qk_dim=qk, value_dim=inner, ffn_dim=inner, chunk_size=chunk, **dropouts)
    model = nn.Sequential(nn.Embedding(256, width), stack)
    tokens = torch.randint(256, (batch, length))
    return training_step(model, tokens, torch.randn(batch, length, width), model.parameters())


def products(*, layers: int, width: int, inner: int, qk: int, chunk: int, batch: int, length: int) -> Solve:
    """The matrix products of such a training step, forward and backward, and nothing else."""
    tokens, chunks = batch * length, batch * length // chunk
    projections = [(width, inner), (width, 2 * width + inner + qk), (inner, width), (width, inner), (inner, width)]
    sizes = [(1, tokens, *both) for both in projections]
    sizes += [(chunks, chunk, qk, chunk), (chunks, chunk, chunk, inner)]  # scores, weighted values
    operands = [
        (torch.randn(count, rows, between), torch.randn(count, columns, between).mT, torch.randn(count, rows, columns))
        for count, rows, between, columns in sizes
    ]

    def solve() -> Tensor:
        for _ in range(layers):
            for left, right, gradient in operands:
                y = left @ right
                gradient @ right.mT
                left.mT @ gradient
        return y

    return solve


def language_model(*, layers: int, width: int, inner: int, qk: int, chunk: int | None = None) -> MegaLanguageModel:
    """A causal model over bytes, to be read from and not trained."""
    decoder = mega_decoder(layers, width, qk_dim=qk, value_dim=inner, ffn_dim=inner, chunk_size=chunk)
    return MegaLanguageModel(decoder, vocab_size=256).eval()


def decode(*, batch: int, prompt: int, tokens: int, compiled: bool = False, **sizes: Any) -> Solve:
    """The most probable continuation of a prompt."""
    model = language_model(**sizes)
    read = torch.randint(256, (batch, prompt))
    return lambda: generate(model, read, max_new_tokens=tokens, compiled=compiled).tokens


def read_prompt(*, batch: int, length: int, **sizes: Any) -> Solve:
    """The state behind a prompt, and the logits of its last token, as `generate` reads it."""
    model = language_model(**sizes)
    state = model.init_state(batch)
    return inference(lambda tokens: model(tokens, state=state, last_only=True)[0], torch.randint(256, (batch, length)))


def decode_from(*, position: int, tokens: int, **sizes: Any) -> Solve:
    """The most probable continuation of a context of `position` tokens, which has been read before."""
    model = language_model(**sizes)
    state = model.init_state(1)
    with torch.no_grad():
        for segment in torch.randint(256, (1, position)).split(SEGMENT, dim=1):
            logits, state = model(segment, state=state, last_only=True)
    last = logits.argmax(-1)
    return lambda: generate(model, last, state=state, max_new_tokens=tokens).tokens


def text_encoder(*, length: int, chunk: int) -> Solve:
    """A training step of the encoder with which the paper classifies text, in chunks."""
    encoder = preset("lra_text", chunk_size=chunk).encoder
    x = torch.randn(1, length, encoder.embed_dim, requires_grad=True)
    return training_step(encoder, x, torch.randn_like(x), encoder.parameters())


def transformer(*, length: int, fused: bool) -> Solve:
    """A training step of torch's Transformer encoder with that encoder's widths and depth."""
    sizes = preset("lra_text").encoder
    width, inner = sizes.embed_dim, sizes.layers[0].feed_forward.ffn_dim
    layer = nn.TransformerEncoderLayer(width, HEADS, inner, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, len(sizes.layers))

    def call(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
            return encoder(x)

    x = torch.randn(1, length, width, requires_grad=True)
    return training_step(call, x, torch.randn_like(x), encoder.parameters())


MAKERS: Makers = {
    maker.__name__: maker
    for maker in (ema, train, products, decode, read_prompt, decode_from, text_encoder, transformer)
}
if __name__ == "__main__":
    serve(MAKERS, machine=platform.machine(), backends=megablocks.ema_backend().available)
