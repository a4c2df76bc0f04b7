"""Models as files: what they are made of as JSON, their weights as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from megablocks._checks import check_module
from megablocks.layers.arguments import REMEMBERING, arguments

_DESCRIPTION = "model.json"
_FORMAT = "megablocks"
_VERSION = 1
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_BESIDE = re.compile(r"\.writing-[a-z0-9_]{8}")
"""What files of weights, and the directories that they are first written to, are called."""

_NOT_COMPOSITION = {*vars(nn.Module()), "_arguments"}
"""Attributes of every module that say nothing of what it is made of: hooks, the mode, what holds its tensors."""


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes a model to a directory: its composition to `model.json`, its weights to a safetensors file.

    Any module of megablocks can be written, any composition of them, and modules of your own classes decorated with
    `megablocks.layers.arguments.remembers_arguments`. Parts and weights that are shared stay shared. Options and parts
    set since the model was made are written as they are now, or refused; hooks are not part of the model. The weights
    are written beside those of an earlier save; only then does `model.json` name the new file, in one step, so that an
    interrupted save leaves the old model whole.

    Args:
        model: The module to write.
        directory: Where to, made if need be. An earlier save there is replaced.

    Raises:
        TypeError: If the model holds something that cannot be written down: a module of another class, a function, a
            change that no argument expresses. Nothing is written then.
        FileExistsError: If the directory holds files, but no model of megablocks. Nothing is written then.
        ImportError: If safetensors is missing.

    Example:
        >>> import tempfile
        >>> ema = MultiDimensionDampedEMA(8, 4)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(ema, directory)
        ...     again = load(directory)
        >>> bool((again.alpha == ema.alpha).all())
        True
    """
    check_module("model", model, "a layer, stack or model of megablocks")
    safetensors = _safetensors()
    target = Path(directory)
    recipe = _describe(model, "", {})
    weights = _distinct(model)
    _check_reproduces(recipe, model)
    _check_target(target)

    target.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    with tempfile.TemporaryDirectory(dir=target, prefix=".writing-") as beside:
        written = Path(beside) / "weights"
        safetensors.save_file(contiguous, written)
        name = f"model-{_digest(written)}.safetensors"
        os.replace(written, target / name)
        description = Path(beside) / _DESCRIPTION
        content = {"format": _FORMAT, "version": _VERSION, "weights": name, "model": recipe}
        description.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(description, target / _DESCRIPTION)
    for old in target.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name != name:
            old.unlink()
        elif _BESIDE.fullmatch(old.name):
            shutil.rmtree(old, ignore_errors=True)


