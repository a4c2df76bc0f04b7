"""What the examples in docstrings may use without importing it."""

from __future__ import annotations

import pytest
import torch

import megablocks
from megablocks import functional, layers, state


@pytest.fixture(autouse=True)
def names_of_doctests(doctest_namespace: dict[str, object]) -> None:
    """Hands every docstring `torch` and the public names."""
    torch.manual_seed(0)
    doctest_namespace["torch"] = torch
    for module in (state, functional, layers, megablocks):
        for name in getattr(module, "__all__", ()):
            doctest_namespace[name] = getattr(module, name)
