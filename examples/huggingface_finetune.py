"""Fine-tunes a MEGA with transformers' Trainer: which topic of Python's manual does a paragraph come from?

    python examples/huggingface_finetune.py                 under two minutes on two CPU cores, nothing to download
    python examples/huggingface_finetune.py --save topics   keeps the model, which `from_pretrained("topics")` reads

The text is Python's reference manual, as every Python carries it for `help()`. A model first learns to fill in masked
words of it; its body then goes under a classifier, as a checkpoint of yours would. Some paragraphs are held out from
both. Needs the extra `transformers`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.utils import logging

from megablocks.huggingface import MegaConfig, MegaForMaskedLM  # this import alone makes `Auto...` classes know MEGA

LONGEST = 128  # tokens that are read of a paragraph
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
    special = ["[CLS]", "[PAD]", "[SEP]", "[MASK]"]  # at the places that MegaConfig expects: bos 0, pad 1, eos 2
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
    names = dict(zip(("cls_token", "pad_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)


def encode(tokenizer: PreTrainedTokenizerFast, paragraphs: list[Paragraph], labels: dict[str, int]) -> list[Any]:
    """Returns what a Trainer reads: tokens of each paragraph and, where its topic has a number, that number."""
    given = tokenizer([tokenizer.cls_token + each.text for each in paragraphs], truncation=True)
    rows = [{"input_ids": ids} for ids in given["input_ids"]]
    for row, paragraph in zip(rows, paragraphs, strict=True):
        if paragraph.topic in labels:
            row["labels"] = labels[paragraph.topic]
    return rows


def settings(out: Path, epochs: float, rate: float) -> TrainingArguments:
    """Returns what both trainings share."""
    return TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        weight_decay=0.05,
        warmup_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )


def accuracy(prediction: Any) -> dict[str, float]:
    """Returns the share of rows whose greatest logit is that of their label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def pretrain(
    tokenizer: PreTrainedTokenizerFast, rows: list[Any], out: Path, *, layers: int, width: int, epochs: float
) -> None:
    """Trains a new model to fill in masked tokens, and saves it."""
    config = MegaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        nffn_hidden_size=2 * width,
        normalization_type="layernorm",
        add_lm_hidden_dense_layer=False,
    )
    model = MegaForMaskedLM(config)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    Trainer(model, settings(out, epochs, 4e-3), data_collator=collator, train_dataset=rows).train()
    model.save_pretrained(out)


def finetune(
    tokenizer: PreTrainedTokenizerFast,
    train: list[Any],
    held_out: list[Any],
    labels: dict[str, int],
    out: Path,
    epochs: float,
) -> tuple[Any, float]:
    """Puts the body of a saved model under a new classifier, trains both, and returns them and their accuracy."""
    model = AutoModelForSequenceClassification.from_pretrained(
        out, num_labels=len(labels), label2id=labels, id2label={number: topic for topic, number in labels.items()}
    )
    trainer = Trainer(
        model,
        settings(out, epochs, 2e-3),
        data_collator=DataCollatorWithPadding(tokenizer),  # pads on the right; a row's logits are those it has alone
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
    )
    trainer.train()
    return model, trainer.evaluate()["eval_accuracy"]


def show(model: Any, tokenizer: PreTrainedTokenizerFast, held_out: list[Paragraph]) -> None:
    """Prints what the model says of some held-out paragraphs."""
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=model.device)
    for paragraph in held_out:
        said = classify(tokenizer.cls_token + paragraph.text, truncation=True)[0]
        verdict = "right" if said["label"] == paragraph.topic else f"but it is {paragraph.topic}"
        text = paragraph.text if len(paragraph.text) <= 100 else paragraph.text[:97] + "..."
        print(f"  {text}\n    {said['label']} ({said['score']:.0%}), {verdict}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    about, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topics", type=int, default=7, metavar="N", help="the N longest topics (default: 7)")
    parser.add_argument("--epochs", type=float, default=8, help="of fine-tuning (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and what is held out (default: 0)")
    parser.add_argument(
        "--save", type=Path, metavar="DIR", help="where to leave model and tokenizer (default: nowhere)"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that all runs")
    options = parser.parse_args(arguments)
    if options.topics < 2 or options.topics > 20:
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
    sizes = Counter(dict.fromkeys(topics, 0))
    for paragraph in manual:
        sizes[paragraph.topic] += len(paragraph.text)
    labels = {topic: number for number, (topic, _) in enumerate(sizes.most_common(options.topics))}

    of_topics = [paragraph for paragraph in manual if paragraph.topic in labels]
    order = torch.randperm(len(of_topics)).tolist()
    test = [of_topics[index] for index in order[: len(order) // 5]]
    held_out = set(test)
    rest = [paragraph for paragraph in manual if paragraph not in held_out]
    train = [paragraph for paragraph in rest if paragraph.topic in labels]
    if options.quick:
        rest, train, test = rest[:64], train[:64], test[:32]

    tokenizer = train_tokenizer([paragraph.text for paragraph in rest], 400 if options.quick else 2000)
    print(f"{len(rest):,} paragraphs of the manual, of which {len(train)} from the {len(labels)} longest topics:")
    print(f"  {', '.join(labels)}")
    print(f"{len(test)} more paragraphs from these topics are held out.\n")

    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        small, epochs = options.quick, 1 if options.quick else options.epochs
        print("1. Learning to fill in masked words ...", flush=True)
        pretrain(
            tokenizer,
            encode(tokenizer, rest, {}),
            out,
            layers=1 if small else 2,
            width=16 if small else 128,
            epochs=1 if small else 4,
        )
        print("2. Fine-tuning a classifier ...\n", flush=True)
        model, right = finetune(
            tokenizer, encode(tokenizer, train, labels), encode(tokenizer, test, labels), labels, out, epochs
        )

    ((usual, _),) = Counter(paragraph.topic for paragraph in train).most_common(1)
    share = sum(paragraph.topic == usual for paragraph in test) / len(test)
    print("Of the held-out paragraphs these are put into the right topic:")
    print(f"  {share:6.1%}  by always saying {usual!r}, the topic with the most paragraphs")
    print(f"  {right:6.1%}  by the fine-tuned MEGA\n")
    show(model, tokenizer, test[:5])
    if options.save:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
        print(f"\nSaved in {options.save}.")


if __name__ == "__main__":
    main()
