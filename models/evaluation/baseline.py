"""Predictions of the Keras model: computed by Keras once, then read from a cache beside its file."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import Dataset
from models.common.cli import KerasFileError, Notes
from models.common.files import json_path, metadata_if_current, read_regular, sha256_of, write_atomically
from models.evaluation.metrics import Predictions, check_outputs, log_softmax
from models.normalization import Normalization

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.keras.file import KerasFile


def keras_baseline(
    checkpoint: Checkpoint,
    keras_file: Path | None,
    origins: dict[str, str | None],
    dataset: Dataset,
    python: str,
    notes: Notes,
) -> Predictions | None:
    """Return the predictions of the Keras file that `find_baseline` finds, if any.

    `origins` has the SHA-256 of the file that each model was converted from, by name, the checkpoint's first.
    `python` is the program that runs Keras. Raises KerasFileError, ValueError or JobError with one line.
    """
    keras_file = find_baseline(checkpoint, keras_file, notes)
    if keras_file is None:
        return None
    sha256 = sha256_of(keras_file)
    others = [name for name, origin in origins.items() if origin not in (None, sha256)]
    for other in others:
        if other != next(iter(origins)):  # `find_baseline` has checked the checkpoint
            notes.add(f"{other} was not converted from {keras_file}: the baseline is another model")
    name = f"Keras {keras_file.name}" if others else "Keras"
    normalization = keras_normalization(checkpoint, keras_file, sha256)
    key = {"keras": sha256, "images": dataset.sha256, **asdict(normalization), "bn_eps": checkpoint.bn_eps}
    cache_name = f"{keras_file.stem}.keras-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.npz"
    # beside the checkpoint if the Keras file's folder cannot be written
    caches = [folder / cache_name for folder in (keras_file.parent, checkpoint.path.parent)]
    cached = next(filter(None, (read_cache(path, dataset, notes) for path in caches)), None)
    if cached is None:
        notes.add(f"running Keras on {len(dataset):,} images; predictions are cached in {caches[0]}")
        logits, file_format = run_keras(keras_file, checkpoint.bn_eps, dataset.images, normalization, python)
        check_outputs(keras_file, logits, dataset)
        cached = log_softmax(logits), file_format
        write_cache(caches, *cached, notes)
    return Predictions(name, keras_file, cached[0], dataset.labels, normalization, format=cached[1])


def find_baseline(checkpoint: Checkpoint, keras_file: Path | None, notes: Notes) -> Path | None:
    """Return `keras_file`, else the file that the checkpoint was converted from.

    A note gives the reason for None (no such file, or changed), and names a `keras_file` of another model.
    """
    if keras_file:
        sha256 = sha256_of(keras_file)
        source = metadata_if_current(keras_file, sha256).get("source", {})
        if checkpoint.origin not in (None, sha256) and source.get("sha256") != checkpoint.sha256:
            notes.add(f"{checkpoint.path} was not converted from {keras_file}: the baseline is another model")
        return keras_file
    source, json_file = checkpoint.metadata.get("source", {}), json_path(checkpoint.path)
    path = json_file.parent / source.get("file", "")
    try:
        if "file" not in source or "sha256" not in source:
            problem = f"no source file in {json_file}"
        elif sha256_of(path) == source["sha256"]:
            return path
        else:
            problem = f"{path} is not the file that {checkpoint.path} was converted from"
    except OSError as error:
        problem = f"{path}, the source of {checkpoint.path}: {error.strerror}"
    notes.add(f"no Keras baseline: {problem}; --keras FILE selects one")
    return None


def keras_normalization(checkpoint: Checkpoint, keras_file: Path, sha256: str) -> Normalization:
    """Return the input normalization of a Keras file: the checkpoint's, unless a Keras layer normalizes.

    The file's JSON has it, or the checkpoint's JSON if that was converted from this file. Otherwise the file
    is read: pixels 0-255 if it has a layer that normalizes. Raises KerasFileError or ValueError.
    """
    pytorch, source = checkpoint.normalization, checkpoint.metadata.get("source", {})
    written = metadata_if_current(keras_file, sha256)  # if convert.py wrote the file
    described, origin = written.get("input", {}), written.get("source", {})
    is_same = (
        origin.get("sha256") == checkpoint.sha256 and origin.get("input", {}).items() <= described.items()
    )
    if is_same and not checkpoint.assumes_normalization:  # an option overrides both
        return pytorch
    if not described and source.get("sha256") == sha256:
        described = source.get("input", {})
    if not described and not pytorch.is_identity:
        from models.graph import INPUT_NORMALIZATION

        layers = read_file(keras_file, checkpoint.bn_eps).layers
        if any(layer.class_name in INPUT_NORMALIZATION for layer in layers):
            return Normalization.from_args(len(pytorch.mean))
    return Normalization.from_json({**asdict(pytorch), **described}, len(pytorch.mean))


def read_cache(path: Path, dataset: Dataset, notes: Notes) -> tuple[np.ndarray, str] | None:
    """Return the cached log-probabilities and Keras format; None if missing or damaged."""
    if not path.exists():
        return None
    with suppress(Exception):  # damage raises anything
        with np.load(io.BytesIO(read_regular(path)), allow_pickle=False) as arrays:
            log_probabilities, file_format = arrays["log_probabilities"], str(arrays["format"])
        check_outputs(path, log_probabilities, dataset)
        if log_probabilities.dtype == np.float64 and file_format.isprintable():
            return log_probabilities, file_format
    notes.add(f"{path} is damaged")
    return None


def write_cache(paths: list[Path], log_probabilities: np.ndarray, file_format: str, notes: Notes) -> None:
    """Write the cache to the first writable path; add a note if there is none."""
    arrays = {"log_probabilities": log_probabilities, "format": np.array(file_format)}
    for path in paths:
        try:
            write_atomically(path, lambda file: np.savez(file, **arrays))
            return
        except OSError as error:
            problem = f"{path} cannot be written: {error.strerror}"
    notes.add(f"no cache of Keras's predictions: {problem}")


def read_file(keras_file: Path, bn_eps: float) -> KerasFile:
    """Read a Keras file. Raises KerasFileError, which names it, also for an input that is no image."""
    from models.conversion.match import place_weights
    from models.keras.file import read_keras_file

    try:
        file = place_weights(read_keras_file(keras_file), bn_eps)
        _ = file.input_shape  # raises
        return file
    except KerasFileError as error:
        raise KerasFileError(f"{keras_file}: {error}") from None


def run_keras(
    keras_file: Path, bn_eps: float, images: np.ndarray, normalization: Normalization, python: str
) -> tuple[np.ndarray, str]:
    """Return Keras's (N, classes) float32 logits for (N, C, H, W) uint8 pixels, and the file's format.

    `bn_eps` is for weights alone, which lack it. Raises as `keras_baseline` does.
    """
    from models.keras.reference import Keras  # a run that finds a cache does not need it

    file = read_file(keras_file, bn_eps)
    input_shape = tuple(file.input_shape)
    expected = (images.shape[2], images.shape[3], images.shape[1])
    if any(size not in (None, side) for size, side in zip(input_shape, expected, strict=True)):
        raise ValueError(f"{keras_file}: takes {input_shape} images, CIFAR-10's are {expected}")
    with Keras(python) as keras:  # takes seconds to start, so only for a readable file
        # without the softmax, which underflows to 0 in float32
        softmax = file.output_layer if file.returns_probabilities else None
        return keras.predict(file, images, normalization, logits_of=softmax), file.format
