"""Files: format detection, safe reading, atomic writing, and the JSON file beside each converted model."""

from __future__ import annotations  # `--keras-python` may be an older Python

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from models.common.cli import OutputExistsError, check_installed, one_line
from models.normalization import LIMIT

KERAS_SUFFIXES = (".h5", ".keras")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors")

JSON_KEYS = ("input", "architecture", "source", "verification", "versions", "date", "sha256")
EXAMPLE = '{"input": {"mean": [0, 0, 0], "std": [255, 255, 255]}}'


class Format(Enum):
    """A file format; the value names it in messages."""

    HDF5 = "an HDF5 file"
    KERAS = "a Keras archive"
    TORCH = "a PyTorch archive"
    TORCHSCRIPT = "a TorchScript archive"
    EXPORTED = "a torch.export archive"
    ZIP = "a ZIP archive, damaged or of an unknown format"
    ONNX = "an ONNX file"
    TFLITE = "a TensorFlow Lite file"
    SAFETENSORS = "a safetensors file"
    LFS = "a Git LFS pointer"
    LINK = "a symbolic link stored as text"
    LINE_ENDS = "an HDF5 file damaged by a conversion of line ends"
    WEB_PAGE = "a web page"
    APPLE_DOUBLE = "macOS's metadata of another file"
    TF_CHECKPOINT = "a part of a TensorFlow checkpoint"
    SHARDS = "the index of sharded Keras weights"
    SAVED_MODEL = "a SavedModel folder"
    FOLDER = "a folder"
    EMPTY = "empty"
    UNKNOWN = "of an unknown format"


RUNTIME_FORMATS = (Format.ONNX, Format.TFLITE, Format.EXPORTED)  # neither PyTorch nor Keras runs them
KERAS_FORMATS = (Format.HDF5, Format.KERAS)
CHECKPOINT_FORMATS = (Format.TORCH, Format.SAFETENSORS)
UNCLEAR = (Format.ZIP, Format.UNKNOWN, Format.FOLDER)
ADVICE = {  # next step where a format is not read
    Format.HDF5: "if it is a Keras file, convert.py converts it",
    Format.KERAS: "convert.py converts it",
    Format.TORCHSCRIPT: "save torch.jit.load(...).state_dict() with torch.save, or score it from Python "
    "(evaluate.score), for int8 the only way",
    Format.EXPORTED: "evaluate.py evaluates it, or save torch.export.load(...).state_dict with torch.save",
    Format.ONNX: "evaluate.py evaluates it",
    Format.TFLITE: "evaluate.py evaluates it, and convert.py converts int8 models",
    Format.LFS: "run 'git lfs pull'",
    Format.LINK: "use the file at this path (git config core.symlinks true)",
    Format.LINE_ENDS: "copy or download it again in binary mode (git: '*.h5 binary' in .gitattributes)",
    Format.WEB_PAGE: "download the file itself (GitHub: 'Download raw file')",
    Format.APPLE_DOUBLE: "use the file without '._' in its name",
    Format.TF_CHECKPOINT: "load it in Keras (model.load_weights), then model.save('x.keras')",
    Format.SHARDS: "load it in Keras (model.load_weights), then model.save('x.keras')",
    Format.SAVED_MODEL: "load it in Keras, then model.save('x.keras')",
}
PACKAGES = {  # format -> module that reads it, packages to install
    Format.ONNX: ("onnxruntime", "onnxruntime onnx"),
    Format.TFLITE: ("ai_edge_litert", "ai-edge-litert"),
    Format.SAFETENSORS: ("safetensors", "safetensors"),
}
# Beginning of a file -> format. Sources: HDF5 File Format Specification 3.0, II.A; LiteRT's schema.fbs,
# `file_identifier`; git-lfs, docs/spec.md; RFC 1740 (AppleDouble); tensorflow's checkpoint_state.proto.
MAGIC_NUMBERS = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), found)
    for pattern, found in (
        (rb"\x89HDF\r\n\x1a\n", Format.HDF5),
        (rb"\x89HDF[\r\n]+\x1a[\r\n]", Format.LINE_ENDS),
        (rb"....TFL3", Format.TFLITE),
        (rb"version https://git-lfs", Format.LFS),
        (rb"\s*<(!doctype html|html)", Format.WEB_PAGE),
        (rb"\x00\x05\x16\x07", Format.APPLE_DOUBLE),
        (rb"model_checkpoint_path:", Format.TF_CHECKPOINT),
        (rb"[\w./\\ -]{1,250}\.(h5|keras|pth?|tflite|onnx|safetensors)\s?\Z", Format.LINK),
    )
]
SUFFIXES = {  # of formats without a magic number
    r"\.onnx": Format.ONNX,
    r"\.index|\.data-\d{5}-of-\d{5}": Format.TF_CHECKPOINT,
    r"\.weights\.json": Format.SHARDS,
}


