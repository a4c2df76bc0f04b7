"""The peer's side of the benchmark: the MEGA of Hugging Face's transformers 4.40.2, the last version that maintains it.

Run by `benchmark.py --peer PYTHON` under an interpreter of its own, which needs torch and transformers 4.40.2.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from benchmark_worker import Solve, inference, serve, training_step
from torch import Tensor

try:
    import transformers
    from transformers.models.mega import MegaConfig, MegaForCausalLM, MegaModel
except ImportError as error:
    sys.exit(f"{sys.executable} needs transformers 4.40.2 with its MEGA to be the benchmark's peer: {error}")


def config(
    *, layers: int, width: int, inner: int, qk: int, causal: bool, chunk: int | None = None, dropout: float = 0.0
) -> MegaConfig:
    """The options of the port that say what ours are told; its defaults agree in the rest."""
    return MegaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        nffn_hidden_size=inner,
        shared_representation_size=qk,
        use_chunking=chunk is not None,
        chunk_size=-1 if chunk is None else chunk,
        is_decoder=causal,
        bidirectional=not causal,
        dropout_prob=dropout,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        nffn_activation_dropout_prob=dropout,
        normalization_type="layernorm",
        vocab_size=256,
        pad_token_id=None,  # nor does it look for padding then
        add_lm_hidden_dense_layer=False,
    )


def ema(*, way: str, batch: int, length: int, width: int, averages: int, backward: bool) -> Solve:
    """The moving average; in eval mode it keeps the kernel of its first call, in training it makes one each time.

    The port's layer ends with a SiLU, which no other contender has; it is a small part of its time.
    """
    options = config(layers=1, width=width, inner=width, qk=2, causal=True)
    options.ema_projection_size = averages
    layer = MegaModel(options).layers[0].mega_layer.ema_gate.train(way == "training")
    x = torch.randn(length, batch, width, requires_grad=backward)

    def call(x: Tensor) -> Tensor:
        return layer(x)[0].transpose(0, 1)

    if not backward:
        return inference(call, x)
    return training_step(call, x, torch.randn(batch, length, width), layer.parameters())


def train(*, batch: int, length: int, **options: Any) -> Solve:
    """A training step from tokens to hidden states."""
    model = MegaModel(config(**options), add_pooling_layer=False).train()
    tokens = torch.randint(256, (batch, length))
    gradient = torch.randn(batch, length, options["width"])
    return training_step(
        lambda tokens: model(tokens, use_cache=False).last_hidden_state, tokens, gradient, model.parameters()
    )


def decode(*, batch: int, prompt: int, tokens: int, **options: Any) -> Solve:
    """The most probable continuation, token by token, from cached keys, values and averages."""
    model = MegaForCausalLM(config(causal=True, **options)).eval()

    def call(read: Tensor) -> Tensor:
        cache, chosen = None, []
        for _ in range(tokens):
            output = model(read, past_key_values=cache, use_cache=True)
            read, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            chosen.append(read)
        return torch.cat(chosen, dim=1)

    return inference(call, torch.randint(256, (batch, prompt)))


def read_prompt(*, batch: int, length: int, **options: Any) -> Solve:
    """The logits of a prompt, of which the last count. It makes no state: with chunks the port has none."""
    model = MegaForCausalLM(config(causal=True, **options)).eval()
    return inference(lambda tokens: model(tokens, use_cache=False).logits[:, -1:], torch.randint(256, (batch, length)))


if __name__ == "__main__":
    makers = {"ema": ema, "train": train, "decode": decode, "read_prompt": read_prompt}
    serve(makers, transformers=transformers.__version__)
