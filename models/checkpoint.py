"""A checkpoint: a `.pt` file, and the JSON beside it that says where it came from and what it is fed.

Both are written whole or not at all, and read without running any code, whatever may stand in them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data.files import sha256_of, write_files
from models.paths import json_of
from models.state_dict import load, plain_state_dict
from models.terminal import describe_input, one_a_channel


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network, what it is to be fed, and what `convert.py` wrote about it."""

    path: Path
    model: nn.Module
    sha256: str
    mean: list[float]  # a value a channel, in pixel units: the network is fed (pixel - mean) / std
    std: list[float]
    metadata: dict  # of the JSON file beside it; {} if there is none
    read_as: str  # what was done to read it; "" for a plain float32 state_dict

    @property
    def is_as_converted(self) -> bool:
        """Whether the file is the one that `convert.py` wrote with the JSON."""
        return self.metadata.get("sha256") == self.sha256

    @property
    def arguments(self) -> dict:
        """The network's size and BatchNorm's constants, as `ResNet8` takes them."""
        return {
            "num_classes": self.model.fc.out_features,
            "width": self.model.conv1.out_channels,
            "in_channels": self.model.conv1.in_channels,
            "bn_eps": self.model.bn1.eps,
            "bn_momentum": self.model.bn1.momentum,
        }

    @property
    def input_shape(self) -> list[int | None]:
        """The images' shape, [channels, height, width]; height and width may be None: any."""
        shape = self.metadata.get("input", {}).get("shape", [None, 32, 32])
        return [self.model.conv1.in_channels, *shape[1:]]

    @property
    def notes(self) -> list[str]:
        """What was done to read it, and what the JSON does not say and was assumed."""
        norm, fed = self.metadata.get("architecture", {}), self.metadata.get("input", {})
        assumed = []
        if "bn_eps" not in norm or "bn_momentum" not in norm:
            assumed.append(
                f"BatchNorm epsilon {self.model.bn1.eps:g} and momentum {self.model.bn1.momentum:g}"
            )
        if "shape" not in fed:
            assumed.append("32 x 32 images")
        if "mean" not in fed or "std" not in fed:
            assumed.append(describe_input(self.path.name, self.mean, self.std))
        read_as = [self.read_as] if self.read_as else []
        missing = f"{self.path.with_suffix('.json').name} does not say it; assumed: {', '.join(assumed)}"
        return read_as + ([missing] if assumed else [])

    def fed(self, mean: list[float] | None, std: list[float] | None) -> Checkpoint:
        """Return it with what is given (a value, or one a channel) in the place of what the JSON says."""
        channels = self.model.conv1.in_channels
        given = {
            name: one_a_channel(f"--{name}", values, channels)
            for name, values in (("mean", mean), ("std", std))
            if values
        }
        described = {**self.metadata.get("input", {}), **given}
        return replace(self, **given, metadata={**self.metadata, "input": described})

    @property
    def origin(self) -> str | None:
        """The SHA-256 of the file that it was converted from, if the JSON says it."""
        return self.metadata.get("source", {}).get("sha256")


