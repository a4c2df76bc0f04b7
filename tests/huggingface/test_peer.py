"""Random models of every class and option, computed by transformers 4.40.2 and here: written there and read here, and
the other way round.

`MEGABLOCKS_PEER` names an interpreter that has transformers 4.40.2. What is known to be wrong there is left out by its
name, E1 to E21 (D26: the chunk borders that left padding moves, which it shares with the original code), and must be
seen to differ: what does not is left out without a reason.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peer import PRECISIONS, Tensors, answer, lively
from safetensors.torch import load_file, save_file
from torch import Tensor

from huggingface_models import SMALL, old_layout, padded, small_config, tokens
from megablocks import huggingface
from megablocks.huggingface import MegaPreTrainedModel

PEER = os.environ.get("MEGABLOCKS_PEER")
pytestmark = pytest.mark.skipif(not PEER, reason="MEGABLOCKS_PEER names no interpreter with transformers 4.40.2")

# Greatest difference, relative to the greatest number of a tensor and at least 1. Measured: 9e-6 and 3e-14.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
LENGTH, CHUNK, FIRST = 12, 4, 5
ROWS = (12, 7, 4)  # real tokens of a padded batch
MEMORY = (5, 2, 3)

CLASSES = [
    "MegaModel",
    "MegaForCausalLM",
    "MegaForMaskedLM",
    "MegaForSequenceClassification",
    "MegaForMultipleChoice",
    "MegaForTokenClassification",
    "MegaForQuestionAnswering",
]
SIMPLE = {"relative_positional_bias": "simple"}
CHUNKED = {"use_chunking": True, "chunk_size": CHUNK}
BIASES = {"rotary": {"relative_positional_bias": "rotary"}, "simple": SIMPLE}
NORMS = {name: {"normalization_type": name} for name in ("scalenorm", "layernorm", "rmsnorm", "batchnorm")}
ATTENTIONS = {name: {"attention_activation": name} for name in ("softmax", "laplace", "relu2")}
# A chunk size without chunking moves the middle of a simple bias, and limits it (E15): it is no shorter than the rows.
CHUNKS = {"whole": {}, "chunked": CHUNKED, "size_alone": {"chunk_size": LENGTH}}
DECODER = {"is_decoder": True, "bidirectional": False}
KINDS = {
    "encoder": {},
    "causal_average": {"bidirectional": False},
    "decoder": DECODER,
    "cross": DECODER | {"add_cross_attention": True},
}
OPTIONS = {
    "default": {},
    "truncated": {"truncation": 3},
    "types": {"add_token_type_embeddings": True, "type_vocab_size": 3},
    "postnorm_attention": {"normalize_before_mega": False},
    "postnorm_feed_forward": {"normalize_before_ffn": False},
    "postnorm": {"normalize_before_mega": False, "normalize_before_ffn": False},
    "no_affine": {"norm_affine": False, "normalization_type": "scalenorm"},
    "no_affine_layernorm": {"norm_affine": False, "normalization_type": "layernorm"},
    "no_affine_rmsnorm": {"norm_affine": False, "normalization_type": "rmsnorm"},
    "no_affine_batchnorm": {"norm_affine": False, "normalization_type": "batchnorm"},
    "no_feed_forward": {"use_normalized_ffn": False},
    "gelu": {"activation": "gelu"},
    "no_pad_token": {"pad_token_id": None},
}
HEADS: dict[str, dict[str, dict[str, Any]]] = {
    "MegaForCausalLM": {"no_dense": {"add_lm_hidden_dense_layer": False}, "untied": {"tie_word_embeddings": False}},
    "MegaForSequenceClassification": {
        "several": {"num_labels": 3, "problem_type": "multi_label_classification"},
        "number": {"num_labels": 1},
        "numbers": {"num_labels": 3, "problem_type": "regression"},
    },
}
HEADS["MegaForMaskedLM"] = HEADS["MegaForCausalLM"]
POOLED = {"MegaForSequenceClassification", "MegaForMultipleChoice"}


@dataclass
class Job:
    """A model of random weights and the calls that are made of it."""

    name: str
    cls: str
    options: dict[str, Any]
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: Tensors = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """What its configuration says besides defaults, in the words of transformers 4.40.2."""
        return SMALL | {"normalization_type": "scalenorm", "max_positions": 2 * LENGTH} | self.options

    @property
    def decoder(self) -> bool:
        return bool(self.config.get("is_decoder"))

    @property
    def cannot_be_made(self) -> bool:
        """Whether initialising its weights fails over there (E11); loading it does not."""
        return self.options.get("normalization_type") == "layernorm" and self.options.get("norm_affine") is False

    def __post_init__(self) -> None:
        torch.manual_seed(len(self.name))
        asked = {"output_hidden_states": True, "output_attentions": True}
        if self.cls in ("MegaModel", "MegaForCausalLM"):
            asked["use_cache"] = False
        self._call("plain", self._tokens(None) | self._labels(None), flags=asked, gradient=True)
        right, left = (self._tokens(side) for side in ("right", "left"))
        self._call("right", right, flags=asked, gradient=True)
        self._call("left", left, flags=asked)
        self._call("loss", right | self._labels(right["attention_mask"]))
        if self.options.get("normalization_type") == "batchnorm":
            self._call("training", self._tokens(None), train=True, flags=asked)
        if self.cls == "MegaForCausalLM" and self.decoder:
            self._call("steps", self._tokens(None), first=FIRST)
            self._call("padded_steps", self._tokens("left"), first=FIRST)
        if not self.options:
            self._call("embedded", {"inputs_embeds": torch.randn(3, LENGTH, SMALL["hidden_size"])}, flags=asked)
        if self.config["use_chunking"]:
            self._call("chunk", {"input_ids": tokens(2, CHUNK)} | self._memory(2), flags=asked)
            self._call("short", {"input_ids": tokens(2, CHUNK - 1)} | self._memory(2), flags=asked)
            self._call("uneven", {"input_ids": tokens(2, CHUNK + 1)} | self._memory(2), flags=asked)

    def _call(self, name: str, given: Tensors, **how: Any) -> None:
        if self.cls == "MegaForMultipleChoice":
            given = {
                key: tensor if key == "labels" else tensor[:, None].repeat_interleave(2, 1)
                for key, tensor in given.items()
            }
            if "input_ids" in given:
                ids = given["input_ids"]
                given["input_ids"] = torch.where(torch.rand(ids.shape) < 0.5, ids, tokens(*ids.shape[::2])[:, None])
        self.calls[name] = how
        self.inputs |= {f"{name}/{key}": tensor.clone() for key, tensor in given.items()}
        if how.get("gradient"):
            self.inputs |= {f"{name}/cotangent/{key}": tensor for key, tensor in self._cotangents(given).items()}

    def _tokens(self, side: str | None) -> Tensors:
        """Tokens of three rows, with token types and memory where the model reads them."""
        lengths = ROWS if side else (LENGTH,) * len(ROWS)
        ids, mask = padded([tokens(1, length)[0] for length in lengths], side or "right")
        given = {"input_ids": ids} | ({"attention_mask": mask} if side else {}) | self._memory(len(ROWS), side)
        if self.config.get("add_token_type_embeddings"):
            given["token_type_ids"] = torch.randint(3, ids.shape)
        return given

    def _memory(self, batch: int, side: str | None = None) -> Tensors:
        if not self.config.get("add_cross_attention"):
            return {}
        length = CHUNK if self.config["use_chunking"] else max(MEMORY)
        memory = {"encoder_hidden_states": torch.randn(batch, length, SMALL["hidden_size"])}
        if side:
            memory["encoder_attention_mask"] = (torch.arange(length) < torch.tensor(MEMORY)[:, None]).long()
        return memory

    def _labels(self, mask: Tensor | None) -> Tensors:
        rows, labels = len(ROWS), self.config.get("num_labels", 2)
        if self.cls == "MegaModel":
            return {}
        if self.cls == "MegaForQuestionAnswering":
            return {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([11, 5, 2])}
        if self.cls == "MegaForMultipleChoice":
            return {"labels": torch.randint(2, (rows,))}
        if self.cls == "MegaForSequenceClassification":
            if self.config.get("problem_type") == "multi_label_classification":
                return {"labels": torch.randint(2, (rows, labels)).float()}
            if self.config.get("problem_type") == "regression" or labels == 1:
                return {"labels": torch.randn(rows, labels).squeeze(1)}
            return {"labels": torch.randint(labels, (rows,))}
        classes = labels if self.cls == "MegaForTokenClassification" else SMALL["vocab_size"]
        every = torch.randint(classes, (rows, LENGTH))
        every[:, ::5] = -100
        return {"labels": every if mask is None else every.masked_fill(mask == 0, -100)}

    def _cotangents(self, given: Tensors) -> Tensors:
        """Something for every output there may be; zero at padding, where nothing is truth."""
        width, rows = SMALL["hidden_size"], len(ROWS)
        real = given.get("attention_mask", torch.ones(rows, LENGTH)).float()
        pooled = {"pooler_output": torch.randn(rows, width)}
        if self.cls == "MegaModel":
            return {"last_hidden_state": torch.randn(rows, LENGTH, width) * real[..., None]} | pooled
        if self.cls == "MegaForQuestionAnswering":
            return {name: torch.randn(rows, LENGTH) * real for name in ("start_logits", "end_logits")}
        if self.cls in POOLED:
            columns = 2 if self.cls == "MegaForMultipleChoice" else self.config.get("num_labels", 2)
            return {"logits": torch.randn(rows, columns)}
        columns = SMALL["vocab_size"] if self.cls.endswith("LM") else 2
        return {"logits": torch.randn(rows, LENGTH, columns) * real[..., None]}

    def defect(self, call: str, name: str) -> str | None:
        """What is wrong over there with an output of a call, if anything is."""
        config = self.config
        chunked, softmax = config["use_chunking"], config["attention_activation"] == "softmax"
        if self.cls == "MegaForCausalLM" and not self.decoder:
            return "E9"
        simple_cross = config.get("add_cross_attention") and config["relative_positional_bias"] == "simple"
        if chunked and simple_cross and call != "chunk":
            return "E15"
        if call in ("short", "uneven"):
            return "E6" if self.decoder or call == "uneven" else None
        if call in ("steps", "padded_steps"):
            causes = {
                "E6": chunked,
                "E3": config.get("add_cross_attention"),
                "E2": not softmax,
                "E8": config["truncation"] is not None,
                "E4": call == "padded_steps",
            }
            return next((name for name, applies in causes.items() if applies), None)
        if self.cls == "MegaForQuestionAnswering" and call == "loss" and name == "loss":
            return "E21"
        if call == "left":
            if self.decoder:
                return "E5"
            if chunked:
                return "D26"
            if (self.cls in POOLED and name == "logits") or name == "pooler_output":
                return "E18"
        return None


def jobs(cls: str) -> list[Job]:
    """Every option alone, every kind of model, and, under few heads, the options of attention together."""
    whole = cls in ("MegaModel", "MegaForCausalLM")
    kinds = {kind: KINDS[kind] for kind in KINDS if whole or kind in ("encoder", "decoder")}
    if cls == "MegaForCausalLM":
        del kinds["encoder"]  # refused here, attends to the future there (E9)
    choices: dict[str, dict[str, Any]] = {f"{kind}.default": options for kind, options in kinds.items()}
    if cls == "MegaForCausalLM":
        del kinds["causal_average"]
    kind, first = next(iter(kinds.items()))
    for name, options in (NORMS | OPTIONS | ATTENTIONS | BIASES | CHUNKS | HEADS.get(cls, {})).items():
        choices[f"{kind}.{name}"] = first | options
    if whole:
        for kind, norms in zip(kinds, itertools.permutations(NORMS), strict=False):
            together = itertools.product(ATTENTIONS, BIASES, CHUNKS)
            for (attention, bias, chunks), norm in zip(together, itertools.cycle(norms), strict=False):
                options = ATTENTIONS[attention] | BIASES[bias] | CHUNKS[chunks] | NORMS[norm]
                choices[f"{kind}.{attention}.{bias}.{chunks}.{norm}"] = kinds[kind] | options
    without_cache = {} if whole else {"use_cache": False}
    return [
        Job(name, cls, options | (without_cache if options.get("is_decoder") else {}))
        for name, options in choices.items()
        # Statistics of a batch see the future: refused in decoders here (D10).
        if not (options.get("is_decoder") and options.get("normalization_type") == "batchnorm")
    ]


def ask(do: str, directory: Path, asked: list[Job]) -> None:
    """Has the other interpreter do jobs."""
    for job in asked:
        (directory / job.name).mkdir(exist_ok=True)
        save_file(job.inputs, directory / job.name / "inputs.safetensors")
    described = {job.name: {"cls": job.cls, "config": job.config, "calls": job.calls} for job in asked}
    (directory / "jobs.json").write_text(json.dumps(described))
    command = [PEER, str(Path(__file__).with_name("peer.py")), do, str(directory)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]


def answered(model: MegaPreTrainedModel, job: Job, call: str, folder: Path) -> Tensors:
    """What a call gives here, gradients by the names and shapes that are on disk."""
    given = {key.partition("/")[2]: job.inputs[key] for key in job.inputs if key.partition("/")[0] == call}
    found = answer(model, job.calls[call], given)
    gradients = {key.removeprefix("gradient/"): found.pop(key) for key in list(found) if key.startswith("gradient/")}
    if gradients:
        by_name = old_layout(gradients, model, folder)
        found |= {f"gradient/{key}": tensor for key, tensor in by_name.items() if not key.endswith("_float_tensor")}
    return found


def truth(name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The part of an output that stands at real tokens, without an axis of heads."""
    if name.startswith("cross_attentions"):
        tensor = tensor.flatten(0, -3).reshape(-1, *tensor.shape[-2:])
    if mask is None or name.startswith("gradient"):
        return tensor
    mask = mask.flatten(0, -2).bool()
    if name.startswith("attentions"):
        return tensor.reshape(-1, tensor.shape[-1])[mask.flatten()]
    if tensor.dim() >= 2 and tensor.shape[:2] == mask.shape:
        return tensor[mask]
    return tensor


