"""The original's whole models: logits, losses, gradients and streamed runs, as it gave them where it is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_models import ADAPTIVE_PREFIXES, PAD, classifier, fairseq_key, language_model, seq2seq
from golden_data import Run, true_runs
from megablocks import MegaClassifier

LANGUAGE = [run for run in true_runs("fairseq", "lm") if not run.case.args["adaptive_input"]]
ADAPTIVE = [run for run in true_runs("fairseq", "lm") if run.case.args["adaptive_input"]]
TRANSLATION = true_runs("fairseq", "encdec")
CLASSIFIERS = true_runs("fairseq", "lra") + true_runs("fairseq", "sc")


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    """Compares to a tolerance relative to the greatest number, at least 1."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def float32_tolerance(run: Run, name: str) -> float:
    """What float32 is held to: the original's own distance from float64, at least 32 roundings of the result.

    The recorded distances are those of float64 modules that use float32 inside; all weights in float32 round more.
    """
    return max(run.f32_limited[name], 32 * torch.finfo(torch.float32).eps)


def gradients_agree(model: nn.Module, run: Run, prefixes: dict[str, str]) -> None:
    """Compares every recorded gradient of a weight."""
    found = {}
    for key, parameter in model.named_parameters():
        theirs = fairseq_key(key, prefixes)
        found[theirs if theirs in run.gradients else theirs.removesuffix("weight") + "scalar"] = parameter.grad
    recorded = {key: value for key, value in run.gradients.items() if not key.endswith("_float_tensor")}
    assert recorded
    tied = run.case.record.get("tied", {})
    for key, gradient in recorded.items():
        ours = found[tied.get(key, key)]
        close(ours.reshape(gradient.shape), gradient)


@pytest.mark.parametrize("run", LANGUAGE, ids=str)
def test_language_model(run):
    model, tokens = language_model(run.case), run.inputs["src"]
    if "seg" in run.inputs:
        state, pieces = model.init_state(tokens.shape[0]), []
        for piece in tokens.split([int(length) for length in segments(run)], dim=1):
            logits, state = model(piece, state=state)
            pieces.append(logits)
        close(torch.cat(pieces, dim=1), run.outputs["out"])
        return
    mask = tokens == PAD
    logits, trace = model(tokens, padding_mask=mask, trace=True)
    close(logits, run.outputs["out"])
    close(model(tokens, padding_mask=mask), run.outputs["out"])
    for index in range(len(trace.hidden_states)):
        if f"inner{index}" in run.outputs:
            inner = run.outputs[f"inner{index}"].transpose(0, 1)[:, : tokens.shape[1]]
            close(trace.hidden_states[index][~mask], inner[~mask])
    loss = F.cross_entropy(logits.transpose(1, 2), run.inputs["target"], ignore_index=PAD, reduction="sum")
    close(loss, run.outputs["ce_sum"])
    if run.grad_of == "ce_sum":
        loss.backward()
        gradients_agree(model, run, {"embedding.": "decoder.embedding.", "output.": "decoder.output."})
    close(model.float()(tokens, padding_mask=mask).double(), run.outputs["out"], float32_tolerance(run, "out"))


@pytest.mark.parametrize("run", ADAPTIVE, ids=str)
def test_adaptive_language_model(run):
    model, tokens = language_model(run.case), run.inputs["src"]
    x = model.embedding(tokens, padding_mask=tokens == PAD)
    if "seg" in run.inputs:
        state, pieces = model.init_state(tokens.shape[0]), []
        for piece in x.split([int(length) for length in segments(run)], dim=1):
            y, state = model.decoder(piece, state=state)
            pieces.append(y)
        close(torch.cat(pieces, dim=1), run.outputs["out"])
        return
    mask, target = tokens == PAD, run.inputs["target"]
    features = model.decoder(x, padding_mask=mask)
    close(features, run.outputs["out"])
    log_probs = model(tokens, padding_mask=mask)
    close(log_probs[~mask], run.outputs["lprobs"][~mask])
    # Given targets, the original fills in the tails that they are in.
    picked = model.output.target_log_probs(features, target)
    close(picked, run.outputs["lprobs_target"].gather(2, target.unsqueeze(2)).squeeze(2))
    # The original's loss leaves out the second word of every tail (D19).
    cutoffs = model.output.cutoffs
    band = torch.bucketize(target, torch.tensor(cutoffs), right=True)
    start = torch.tensor([0, *cutoffs])[band]
    skipped = (band > 0) & (target - start == PAD)
    head = torch.log_softmax(model.output.head(features), dim=-1)
    of_cluster = head.gather(2, (cutoffs[0] - 1 + band).clamp(min=0).unsqueeze(2)).squeeze(2)
    counted = torch.where(skipped, of_cluster, picked)[target != PAD]
    loss = -counted.sum()
    close(loss.reshape(1), run.outputs["adaptive_sum"].reshape(1))
    if run.grad_of:
        loss.backward()
        gradients_agree(model, run, ADAPTIVE_PREFIXES)


