"""Search for a network's state_dict in the content of a PyTorch file: dicts of any depth, with prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SAVE = "torch.save(model.state_dict(), ...) writes one"
MAX_DEPTH = 3  # of dicts in dicts
INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
COUNTER = "num_batches_tracked"  # of a BatchNorm; not needed for inference


def find_state_dict(
    path: Path, content: object, template: dict[str, Tensor], key: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the one state_dict in a file's content that fits `template`, and the steps taken to get it.

    `key` selects one of several. Raises ValueError with one line if there is none.
    """
    found = list(candidates(content, template))
    if not found:
        items = content.items() if isinstance(content, dict) else ()
        others = [f"{name!r} is a {type(x).__name__}" for name, x in items if not isinstance(x, Tensor)]
        reason = others[0] if others else f"holds a {type(content).__name__}"
        raise ValueError(f"{path}: {reason}; expected a state_dict (tensors by name): {SAVE}")
    fitting = [each for each in found if not each.missing and not each.unexpected]
    if not fitting:
        closest = max(found, key=lambda each: (len(each.state), len(each.unexpected)))
        names = {"missing": closest.missing, "unexpected": closest.unexpected}
        differences = [f"{', '.join(each[:2])} {kind}" for kind, each in names.items() if each]
        size = f"{repr(closest.place) if closest.place else 'the file'} has {closest.size} tensors"
        raise ValueError(f"{path}: {size}, but not a ResNet8's: {'; '.join(differences)}")
    choice = ", ".join(repr(each.place) for each in fitting)
    chosen = [each for each in fitting if key is None or f".{each.place}".endswith(f".{key}")]
    if len({tuple(map(id, each.state.values())) for each in chosen}) > 1:
        raise ValueError(f"{path}: holds several state_dicts: {choice}; select one with --key")
    if not chosen and (len(fitting) > 1 or key in content):
        raise ValueError(f"{path}: --key {key}: no ResNet8 under this key; found: {choice}")
    return (chosen or fitting)[0].state, (chosen or fitting)[0].steps


class Candidate(NamedTuple):
    """A dict of tensors that may be a network's state_dict."""

    place: str  # such as "net.ema"; "" for the file itself
    size: int  # number of tensors in the dict
    state: dict[str, Tensor]  # the network's tensors, by their names in the network
    missing: list[str]
    unexpected: list[str]
    steps: list[str]  # taken to get `state`


def candidates(content: object, template: dict[str, Tensor]) -> Iterator[Candidate]:
    """Yield the candidates in nested dicts: one for each prefix before the name `fc.weight`.

    Beside a whole network, integers (metrics) are ignored. `n_averaged` is a counter of AveragedModel.
    """
    known = {f"{name}{suffix}" for name in template for suffix in ("", "_orig", "_mask")}
    for keys, tensors in state_dicts(content):
        heads = [re.fullmatch(r"(|.*\.)fc\.weight(_orig)?", name) for name in tensors]
        states = {head[1]: {} for head in heads if head} or {"": {}}
        for prefix, state in states.items():
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            state.update({name: tensor for name, tensor in own.items() if name in known})
        missing = {prefix: missing_names(state, template) for prefix, state in states.items()}
        used = {f"{prefix}{name}" for prefix, state in states.items() for name in state}
        rest = [name for name in tensors if name not in used and not name.endswith("n_averaged")]
        ignored = [name for name in rest if tensors[name].dtype in INTEGERS and not all(missing.values())]
        unexpected = [name for name in rest if name not in ignored]
        for prefix, state in states.items():
            steps = [f"under '{each}'" for each in keys] + ([f"without '{prefix}'"] if prefix else [])
            steps += [f"{len(ignored)} integer tensors ignored: {ignored[0]} ..."] if ignored else []
            place = ".".join([*keys, prefix.rstrip(".")] if len(states) > 1 else keys)
            yield Candidate(place, len(tensors), state, missing[prefix], unexpected, steps)


def state_dicts(content: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Yield the dicts of tensors by name in nested dicts, each with the keys that lead to it."""
    if not isinstance(content, dict):
        return
    if content and all(isinstance(name, str) and isinstance(content[name], Tensor) for name in content):
        yield keys, content
    elif len(keys) < MAX_DEPTH:
        for key, value in content.items():
            yield from state_dicts(value, (*keys, str(key)))


def convolution_biases(template: dict[str, Tensor]) -> list[str]:
    """Return the names of the convolutions' biases, which most PyTorch networks do not have."""
    weights = [name for name, tensor in template.items() if tensor.ndim == 4]
    return [f"{name.removesuffix('weight')}bias" for name in weights]


def missing_names(state: dict[str, Tensor], template: dict[str, Tensor]) -> list[str]:
    """Return the names that a state_dict lacks; counters, convolution biases and pruned weights may be."""
    optional = convolution_biases(template)
    required = [name for name in template if not name.endswith(COUNTER) and name not in optional]
    return [name for name in required if name not in state and f"{name}_orig" not in state]


def add_biases(state: dict[str, Tensor], template: dict[str, Tensor]) -> list[str]:
    """Add zeros for missing convolution biases, in place; return the step taken."""
    missing = [name for name in convolution_biases(template) if name not in state]
    for name in missing:
        state[name] = torch.zeros(state[f"{name.removesuffix('bias')}weight"].shape[:1])
    return [f"zeros for {len(missing)} convolution biases that it lacks"] if missing else []


def apply_masks(path: Path, state: dict[str, Tensor]) -> list[str]:
    """Multiply weights pruned by `torch.nn.utils.prune` by their masks, in place; return the step taken."""
    pruned = [name.removesuffix("_mask") for name in state if name.endswith("_mask")]
    for name in pruned:
        weight, mask = state.pop(f"{name}_orig", None), state.pop(f"{name}_mask")
        if weight is None or weight.shape != mask.shape:
            raise ValueError(f"{path}: {name}_mask has no {name}_orig of its shape")
        state[name] = weight * mask
    return ["pruned weights multiplied by their masks"] if pruned else []
