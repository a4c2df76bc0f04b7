"""Old names on disk, ours in memory: what transformers 4.40.2 wrote is read, and what is written it reads.

The two crossed names are no mistake: what the older code calls a damping factor is the paper's alpha, what it calls a
decay factor is delta.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from megablocks.huggingface.configuration import MegaConfig

PARTS: dict[str, str] = {"mega_layer": "attention", "cross_attn": "cross_attention", "nffn": "feed_forward"}
"""Parts of a layer, by their old names."""

PARAMETERS: dict[str, str] = {
    "ema_gate.kernel_projection_matrix": "ema.eta",
    "ema_gate.residual_weight": "ema.omega",
}
"""Parameters that differ by name alone."""

COLUMNS: dict[str, str] = {
    "ema_gate.damping_factor": "ema.alpha",
    "ema_gate.decay_factor": "ema.delta",
    "ema_gate.ema_expansion_matrix": "ema.beta",
}
"""Parameters that are stored with an axis of length 1 at the end."""

ROWS: dict[str, str] = {"rel_pos_bias.b_param": "position_bias.beta"}
"""Parameters that are stored with an axis of length 1 in front."""

ROTARY: dict[str, str] = {"rel_pos_bias.alpha": "position_bias.alpha"}
"""As `ROWS`; beside it stands a buffer without a meaning, which the older code misses if it is not there."""

BUFFER = "rel_pos_bias._float_tensor"

TABLE = {"rel_pos_bias.rel_pos_bias": "position_bias.weight"}
"""The table of a simple bias, whose middle is stored elsewhere."""

SCALE = {"norm.norm.scalar": "norm.norm.weight"}
"""The scale of a scale norm, which has a name of its own on disk."""


class _Converted(ConversionOps):
    """A change of one tensor that can be undone. Abstract: `_change` says what it is."""

    def __init__(self, *, undo: bool = False) -> None:
        self.undo = undo

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Returns the one tensor, changed, under its new name."""
        given = input_dict[source_patterns[0]]
        tensor = given[0] if isinstance(given, list) else given
        return {self._name(target_patterns[0], **kwargs): self._change(tensor, **kwargs).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        """The change that undoes this one."""
        made = type(self).__new__(type(self))
        made.__dict__ |= self.__dict__ | {"undo": not self.undo}
        return made

    def _name(self, target: str, **kwargs: Any) -> str:
        return target

    def _change(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class _DropAxis(_Converted):
    """Drops an axis of length 1, or puts it back."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def _change(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        return tensor.unsqueeze(self.axis) if self.undo else tensor.squeeze(self.axis)


class _BesideBuffer(_DropAxis):
    """Drops an axis and the buffer that stands beside the tensor on disk, or puts both back."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Returns the one tensor, and on the way to disk the buffer."""
        converted = super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        (tensor,) = converted.values()
        return converted | {name: tensor.new_zeros(1) for name in target_patterns[1:]}


class _Centred(_Converted):
    """Rolls the table of a simple bias so that its middle is a token's own position, or back.

    Stored, the own position stands `bias_centre` entries from the beginning: at the end of the first chunk's half.
    """

    def _change(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        config = _config_of(kwargs["model"], kwargs["full_layer_name"])
        return _centred(tensor, config, undo=self.undo)


class _ScaleName(_Converted):
    """Gives the scale of a scale norm its name on disk; other norms keep theirs."""

    def _name(self, target: str, **kwargs: Any) -> str:
        name: str = kwargs["full_layer_name"]
        if self.undo and _config_of(kwargs["model"], name).normalization_type != "scalenorm":
            return name.removesuffix("scalar") + "weight"
        return target

    def _change(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        return tensor


def checkpoint_names() -> list[WeightRenaming | WeightConverter]:
    """Returns how names and tensors on disk become those in memory; transformers runs it backwards to save."""
    return [
        *(WeightRenaming(rf"layers\.(\d+)\.{old}\.", rf"stack.layers.\1.{new}.") for old, new in PARTS.items()),
        *(WeightRenaming(old.replace(".", r"\."), new) for old, new in PARAMETERS.items()),
        *(WeightConverter(old, new, operations=[_DropAxis(-1)]) for old, new in COLUMNS.items()),
        *(WeightConverter(old, new, operations=[_DropAxis(0)]) for old, new in ROWS.items()),
        *(WeightConverter([old, BUFFER], new, operations=[_BesideBuffer(0)]) for old, new in ROTARY.items()),
        *(WeightConverter(old, new, operations=[_Centred()]) for old, new in TABLE.items()),
        *(WeightConverter(old, new, operations=[_ScaleName()]) for old, new in SCALE.items()),
    ]


def register_checkpoint_names() -> None:
    """Makes transformers read and write Mega checkpoints under their old names."""
    register_checkpoint_conversion_mapping(MegaConfig.model_type, checkpoint_names(), overwrite=True)


def read_old_names(state_dict: dict[str, Any], prefix: str, config: MegaConfig) -> None:
    """Gives tensors that have their names on disk, in place, the names and shapes of memory.

    For those who hand a file to `load_state_dict`, as `Trainer` does when it resumes; `from_pretrained` does not.

    Args:
        state_dict: Tensors by name; other names are left alone.
        prefix: What stands in front of the names of the `MegaModel`.
        config: Its configuration.
    """
    on_disk = re.compile(re.escape(prefix) + r"layers\.(\d+)\.(\w+)\.(.+)")
    for found in [match for match in map(on_disk.fullmatch, list(state_dict)) if match]:
        tensor = state_dict.pop(found[0])
        number, part, old = found.groups()
        if old != BUFFER:
            new, change = _READ.get(old, (old, _as_it_is))
            state_dict[f"{prefix}stack.layers.{number}.{PARTS.get(part, part)}.{new}"] = change(tensor, config)


def _as_it_is(tensor: Tensor, config: MegaConfig) -> Tensor:
    return tensor


def _centred(tensor: Tensor, config: MegaConfig, *, undo: bool = False) -> Tensor:
    shift = config.max_positions - config.bias_centre
    return tensor.roll(-shift if undo else shift)


_CHANGES: tuple[tuple[Mapping[str, str], Callable[[Tensor, MegaConfig], Tensor]], ...] = (
    (PARAMETERS | SCALE, _as_it_is),
    (COLUMNS, lambda tensor, config: tensor.squeeze(-1)),
    (ROWS | ROTARY, lambda tensor, config: tensor.squeeze(0)),
    (TABLE, _centred),
)
_READ = {old: (new, change) for names, change in _CHANGES for old, new in names.items()}
"""New name and change of each tensor that is not the same on disk."""


def _config_of(model: Any, name: str) -> MegaConfig:
    """The configuration of the Mega model that a parameter of this name belongs to."""
    owners = [part for path, part in model.named_modules() if name.startswith(f"{path}." if path else "")]
    for owner in reversed(owners):
        if isinstance(getattr(owner, "config", None), MegaConfig):
            config: MegaConfig = owner.config
            return config
    raise ValueError(f"`{name}` must belong to a Mega model, but does not.")
