"""PyTorch checkpoints: a state_dict (`.pt`, `.safetensors`) and the JSON beside it.

Files are read without running code from them, and written completely or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.common.cli import one_line
from models.common.files import (
    Format,
    check_metadata,
    check_package,
    detect_format,
    json_path,
    read_metadata,
    refusal,
    sha256_of,
    write_with_json,
)
from models.common.state_dict import COUNTER, INTEGERS, SAVE, add_biases, apply_masks, find_state_dict
from models.graph import KNOWN_FILES
from models.normalization import Normalization

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network with its input normalization and the JSON that `convert.py` wrote beside it."""

    path: Path
    model: nn.Module | None  # a ResNet8 in eval mode; None for formats that other libraries run
    sha256: str
    normalization: Normalization
    metadata: dict  # the JSON beside the file; {} if none
    read_note: str = ""  # steps taken to read it; "" for a plain float32 state_dict
    assumes_normalization: bool = False  # whether neither a JSON nor an option has the normalization

    @property
    def is_as_converted(self) -> bool:
        """Whether the file is the one that `convert.py` wrote with the JSON."""
        return self.metadata.get("sha256") == self.sha256

    @property
    def input_shape(self) -> list[int | None]:
        """Input shape [channels, height, width]; a height or width of None accepts any."""
        shape = self.metadata.get("input", {}).get("shape", [None, 32, 32])
        return [self.model.conv1.in_channels, *shape[1:]]

    @property
    def notes(self) -> list[str]:
        """Steps taken to read the file, and values assumed because the JSON lacks them."""
        bn = self.model.bn1
        known = {**self.metadata.get("architecture", {}), **self.metadata.get("input", {})}
        defaults = {
            "bn_momentum": f"BatchNorm momentum {bn.momentum:g}",
            "shape": "32 x 32 images",
            "mean": f"input {self.normalization}",
            "std": f"input {self.normalization}",
        }
        assumed = ", ".join(dict.fromkeys(text for key, text in defaults.items() if key not in known))
        note = f"assumed, since not in {json_path(self.path).name}: {assumed}" if assumed else ""
        return [each for each in (self.read_note, note) if each]

    @property
    def bn_eps(self) -> float:
        """BatchNorm epsilon from the JSON, or Keras's default."""
        return self.metadata.get("architecture", {}).get("bn_eps", 1e-3)

    def with_normalization(self, mean: list[float] | None, std: list[float] | None) -> Checkpoint:
        """Return a copy whose normalization is overridden, with `mean` and `std` as in `from_args`.

        The Keras model's in the JSON is overridden too if it is the same: no Keras layer normalizes then.
        """
        overrides = {name: values for name, values in (("mean", mean), ("std", std)) if values}
        metadata = {**self.metadata, "input": {**self.metadata.get("input", {}), **overrides}}
        normalization, source = self.normalization.override(mean, std), self.metadata.get("source", {})
        keras = source.get("input")
        if keras and self.normalization.override(keras.get("mean"), keras.get("std")) == self.normalization:
            metadata["source"] = {**source, "input": asdict(normalization)}
        return replace(self, normalization=normalization, metadata=metadata)

    @property
    def origin(self) -> str | None:
        """SHA-256 of the file that this one was converted from, if the JSON has it."""
        return self.metadata.get("source", {}).get("sha256")

    @property
    def known(self) -> str:
        """A line on the published model that it is, or was converted from; "" for others."""
        for sha256, relation in ((self.sha256, "is"), (self.origin, "was converted from")):
            if sha256 in KNOWN_FILES:
                return f"{self.path} {relation} {KNOWN_FILES[sha256]}"
        return ""