def read_checkpoint(
    network: type[nn.Module],
    path: Path,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Return a `convert.py` checkpoint: a `network` (`ResNet8`) of the shape its tensors have, in eval mode.

    BatchNorm's epsilon and momentum and the input's scaling come from the JSON file beside it, or are the
    defaults where there is none. What training loops make of a state_dict is undone (`plain_state_dict`), and
    the weights are converted to `dtype`. Raises OSError when a file cannot be read, ValueError with one line
    when it is not such a network's state_dict or the JSON is not as `convert.py` writes it.
    """
    state, done = plain_state_dict(path, load(path, map_location))
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype}, expected a floating-point tensor; a quantized network is "
                "scored from Python: from evaluate import score"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are NaN or infinite")
        if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all():
            raise ValueError(f"{path}: {name} has values too large for {str(dtype).removeprefix('torch.')}")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{path}: {name} is negative ({tensor.min():g})")
    metadata = read_metadata(path)
    arguments = metadata.get("architecture", {})
    try:
        with torch.device("meta"):  # shapes without memory: a file can claim any width
            model = network(
                num_classes=state["fc.weight"].shape[0],
                width=state["conv1.weight"].shape[0],
                in_channels=state["conv1.weight"].shape[1],
                bn_eps=arguments.get("bn_eps", 1e-3),
                bn_momentum=arguments.get("bn_momentum", 0.01),
            )
        model.load_state_dict(state, assign=True)
    except KeyError as error:
        inner = [name for name in state if name.endswith(f".{error.args[0]}")]
        hint = f" ({inner[0]} is one of a larger model's: save its ResNet8 alone)" if inner else ""
        raise ValueError(f"{path}: no tensor {error}: not a ResNet8's state_dict{hint}") from None
    except (RuntimeError, IndexError, ValueError) as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        raise ValueError(f"{path}: not a ResNet8's state_dict: {reasons}") from None
    stored = {
        str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()
    }
    wanted = str(dtype).removeprefix("torch.")
    if stored != {wanted} and stored != {"float32"}:
        done.append(f"{', '.join(sorted(stored))} weights as {wanted}")
    model = model.to(map_location, dtype).eval()

    channels, scaling = model.conv1.in_channels, metadata.get("input", {})
    mean, std = scaling.get("mean", [0.0] * channels), scaling.get("std", [1.0] * channels)
    theirs = metadata.get("source", {}).get("input", {})
    lists = {"input.mean": mean, "input.std": std}
    lists |= {f"source.input.{name}": theirs[name] for name in ("mean", "std") if name in theirs}
    for name, values in lists.items():
        if len(values) != channels:
            described_in = path.with_suffix(".json")
            raise ValueError(f"{described_in}: {name} has {len(values)} values, expected {channels}")
    read_as = f"{path.name} is read as a state_dict: {', '.join(done)}" if done else ""
    return Checkpoint(path, model, sha256_of(path), mean, std, metadata, read_as)


def write_checkpoint(path: Path, model: nn.Module, metadata: dict) -> dict:
    """Write a network's state_dict to `path`, and beside it `metadata` with its SHA-256; return the latter.

    Raises OSError; then neither file is touched.
    """
    content = _saved(model)
    metadata = {**metadata, "sha256": hashlib.sha256(content).hexdigest()}
    write_with_json(path, content, metadata)
    return metadata


def write_with_json(path: Path, content: bytes, metadata: dict) -> None:
    """Write a file, and beside it the JSON that describes it. Raises OSError; then neither is touched."""
    description = json.dumps(metadata, indent=2) + "\n"
    write_files(
        {
            path: lambda target: target.write(content),
            json_of(path): lambda target: target.write(description.encode()),
        }
    )


def _saved(model: nn.Module) -> bytes:
    """Return what `torch.save` writes of a network's state_dict."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.getvalue()


def _is_number(value: object) -> bool:  # of a size that can be computed with; NaN is none
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


_IS = {
    "an object": lambda value: isinstance(value, dict),
    "a string": lambda value: isinstance(value, str),
    "a number from 0 to 1": lambda value: _is_number(value) and 0 <= value <= 1,
    "a list of numbers": _is_numbers,
    "a list of numbers, none of them 0": lambda value: _is_numbers(value) and all(value),
    "[channels, height, width]": lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and all(size is None or (type(size) is int and 0 < size <= 1024) for size in value)
    ),
}
# What is read again of the JSON file that `convert.py` writes, an object before what is in it.
_METADATA = {
    "architecture": "an object",
    "architecture.bn_eps": "a number from 0 to 1",
    "architecture.bn_momentum": "a number from 0 to 1",
    "source": "an object",
    "source.file": "a string",
    "source.sha256": "a string",
    "source.input": "an object",
    "source.input.mean": "a list of numbers",
    "source.input.std": "a list of numbers, none of them 0",
    "input": "an object",
    "input.shape": "[channels, height, width]",
    "input.mean": "a list of numbers",
    "input.std": "a list of numbers, none of them 0",
    "sha256": "a string",
}


def save_checkpoint(model: nn.Module, path: str | Path, like: str | Path) -> None:
    """Save a network that was made from the checkpoint `like` (fine-tuned, pruned), with a JSON of its own.

    The JSON says what `like`'s says and still holds: BatchNorm's constants, the input, and the Keras file to
    compare with. It has no SHA-256 and no verification, since `convert.py` did not write it. Raises OSError.
    """
    path, like = Path(path), Path(like)
    kept = {key: value for key, value in read_metadata(like).items() if key not in ("sha256", "verification")}
    if "file" in kept.get("source", {}):  # which is relative to the JSON
        source = os.path.relpath(like.parent / kept["source"]["file"], path.parent)
        kept["source"] = {**kept["source"], "file": source}
    write_with_json(path, _saved(model), kept)


def written_metadata(path: Path, sha256: str) -> dict:
    """Return the JSON beside a file of this SHA-256 that `convert.py` wrote; {} for any other file."""
    with suppress(ValueError, OSError):
        metadata = read_metadata(path)
        return metadata if metadata.get("sha256") == sha256 else {}
    return {}


def read_metadata(described: Path) -> dict:
    """Return the content of the JSON file that `convert.py` writes beside a file; {} if there is none.

    Raises ValueError with one line when it is not JSON as `convert.py` writes it.
    """
    path = json_of(described)
    if not path.exists():
        return {}
    try:
        metadata = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: holds a JSON {type(metadata).__name__}, expected an object")
    for name, expected in _METADATA.items():
        *parents, key = name.split(".")
        group = metadata
        for parent in parents:
            group = group.get(parent, {})
        if key in group and not _IS[expected](group[key]):
            raise ValueError(f"{path}: {name} is {json.dumps(group[key])[:60]}, expected {expected}")
        if key in group and expected.startswith("a list of numbers"):
            group[key] = [float(value) for value in group[key]]
    return metadata
