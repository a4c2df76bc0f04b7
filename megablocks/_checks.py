"""Argument checks: the one place that words an error.

Every message says the rule, the value that broke it and the remedy. Checks of shapes and types always run. Checks
that must read a tensor's values (token ids, capacities) run in eager mode on the CPU only, where reading is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def check_size(name: str, value: object, *, minimum: int = 1) -> int:
    """Returns `value` if it is a whole number of at least `minimum`."""
    if isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be an int, but is a tensor of shape {tuple(value.shape)}.")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, but is {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, but is {value}.")
    return value


def check_optional_size(name: str, value: object, off: str) -> int | None:
    """Returns `value` if it is `None` or a whole number of at least 1; `off` says what `None` means."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError(f"`{name}` must be at least 1, but is {value}; use `None` for {off}.")
    return check_size(name, value)


def check_probability(name: str, value: object) -> float:
    """Returns `value` as a float if it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number in [0, 1), but is {value!r} ({type(value).__name__}).")
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), but is {value}.")
    return float(value)


def check_number(name: str, value: object, *, minimum: float | None = None, hint: str = "") -> float:
    """Returns `value` as a float if it is a finite number, of at least `minimum` where one is given."""
    rule = "a finite number" if minimum is None else f"a finite number of at least {minimum}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be {rule}, but is {value!r} ({type(value).__name__}){hint}.")
    if not math.isfinite(value) or (minimum is not None and value < minimum):
        raise ValueError(f"`{name}` must be {rule}, but is {value}{hint}.")
    return float(value)


def check_optional_share(name: str, value: object, off: str) -> float | None:
    """Returns `value` if it is `None` or a number in (0, 1]; `off` says what `None` means."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number in (0, 1], but is {value!r} ({type(value).__name__}).")
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], but is {value}; use `None` for {off}.")
    return float(value)


def check_flag(name: str, value: object) -> bool:
    """Returns `value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, but is {value!r}.")
    return value


def check_trace(value: object) -> None:
    """Raises unless a stack knows what it is asked to show."""
    if not (isinstance(value, bool) or value == "hidden_states"):
        raise ValueError(f'`trace` must be True, False or "hidden_states", but is {value!r}.')


def check_even(name: str, value: int, what: str) -> None:
    """Raises unless `value` is even."""
    if value % 2:
        raise ValueError(f"`{name}` must be even for {what}, but is {value}.")


def refuse_class(name: str, value: object) -> None:
    """Raises if a class is given for an instance: called with a tensor, it would make an object of it."""
    if isinstance(value, type):
        raise TypeError(
            f"`{name}` must be an instance, but is the class {value.__name__}; pass one, as in "
            f"{name}={value.__name__}(...)."
        )


def lookup(name: str, key: object, table: Mapping[str, T], *, others: str = "") -> T:
    """Returns `table[key]`; an unknown key is answered with the known ones and with what else is accepted."""
    if isinstance(key, str) and key in table:
        return table[key]
    refuse_class(name, key)
    known = ", ".join(repr(known) for known in table)
    raise ValueError(f"`{name}` must be one of {known}{others}, but is {key!r}.")


def check_tensor(name: str, x: object, dims: int | None = None) -> None:
    """Raises unless `x` is a tensor, with `dims` dimensions where given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor, but is {type(x).__name__}; make it one by `torch.as_tensor`.")
    if dims is not None and x.dim() != dims:
        shape = "(batch, length)" if dims == 2 else f"{dims} dimensions"
        raise ValueError(f"`{name}` must have shape {shape}, but has shape {tuple(x.shape)}.")


