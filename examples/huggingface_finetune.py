"""Fine-tunes a MEGA with transformers' Trainer: which topic of Python's manual does a paragraph come from?

    python examples/huggingface_finetune.py                 under two minutes on two CPU cores, nothing to download
    python examples/huggingface_finetune.py --save topics   keeps the model, which `from_pretrained("topics")` reads
    python examples/huggingface_finetune.py --model DIR     begins with your checkpoint, the body of any Mega model

The text is Python's reference manual, as every Python carries it for `help()`; a fifth of its paragraphs is held out.
Without a checkpoint the model begins with new weights, and a tokenizer is trained on the spot. Needs the extra
`transformers`.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections import Counter
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from megablocks.huggingface import (
    MegaConfig,
    MegaForSequenceClassification,
)  # this import alone makes `Auto...` classes know MEGA

LONGEST = 96  # tokens that are read of a paragraph
SHORTEST = 60  # characters: below, a paragraph is a heading or a scrap of code


class Paragraph(NamedTuple):
    """A piece of the manual, and the topic that it stands in."""

    text: str
    topic: str


def read_manual() -> list[Paragraph]:
    """Returns the paragraphs of the manual, each once: topics repeat each other, and the longest one keeps it."""
    owners: dict[str, str] = {}
    for topic in sorted(topics, key=lambda topic: -len(topics[topic])):
        for paragraph in topics[topic].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST:
                owners.setdefault(text, topic)
    return [Paragraph(text, topic) for text, topic in owners.items()]


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that knows the most frequent pieces of words; the model pools its first token, [CLS]."""
    special = ["[CLS]", "[PAD]", "[SEP]"]  # at the places that MegaConfig expects: bos 0, pad 1, eos 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    roles = dict(zip(("cls_token", "pad_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def encode(tokenizer: PreTrainedTokenizerBase, paragraphs: list[Paragraph], labels: dict[str, int]) -> list[Any]:
    """Returns what a Trainer reads: the tokens of each paragraph and the number of its topic."""
    given = tokenizer([each.text for each in paragraphs], truncation=True, max_length=LONGEST)
    return [
        {"input_ids": ids, "labels": labels[each.topic]}
        for ids, each in zip(given["input_ids"], paragraphs, strict=True)
    ]


def accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of rows whose greatest logit is that of their label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def new_model(
    tokenizer: PreTrainedTokenizerBase, labels: dict[str, int], *, quick: bool
) -> MegaForSequenceClassification:
    """Returns a small classifier with new weights."""
    width = 16 if quick else 64
    config = MegaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1 if quick else 2,
        hidden_size=width,
        intermediate_size=2 * width,
        nffn_hidden_size=2 * width,
        normalization_type="layernorm",
        **names(labels),
    )
    return MegaForSequenceClassification(config)


def names(labels: dict[str, int]) -> dict[str, Any]:
    """Returns what a configuration says of its labels."""
    return {"label2id": labels, "id2label": {number: topic for topic, number in labels.items()}}


def finetune(
    model: Any, tokenizer: PreTrainedTokenizerBase, train: list[Any], held_out: list[Any], epochs: float, out: str
) -> float:
    """Trains a model and returns its accuracy on what was held out."""
    settings = TrainingArguments(
        output_dir=out,
        num_train_epochs=epochs,
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.05,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),  # a padded row gives what it gives alone
        compute_metrics=accuracy,
        callbacks=[PrintLoss()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


class PrintLoss(TrainerCallback):
    """Prints a line for each epoch."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            print(
                f"  epoch {logs['epoch']:.0f} of {args.num_train_epochs:g}: loss {float(logs['loss']):.2f}", flush=True
            )


def show(model: Any, tokenizer: PreTrainedTokenizerBase, paragraphs: list[Paragraph]) -> None:
    """Prints what the model says of some paragraphs."""
    classify = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer, device=model.device)
    for text, topic in paragraphs:
        said = classify(text, truncation=True, max_length=LONGEST)[0]
        verdict = "right" if said["label"] == topic else f"but it is {topic}"
        print(f"  {textwrap.shorten(text, 100)}\n    {said['label']} ({said['score']:.0%}), {verdict}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topics", type=int, default=7, metavar="N", help="the N longest topics (default: 7)")
    parser.add_argument("--epochs", type=float, default=14, help="times that each paragraph is read (default: 14)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and what is held out (default: 0)")
    parser.add_argument("--model", metavar="DIR", help="a checkpoint with its tokenizer (default: new weights)")
    parser.add_argument("--save", metavar="DIR", help="where to leave model and tokenizer (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that all runs")
    options = parser.parse_args(arguments)
    if not 2 <= options.topics <= 20:
        parser.error(f"--topics must be from 2 to 20, but is {options.topics}")
    if options.epochs <= 0:
        parser.error(f"--epochs must be above 0, but is {options.epochs:g}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the program."""
    options = parse(arguments)
    logging.set_verbosity_error()  # a new classifier has new weights, and transformers would say so
    logging.disable_progress_bar()
    set_seed(options.seed)

    manual = read_manual()
    length: Counter[str] = Counter()
    for text, topic in manual:
        length[topic] += len(text)
    labels = {topic: number for number, (topic, _) in enumerate(length.most_common(options.topics))}
    chosen = [paragraph for paragraph in manual if paragraph.topic in labels]
    shuffled = [chosen[index] for index in torch.randperm(len(chosen)).tolist()]
    held_out, train = shuffled[: len(chosen) // 5], shuffled[len(chosen) // 5 :]
    if options.quick:
        held_out, train, options.epochs = held_out[:32], train[:64], 1
    print(f"{len(train)} paragraphs of Python's manual to train on, {len(held_out)} held out, from its longest topics:")
    print(f"  {', '.join(labels)}")

    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForSequenceClassification.from_pretrained(options.model, **names(labels))
    else:
        tokenizer = train_tokenizer([paragraph.text for paragraph in train], 400 if options.quick else 1000)
        model = new_model(tokenizer, labels, quick=options.quick)
    print(f"\nTraining {model.num_parameters():,} parameters:", flush=True)
    with tempfile.TemporaryDirectory() as out:
        rows, tests = (encode(tokenizer, paragraphs, labels) for paragraphs in (train, held_out))
        right = finetune(model, tokenizer, rows, tests, options.epochs, out)

    ((usual, _),) = Counter(paragraph.topic for paragraph in train).most_common(1)
    share = sum(paragraph.topic == usual for paragraph in held_out) / len(held_out)
    print("\nOf the held-out paragraphs these are put into the right topic:")
    print(f"  {share:6.1%}  by always saying {usual}, the topic with the most paragraphs")
    print(f"  {right:6.1%}  by MEGA\n")
    show(model, tokenizer, held_out[:5])
    if options.save:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
        print(f"\nSaved in {options.save}.")


if __name__ == "__main__":
    main()
