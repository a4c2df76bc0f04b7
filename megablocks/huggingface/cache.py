"""The cache of a causal Mega model: megablocks' own states behind the interface that `generate` expects."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from megablocks import state as states
from megablocks._checks import check_optional_size
from megablocks.huggingface.configuration import MegaConfig
from megablocks.state import DecoderLayerState, DecoderState


class MegaCacheLayer(CacheLayerMixin):
    """What one layer remembers: a state, which counts real tokens, and how many slots it has read, padding included.

    The state is never written into: the layer holds another one after each call.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        self.state: DecoderLayerState | None = None
        # A tensor, not a number: a compiled step would be compiled anew for every number.
        self.slots: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MegaCacheLayer:
        """Returns a layer of its own that holds the same state: nobody writes into that."""
        made = type(self)()
        made.state, made.slots = self.state, self.slots
        return made

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        if self.state is None:
            raise AttributeError("`batch_size` of a cache is known after the first call only.")
        return states.batch_size(self.state)

    @property
    def keys(self) -> Tensor | None:
        """Keys of real tokens, `(B, 1, S, Z)`, those of the current chunk where attention is chunked."""
        return None if self.state is None else self.state.attention.keys.keys.unsqueeze(1)

    @property
    def values(self) -> Tensor | None:
        """Values of the same tokens, `(B, 1, S, V)`."""
        return None if self.state is None else self.state.attention.keys.values.unsqueeze(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the model makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: keys and values are no more than a part of the state, which the model itself updates."""
        raise NotImplementedError("A MegaCache is updated by its model, as a whole; it does not take keys and values.")

    def get_seq_length(self, *args: Any) -> int:
        """Returns the number of slots that were read, padding included."""
        return 0 if self.slots is None else int(self.slots)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Returns the number of slots that a mask covers for these queries, and where it begins."""
        length = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + length, 0

    def get_max_length(self) -> int:
        """Returns -1: a layer itself sets no limit; the `capacity` of a cache is checked by its model."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Returns -1: a layer itself sets no limit; the `capacity` of a cache is checked by its model."""
        return -1

    def select_rows(self, rows: Tensor) -> None:
        """Makes row `rows[i]` row i."""
        if self.state is not None:
            self.state = states.select_rows(self.state, rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row `beam_idx[i]` row i."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        if self.state is not None:
            self.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of these indices, or of a mask."""
        self.select_rows(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Forgets everything."""
        self.state, self.slots = None, None

    def offload(self) -> None:
        """Moves the state to the CPU."""
        if self.state is not None:
            self.state = states.to_device(self.state, "cpu")

    def prefetch(self) -> None:
        """Does nothing: a state is moved by whoever reads it."""

    def crop(self, *args: Any) -> NoReturn:
        """Raises: an average cannot unread a token."""
        raise ValueError(
            "A MegaCache cannot be cropped: a moving average cannot unread a token. Keep a copy of the cache "
            "(`copy.deepcopy`) from before the tokens that you want to take back."
        )


class MegaCache(Cache):
    """What a causal Mega model has read: one state for each layer, updated by every call.

    A call without one returns a new one; giving it back continues where that call ended, with any number of tokens.
    A copy by `copy.deepcopy` costs nothing: the states in it are shared, and never written into.

    Args:
        config: That of the model.
        capacity: Without chunks, the most real tokens that it will ever hold, in tensors of fixed shape, so that a
            compiled step is compiled once; `None` for keys that grow with every call.

    Raises:
        ValueError: If `capacity` is below 1.

    Example:
        >>> from megablocks.huggingface import MegaCache, MegaConfig, MegaForCausalLM
        >>> config = MegaConfig(vocab_size=100, hidden_size=32, is_decoder=True, bidirectional=False)
        >>> model = MegaForCausalLM(config).eval()
        >>> tokens = torch.randint(100, (2, 10))
        >>> first = model(tokens[:, :7])
        >>> rest = model(tokens[:, 7:], past_key_values=first.past_key_values)
        >>> torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), model(tokens).logits)
    """

    def __init__(self, config: MegaConfig, *, capacity: int | None = None) -> None:
        super().__init__(layers=[MegaCacheLayer() for _ in range(config.num_hidden_layers)])
        self.capacity = check_optional_size("capacity", capacity, "keys that grow")

    @property
    def state(self) -> DecoderState | None:
        """What the layers hold, as the state of a `MegaDecoder`; `None` before the first call."""
        held = tuple(layer.state for layer in self.layers)
        return None if held[0] is None else DecoderState(held)

    def advance(self, state: DecoderState, slots: int) -> None:
        """Puts the state after a call of so many slots in the place of the one before."""
        before: Tensor | None = self.layers[0].slots
        if before is None:
            before = torch.zeros((), dtype=torch.int64, device=state.layers[0].attention.keys.length.device)
        after = before + slots
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            layer.state, layer.slots = layer_state, after
