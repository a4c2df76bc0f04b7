"""The Mega model for transformers: embedding, a stack of megablocks, pooling.

Axis letters are those of `megablocks.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

from megablocks._checks import check_input, check_tensor, check_token_ids
from megablocks.huggingface.building import mega_stack
from megablocks.huggingface.cache import MegaCache
from megablocks.huggingface.checkpoint import read_old_names
from megablocks.huggingface.configuration import MegaConfig
from megablocks.huggingface.masks import first_real, padding_of
from megablocks.layers import (
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    RotaryRelativeBias,
    ScaleNorm,
    SimpleRelativeBias,
)
from megablocks.layers.trace import Shown, call_for
from megablocks.stacks import MegaDecoder
from megablocks.state import DecoderState


class MegaPreTrainedModel(PreTrainedModel):
    """What all Mega models share: how they are initialised, loaded, saved and checkpointed."""

    config_class = MegaConfig
    base_model_prefix = "mega"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"\._float_tensor$"]  # noqa: RUF012

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draws the parameters that a module itself holds; those that were loaded stay."""
        config = self.config
        if isinstance(module, MultiDimensionDampedEMA):
            for parameter in (module.alpha, module.delta):
                init.normal_(parameter, std=config.ema_delta_alpha_range)
            beta = torch.randn_like(module.beta) * config.ema_beta_range
            beta[:, 0::2] += 1.0
            beta[:, 1::2] -= 1.0
            init.copy_(module.beta, beta)
            for parameter in (module.eta, module.omega):
                init.normal_(parameter, std=config.ema_gamma_omega_range)
        elif isinstance(module, MovingAverageGatedAttention):
            init.normal_(module.qk_weight, std=config.initializer_range)
            init.zeros_(module.qk_bias)
        elif isinstance(module, SimpleRelativeBias | RotaryRelativeBias):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=config.initializer_range)
        elif isinstance(module, ScaleNorm):
            if module.weight is not None:
                init.ones_(module.weight)
        else:
            super()._init_weights(module)

    def _encoded(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        **given: Any,
    ) -> Any:
        """What the model under a head says, without a cache and with names."""
        return self.mega(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **given,
        )

    def _flag(self, given: bool | None, name: str) -> bool:
        """What an argument says, or the configuration where it says nothing."""
        return bool(getattr(self.config, name) if given is None else given)

    def _returned(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output as it was asked for: with names, or as a tuple of what is there."""
        return output if self._flag(return_dict, "return_dict") else output.to_tuple()


class MegaEmbeddings(nn.Module):
    """Looks tokens up and adds the embedding of their types, where the configuration has types.

    Args:
        config: The model's configuration.

    Shape:
        - `input_ids`: $(B, L)$, or `inputs_embeds`: $(B, L, D)$; `token_type_ids`: $(B, L)$, zeros if not given.
        - `padding_mask`: $(B, L)$, bool, `True` at padding, where any token may stand.
        - output: $(B, L, D)$.

    Raises:
        ValueError: Unless exactly one of `input_ids` and `inputs_embeds` is given, or if a token is outside the
            vocabulary (said in eager mode on the CPU).
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.add_token_type_embeddings else None
        )

    def forward(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Returns the embedded tokens."""
        if input_ids is not None:
            x: Tensor = _look_up(self.word_embeddings, "input_ids", input_ids, padding_mask)
        else:
            check_input("inputs_embeds", inputs_embeds, self.word_embeddings.weight.shape[1])
            x = inputs_embeds  # type: ignore[assignment]
        if self.token_type_embeddings is None:
            return x
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
            return x + _look_up(self.token_type_embeddings, "token_type_ids", token_type_ids, None)
        check_tensor("token_type_ids", token_type_ids, 2)
        types = token_type_ids[:, -x.shape[1] :]  # `generate` passes those of the past as well
        return x + _look_up(self.token_type_embeddings, "token_type_ids", types, padding_mask)


def _look_up(table: nn.Embedding, name: str, ids: Tensor, padding_mask: Tensor | None) -> Tensor:
    check_token_ids(name, ids, table.weight.shape[0], padding_mask)
    looked_up: Tensor = table(ids if padding_mask is None else ids.masked_fill(padding_mask, 0))
    return looked_up


class MegaPooler(nn.Module):
    r"""Returns $\tanh(W x_t + b)$ at the first real token of each row.

    Args:
        config: The model's configuration.

    Shape:
        - `x`: $(B, L, D)$; `padding_mask`: $(B, L)$, bool, `True` at padding; output: $(B, D)$.
    """

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Returns the pooled rows."""
        return torch.tanh(self.dense(first_real(x, padding_mask)))


class MegaModel(MegaPreTrainedModel):
    r"""Embeds tokens, runs them through a stack of Mega layers, and pools the first real token.

    It is an encoder, or, with `config.is_decoder`, a decoder, which attends causally, to `encoder_hidden_states` too
    where the configuration has `add_cross_attention`. Padding is deletion: a row gives what it gives without its
    padding, wherever that is; hidden states at padding are zero.

    Args:
        config: Says what the model is like.
        add_pooling_layer: Whether to pool.

    Shape:
        - `input_ids`: $(B, L)$, or `inputs_embeds`: $(B, L, D)$; any $L \ge 1$.
        - `attention_mask`: $(B, L)$, 1 or `True` at real tokens; with a cache also $(B, S + L)$, $S$ being the slots
          that the cache has read, of which only the last $L$ columns are looked at.
        - `encoder_hidden_states`: $(B, M, D)$; `encoder_attention_mask`: $(B, M)$. A cache keeps them from its first
          call on; later calls need not repeat them.
        - `last_hidden_state`: $(B, L, D)$; `pooler_output`: $(B, D)$; `hidden_states`: the embedded input and the
          output of each layer; `attentions`: per layer $(B, 1, L, L)$, $(B, K, C, C)$ in chunks of real tokens,
          $(B, 1, L, S)$ over the keys of a cache; `cross_attentions`: per layer $(B, 1, L, M)$.

    Raises:
        ValueError: If the configuration contradicts itself, or arguments do not fit together.
        TypeError: If `past_key_values` is not a `MegaCache`.

    Example:
        >>> from megablocks.huggingface import MegaConfig, MegaModel
        >>> model = MegaModel(MegaConfig(vocab_size=100, hidden_size=32)).eval()
        >>> output = model(torch.randint(100, (2, 10)))
        >>> output.last_hidden_state.shape, output.pooler_output.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 32]))

    References:
        Ma et al., [arXiv:2209.10655](https://arxiv.org/abs/2209.10655).
    """

    def __init__(self, config: MegaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.check_values()
        config.check_direction()
        self.embedding_layer = MegaEmbeddings(config)
        self.stack = mega_stack(config)
        self.pooler = MegaPooler(config) if add_pooling_layer else None
        self.post_init()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        read_old_names(state_dict, prefix, self.config)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_input_embeddings(self) -> nn.Embedding:
        """Returns the table of tokens."""
        return self.embedding_layer.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Puts another table in its place."""
        self.embedding_layer.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """Returns the encoded tokens, and what else was asked for."""
        batch, length = _batch_and_length(input_ids, inputs_embeds)
        use_cache = self._uses_cache(use_cache)
        cache = self._cache(past_key_values, use_cache)
        past = cache is not None and cache.state is not None
        padding_mask = padding_of("attention_mask", attention_mask, batch, length, past=past)
        x = self.embedding_layer(input_ids, inputs_embeds, token_type_ids, padding_mask)

        output_attentions = self._flag(output_attentions, "output_attentions")
        output_hidden_states = self._flag(output_hidden_states, "output_hidden_states")
        given: dict[str, Any] = {"padding_mask": padding_mask}
        memory = self._memory(encoder_hidden_states, encoder_attention_mask, cache)
        state = None
        if cache is None:
            given |= memory
        else:
            state = self._state(cache, x, memory)
        shown: Shown | bool = True if output_attentions else "hidden_states" if output_hidden_states else False
        y, seen, state = call_for(self.stack, x, state, shown, **given)
        if cache is not None:
            cache.advance(state, length)
        return self._returned(
            BaseModelOutputWithPoolingAndCrossAttentions(
                last_hidden_state=y,
                pooler_output=None if self.pooler is None else self.pooler(y, padding_mask),
                past_key_values=cache if use_cache else None,
                hidden_states=seen.hidden_states if output_hidden_states else None,
                attentions=seen.attention_weights if output_attentions else None,
                cross_attentions=_with_head(seen.cross_attention_weights) if output_attentions else None,
            ),
            return_dict,
        )

    def _uses_cache(self, use_cache: bool | None) -> bool:
        """Whether to return a cache: in training, and of an encoder, only if asked for, of an encoder never."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return bool(use_cache and isinstance(self.stack, MegaDecoder))

    def _cache(self, given: Cache | None, use_cache: bool) -> MegaCache | None:
        """The cache that this call reads and updates, a new one in the place of an empty one of another kind."""
        if given is None or (isinstance(given, Cache) and not isinstance(given, MegaCache) and not _has_read(given)):
            return MegaCache(self.config) if use_cache else None
        if not isinstance(given, MegaCache):
            raise TypeError(
                f"`past_key_values` must be a MegaCache, but is a {type(given).__name__} that has read something; pass "
                "what an earlier call of this model returned."
            )
        if not isinstance(self.stack, MegaDecoder):
            raise ValueError(
                "`past_key_values` needs a causal model, but `is_decoder` is False: its tokens see later ones; "
                "leave it out."
            )
        if len(given) != self.config.num_hidden_layers:
            raise ValueError(
                f"`past_key_values` must hold one state for each of {self.config.num_hidden_layers} layers, but holds "
                f"{len(given)}; it was made by another model."
            )
        return given

    def _memory(self, hidden: Tensor | None, mask: Tensor | None, cache: MegaCache | None) -> dict[str, Any]:
        """What the decoder is given to attend to besides its own tokens."""
        if not self.config.add_cross_attention:
            if hidden is not None:
                raise ValueError(
                    "This model attends to its own tokens only, but got `encoder_hidden_states`; configure it with "
                    "`add_cross_attention=True`, or leave them out."
                )
            return {}
        if cache is not None and cache.state is not None:
            return {}
        if hidden is None:
            raise ValueError(
                "This model has `add_cross_attention=True` and needs `encoder_hidden_states`, but got none; pass the "
                "encoder's last hidden state."
            )
        padding_mask = padding_of("encoder_attention_mask", mask, hidden.shape[0], hidden.shape[1])
        return {"memory": hidden, "memory_padding_mask": padding_mask}

    def _state(self, cache: MegaCache, x: Tensor, memory: dict[str, Any]) -> DecoderState:
        """What the cache holds, or the state before the first token."""
        state = cache.state
        if state is not None:
            return state
        made: DecoderState = self.stack.init_state(x.shape[0], **memory, capacity=cache.capacity)  # type: ignore[operator]

        def there(part: Tensor) -> Tensor:
            # Weights that are offloaded come when their layer is called; what is made of them before is all zeros.
            missing = part.is_meta and not x.is_meta
            return torch.zeros(part.shape, dtype=part.dtype, device=x.device) if missing else part

        moved: DecoderState = pytree.tree_map_only(Tensor, there, made)
        return moved


def _batch_and_length(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "Exactly one of `input_ids` and `inputs_embeds` must be given, but got "
            f"{'neither' if input_ids is None else 'both'}."
        )
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs.dim() < 2:  # type: ignore[union-attr]
        raise ValueError(
            f"Inputs must have shape (batch, length), but have shape {tuple(inputs.shape)}; "  # type: ignore[union-attr]
            "a single sequence needs `[None]`."
        )
    return inputs.shape[0], inputs.shape[1]  # type: ignore[union-attr]


def _has_read(cache: Cache) -> bool:
    return bool(cache.get_seq_length() > 0)


def _with_head(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Cross-attention weights (B, L, M) with the axis of heads that their readers expect, of which there is one."""
    return tuple(each.unsqueeze(1) for each in weights) or None


def inside(outputs: Any) -> dict[str, Any]:
    """What a call of the model shows of its inside."""
    return {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
