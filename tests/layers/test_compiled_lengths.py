"""A compiled layer serves every length with a handful of graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megablocks import MovingAverageGatedAttention, MultiDimensionDampedEMA

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
