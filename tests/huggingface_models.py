"""Models of transformers 4.40.2 from `tests/golden/hf`, written as it wrote them and loaded as its users load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from golden_data import GOLDEN, Case, Tensors
from megablocks import huggingface
from megablocks.huggingface import MegaConfig, MegaPreTrainedModel

logging.disable_progress_bar()

SMALL: dict[str, Any] = json.loads((GOLDEN / "hf" / "index.json").read_text())["base_config"]
"""What every recorded model is like, as far as its case does not say otherwise: small, and without dropout."""


SMALL_PAD = 1
"""The token of padding in small models."""


def small_config(**changes: Any) -> MegaConfig:
    """The configuration of a small model without dropout."""
    return MegaConfig(**SMALL | changes)


def write_directory(case: Case, folder: Path, **changes: Any) -> Path:
    """Writes a recorded model as transformers 4.40.2 did: its configuration, and one of each pair of tied weights."""
    config = SMALL | case.args | changes | {"model_type": "mega", "architectures": [case.cls]}
    (folder / "config.json").write_text(json.dumps(config))
    tied = case.record.get("tied", {})
    weights = {key: value for key, value in case.state.items() if key not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_directory(folder: Path, cls: str | None = None, **changes: Any) -> MegaPreTrainedModel:
    """Loads a model in float64; every weight must be there, and no other."""
    cls = cls or json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(huggingface, cls).from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, **changes
    )
    assert not any(found.values()), found
    return model


def written(folder: Path) -> Tensors:
    """The weights in a directory, by their names there."""
    return load_file(folder / "model.safetensors")


def old_layout(tensors: dict[str, Tensor], model: MegaPreTrainedModel, folder: Path) -> Tensors:
    """Tensors by parameter, such as gradients, in the names and shapes in which the model is saved."""
    model.save_pretrained(folder, state_dict={key: tensor.contiguous() for key, tensor in tensors.items()})
    return written(folder)


def tokens(batch: int, length: int) -> Tensor:
    """Random tokens, none of which is special."""
    return torch.randint(3, SMALL["vocab_size"], (batch, length))


def causal_config(**changes: Any) -> MegaConfig:
    """The configuration of a small causal model that goes on until it is stopped."""
    return small_config(**{"is_decoder": True, "bidirectional": False, "eos_token_id": None} | changes)


def lively(model: MegaPreTrainedModel) -> MegaPreTrainedModel:
    """The model in float64 and evaluation, with weights so large that everything in it matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() and "ema" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model.double().eval()


def padded(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Rows of tokens of different lengths as a batch, and its attention mask."""
    length = max(len(row) for row in rows)
    batch = torch.full((len(rows), length), SMALL_PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        batch[index, place], mask[index, place] = row, 1
    return batch, mask
