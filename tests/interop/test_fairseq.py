"""Checkpoints in the original's layout: the recorded models through `load_checkpoint`, and files that are none."""

from __future__ import annotations

import argparse
import os
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fairseq_models import PAD
from golden_data import Case, Run, cases, true_runs
from megablocks import (
    MegaClassifier,
    MegaLanguageModel,
    MegaSeq2Seq,
    MovingAverageGatedAttention,
    MultiDimensionDampedEMA,
    SimpleRelativeBias,
    load,
    mega_decoder,
    mega_encoder,
    preset,
)
from megablocks.interop.fairseq import convert, export, load_checkpoint
from megablocks.interop.fairseq.__main__ import main

EXACT = 1e-10
ENCODER_NAMES = {
    "encoder_embed_dim": "embedding_dim",
    "encoder_hidden_dim": "hidden_dim",
    "encoder_ffn_embed_dim": "ffn_hidden_dim",
    "encoder_layers": "num_encoder_layers",
    "activation_fn": "activation",
    "attention_activation_fn": "attention_activation",
    "truncation_length": "truncation",
    "encoder_normalize_before": "normalize_before",
}
"""What the arguments of a recorded encoder are called in a model."""


def written(path: Path, arch: str, args: dict[str, Any], state: dict[str, Tensor], **more: Any) -> Path:
    """A checkpoint file as the original writes it."""
    content = {"args": argparse.Namespace(arch=arch, **args), "model": OrderedDict(state), "extra_state": {"epoch": 3}}
    torch.save(content | more, path)
    return path


def architecture(case: Case) -> str:
    """The base architecture of a recorded model."""
    return {"lm": "mega_lm", "encdec": "mega", "lra": "mega_lra_listop", "sc": "mega_sc_raw"}[case.group]


def file_of(case: Case, path: Path) -> Path:
    """A recorded model as a file; an encoder alone gets a head."""
    args, state = case.args, case.state
    if case.group in ("lra", "sc") and case.cls != "LRAModel.build_model":
        given = {"rel_pos_bias": "simple", "chunk_size": -1, "activation": "silu", "normalize_embedding": False, **args}
        args = given | {name: given[theirs] for name, theirs in ENCODER_NAMES.items()}
        width = args["encoder_embed_dim"]
        state = {f"encoder.encoder.{key}": value for key, value in state.items()} | {
            "classifier.0.0.weight": torch.randn(10, width),
            "classifier.0.0.bias": torch.randn(10),
            "sentence_projection_layer.weight": torch.randn(3, 10),
        }
    return written(path / "checkpoint.pt", architecture(case), args, state)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= EXACT * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("run", true_runs("fairseq", "lm"), ids=str)
def test_language_models(run, tmp_path):
    model, tokens = load_checkpoint(file_of(run.case, tmp_path)), run.inputs["src"]
    assert isinstance(model, MegaLanguageModel)
    assert not model.training
    mask = tokens == PAD
    recorded = "lprobs" if run.case.args["adaptive_input"] else "out"
    if "seg" in run.inputs:
        state, pieces = model.init_state(len(tokens)), []
        lengths = run.inputs["seg"]
        lengths = lengths if int(lengths.sum()) == tokens.shape[1] else torch.ones_like(lengths)
        for piece in model.embedding(tokens).split(lengths.tolist(), dim=1):
            y, state = model.decoder(piece, state=state)
            pieces.append(y)
        y = torch.cat(pieces, dim=1)
        assert_close(y if run.case.args["adaptive_input"] else model.output(y), run.outputs["out"])
    else:
        assert_close(model(tokens, padding_mask=mask)[~mask], run.outputs[recorded][~mask])


@pytest.mark.parametrize("run", true_runs("fairseq", "encdec"), ids=str)
def test_translation_models(run, tmp_path):
    model = load_checkpoint(file_of(run.case, tmp_path))
    assert isinstance(model, MegaSeq2Seq)
    source, previous = run.inputs["src"], run.inputs["prev"]
    source_mask, target_mask = source == PAD, previous == PAD
    logits = model(source, previous, source_padding_mask=source_mask, target_padding_mask=target_mask)
    assert_close(logits[~target_mask], run.outputs["logits"][~target_mask])


