"""What encoder and decoder share: running through layers, dropping them, recomputing them, looking at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from megablocks._checks import check_flag, check_modules, check_one_width, check_optional_size, check_probability
from megablocks.layers import Trace
from megablocks.layers.norm import SequenceNorm, recomputing, sequence_norm


class Stack(nn.Module):
    """A list of layers and a final norm. Abstract: `MegaEncoder` and `MegaDecoder` say how a layer is called."""

    layers: nn.ModuleList
    final_norm: SequenceNorm | None

    def __init__(
        self,
        layers: Iterable[nn.Module],
        final_norm: str | nn.Module | None,
        layer_drop: float,
        checkpoint: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(check_modules("layers", layers))
        check_one_width({f"layers[{index}]": layer for index, layer in enumerate(self.layers)})
        self.layer_drop = check_probability("layer_drop", layer_drop)
        self.checkpoint = check_flag("checkpoint", checkpoint)
        ready = final_norm is None or isinstance(final_norm, SequenceNorm)
        self.final_norm = final_norm if ready else sequence_norm(self.embed_dim, final_norm)  # type: ignore[assignment]

    @property
    def embed_dim(self) -> int:
        """Model width $D$, as the first layer that has an `embed_dim` says."""
        width = self._width
        if width is not None:
            return width
        raise ValueError(
            f"{type(self).__name__} needs a layer with an attribute `embed_dim` to know its width, but none of "
            f"{', '.join(type(layer).__name__ for layer in self.layers)} has one; add it to one of them."
        )

    @property
    def _width(self) -> int | None:
        widths = (getattr(layer, "embed_dim", None) for layer in self.layers)
        return next((width for width in widths if isinstance(width, int)), None)

    def set_chunk_size(self, chunk_size: int | None) -> None:
        """Sets the chunk length of every layer that has one; `None` for no chunks. States stay with theirs."""
        set_chunk_size(self, chunk_size)

    def _through(
        self, x: Tensor, call: Callable[[nn.Module, int, Tensor], tuple[Any, ...]], hidden_states: list[Tensor] | None
    ) -> tuple[Tensor, list[tuple[Any, ...]]]:
        """Runs `x` through all layers: `call` returns a layer's output, and whatever it returned besides.

        The input and the output of each layer are appended to `hidden_states`, where it is given.
        """
        extras = []
        if hidden_states is not None:
            hidden_states.append(x)
        for index, layer in enumerate(self.layers):
            if self.checkpoint and self.training and torch.is_grad_enabled():
                y, *extra = recomputed(call, layer, index, x, use_reentrant=False, **recomputing_options(layer))
            else:
                y, *extra = call(layer, index, x)
            if self.training and self.layer_drop:
                # A choice by value, not by branch: graphs stay whole and processes in step.
                y = torch.where(torch.rand((), device=x.device) < self.layer_drop, x, y)
            x = y
            extras.append(tuple(extra))
            if hidden_states is not None:
                hidden_states.append(x)
        return x, extras

    def _finished(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return x if self.final_norm is None else self.final_norm(x, padding_mask=padding_mask)


def recomputing_options(layer: nn.Module) -> dict[str, Any]:
    """How a layer is computed again: with batch statistics, without counting the batch a second time."""
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in layer.modules()):
        return {"context_fn": lambda: (nullcontext(), recomputing())}
    return {}


def set_chunk_size(module: nn.Module, chunk_size: int | None) -> None:
    """Sets `chunk_size` on every part of a module that has such an attribute."""
    check_optional_size("chunk_size", chunk_size, "no chunks")
    for part in module.modules():
        if "chunk_size" in part.__dict__:
            part.chunk_size = chunk_size  # type: ignore[assignment]


def merged_trace(hidden_states: list[Tensor], traces: Iterable[Trace]) -> Trace:
    """Returns the trace of a stack from its hidden states and the traces of its layers."""
    traces = list(traces)
    return Trace(
        tuple(hidden_states),
        tuple(weights for trace in traces for weights in trace.attention_weights),
        tuple(weights for trace in traces for weights in trace.cross_attention_weights),
    )