def segments(run: Run) -> Tensor:
    """Lengths of the pieces of a streamed run."""
    recorded = run.inputs["seg"]
    return recorded if int(recorded.sum()) == run.inputs["src"].shape[1] else torch.ones_like(recorded)


@pytest.mark.parametrize("run", TRANSLATION, ids=str)
def test_translation_model(run):
    model, source, previous = seq2seq(run.case), run.inputs["src"], run.inputs["prev"]
    source_mask, target_mask = source == PAD, previous == PAD
    if run.name == "inc":
        state, steps = model.init_state(source, source_mask), []
        for token in previous.split(1, dim=1):
            logits, state = model(target=token, state=state)
            steps.append(logits)
        close(torch.cat(steps, dim=1), run.outputs["logits"])
        return
    masks = {"source_padding_mask": source_mask, "target_padding_mask": target_mask}
    logits, trace = model(source, previous, **masks, trace=True)
    close(logits, run.outputs["logits"])
    memory = model.encode(source, source_mask)
    close(memory[~source_mask], run.outputs["enc_out"].transpose(0, 1)[~source_mask])
    close(trace.cross_attention_weights[-1][~target_mask], run.outputs["attn"][~target_mask])
    loss = F.cross_entropy(logits.transpose(1, 2), run.inputs["target"], ignore_index=PAD, reduction="sum")
    close(loss, run.outputs["ce_sum"])
    if run.grad_of == "ce_sum":
        loss.backward()
        prefixes = {
            "source_embedding.": "encoder.embedding.",
            "target_embedding.": "decoder.embedding.",
            "output.": "decoder.output.",
        }
        gradients_agree(model, run, prefixes)
    close(model.float()(source, previous, **masks).double(), run.outputs["logits"], float32_tolerance(run, "logits"))


@pytest.mark.parametrize("run", CLASSIFIERS, ids=str)
def test_classifier(run):
    model: MegaClassifier = classifier(run.case)
    model.train(run.mode == "train")
    tokens, lengths = run.inputs["tokens"], run.inputs["lengths"]
    mask = torch.arange(tokens.shape[1]) >= lengths.unsqueeze(1)
    mask = mask if bool(mask.any()) else None
    if "rep" in run.outputs:
        x = model.embedding(tokens, padding_mask=mask)
        y, trace = model.encoder(x, padding_mask=mask, trace=True)
        close(model.pooling(y, mask), run.outputs["rep"])
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else ~mask
        for index, hidden in enumerate(trace.hidden_states):
            close(hidden[real], run.outputs[f"inner{index}"].transpose(0, 1)[:, : tokens.shape[1]][real])
        return
    logits = model(tokens, padding_mask=mask)
    close(logits, run.outputs["logits"])
    loss = F.cross_entropy(logits, run.inputs["target"], reduction="sum")
    if run.grad_of == "loss_sum":
        loss.backward()
        prefixes = {
            "embedding.tokens.": "encoder.encoder.embed_tokens.embed.",
            "embedding.projection.": "encoder.encoder.embed_tokens.",
            "embedding.norm.": "encoder.encoder.embed_norm.",
            "encoder.": "encoder.encoder.",
            "output.": "sentence_projection_layer.",
        }
        gradients_agree(model, run, prefixes)
