"""The numbers that the two older implementations of MEGA give, read from `tests/golden`.

`golden/<source>/index.json` lists the cases, `golden/<source>/<group>/runs.json` the runs of each case, and one
safetensors file per case holds the tensors. A case is a module or model with its weights, a run is one call of it.
Whatever those files list is found here; a new case needs no new code.

    @pytest.mark.parametrize("run", true_runs("fairseq", "mega"), ids=str)
    def test_mega(run): ...

Single modules of fairseq are time-major: their `inputs`, `outputs` and `cotangents` are (L, B, D). Padding masks are
(B, L) with True at padding. Weights and inputs were float32 numbers; every floating tensor comes widened to float64.

Outputs of single modules at padding are never truth, and the cotangents there are not zero. So of the gradients of a
module's run with padding, code that treats padding as absent can be held to `input_gradients` of the rows without
padding alone. Losses of whole models leave padding out; their gradients hold in full.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
Tensors = dict[str, Tensor]


# Reading


@dataclass(frozen=True, eq=False)
class Case:
    """A module or model: how it was built, its weights, its runs."""

    source: str
    name: str
    group: str
    cls: str
    args: dict[str, Any]
    file: Path
    record: dict[str, Any]

    @property
    def state(self) -> Tensors:
        """The state dict, tied entries included, keys as in the source."""
        state = self.tensors("param/")
        return state | {key: state[stored] for key, stored in self.record.get("tied", {}).items()}

    @property
    def runs(self) -> list[Run]:
        """The calls that were recorded."""
        return [Run(self, name, record) for name, record in self.record["runs"].items()]

    def tensors(self, prefix: str) -> Tensors:
        """Copies of all tensors whose name starts with `prefix`, by the rest of their name."""
        stored = _load(self.file)
        places = {key: key for key in stored} | self.record.get("alias", {})
        scalars = self.record.get("scalars", ())
        found = {}
        for key, place in places.items():
            if key.startswith(prefix):
                tensor = stored[place].reshape(()) if key in scalars else stored[place]
                found[key.removeprefix(prefix)] = tensor.double() if tensor.dtype.is_floating_point else tensor
        return {name: tensor.clone() for name, tensor in found.items()}

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Run:
    """One call of a case's module or model: what went in, what came out."""

    case: Case
    name: str
    record: dict[str, Any]

    @property
    def call(self) -> str:
        """The call, in words."""
        return self.record["call"]

    @property
    def mode(self) -> str:
        """Either "eval" or "train"; dropout was 0 in both."""
        return self.record.get("mode", "eval")

    @property
    def inputs(self) -> Tensors:
        """What went in."""
        return self.case.tensors(f"{self.name}/in/")

    @property
    def outputs(self) -> Tensors:
        """What came out in float64, with the source's own casts to float32 switched off."""
        return self.case.tensors(f"{self.name}/out/")

    @property
    def verbatim(self) -> Tensors:
        """What the untouched source gave; recorded for some runs."""
        return self.case.tensors(f"{self.name}/verbatim/")

    @property
    def f32_limited(self) -> dict[str, float]:
        """The greatest distance between the untouched source and each of `outputs`."""
        return {name: self.record.get("f32_limited", {}).get(name, 0.0) for name in self.record["out"]}

    @property
    def grad_of(self) -> str | None:
        """The output whose gradients were recorded, None if none were."""
        return self.record.get("grad_of")

    @property
    def cotangents(self) -> Tensors:
        """What the output was multiplied with, and summed, before gradients were taken; empty for a scalar."""
        return self.case.tensors(f"{self.name}/cot/")

    @property
    def gradients(self) -> Tensors:
        """Gradients of the weights, by state dict key."""
        return self.case.tensors(f"{self.name}/grad/")

    @property
    def input_gradients(self) -> Tensors:
        """Gradients of the inputs, by their names in `inputs`."""
        return self.case.tensors(f"{self.name}/grad_in/")

    @property
    def defect(self) -> str | None:
        """The known defect of the source that makes this run untrue, None if there is none."""
        return _read(GOLDEN / "not_truth.json").get(f"{self.case.source}/{self.case.name}", {}).get(self.name)

    def __str__(self) -> str:
        return f"{self.case}/{self.name}"


