"""Checkpoint files of the original code, read without running anything that stands in them."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Checkpoint(NamedTuple):
    """What a file holds that a model is made of."""

    arguments: dict[str, Any]
    """The arguments of the training run, `arch` among them."""
    weights: dict[str, Tensor]
    """The state dict, by the original's names."""


class _Unread:
    """Stands for what lies beside the weights and is not read: averages of losses and times, numbers of NumPy."""

    def __init__(self, *args: object) -> None:
        """Takes whatever the file says."""

    def __setstate__(self, state: object) -> None:
        """Drops it."""


_UNREAD = [
    *(
        (_Unread, f"fairseq.{module}.{name}")
        for module in ("meters", "logging.meters")
        for name in ("AverageMeter", "TimeMeter", "StopwatchMeter")
    ),
    *((_Unread, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
    (_Unread, "numpy.dtype"),
    *((_Unread, f"numpy.dtypes.{name}DType") for name in ("Float32", "Float64", "Int32", "Int64")),
]


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint file.

    Args:
        path: A `.pt` of the original code: a dictionary with `args` or `cfg`, and `model`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is broken, asks for a class that is not known to be harmless, or holds no checkpoint.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; name a checkpoint of the original code, like checkpoint_best.pt.")
    content = _unpickled(file)
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping):
        raise ValueError(
            f"{file} holds no checkpoint of the original code: that is a dictionary with `args` or `cfg`, and `model`; "
            "fill a module with bare weights by `convert`."
        )
    weights = {str(key): value for key, value in content["model"].items() if isinstance(value, Tensor)}
    arguments = _arguments(content)
    if not arguments or not weights:
        what = "`args` or `cfg`" if weights else "weights under `model`"
        raise ValueError(
            f"{file} holds no {what}, which a model is made from; make one yourself and fill it by `convert`."
        )
    return Checkpoint(arguments, weights)


def _unpickled(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_UNREAD]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|class|call) `?(\w+(?:\.\w+)*)", str(error))
        if asked and re.search("not an allowed|is blocked", str(error)):
            raise ValueError(
                f"{file} asks for `{asked.group(1)}`, which is not known to be harmless, so it is not read; load it "
                "where it was written, and save a dictionary of its `args` and `model` alone."
            ) from error
        raise _broken(file, error) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise _broken(file, error) from error


def _broken(file: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{file} is cut short or no file of PyTorch ({reason}); fetch it again.")


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, those of the model before others where they come in groups."""
    args = content.get("args")
    if args is not None:
        return _plain(args)
    groups = _plain(content.get("cfg"))
    merged: dict[str, Any] = {}
    for name in ("task", "model"):
        merged |= _plain(groups.get(name))
    if "_name" in merged:
        merged.setdefault("arch", merged["_name"])
    return merged


def _plain(group: object) -> dict[str, Any]:
    if isinstance(group, argparse.Namespace):
        return dict(vars(group))
    return {str(key): value for key, value in group.items()} if isinstance(group, Mapping) else {}
