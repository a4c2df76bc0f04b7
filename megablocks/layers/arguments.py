"""Modules that remember what they were made with, so that a model can be written down and made again."""

from __future__ import annotations

import functools
import inspect
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from torch import nn

from megablocks.layers.dropout import SequenceDropout

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_NOT_REMEMBERED = ("device", "dtype")
"""Where a module lives is the business of whoever loads it; its precision is read off its tensors."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


REMEMBERING: dict[str, type[nn.Module]] = {}
"""Every class that remembers its arguments, by name."""


class Part(Enum):
    """Stands for what is no plain data: a module, modules or a function. Copies and pickles are the same member."""

    HELD = "held in the attribute of the same name"


class Argument(NamedTuple):
    """A constructor's argument and what the constructor made of it."""

    given: Any
    """The argument; `Part.HELD` where it is modules that an attribute of the same name holds."""
    made: Any
    """The attribute of the same name after construction, `Part.HELD` unless it is plain data."""


def remembers_arguments(cls: type[ModuleT]) -> type[ModuleT]:
    """Makes instances of a module class keep their constructor's arguments, defaults included, in `_arguments`.

    Where an attribute has the name of an argument, the constructor must take what the attribute holds, module or plain
    data, as that argument: so is written down what is there, after any surgery.

    Raises:
        ValueError: If megablocks has another class of this name.
    """
    known = REMEMBERING.get(cls.__name__)
    if known is not None and known.__module__.startswith("megablocks.") and known.__module__ != cls.__module__:
        raise ValueError(
            f"A class called {cls.__name__} cannot remember its arguments, because `save` and `load` know classes by "
            "name, and megablocks has one of this name; call it otherwise."
        )
    original = cls.__init__
    signature = inspect.signature(original)
    first = next(iter(signature.parameters))

    @functools.wraps(original)
    def __init__(self: ModuleT, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if type(self) is cls:
            given = signature.bind(self, *args, **kwargs).arguments
            remembered: dict[str, Argument] = {}
            for name, parameter in signature.parameters.items():
                value = given.get(name, parameter.default)
                if name in (first, *_NOT_REMEMBERED) or (name not in given and parameter.kind in _VARIADIC):
                    continue
                held = getattr(self, name, None)
                made = held if _is_plain(held) else Part.HELD
                if not _is_plain(value) and isinstance(held, nn.Module):
                    remembered[name] = Argument(Part.HELD, made)
                elif name in given or _is_plain(value):
                    remembered[name] = Argument(value, made)
            self.__dict__["_arguments"] = remembered

    REMEMBERING[cls.__name__] = cls
    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls


def arguments(module: nn.Module) -> dict[str, Any]:
    """Returns the constructor arguments that make a module like this one, parts as the modules themselves.

    What has changed since construction is taken from the attributes. Some changes show in no argument; whether the
    arguments do make a module like this one is for the caller to see.

    Raises:
        TypeError: If the module's class does not remember its arguments.
    """
    remembered: dict[str, Argument] | None = module.__dict__.get("_arguments")
    if remembered is None:
        raise TypeError(
            f"A {type(module).__name__} cannot be written down, because its class is not one of megablocks; "
            "save its `state_dict()` instead and make the module yourself before loading."
        )
    return {name: _current(argument, getattr(module, name, None)) for name, argument in remembered.items()}


def _current(argument: Argument, held: Any) -> Any:
    """What to give now for an argument, the attribute of its name being `held`."""
    if argument.given is Part.HELD:
        return held
    if isinstance(held, SequenceDropout):
        return held.p
    if isinstance(held, nn.Module) and "_arguments" in held.__dict__:
        return held
    # An attribute may mean something else than its argument, as a factor does that a flag switches on: only a change
    # is taken over.
    changed = (type(held), held) != (type(argument.made), argument.made)
    return held if changed and _is_plain(held) and _is_plain(argument.given) else argument.given


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