def detect_format(path: Path) -> Format:
    """Detect a file's format by magic number, archive listing, or suffix. Raises OSError."""
    if path.is_dir():
        return Format.SAVED_MODEL if (path / "saved_model.pb").exists() else Format.FOLDER
    check_regular(path)
    if not path.stat().st_size:  # opening a file of /proc may block
        return Format.EMPTY
    with path.open("rb") as file:
        found = detect_content(file)
    by_suffix = (SUFFIXES[suffix] for suffix in SUFFIXES if re.search(f"({suffix})$", path.name))
    return next(by_suffix, found) if found is Format.UNKNOWN else found


def refusal(found: Format, readable: tuple[Format, ...], expected: str) -> str:
    """Return why a format is refused, and the next step or `expected`; "" if it is or may be `readable`."""
    return "" if found in (*readable, *UNCLEAR) else f"is {found.value}; {ADVICE.get(found, expected)}"


def check_package(path: Path) -> None:
    """Raise ValueError, with pip's command, if the package that reads a file is missing. Raises OSError."""
    found = detect_format(path)
    if found in PACKAGES:
        check_installed(*PACKAGES[found], f"{path}: is {found.value}, which")


def detect_content(file: BinaryIO) -> Format:
    """Detect the format of a seekable binary file, open at its start. Nothing is unpacked."""
    start = file.read(300)
    if start.startswith(b"PK\x03\x04"):
        return detect_archive(file)
    # github.com/huggingface/safetensors, README, "Format"; the library's limit
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000:
        return Format.SAFETENSORS
    by_magic = (found for pattern, found in MAGIC_NUMBERS if pattern.match(start))
    return next(by_magic, Format.UNKNOWN) if start else Format.EMPTY


