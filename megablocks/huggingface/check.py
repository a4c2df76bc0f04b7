"""Whether a directory holds a Mega model that loads, what it is, and what it computes otherwise than it once did."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from megablocks import huggingface
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.differences import Difference, differences
from megablocks.huggingface.modeling import MegaModel, MegaPreTrainedModel

LOADS, DIFFERS, FAILS = 0, 1, 2
"""How a check ends: the model computes what it did, it computes something else in every call, it does not load."""


class Finding(NamedTuple):
    """What was found in a directory."""

    problems: tuple[str, ...]
    """Why it does not load; empty if it does."""
    description: tuple[str, ...] = ()
    """What it is, in words."""
    differences: tuple[Difference, ...] = ()
    """What it computes otherwise than transformers 4.40.2 did."""

    @property
    def status(self) -> int:
        """`LOADS`, `DIFFERS` or `FAILS`."""
        if self.problems:
            return FAILS
        return DIFFERS if any(difference.always for difference in self.differences) else LOADS

    def lines(self) -> Iterator[str]:
        """Yields the finding as text."""
        if self.problems:
            yield "Does not load:"
            yield from (f"  - {problem}" for problem in self.problems)
            return
        yield "Loads:"
        yield from (f"  {line}" for line in self.description)
        yield "Differs from transformers 4.40.2:" if self.differences else "Computes what transformers 4.40.2 did."
        yield from (f"  - {difference.when}: {difference.what}" for difference in self.differences)


def check_directory(directory: str | Path) -> Finding:
    """Loads the model in a directory and says what was found; nothing is written.

    Args:
        directory: Holds `config.json` and weights, as `save_pretrained` writes them.

    Example:
        >>> import tempfile
        >>> from megablocks.huggingface import MegaConfig, MegaModel
        >>> from megablocks.huggingface.check import check_directory
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     MegaModel(MegaConfig(vocab_size=100, hidden_size=32)).save_pretrained(directory)
        ...     finding = check_directory(directory)
        >>> finding.status, finding.description[0]
        (0, 'a MegaModel of 206,376 parameters: an encoder of 4 layers, width 32, vocabulary 100')
    """
    if not Path(directory).is_dir():
        return Finding((f"{directory} is not a directory.",))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the finding says it all
            model, written, problems = _loaded(directory)
    except Exception as error:  # whatever it is, the directory does not load, and this is why
        return Finding((f"{type(error).__name__}: {error}",))
    if problems:
        return Finding(tuple(problems))
    return Finding((), tuple(_described(model)), tuple(differences(model, written)))


def _loaded(directory: str | Path) -> tuple[MegaPreTrainedModel, MegaConfig, list[str]]:
    described, _ = MegaConfig.get_config_dict(directory)
    if described.get("model_type") != MegaConfig.model_type:
        raise ValueError(f"`model_type` must be 'mega', but the configuration says {described.get('model_type')!r}.")
    config = MegaConfig.from_pretrained(directory)
    names = config.architectures or [MegaModel.__name__]
    kind: Any = getattr(huggingface, names[0], None)
    if kind is None or names[0] not in huggingface.__all__:
        raise ValueError(f"The configuration says `architectures` {names}, of which none is a Mega model.")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, found = kind.from_pretrained(directory, config=config, output_loading_info=True)
    finally:
        logging.set_verbosity(before)
    problems = [f"{what.replace('_', ' ')}: {key}" for what, keys in found.items() for key in sorted(map(str, keys))]
    return model, config, problems


def _described(model: MegaPreTrainedModel) -> Iterator[str]:
    config: MegaConfig = model.config
    what = "a decoder" if config.is_decoder else "an encoder"
    if config.add_cross_attention:
        what += " with cross-attention"
    layers = "1 layer" if config.num_hidden_layers == 1 else f"{config.num_hidden_layers} layers"
    yield (
        f"a {type(model).__name__} of {model.num_parameters():,} parameters: {what} of {layers}, "
        f"width {config.hidden_size}, vocabulary {config.vocab_size}"
    )
    ways = "both ways" if config.bidirectional else "backwards"
    lags = "" if config.truncation is None else f", {config.truncation} lags"
    yield f"{config.ema_projection_size} averages per channel that look {ways}{lags}"
    chunks = f"in chunks of {config.chunk_size}" if config.use_chunking else "over the whole sequence"
    limit = f" of {config.max_positions} positions" if config.relative_positional_bias == "simple" else ""
    yield f"{config.attention_activation} attention {chunks}, {config.relative_positional_bias} bias{limit}"
    order = {True: "before", False: "behind"}
    norm = config.normalization_type + (" that does not normalise" if config.legacy_rms_norm else "")
    yield f"{norm} {order[config.normalize_before_mega]} attention, {order[config.normalize_before_ffn]} feed-forward"
