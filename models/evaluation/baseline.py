"""What the Keras model makes of the images: asked of Keras once, and kept beside the checkpoint."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from data.files import read_regular, sha256_of, write_atomically
from models.common.errors import KerasFileError, printable
from models.common.terminal import Notes
from models.evaluation.metrics import Predictions
from models.files.metadata import written_metadata
from models.scaling import Scaling

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

ANSWERS = {  # kept beside the Keras file, by the part of the test set
    "": ".keras.npz",
    "sample": ".keras-sample.npz",
    "perf": ".keras-perf.npz",
    "calibration": ".keras-calibration.npz",
}


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
    else:
        try:
            if sha256_of(path) == source["sha256"]:
                return path
            problem = f"{path} is not what {checkpoint.path.name} was converted from: its SHA-256 differs"
        except OSError as error:
            problem = f"{path}, the source in {described_in.name}, cannot be read: {error.strerror}"
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
    """Return what the Keras model makes of the images: as kept beside its file, or from Keras itself.

    Kept are Keras's logits and the key that they belong to: SHA-256 of the Keras file and of the images, and
    what the Keras model is fed. They lie beside the Keras file, for all checkpoints that are compared with
    it, or beside the checkpoint, where its folder cannot be written. `python` is the program that runs Keras.
    Raises KerasFileError, ValueError or WorkerError with one line.
    """
    sha256, bn_eps = sha256_of(keras_file), checkpoint.bn_eps  # weights alone do not say it
    # what `convert.py` says of a Keras file that it wrote, or else of the file that it read
    scaling = checkpoint.keras_scaling.updated(written_metadata(keras_file, sha256).get("input", {}))
    key = {"keras": sha256, "images": dataset.sha256, **asdict(scaling), "bn_eps": bn_eps}
    key = json.dumps(key)
    suffix = ANSWERS[dataset.part]
    places = list(dict.fromkeys(path.with_suffix(suffix) for path in (keras_file, checkpoint.path)))
    shape = (len(dataset.labels), len(CLASS_NAMES))
    found = next(filter(None, (read_answers(place, key, shape, notes) for place in places)), None)
    if found is None:
        notes.add(f"asking Keras about {shape[0]:,} images, once: {places[0]} keeps the answer")
        logits, form = ask_keras(keras_file, bn_eps, dataset.images, scaling, python)
        if logits.shape != shape or not np.isfinite(logits).all():
            raise ValueError(
                f"{keras_file}: gives {logits.shape[1:]} values an image, or NaN; expected {shape[1]}"
            )
        found = log_softmax(logits), form
        kept = {"probabilities": np.exp(found[0]).astype(np.float32), "logits": logits}
        keep_answers(places, {"key": np.array(key), "format": np.array(form), **kept}, notes)
    log_probabilities, form = found
    if not form and checkpoint.origin == sha256:  # answers kept by an earlier version do not say it
        form = printable(str(checkpoint.metadata["source"].get("format", "")))
    return Predictions(name, keras_file, log_probabilities, dataset.labels, scaling, format=form)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the float64 logarithms of the probabilities of (N, classes) logits."""
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def read_answers(path: Path, key: str, shape: tuple[int, int], notes: Notes) -> tuple[np.ndarray, str] | None:
    """Return the log-probabilities kept in a file, and the Keras file's format; None if there are none.

    There are none where the file is damaged, or kept under another `key`.
    """
    if not path.exists():
        return None
    try:
        kept = io.BytesIO(read_regular(path))
        with zipfile.ZipFile(kept) as archive:  # np.load does not always compare the checksums
            if archive.testzip():
                raise ValueError
        kept.seek(0)
        with np.load(kept, allow_pickle=False) as content:
            if str(content["key"]) != key:
                notes.add(f"{path} is of another Keras file, other images or another scaling: made again")
                return None
            has_logits = (
                "logits" in content
            )  # answers that earlier versions kept have none, and may lack a format
            form = str(content["format"]) if has_logits or "format" in content else ""
            kept = content["logits" if has_logits else "probabilities"]
        if kept.shape != shape or kept.dtype != np.float32 or not form.isprintable():
            raise ValueError
        # a float32 probability can be too small to be told from 0
        tiny = np.finfo(np.float32).tiny
        return log_softmax(kept) if has_logits else np.log(np.maximum(kept.astype(np.float64), tiny)), form
    except Exception:  # np.load raises whatever the damage leads to
        notes.add(f"{path} is damaged: made again")
        return None


def keep_answers(places: list[Path], content: dict[str, np.ndarray], notes: Notes) -> None:
    """Write Keras's answers to the first of the places that can be written and holds nothing of others."""
    problems = []
    for path in places:
        try:
            if is_foreign(path):
                problems.append(f"{path} is not of evaluate.py's writing")
                continue
            write_atomically(path, lambda file: np.savez(file, **content))
            return
        except OSError as error:
            problems.append(f"{path} cannot be written: {error.strerror}")
    notes.add(f"{'; '.join(problems)}; the next run will ask Keras again")


def is_foreign(path: Path) -> bool:
    """Return whether a file is there that Keras's answers, damaged or not, cannot be."""
    if not path.is_file():
        return False
    start = read_regular(path, 2)
    if start != b"PK":
        return start != b""
    try:
        with np.load(path, allow_pickle=False) as content:
            return "key" not in content
    except Exception:  # whatever the damage leads to
        return False


def ask_keras(
    keras_file: Path, bn_eps: float, images: np.ndarray, scaling: Scaling, python: str
) -> tuple[np.ndarray, str]:
    """Return Keras's (N, classes) float32 logits of (N, C, H, W) uint8 images, and the file's format.

    `bn_eps` is for a file of weights alone, which does not say it. Raises as `keras_predictions` does.
    """
    # a run that finds the answer kept needs none of these
    from models.conversion.placing import with_graph
    from models.keras.file import read_keras_file, start_reader
    from models.keras.process import KerasProcess

    with start_reader() as reader:
        try:
            file = with_graph(read_keras_file(keras_file, reader), bn_eps)
            takes = tuple(file.input_shape)
        except KerasFileError as error:  # which does not name the file
            raise KerasFileError(f"{keras_file}: {error}") from None
    needed = (images.shape[2], images.shape[3], images.shape[1])
    if any(n not in (None, m) for n, m in zip(takes, needed, strict=True)):
        raise ValueError(f"{keras_file}: takes {takes} images, CIFAR-10's are {needed}")
    with KerasProcess(python) as keras:  # seconds to start, so once the file is known to be right
        keras.load(file)
        softmax = file.output_layer if file.returns_probabilities else None
        return keras.predict(images, scaling, logits_of=softmax), file.format