@pytest.mark.parametrize(
    "run", [run for group in ("lra", "sc") for run in true_runs("fairseq", group) if run.mode == "eval"], ids=str
)
def test_classifiers(run, tmp_path):
    model = load_checkpoint(file_of(run.case, tmp_path))
    assert isinstance(model, MegaClassifier)
    inputs, lengths = run.inputs["tokens"], run.inputs["lengths"]
    mask = torch.arange(inputs.shape[1]) >= lengths.unsqueeze(1)
    if "logits" in run.outputs:
        assert_close(model(inputs, padding_mask=mask), run.outputs["logits"])
    else:
        y = model.encoder(model.embedding(inputs, padding_mask=mask), padding_mask=mask)
        assert_close(model.pooling(y, mask), run.outputs["rep"])


# Layers: in a model of one layer


def file_of_layer(case: Case, path: Path) -> Path:
    """A recorded layer, or part of one, as the last layer of a model, everything else of which is random."""
    args, given = case.args, {}
    if case.group == "layer":
        given = args | {"encoder_layers": 1, "decoder_layers": 1}
    else:
        width = {"embed_dim": args["embed_dim"], "z_dim": args["zdim"], "hidden_dim": args.get("hdim", 12)}
        shared = {**width, "n_dim": args.get("ndim", 2), "ffn_embed_dim": 0, "layers": 1}
        given = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shared.items()} | {
            "decoder_chunk_size": args.get("chunk_size", -1),
            "rel_pos_bias": args["rel_pos_bias"],
            "activation_fn": args["activation"],
            "attention_activation_fn": args["attention_activation"],
            "normalization_type": args["norm_type"],
            "normalize_before": args["prenorm"],
            "truncation_length": args.get("truncation"),
        }
    given["decoder_input_dim"] = given["decoder_embed_dim"]
    inner = {"cross": "decoder.layers.0.cross_attn.", "mega_inc": "decoder.layers.0.mega_layer."}.get(
        case.group, "encoder.layers.0." if case.cls == "MegaEncoderLayer" else "decoder.layers.0."
    )
    cross = case.group == "cross" or any(key.startswith("cross_attn") for key in case.state)
    arch = "mega" if cross or inner.startswith("encoder") else "mega_lm"
    state = random_state(given, arch, case.args.get("max_positions", 24)) | {
        inner + key: value for key, value in case.state.items()
    }
    return written(path / "checkpoint.pt", arch, given, state)


def random_state(args: dict[str, Any], arch: str, positions: int) -> dict[str, Tensor]:
    """Weights of a model of one layer with these arguments."""

    def options(side: str) -> dict[str, Any]:
        chunk = args.get(f"{side}_chunk_size", -1)
        reach = chunk if chunk > 0 else positions
        return {
            "qk_dim": args[f"{side}_z_dim"],
            "value_dim": args[f"{side}_hidden_dim"],
            "ema_dim": args[f"{side}_n_dim"],
            "ffn_dim": args[f"{side}_ffn_embed_dim"] or None,
            "position_bias": args["rel_pos_bias"],
            "max_positions": reach if args["rel_pos_bias"] == "simple" else None,
            "norm": args["normalization_type"],
            "prenorm": args["normalize_before"],
        }

    width = args["decoder_embed_dim"]
    decoder = mega_decoder(1, width, cross_attention=arch == "mega", **options("decoder"))
    if arch == "mega_lm":
        return export(MegaLanguageModel(decoder, 20, tie_output=False).double())
    model = MegaSeq2Seq(mega_encoder(1, width, **options("encoder")), decoder, source_vocab_size=20)
    return export(model.double())


LAYER_RUNS = [run for group in ("layer", "cross", "mega_inc") for run in true_runs("fairseq", group)]


@pytest.mark.parametrize("run", [run for run in LAYER_RUNS if run.name not in ("inc", "inc_parallel")], ids=str)
def test_layers(run: Run, tmp_path):
    model, inputs = load_checkpoint(file_of_layer(run.case, tmp_path)), run.inputs
    given = {name: value.transpose(0, 1) if value.dim() == 3 else value for name, value in inputs.items()}
    if run.case.group == "cross":
        layer = model.decoder.layers[0].cross_attention
        y, mask = layer(given["q"], given["k"], memory_padding_mask=given.get("kmask")), None
    elif run.case.group == "mega_inc":
        layer, mask = model.decoder.layers[0].attention, given.get("mask")
        y = layer(given["x"], padding_mask=mask)
    else:
        side = model.encoder if run.case.cls == "MegaEncoderLayer" else model.decoder
        memory = {"memory": given["enc"], "memory_padding_mask": given.get("encmask")} if "enc" in given else {}
        mask = given.get("mask")
        y = side.layers[0](given["x"], padding_mask=mask, **memory)
    recorded = run.outputs["y"].transpose(0, 1)
    real = torch.ones(recorded.shape[:2], dtype=torch.bool) if mask is None else ~mask
    assert_close(y[real], recorded[real])