class Comparison:
    """Differences that were found, by what was compared."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.worst = dict.fromkeys(PRECISIONS, 0.0)
        self.compared = self.jobs = 0
        self.left_out: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    def job(self, job: Job, models: dict[str, MegaPreTrainedModel], folder: Path) -> None:
        """Compares all calls of a job."""
        report = json.loads((folder / "answers.json").read_text())
        if "failed" in report:
            if job.cannot_be_made:
                self._differs("E11")
            else:
                self.wrong.append(f"{job.name}: {report['failed']}")
            return
        self.jobs += 1
        answers = load_file(folder / "answers.safetensors")
        for (precision, model), call in itertools.product(models.items(), job.calls):
            ours = answered(model, job, call, folder / "gradients")
            prefix, where = f"{call}/{precision}/", f"{job.cls} {job.name} {call} {precision}"
            theirs = {key.removeprefix(prefix): value for key, value in answers.items() if key.startswith(prefix)}
            if not theirs:
                error = report["errors"][prefix[:-1]]
                defect = job.defect(call, "")
                self._differs(defect) if defect else self.wrong.append(f"{where}: {error}")
                continue
            if ours.keys() != theirs.keys():
                self.wrong.append(f"{where}: {sorted(ours.keys() ^ theirs.keys())}")
            mask = job.inputs.get(f"{call}/attention_mask")
            for name in ours.keys() & theirs.keys():
                pair = (truth(name, tensor[name], mask) for tensor in (ours, theirs))
                self._pair(f"{where} {name}", precision, job.defect(call, name), *pair)

    def _pair(self, where: str, precision: str, defect: str | None, ours: Tensor, theirs: Tensor) -> None:
        if ours.shape != theirs.shape:
            self.wrong.append(f"{where}: {tuple(ours.shape)}, there {tuple(theirs.shape)}")
            return
        scale = max(1.0, float(theirs.abs().max()))
        difference = float((ours.double() - theirs.double()).abs().max()) / scale
        if defect:
            self.left_out[defect] += 1
            if not difference <= 100 * TOLERANCE[precision]:
                self._differs(defect)
            return
        self.compared += 1
        self.worst[precision] = max(self.worst[precision], difference)
        if not difference <= TOLERANCE[precision]:
            self.wrong.append(f"{where}: {difference:.1e}")

    def _differs(self, defect: str) -> None:
        self.seen[defect] += 1

    def close(self) -> None:
        """Fails if anything differs, or was left out without a reason."""
        print(f"{self.jobs} models, {self.compared} tensors; worst {self.worst}; left out {dict(self.left_out)}")
        print(f"seen to differ {dict(self.seen)}")
        assert not self.wrong, f"{len(self.wrong)} differ:\n" + "\n".join(self.wrong[:40])
        assert self.compared
        assert self.left_out.keys() <= self.seen.keys()


def legacy(job: Job) -> dict[str, bool]:
    """What reproduces a norm that does not normalise (E1)."""
    return {"legacy_rms_norm": True} if job.options.get("normalization_type") == "rmsnorm" else {}


def in_precisions(make: Any) -> dict[str, MegaPreTrainedModel]:
    return {precision: make().to(dtype) for precision, dtype in PRECISIONS.items()}


@pytest.mark.parametrize("cls", CLASSES)
def test_models_written_there_are_the_same_here(cls, tmp_path):
    asked = jobs(cls)
    ask("make", tmp_path, asked)
    comparison = Comparison()
    for job in asked:
        folder = tmp_path / job.name
        models = {}
        if (folder / "config.json").exists():
            models = in_precisions(lambda job=job, folder=folder: loaded(job, folder))
        comparison.job(job, models, folder)
    comparison.close()


def loaded(job: Job, folder: Path) -> MegaPreTrainedModel:
    """The model that was written there; every weight must be found, and no other."""
    model, found = getattr(huggingface, job.cls).from_pretrained(folder, output_loading_info=True, **legacy(job))
    assert not any(found.values()), (job.name, found)
    return model


@pytest.mark.parametrize("cls", CLASSES)
def test_models_written_here_are_the_same_there(cls, tmp_path):
    asked, models = jobs(cls), {}
    for job in asked:
        model = getattr(huggingface, cls)(small_config(**job.config | legacy(job)))
        lively(model)
        model.save_pretrained(tmp_path / job.name)
        models[job.name] = model
    ask("load", tmp_path, asked)
    comparison = Comparison()
    for job in asked:
        folder, model = tmp_path / job.name, models[job.name]
        if (folder / "found.json").exists():
            found = json.loads((folder / "found.json").read_text())
            comparison.wrong += [f"{job.name}: {what} {names}" for what, names in found.items() if names]
        comparison.job(job, in_precisions(lambda model=model: copy.deepcopy(model)), folder)
    comparison.close()
