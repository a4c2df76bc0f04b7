"""What a configuration takes, and what it says to what it does not take."""

from __future__ import annotations

import inspect
import json
import re

import pytest
from transformers import AutoConfig

from huggingface_models import small_config
from megablocks.huggingface import MegaConfig, MegaForCausalLM, MegaModel

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "ema_projection_size": 16,
    "bidirectional": True,
    "shared_representation_size": 64,
    "use_chunking": False,
    "chunk_size": -1,
    "truncation": None,
    "normalize_before_mega": True,
    "normalization_type": "scalenorm",
    "norm_affine": True,
    "activation": "silu",
    "attention_activation": "softmax",
    "dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "use_feature_dropout": False,
    "use_normalized_ffn": True,
    "nffn_hidden_size": 256,
    "normalize_before_ffn": True,
    "nffn_activation_dropout_prob": 0.1,
    "max_positions": 2048,
    "add_token_type_embeddings": False,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "ema_delta_alpha_range": 0.2,
    "ema_beta_range": 0.02,
    "ema_gamma_omega_range": 1.0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "relative_positional_bias": "rotary",
    "classifier_dropout": None,
    "use_cache": True,
    "add_lm_hidden_dense_layer": True,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "legacy_rms_norm": False,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_older_code(name):
    assert getattr(MegaConfig(), name) == DEFAULTS[name]


def test_every_parameter_is_described():
    described = set(re.findall(r"^    ([a-z_0-9]+):", inspect.getdoc(MegaConfig) or "", re.MULTILINE))
    assert described == set(DEFAULTS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"normalization_type": "groupnorm"}, "`normalization_type` must be one of 'layernorm', .* but is 'groupnorm'"),
        ({"attention_activation": "sigmoid"}, "`attention_activation` must be one of 'softmax', 'relu2', 'laplace'"),
        ({"activation": "swoosh"}, "`activation` must be one of .* but is 'swoosh'"),
        ({"relative_positional_bias": "alibi"}, "must be one of 'rotary', 'simple', but is 'alibi'"),
        ({"shared_representation_size": 63}, "`shared_representation_size` must be even for a rotary bias, but is 63"),
        ({"hidden_size": 0}, "`hidden_size` must be at least 1, but is 0"),
        ({"dropout_prob": 1.5}, r"`dropout_prob` must be in \[0, 1\), but is 1.5"),
        ({"classifier_dropout": -0.5}, r"`classifier_dropout` must be in \[0, 1\), but is -0.5"),
        ({"truncation": 0}, "`truncation` must be at least 1, but is 0; use `None` for all lags"),
        ({"use_chunking": True}, "`chunk_size` must be at least 1 with `use_chunking=True`, but is -1"),
        ({"pad_token_id": 50000}, r"`pad_token_id` must be in \[0, 30522\), the vocabulary, but is 50000"),
        ({"initializer_range": -0.1}, "`initializer_range` must be a finite number of at least 0, but is -0.1"),
    ],
)
def test_what_cannot_be_right_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        MegaConfig(**given)
    config = MegaConfig()
    for name, value in given.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):  # said when the model is built, if not before
        MegaModel(config)


def test_types_are_checked():
    with pytest.raises(TypeError, match=r"`hidden_size` must be an int, but is 128\.0"):
        MegaConfig(hidden_size=128.0)
    with pytest.raises(TypeError, match="`dropout_prob` must be a number"):
        MegaConfig(dropout_prob="0.1")


def test_parts_of_a_model_agree_on_who_sees_whom():
    with pytest.raises(ValueError, match="A causal model needs averages that look back only"):
        MegaModel(small_config(is_decoder=True))
    with pytest.raises(ValueError, match="`add_cross_attention` needs a causal model"):
        MegaModel(small_config(add_cross_attention=True))
    with pytest.raises(ValueError, match="needs a norm of each token alone"):
        MegaForCausalLM(small_config(bidirectional=False, normalization_type="batchnorm"))
    model = MegaModel(small_config(bidirectional=False))  # averages look back, attention both ways: found in the wild
    assert not model.stack.layers[0].attention.causal
    assert model.stack.layers[0].attention.ema.causal


def test_what_public_checkpoints_contain_is_taken(tmp_path):
    described = {
        "model_type": "mega",
        "architectures": ["MegaForCausalLM"],
        "is_decoder": True,
        "bidirectional": False,
        "hidden_size": 16,
        "vocab_size": 64,
        "shared_representation_size": 8,
        "normalization_type": "layernorm",
        "pad_token_id": None,
        "eos_token_id": 0,
        "dropout_prob": 0,
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
        "nffn_activation_dropout_prob": 0,
        "torch_dtype": "float32",
        "transformers_version": "4.40.2",
        "num_attention_heads": 1,
        "_name_or_path": "somewhere",
        "max_length": 20,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MegaConfig)
    assert config.pad_token_id is None
    assert config.tie_word_embeddings
    model = MegaForCausalLM(config)
    assert model.get_input_embeddings().padding_idx is None
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_configuration_is_written_and_read(tmp_path):
    config = MegaConfig(hidden_size=48, chunk_size=None, num_labels=5, problem_type="regression")
    config.save_pretrained(tmp_path)
    assert MegaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["chunk_size"] == -1


def test_a_subclass_keeps_the_fields():
    class Longer(MegaConfig):
        model_type = "longer_mega"
        more: int = 3

    assert Longer(hidden_size=64).hidden_size == 64
    assert Longer().more == 3