# Both ways


ALL_MODELS = [case for group in ("lm", "encdec", "lra", "sc") for case in cases("fairseq", group)]


@pytest.mark.parametrize("case", ALL_MODELS, ids=str)
def test_what_came_in_goes_out_again(case, tmp_path):
    model = load_checkpoint(file_of(case, tmp_path))
    original = torch.load(tmp_path / "checkpoint.pt", weights_only=False)["model"]
    exported = export(model)
    assert exported.keys() == original.keys()
    for key, value in original.items():
        assert exported[key].shape == value.shape
        if not key.endswith(("version", "_float_tensor")):
            assert exported[key].double().equal(value.double()), key


@pytest.mark.parametrize("name", ["lra_image", "lra_retrieval", "enwik8", "wmt", "wikitext103"])
def test_our_models_go_out_and_come_in_again(name):
    small = {"num_layers": 1, "embed_dim": 8, "qk_dim": 4, "value_dim": 8, "ffn_dim": 8}
    smaller = {"vocab_size": 40, "adaptive_cutoffs": (10, 20)} if name == "wikitext103" else {}
    ours, again = (preset(name, **small, **smaller) for _ in range(2))
    assert convert(export(ours), again) is again
    theirs = again.state_dict()
    assert all(value.equal(theirs[key]) for key, value in ours.state_dict().items())


def test_the_papers_alpha_is_the_originals_delta():
    ema = MultiDimensionDampedEMA(4, 2)
    weights = export(ema)
    assert weights["delta"].shape == (4, 2, 1)
    assert weights["delta"].squeeze(2).equal(ema.alpha)
    assert weights["alpha"].squeeze(2).equal(ema.delta)
    weights["delta"].zero_()
    assert ema.alpha.any()  # exported weights are copies


def test_d22_a_long_table_goes_out_as_long_as_the_chunks_and_comes_in_again():
    def layer(positions: int, chunk_size: int | None = 4) -> MovingAverageGatedAttention:
        return MovingAverageGatedAttention(8, 4, chunk_size=chunk_size, position_bias=SimpleRelativeBias(positions))

    ours, chunked = layer(10).eval(), layer(4).eval()
    weights = export(ours)
    assert weights["rel_pos_bias.rel_pos_bias"].equal(ours.position_bias.weight[6:13])
    x = torch.randn(2, 9, 8)
    assert convert(weights, chunked)(x).equal(ours(x))
    again = convert(weights, layer(10).eval())
    assert again(x).equal(ours(x))
    for other in (layer(10, chunk_size=5), layer(10, chunk_size=None), layer(3)):
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"of another shape: rel_pos_bias\.rel_pos_bias \(7,\) instead of \("):
            convert(weights, other)
        assert all(value.equal(before[key]) for key, value in other.state_dict().items())


