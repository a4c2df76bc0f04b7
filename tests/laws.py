"""The laws, each a function of a block and a case, and the blocks that they are for.

A block is described by a small adapter (`law_layers`, `law_models`): how to make the module, how to call it, how to
start a stream, what the oracle says. A block that is entered in `BLOCKS` is held to every law that applies to it.

Claims of exactness are made in float64, where rounding stays below 1e-10 of the numbers' scale.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import reject
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils import _pytree as pytree

import oracles
from law_layers import LAYERS, Block
from law_models import MODELS, STACKS, VOCABULARY
from megablocks.layers import RMSNorm, ScaleNorm, SequenceNorm
from megablocks.stacks.stack import set_chunk_size
from megablocks.state import EMAState, TruncatedEMAState, detach, select_rows
from strategies import Case, Sample

BLOCKS = [*LAYERS, *STACKS, *MODELS]

EXACT = 1e-10


# Comparing


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = EXACT, *, floor: float = 0.0) -> None:
    """No number is further off than the tolerance times the largest expected number, which `floor` stands in for."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not expected.is_floating_point() or expected.numel() == 0:
        assert torch.equal(actual, expected)
        return
    if not bool(expected.isfinite().all()) and bool((expected.abs() > 1e30).any()):
        reject()  # stacks without a norm square what is large in each layer: beyond the range of floats no law speaks
    assert bool(actual.isfinite().all()), "not finite"
    scale = max(expected.abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"off by {error:.1e} of the scale {scale:.1e}"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same numbers to the last bit, NaN in the same places."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_states_close(actual: Any, expected: Any) -> None:
    """Two states of one kind hold the same numbers."""
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    for found, wanted in zip(tensors(actual), tensors(expected), strict=True):
        assert found.dtype == wanted.dtype
        assert_close(found, wanted)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a state, without the `None` that stands for a part that is not there."""
    return [part for part in pytree.tree_leaves(state) if part is not None]


def gradients(y: Tensor, module: nn.Module, *inputs: Tensor, retain_graph: bool = False) -> list[Tensor]:
    """Gradients of a drawn combination of the outputs: inputs first, then every parameter that requires one."""
    if not y.requires_grad:  # the oracle's answer to nothing but padding
        return [torch.zeros_like(tensor) for tensor in (*inputs, *module.parameters())]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    wanted = [*inputs, *module.parameters()]
    found = torch.autograd.grad(
        (y * weights).sum(), wanted, retain_graph=retain_graph, allow_unused=True, materialize_grads=True
    )
    return list(found)


def assert_gradients_close(
    actual: list[Tensor], expected: list[Tensor], tolerance: float = EXACT, *, rounding: list[float] | None = None
) -> None:
    """Each gradient is right to the tolerance times its own scale, where its terms cancel 1% of the largest.

    `rounding` says how far the norms' rounding may move each of them besides, see `norm_rounding`.
    """
    floor = 1e-2 * max((gradient.abs().max().item() for gradient in expected if gradient.numel()), default=0.0)
    for found, wanted, moved in zip(actual, expected, rounding or [0.0] * len(actual), strict=True):
        assert_close(found, wanted, tolerance, floor=max(floor, moved / tolerance))


def norm_rounding(module: nn.Module, run: Callable[[], list[Tensor]]) -> list[float]:
    """How far each tensor that `run` gives is moved if every norm of single tokens rounds some dozens of times as much.

    A norm subtracts the mean from a token, and from the gradient of its output the gradient's mean and projection.
    Where nothing is left (a single channel, numbers that are alike) the rounding of what was subtracted is left, times
    the norm's steepness 1 / sqrt(variance + eps), which is up to 300 in each norm. The scale of the result knows
    nothing of that, so it is measured: in a second run the normed numbers are off by 64 roundings of the token as it
    came times the steepness, and what the norm gives back by 64 roundings of the terms that its backward pass adds up.
    """
    few, source = 64 * torch.finfo(torch.float64).eps, torch.Generator().manual_seed(0)

    def noise(scale: Tensor, like: Tensor) -> Tensor:
        return few * scale * torch.randn(like.shape, generator=source, dtype=like.dtype)

    def blurred(norm: nn.Module, x: Tensor) -> Tensor:
        token, weight = x.detach(), norm.weight.detach().abs().amax()
        centred = token - token.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else token
        steepness = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps)
        size = steepness * token.abs().amax(-1, keepdim=True)
        terms: list[Tensor] = []
        x = x.view_as(x)
        y = type(norm).forward(norm, x)
        if x.requires_grad:
            # torch's layer norm adds a multiple of the token as it came, and takes that of the mean off again.
            y.register_hook(lambda g: terms.append(g.abs().amax(-1, keepdim=True) * weight * steepness * (1 + size)))
            x.register_hook(lambda g: g + noise(terms[0], g))
        return y + norm.weight * noise(size, y)

    exact = run()
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm | ScaleNorm | RMSNorm)]
    for norm in norms:
        norm.forward = partial(blurred, norm)
    moved = run()
    for norm in norms:
        del norm.forward
    return [(a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(exact, moved, strict=True)]


def leaf(sample: Sample) -> Sample:
    """The sample with tensors of its own, which want gradients where they can."""
    x, memory = (tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in (sample.x, sample.memory))
    return sample._replace(x=x, memory=memory)


def float_inputs(block: Block, sample: Sample) -> list[Tensor]:
    """The inputs of a block that may have gradients."""
    inputs = [sample.x, sample.memory] if block.memory else [sample.x]
    return [tensor for tensor in inputs if tensor.is_floating_point()]


def piece(sample: Sample, start: int, end: int) -> Sample:
    """A segment of the sample."""
    padded = sample.padding_mask
    return sample._replace(x=sample.x[:, start:end], padding_mask=None if padded is None else padded[:, start:end])


def stream(block: Block, module: nn.Module, case: Case, sample: Sample, cuts: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The output of the sample given piece by piece, and the final state."""
    state, done, outputs = block.start(module, case, sample), 0, []
    for length in cuts:
        y, state = block.call(module, piece(sample, done, done + length), state)
        outputs.append(y)
        done += length
    return torch.cat(outputs, dim=1), state


# The laws


def causal(block: Block, case: Case) -> None:
    """Law 1: what comes from `at` on moves no earlier output, however large it is."""
    for dtype, size in block.largest:
        module, sample = block.build(case, dtype), leaf(block.draw(case, dtype))
        later = block.draw(case.but(seed=case.seed + 1, magnitude=size), dtype).x
        y = block.call(module, sample)
        disturbed = torch.cat([sample.x[:, : case.at], later[:, case.at :]], dim=1)
        before = block.call(module, sample._replace(x=disturbed))[:, : case.at]
        if case.at:
            # Other lengths of sums may round otherwise: a bound of a few roundings that knows nothing of `size`.
            assert_close(before, y[:, : case.at], 32 * torch.finfo(dtype).eps)
            if sample.x.is_floating_point():
                gradient = gradients(y[:, : case.at], module, sample.x)[0][:, case.at :]
                assert_same(gradient, torch.zeros_like(gradient))


def any_cut(block: Block, case: Case) -> None:
    """Law 2: a stream cut anywhere equals one pass, gradients included, and ends in the same state."""
    module, sample = block.build(case), leaf(block.draw(case, torch.float64))
    inputs = float_inputs(block, sample)

    def run() -> list[Tensor]:
        y = block.call(module, sample)
        return [y.detach(), *gradients(y, module, *inputs)]

    rounding = norm_rounding(module, run)
    whole = block.call(module, sample)
    once, last = stream(block, module, case, sample, (case.length,))
    pieces, final = stream(block, module, case, sample, case.cuts)
    assert_close(once, whole)
    assert_close(pieces, whole)
    assert_states_close(final, last)
    found, expected = gradients(pieces, module, *inputs), gradients(whole, module, *inputs)
    assert_gradients_close(found, expected, rounding=rounding[1:])


def chunks_that_hold_everything(block: Block, case: Case) -> None:
    """Law 3: a chunk size of at least the length equals no chunking."""
    whole, sample = case.but(chunk_size=None, capacity=None), block.draw(case, torch.float64)
    y = block.call(block.build(whole), sample)
    longest = max(sample.x.shape[1], sample.memory.shape[1])
    for chunk_size in (longest, longest + 1, longest + 64):
        chunked = block.build(whole)
        set_chunk_size(chunked, chunk_size)
        assert_close(block.call(chunked, sample), y)


def chunk_borders(block: Block, case: Case) -> None:
    """Law 3: attention does not cross a chunk border; an average of one lag leaves no other way across."""
    case = case.but(truncation=1, padding=None, chunk_size=case.chunk_size or 3)
    module, sample = block.build(case), block.draw(case, torch.float64)
    chunk = case.at // case.chunk_size
    start, end = chunk * case.chunk_size, min((chunk + 1) * case.chunk_size, case.length)
    other = block.draw(case.but(seed=case.seed + 1), torch.float64).x
    disturbed = sample.x.clone()
    disturbed[:, start:end] = other[:, start:end]
    y, moved = (block.call(module, sample._replace(x=x)) for x in (sample.x, disturbed))
    assert_close(moved[:, :start], y[:, :start])
    assert_close(moved[:, end:], y[:, end:])


def padding_is_deletion(block: Block, case: Case) -> None:
    """Law 4: each row gives what it gives alone and without its padding; at padding, zeros; anything there is inert."""
    module, sample = block.build(case), block.draw(case, torch.float64)
    y = block.call(module, sample)
    for row in range(case.batch):
        found, alone = y[row : row + 1], row_alone(block, sample, row)
        if not block.pooled:
            padded = (
                torch.zeros(case.length, dtype=torch.bool) if sample.padding_mask is None else sample.padding_mask[row]
            )
            assert_same(found[:, padded], torch.zeros_like(found[:, padded]))
            found = found[:, ~padded] if not padded.all() else found[:, :1]
        assert_close(found, block.call(module, alone))

    calm, wild = leaf(hidden_padding(sample)), leaf(hidden_padding(sample, wild=True))
    y_calm, y_wild = block.call(module, calm), block.call(module, wild)
    assert_same(y_wild, y_calm)
    inputs, wild_inputs = float_inputs(block, calm), float_inputs(block, wild)
    calm_gradients, wild_gradients = gradients(y_calm, module, *inputs), gradients(y_wild, module, *wild_inputs)
    for gradient, wild_gradient in zip(calm_gradients, wild_gradients, strict=True):
        assert bool(wild_gradient.isfinite().all())
        assert_same(wild_gradient, gradient)
    masks = (sample.padding_mask, sample.memory_padding_mask)[: len(inputs)]
    for gradient, mask in zip(wild_gradients, masks, strict=False):
        assert mask is None or not gradient[mask].any()


def row_alone(block: Block, sample: Sample, row: int) -> Sample:
    """One row of the sample without its padding; of nothing but padding, which cannot be deleted, one slot."""

    def without_padding(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if mask is None:
            return x[row : row + 1], None
        if mask[row].all():
            return x[row : row + 1, :1], mask[row : row + 1, :1]
        return x[row : row + 1, ~mask[row]], None

    x, padding_mask = without_padding(sample.x, sample.padding_mask)
    memory, memory_padding_mask = without_padding(sample.memory, sample.memory_padding_mask)
    return Sample(x, padding_mask, memory, memory_padding_mask)


def hidden_padding(sample: Sample, *, wild: bool = False) -> Sample:
    """The sample with zeros under its padding; or, wild, with NaN, and tokens that no vocabulary has."""

    def filled(x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x
        if x.is_floating_point():
            return x.masked_fill(mask.unsqueeze(-1), float("nan") if wild else 0.0)
        ids = torch.tensor([VOCABULARY, -1, -100, 2**62])[torch.arange(x.numel()).view_as(x) % 4]
        return torch.where(mask, ids if wild else torch.zeros_like(x), x)

    return sample._replace(
        x=filled(sample.x, sample.padding_mask), memory=filled(sample.memory, sample.memory_padding_mask)
    )


def batch_statistics(block: Block, case: Case) -> None:
    """Law 4: in training, batch-norm statistics are those of the real tokens; a batch of padding leaves them alone."""
    case = case.but(norm="batchnorm", training=True, magnitude=min(case.magnitude, 30.0))
    module = block.build(case)
    params = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), block.params(module))
    norms = [part for part in module.modules() if isinstance(part, SequenceNorm)]
    running = {norm: (norm.norm.running_mean.clone(), norm.norm.running_var.clone()) for norm in norms}

    # What comes into a norm is the oracle's concern below; here it is what the statistics are of.
    def follow(norm: SequenceNorm, args: tuple[Tensor], kwargs: dict[str, Tensor | None]) -> None:
        _, *running[norm] = oracles.batch_norm(args[0].detach(), *running[norm], training=True, **kwargs)

    sample = block.draw(case, torch.float64)
    for norm in norms:
        norm.register_forward_pre_hook(follow, with_kwargs=True)
    y = block.call(module, hidden_padding(sample, wild=True))
    assert_close(y, block.oracle(params, case, sample))
    for norm, (mean, var) in running.items():
        assert_close(norm.norm.running_mean, mean)
        assert_close(norm.norm.running_var, var)


def pure(block: Block, case: Case) -> None:
    """Law 5: a call writes into nothing, old states stay valid, changed weights take effect at once."""
    module, sample = block.build(case), block.draw(case, torch.float64)
    read = [*module.parameters(), *module.buffers(), *(tensor for tensor in sample if tensor is not None)]
    before = [tensor.detach().clone() for tensor in read]
    attributes = [dict(vars(part)) for part in module.modules()]
    with torch.no_grad():
        first = block.call(module, sample)
    second = block.call(module, sample)
    assert_same(second.detach(), first)
    for tensor, old in zip(read, before, strict=True):
        assert_same(tensor.detach(), old)
    for part, old in zip(module.modules(), attributes, strict=True):
        assert list(vars(part)) == list(old)
        assert all(vars(part)[key] is old[key] for key in old)

    # Gradients after a call without them, twice through one graph, and through two graphs.
    once = gradients(second, module, retain_graph=True)
    again = gradients(second, module)
    other = gradients(block.call(module, sample), module)
    for gradient, same, third in zip(once, again, other, strict=True):
        assert_same(same, gradient)
        assert_same(third, gradient)

    stranger = block.build(case.but(seed=case.seed + 1))
    module.load_state_dict(stranger.state_dict())
    assert_same(block.call(module, sample).detach(), block.call(stranger, sample).detach())
    with torch.no_grad():
        for parameter in [*module.parameters(), *stranger.parameters()]:
            parameter.mul_(0.5)
    fresh = block.build(case)
    fresh.load_state_dict(stranger.state_dict())
    assert_same(block.call(module, sample).detach(), block.call(fresh, sample).detach())
    # A trip to another precision and back leaves nothing of it behind.
    module.to(torch.bfloat16)
    block.call(module, block.draw(case, torch.bfloat16))
    module.to(torch.float64).load_state_dict(fresh.state_dict())
    assert_same(block.call(module, sample).detach(), block.call(fresh, sample).detach())


def states_are_values(block: Block, case: Case) -> None:
    """Law 5: a state is never written into; what was computed from it once comes again."""
    module, sample = block.build(case), block.draw(case, torch.float64)
    head, tail = piece(sample, 0, case.at), piece(sample, case.at, case.length)
    with torch.no_grad():
        state = block.start(module, case, sample)
        if case.at:
            _, state = block.call(module, head, state)
        kept = pytree.tree_map_only(Tensor, torch.clone, state)
        y, after = block.call(module, tail, state)
        y_again, after_again = block.call(module, tail, state)
    for old, new in ((kept, state), (after, after_again)):
        for leaf_before, leaf_after in zip(tensors(old), tensors(new), strict=True):
            assert_same(leaf_after, leaf_before)
    assert_same(y_again, y)


def oracle(block: Block, case: Case) -> None:
    """Law 6: forward, every gradient and the final state are those of the plain loop."""
    module, sample = block.build(case), leaf(block.draw(case, torch.float64))
    slow = leaf(sample)
    inputs, slow_inputs = float_inputs(block, sample), float_inputs(block, slow)

    def run() -> list[Tensor]:
        y = block.call(module, sample)
        return [y.detach(), *gradients(y, module, *inputs)]

    (y, *found), (forward, *backward) = run(), norm_rounding(module, run)
    expected = block.oracle(block.params(module), case, slow)
    assert_close(y, expected.detach(), floor=forward / EXACT)
    assert_gradients_close(found, gradients(expected, module, *slow_inputs), rounding=backward)


def oracle_state(block: Block, case: Case) -> None:
    """Law 6: the state after a stream is the one that the plain loop ends in."""
    module, sample = block.build(case), block.draw(case, torch.float64)
    with torch.no_grad():
        _, state = stream(block, module, case, sample, case.cuts)
        expected = block.final(block.params(module), case, sample)
    for found, wanted in zip(pytree.tree_leaves(state), expected, strict=True):
        if wanted is not None:
            assert_close(found, wanted)


def precision(block: Block, case: Case, dtype: torch.dtype) -> None:
    """Law 7: in half precision the output has the input's dtype and the error of a few roundings."""
    torch.manual_seed(case.seed)
    module = block.make(case, dtype, "cpu").eval()
    exact = block.make(case, torch.float64, "cpu").eval()
    exact.load_state_dict(module.state_dict())
    sample = block.draw(case, dtype)
    y = block.call(module, sample)
    wide = Sample(*(t.double() if t is not None and t.is_floating_point() else t for t in sample))
    assert y.dtype == dtype or not block.sequence
    assert_close(y, block.call(exact, wide), 8 * block.depth * torch.finfo(dtype).eps, floor=1.0)


def autocast(block: Block, case: Case, dtype: torch.dtype) -> None:
    """Law 7: under autocast too the output has the input's dtype and the error of a few roundings."""
    torch.manual_seed(case.seed)
    module, sample = block.make(case, torch.float32, "cpu").eval(), block.draw(case, torch.float32)
    y = block.call(module, sample)
    with torch.autocast("cpu", dtype):
        lower = block.call(module, sample)
        state = None if block.start is None or not case.causal else stream(block, module, case, sample, case.cuts)[1]
    assert lower.dtype == (dtype if block.logits else torch.float32)
    assert_close(lower, y, 8 * block.depth * torch.finfo(dtype).eps, floor=1.0)
    if block.name == "ema":
        assert_same(lower, y)
    parts = pytree.tree_leaves(state, is_leaf=lambda part: isinstance(part, EMAState | TruncatedEMAState))
    averages = [part[0] for part in parts if isinstance(part, EMAState | TruncatedEMAState)]
    assert bool(averages) == (state is not None and block.name != "cross_attention")
    assert all(average.dtype == torch.float32 for average in averages)


def seeds_reproduce(block: Block, case: Case) -> None:
    """Law 9: the seed decides the parameters, `reset_parameters` draws them likewise."""
    one, same, other = (block.build(case.but(seed=seed)).state_dict() for seed in (case.seed, case.seed, case.seed + 1))
    for name, tensor in one.items():
        assert_same(same[name], tensor)
        assert not tensor.is_floating_point() or not torch.equal(other[name], tensor)
    torch.manual_seed(case.seed)
    made = block.make(case, torch.float64, "cpu")
    reset = copy.deepcopy(made)
    with torch.no_grad():
        for tensor in [*reset.parameters(), *reset.buffers()]:
            tensor.fill_(7)
    reset_parameters(reset)
    for name, tensor in made.state_dict().items():
        found = reset.state_dict()[name]
        assert bool((found != 7).all()), name
        # What is not drawn at random is what it was.
        if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()) and tensor.numel() > 1:
            assert_same(found, tensor)


