"""Parameters by the names of `oracles`: out of a megablocks layer, and into one from fairseq's keys.

`golden_data.block_params` turns fairseq's keys into the same names, crosses its alpha and delta and drops axes of
length 1; so a golden case is loaded by `load(layer, block_params(case.state))`.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from megablocks.layers import MultiDimensionDampedEMA, RotaryRelativeBias, ScaleNorm, SimpleRelativeBias

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def oracle_name(module: nn.Module, key: str) -> str:
    """What `oracles` calls the parameter or buffer of this name in one block."""
    path, _, leaf = key.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, MultiDimensionDampedEMA):
        return f"ema_{leaf}"
    if isinstance(owner, SimpleRelativeBias):
        return "bias_table"
    if isinstance(owner, RotaryRelativeBias):
        return f"bias_{leaf}"
    if isinstance(owner, nn.Linear):
        return f"{path.rpartition('.')[2].removesuffix('_proj')}_{leaf[0]}"
    if isinstance(owner, ScaleNorm):
        return "norm_scalar"
    return leaf if leaf.startswith("qk_") else f"norm_{leaf}"


def oracle_params(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of one block, the tensors themselves, by the names of `oracles`."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {oracle_name(module, key): tensor for key, tensor in named.items()}


@torch.no_grad()
def load(module: ModuleT, params: dict[str, Tensor]) -> ModuleT:
    """Fills a block in its own precision; every parameter must be there and nothing else."""
    own = {name: tensor for name, tensor in oracle_params(module).items() if not name.endswith("num_batches_tracked")}
    if own.keys() != params.keys():
        raise KeyError(f"the block has {sorted(own)}, but got {sorted(params)}")
    for name, tensor in own.items():
        if tensor.shape != params[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but got {tuple(params[name].shape)}")
        tensor.copy_(params[name])
    return module
