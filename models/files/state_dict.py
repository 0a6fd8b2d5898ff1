"""State_dicts of `torch.save` and safetensors, read without running any code, whatever was made of them."""

import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.common.errors import one_line
from models.common.kinds import NEXT_STEP, Kind, kind_of, refusal
from models.files.metadata import check_metadata, read_metadata
from models.scaling import Scaling

SAVE = "torch.save(model.state_dict(), ...) writes one"


def read_network(
    network: type[nn.Module], path: Path, dtype: torch.dtype = torch.float32, key: str | None = None
) -> tuple[nn.Module, dict, str]:
    """Return the `network` (`ResNet8`) of a `.pt`, what is said of it, and what was done to read it.

    BatchNorm's constants and what it is fed, its `scaling`, are those of the JSON beside it, or the defaults;
    a safetensors file may say itself what it is fed. What training loops make of a state_dict is undone, and
    the weights are converted to `dtype`; `key` says which one to take where the file holds several. Raises
    OSError when a file cannot be read, ValueError with one line when it is no such network's state_dict, or
    the JSON is not as `convert.py` writes it.
    """
    metadata, said_in = read_metadata(path), path.with_suffix(".json")
    if kind_of(path) is Kind.SAFETENSORS:
        content, said = load_safetensors(path)
        metadata, said_in = {**metadata, **said}, path if said else said_in
        metadata.pop("sha256", None)  # that of a `.pt` of its name
    else:
        content = load(path)
    with torch.device("meta"):
        names = network().state_dict()
    state, done = plain_state_dict(path, content, names, key)
    check_values(path, state, dtype)
    stated = metadata.get("architecture", {})
    norm = {name: stated[name] for name in ("bn_eps", "bn_momentum") if name in stated}
    try:
        model = network.from_state_dict(state, **norm).to(dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    channels, source = model.conv1.in_channels, metadata.get("source", {})
    described = {"input": metadata.get("input", {}), "source.input": source.get("input", {})}
    for where, found in described.items():
        for name in ("mean", "std"):
            if len(found.get(name, [0] * channels)) != channels:
                problem = f"{where}.{name} has {len(found[name])} values, expected {channels}"
                raise ValueError(f"{said_in}: {problem}")
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
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]{1,80}) ", str(error))
        what = f": {found[1]}" if found else ""
        raise ValueError(
            f"{path}: not a plain state_dict (it holds code or objects, which are not loaded{what}): {SAVE}"
        ) from None
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise ValueError(f"{path}: damaged or not a PyTorch file ({type(error).__name__})") from None


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of a safetensors file by name, and what its metadata says: {"input": ...}, or {}.

    The format holds a JSON header and plain values, no code. Raises ValueError with one line when the file is
    damaged, or "input" in its metadata is not the JSON that `convert.py` writes under that name.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError(f"{path}: is a safetensors file, which needs: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            state, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and whatever torch makes of odd types
        raise ValueError(f"{path}: damaged or not a safetensors file ({one_line(error)})") from None
    try:
        metadata = {"input": json.loads(said["input"])} if "input" in said else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: input in its metadata is not JSON: {error}") from None
    check_metadata(path, metadata)
    return state, metadata


WRAPPINGS = ("state_dict", "model_state_dict", "model")  # keys under which training loops keep a state_dict
# torch.compile; DataParallel, DistributedDataParallel and AveragedModel; a Lightning module's attribute
PREFIXES = ("_orig_mod.", "module.", "model.")
MAX_DEPTH = 3  # of dicts in dicts

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # of masks, for one
READABLE = (*FLOATS, *INTEGERS)  # PyTorch has others, with which it cannot compute


def plain_state_dict(
    path: Path, content: object, names: Iterable[str], key: str | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a state_dict by name, whatever a training loop made of it, and what was undone.

    It is the one that has all `names`, in dicts under any keys: if there are several, that under `key`. Its
    own keys may have a prefix in common; and weights may still be pruned by `torch.nn.utils.prune`:
    `weight_orig` times `weight_mask`. Raises ValueError with one line for anything else.
    """
    by_key = {".".join(keys): (keys, state) for keys, state in _state_dicts(content) if _fits(state, names)}
    if key is not None and key not in by_key and "" not in by_key:
        choice = ", ".join(map(repr, by_key)) or "none"
        raise ValueError(f"{path}: --key {key}: no state_dict of this network; those in the file: {choice}")
    if key is None and len({id(state) for _, state in by_key.values()}) > 1:  # one may lie under two keys
        choice = ", ".join(map(repr, by_key))
        raise ValueError(f"{path}: holds several state_dicts, {choice}: --key NAME takes one")
    keys, content = by_key.get(key) or next(iter(by_key.values()), None) or _unwrapped(content)
    done = [f"under '{each}'" for each in keys]
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path}: holds a {kind}, expected a state_dict (tensors by name): {SAVE}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"{name!r} is a {type(value).__name__}"
            wrapped = ", or one of this network under any key" if isinstance(value, dict) else ""
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


def _state_dicts(content: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Return the dicts of tensors by name in nested dicts, each with the keys that lead to it."""
    if not isinstance(content, dict):
        return
    if content and all(isinstance(name, str) and isinstance(content[name], Tensor) for name in content):
        yield keys, content
    elif len(keys) < MAX_DEPTH:
        for key, value in content.items():
            yield from _state_dicts(value, (*keys, str(key)))


def _fits(state: dict[str, Tensor], names: Iterable[str]) -> bool:
    """Whether a dict has all names but the counters, after a common prefix, pruned or not."""
    found = set(state)
    while prefix := common_prefix(found):
        found = {name.removeprefix(prefix) for name in found}
    found |= {name.removesuffix("_orig") for name in found}
    return found >= {name for name in names if not name.endswith("num_batches_tracked")}


def _unwrapped(content: object) -> tuple[list[str], object]:
    """Return what is there in the place of a fitting state_dict, after the keys of WRAPPINGS to it."""
    keys = []
    for key in WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            keys.append(key)
    return keys, content


def common_prefix(names: Iterable[str]) -> str:
    """Return one of PREFIXES that all names have, or another that ends in a dot; "" if there is none.

    AveragedModel's `n_averaged` needs none.
    """
    names = [name for name in names if name != "n_averaged"]
    shared = os.path.commonprefix(names)  # noqa: RUF071  # of letters
    known = (prefix for prefix in PREFIXES if shared.startswith(prefix))
    return next(known, shared[: shared.rfind(".") + 1])


HOLD_CODE = {Kind.TORCHSCRIPT: "torch.jit.load(...)", Kind.EXPORTED: "torch.export.load(...)"}


def check_archive(path: Path) -> None:
    """Raise ValueError for a file that is empty, of another kind than `torch.save` writes, or would grow."""
    kind = kind_of(path)
    if kind is Kind.EMPTY:
        raise ValueError(f"{path}: is empty, so damaged")
    if kind is Kind.HDF5:
        raise ValueError(f"{path}: is an HDF5 file, not PyTorch's; if it is Keras's, convert.py converts it")
    if kind is Kind.KERAS:
        raise ValueError(f"{path}: is a Keras archive, not PyTorch's; convert.py converts it")
    if kind in HOLD_CODE:
        save = f"save {HOLD_CODE[kind]}.state_dict() with torch.save"
        also = f", or: {NEXT_STEP[kind]}" if kind in NEXT_STEP else ""
        raise ValueError(f"{path}: {kind.value}, which holds code; {save}{also}")
    if kind not in (Kind.TORCH, Kind.ZIP, Kind.UNKNOWN, Kind.FOLDER):  # opening a folder is an OSError
        raise ValueError(f"{path}: {refusal(kind, 'not a state_dict as torch.save writes it')}")
    if kind in (Kind.TORCH, Kind.ZIP):
        stored_records(path)


def stored_records(path: Path) -> dict[str, Callable[[], bytes]]:
    """Return what reads each record of an archive that PyTorch wrote, by name: none larger than it is stored.

    PyTorch stores records as they are. A compressed one can unpack to any size, so it is refused by the
    archive's own table, before anything is unpacked. Raises ValueError with one line.
    """
    try:
        archive = zipfile.ZipFile(path)
        records = archive.infolist()
    except Exception as error:  # whatever the damage leads to
        raise ValueError(f"{path}: damaged or not a PyTorch file ({type(error).__name__})") from None
    names = [record.filename.partition("/")[2] or record.filename for record in records]
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError(f"{path}: holds compressed records; torch.save writes none")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: damaged: it holds a record twice")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise ValueError(f"{path}: damaged: its records are larger than the file")
    return {name: partial(archive.read, record) for name, record in zip(names, records, strict=True)}