def test_all_that_does_not_fit_is_listed_and_nothing_is_written():
    model = MegaLanguageModel(mega_decoder(1, 8, qk_dim=4), 11)
    weights = export(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del weights["decoder.layers.0.mega_layer.h_proj.bias"]
    weights["decoder.layers.0.mega_layer.mx_proj.bias"] = torch.zeros(3)
    weights["decoder.surprise"] = torch.zeros(2)
    weights["decoder.output_projection.weight"] = weights["decoder.output_projection.weight"] + 1
    with pytest.raises(ValueError, match=r"^The weights do not fit this MegaLanguageModel: ") as error:
        convert(weights, model)
    for part in (
        "missing: decoder.layers.0.mega_layer.h_proj.bias;",
        "not wanted: decoder.surprise;",
        "of another shape: decoder.layers.0.mega_layer.mx_proj.bias (3,) instead of (36,);",
        "shared, but different: decoder.output_projection.weight.",
    ):
        assert part in str(error.value)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_part_of_a_model_by_its_prefix():
    case = cases("fairseq", "mega_inc")[0]
    state = {f"decoder.layers.3.mega_layer.{key}": value for key, value in case.state.items()} | {
        "other": torch.ones(1)
    }
    layer = MovingAverageGatedAttention(8, 4, value_dim=12, ema=2).double()
    assert convert(state, layer, prefix="decoder.layers.3.mega_layer.") is layer
    assert layer.ema.alpha.equal(case.state["move.delta"].squeeze(2))


# Truncation, defaults, files


def emas(module: nn.Module) -> set[int | None]:
    return {part.truncation for part in module.modules() if isinstance(part, MultiDimensionDampedEMA)}


def test_d1_language_models_lose_their_truncation_and_others_keep_it(tmp_path):
    path = file_of(cases("fairseq", "lm")[0], tmp_path)
    assert emas(load_checkpoint(path)) == {None}
    assert emas(load_checkpoint(path, truncation="keep")) == {1024}
    for group in ("encdec", "lra"):
        assert emas(load_checkpoint(file_of(cases("fairseq", group)[0], tmp_path))) == {1024}
    with pytest.raises(ValueError, match=r"^`truncation` must be one of 'auto', 'keep', but is 'drop'\.$"):
        load_checkpoint(path, truncation="drop")


def test_d2_a_truncation_of_zero_is_none(tmp_path):
    case = cases("fairseq", "encdec")[0]
    path = written(tmp_path / "zero.pt", "mega", case.args | {"truncation_length": 0}, case.state)
    assert emas(load_checkpoint(path)) == {None}


@pytest.mark.parametrize("missing", ["activation_dropout", "adaptive_softmax_factor", "hidden_dropout"])
def test_d20_missing_arguments_have_defaults(missing, tmp_path):
    case = cases("fairseq", "lm")[0]
    args = {key: value for key, value in case.args.items() if key != missing}
    assert isinstance(load_checkpoint(written(tmp_path / "x.pt", "mega_lm_big", args, case.state)), MegaLanguageModel)


def test_defaults_of_the_architecture_stand_in(tmp_path):
    case = cases("fairseq", "lm")[0]
    args = {key: value for key, value in case.args.items() if key not in ("dropout", "attention_dropout")}
    model = load_checkpoint(written(tmp_path / "x.pt", "mega_lm_wiki103", args, case.state))
    attention = model.decoder.layers[0].attention
    assert (attention.dropout.p, attention.attention_dropout.p) == (0.3, 0.1)
    with pytest.raises(ValueError, match=r"^The file has no argument `\w+`, and no defaults for .* 'mega_lra_x'"):
        load_checkpoint(written(tmp_path / "y.pt", "mega_lra_x", {"rel_pos_bias": "rotary"}, case.state))


def test_groups_of_arguments_and_old_files(tmp_path):
    case = cases("fairseq", "lm")[0]
    tokens = next(run for run in case.runs if run.name == "nopad").inputs["src"]
    first = load_checkpoint(file_of(case, tmp_path))(tokens)
    groups = {"model": {"_name": "mega_lm", **case.args}, "task": argparse.Namespace(data="x"), "optimizer": {}}
    torch.save({"args": None, "cfg": groups, "model": case.state}, tmp_path / "cfg.pt")
    assert load_checkpoint(tmp_path / "cfg.pt")(tokens).equal(first)
    content = {"args": argparse.Namespace(arch="mega_lm", **case.args), "model": case.state}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "old.pt")(tokens).equal(first)


def test_half_precision_files_become_float32(tmp_path):
    case = cases("fairseq", "lm")[0]
    state = {key: value.half() if value.is_floating_point() else value for key, value in case.state.items()}
    model = load_checkpoint(written(tmp_path / "half.pt", "mega_lm", case.args, state))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_stands_beside_the_weights_is_passed_over(tmp_path, monkeypatch):
    # Running averages and NumPy's numbers, as training wrote them; neither the fork nor its classes are there to read.
    case, path = cases("fairseq", "lm")[0], tmp_path / "trained.pt"
    meters = types.ModuleType("fairseq.meters")
    meters.AverageMeter = type("AverageMeter", (), {"__module__": "fairseq.meters"})
    meter = meters.AverageMeter()
    meter.sum, meter.count = np.float64(3.5), 2
    extra = {
        "train_meters": {"loss": meter},
        "val_loss": np.float64(1.75),
        "best": np.float32(1.5),
        "epoch": np.int64(3),
    }
    with monkeypatch.context() as there:
        there.setitem(sys.modules, "fairseq", types.ModuleType("fairseq"))
        there.setitem(sys.modules, "fairseq.meters", meters)
        args = argparse.Namespace(arch="mega_lm", **case.args)
        torch.save({"args": args, "model": case.state, "extra_state": extra}, path)
    tokens = next(run for run in case.runs if run.name == "nopad").inputs["src"]
    assert load_checkpoint(path)(tokens).equal(load_checkpoint(file_of(case, tmp_path))(tokens))


