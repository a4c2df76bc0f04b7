"""Scores a text with a language model, the way the paper does: perplexity, and bits for each token.

    python examples/evaluate_lm.py model text.txt                             a directory of megablocks.save, bytes
    python examples/evaluate_lm.py checkpoint_best.pt test.txt --vocabulary dict.txt --chunk-size 4096

The model is a directory that `megablocks.save` wrote, or a `.pt` of the original code. Without a vocabulary a token is
a byte, and its id the byte's value: bits per token are then bits per byte, as for enwik8. With a fairseq dictionary
(`dict.txt`) tokens are words between spaces, and each line ends with `</s>`, which is predicted and counted too, as for
WikiText-103. The text is read piece by piece, so that its length needs no memory. Ctrl-C says how to go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import megablocks
from megablocks.interop.fairseq import load_checkpoint

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

FORMAT = "megablocks evaluate_lm 1"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first four ids of a fairseq dictionary


class UserError(Exception):
    """Something that the user can put right; shown as one line."""


def read_vocabulary(path: Path) -> dict[str, int]:
    """Returns the ids of a fairseq dictionary, whose lines are a word and how often it occurs."""
    words = [line.rsplit(" ", 1)[0] for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {word: index for index, word in enumerate((*SPECIAL, *words))}


def byte_ids(text: BinaryIO, length: int) -> list[int]:
    """The ids of so many bytes, fewer at the end."""
    return list(text.read(length))


def word_ids(vocabulary: dict[str, int]) -> Callable[[BinaryIO, int], list[int]]:
    """Returns what reads whole lines until there are so many words; the end of a line is one too."""
    unknown, end = vocabulary["<unk>"], vocabulary["</s>"]

    def read(text: BinaryIO, length: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < length and (line := text.readline()):
            ids += [vocabulary.get(word, unknown) for word in line.decode("utf-8").split()] + [end]
        return ids

    return read


def segments(text: BinaryIO, read: Callable[[BinaryIO, int], list[int]], length: int) -> Iterator[tuple[Tensor, int]]:
    """Yields the text in segments of about `length` tokens, and where in the file each of them ends."""
    while ids := read(text, length):
        yield torch.tensor([ids]), text.tell()


def load_model(path: Path, device: str) -> torch.nn.Module:
    """Returns the model of a directory or of a checkpoint of the original code."""
    model = load_checkpoint(path).to(device) if path.is_file() else megablocks.load(path, device=device)
    if not isinstance(model, megablocks.MegaLanguageModel):
        raise UserError(f"{path} holds a {type(model).__name__}, but only a MegaLanguageModel scores a text")
    return model


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What a result that is gone on with must have been made with."""
    names = ("model", "text", "vocabulary", "chunk_size", "segment")
    return {"format": FORMAT, **{name: str(getattr(options, name)) for name in names}}


def read_progress(options: argparse.Namespace) -> tuple[megablocks.Evaluation | None, int]:
    """Returns the earlier result and where in the text it ends."""
    if options.progress is None or not options.progress.exists():
        return None, 0
    kept = torch.load(options.progress, weights_only=True, map_location=options.device)
    if not isinstance(kept, dict) or kept.get("made_with") != identity(options):
        raise UserError(f"{options.progress} was made with other options; name another file, or delete it")
    return megablocks.Evaluation(*kept["result"]), kept["position"]


def write_progress(options: argparse.Namespace, result: megablocks.Evaluation, position: int) -> None:
    """Keeps a result, in one step."""
    beside = options.progress.with_name(options.progress.name + ".new")
    torch.save({"made_with": identity(options), "result": tuple(result), "position": position}, beside)
    beside.replace(options.progress)


def evaluate(options: argparse.Namespace) -> megablocks.Evaluation:
    """Scores the text."""
    model = load_model(options.model, options.device)
    read = byte_ids if options.vocabulary is None else word_ids(read_vocabulary(options.vocabulary))
    result, position = read_progress(options)
    bar = None
    if tqdm is not None:
        bar = tqdm(total=options.text.stat().st_size, initial=position, unit="B", unit_scale=True)
    with options.text.open("rb") as text:
        text.seek(position)
        for tokens, end in segments(text, read, options.segment):
            pieces = [tokens.to(options.device)]
            result = next(megablocks.evaluate(model, pieces, chunk_size=options.chunk_size, after=result))
            if options.progress is not None:
                write_progress(options, result, end)
            if bar is not None:
                bar.update(end - position)
                bar.set_postfix_str(f"{result.bits_per_token:.3f} bits")
            position = end
    if bar is not None:
        bar.close()
    if result is None or not result.tokens:
        raise UserError(f"{options.text} must hold at least two tokens: the first one is not predicted")
    return result


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory of megablocks.save, or a .pt of the original code")
    parser.add_argument("text", type=Path, help="the text")
    parser.add_argument("--vocabulary", type=Path, help="a fairseq dictionary, for words (default: bytes)")
    parser.add_argument("--chunk-size", type=int, help="chunk length of attention (default: the model's)")
    parser.add_argument(
        "--segment", type=int, default=8192, help="tokens read at a time; changes speed and memory only"
    )
    parser.add_argument("--progress", type=Path, help="where to keep the result so far, to go on from")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    options = arguments(words)
    try:
        result = evaluate(options)
    except (UserError, OSError, ValueError, TypeError, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        on = "the same command goes on" if options.progress else "with --progress FILE it could go on later"
        print(f"\ninterrupted; {on}", file=sys.stderr)
        return 130
    token = "byte" if options.vocabulary is None else "word"
    print(f"{token}s: {result.tokens:,}")
    print(f"nats: {result.nats:,.2f} in total, {result.mean:.4f} for each {token}")
    print(f"bits per {token}: {result.bits_per_token:.4f}")
    print(f"perplexity: {result.perplexity:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