def cases(source: str, group: str | None = None) -> list[Case]:
    """All cases of "fairseq" or "hf", or those of one group."""
    folder = GOLDEN / source
    return [
        Case(
            source=source,
            name=entry["name"],
            group=entry["group"],
            cls=entry["cls"],
            args=entry["args"],
            file=folder / entry["file"],
            record=_read(folder / entry["group"] / "runs.json")[entry["name"]],
        )
        for entry in _read(folder / "index.json")["cases"]
        if group in (None, entry["group"])
    ]


def runs(source: str, group: str | None = None) -> list[Run]:
    """All runs of a source, or of one of its groups."""
    return [run for case in cases(source, group) for run in case.runs]


def true_runs(source: str, group: str | None = None) -> list[Run]:
    """The runs that show no known defect of their source."""
    return [run for run in runs(source, group) if is_truth(run)]


def is_truth(run: Run) -> bool:
    """Whether the run's outputs, those of single modules at padding aside, are right as far as is known."""
    return run.defect is None


@cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text())


@lru_cache(maxsize=8)
def _load(path: Path) -> Tensors:
    return load_file(path)


# Parameters of fairseq in the names of `oracles`

# The `delta` of fairseq is the paper's alpha and the reverse. Its `gamma` is eta in the EMA, outside the scale of q, k.
FAIRSEQ_NAMES = {
    "move.delta": "ema_alpha",
    "move.alpha": "ema_delta",
    "move.beta": "ema_beta",
    "move.gamma": "ema_eta",
    "move.omega": "ema_omega",
    "gamma": "qk_weight",
    "beta": "qk_bias",
    "rel_pos_bias.rel_pos_bias": "bias_table",
    "rel_pos_bias.alpha": "bias_alpha",
    "rel_pos_bias.beta": "bias_beta",
    **{f"norm.norm.{key}": f"norm_{key}" for key in ("weight", "bias", "scalar", "running_mean", "running_var")},
    **{
        f"{layer}.{key}": f"{layer.removesuffix('_proj')}_{key[0]}"
        for layer in ("v_proj", "mx_proj", "h_proj", "q_proj", "k_proj", "fc1", "fc2")
        for key in ("weight", "bias")
    },
}
FAIRSEQ_NOT_PARAMETERS = ("rel_pos_bias._float_tensor", "norm.norm.num_batches_tracked")


def block_params(state: Tensors, prefix: str = "") -> Tensors:
    """The parameters of one block, whose keys in a fairseq state dict start with `prefix`."""
    params = {}
    for key, value in state.items():
        inner = key.removeprefix(prefix)
        if key.startswith(prefix) and inner not in FAIRSEQ_NOT_PARAMETERS:
            params[FAIRSEQ_NAMES[inner]] = value
    # Stored as (D, N, 1) and as (1, Z).
    columns = {name: params[name].squeeze(-1) for name in ("ema_alpha", "ema_delta", "ema_beta") if name in params}
    vectors = {name: params[name].squeeze(0) for name in ("bias_alpha", "bias_beta") if name in params}
    return params | columns | vectors


def layer_params(state: Tensors, prefix: str = "") -> dict[str, Tensors]:
    """The blocks of one layer of a stack, for instance with the prefix "encoder.layers.0."."""
    blocks = {"attention": "mega_layer.", "cross_attention": "cross_attn.", "feed_forward": "nffn."}
    layer = {name: block_params(state, prefix + block) for name, block in blocks.items()}
    return {name: params for name, params in layer.items() if params}


def ema_params(state: Tensors, prefix: str = "") -> Tensors:
    """The parameters of an EMA alone; inside a block, `block_params` brings them."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return block_params({f"move.{key}": value for key, value in own.items()})


def norm_params(state: Tensors, prefix: str = "") -> Tensors:
    """The parameters of a norm alone, for instance with the prefix "decoder.final_norm.norm."."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return block_params({f"norm.norm.{key}": value for key, value in own.items()})
