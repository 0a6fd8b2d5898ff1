"""A checkpoint: a `.pt` file, and the JSON beside it that says where it came from and what it is fed.

Both are written whole or not at all, and read without running any code, whatever may stand in them.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data.files import sha256_of
from models.files.metadata import check_owner, read_metadata, write_with_json
from models.files.state_dict import read_network
from models.resnet8 import ResNet8
from models.scaling import Scaling


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network, what it is to be fed, and what `convert.py` wrote about it."""

    path: Path
    model: ResNet8  # or, of another format, `evaluation/runtimes.py`'s Runtime
    sha256: str
    scaling: Scaling
    metadata: dict  # of the JSON file beside it; {} if there is none
    read_as: str  # what was done to read it; "" for a plain float32 state_dict

    @property
    def is_as_converted(self) -> bool:
        """Whether the file is the one that `convert.py` wrote with the JSON."""
        return self.metadata.get("sha256") == self.sha256

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
            assumed.append(self.scaling.says(self.path.name))
        read_as = [self.read_as] if self.read_as else []
        described_in = self.path.with_suffix(".json")
        lacks = "does not say it" if described_in.exists() else "is not there"
        missing = f"{described_in.name} {lacks}; assumed: {', '.join(assumed)}"
        return read_as + ([missing] if assumed else [])

    @property
    def bn_eps(self) -> float:
        """BatchNorm's epsilon, as `read_checkpoint` takes it from the JSON."""
        return self.metadata.get("architecture", {}).get("bn_eps", 1e-3)

    def fed(self, mean: list[float] | None, std: list[float] | None) -> Checkpoint:
        """Return it with what is given (a value, or one a channel) in the place of what the JSON says."""
        given = {name: values for name, values in (("mean", mean), ("std", std)) if values}
        scaling = self.scaling.overruled(mean, std)
        described = {**self.metadata.get("input", {}), **given}
        return replace(self, scaling=scaling, metadata={**self.metadata, "input": described})

    @property
    def keras_scaling(self) -> Scaling:
        """What the Keras model is fed: something else where the scaling is a layer of it."""
        return self.scaling.updated(self.metadata.get("source", {}).get("input", {}))

    @property
    def origin(self) -> str | None:
        """The SHA-256 of the file that it was converted from, if the JSON says it."""
        return self.metadata.get("source", {}).get("sha256")


def read_checkpoint(path: Path, dtype: torch.dtype = torch.float32, key: str | None = None) -> Checkpoint:
    """Return a `convert.py` checkpoint: the network, in eval mode, and what the JSON beside it says.

    `key` names one of several state_dicts in the file. Raises OSError and ValueError as `read_network` does.
    """
    model, metadata, read_as = read_network(ResNet8, path, dtype, key)
    return Checkpoint(path, model, sha256_of(path), model.scaling, metadata, read_as)


def architecture_of(model: ResNet8) -> dict:
    """Return what the JSON says of the network: what `ResNet8` is called with to make another like it."""
    return {
        "num_classes": model.fc.out_features,
        "width": model.conv1.out_channels,
        "in_channels": model.conv1.in_channels,
        "bn_eps": model.bn1.eps,
        "bn_momentum": model.bn1.momentum,
    }


def write_checkpoint(path: Path, model: nn.Module, metadata: dict) -> dict:
    """Write a network's state_dict to `path`, and beside it `metadata` with its SHA-256; return the latter.

    Raises OSError; then neither file is touched.
    """
    content = _saved(model)
    metadata = {**metadata, "sha256": hashlib.sha256(content).hexdigest()}
    write_with_json(path, content, metadata)
    return metadata


def _saved(model: nn.Module) -> bytes:
    """Return what `torch.save` writes of a network's state_dict."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.getvalue()


def save_checkpoint(model: nn.Module, path: str | Path, like: str | Path) -> None:
    """Save a network that was made from the checkpoint `like` (fine-tuned, pruned), with a JSON of its own.

    The JSON says what `like`'s says and still holds: the input, and the Keras file to compare with; sizes and
    BatchNorm's constants are the network's own. It has no SHA-256 and no verification, since `convert.py` did
    not write it. Raises OSError, ValueError when `like`'s JSON is not as `convert.py` writes it, or when the
    network's BatchNorms are folded, which nothing here would read again, and OutputExistsError where the JSON
    of `path` is that of another file, as of `x.pt` for `x.pth`.
    """
    path, like = Path(path), Path(like)
    network = getattr(model, "module", model)  # of a DataParallel, of an AveragedModel
    if not isinstance(network.bn1, nn.BatchNorm2d):
        raise ValueError(f"{path}: the network's BatchNorms are gone (folded?): save the one before")
    check_owner(path)
    kept = {key: value for key, value in read_metadata(like).items() if key not in ("sha256", "verification")}
    kept["architecture"] = architecture_of(network)
    if "file" in kept.get("source", {}):  # which is relative to the JSON
        source = os.path.relpath(like.parent / kept["source"]["file"], path.parent)
        kept["source"] = {**kept["source"], "file": source}
    write_with_json(path, _saved(model), kept)
