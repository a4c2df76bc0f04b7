"""The examples run, go on where they were stopped, and fail in one clear line."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import megablocks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = ["--batch", "1", "--length", "16", "--device", "cpu", "--sample-bytes", "8"]
# One thread: fast when tests share a machine, and the same sums in every process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
# The same megablocks as here, installed or not.
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(Path(megablocks.__file__).parents[1]), *sys.path[1:]])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module: calling its `main` saves the seconds in which a process imports torch."""
    spec = importlib.util.spec_from_file_location("train_byte_lm", EXAMPLES / "train_byte_lm.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def error(script, capsys) -> Callable[..., str]:
    """Runs the training script and returns the one line that it fails with."""

    def run(*options: object) -> str:
        assert script.main([str(option) for option in options]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert re.fullmatch(r"error: [^\n]+\n", err)
        return err

    return run


def start(name: str, *options: object, cwd: Path) -> subprocess.Popen[str]:
    words = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=cwd, env=ENVIRONMENT, encoding="utf-8", **pipes)


def run(name: str, *options: object, cwd: Path) -> tuple[int, str, str]:
    process = start(name, *options, cwd=cwd)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "grüße.txt"
    path.write_text("Grüße aus dem Wald, wo die Bäume stehen. " * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three steps, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    code, printed, err = run("train_byte_lm.py", "--data", text, "--out", out, "--steps", 3, *TINY, cwd=text.parent)
    assert code == 0, err
    assert re.search(r"training.*3/3.*bits per byte", err)
    return out, printed


def test_a_run_prints_what_it_reached_and_leaves_model_and_picture(trained):
    out, printed = trained
    paid = {name: float(bits) for bits, name in re.findall(r"^ +(\d+\.\d+) +(byte unigram|lzma|MEGA)", printed, re.M)}
    assert set(paid) == {"byte unigram", "lzma", "MEGA"}
    assert 3 < paid["byte unigram"] < 6
    assert paid["lzma"] < 2
    assert {path.name for path in out.iterdir()} == {"checkpoint", "training.png"}
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(megablocks.load(out / "checkpoint"), megablocks.MegaLanguageModel)


def test_held_out_bits_are_those_of_one_pass_over_the_stream(trained, text):
    out, printed = trained
    model = megablocks.load(out / "checkpoint")
    data = torch.tensor(list(text.read_bytes()))
    held_out = len(data) // 10
    with torch.no_grad():
        log_p = model(data[None, :-1])[0].log_softmax(-1)  # the training text is shorter than what the stream recalls
    bits = -log_p.gather(1, data[1:, None])[-held_out:].mean() / torch.log(torch.tensor(2.0))
    assert float(re.search(r"(\S+)  MEGA", printed)[1]) == pytest.approx(bits.item(), abs=2e-3)


def test_sample_only_continues_any_prompt(script, trained, capsys):
    out, _ = trained
    before = content(out)
    options = ["--sample-only", "--out", str(out), "--prompt", "Bäume 🌲 stehen", *TINY, "--sample-bytes", "20"]
    assert script.main(options) == 0
    printed, err = capsys.readouterr()
    assert not err
    assert printed.startswith("Bäume 🌲 stehen")
    assert len(printed) > len("Bäume 🌲 stehen\n")
    assert content(out) == before


@pytest.mark.skipif(os.name == "nt", reason="a process cannot be sent a lone Ctrl-C on Windows")
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(text, tmp_path):
    options = ["--data", text, "--steps", 30, *TINY]
    unbroken = start("train_byte_lm.py", "--out", tmp_path / "unbroken", *options, cwd=tmp_path)
    process = start("train_byte_lm.py", "--out", tmp_path / "broken", *options, cwd=tmp_path)
    seen = ""
    while not re.search(r" [1-9]\d*/30 ", seen):
        piece = process.stderr.read(1)
        assert piece, f"it ended before a step was done: {seen}"
        seen += piece
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    reached = int(re.search(r"stopped and saved after (\d+) of 30 steps; to go on:\n", printed)[1])
    assert 1 <= reached < 30
    assert printed.rstrip().endswith("--resume")
    assert {path.name for path in (tmp_path / "broken").iterdir()} == {"checkpoint"}

    # An interrupted save leaves the checkpoint before it under its old name, and half of a new one.
    (tmp_path / "broken/checkpoint").rename(tmp_path / "broken/checkpoint.old")
    (tmp_path / "broken/checkpoint.new").mkdir()
    (tmp_path / "broken/checkpoint.new/model.json").write_text("{")
    code, _, err = run(
        "train_byte_lm.py", "--out", "broken", "--resume", "--device", "cpu", "--sample-bytes", 8, cwd=tmp_path
    )
    assert code == 0, err
    unbroken.communicate(timeout=60)
    whole, resumed = (megablocks.load(tmp_path / name / "checkpoint") for name in ("unbroken", "broken"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-6)
    losses = [torch.load(tmp_path / name / "checkpoint/trainer.pt")["losses"] for name in ("unbroken", "broken")]
    torch.testing.assert_close(*map(torch.tensor, losses))


def test_a_preset_takes_a_step(script, text, tmp_path, monkeypatch, capsys):
    small = functools.partial(megablocks.preset, num_layers=1, embed_dim=16, ffn_dim=16, value_dim=16)
    monkeypatch.setattr(megablocks, "preset", small)
    options = ["--preset", "enwik8", "--steps", "1", "--data", str(text), "--out", str(tmp_path / "run")]
    assert script.main([*options, "--length", "8", "--sample-bytes", "2", "--device", "cpu"]) == 0
    model = megablocks.load(tmp_path / "run/checkpoint")
    assert (model.vocab_size, model.decoder.layers[0].attention.chunk_size) == (256, 2048)


@pytest.mark.parametrize(
    ("size", "message"), [(None, "cannot read .*No such file"), (0, "too short: it has 0 bytes"), (30, "30 bytes")]
)
def test_text_that_cannot_be_used(size, message, error, tmp_path):
    if size is not None:
        (tmp_path / "text").write_bytes(b"x" * size)
    assert re.search(message, error("--data", tmp_path / "text", "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_cannot_be_used(trained, text, error, tmp_path):
    train = ["--data", text, "--steps", 1, *TINY]
    assert "holds no checkpoint" in error("--resume", "--out", tmp_path / "nothing")
    assert "holds no checkpoint" in error("--sample-only", "--out", tmp_path / "nothing")

    foreign = tmp_path / "foreign"
    (foreign / "checkpoint").mkdir(parents=True)
    (foreign / "checkpoint/notes.txt").write_text("mine")
    before = content(tmp_path)
    assert "no checkpoint" in error("--overwrite", "--out", foreign, *train)
    assert "other things" in error("--out", tmp_path, *train)
    assert content(tmp_path) == before


@pytest.mark.parametrize("broken", ["model.json", "model-", "trainer.pt"])
@pytest.mark.parametrize("left", [0, 300])
def test_broken_checkpoints(broken, left, trained, text, error, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (file,) = (path for path in (tmp_path / "run/checkpoint").iterdir() if path.name.startswith(broken))
    file.write_bytes(file.read_bytes()[:left])
    before = content(tmp_path)
    assert "is broken" in error("--resume", "--out", tmp_path / "run")
    assert "is broken" in error("--sample-only", "--out", tmp_path / "run")
    assert "is broken" in error("--overwrite", "--out", tmp_path / "run", "--data", text, *TINY)
    assert content(tmp_path) == before


def test_a_run_is_not_replaced_unasked(trained, text, error):
    out, _ = trained
    before = content(out)
    assert "--overwrite" in error("--out", out, "--data", text, *TINY)
    assert "another text" in error("--resume", "--out", out, "--data", EXAMPLES / "train_byte_lm.py")
    assert content(out) == before


@pytest.mark.parametrize("options", [["--steps", "0"], ["--lr", "fast"], ["--device", "abacus"], ["--prompt", ""]])
def test_options_that_make_no_sense(options, error, tmp_path):
    assert options[0] in error("--out", tmp_path / "run", *options)


def test_the_custom_stack_learns_and_streams(tmp_path):
    code, out, err = run("custom_stack.py", cwd=tmp_path)
    told = "Compiling a kernel for this CPU, or loading it from the cache; later calls need not wait.\n"
    assert (code, err.replace(told, "")) == (0, "")  # told where that takes more than a second
    assert int(re.search(r"streamed .*; (\d+)% of the notes", out)[1]) > 60
    assert len((EXAMPLES / "custom_stack.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.fixture
def benchmark(monkeypatch, tmp_path) -> Callable[..., int]:
    """Runs the benchmark at small sizes, with its results in `tmp_path`; it computes in processes of its own."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    command = importlib.import_module("benchmark")
    return lambda *options: command.main(["--quick", "--turns", "2", "--out", str(tmp_path), *map(str, options)])


def stand_in(path: Path, script: str) -> Path:
    """An interpreter that runs another script than it is told to."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{EXAMPLES / script}"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_benchmark_prints_writes_and_draws_every_suite(benchmark, tmp_path, capsys):
    assert benchmark() == 0
    printed = capsys.readouterr().out
    assert "Without --peer" in printed
    assert "peer /" not in printed
    measured = json.loads((tmp_path / "benchmark.json").read_text())
    assert list(measured["suites"]) == ["ema", "train", "decode", "scaling"]
    for contests in measured["suites"].values():
        assert contests
        for contest in contests:
            assert all(len(seconds) == 2 for seconds in contest["seconds"].values())
            for ratio in contest["ratios"]:
                assert all(value > 0 for value in ratio["values"])
                assert re.search(rf"{contest['title']} .* {ratio['above']} / {ratio['below']} \| \d", printed)
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_the_benchmark_lets_the_peer_take_turns(benchmark, tmp_path, capsys):
    assert benchmark("--suite", "decode", "--peer", stand_in(tmp_path / "python", "benchmark_ours.py")) == 0
    assert len(re.findall(r"time, peer / ours \| \d", capsys.readouterr().out)) == 3
    (reading,) = [
        contest
        for contest in json.loads((tmp_path / "benchmark.json").read_text())["suites"]["decode"]
        if contest["title"].startswith("prompt")
    ]
    assert reading["problems"]["peer"] == reading["problems"]["ours"]
    ours, peers = reading["seconds"]["ours"], reading["seconds"]["peer"]
    assert reading["ratios"][0]["values"] == [theirs / mine for theirs, mine in zip(peers, ours, strict=True)]


def test_a_peer_that_cannot_run_is_told_in_clear_words(benchmark, tmp_path, capsys):
    # No transformers that this Python could have is old enough.
    assert benchmark("--peer", sys.executable) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: benchmark_peer.py, run by .* ended with code 1; its last words:\n", error)
    assert "needs transformers 4.40.2" in error
    assert "Traceback" not in error

    assert benchmark("--peer", tmp_path / "nowhere") == 2
    assert re.fullmatch(r"error: cannot run .*nowhere: .*\n", capsys.readouterr().err)
    assert not (tmp_path / "benchmark.json").exists()
