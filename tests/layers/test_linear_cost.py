"""With chunks nothing grows faster than the length: neither the largest tensor that is made nor the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megablocks import MovingAverageGatedAttention, MultiDimensionDampedEMA, SimpleRelativeBias


class Largest(TorchDispatchMode):
    """Remembers how large the largest tensor was that any operation returned, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // max(1, tensor.element_size()))
        return result


def cost(module: nn.Module, length: int, *, padded: bool, streamed: bool) -> tuple[int, int]:
    """The largest tensor and the floating-point operations of a forward and backward pass."""
    x = torch.randn(1, length, 8, requires_grad=True)
    mask = torch.arange(length).unsqueeze(0) % 5 == 0 if padded else None
    with Largest() as largest, FlopCounterMode(display=False) as flops:
        if streamed:
            y, _ = module(x, padding_mask=mask, state=module.init_state(1))
        else:
            y = module(x, padding_mask=mask)
        y.sum().backward()
    return largest.numel, flops.get_total_flops()


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("attention", ["softmax", "laplace"])
@pytest.mark.parametrize("bias", ["rotary", "simple"])
def test_chunked_attention_is_linear_in_the_length(attention, bias, padded, streamed):
    position_bias = SimpleRelativeBias(32) if bias == "simple" else bias
    layer = MovingAverageGatedAttention(8, 4, chunk_size=32, attention=attention, position_bias=position_bias)
    short, long = (cost(layer, length, padded=padded, streamed=streamed) for length in (2048, 8192))
    # Four times the length: four times the size and work, and a part that does not grow.
    assert long[0] <= 4.1 * short[0]
    assert long[1] <= 4.1 * short[1]
    assert long[0] < 8192 * 8192 / 50


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("truncation", [None, 1000])
def test_the_average_is_linear_in_the_length(causal, truncation):
    layer = MultiDimensionDampedEMA(8, 16, causal=causal, truncation=truncation)
    short, long = (cost(layer, length, padded=False, streamed=False) for length in (8192, 131072))
    # Sixteen times the length. The references' kernel of D x N x L numbers would be 16 times the input.
    assert long[0] <= 16.5 * short[0]
    assert long[1] <= 16.5 * short[1]
    assert long[0] <= 131072 * 8 * 2


def test_a_stream_with_chunks_holds_one_chunk_however_long_it_gets():
    layer = MovingAverageGatedAttention(8, 4, chunk_size=32)
    state = layer.init_state(1)
    held = set()
    with torch.no_grad():
        for length in (1, 31, 1, 500, 7):
            _, state = layer(torch.randn(1, length, 8), state=state)
            held.add(tuple(state.keys.keys.shape))
    assert held == {(1, 32, 4)}
