"""What `import megablocks` promises."""

from __future__ import annotations

import inspect

import pytest
from torch import nn

import megablocks

NAMES = [name for name in megablocks.__all__ if not inspect.ismodule(getattr(megablocks, name))]
MODULES = [
    name
    for name in NAMES
    if isinstance(getattr(megablocks, name), type) and issubclass(getattr(megablocks, name), nn.Module)
]


def test_all_is_sorted_and_complete():
    public = {name for name in vars(megablocks) if not name.startswith("_") and name not in ROOMS}
    assert set(megablocks.__all__) == public | {"state"}
    assert list(megablocks.__all__) == sorted(megablocks.__all__, key=lambda name: (name.islower(), name))


ROOMS = {"functional", "huggingface", "interop", "kernels", "layers", "models", "stacks", "state"}


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_is_documented(name):
    thing = getattr(megablocks, name)
    assert inspect.getdoc(thing)
    if isinstance(thing, type):
        for key, member in vars(thing).items():
            if (
                not key.startswith("_")
                and callable(member)
                and getattr(member, "__module__", "").startswith("megablocks")
            ):
                assert inspect.getdoc(member), f"{name}.{key}"


@pytest.mark.parametrize("name", MODULES)
def test_constructors_keep_the_house_rules(name):
    parameters = list(inspect.signature(getattr(megablocks, name)).parameters.values())
    names = [parameter.name for parameter in parameters]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 3 if name == "MegaDecoderLayer" else len(positional) <= 2
    assert len([n for n in names if n not in ("device", "dtype")]) <= 16
    if "device" in names:
        assert names[-2:] == ["device", "dtype"]
    doc = inspect.getdoc(getattr(megablocks, name))
    for parameter in names:
        assert f"{parameter}:" in doc, f"{name} does not say what {parameter} is"
