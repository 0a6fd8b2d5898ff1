"""What the Keras model makes of the images: asked of Keras once, and kept beside the checkpoint."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from data.files import sha256_of, write_atomically
from models.common.errors import KerasFileError
from models.common.terminal import Notes
from models.evaluation.metrics import Predictions
from models.files.metadata import written_metadata
from models.scaling import Scaling

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

ANSWERS, SAMPLE_ANSWERS = ".keras.npz", ".keras-sample.npz"  # kept beside the checkpoint, by the images


def find_baseline(checkpoint: Checkpoint, keras_file: Path | None, notes: Notes) -> Path | None:
    """Return the Keras file to compare with: `keras_file`, else the checkpoint's source if still there."""
    source = checkpoint.metadata.get("source", {})
    if keras_file:
        sha256 = sha256_of(keras_file)
        back = written_metadata(keras_file, sha256).get("source", {}).get("sha256")  # what it was made from
        if checkpoint.origin not in (None, sha256) and back != checkpoint.sha256:
            notes.add(f"{keras_file} is not the file that {checkpoint.path} was converted from")
        return keras_file
    described_in = checkpoint.path.with_suffix(".json")
    path = described_in.parent / source.get("file", "")
    if "file" not in source or "sha256" not in source:
        problem = f"{described_in} names no source file"
    elif not path.is_file():
        problem = f"{path}, the source in {described_in.name}, is not there"
    elif sha256_of(path) != source["sha256"]:
        problem = f"{path} is not what {checkpoint.path.name} was converted from: its SHA-256 differs"
    else:
        return path
    notes.add(f"no Keras baseline: {problem}; --keras FILE names one")
    return None


def keras_baseline(
    checkpoint: Checkpoint,
    keras_file: Path | None,
    origins: dict[str, str | None],
    dataset: Dataset,
    python: str,
    notes: Notes,
) -> Predictions | None:
    """Return what the Keras model makes of the images, if there is one to compare with.

    `origins` has the SHA-256 of the file that each checkpoint was converted from, by name, ours first.
    """
    keras_file = find_baseline(checkpoint, keras_file, notes)
    if keras_file is None:
        return None
    name = baseline_name(keras_file, next(iter(origins)), origins, notes)
    return keras_predictions(name, keras_file, checkpoint, dataset, python, notes)


def baseline_name(keras_file: Path, ours: str, origins: dict[str, str | None], notes: Notes) -> str:
    """Return what the baseline is called: "Keras", with its file if a checkpoint comes from another.

    `origins` has the SHA-256 of the file that each checkpoint was converted from, by name, None where it is
    not known. A note names each of them, but `ours`, that comes from another.
    """
    known = (None, sha256_of(keras_file))
    strangers = [name for name, origin in origins.items() if origin not in known]
    for stranger in strangers:
        if stranger != ours:
            notes.add(
                f"{stranger} was converted from another file than {keras_file.name}: their difference is one "
                "of two models, not of a conversion"
            )
    return f"Keras {keras_file.name}" if strangers else "Keras"


def keras_predictions(
    name: str,
    keras_file: Path,
    checkpoint: Checkpoint,
    dataset: Dataset,
    python: str,
    notes: Notes,
) -> Predictions:
    """Return what the Keras model makes of the images: as kept beside the checkpoint, or from Keras itself.

    Kept are Keras's probabilities and the key that they belong to: SHA-256 of the Keras file and of the
    images, and what the Keras model is fed. `python` is the program that runs Keras. Raises KerasFileError,
    ValueError or WorkerError with one line.
    """
    scaling, bn_eps = checkpoint.keras_scaling, checkpoint.model.bn1.eps  # weights alone do not say it
    sha256 = sha256_of(keras_file)
    key = {"keras": sha256, "images": dataset.sha256, **asdict(scaling), "bn_eps": bn_eps}
    key = json.dumps(key)
    cache = checkpoint.path.with_suffix(SAMPLE_ANSWERS if dataset.is_sample else ANSWERS)
    shape = (len(dataset.labels), len(CLASS_NAMES))
    probabilities, form = read_cache(cache, key, shape, notes) or (None, "")
    if probabilities is None:
        notes.add(f"asking Keras about {shape[0]:,} images, once: {cache} keeps the answer")
        probabilities, form = ask_keras(keras_file, bn_eps, dataset.images, scaling, python)
        if probabilities.shape != shape or not np.isfinite(probabilities).all():
            raise ValueError(
                f"{keras_file}: gives {probabilities.shape[1:]} values an image, or NaN; expected {shape[1]}"
            )
        try:
            content = {"key": np.array(key), "probabilities": probabilities, "format": np.array(form)}
            write_atomically(cache, lambda file: np.savez(file, **content))
        except OSError as error:
            notes.add(f"{cache} cannot be written: {error.strerror}; the next run will ask Keras again")
    if not form and checkpoint.origin == sha256:  # answers kept by an earlier version do not say it
        form = checkpoint.metadata["source"].get("format", "")
    # A float32 probability can be too small to be told from 0.
    log_probabilities = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
    return Predictions(name, keras_file, log_probabilities, dataset.labels, scaling, format=form)


def read_cache(cache: Path, key: str, shape: tuple[int, int], notes: Notes) -> tuple[np.ndarray, str] | None:
    """Return `ask_keras`'s answer as kept in `cache`; None if damaged or kept under another `key`."""
    if not cache.exists():
        return None
    try:
        with zipfile.ZipFile(cache) as archive:  # np.load does not always compare the checksums
            if archive.testzip():
                raise ValueError
        with np.load(cache, allow_pickle=False) as content:
            if str(content["key"]) != key:
                notes.add(f"{cache} is of another Keras file, other images or another scaling: made again")
                return None
            probabilities = content["probabilities"]
            form = str(content["format"]) if "format" in content else ""  # earlier answers have none
        if probabilities.shape != shape or probabilities.dtype != np.float32 or not form.isprintable():
            raise ValueError
        return probabilities, form
    except Exception:  # np.load raises whatever the damage leads to
        notes.add(f"{cache} is damaged: made again")
        return None


def ask_keras(
    keras_file: Path, bn_eps: float, images: np.ndarray, scaling: Scaling, python: str
) -> tuple[np.ndarray, str]:
    """Return Keras's (N, classes) float32 probabilities of (N, C, H, W) uint8 images, and the file's format.

    `bn_eps` is for a file of weights alone, which does not say it. Raises as `keras_predictions` does.
    """
    # a run that finds the answer kept needs none of these
    import torch

    from models.conversion.placing import with_graph
    from models.keras.file import read_keras_file, start_reader
    from models.keras.process import KerasProcess

    with start_reader() as reader, KerasProcess(python) as keras:
        try:
            file = with_graph(read_keras_file(keras_file, reader), bn_eps)
            takes = tuple(file.input_shape)
        except KerasFileError as error:  # which does not name the file
            raise KerasFileError(f"{keras_file}: {error}") from None
        needed = (images.shape[2], images.shape[3], images.shape[1])
        if any(n not in (None, m) for n, m in zip(takes, needed, strict=True)):
            raise ValueError(f"{keras_file}: takes {takes} images, CIFAR-10's are {needed}")
        keras.load(file)
        outputs = keras.predict(images, scaling)
    if not file.returns_probabilities:
        outputs = torch.from_numpy(outputs.astype(np.float64)).softmax(dim=1).float().numpy()
    return outputs, file.format
