"""Trains a byte-level MEGA language model on a text, compares it with other ways to predict bytes, and lets it write.

    python examples/train_byte_lm.py                     about two minutes on two CPU cores, nothing to download
    python examples/train_byte_lm.py --sample-only --prompt "The with statement"
    python examples/train_byte_lm.py --data enwik8 --preset enwik8 --device cuda        the paper's model

The text is Python's reference manual, as every Python carries it for `help()`, or a file of yours; its end is held out.
What a run has learned lies in `runs/`: a checkpoint, from whose directory `megablocks.load` reads the model, and a
picture, `training.png`. Ctrl-C saves and says how to go on.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import io
import lzma
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import megablocks

matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt

RUNS = Path(__file__).resolve().parent.parent / "runs"
OURS = {"checkpoint", "checkpoint.new", "checkpoint.old", "training.png"}  # what a run's directory may hold
FORMAT = "megablocks train_byte_lm 1"
SAVE_EVERY = 300  # seconds
HELD_OUT_AT_MOST = 200_000  # bytes: judging a model by a long text need not take hours
SEGMENT = 4096  # held-out bytes that one call reads; the state makes the result the same for any number
LAGS = 64  # tokens that the picture of the kernels looks back
BITS = 1 / math.log(2)  # bits in a nat


class UserError(Exception):
    """Something that the user can put right; shown as one line."""


@dataclass
class Settings:
    """What makes a run what it is; kept in its checkpoint."""

    data: str | None = None
    preset: str | None = None
    steps: int = 1000
    batch: int = 4
    length: int = 256
    lr: float = 6e-3
    seed: int = 0


PRESET_SETTINGS = {"steps": 20_000, "batch": 1, "length": 4096, "lr": 1e-3}


@dataclass
class Run:
    """A training run, as far as it has come."""

    settings: Settings
    model: megablocks.MegaLanguageModel
    optimizer: torch.optim.AdamW
    text_digest: str
    first_kernels: Tensor
    """The averages' kernels before training, (layers, channels, lags)."""
    losses: list[float] = field(default_factory=list)
    """Bits per byte of every step so far."""


def read_text(path: str | None) -> bytes:
    """Returns the bytes of a file, or Python's reference manual."""
    if path is None:
        from pydoc_data.topics import topics

        # Topics repeat each other's paragraphs. Each is kept once, so that no held-out one was seen in training.
        return "\n\n".join(dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))).encode()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def split(text: bytes, length: int, name: str) -> tuple[Tensor, Tensor]:
    """Cuts a text into what is trained on and what is held out: its last tenth, or less of a long text."""
    held_out = min(len(text) // 10, HELD_OUT_AT_MOST)
    if held_out < 1 or len(text) - held_out <= length:
        needed = max(10, math.ceil((length + 1) / 0.9))
        remedy = "give more text" if length == 1 else "give more text or a smaller --length"
        raise UserError(f"{name} is too short: it has {len(text)} bytes, --length {length} needs {needed}; {remedy}")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[:-held_out], data[-held_out:]


def build_model(preset: str | None) -> megablocks.MegaLanguageModel:
    """Returns a causal MEGA over bytes that attends within chunks: a small one, or one of the paper's."""
    if preset is not None:
        return megablocks.preset(preset, vocab_size=256, adaptive_cutoffs=None)
    decoder = megablocks.mega_decoder(4, 128, qk_dim=64, value_dim=256, ffn_dim=256, chunk_size=128)
    return megablocks.MegaLanguageModel(decoder, vocab_size=256)


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Returns the optimizer; weight decay stands in for dropout, as the paper's authors advise."""
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)