def reset_parameters(module: nn.Module) -> None:
    """Draws the parameters of every part anew, a part after those within it, whose draws it may replace."""
    for part in reversed(list(module.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert all(hasattr(part, "reset_parameters") for part in module.modules() if part._parameters or part._buffers)


def copies(block: Block, case: Case) -> None:
    """Law 9: `state_dict`, `copy.deepcopy`, `pickle` and the `meta` device."""
    module, sample = block.build(case).eval(), block.draw(case, torch.float64)
    y = block.call(module, sample)
    loaded = block.make(case, torch.float64, "cpu").eval()
    loaded.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    saved = block.make(case, torch.float64, "cpu").eval()
    saved.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    for twin in (loaded, saved, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(block.call(twin, sample), y)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))

    on_meta = block.make(case, torch.float64, "meta").eval()
    on_meta_sample = Sample(*(None if tensor is None else tensor.to("meta") for tensor in sample))
    shape = block.call(on_meta, on_meta_sample)
    assert (shape.shape, shape.device.type) == (y.shape, "meta")
    materialised = on_meta.to_empty(device="cpu")
    reset_parameters(materialised)
    # Weights that were shared still are.
    assert len(list(materialised.parameters())) == len(list(module.parameters()))
    materialised.load_state_dict(module.state_dict())
    assert_same(block.call(materialised, sample), y)


def states_travel(block: Block, case: Case) -> None:
    """Law 9: states survive `torch.save`, and `select_rows` picks, reorders and repeats their rows."""
    module, sample = block.build(case), block.draw(case, torch.float64)
    with torch.no_grad():
        state = block.start(module, case, sample)
        if case.at:
            _, state = block.call(module, piece(sample, 0, case.at), state)
        tail = piece(sample, case.at, case.length)
        y, final = block.call(module, tail, state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        assert type(loaded) is type(state)
        y_loaded, final_loaded = block.call(module, tail, detach(loaded))
        assert_same(y_loaded, y)
        assert_states_close(final_loaded, final)

        rows = torch.tensor([case.batch - 1, 0, case.batch - 1, case.batch // 2])
        picked = Sample(*(None if tensor is None else tensor[rows] for tensor in tail))
        y_rows, final_rows = block.call(module, picked, select_rows(state, rows))
        assert_close(y_rows, y[rows])
        assert_states_close(final_rows, select_rows(final, rows))


def compiled(block: Block, case: Case) -> None:
    """Law 9: `torch.compile(fullgraph=True)` gives the same outputs and gradients."""
    torch._dynamo.reset()
    module, sample = block.build(case, torch.float32).eval(), leaf(block.draw(case, torch.float32))

    def call(sample: Sample) -> Any:
        return block.call(module, sample)

    fast = torch.compile(call, fullgraph=True, backend="aot_eager")
    y, expected = fast(sample), block.call(module, sample)
    inputs = float_inputs(block, sample)
    # Graphs may order sums otherwise: a few dozen roundings of float32 in each layer.
    bound = 64 * block.depth * torch.finfo(torch.float32).eps
    assert_close(y, expected, bound)
    assert_gradients_close(gradients(y, module, *inputs), gradients(expected, module, *inputs), bound)


def compiled_stream(block: Block, case: Case) -> None:
    """Law 9: one graph serves every step of a stream whose state has a fixed shape."""
    torch._dynamo.reset()
    module, sample = block.build(case, torch.float32).eval(), block.draw(case, torch.float32)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(token: Sample, state: Any) -> Any:
        return block.call(module, token, state)

    fast = torch.compile(step, fullgraph=True, backend=count)
    with torch.no_grad():
        state = slow_state = block.start(module, case, sample)
        for start in range(case.length):
            token = piece(sample, start, start + 1)
            y, state = fast(token, state)
            expected, slow_state = block.call(module, token, slow_state)
            assert_close(y, expected, 64 * block.depth * torch.finfo(torch.float32).eps)
    assert len(graphs) == 1


LAWS = {
    law.__name__: law
    for law in (
        causal,
        any_cut,
        chunks_that_hold_everything,
        chunk_borders,
        padding_is_deletion,
        batch_statistics,
        pure,
        states_are_values,
        oracle,
        oracle_state,
        precision,
        autocast,
        seeds_reproduce,
        copies,
        states_travel,
        compiled,
        compiled_stream,
    )
}
