"""Models that other libraries have wrapped: weights that come late, adapters in the place of tables, checkpoints."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn

from huggingface_models import causal_config, lively, small_config, tokens
from megablocks.huggingface import MegaConfig, MegaForCausalLM, MegaForMaskedLM


class Adapted(nn.Module):
    """A table with something added to it, as adapters wrap one: it has the weight, and no other attribute of it."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.calls = 0

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the table."""
        return self.table.weight

    def forward(self, ids):
        """Looks up."""
        self.calls += 1
        return self.table(ids) + 1.0


def _memory(model):
    return torch.randn(2, 5, model.config.hidden_size, dtype=model.dtype)


def test_weights_on_the_disk_come_when_they_are_needed(tmp_path):
    model = lively(MegaForCausalLM(causal_config()))
    ids = tokens(2, 6)
    expected, written = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    model.save_pretrained(tmp_path / "model")
    places = {"mega.embedding_layer": "cpu", "mega.stack.layers.0": "cpu", "lm_head": "cpu", "dense": "cpu"}
    places |= {f"mega.stack.layers.{index}": "disk" for index in range(1, model.config.num_hidden_layers)}
    loaded = MegaForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "weights")
    )
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).equal(written)


@pytest.mark.parametrize("options", [{"add_cross_attention": True}, {"use_chunking": True, "chunk_size": 4}], ids=str)
def test_weights_that_are_offloaded(options):
    model = lively(MegaForCausalLM(causal_config(**options)))
    memory = _memory(model) if model.config.add_cross_attention else None
    ids = tokens(2, 6)
    expected = model(ids, encoder_hidden_states=memory).logits.detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(ids, encoder_hidden_states=memory).logits, expected)


def test_wrapped_tables_are_called():
    model = lively(MegaForMaskedLM(small_config(add_token_type_embeddings=True)))
    ids = tokens(2, 6)
    before = model(ids).logits
    for name in ("word_embeddings", "token_type_embeddings"):
        wrapped = Adapted(getattr(model.mega.embedding_layer, name))
        setattr(model.mega.embedding_layer, name, wrapped)
        after = model(ids).logits
        assert wrapped.calls == 1
        assert not torch.allclose(after, before)
        before = after
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(ids).logits, before)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_reentrant_checkpoints_reach_the_memory():
    model = lively(MegaForCausalLM(causal_config(add_cross_attention=True))).train()
    encoder, ids = nn.Linear(model.config.hidden_size, model.config.hidden_size).to(model.dtype), tokens(2, 6)
    source = _memory(model)
    gradients = []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        encoder.zero_grad()
        torch.manual_seed(0)
        model(ids, encoder_hidden_states=torch.tanh(encoder(source)), labels=ids).loss.backward()
        gradients.append(encoder.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_integer_masks_that_are_added_to_scores_are_refused():
    model, ids = lively(MegaForCausalLM(causal_config())), tokens(2, 6)
    with pytest.raises(ValueError, match=r"^`attention_mask` must be 1 at real tokens .*, but holds -10000;"):
        model(ids, attention_mask=torch.tensor([[0, 0, 0, 0, 0, 0], [-10000, -10000, 0, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"chunk_size": "4", "use_chunking": True}, ValueError),
        ({"pad_token_id": "1"}, ValueError),
        ({"pad_token_id": 1.0}, ValueError),
        ({"use_chunking": "yes"}, TypeError),
        ({"bidirectional": "no"}, TypeError),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused(options, kind):
    with pytest.raises(kind, match=rf"^`{next(iter(options))}` must be "):
        MegaConfig(**options)
