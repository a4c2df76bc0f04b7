"""Directories of transformers 4.40.2 are read, and what is written is what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from golden_data import cases, runs
from huggingface_models import (
    causal_config,
    lively,
    load_directory,
    small_config,
    tokens,
    write_directory,
    written,
)
from megablocks import huggingface
from megablocks.huggingface import MegaConfig, MegaForCausalLM, MegaForMaskedLM, MegaModel
from megablocks.huggingface.__main__ import main
from megablocks.huggingface.check import DIFFERS, FAILS, LOADS, check_directory

CASES = {case.name: case for case in cases("hf")}
LEGACY = "model.rmsnorm_relu2_rotary"
OPTIONS = {
    "rotary": {},
    "simple": {"relative_positional_bias": "simple"},
    "chunked_simple": {"relative_positional_bias": "simple", "use_chunking": True, "chunk_size": 4},
    "chunk_size_alone": {"relative_positional_bias": "simple", "chunk_size": 4},
    "layernorm": {"normalization_type": "layernorm"},
    "scalenorm": {"normalization_type": "scalenorm"},
    "rmsnorm": {"normalization_type": "rmsnorm"},
    "batchnorm": {"normalization_type": "batchnorm"},
    "without_affine": {"norm_affine": False},
    "token_types": {"add_token_type_embeddings": True},
    "no_feed_forward": {"use_normalized_ffn": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_written_weights_are_those_that_were_read(case, tmp_path):
    changes = {"legacy_rms_norm": True} if case.name == LEGACY else {}
    model = load_directory(write_directory(case, tmp_path, **changes))
    before = written(tmp_path)
    model.save_pretrained(tmp_path / "again")
    after = written(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].shape == value.shape
        assert after[key].equal(value) or key.endswith("_float_tensor")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", ["MegaForMaskedLM", "MegaForSequenceClassification", "MegaModel"])
def test_a_new_model_is_written_and_read(kind, options, tmp_path):
    model = lively(getattr(huggingface, kind)(small_config(**options)))
    model.save_pretrained(tmp_path)
    assert not any("stack" in key or ".ema." in key for key in written(tmp_path))
    loaded = load_directory(tmp_path)
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert ours.equal(theirs)
    ids = tokens(2, 9)
    assert model(ids)[0].equal(loaded.eval()(ids)[0])


def test_the_middle_of_a_chunked_table_stands_at_the_chunks_middle(tmp_path):
    model = MegaModel(small_config(**OPTIONS["chunked_simple"]))
    table = model.stack.layers[0].attention.position_bias.weight
    model.save_pretrained(tmp_path)
    stored = written(tmp_path)["layers.0.mega_layer.rel_pos_bias.rel_pos_bias"]
    middle = model.config.max_positions - 1
    assert stored[:7].equal(table[middle - 3 : middle + 4])  # 2 C - 1 entries around C - 1 of what is stored


def test_a_file_without_the_rotary_buffer_is_read(tmp_path):
    case = CASES["model.layernorm_softmax_rotary"]
    write_directory(case, tmp_path)
    weights = {key: value for key, value in written(tmp_path).items() if "_float_tensor" not in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_directory(tmp_path)


def test_a_file_of_torch_is_read(tmp_path):
    case = CASES["causal.chunk4_softmax"]
    write_directory(case, tmp_path)
    torch.save(case.state, tmp_path / "pytorch_model.bin")
    expected = load_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ids = tokens(2, 6)
    assert load_directory(tmp_path)(ids).logits.equal(expected(ids).logits)


def test_the_body_of_one_head_goes_under_another(tmp_path):
    model = lively(MegaForMaskedLM(small_config()))
    model.save_pretrained(tmp_path)
    ids = tokens(2, 6)
    body = MegaModel.from_pretrained(tmp_path, add_pooling_layer=False, dtype=torch.float64).eval()
    assert body(ids).last_hidden_state.equal(model.mega(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    under, found = MegaForMaskedLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert set(found["missing_keys"]) == {"dense.weight", "dense.bias", "mlm_head.bias"}
    assert under.mega.state_dict().keys() == model.mega.state_dict().keys()


def test_missing_weights_are_drawn_as_the_configuration_says(tmp_path):
    config = small_config(
        hidden_size=64,
        ema_projection_size=16,
        initializer_range=0.5,
        ema_delta_alpha_range=0.3,
        ema_beta_range=0.0,
        ema_gamma_omega_range=2.0,
        add_cross_attention=True,
        is_decoder=True,
        bidirectional=False,
    )
    whole = MegaModel(config)
    whole.save_pretrained(tmp_path)
    torch.save({"embedding_layer.word_embeddings.weight": torch.ones(20, 64)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    loaded = MegaModel.from_pretrained(tmp_path)
    for model in (whole.requires_grad_(False), loaded.requires_grad_(False)):
        for name, parameter in model.named_parameters():
            assert parameter.isfinite().all(), name
        attention = model.stack.layers[0].attention
        assert attention.v_proj.weight.std() == pytest.approx(0.5, rel=0.2)
        assert model.stack.layers[0].cross_attention.q_proj.weight.std() == pytest.approx(0.5, rel=0.2)
        assert attention.ema.alpha.std() == pytest.approx(0.3, rel=0.2)
        assert attention.ema.eta.std() == pytest.approx(2.0, rel=0.2)
        assert attention.ema.beta[:, 0::2].eq(1).all()
        assert attention.ema.beta[:, 1::2].eq(-1).all()
        assert attention.mx_proj.bias.eq(0).all()
    assert whole.embedding_layer.word_embeddings.weight[1].eq(0).all()  # the token of padding
    assert loaded.embedding_layer.word_embeddings.weight.eq(1).all()


def test_a_norm_that_did_not_normalise_is_told_of(tmp_path):
    case = CASES[LEGACY]
    write_directory(case, tmp_path)
    with pytest.warns(UserWarning, match="`legacy_rms_norm=True`"):
        MegaModel.from_pretrained(tmp_path)
    run = next(run for run in runs("hf") if str(run) == f"{LEGACY}/nomask")
    model = MegaModel.from_pretrained(tmp_path, legacy_rms_norm=True, dtype=torch.float64)
    found = model(run.inputs["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, run.outputs["last_hidden_state"], atol=1e-10, rtol=0)
    model.save_pretrained(tmp_path / "again")  # what was decided is remembered, without a word
    assert MegaModel.from_pretrained(tmp_path / "again").config.legacy_rms_norm
    MegaModel(small_config(normalization_type="rmsnorm")).save_pretrained(tmp_path / "new")
    assert not MegaModel.from_pretrained(tmp_path / "new").config.legacy_rms_norm


def test_heads_that_a_wrong_configuration_ties(tmp_path):
    model = lively(MegaForCausalLM(causal_config(tie_word_embeddings=False)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    finding = check_directory(tmp_path)
    assert finding.status == DIFFERS
    assert "tie_word_embeddings" in finding.differences[0].what


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_recorded_directories_pass_the_check(case, tmp_path):
    finding = check_directory(write_directory(case, tmp_path))
    assert not finding.problems
    assert finding.status == (DIFFERS if case.name == LEGACY else LOADS)
    assert case.cls in finding.description[0]


def test_a_model_that_becomes_causal_differs(tmp_path):
    MegaForMaskedLM(small_config(bidirectional=False)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["MegaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check_directory(tmp_path).status == FAILS  # its head has another name
    MegaForCausalLM(causal_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"is_decoder": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    finding = check_directory(tmp_path)
    assert finding.status == DIFFERS
    assert "attention is causal" in finding.differences[0].what


def test_the_command(tmp_path, capsys):
    good, bad = tmp_path / "good", tmp_path / "bad"
    MegaModel(small_config()).save_pretrained(good)
    bad.mkdir()
    assert main(["check", str(good)]) == LOADS
    assert "a MegaModel of" in capsys.readouterr().out
    assert main(["check", str(good), str(bad)]) == FAILS
    assert "Does not load:" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nowhere")]) == FAILS
    (bad / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "`model_type` must be 'mega'" in check_directory(bad).problems[0]
    (bad / "config.json").write_text(json.dumps(MegaConfig(is_decoder=True).to_dict()))
    torch.save({}, bad / "pytorch_model.bin")
    assert "use `bidirectional=False`" in check_directory(bad).problems[0]
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0


def test_the_command_is_a_module(tmp_path):
    MegaModel(small_config()).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "megablocks.huggingface", "check", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == LOADS, ended.stderr
    assert "Loads:" in ended.stdout
