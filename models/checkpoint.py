"""Reading a checkpoint's two files, the `.pt` and the JSON beside it, whatever may stand in them."""

import json
import math
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor


def load_state_dict(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of a `.pt` file, by name.

    No code in the file is run (`weights_only=True`). Raises OSError when it cannot be read, ValueError with
    one line when it is damaged, or holds anything but tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive is warned of, then refused
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
