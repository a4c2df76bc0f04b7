"""The script that scores a text: what it prints, going on where it stopped, and one clear line where it cannot."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from megablocks import MegaLanguageModel, evaluate, mega_decoder, mega_encoder, save

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "evaluate_lm.py"
spec = importlib.util.spec_from_file_location("evaluate_lm", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

TEXT = "To be, or not to be,\nthat is the question.\n" * 6


@pytest.fixture
def model(tmp_path: Path) -> MegaLanguageModel:
    """A model over bytes, and its directory beside the text."""
    made = MegaLanguageModel(mega_decoder(1, 8, qk_dim=4, chunk_size=8), 256)
    save(made, tmp_path / "model")
    (tmp_path / "text").write_text(TEXT)
    return made


def run(tmp_path: Path, *options: object) -> int:
    return script.main([str(tmp_path / "model"), str(tmp_path / "text"), *map(str, options)])


def test_bytes(model, tmp_path, capsys):
    assert run(tmp_path, "--chunk-size", 32, "--segment", 50) == 0
    *_, expected = evaluate(model, [torch.tensor([list(TEXT.encode())])], chunk_size=32)
    out = capsys.readouterr().out
    assert f"bytes: {len(TEXT) - 1}\n" in out
    assert f"bits per byte: {expected.bits_per_token:.4f}\n" in out
    assert f"perplexity: {math.exp(expected.mean):.3f}\n" in out


def test_words_with_the_end_of_each_line(model, tmp_path, capsys):
    (tmp_path / "dict.txt").write_text("be, 9\nTo 8\nthat 7\nis 6\n")
    assert run(tmp_path, "--vocabulary", tmp_path / "dict.txt") == 0
    line = [[5, 4, 3, 3, 3, 4, 2], [6, 7, 3, 3, 2]]
    *_, expected = evaluate(model, [torch.tensor([(line[0] + line[1]) * 6])])
    out = capsys.readouterr().out
    assert "words: 71\n" in out
    assert f"perplexity: {expected.perplexity:.3f}\n" in out


def test_interrupted_and_gone_on(model, tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "--segment", 50) == 0
    whole, kept, calls = capsys.readouterr().out, tmp_path / "kept.pt", []
    score = script.megablocks.evaluate

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*given, **options)

    monkeypatch.setattr(script.megablocks, "evaluate", interrupted)
    assert run(tmp_path, "--segment", 50, "--progress", kept) == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert run(tmp_path, "--segment", 50, "--progress", kept) == 0
    assert capsys.readouterr().out == whole
    assert run(tmp_path, "--segment", 40, "--progress", kept) == 2
    assert "was made with other options; name another file, or delete it" in capsys.readouterr().err


def test_one_line_for_what_is_wrong(model, tmp_path, capsys):
    (tmp_path / "text").write_text("a")
    assert run(tmp_path) == 2
    assert "must hold at least two tokens" in capsys.readouterr().err
    save(mega_encoder(1, 8, qk_dim=4), tmp_path / "model")
    assert run(tmp_path) == 2
    assert "holds a MegaEncoder, but only a MegaLanguageModel scores a text" in capsys.readouterr().err