def load(directory: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Reads a model that `save` wrote, in eval mode, in the precision that it had.

    Args:
        directory: Where it was written to.
        device: Where the model shall be.

    Raises:
        FileNotFoundError: If there is no such directory, or it holds no model of megablocks.
        ValueError: If the description or the weights are broken, or of a later version; nothing is half-loaded.
        ImportError: If safetensors is missing.
    """
    safetensors = _safetensors()
    source = Path(directory)
    content = _read_description(source)
    file = source / str(content.get("weights"))
    if not file.is_file():
        raise ValueError(f"{source} is broken: its description names {file.name}, which is missing; save it again.")
    try:
        weights: dict[str, Tensor] = safetensors.load_file(file)
    except Exception as error:
        raise ValueError(f"{file} is broken ({error}); save the model again.") from error
    try:
        with torch.random.fork_rng(devices=[]):
            model = _build(content["model"], {})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source / _DESCRIPTION} describes no model of this version: {error}") from error

    wanted = _distinct(model)
    problems = _differences(wanted, weights)
    if problems:
        raise ValueError(f"The weights in {file} do not fit the model that {_DESCRIPTION} describes: {problems}")
    for name, tensor in wanted.items():
        # A copy of its own: what safetensors returns is the file itself, which could not be replaced while in use.
        tensor.data = weights[name].to(device, copy=True)
    loaded: nn.Module = model.to(device).eval()
    return loaded


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Saving and loading models needs safetensors; install it with `pip install 'megablocks-torch[files]'`."
        ) from error
    return safetensors.torch


def _describe(value: Any, path: str, known: dict[int, str]) -> Any:
    """Turns a module or an argument into JSON; a module met before becomes a reference to its path."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList):
        if id(value) in known:
            return {"same_as": known[id(value)]}
        known[id(value)] = path
        described = {name: _describe(item, f"{path}.{name}", known) for name, item in arguments(value).items()}
        return {"class": type(value).__name__, "arguments": described}
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [_describe(item, f"{path}.{index}", known) for index, item in enumerate(value)]
    raise TypeError(
        f"`{path.lstrip('.')}` cannot be written down, because it is {value!r}; use a name, or a module of megablocks, "
        "or save `model.state_dict()` instead."
    )


def _build(described: Any, known: dict[str, nn.Module], path: str = "") -> Any:
    """Undoes `_describe`."""
    if isinstance(described, list):
        return [_build(item, known, f"{path}.{index}") for index, item in enumerate(described)]
    if not isinstance(described, dict):
        return described
    if "same_as" in described:
        return known[described["same_as"]]
    name = described["class"]
    if name not in REMEMBERING:
        raise ValueError(f"unknown class {name!r}; known are {', '.join(sorted(REMEMBERING))}.")
    given = {key: _build(item, known, f"{path}.{key}") for key, item in described["arguments"].items()}
    module = REMEMBERING[name](**given)
    known[path] = module
    return module


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one under its first name only."""
    seen: dict[int, str] = {}
    named: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            named[name] = tensor
    return named


def _differences(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """Says which weights are missing, superfluous or of another shape; empty where all fit."""
    missing = sorted(set(wanted) - set(found))
    surplus = sorted(set(found) - set(wanted))
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(found))
        if wanted[name].shape != found[name].shape
    ]
    parts = {"missing": missing, "not wanted": surplus, "of another shape": shapes}
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _check_reproduces(recipe: Any, model: nn.Module) -> None:
    try:
        with torch.device("meta"):
            again = _build(recipe, {})
        problems = _differences(_distinct(again), _distinct(model)) or ", ".join(_changes(model, again))
    except (TypeError, ValueError) as error:
        raise _cannot_be_written(str(error)) from error
    if problems:
        raise _cannot_be_written(problems)


def _cannot_be_written(problems: str) -> TypeError:
    return TypeError(
        f"The model was changed since it was made in a way that cannot be written down ({problems}); "
        "save `model.state_dict()` instead."
    )


def _changes(model: nn.Module, again: nn.Module) -> list[str]:
    """Names the parts and attributes in which two modules, one of them on the meta device, differ."""
    changed = []
    others = dict(again.named_modules())
    for path, module in model.named_modules():
        other = others.pop(path, None)
        if type(other) is not type(module):
            changed.append(f"`{path}` is a {type(module).__name__}")
            continue
        for name in sorted((vars(module).keys() | vars(other).keys()) - _NOT_COMPOSITION):
            # What a module was given besides, as a note to its owner, matters only where it hides a method.
            matters = name in vars(other) or (hasattr(type(module), name) and not name.startswith("_"))
            if matters and not _same(getattr(module, name, None), getattr(other, name, None)):
                changed.append(f"`{path}.{name}`".replace("`.", "`"))
    return [*changed, *(f"`{path}` is gone" for path in others)]


def _same(one: Any, other: Any) -> bool:
    """Whether two attributes mean the same: equal data, the same functions with the same data."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (bool, int, float, str)):
        return bool(one == other)
    if isinstance(one, (nn.Module, torch.Tensor)):
        return True  # compared, if at all, in their own places
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, FunctionType):
        # A function made in a constructor is another one in each module.
        held, theirs = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other))
        return one.__code__ is other.__code__ and _same(one.__defaults__, other.__defaults__) and _same(held, theirs)
    if isinstance(one, MethodType):
        return _same(one.__func__, other.__func__)
    if isinstance(one, partial):
        return _same([one.func, one.args, one.keywords], [other.func, other.args, other.keywords])
    if callable(one):
        return hasattr(one, "__dict__") and _same(vars(one), vars(other))
    return True


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory.")
    if target.is_dir() and not all(map(_is_left_behind, target.iterdir())):
        try:
            _read_description(target)
        except FileNotFoundError as error:
            raise FileExistsError(
                f"{target} holds files, but no model of megablocks; name another directory, or an empty one."
            ) from error
        except ValueError:
            return  # a broken model of ours may be replaced


def _is_left_behind(path: Path) -> bool:
    """Whether a save that was killed may have left this, before there was a `model.json`."""
    return bool(_WEIGHTS.fullmatch(path.name) or _BESIDE.fullmatch(path.name))


def _read_description(source: Path) -> dict[str, Any]:
    file = source / _DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(f"{source} holds no model of megablocks: there is no {_DESCRIPTION} in it.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is broken ({error}); save the model again.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise FileNotFoundError(f"{source} holds no model of megablocks: its {_DESCRIPTION} is something else.")
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{file} has version {content.get('version')!r}, but this megablocks reads version {_VERSION}; update it."
        )
    return content


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
