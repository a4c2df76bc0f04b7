"""The examples for transformers run, and say what they found."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys) -> Iterator[Callable[..., str]]:
    """Runs an example in an empty directory and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = logging.get_verbosity()
    main: dict[str, Callable[..., None]] = {}

    def call(name: str, *options: object) -> str:
        if name not in main:
            spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            main[name] = module.main
        main[name]([str(option) for option in options])
        return capsys.readouterr().out

    yield call
    logging.set_verbosity(before)


def test_a_classifier_is_fine_tuned_and_kept(run, tmp_path):
    printed = run("huggingface_finetune", "--quick", "--topics", 3, "--save", "kept")
    found = re.findall(r"^ +([\d.]+)%  by (always|MEGA)", printed, re.M)
    shares = {name: float(share) for share, name in found}
    assert shares.keys() == {"always", "MEGA"}
    assert all(0 <= share <= 100 for share in shares.values())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained("kept"), AutoTokenizer.from_pretrained("kept")
    assert set(model.config.id2label.values()) == set(re.search(r"topics:\n  (.*)", printed)[1].split(", "))
    text = "The with statement wraps a block."
    given = tokenizer(text, return_tensors="pt")
    assert given["input_ids"][0, 0] == tokenizer.cls_token_id
    padded = tokenizer(text, return_tensors="pt", padding="max_length", max_length=40)
    torch.testing.assert_close(model.eval()(**padded).logits, model(**given).logits)

    again = run("huggingface_finetune", "--quick", "--topics", 3, "--model", "kept")
    assert f"Training {model.num_parameters():,} parameters" in again


def test_a_language_model_writes_in_every_way(run, tmp_path):
    printed = run("huggingface_generate", "--quick", "--prompt", "An import")
    assert len(re.findall(r"^( *\| )?An import.*", printed, re.M)) == 5
    assert "3 of 3 are what the prompt gives alone" in printed
    assert "Writing on from the returned cache gives the same as writing 16 tokens at once" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("huggingface_finetune", ["--topics", "1"]),
        ("huggingface_finetune", ["--epochs", "0"]),
        ("huggingface_generate", ["--steps", "0"]),
        ("huggingface_generate", ["--tokens", "none"]),
        ("huggingface_generate", ["--prompt", ""]),
    ],
)
def test_options_that_make_no_sense(name, options, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, *options)
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


def test_help_tells_what_an_example_does(run, capsys):
    for name in ("huggingface_finetune", "huggingface_generate"):
        with pytest.raises(SystemExit) as end:
            run(name, "--help")
        assert end.value.code == 0
        assert f"python examples/{name}.py" in capsys.readouterr().out
