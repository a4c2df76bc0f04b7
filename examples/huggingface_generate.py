"""Trains a small causal MEGA briefly and lets it write with transformers' `generate`, in every way that has a name.

    python examples/huggingface_generate.py                              under two minutes on two CPU cores
    python examples/huggingface_generate.py --prompt "The with statement"

The text is Python's reference manual, as every Python carries it for `help()`; nothing is downloaded. The model attends
within chunks, so that the cache that `generate` carries along never grows, however long it writes. Needs the extra
`transformers`.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextStreamer, set_seed
from transformers.utils import logging

from megablocks.huggingface import MegaConfig, MegaForCausalLM

BATCH, LENGTH = 8, 128  # crops of a step of training, and tokens of each
CHUNK = 64  # tokens that attention compares at once; beyond, the moving averages remember


def read_manual() -> str:
    """Returns Python's reference manual, each paragraph once."""
    return "\n\n".join(dict.fromkeys("\n\n".join(topics.values()).split("\n\n")))


def train_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that knows the most frequent pieces of words."""
    special = ["<s>", "<pad>", "</s>"]  # at the places that MegaConfig expects: bos 0, pad 1, eos 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    names = dict(zip(("bos_token", "pad_token", "eos_token"), special, strict=True))
    # Prompts of a batch are padded on the left, so that each of them ends where writing begins.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def build_model(vocabulary: int, *, quick: bool) -> MegaForCausalLM:
    """Returns a causal model. It needs two settings for that: `is_decoder=True` and `bidirectional=False`."""
    width = 16 if quick else 128
    config = MegaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=1 if quick else 3,
        intermediate_size=2 * width,
        nffn_hidden_size=2 * width,
        is_decoder=True,
        bidirectional=False,
        use_chunking=True,
        chunk_size=CHUNK,
        normalization_type="layernorm",
        add_lm_hidden_dense_layer=False,
        dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        nffn_activation_dropout_prob=0.0,
        eos_token_id=None,  # the manual is one long text: nothing in it says where to stop
    )
    return MegaForCausalLM(config)


def train(model: MegaForCausalLM, text: Tensor, steps: int) -> None:
    """Trains on random crops of a text; given `labels`, a model returns the loss of each next token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps + 1, pct_start=0.1)
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        crops = text[starts + torch.arange(LENGTH)]
        loss = model(crops, labels=crops).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            print(
                f"  step {step} of {steps}: loss {loss:.2f} nats per token, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    model.eval()


def show(title: str, text: str) -> None:
    """Prints what was written."""
    print(f"\n{title}\n{textwrap.indent(text, '  | ', lambda line: True)}", flush=True)


def write(
    model: MegaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], count: int, **how: Any
) -> list[str]:
    """Returns each prompt and its continuation; several prompts are padded to a batch."""
    given = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**given, max_new_tokens=count, **how)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", metavar="TEXT", default="The statement", help="(default: 'The statement')")
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="tokens to write each time (default: 80)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="steps of training (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and samples (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that all runs")
    options = parser.parse_args(arguments)
    for name in ("tokens", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, but is {getattr(options, name)}")
    if not options.prompt:
        parser.error("--prompt must hold at least one character")
    if options.quick:
        options.steps, options.tokens = min(options.steps, 3), min(options.tokens, 8)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    logging.set_verbosity_error()
    set_seed(options.seed)

    manual = read_manual()
    tokenizer = train_tokenizer(manual[:50_000] if options.quick else manual, 400 if options.quick else 1000)
    text = torch.tensor(tokenizer(manual[:50_000] if options.quick else manual)["input_ids"])
    model = build_model(len(tokenizer), quick=options.quick)
    print(f"{len(text):,} tokens of Python's manual, a model of {model.num_parameters():,} parameters. Training:")
    train(model, text, options.steps)

    prompt, count = options.prompt, options.tokens
    (greedy,) = write(model, tokenizer, [prompt], count, do_sample=False)
    show("Greedy: the most probable token, each time", greedy)

    (sampled,) = write(model, tokenizer, [prompt], count, do_sample=True, temperature=0.8, top_p=0.9)
    show("Sampling: drawn from the most probable tokens", sampled)

    (best,) = write(model, tokenizer, [prompt], count, do_sample=False, num_beams=4, no_repeat_ngram_size=4)
    show("Beams: the most probable of four continuations that are kept, without repeating four tokens", best)

    print("\nStreaming: printed as it is written")
    given = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    model.generate(**given, max_new_tokens=count, do_sample=True, temperature=0.8, streamer=TextStreamer(tokenizer))

    prompts = [prompt, "An exception", "If a class defines a method of this name, it is called"]
    together = write(model, tokenizer, prompts, count, do_sample=False)
    alone = [write(model, tokenizer, [each], count, do_sample=False)[0] for each in prompts]
    show("Three prompts of different lengths, padded to one batch", "\n\n".join(together))
    same = sum(first == second for first, second in zip(together, alone, strict=True))
    print(f"\n{same} of {len(prompts)} are what the prompt gives alone: padding is as if it were not there.")

    first = model.generate(**given, max_new_tokens=count, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=count, do_sample=False)
    whole = model.generate(**given, max_new_tokens=2 * count, do_sample=False)
    kept = first.past_key_values.layers[0].keys.shape[2]
    print(
        f"Writing on from the returned cache gives {'the same' if rest.equal(whole) else 'another text'} as writing "
        f"{2 * count} tokens at once; after {first.past_key_values.get_seq_length()} tokens it holds keys of "
        f"{kept} in each layer, and will never hold more."
    )


if __name__ == "__main__":
    main()
