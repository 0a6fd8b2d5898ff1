"""Which file is what, which JSON describes it, and what may be written over."""

import json
import zipfile
from contextlib import suppress
from pathlib import Path

from data.files import check_writable, sha256_of
from models.errors import OutputExistsError

KERAS_SUFFIXES = (".h5", ".keras")
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt", ".bin", ".safetensors")
HDF5 = b"\x89HDF\r\n\x1a\n"  # how its files begin


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is PyTorch's, as its content tells, or its name where the content does not."""
    start = b""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(len(HDF5))
    if start == HDF5:
        return False
    if start.startswith(b"PK"):
        with suppress(Exception):  # whatever the damage leads to
            names = zipfile.ZipFile(path).namelist()
            if any(name.endswith("/data.pkl") for name in names):
                return True
            if {"config.json", "metadata.json"} & set(names):
                return False
    return path.suffix in CHECKPOINT_SUFFIXES


def json_of(output: Path) -> Path:
    """Return the JSON's path: model.json beside model.pt, model.h5.json beside model.h5."""
    is_keras = output.suffix in KERAS_SUFFIXES
    return output.with_name(f"{output.name}.json") if is_keras else output.with_suffix(".json")


def check_outputs(output: Path, force: bool) -> None:
    """Raise OutputExistsError unless nothing is there, or what `convert.py` wrote and nobody has changed.

    The JSON has the SHA-256 of what was written with it; `force` replaces whatever is there. Raises OSError
    when the files cannot be written.
    """
    json_path = json_of(output)
    check_writable([output, json_path])
    if force:
        return
    written = None
    if json_path.exists():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # it is not ours
            metadata = json.loads(json_path.read_text())
            written = metadata["architecture"] and metadata["source"] and metadata["sha256"]
        if not written:
            raise OutputExistsError(f"{json_path} is not of convert.py's writing; --force replaces it")
    if output.exists() and sha256_of(output) != written:
        raise OutputExistsError(f"{output} is not as convert.py wrote it (fine-tuned?); --force replaces it")
