"""A checkpoint: a `.pt` file, and the JSON beside it that says where it came from and what it is fed.

Both are written whole or not at all, and read without running any code, whatever may stand in them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from data.files import sha256_of, write_files
from models.tensors import one_a_channel
from models.terminal import describe_input


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network, what it is to be fed, and what `convert.py` wrote about it."""

    path: Path
    model: nn.Module
    sha256: str
    mean: list[float]  # a value a channel, in pixel units: the network is fed (pixel - mean) / std
    std: list[float]
    metadata: dict  # of the JSON file beside it; {} if there is none

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
        """What the JSON does not say, and was assumed."""
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
        missing = f"{self.path.with_suffix('.json').name} does not say it; assumed: {', '.join(assumed)}"
        return [missing] if assumed else []

    def fed(self, mean: list[float] | None, std: list[float] | None) -> Checkpoint:
        """Return it with what is given (a value, or one a channel) in the place of what the JSON says."""
        channels = self.model.conv1.in_channels
        return replace(
            self,
            mean=one_a_channel("--mean", mean, channels) if mean else self.mean,
            std=one_a_channel("--std", std, channels) if std else self.std,
        )

    @property
    def origin(self) -> str | None:
        """The SHA-256 of the file that it was converted from, if the JSON says it."""
        return self.metadata.get("source", {}).get("sha256")


def read_checkpoint(
    network: type[nn.Module], path: Path, map_location: str | torch.device = "cpu"
) -> Checkpoint:
    """Return a `convert.py` checkpoint: a `network` (`ResNet8`) of the shape its tensors have, in eval mode.

    BatchNorm's epsilon and momentum and the input's scaling come from the JSON file beside it, or are the
    defaults where there is none. Raises OSError when a file cannot be read, ValueError with one line when it
    is not such a network's state_dict or the JSON is not as `convert.py` writes it.
    """
    state = load_state_dict(path, map_location)
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected a floating-point tensor")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are NaN or infinite")
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
        raise ValueError(f"{path}: no tensor {error}: not a ResNet8's state_dict") from None
    except (RuntimeError, IndexError, ValueError) as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines()[1:3]) or str(error)
        raise ValueError(f"{path}: not a ResNet8's state_dict: {reasons}") from None
    model = model.to(map_location, torch.float32).eval()

    channels, scaling = model.conv1.in_channels, metadata.get("input", {})
    mean, std = scaling.get("mean", [0.0] * channels), scaling.get("std", [1.0] * channels)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            described_in = path.with_suffix(".json")
            raise ValueError(f"{described_in}: input.{name} has {len(values)} values, expected {channels}")
    return Checkpoint(path, model, sha256_of(path), mean, std, metadata)


def write_checkpoint(path: Path, model: nn.Module, metadata: dict) -> dict:
    """Write a network's state_dict to `path`, and beside it `metadata` with its SHA-256; return the latter.

    Raises OSError; then neither file is touched.
    """
    checkpoint = io.BytesIO()
    torch.save(model.state_dict(), checkpoint)
    metadata = {**metadata, "sha256": hashlib.sha256(checkpoint.getvalue()).hexdigest()}
    content = json.dumps(metadata, indent=2) + "\n"
    write_files(
        {
            path: lambda target: target.write(checkpoint.getvalue()),
            path.with_suffix(".json"): lambda target: target.write(content.encode()),
        }
    )
    return metadata


def load_state_dict(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a `.pt` file, by name.

    No code in the file is run (`weights_only=True`). Raises OSError when it cannot be read, ValueError with
    one line when it is damaged, or holds anything but tensors.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a plain state_dict (it holds code or objects, which are not loaded)"
        ) from None
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise ValueError(f"{path}: damaged or not a PyTorch file ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a state_dict (tensors by name)")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{name!r} is a {type(value).__name__}"
            raise ValueError(f"{path}: {what}, expected a state_dict (tensors by name)")
        dense = value.layout == torch.strided and not value.is_quantized
        if not dense or value.untyped_storage().nbytes() < value.nbytes:  # as an expanded tensor's is
            raise ValueError(f"{path}: {name} has not the {value.numel():,} values that its shape says")
    return state


def check_archive(path: Path) -> None:
    """Raise ValueError for a file that is empty, of another kind than `torch.save` writes, or would grow.

    `torch.save` stores records as they are. A compressed one can unpack to any size, so it is refused by the
    archive's own table, before anything is unpacked.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError(f"{path}: is empty, so damaged")
    if start != b"PK\x03\x04":
        return
    try:
        records = zipfile.ZipFile(path).infolist()
    except Exception as error:  # whatever the damage leads to
        raise ValueError(f"{path}: damaged or not a PyTorch file ({type(error).__name__})") from None
    names = [record.filename.partition("/")[2] for record in records]
    if "constants.pkl" in names:
        what, instead = "a TorchScript archive", "torch.jit.load(...)"
    elif "models/model.json" in names or "serialized_exported_program.json" in names:
        what, instead = "a torch.export archive", "torch.export.load(...)"
    elif any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path}: holds compressed records; torch.save writes none")
    elif sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError(f"{path}: damaged: its records are larger than the file")
    else:
        return
    raise ValueError(f"{path}: {what}, which holds code; save {instead}.state_dict() with torch.save")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


_IS = {
    "an object": lambda value: isinstance(value, dict),
    "a string": lambda value: isinstance(value, str),
    "a number from 0 to 1": lambda value: _is_number(value) and 0 <= value <= 1,
    "a list of numbers": _is_numbers,
    "a list of numbers, none of them 0": lambda value: _is_numbers(value) and all(value),
    "[channels, height, width]": lambda value: isinstance(value, list) and len(value) == 3,
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


def read_metadata(checkpoint: Path) -> dict:
    """Return the content of the JSON file that `convert.py` writes beside `checkpoint`; {} if there is none.

    Raises ValueError with one line when it is not JSON as `convert.py` writes it.
    """
    path = checkpoint.with_suffix(".json")
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
    return metadata