def detect_archive(file: BinaryIO) -> Format:
    """Detect the format of a ZIP archive by the names of its records."""
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # damage raises anything
        return Format.ZIP
    inner = {name.partition("/")[2] or name for name in names}  # PyTorch's records are in a folder
    exported = ("models/", "serialized_exported_program")  # the latter until PyTorch 2.6
    if any(name.startswith(exported) and name.endswith(".json") for name in inner):
        return Format.EXPORTED
    if "constants.pkl" in inner:
        return Format.TORCHSCRIPT
    if "data.pkl" in inner:
        return Format.TORCH
    return Format.KERAS if {"config.json", "metadata.json", "model.weights.h5"} & set(names) else Format.ZIP


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a PyTorch checkpoint: by its content, or its suffix where the content is unclear."""
    with suppress(OSError):
        found = detect_format(path)
        if found in KERAS_FORMATS:
            return False
        if found in CHECKPOINT_FORMATS:
            return True
    return path.suffix in CHECKPOINT_SUFFIXES


def check_regular(path: Path) -> None:
    """Raise OSError unless `path` is a regular file or a folder: reading a pipe or a device may never end."""
    path.stat()
    if not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file, but a pipe or a device", str(path))


def read_regular(path: Path, limit: int | None = None) -> bytes:
    """Return a file's content, or its first `limit` bytes. Raises OSError, also for a pipe or a device."""
    check_regular(path)
    size = path.stat().st_size  # 0 for the files of /proc, some of which never end
    with path.open("rb") as file:
        return file.read(size if limit is None else min(size, limit))


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hex. Raises OSError as `read_regular` does."""
    return hashlib.sha256(read_regular(path)).hexdigest()


def check_writable(path: Path) -> None:
    """Raise OSError, which names the path in the way, if a file cannot be written; change nothing."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if target.exists():
        check_regular(path)
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def write_files(writers: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
    """Write files completely or not at all: each to a temporary file beside it, then rename all.

    `writers` maps each path to a function that writes to an open binary file. Symbolic links are followed,
    and a replaced file keeps its mode. Raises OSError, which names the path; then nothing has changed.
    """
    for path in writers:
        check_writable(path)
    targets = {path: Path(os.path.realpath(path)) for path in writers}
    temporary = {path: file.with_name(f".{file.name}.{os.getpid()}.tmp") for path, file in targets.items()}
    try:
        for path, write in writers.items():
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # the rename may reach the disk before the content
            if targets[path].exists():
                shutil.copymode(targets[path], temporary[path])
        for path in writers:
            temporary[path].replace(targets[path])
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        for file in temporary.values():
            with suppress(OSError):
                file.unlink()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write one file, as `write_files` does."""
    write_files({path: write})


# --- The JSON file beside a model -------------------------------------------------------------------------


def json_path(path: Path) -> Path:
    """Return the path of the JSON beside a file: x.json for x.pt, NAME.json for any other NAME."""
    return path.with_suffix(".json") if path.suffix == ".pt" else path.with_name(f"{path.name}.json")


def write_with_json(path: Path, content: bytes, metadata: dict) -> None:
    """Write a file and its JSON. Raises OSError; then neither has changed."""
    text = f"{json.dumps(metadata, indent=2)}\n".encode()
    write_files({path: lambda file: file.write(content), json_path(path): lambda file: file.write(text)})


def read_metadata(path: Path) -> dict:
    """Return the JSON beside a file; {} if none. Earlier versions wrote x.json for x.pth and x.safetensors.

    Raises ValueError with one line when it cannot be read, or a value has the wrong type.
    """
    file = json_path(path)
    if not file.exists() and path.suffix in (".pth", ".safetensors"):
        file = path.with_suffix(".json")
    if not file.exists():
        return {}
    try:
        metadata = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None
    check_metadata(file, metadata)
    return metadata


def check_metadata(file: Path, metadata: object) -> None:
    """Raise ValueError, which names the key, for a value of the wrong type or range in a JSON."""

    def check(key: str, value: object, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"{file}: {key} is {json.dumps(value)[:60]}; expected {expected}")

    def is_number(value: object, limit: float) -> bool:  # JSON numbers can be NaN or larger than a float
        return type(value) in (int, float) and -limit <= value <= limit

    check("the JSON", metadata, isinstance(metadata, dict), "an object")
    is_known = not metadata or bool(metadata.keys() & JSON_KEYS)
    check("the JSON", metadata, is_known, f"{', '.join(JSON_KEYS)}, such as {EXAMPLE}")
    architecture, source, described = (metadata.get(key, {}) for key in ("architecture", "source", "input"))
    check("architecture", architecture, isinstance(architecture, dict), "an object")
    for key in ("bn_eps", "bn_momentum"):
        value = architecture.get(key, 0)
        check(f"architecture.{key}", value, is_number(value, 1) and value >= 0, "a number from 0 to 1")
    check("source", source, isinstance(source, dict), "an object")
    for key in ("file", "sha256"):
        value = source.get(key, "")
        check(f"source.{key}", value, isinstance(value, str), "a string")
    for name, group in {"input": described, "source.input": source.get("input", {})}.items():
        check(name, group, isinstance(group, dict), "an object")
        for key in ("mean", "std"):
            values = group.get(key, [1])
            is_right = isinstance(values, list) and values and all(is_number(v, LIMIT) for v in values)
            is_right = is_right and (key == "mean" or all(values))
            check(f"{name}.{key}", values, is_right, "a list of numbers, std not 0")
    shape = described.get("shape", [None] * 3)
    is_right = isinstance(shape, list) and len(shape) == 3
    is_right = is_right and all(size is None or (type(size) is int and 0 < size <= 1024) for size in shape)
    check("input.shape", shape, is_right, "[channels, height, width]")


def metadata_if_current(path: Path, sha256: str) -> dict:
    """Return the JSON beside a file if `convert.py` wrote both and the file has not changed, else {}."""
    with suppress(ValueError):
        metadata = read_metadata(path)
        return metadata if metadata.get("sha256") == sha256 else {}
    return {}


def check_outputs(output: Path, force: bool, source: Path) -> None:
    """Refuse to replace what `convert.py` did not write, or what has changed since.

    `force` allows it, except for the file that `source` was converted from. Raises OutputExistsError, and
    OSError where the files cannot be written.
    """
    check_writable(output)
    check_writable(json_path(output))
    with suppress(ValueError, OSError):  # a damaged JSON, or no such file
        origin = read_metadata(source).get("source", {}).get("file")
        if origin and (json_path(source).parent / origin).samefile(output):
            reason = f"{output} is the file {source} was converted from"
            raise OutputExistsError(f"{reason}; write elsewhere with -o")
    if force:
        return
    metadata, advice = {}, "write elsewhere with -o, or overwrite with --force"
    with suppress(ValueError):
        metadata = read_metadata(output)
    is_ours = all(metadata.get(key) for key in ("architecture", "source", "sha256"))
    if json_path(output).exists() and not is_ours:
        raise OutputExistsError(f"{json_path(output)} was not written by convert.py; {advice}")
    if output.exists() and (not is_ours or metadata["sha256"] != sha256_of(output)):
        reason = "was modified after conversion" if is_ours else "was not written by convert.py"
        raise OutputExistsError(f"{output} {reason}; {advice}")
