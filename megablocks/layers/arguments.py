"""Modules that remember what they were made with, so that a model can be written down and made again."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NOT_REMEMBERED = ("self", "device", "dtype")
"""Where a module lives is the business of whoever loads it; its precision is read off its tensors."""


REMEMBERING: dict[str, type[nn.Module]] = {}
"""Every class that remembers its arguments, by name."""


class Part:
    """Stands for an argument that is a module, or modules: the attribute of the same name holds it."""


PART = Part()


def remembers_arguments(cls: type[ModuleT]) -> type[ModuleT]:
    """Makes instances of a module class keep their constructor's arguments in `_arguments`.

    Arguments that are modules are kept as `PART`: the module must hold them in an attribute of the same name, so that
    what is written down is what is there, after any surgery.
    """
    original = cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: ModuleT, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            given = {name: value for name, value in bound.arguments.items() if name not in _NOT_REMEMBERED}
            self.__dict__["_arguments"] = {
                name: value if _is_plain(value) or not _is_module(self, name) else PART for name, value in given.items()
            }

    REMEMBERING[cls.__name__] = cls
    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls


def arguments(module: nn.Module) -> dict[str, Any]:
    """Returns the constructor arguments that make a module like this one, parts as the modules themselves.

    Raises:
        TypeError: If the module's class does not remember its arguments.
    """
    remembered: dict[str, Any] | None = module.__dict__.get("_arguments")
    if remembered is None:
        raise TypeError(
            f"A {type(module).__name__} cannot be written down, because its class is not one of megablocks; "
            "save its `state_dict()` instead and make the module yourself before loading."
        )
    current = {name: getattr(module, name) if value is PART else value for name, value in remembered.items()}
    if "chunk_size" in inspect.signature(type(module)).parameters:
        current["chunk_size"] = module.chunk_size  # may have been set since
    return current


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_module(owner: nn.Module, name: str) -> bool:
    return isinstance(getattr(owner, name, None), nn.Module)