def learning_rate(step: int, settings: Settings) -> float:
    """Rises over the first twentieth of the steps and falls to zero at the last."""
    warm_up = max(1, settings.steps // 20)
    return settings.lr * min((step + 1) / warm_up, 1 - step / settings.steps, 1.0)


def kernels(model: torch.nn.Module) -> Tensor:
    """Returns how each channel of each layer's moving average answers an impulse, (layers, channels, lags)."""
    averages = [part for part in model.modules() if isinstance(part, megablocks.MultiDimensionDampedEMA)]
    with torch.no_grad():
        return torch.stack([average.kernel(LAGS).cpu() for average in averages])


def train(run: Run, text: Tensor, stopped: Callable[[], bool], save: Callable[[], None]) -> None:
    """Trains until the last step, or until `stopped()`; saves at the end and now and then before it."""
    settings, model, optimizer = run.settings, run.model.train(), run.optimizer
    device, saved_at = next(model.parameters()).device, time.monotonic()
    recent = run.losses[-1] if run.losses else 8.0
    with tqdm(total=settings.steps, initial=len(run.losses), desc="training", unit=" steps", dynamic_ncols=True) as bar:
        for step in range(len(run.losses), settings.steps):
            if stopped():
                break
            torch.manual_seed((settings.seed << 32) + step)  # so that a resumed run draws what an unbroken one draws
            starts = torch.randint(len(text) - settings.length, (settings.batch, 1))
            crops = text[starts + torch.arange(settings.length + 1)].long().to(device)

            logits = model(crops[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())
            if not loss.isfinite():
                raise UserError(f"the loss became {loss.item()} in step {step + 1}; try a smaller --lr")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            optimizer.step()

            run.losses.append(loss.item() * BITS)
            recent += 0.05 * (run.losses[-1] - recent) if step else run.losses[-1] - recent
            bar.update()
            bar.set_postfix_str(f"{recent:.3f} bits per byte", refresh=False)
            if time.monotonic() - saved_at > SAVE_EVERY:
                save()
                saved_at = time.monotonic()
    save()


@torch.no_grad()
def bits_per_byte(model: megablocks.MegaLanguageModel, text: Tensor, held_out: Tensor) -> float:
    """Returns what the model pays for the held-out text.

    Every byte is predicted once, from all bytes before it that the stream has seen: it begins with the end of the
    training text, which is read but not counted, and the state is handed from segment to segment.
    """
    model.eval()
    device = next(model.parameters()).device
    before = text[-SEGMENT:]
    _, state = model(before[None, :-1].long().to(device), state=model.init_state(1), last_only=True)
    inputs = torch.cat([before[-1:], held_out[:-1]]).long().to(device)
    nats = 0.0
    segments = list(zip(inputs.split(SEGMENT), held_out.long().to(device).split(SEGMENT), strict=True))
    for given, wanted in tqdm(segments, desc="held-out text", unit=" segments", leave=False, dynamic_ncols=True):
        logits, state = model(given[None], state=state)
        nats += F.cross_entropy(logits[0], wanted, reduction="sum").item()
    return nats / len(held_out) * BITS


def unigram_bits(text: Tensor, held_out: Tensor) -> float:
    """Returns what frequencies of single bytes pay: counted in the training text, plus one each."""
    counts = torch.bincount(text, minlength=256).double() + 1
    return -(counts / counts.sum()).log2()[held_out.long()].mean().item()


def lzma_bits(text: Tensor, held_out: Tensor) -> float:
    """Returns by how much the held-out text lengthens the compressed training text, as far as lzma looks back."""
    before = bytes(text[-(8 << 20) :].tolist())
    added = len(lzma.compress(before + bytes(held_out.tolist()))) - len(lzma.compress(before))
    return 8 * added / len(held_out)


def draw(run: Run, levels: dict[str, float], file: Path) -> None:
    """Draws the loss, and kernels of the averages before and after training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    steps = torch.arange(1, len(run.losses) + 1)
    losses = torch.tensor(run.losses)
    width = max(1, len(losses) // 25)
    left.plot(steps, losses, color="0.85", linewidth=0.8, label="training, each step")
    left.plot(steps[width - 1 :], losses.unfold(0, width, 1).mean(1), label=f"training, mean of {width} steps")
    for (name, level), color in zip(levels.items(), ("C2", "C1", "C3"), strict=True):
        left.axhline(level, color=color, linestyle="--", linewidth=1, label=f"held out, {name}: {level:.2f}")
    left.set(title="Loss", xlabel="step", ylabel="bits per byte", ylim=(0, 8.5))
    left.legend()

    before, after = run.first_kernels[-1], kernels(run.model)[-1]
    strength = after.square()
    reach = (strength.cumsum(1) < 0.9 * strength.sum(1, keepdim=True)).sum(1)  # lags with nine tenths of the energy
    order = reach.argsort(stable=True)
    for index, share in enumerate((0.1, 0.5, 0.9, 1.0)):
        channel = int(order[int(share * (len(order) - 1))])
        right.plot(torch.arange(LAGS), before[channel], color=f"C{index}", linestyle=":")
        right.plot(torch.arange(LAGS), after[channel], color=f"C{index}", marker=".", label=f"channel {channel}")
    right.axhline(0, color="0.8", linewidth=0.8)
    right.plot([], [], color="0.4", linestyle=":", label="before training")
    right.set_xscale("symlog", linthresh=1, linscale=0.5)
    right.minorticks_off()
    right.set_xticks([0, 1, 2, 4, 8, 16, 32, 64], labels=["0", "1", "2", "4", "8", "16", "32", "64"])
    right.set(title="Moving averages of the last layer", xlim=(0, LAGS))
    right.set(xlabel="bytes back", ylabel="weight")
    right.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_sample(model: megablocks.MegaLanguageModel, prompt: bytes, count: int) -> None:
    """Prints a prompt and its continuation, byte by byte as the model's state moves on."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    generator = torch.Generator().manual_seed(0)
    print(decoder.decode(prompt), end="", flush=True)
    for step in megablocks.stream(model, tokens, max_new_tokens=count, temperature=0.7, generator=generator):
        print(decoder.decode(bytes(step.tokens.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


def save_run(run: Run, out: Path) -> None:
    """Writes a checkpoint beside the last one and moves it into its place: there is always a whole one."""
    new, current, old = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    megablocks.save(run.model, new)
    trainer = {"format": FORMAT, "settings": asdict(run.settings), "optimizer": run.optimizer.state_dict()}
    trainer |= {"text_digest": run.text_digest, "first_kernels": run.first_kernels, "losses": run.losses}
    torch.save(trainer, new / "trainer.pt")
    if current.exists():
        shutil.rmtree(old, ignore_errors=True)
        current.rename(old)
    new.rename(current)
    shutil.rmtree(old, ignore_errors=True)


def load_run(out: Path, device: torch.device) -> Run:
    """Reads the last whole checkpoint of a run."""
    places = [out / name for name in ("checkpoint", "checkpoint.old") if (out / name / "trainer.pt").is_file()]
    if not places:
        raise UserError(f"{out} holds no checkpoint of this script; train one, or name its directory with --out")
    try:
        trainer: dict[str, Any] = torch.load(places[0] / "trainer.pt", map_location="cpu", weights_only=True)
        if trainer["format"] != FORMAT:
            raise ValueError(f"its format is {trainer['format']!r}")
        model = megablocks.load(places[0], device=device)
        if not isinstance(model, megablocks.MegaLanguageModel) or model.vocab_size != 256:
            raise ValueError("its model is no language model over bytes")
        optimizer = build_optimizer(model)
        optimizer.load_state_dict(trainer["optimizer"])
        rest = {name: trainer[name] for name in ("text_digest", "first_kernels", "losses")}
        return Run(Settings(**trainer["settings"]), model, optimizer, **rest)
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{places[0]} is broken or not of this script: {reason or type(error).__name__}") from error


def start_run(settings: Settings, out: Path, overwrite: bool, text_digest: str, device: torch.device) -> Run:
    """Returns a run before its first step, after making sure that its directory is free for it."""
    if out.exists() and (not out.is_dir() or {entry.name for entry in out.iterdir()} - OURS):
        raise UserError(f"{out} holds other things than a run of this script; name another directory with --out")
    if any((out / name).exists() for name in ("checkpoint", "checkpoint.old")):
        steps = len(load_run(out, torch.device("cpu")).losses)
        if not overwrite:
            raise UserError(f"{out} holds a run of {steps} steps; add --resume, --overwrite or another --out")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = build_model(settings.preset).to(device)
    return Run(settings, model, build_optimizer(model), text_digest, kernels(model))


@contextmanager
def polite_interrupt() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a wish that is granted between two steps; the second one ends the program as usual."""
    wishes: list[int] = []
    usual = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        wishes.append(number)
        signal.signal(signal.SIGINT, usual)
        # Not print: a signal may come in the midst of another one.
        os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops without saving\n")

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(wishes)
    finally:
        signal.signal(signal.SIGINT, usual)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors here."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns a converter for argparse that accepts numbers above zero."""

    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, but is {text}")
        return value

    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line; what it does not say is `None` or left to `Settings`."""
    about, _, examples = __doc__.partition("\n\n")
    parser = Parser(description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    default, count = Settings(), positive(int)
    run = parser.add_argument_group("the run (a resumed run keeps what it began with, where you do not say otherwise)")
    run.add_argument("--data", metavar="FILE", help="text to train on; any file (default: Python's reference manual)")
    run.add_argument("--preset", choices=["enwik8", "wikitext103"], help="a model of the paper (default: a small one)")
    for name, kind, what in (
        ("steps", count, "steps of training in all"),
        ("batch", count, "crops of the text in each step"),
        ("length", count, "bytes in each crop"),
        ("lr", positive(float), "highest learning rate"),
    ):
        usual = f"(default: {getattr(default, name)}; with --preset {PRESET_SETTINGS[name]})"
        run.add_argument(f"--{name}", type=kind, help=f"{what} {usual}")
    run.add_argument("--seed", type=int, help=f"of weights and crops (default: {default.seed})")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's directory (default: runs/byte_lm or runs/PRESET)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run's directory")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the directory by a new one")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one, else cpu)")
    parser.add_argument("--sample-only", action="store_true", help="only load the checkpoint and write a sample")
    parser.add_argument("--prompt", metavar="TEXT", default="The ", help="what the sample continues (default: 'The ')")
    parser.add_argument("--sample-bytes", type=count, default=400, metavar="N", help="its length (default: 400)")
    options = parser.parse_args(arguments)
    if options.prompt == "":
        parser.error("--prompt must hold at least one character")
    if options.out is None:
        options.out = RUNS / (options.preset or "byte_lm")
    return options


def find_device(name: str | None) -> torch.device:
    """Returns the device of this name, if it works here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} does not work here: {str(error).splitlines()[0]}") from error


def command(*more: str) -> str:
    """Returns the command that started this program, with more options."""
    words = [word for word in sys.argv if word not in {"--overwrite", *more}]
    return (subprocess.list2cmdline if os.name == "nt" else shlex.join)(["python", *words, *more])


def work(options: argparse.Namespace) -> int:
    """Does what the options ask for and returns the exit code."""
    device = find_device(options.device)
    prompt = options.prompt.encode("utf-8", errors="replace")
    if options.sample_only:
        run = load_run(options.out, device)
        write_sample(run.model, prompt, options.sample_bytes)
        return 0

    said = {name: value for name in asdict(Settings()) if (value := getattr(options, name)) is not None}
    if options.data is not None:
        said["data"] = str(Path(options.data).resolve())
    run = load_run(options.out, device) if options.resume else None
    settings = replace(run.settings, **said) if run else Settings(**(PRESET_SETTINGS if options.preset else {}) | said)

    name = settings.data or "Python's reference manual"
    text, held_out = split(data := read_text(settings.data), settings.length, name)
    digest = hashlib.sha256(data).hexdigest()
    if run is None:
        run = start_run(settings, options.out, options.overwrite, digest, device)
    elif (digest, settings.preset) != (run.text_digest, run.settings.preset):
        raise UserError(f"the run in {options.out} was begun with another text or preset; give it those")
    run.settings = settings
    size = sum(parameter.numel() for parameter in run.model.parameters())
    print(f"{name}: {len(text):,} bytes to train on, {len(held_out):,} held out; {size:,} parameters on {device}")

    with polite_interrupt() as stopped:
        train(run, text, stopped, lambda: save_run(run, options.out))
    if len(run.losses) < settings.steps:
        print(f"stopped and saved after {len(run.losses)} of {settings.steps} steps; to go on:\n{command('--resume')}")
        return 130

    levels = {"unigram": unigram_bits(text, held_out), "lzma": lzma_bits(text, held_out)}
    levels["MEGA"] = bits_per_byte(run.model, text, held_out)
    print("\nBits per byte of the held-out text, read as one stream behind the end of the training text:")
    print(f"  {levels['unigram']:.3f}  byte unigram, fitted on the training text")
    print(f"  {levels['lzma']:.3f}  lzma: what the held-out text adds to the compressed training text")
    print(f"  {levels['MEGA']:.3f}  MEGA after {len(run.losses):,} steps")
    draw(run, levels, options.out / "training.png")
    print(f"\nSaved {options.out / 'checkpoint'} and {options.out / 'training.png'}. A sample:\n")
    write_sample(run.model, prompt, options.sample_bytes)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    try:
        return work(parse(arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("error: the device's memory is full; try a smaller --batch or --length", file=sys.stderr)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal cannot show
    sys.exit(main())
