"""The other side of `test_peer.py`: MEGA of transformers 4.40.2, under an interpreter of its own, without megablocks.

    python peer.py make DIRECTORY        builds random models, saves them, and answers calls
    python peer.py load DIRECTORY        loads models that were saved here, and answers calls

`DIRECTORY/jobs.json` lists the jobs by name: a class, its configuration, its calls. `inputs.safetensors` in a directory
named after the job holds what the calls are given, as `<call>/<argument>`. Answers are written beside it:
`answers.safetensors` holds tensors as `<call>/<precision>/<name>`, `answers.json` what failed, `found.json` what
loading reported.

Each call is made twice. `float32` is the code as it stands. `float64` is the code without the three places where it
narrows whatever it is given to float32: both inputs of its FFT, and the tables of its rotary bias.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
Tensors = dict[str, Tensor]


def lively(model: nn.Module) -> None:
    """Draws weights so large that everything in the model matters; averages keep what they were initialised with."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif tensor.is_floating_point() and not any(part in name for part in ("ema", "_float_tensor")):
                tensor.copy_(torch.randn_like(tensor) * 0.4)


def answer(model: nn.Module, call: dict[str, Any], given: Tensors) -> Tensors:
    """Makes a call and returns its outputs by name, and gradients as `gradient/<parameter>` where they are asked for.

    Args:
        model: Whose precision the inputs are brought to.
        call: `flags`, arguments that are no tensors; `first`, how many tokens are read before the others are read one
            by one from a cache; `gradient`, whether to differentiate the loss, or else the products of outputs and
            cotangents; `train`, whether to call in training.
        given: Tensors by argument, and cotangents as `cotangent/<output>`.
    """
    dtype = next(model.parameters()).dtype
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    arguments = {name: tensor for name, tensor in given.items() if not name.startswith("cotangent/")}
    model.train(call.get("train", False))
    model.zero_grad()
    if "first" in call:
        return {"logits": stepped(model, call["first"], arguments).detach()}
    output = model(**arguments, **call.get("flags", {}))
    answers = dict(flattened(output))
    if call.get("gradient"):
        target = answers.get("loss")
        if target is None:
            target = sum((answers[name] * given[f"cotangent/{name}"]).sum() for name in cotangents(answers))
        target.backward()
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            answers[f"gradient/{name}"] = gradient
    return {name: tensor.detach().clone() for name, tensor in answers.items()}


def stepped(model: Callable[..., Any], first: int, given: Tensors) -> Tensor:
    """Logits of the first tokens, read at once, and of the others, read one by one."""
    tokens, mask = given["input_ids"], given.get("attention_mask")
    constant = {name: given[name] for name in given if name.startswith("encoder_")}
    pieces, cache = [], None
    for start in [0, *range(first, tokens.shape[1])]:
        end = max(first, start + 1)
        seen = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(tokens[:, start:end], past_key_values=cache, use_cache=True, **seen, **constant)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def flattened(output: Any) -> Any:
    """Yields the tensors of an output by name; those of a tuple are numbered."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple) and name != "past_key_values":
            yield from ((f"{name}/{index}", each) for index, each in enumerate(value))


def cotangents(outputs: Tensors) -> list[str]:
    """Names of the outputs that gradients are taken of where there is no loss."""
    return [name for name in outputs if "/" not in name and name != "loss"]


def forget(model: nn.Module) -> None:
    """Drops the kernels that this version keeps from one call in evaluation to the next (E13)."""
    for module in model.modules():
        if hasattr(module, "_kernel"):
            module._kernel, module._coeffs = None, None


def widen(model: nn.Module) -> None:
    """Makes a model compute in float64 throughout, as long as `Tensor.float` does not narrow."""
    model.double()
    for module in model.modules():
        if hasattr(module, "sine"):
            length, half = module.sine.shape
            angles = torch.arange(half).double().mul(-torch.log(torch.tensor(10000.0).double()) / half).exp()
            angles = torch.arange(length).double()[:, None] * angles
            module.sine, module.cosine = angles.sin(), angles.cos()


def answer_all(given_model: nn.Module, calls: dict[str, Any], folder: Path) -> None:
    """Makes every call in both precisions and writes the answers; what fails is written down."""
    inputs = load_file(folder / "inputs.safetensors")
    answers, errors = {}, {}
    for precision in PRECISIONS:
        model, narrow = copy.deepcopy(given_model), torch.Tensor.float
        if precision == "float64":
            widen(model)
            narrow = torch.Tensor.double
        for name, call in calls.items():
            given = {key.partition("/")[2]: inputs[key] for key in inputs if key.partition("/")[0] == name}
            forget(model)
            model.config.problem_type = given_model.config.problem_type  # otherwise the first call decides (E17)
            try:
                with mock.patch.object(torch.Tensor, "float", narrow):
                    found = answer(model, call, given)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                errors[f"{name}/{precision}"] = f"{type(error).__name__}: {error}"
            else:
                answers |= {f"{name}/{precision}/{key}": tensor.contiguous() for key, tensor in found.items()}
    save_file(answers, folder / "answers.safetensors")
    (folder / "answers.json").write_text(json.dumps({"errors": errors}))


def main(do: str, directory: Path) -> None:
    """Does the jobs of a directory."""
    import transformers
    from transformers.models import mega

    if transformers.__version__ != "4.40.2":
        sys.exit(f"{sys.executable} has transformers {transformers.__version__}, not 4.40.2")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name, job in json.loads((directory / "jobs.json").read_text()).items():
        folder, cls = directory / name, getattr(mega, job["cls"])
        try:
            if do == "make":
                model = cls(mega.MegaConfig(**job["config"]))
                lively(model)
                model.save_pretrained(folder)
            else:
                model, found = cls.from_pretrained(folder, output_loading_info=True)
                (folder / "found.json").write_text(json.dumps(found))
        except Exception as error:  # what it is matters to the test alone
            (folder / "answers.json").write_text(json.dumps({"failed": f"{type(error).__name__}: {error}"}))
            continue
        answer_all(model, job["calls"], folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
