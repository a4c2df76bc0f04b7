"""A compiled layer serves every length with a handful of graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megablocks import MovingAverageGatedAttention, MultiDimensionDampedEMA, ema_backend, mega_encoder

LENGTHS = (2, 3, 7, 9, 13, 17, 70, 75, 140, 200, 1100)


@pytest.mark.compile
@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiDimensionDampedEMA(2, 1),
        lambda: MultiDimensionDampedEMA(2, 2, causal=False, truncation=70),
        lambda: MovingAverageGatedAttention(4, 2),
        lambda: MovingAverageGatedAttention(4, 2, chunk_size=5, attention="laplace"),
    ],
    ids=["average", "bidirectional average", "attention", "chunks"],
)
def test_graphs_are_few(make):
    torch._dynamo.reset()
    layer, counter = make().eval(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x = torch.randn(2, length, layer.embed_dim)
        torch.testing.assert_close(compiled(x), layer(x))
    # The first length as it is, then by name: shorter or longer than a chunk, divisible by it or not.
    assert counter.frame_count <= 5


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["auto", "blocked"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_average_is_compiled_with_sizes_by_name(causal, backend):
    torch._dynamo.reset()
    layer, counter = MultiDimensionDampedEMA(4, 2, causal=causal), CompileCounter()
    with ema_backend(backend):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
        for length in (70, 40, 128, 300):
            x = torch.randn(2, length, 4)
            torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiDimensionDampedEMA(4, 2),
        lambda: MultiDimensionDampedEMA(4, 2, causal=False, truncation=70),
        lambda: MovingAverageGatedAttention(4, 2),
        lambda: MovingAverageGatedAttention(4, 2, chunk_size=16),
        lambda: mega_encoder(2, 4, qk_dim=2, attention="laplace", chunk_size=32, truncation=5),
    ],
    ids=["average", "bidirectional average", "attention", "chunks", "stack"],
)
def test_an_exported_program_serves_every_length(make):
    layer = make().eval().requires_grad_(False)
    lengths = ({1: torch.export.Dim.AUTO},)
    program = torch.export.export(layer, (torch.randn(1, 75, 4),), dynamic_shapes=lengths).module()
    for length in (2, 17, 64, 70, 128, 1100):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)
