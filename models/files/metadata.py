"""What `convert.py` writes, and the JSON beside it, which says where it came from and what it is fed.

Both are written whole or not at all; the JSON is read with every value seen to be what it should be.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from data.files import check_writable, read_regular, sha256_of, write_files
from models.common.errors import OutputExistsError
from models.common.kinds import Kind, kind_of
from models.scaling import LARGEST

KERAS_SUFFIXES = (".h5", ".keras")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors")


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is PyTorch's, as its content tells, or its name where the content does not."""
    with suppress(OSError):
        kind = kind_of(path)
        if kind in (Kind.HDF5, Kind.KERAS):
            return False
        if kind in (Kind.TORCH, Kind.TORCHSCRIPT, Kind.SAFETENSORS):
            return True
    return path.suffix in CHECKPOINT_SUFFIXES


def json_of(output: Path) -> Path:
    """Return the JSON's path: model.json beside model.pt, model.h5.json beside model.h5."""
    is_keras = output.suffix in KERAS_SUFFIXES
    return output.with_name(f"{output.name}.json") if is_keras else output.with_suffix(".json")


def check_outputs(output: Path, force: bool, source: Path) -> None:
    """Raise OutputExistsError unless nothing is there, or what `convert.py` wrote and nobody has changed.

    The JSON has the SHA-256 of what was written with it. `force` replaces whatever is there, but for what
    `source`, by the JSON beside it, was converted from. Raises OSError when the files cannot be written.
    """
    json_path = json_of(output)
    check_writable([output, json_path])
    if _was_made_from(source, output):
        raise OutputExistsError(
            f"{output} is what {source} was converted from, and is not replaced: name another output with -o"
        )
    if force:
        return
    written = None
    if json_path.exists():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # it is not ours
            metadata = json.loads(read_regular(json_path))
            written = metadata["architecture"] and metadata["source"] and metadata["sha256"]
        if not written:
            raise OutputExistsError(f"{json_path} is not of convert.py's writing; --force replaces it")
    if not output.exists() or sha256_of(output) != written:
        check_owner(output)
        if output.exists():
            raise OutputExistsError(
                f"{output} is not as convert.py wrote it (fine-tuned?); --force replaces it"
            )


def check_owner(output: Path) -> None:
    """Raise OutputExistsError where the JSON of `output` is that of another file beside it, by its SHA-256.

    `x.pt` and `x.pth` would share one. Raises OSError when a file cannot be read.
    """
    json_path = json_of(output)
    written = None
    with suppress(ValueError):
        written = read_metadata(output).get("sha256")
    if written is None:
        return
    for other in sorted(output.parent.iterdir()):
        shares_it = other != output and other.is_file() and json_of(other) == json_path != other
        if shares_it and sha256_of(other) == written:
            raise OutputExistsError(f"{json_path} is that of {other}: name another output with -o")


def _was_made_from(path: Path, other: Path) -> bool:
    """Whether the JSON beside a file names another file as what it was converted from."""
    with suppress(ValueError, OSError):  # there is no such JSON, or no such file
        source = read_metadata(path).get("source", {})
        return "file" in source and (json_of(path).parent / source["file"]).samefile(other)
    return False


def write_with_json(path: Path, content: bytes, metadata: dict) -> None:
    """Write a file, and beside it the JSON that describes it. Raises OSError; then neither is touched."""
    description = json.dumps(metadata, indent=2) + "\n"
    write_files(
        {
            path: lambda target: target.write(content),
            json_of(path): lambda target: target.write(description.encode()),
        }
    )


def _is_number(value: object) -> bool:  # of a size that can be computed with; NaN is none
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


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


def written_metadata(path: Path, sha256: str) -> dict:
    """Return the JSON beside a file of this SHA-256 that `convert.py` wrote; {} for any other file."""
    with suppress(ValueError, OSError):
        metadata = read_metadata(path)
        return metadata if metadata.get("sha256") == sha256 else {}
    return {}


def read_metadata(described: Path) -> dict:
    """Return the content of the JSON file that `convert.py` writes beside a file; {} if there is none.

    Raises ValueError with one line when it cannot be read, or is not JSON as `convert.py` writes it.
    """
    path = json_of(described)
    if not path.exists():
        return {}
    try:
        metadata = json.loads(read_regular(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    check_metadata(path, metadata)
    return metadata


def check_metadata(path: Path, metadata: object) -> None:
    """Make floats of what `metadata`, the JSON in `path`, says of a scaling. Raises ValueError as above."""
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