class Harmful:
    """Something that no checkpoint needs."""


class Calls:
    """Something that calls a function as it is read."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ("true",)


@pytest.mark.parametrize(("function", "name"), [(os.system, "posix.system"), (print, "print"), (eval, "eval")])
def test_functions_are_refused_by_name_and_not_called(function, name, tmp_path, capsys):
    path = tmp_path / "bad.pt"
    torch.save({"args": argparse.Namespace(arch="mega_lm"), "model": {}, "extra": Calls(function)}, path)
    with pytest.raises(ValueError, match=rf"asks for `{name}`, which is not known to be harmless"):
        load_checkpoint(path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_other_classes_are_refused_by_name(zipped, tmp_path):
    case, path = cases("fairseq", "lm")[0], tmp_path / "bad.pt"
    content = {"args": argparse.Namespace(arch="mega_lm"), "model": case.state, "extra": Harmful()}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"asks for `[\w.]*\.Harmful`, which is not known to be harmless"):
        load_checkpoint(path)


def test_broken_files_and_those_of_others(tmp_path):
    case, path = cases("fairseq", "lm")[0], tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match=r"x\.pt is no file; name a checkpoint of the original code, like"):
        load_checkpoint(path)
    whole = file_of(case, tmp_path).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.pt is cut short or no file of PyTorch \(.*\); fetch it again\.$"):
            load_checkpoint(path)
    torch.save(case.state, path)
    with pytest.raises(ValueError, match=r"x\.pt holds no checkpoint of the original code: that is a dict"):
        load_checkpoint(path)
    torch.save({"model": case.state}, path)
    with pytest.raises(ValueError, match=r"x\.pt holds no `args` or `cfg`, which a model is made from; make one"):
        load_checkpoint(path)
    with pytest.raises(
        ValueError, match=r"^The file holds a model of architecture 'transformer_lm', but only those of"
    ):
        load_checkpoint(written(path, "transformer_lm", case.args, case.state))
    few = {key: value for key, value in case.state.items() if "fc1" not in key} | {"decoder.more": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing: decoder\.layers\.0\.nffn\.fc1\.bias, .*; not wanted: .*more\.$"):
        load_checkpoint(written(path, "mega_lm", case.args, few))


# The command


def test_the_command_writes_what_load_reads_and_overwrites_nothing(tmp_path, capsys):
    case = next(case for case in cases("fairseq", "lm") if case.name == "lm.adaptive_tied_proj_chunk4")
    source, target = file_of(case, tmp_path), tmp_path / "model"
    assert main([str(source), str(target)]) == 0
    out, err = capsys.readouterr()
    assert not err
    model = load_checkpoint(source)
    count = sum(parameter.numel() for parameter in model.parameters())
    for line in (
        "architecture: mega_lm, a MegaLanguageModel",
        f"parameters: {count:,}",
        "  decoder_chunk_size: 4",
        "  adaptive_softmax_cutoff: 10,20",
        "  D1: averages are not truncated to 1024 lags; the original ignores that too when it evaluates",
        "  D19: the loss counts every word of every tail; log-probabilities have gradients",
    ):
        assert f"{line}\n" in out
    tokens = torch.randint(30, (2, 9))
    assert load(target)(tokens).equal(model(tokens))

    before = sorted((path.name, path.read_bytes()) for path in target.iterdir())
    other = file_of(cases("fairseq", "encdec")[0], tmp_path)
    assert main([str(other), str(target)]) == 2
    assert re.fullmatch(r"error: .*model is already there; name .*, or add --force\.\n", capsys.readouterr().err)
    assert sorted((path.name, path.read_bytes()) for path in target.iterdir()) == before
    assert main([str(other), str(target), "--force"]) == 0
    assert isinstance(load(target), MegaSeq2Seq)
    assert "architecture: mega, a MegaSeq2Seq\n" in capsys.readouterr().out


def test_the_command_keeps_truncation_and_says_what_is_wrong(tmp_path, capsys):
    source = file_of(cases("fairseq", "lm")[0], tmp_path)
    assert main([str(source), str(tmp_path / "kept"), "--truncation", "keep"]) == 0
    assert "  D1: averages are truncated to 1024 lags in streams too" in capsys.readouterr().out
    assert emas(load(tmp_path / "kept")) == {1024}
    source.write_bytes(b"nothing")
    assert main([str(source), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {source} is cut short or no file of PyTorch")
    assert not (tmp_path / "new").exists()
