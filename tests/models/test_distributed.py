"""Two processes that share a batch train as one does that has it all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from megablocks import MegaClassifier, mega_encoder

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo to connect processes with"
)


def _model() -> nn.Module:
    torch.manual_seed(0)
    encoder = mega_encoder(2, 16, qk_dim=8, value_dim=32, ffn_dim=32, chunk_size=8, dtype=torch.float64)
    return MegaClassifier(encoder, 4, vocab_size=50, dtype=torch.float64)


def _loss(model: nn.Module, rows: slice) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    tokens, padding = torch.randint(50, (4, 20), generator=source), torch.zeros(4, 20, dtype=torch.bool)
    padding[1, 15:] = padding[2, :7] = True
    loss: torch.Tensor = model(tokens[rows], padding_mask=padding[rows]).square().sum()
    return loss


def _share(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(_model())
    _loss(model, slice(2 * rank, 2 * rank + 2)).backward()
    if rank == 0:  # gradients are means over the processes
        torch.save([2 * parameter.grad for parameter in model.parameters()], Path(directory) / "gradients")
    dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(_share, (str(tmp_path),), nprocs=2)
    model = _model()
    _loss(model, slice(4)).backward()
    for shared, parameter in zip(torch.load(tmp_path / "gradients"), model.parameters(), strict=True):
        torch.testing.assert_close(shared, parameter.grad)
