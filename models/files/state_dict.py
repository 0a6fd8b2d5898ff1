"""Reading what `torch.save` wrote: without running any code in it, whatever a training loop made of it."""

import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from data.files import read_regular
from models.files.metadata import HDF5, read_metadata
from models.scaling import Scaling

SAVE = "torch.save(model.state_dict(), ...) writes one"


def read_network(
    network: type[nn.Module], path: Path, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict, str]:
    """Return the `network` (`ResNet8`) of a `.pt`, the JSON beside it, and what was done to read it.

    BatchNorm's constants and what it is fed, its `scaling`, are the JSON's, or the defaults. What training
    loops make of a state_dict is undone, and the weights are converted to `dtype`. Raises OSError when a file
    cannot be read, ValueError with one line when it is no such network's state_dict, or the JSON is not as
    `convert.py` writes it.
    """
    state, done = plain_state_dict(path, load(path))
    check_values(path, state, dtype)
    metadata = read_metadata(path)
    stated = metadata.get("architecture", {})
    norm = {name: stated[name] for name in ("bn_eps", "bn_momentum") if name in stated}
    try:
        model = network.from_state_dict(state, **norm).to(dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    channels, source = model.conv1.in_channels, metadata.get("source", {})
    described = {"input": metadata.get("input", {}), "source.input": source.get("input", {})}
    for where, found in described.items():
        for name in {"mean", "std"} & found.keys():
            if len(found[name]) != channels:
                problem = f"{where}.{name} has {len(found[name])} values, expected {channels}"
                raise ValueError(f"{path.with_suffix('.json')}: {problem}")
    model.scaling = Scaling.given(channels).updated(described["input"])
    stored, wanted = {name_of(t.dtype) for t in state.values() if t.is_floating_point()}, name_of(dtype)
    if stored != {wanted} and stored != {"float32"}:
        done.append(f"{', '.join(sorted(stored))} weights as {wanted}")
    return model, metadata, f"{path.name} is read as a state_dict: {', '.join(done)}" if done else ""


def check_values(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise ValueError for a tensor that no network in `dtype` can have."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"{path}: {name} is {tensor.dtype}, expected a floating-point tensor; a quantized network is "
                "scored from Python: from evaluate import score"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are NaN or infinite")
        if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all():
            raise ValueError(f"{path}: {name} has values too large for {name_of(dtype)}")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{path}: {name} is negative ({tensor.min():g})")


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def load(path: Path) -> object:
    """Return what a `.pt` file holds: tensors, numbers and strings, in dicts and lists.

    No code in the file is run (`weights_only=True`). Raises OSError when it cannot be read, ValueError with
    one line when it is damaged, or holds anything else.
    """
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: not a plain state_dict (it holds code or objects, which are not loaded): {SAVE}"
        ) from None
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise ValueError(f"{path}: damaged or not a PyTorch file ({type(error).__name__})") from None


WRAPPINGS = ("state_dict", "model_state_dict", "model")  # keys under which training loops keep a state_dict
# torch.compile; DataParallel, DistributedDataParallel and AveragedModel; a Lightning module's attribute
PREFIXES = ("_orig_mod.", "module.", "model.")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # of masks, for one
READABLE = (*FLOATS, *INTEGERS)  # PyTorch has others, with which it cannot compute


def plain_state_dict(path: Path, content: object) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a state_dict by name, whatever a training loop made of it, and what was undone.

    It may lie in a dict under one of WRAPPINGS; its keys may have PREFIXES in common; and weights may still
    be pruned by `torch.nn.utils.prune`: `weight_orig` times `weight_mask`. Raises ValueError with one line
    for anything else.
    """
    done = []
    for key in WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            done.append(f"under '{key}'")
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path}: holds a {kind}, expected a state_dict (tensors by name): {SAVE}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{name!r} is a {type(value).__name__}"
            wrapped = f", or one under {', '.join(map(repr, WRAPPINGS))}" if isinstance(value, dict) else ""
            raise ValueError(f"{path}: {what}, expected a state_dict (tensors by name){wrapped}: {SAVE}")
        if value.is_quantized:
            raise ValueError(
                f"{path}: {name} is quantized; a quantized network is scored from Python: "
                "from evaluate import score"
            )
        if value.is_meta or not value.numel():
            raise ValueError(f"{path}: {name} has no values (shape {tuple(value.shape)}, {value.device})")
        if value.dtype not in READABLE:
            raise ValueError(
                f"{path}: {name} is {value.dtype}, expected float32, float64, float16 or bfloat16"
            )
        is_dense = value.layout == torch.strided
        if not is_dense or value.untyped_storage().nbytes() < value.nbytes:  # as an expanded tensor's is
            raise ValueError(f"{path}: {name} has not the {value.numel():,} values that its shape says")

    state = dict(content)
    while prefix := common_prefix(state):
        state = {name.removeprefix(prefix): value for name, value in state.items() if name != "n_averaged"}
        done.append(f"without '{prefix}'")
    pruned = [name.removesuffix("_mask") for name in state if name.endswith("_mask")]
    for name in pruned:
        if f"{name}_orig" not in state or state[f"{name}_orig"].shape != state[f"{name}_mask"].shape:
            raise ValueError(f"{path}: {name}_mask has no {name}_orig of its shape")
        state[name] = state.pop(f"{name}_orig") * state.pop(f"{name}_mask")
    if pruned:
        done.append("pruned weights times their masks")
    return state, done


def common_prefix(names: Iterable[str]) -> str | None:
    """Return the one of PREFIXES that all names have, but for AveragedModel's `n_averaged`."""
    names = [name for name in names if name != "n_averaged"]
    fits = (prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in names))
    return next(fits, None) if names else None


def check_archive(path: Path) -> None:
    """Raise ValueError for a file that is empty, of another kind than `torch.save` writes, or would grow.

    `torch.save` stores records as they are. A compressed one can unpack to any size, so it is refused by the
    archive's own table, before anything is unpacked.
    """
    start = read_regular(path, len(HDF5))
    if not start:
        raise ValueError(f"{path}: is empty, so damaged")
    if start == HDF5:
        raise ValueError(f"{path}: is an HDF5 file, not PyTorch's; if it is Keras's, convert.py converts it")
    if not start.startswith(b"PK\x03\x04"):
        return
    try:
        records = zipfile.ZipFile(path).infolist()
    except Exception as error:  # whatever the damage leads to
        raise ValueError(f"{path}: damaged or not a PyTorch file ({type(error).__name__})") from None
    names = [record.filename.partition("/")[2] or record.filename for record in records]
    if "constants.pkl" in names:
        what, instead = "a TorchScript archive", "torch.jit.load(...)"
    elif "models/model.json" in names or "serialized_exported_program.json" in names:
        what, instead = "a torch.export archive", "torch.export.load(...)"
    elif "model.weights.h5" in names:
        raise ValueError(f"{path}: is a Keras archive, not PyTorch's; convert.py converts it")
    elif any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path}: holds compressed records; torch.save writes none")
    elif len(set(names)) < len(names):
        raise ValueError(f"{path}: damaged: it holds a record twice")
    elif sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError(f"{path}: damaged: its records are larger than the file")
    else:
        return
    raise ValueError(f"{path}: {what}, which holds code; save {instead}.state_dict() with torch.save")
