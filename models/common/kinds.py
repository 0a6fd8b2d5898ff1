"""What a file is, told from its content: the first bytes, or an archive's table. Nothing in it is unpacked.

HDF5         89 "HDF" 0d 0a 1a 0a (HDF5 File Format Specification 3.0, II.A)
ZIP          "PK" 3 4; the names of its records tell who wrote it
TensorFlow Lite  "TFL3" from the fifth byte on (`file_identifier` of LiteRT's schema.fbs)
safetensors  the header's length, 8 bytes, and "{" (github.com/huggingface/safetensors, README, "Format")
ONNX         no magic number: a protobuf message whose fields are those of ModelProto (onnx.proto)
Git LFS      "version https://git-lfs" (git-lfs, docs/spec.md)
"""

from __future__ import annotations

import codecs
import io
import zipfile
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from data.files import check_regular


class Kind(Enum):
    """A kind of file, as a person calls it."""

    HDF5 = "an HDF5 file"
    KERAS = "a Keras archive"
    TORCH = "a PyTorch archive"
    TORCHSCRIPT = "a TorchScript archive"
    EXPORTED = "a torch.export archive"
    ZIP = "a ZIP archive, neither Keras's nor PyTorch's"
    ONNX = "an ONNX file"
    TFLITE = "a TensorFlow Lite file"
    SAFETENSORS = "a safetensors file"
    LFS = "a Git LFS pointer, not the model itself"
    TEXT = "a text file"
    EMPTY = "empty"
    SAVED_MODEL = "a SavedModel folder"
    FOLDER = "a folder"
    UNKNOWN = "of a kind that is not known here"


RUNTIMES = (Kind.ONNX, Kind.TFLITE, Kind.EXPORTED)  # what other libraries than Keras and PyTorch's own run
# What to do with a file where it is not read.
NEXT_STEP = {
    Kind.ONNX: "evaluate.py evaluates it",
    Kind.TFLITE: "evaluate.py evaluates it",
    Kind.EXPORTED: "evaluate.py evaluates it",
    Kind.LFS: "run 'git lfs pull'",
    Kind.SAVED_MODEL: "load it in Keras, then model.save('x.keras')",
}


# Names that promise another format than the state_dict that `convert.py` writes.
OTHER_SUFFIXES = tuple(
    ".onnx .tflite .pt2 .pte .safetensors .mlmodel .pb .hdf5 .npz .npy .zip .txt .csv .png".split()
)


def refusal(kind: Kind, but_not: str) -> str:
    """Return why a file of a kind is not read: what it is, what it is not, and what to do."""
    step = f"; {NEXT_STEP[kind]}" if kind in NEXT_STEP else ""
    return f"is {kind.value}, {but_not}{step}"


def kind_of(path: Path) -> Kind:
    """Return what lies at a path. Raises OSError, also for what is neither a file nor a folder."""
    if path.is_dir():
        saved = any((path / name).exists() for name in ("saved_model.pb", "saved_model.pbtxt"))
        return Kind.SAVED_MODEL if saved else Kind.FOLDER
    check_regular(path)
    if not path.stat().st_size:  # and not opened: /proc/kmsg, for one, would wait
        return Kind.EMPTY
    with path.open("rb") as file:
        return kind_of_content(file)


def kind_of_content(file: BinaryIO) -> Kind:
    """Return what a seekable binary file is that is open at its start."""
    start = file.read(256)
    if not start:
        return Kind.EMPTY
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return Kind.HDF5
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_archive(file)
    if start[4:8] == b"TFL3":
        return Kind.TFLITE
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= 100_000_000:  # the library's limit
        return Kind.SAFETENSORS
    if start.startswith(b"version https://git-lfs"):
        return Kind.LFS
    if _is_onnx(file):
        return Kind.ONNX
    return Kind.TEXT if _is_text(start) else Kind.UNKNOWN


def _kind_of_archive(file: BinaryIO) -> Kind:
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # whatever the damage leads to
        return Kind.ZIP
    inner = {name.partition("/")[2] or name for name in names}  # PyTorch's lie in a folder
    if "constants.pkl" in inner:
        return Kind.TORCHSCRIPT
    if "serialized_exported_program.json" in inner or any(
        name.startswith("models/") and name.endswith(".json") for name in inner
    ):
        return Kind.EXPORTED
    if "data.pkl" in inner:
        return Kind.TORCH
    keras = {"config.json", "metadata.json", "model.weights.h5"}
    return Kind.KERAS if keras & set(names) else Kind.ZIP


def _is_onnx(file: BinaryIO) -> bool:
    """Whether a file's fields, up to the graph, are ModelProto's: each of its number and its wire type.

    A writer of protobuf puts fields in the order of their numbers: first the version of the format.
    """
    numbers, strings, graph = {0x08, 0x28}, {0x12, 0x1A, 0x22, 0x32, 0x42, 0x72}, 0x3A
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    tag, fields = file.read(1), 0
    while tag and tag[0] in numbers | strings and fields < 1000:
        if (fields == 0) != (tag[0] == 0x08):
            return False
        value = _varint(file)
        if tag[0] in strings and (value > end or file.seek(value, io.SEEK_CUR) > end):
            return False
        tag, fields = file.read(1), fields + 1
    return fields > 0 and tag == bytes([graph])


def _varint(file: BinaryIO) -> int:
    """Return the number that follows, 7 bits a byte, the least significant first."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1) or b"\0"
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return value


def _is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)