def read_checkpoint(
    path: Path, network: type[nn.Module], dtype: torch.dtype = torch.float32, key: str | None = None
) -> Checkpoint:
    """Read a state_dict file into `network` (the class `ResNet8`), in eval mode, with weights in `dtype`.

    BatchNorm's constants and the input normalization come from the JSON beside the file, else the defaults;
    a safetensors file may have the normalization in its metadata. `key` selects one of several state_dicts.
    The normalization is also set as `model.normalization`. Raises OSError, and ValueError with one line.
    """
    metadata, is_safetensors = read_metadata(path), detect_format(path) is Format.SAFETENSORS
    content, own_metadata = load_safetensors(path) if is_safetensors else (load_torch(path), {})
    metadata = {**metadata, **own_metadata}
    if is_safetensors:
        metadata.pop("sha256", None)  # of a `.pt` of the same name
    with torch.device("meta"):
        template = network().state_dict()
    state, steps = find_state_dict(path, content, template, key)
    check_tensors(path, state, dtype)
    steps += apply_masks(path, state) + add_biases(state, template)
    stored = {dtype_name(tensor.dtype) for tensor in state.values() if tensor.is_floating_point()}
    if stored not in ({dtype_name(dtype)}, {"float32"}):
        steps.append(f"{', '.join(sorted(stored))} weights as {dtype_name(dtype)}")
    architecture = metadata.get("architecture", {})
    if "bn_eps" not in architecture:
        steps.append(f"BatchNorm epsilon 0.001 assumed, since not in {json_path(path).name}")
    constants = {name: architecture[name] for name in ("bn_eps", "bn_momentum") if name in architecture}
    try:
        model = network.from_state_dict(state, **constants).to(dtype)
        channels = model.conv1.in_channels
        normalization = Normalization.from_json(metadata.get("input", {}), channels)
        Normalization.from_json(metadata.get("source", {}).get("input", {}), channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model.normalization = normalization
    note = f"{path.name} read as a state_dict: {', '.join(steps)}" if steps else ""
    return Checkpoint(path, model, sha256_of(path), normalization, metadata, note)


def load_torch(path: Path) -> object:
    """Return the content of a `torch.save` file, loaded with `weights_only=True`, which runs no code of it.

    Raises OSError, and ValueError with one line if it is damaged, of another format, or holds objects.
    """
    found = detect_format(path)
    if reason := refusal(found, (Format.TORCH,), f"expected a state_dict: {SAVE}"):
        raise ValueError(f"{path}: {reason}")
    try:
        if found in (Format.TORCH, Format.ZIP):  # torch.save stores records as they are
            records = zipfile.ZipFile(path).infolist()
            is_compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
            if is_compressed or sum(record.file_size for record in records) > path.stat().st_size:
                raise zipfile.BadZipFile("compressed or overlong records")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]{1,80}) ", str(error))
        reason = f"contains pickled objects other than tensors ({name[1]}); not loaded" if name else "damaged"
        raise ValueError(f"{path}: {reason}; expected a state_dict: {SAVE}") from None
    except Exception as error:  # damage raises anything
        raise ValueError(f"{path}: damaged or not a PyTorch file ({one_line(error)})") from None


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a safetensors file by name, and its metadata: `architecture` and `input`, if any.

    Raises ValueError with one line if it is damaged, or the metadata is not as in a JSON of `convert.py`.
    """
    check_package(path)
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            described = file.metadata() or {}
        names = [name for name in ("architecture", "input") if name in described]
        metadata = {name: json.loads(described[name]) for name in names}
    except OSError:
        raise
    except Exception as error:  # SafetensorError, RecursionError, and what torch raises for odd types
        raise ValueError(f"{path}: damaged or not a safetensors file ({one_line(error)})") from None
    check_metadata(path, metadata)
    return state, metadata


def check_tensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise ValueError for a tensor without values of its own, or with values not possible in `dtype`."""
    for name, tensor in state.items():
        is_float = tensor.is_floating_point()
        if tensor.is_quantized:
            reason = "is quantized; score a quantized network from Python (evaluate.score)"
        elif tensor.is_meta or not tensor.numel():
            reason = f"has no values (shape {tuple(tensor.shape)}, {tensor.device})"
        elif tensor.dtype not in FLOATS | INTEGERS:
            reason = f"is {dtype_name(tensor.dtype)}; expected float32, float64, float16 or bfloat16"
        elif tensor.layout != torch.strided or tensor.untyped_storage().nbytes() < tensor.nbytes:  # expanded
            reason = f"does not store the {tensor.numel():,} values of its shape"
        elif not is_float and not name.endswith((COUNTER, "_mask")):
            reason = f"is {dtype_name(tensor.dtype)}; expected floats; quantized networks: evaluate.score"
        elif not tensor.isfinite().all():
            reason = "has values that are NaN or infinite"
        elif is_float and not tensor.to(dtype).isfinite().all():
            reason = f"has values too large for {dtype_name(dtype)}"
        elif name.endswith("running_var") and (tensor < 0).any():
            reason = f"is negative ({tensor.min():g})"
        else:
            continue
        raise ValueError(f"{path}: {name} {reason}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def architecture_of(model: nn.Module) -> dict:
    """Return the arguments of `ResNet8` that build a network of the same architecture."""
    return {
        "num_classes": model.fc.out_features,
        "width": model.conv1.out_channels,
        "in_channels": model.conv1.in_channels,
        "bn_eps": model.bn1.eps,
        "bn_momentum": model.bn1.momentum,
    }


def state_dict_bytes(model: nn.Module) -> bytes:
    """Return the content of the file that `torch.save` writes for a network's state_dict."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.getvalue()


def write_checkpoint(path: Path, model: nn.Module, metadata: dict) -> dict:
    """Write a state_dict and its JSON, `metadata` with the file's SHA-256; return the latter.

    Raises OSError; then neither file has changed.
    """
    content = state_dict_bytes(model)
    metadata = {**metadata, "sha256": hashlib.sha256(content).hexdigest()}
    write_with_json(path, content, metadata)
    return metadata


def save_checkpoint(model: nn.Module, path: str | Path, like: str | Path) -> None:
    """Save a network derived from the checkpoint `like` (fine-tuned, pruned), with a JSON of its own.

    The JSON keeps `like`'s input and source; sizes and BatchNorm's constants are the network's. It has no
    SHA-256 and no verification, since `convert.py` did not write it. Raises OSError, and ValueError if
    `like`'s JSON is damaged or BatchNorm has been folded: such a state_dict could not be read again.
    """
    path, like = Path(path), Path(like)
    network = getattr(model, "module", model)  # of DataParallel and AveragedModel
    if not isinstance(network.bn1, nn.BatchNorm2d):
        raise ValueError(f"{path}: BatchNorm is folded; save the network before folding")
    metadata = {k: v for k, v in read_metadata(like).items() if k not in ("sha256", "verification")}
    metadata["architecture"] = architecture_of(network)
    if "file" in metadata.get("source", {}):  # relative to the JSON
        source = os.path.relpath(like.parent / metadata["source"]["file"], path.parent)
        metadata["source"] = {**metadata["source"], "file": source}
    write_with_json(path, state_dict_bytes(model), metadata)
