"""The tasks of one call of `convert.py`: each input file, its direction and its output."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from models.common.cli import in_repository
from models.common.files import (
    CHECKPOINT_FORMATS,
    KERAS_FORMATS,
    KERAS_SUFFIXES,
    RUNTIME_FORMATS,
    Format,
    detect_format,
    is_checkpoint,
    json_path,
    refusal,
    sha256_of,
)
from models.graph import KNOWN_FILES

DEFAULT_INPUT = "checkpoints/resnet8_keras.h5"  # in the repository
OTHER_SUFFIXES = set(".json .onnx .tflite .pt2 .pte .safetensors .hdf5 .pb .npz .npy .zip".split())


class Task(NamedTuple):
    """An input file and its output."""

    path: Path
    output: Path
    to_keras: bool
    is_int8: bool  # whether the input is a TensorFlow Lite file
    refusal: str  # why it is not converted; "" if it is


def plan(files: list[Path], output: str) -> list[Task]:
    """Return every file's task. Raises ValueError for an invalid `-o`."""
    is_folder = Path(output or "-").is_dir() or output.endswith(("/", os.sep))
    if len(files) > 1 and not is_folder and Path(output).suffix in (".pt", ".pth", *KERAS_SUFFIXES):
        raise ValueError(f"-o {output}: expected a folder for several files")
    tasks, default = [], in_repository(DEFAULT_INPUT)
    for path in dict.fromkeys(files or [default]):
        to_keras = is_checkpoint(path)
        target = path.with_suffix(".h5" if to_keras else ".pt")
        if path.absolute() == default.absolute():
            target = path.with_name("resnet8.pt")
        if output:
            target = Path(output, target.name) if is_folder or len(files) > 1 else Path(output)
        reason, is_expected = refusal_of(path, target), to_keras == (target.suffix in KERAS_SUFFIXES)
        if not reason and (not is_expected or target.suffix.lower() in OTHER_SUFFIXES):
            expected = " or ".join(KERAS_SUFFIXES) if to_keras else ".pt"
            raise ValueError(f"-o {target}: expected {expected} as the output for {path}")
        tasks.append(Task(path, target, to_keras, is_tflite(path), reason))
    refuse_clashes(tasks)
    return tasks


def refusal_of(path: Path, output: Path) -> str:
    """Return why a file of this format is not converted, and the next step; "" if it may be."""
    readable = (*KERAS_FORMATS, *CHECKPOINT_FORMATS)
    if output.suffix not in KERAS_SUFFIXES:
        readable = (*readable, Format.TFLITE)
    try:
        found = detect_format(path)
        known = KNOWN_FILES.get(sha256_of(path)) if found in RUNTIME_FORMATS else None
    except OSError:  # it is read, and named, later
        return ""
    reason = refusal(found, readable, "expected a Keras file or a checkpoint")
    return f"{reason} ({known})" if reason and known else reason


def is_tflite(path: Path) -> bool:
    """Whether a file is TensorFlow Lite's, by its content."""
    with suppress(OSError):
        return detect_format(path) is Format.TFLITE
    return False


def refuse_clashes(tasks: list[Task]) -> None:
    """Refuse tasks with the same output, in place; each refusal names the others.

    Raises ValueError for an output that is an input.
    """
    active = [task for task in tasks if not task.refusal]
    written = {os.path.realpath(path) for task in active for path in (task.output, json_path(task.output))}
    if clash := written & {os.path.realpath(task.path) for task in tasks}:
        raise ValueError(f"{min(clash)} would overwrite an input; choose another -o")
    by_output = {}
    for task in active:
        by_output.setdefault(os.path.realpath(task.output), []).append(task)
    for same in by_output.values():
        for task in same if len(same) > 1 else ():
            others = ", ".join(str(each.path) for each in same if each is not task)
            reason = f"{task.output} is also the output of {others}; convert one alone, with another -o"
            tasks[tasks.index(task)] = task._replace(refusal=reason)