def check_input(name: str, x: object, width: int | None) -> None:
    """Raises unless `x` is a floating-point tensor of shape `(B, L, width)` with `L >= 1`; `None` allows any width."""
    shape = f"(batch, length, {'width' if width is None else width})"
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` must be a tensor of shape {shape}, but is {type(x).__name__}.")
    if x.dim() != 3 or (width is not None and x.shape[-1] != width):
        raise ValueError(
            f"`{name}` must have shape {shape}, but has shape {tuple(x.shape)}; "
            "inputs are batch-first, with the features last."
        )
    if x.shape[1] == 0:
        raise ValueError(f"`{name}` must hold at least one position, but has shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype, but is {x.dtype}; convert it, e.g. by `.float()`.")


def check_features(name: str, x: Tensor, width: int | None) -> None:
    """Raises unless `x` is a floating-point tensor of shape `(..., width)`; `None` allows any width."""
    if width is not None and (x.dim() == 0 or x.shape[-1] != width):
        raise ValueError(f"`{name}` must have shape (..., {width}), but has shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype, but is {x.dtype}; convert it, e.g. by `.float()`.")


def check_padding_mask(name: str, mask: object, shape: tuple[int, int]) -> None:
    """Raises unless `mask` is `None` or a bool tensor of the given `(batch, length)`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        if isinstance(mask, Tensor):
            kind, remedy = str(mask.dtype), f"from a mask with 1 at real tokens, pass `{name}=mask == 0`"
        else:
            kind, remedy = type(mask).__name__, "make it one by `torch.as_tensor(mask)`"
        raise TypeError(
            f"`{name}` must be a bool tensor, True at padding and False at real tokens, but is {kind}; {remedy}."
        )
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"`{name}` must have shape (batch, length) = {shape}, but has shape {tuple(mask.shape)}; "
            "it covers the tokens of this call only."
        )


def check_batch(name: str, found: int, expected: int) -> None:
    """Raises unless the batch size of a state, or of a second input, is that of the input."""
    if found != expected:
        state = name == "state"
        remedy = f"use `init_state({expected})` or `megablocks.state.select_rows`" if state else "give each row one"
        raise ValueError(
            f"`{name}` must have the batch size of the input, {expected}, but {'was made for' if state else 'has'} "
            f"{found}; {remedy}."
        )


def check_state(state: object, kinds: type | tuple[type, ...], owner: str) -> None:
    """Raises unless `state` is one of the state types that `owner` makes."""
    if not isinstance(state, kinds):
        expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise TypeError(
            f"`state` of {owner} must be {expected}, but is {type(state).__name__}; "
            "pass what this layer's `init_state` or its last call returned."
        )


def check_rows(rows: object) -> None:
    """Raises unless `rows` are row numbers of a batch, (B',)."""
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32) or rows.dim() != 1:
        kind = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(
            f"`rows` must be an int64 tensor of row numbers, of one axis, but is {kind}; make one by "
            "`torch.tensor([0, 2])`, or of a mask of rows to keep by `mask.nonzero().squeeze(1)`."
        )


def check_state_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raises unless a state's tensor has the shape, without the batch, that this layer makes."""
    if tuple(tensor.shape[1:]) != expected:
        raise ValueError(
            f"`{name}` must have shape {('batch', *expected)}, but has shape {tuple(tensor.shape)}; "
            "the state was made by another layer."
        )


def transforming() -> bool:
    """Whether a transform of `torch.func` is at work, as far as torch can tell."""
    return bool(getattr(torch._C, "_are_functorch_transforms_active", bool)())


def values_readable(*tensors: Tensor) -> bool:
    """Whether checks of values may read these tensors: eager mode, on the CPU."""
    if torch.compiler.is_compiling() or transforming():
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)


def check_token_ids(name: str, ids: object, size: int, padding_mask: Tensor | None = None) -> None:
    """Raises unless `ids` is an integer tensor `(B, L)` and the mask, if any, fits it.

    In eager mode on the CPU also unless all real tokens lie in [0, size); what stands at padding is inert.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"`{name}` must be an int64 or int32 tensor of token ids, but is {kind}.")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"`{name}` must have shape (batch, length) with length >= 1, but has shape {tuple(ids.shape)}; "
            f"a single sequence needs `{name}[None]`."
        )
    check_padding_mask("padding_mask", padding_mask, (ids.shape[0], ids.shape[1]))
    if values_readable(ids) and ids.numel():
        real = ids if padding_mask is None else ids.masked_fill(padding_mask, 0)
        low, high = (int(bound) for bound in real.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"`{name}` must be in [0, {size}), the vocabulary, but holds {low if low < 0 else high}; "
                "mark padding with `padding_mask`, not with an id outside the vocabulary."
            )


def check_targets(name: str, targets: object, shape: tuple[int, ...], size: int) -> None:
    """Raises unless `targets` is an integer tensor of this shape; readable values must lie in [0, size)."""
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"`{name}` must be an int64 or int32 tensor of token ids, but is {kind}.")
    if tuple(targets.shape) != shape:
        raise ValueError(
            f"`{name}` must hold one token for each position, shape {shape}, but has shape {tuple(targets.shape)}."
        )
    if values_readable(targets) and targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"`{name}` must be in [0, {size}), the vocabulary, but holds {low if low < 0 else high}; "
                "leave positions without a target out."
            )


def check_cutoffs(name: str, cutoffs: object, vocab_size: int) -> tuple[int, ...]:
    """Returns `cutoffs` as a tuple if they are whole numbers that rise within the vocabulary."""
    if not isinstance(cutoffs, Sequence) or isinstance(cutoffs, str) or not len(cutoffs):
        raise TypeError(f"`{name}` must be a list of at least one token id, but is {cutoffs!r}.")
    checked = tuple(check_size(f"{name}[{index}]", cutoff) for index, cutoff in enumerate(cutoffs))
    if any(cutoff >= following for cutoff, following in pairwise((*checked, vocab_size))):
        raise ValueError(
            f"`{name}` must rise and stay below the vocabulary of {vocab_size} tokens, but are {list(checked)}; "
            "leave out those that cut nothing off."
        )
    return checked


def check_optional_token(name: str, token: object, size: int) -> int | None:
    """Returns `token` if it is `None` or the id of a token."""
    if token is None:
        return None
    if isinstance(token, bool) or not isinstance(token, int):
        raise TypeError(f"`{name}` must be a token id, an int, but is {token!r} ({type(token).__name__}).")
    if not 0 <= token < size:
        raise ValueError(f"`{name}` must be in [0, {size}), the vocabulary, but is {token}; use `None` for none.")
    return token


def check_prompt(prompt: Tensor, padding_mask: Tensor | None, size: int) -> None:
    """Raises unless `prompt` is `(B, L)` token ids with, as far as values are readable, a real one in every row."""
    check_token_ids("prompt", prompt, size, padding_mask)
    if padding_mask is not None and values_readable(padding_mask):
        empty = padding_mask.all(1).nonzero()
        if len(empty):
            raise ValueError(
                f"`prompt` must hold a real token in every row, but row {int(empty[0])} is all padding; "
                "begin it with a start token."
            )


def check_generator(name: str, generator: object) -> None:
    """Raises unless `generator` is `None`, a generator, or a sequence of them."""
    each = generator if isinstance(generator, Sequence) else (generator,)
    for one in each:
        if generator is not None and not isinstance(one, torch.Generator):
            raise TypeError(
                f"`{name}` must be a torch.Generator or a sequence of one for each row, but "
                f"{'holds' if isinstance(generator, Sequence) else 'is'} {one!r} ({type(one).__name__}); "
                "make one by `torch.Generator().manual_seed(seed)`."
            )


def check_generates(model: object) -> None:
    """Raises unless `model` has what generation needs: logits over a vocabulary, and a state."""
    missing = next((name for name in ("vocab_size", "init_state") if not hasattr(model, name)), None)
    if not isinstance(model, nn.Module) or missing:
        what = f", which has no `{missing}`" if missing else ""
        raise TypeError(
            "`model` must be a MegaLanguageModel, a MegaSeq2Seq or a module called like one, "
            f"but is {type(model).__name__}{what}."
        )


def check_positions(name: str, positions: object) -> None:
    """Raises unless `positions` is a number of positions, at least 1, or a tensor of integers."""
    if isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise TypeError(f"`{name}` must hold integer positions, but is {positions.dtype}; convert it by `.long()`.")
    elif isinstance(positions, bool) or not isinstance(positions, int):
        raise TypeError(
            f"`{name}` must be a number of positions or an integer tensor of them, but is {positions!r} "
            f"({type(positions).__name__})."
        )
    else:
        check_size(name, positions)


def check_table(length: int, max_positions: int) -> None:
    """Raises if `length` positions do not fit a simple bias table."""
    if length > max_positions:
        raise ValueError(
            f"A simple relative bias with `max_positions={max_positions}` cannot serve {length} positions (padding "
            "included); make a larger table, set a smaller `chunk_size`, or use a rotary bias, which has no limit."
        )


def check_kept_shape(name: str, made: Tensor, expected: tuple[int, ...]) -> Tensor:
    """Returns what a part of the user's gave if it has the shape that it should leave as it is."""
    if tuple(made.shape) != expected:
        raise ValueError(
            f"`{name}` must return shape {expected}, but returned shape {tuple(made.shape)}; nothing is broadcast here."
        )
    return made


def check_module(name: str, module: object, like: str) -> None:
    """Raises unless `module` is a module; `like` says what is meant."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"`{name}` must be {like}, or a module called like one, but is {_kind(module)}.")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_one_width(parts: Mapping[str, object]) -> None:
    """Raises if parts say that they are made for other widths than the first part that has one; `None` is no part."""
    widths = (getattr(part, "embed_dim", None) for part in parts.values())
    width = next((width for width in widths if isinstance(width, int)), None)
    if width is not None:
        for name, part in parts.items():
            check_width(name, part, width)


def check_width(name: str, module: object, embed_dim: int) -> None:
    """Raises if a part says that it is made for another width than what it is part of."""
    width = getattr(module, "embed_dim", embed_dim)
    if width != embed_dim:
        raise ValueError(
            f"`{name}` must have the width of what it is part of, {embed_dim}, but is a {type(module).__name__} of "
            f"width {width}; make both of one width."
        )


def check_streaming_part(name: str, module: object, like: str) -> None:
    """Raises unless `module` is a module with an `init_state`."""
    check_module(name, module, like)
    if not hasattr(module, "init_state"):
        raise TypeError(
            f"`{name}` must be {like}, or a module called like one with an `init_state`, but is a "
            f"{type(module).__name__}, which has none."
        )


def check_modules(name: str, modules: object) -> list[nn.Module]:
    """Returns the modules as a list, at least one and nothing else."""
    if not isinstance(modules, Iterable) or isinstance(modules, str):
        raise TypeError(
            f"`{name}` must be a list of modules, but is {type(modules).__name__}; a single one goes in a list, "
            f"`[{name.removesuffix('s')}]`."
        )
    listed = list(modules)
    for index, module in enumerate(listed):
        if not isinstance(module, nn.Module):
            raise TypeError(f"`{name}[{index}]` must be a torch.nn.Module, but is {_kind(module)}.")
    if not listed:
        raise ValueError(f"`{name}` must hold at least one layer, but is empty.")
    return listed
