"""Evaluate a ResNet8 checkpoint on CIFAR-10, against the Keras model that it was converted from.

    python evaluate.py [CHECKPOINT]

feeds every test image to the network, prints its accuracy beside Keras's, and writes metrics.txt and
metrics.json. Keras runs once: its probabilities are kept beside the checkpoint, and later runs need no
TensorFlow. `--compare OTHER.pt` evaluates other checkpoints alike: what did a change cost?
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import CLASS_NAMES, DataError, Dataset, load_test
from data.files import write_atomically, write_files
from models.worker import WorkerError

if TYPE_CHECKING:
    from rich.table import Table

    from models.resnet8 import ResNet8

# torch is imported where it is first needed: `--help` and a wrong option need none.

DEFAULT_CHECKPOINT = Path("checkpoints/resnet8.pt")

# BatchNorm may be folded into the convolutions, which is faster, as long as no probability is further than
# this from Keras's.
MAX_FOLDED_DIFFERENCE = 1e-5
SIGNIFICANCE = 0.05  # below this, a difference is more than chance
COLUMNS = 4  # models in one table: more do not fit 80 columns
SHORTFALL = 3  # the exit status for --min-accuracy and --max-drop


# --- 1. Metrics ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Predictions:
    """What one model makes of the images, and how fast."""

    name: str  # in tables: the file's name
    path: Path
    log_probabilities: np.ndarray  # (N, classes) float64
    labels: np.ndarray  # (N,) int64: the true classes
    throughput: dict | None = None  # None: Keras, whose speed is not measured here

    @cached_property
    def classes(self) -> np.ndarray:
        """The predicted classes, (N,) int64."""
        return self.log_probabilities.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """(N, classes) float64."""
        return np.exp(self.log_probabilities)

    @cached_property
    def metrics(self) -> dict:
        """Accuracy (fractions of 1), loss (mean cross-entropy, in nats), and the confusion matrix.

        Row i, column j of the matrix counts the images of class i that were taken for class j.
        """
        images, classes = self.log_probabilities.shape
        confusion = np.bincount(self.labels * classes + self.classes, minlength=classes**2)
        confusion = confusion.reshape(classes, classes)
        per_class = confusion.diagonal() / confusion.sum(axis=1)
        correct = int(confusion.trace())
        return {
            "accuracy": correct / images,
            "correct": correct,
            "confidence_interval_95": wilson_interval(correct, images),
            "loss": float(-self.log_probabilities[np.arange(images), self.labels].mean()),
            "per_class_accuracy": dict(zip(CLASS_NAMES, per_class.tolist(), strict=True)),
            "confusion_matrix": confusion.tolist(),
        }


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Return an accuracy's 95 % confidence interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    accuracy = correct / images
    center = accuracy + z**2 / (2 * images)
    margin = z * math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2))
    low, high = ((center + sign * margin) / (1 + z**2 / images) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return how likely two equally good models differ this much on the same images: McNemar's exact test.

    `only_first` images are right in the first model alone, `only_second` in the second alone; if the models
    are equally good, each of these is a toss of a coin. Two-sided (McNemar 1947, doi:10.1007/BF02295996).
    """
    tosses, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1  # ways to get 0 heads, 1 head, ... in so many tosses, as exact integers
    for heads in range(fewer):
        ways = ways * (tosses - heads) // (heads + 1)
        total += ways
    return min(1.0, 2 * total / 2**tosses)


def compare(first: Predictions, second: Predictions) -> dict:
    """Return how two models agree, image by image; differences are second minus first."""
    first_right, second_right = (model.classes == model.labels for model in (first, second))
    only_first, only_second = (
        int((first_right & ~second_right).sum()),
        int((second_right & ~first_right).sum()),
    )
    return {
        "models": [first.name, second.name],
        "same_prediction": int((first.classes == second.classes).sum()),
        "max_abs_probability_difference": float(np.abs(first.probabilities - second.probabilities).max()),
        "accuracy_difference": (only_second - only_first) / len(first.labels),
        "mcnemar_p": mcnemar_p(only_first, only_second),
    }


# --- 2. The checkpoint, and its inference ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A ResNet8, what it is to be fed, and what `convert.py` wrote about it."""

    path: Path
    model: ResNet8
    sha256: str
    mean: list[float]  # a value a channel, in pixel units: the network is fed (pixel - mean) / std
    std: list[float]
    metadata: dict  # of the JSON file beside it; {} if there is none

    @property
    def is_as_converted(self) -> bool:
        """Whether the file is the one that `convert.py` wrote with the JSON."""
        return self.metadata.get("sha256") == self.sha256


def load_checkpoint(path: Path, dataset: Dataset, notes: Notes) -> Checkpoint:
    """Load a checkpoint that fits the data. Raises OSError, or ValueError with one line."""
    from models.checkpoint import read_metadata
    from models.resnet8 import ResNet8

    model = ResNet8.from_checkpoint(path)
    metadata = read_metadata(path)
    channels, classes = model.conv1.in_channels, model.fc.out_features
    shape = [channels, *metadata.get("input", {}).get("shape", [None] * 3)[1:]]
    if any(size not in (None, needed) for size, needed in zip(shape, dataset.images.shape[1:], strict=True)):
        raise ValueError(
            f"{path}: takes images of shape {shape}, CIFAR-10's are {[*dataset.images.shape[1:]]}"
        )
    if classes != len(CLASS_NAMES):
        raise ValueError(f"{path}: has {classes} classes, CIFAR-10 has {len(CLASS_NAMES)}")

    described_in = path.with_suffix(".json")
    scaling = metadata.get("input", {})
    if "mean" not in scaling or "std" not in scaling:
        notes.add(f"{described_in} does not say what {path.name} is fed: pixels from 0 to 255 are assumed")
    mean, std = scaling.get("mean", [0.0] * channels), scaling.get("std", [1.0] * channels)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"{described_in}: input.{name} has {len(values)} values, expected {channels}")
    checkpoint = Checkpoint(path, model, sha256_of(path), mean, std, metadata)
    if "sha256" in metadata and not checkpoint.is_as_converted:
        notes.add(
            f"{path} has changed since {described_in.name} was written (fine-tuned?): its SHA-256 differs"
        )
    return checkpoint


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(
    checkpoint: Checkpoint,
    name: str,
    dataset: Dataset,
    options: argparse.Namespace,
    notes: Notes,
    fold: bool = False,
) -> Predictions:
    """Feed all images to the network, and measure how long that takes. Raises ValueError for NaN outputs."""
    import torch

    from models import inference

    device = inference.choose_device(options.device)
    model = inference.prepare(checkpoint.model, device, getattr(torch, options.dtype), fold)
    batch_size, workers = inference.batches_for(device)
    batch_size, workers = options.batch_size or batch_size, options.workers or workers
    scaling = checkpoint.mean, checkpoint.std
    start = time.perf_counter()
    logits = inference.predict(model, dataset.images, *scaling, batch_size, workers, progress_bar(name))
    seconds = time.perf_counter() - start
    if not np.isfinite(logits).all():
        raise ValueError(f"{checkpoint.path}: the network's outputs are NaN or infinite (in {options.dtype})")
    throughput = {
        "seconds": seconds,
        "images_per_second": len(logits) / seconds,
        "device": device.type,
        "dtype": options.dtype,
        "batch_size": batch_size,
        "workers": workers,
        "batch_norm_folded": fold,
    }
    predictions = Predictions(name, checkpoint.path, log_softmax(logits), dataset.labels, throughput)
    if predictions.metrics["accuracy"] < 2 / len(CLASS_NAMES):
        notes.add(
            f"{name} is near chance: most likely the input scaling is wrong. It is fed (pixel - mean) / std, "
            f"pixels 0 to 255, mean {checkpoint.mean}, std {checkpoint.std}. If it wants other inputs, "
            "convert it for them; for 0 to 1: python convert.py KERAS_FILE --mean 0 --std 255"
        )
    return predictions


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities of (N, classes) float64 logits."""
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


# --- 3. The Keras baseline -------------------------------------------------------------------------------


def find_baseline(checkpoint: Checkpoint, keras_file: Path | None, notes: Notes) -> Path | None:
    """Return the Keras file to compare with: `keras_file`, else the checkpoint's source if still there."""
    source = checkpoint.metadata.get("source", {})
    if keras_file:
        if source.get("sha256") != sha256_of(keras_file):
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


def keras_predictions(
    keras_file: Path, checkpoint: Checkpoint, dataset: Dataset, python: str, notes: Notes
) -> Predictions:
    """Return what the Keras model makes of the images: as kept beside the checkpoint, or from Keras itself.

    Kept are Keras's probabilities and the key that they belong to: SHA-256 of the Keras file and of the
    images, and what the Keras model is fed. Raises KerasFileError or WorkerError with one line.
    """
    # what the Keras model is fed differs from what ours is fed when the scaling is a layer of the Keras model
    scaling = checkpoint.metadata.get("source", {}).get("input", {})
    mean, std = scaling.get("mean", checkpoint.mean), scaling.get("std", checkpoint.std)
    key = json.dumps({"keras": sha256_of(keras_file), "images": dataset.sha256, "mean": mean, "std": std})
    cache = checkpoint.path.with_suffix(".keras.npz")
    shape = (len(dataset.labels), len(CLASS_NAMES))
    probabilities = read_cache(cache, key, shape, notes)
    if probabilities is None:
        notes.add(f"asking Keras about {shape[0]:,} images, once: {cache} keeps the answer")
        bn_eps = checkpoint.model.bn1.eps  # weights alone do not say it
        probabilities = ask_keras(keras_file, bn_eps, dataset.images, mean, std, python)
        if probabilities.shape != shape or not np.isfinite(probabilities).all():
            raise ValueError(
                f"{keras_file}: gives {probabilities.shape[1:]} values an image, or NaN; expected {shape[1]}"
            )
        try:
            content = {"key": np.array(key), "probabilities": probabilities}
            write_atomically(cache, lambda file: np.savez(file, **content))
        except OSError as error:
            notes.add(f"{cache} cannot be written: {error.strerror}; the next run will ask Keras again")
    # A float32 probability can be too small to be told from 0.
    log_probabilities = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny))
    return Predictions("Keras", keras_file, log_probabilities, dataset.labels)


def read_cache(cache: Path, key: str, shape: tuple[int, int], notes: Notes) -> np.ndarray | None:
    """Return the float32 probabilities kept in `cache`; None if damaged or kept under another `key`."""
    if not cache.exists():
        return None
    try:
        with np.load(cache, allow_pickle=False) as content:
            if str(content["key"]) != key:
                notes.add(f"{cache} is of another Keras file, other images or another scaling: made again")
                return None
            probabilities = content["probabilities"]  # the zip file's checksum is compared here
        if probabilities.shape != shape or probabilities.dtype != np.float32:
            raise ValueError
        return probabilities
    except Exception:  # np.load raises whatever the damage leads to
        notes.add(f"{cache} is damaged: made again")
        return None


def ask_keras(
    keras_file: Path, bn_eps: float, images: np.ndarray, mean: list, std: list, python: str
) -> np.ndarray:
    """Return Keras's (N, classes) float32 probabilities of (N, C, H, W) uint8 images."""
    from models.keras_file import read_keras_file, start_reader
    from models.keras_process import KerasProcess

    with start_reader() as reader, KerasProcess(python) as keras:
        file = read_keras_file(keras_file, reader, bn_eps)
        first = file.layers[0].config
        takes = tuple((first.get("batch_shape") or first["batch_input_shape"])[1:])
        needed = (images.shape[2], images.shape[3], images.shape[1])
        if any(n not in (None, m) for n, m in zip(takes, needed, strict=True)):
            raise ValueError(f"{keras_file}: takes {takes} images, CIFAR-10's are {needed}")
        keras.load(file)
        outputs = keras.predict(images, mean, std)
    return (
        outputs
        if file.returns_probabilities
        else np.exp(log_softmax(outputs.astype(np.float64))).astype(np.float32)
    )


# --- 4. What is printed and written ----------------------------------------------------------------------


@dataclass
class Notes:
    """Lines for the user, printed as they come up and kept for metrics.txt and metrics.json."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Print a line and keep it, once."""
        if line not in self.lines:
            self.lines.append(line)
            print(f"note: {line}", flush=True)


def progress_bar(description: str) -> object:
    """Return the `track` of `models.inference.predict`: a progress bar on a terminal, none elsewhere."""
    if not sys.stderr.isatty():
        return lambda batches, total: batches

    def track(batches: Iterable, total: int) -> Iterable:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import track

        return track(batches, escape(description), total, console=Console(stderr=True), transient=True)

    return track


def models_table(models: list[Predictions]) -> Table:
    """Return the table with one column a model, at most 80 columns wide for COLUMNS models."""
    from rich.table import Table

    def percent(fraction: float) -> str:
        return f"{100 * fraction:.2f} %"

    metrics = [model.metrics for model in models]
    table = Table("", box=None, padding=(0, 2, 0, 0), show_edge=False)
    for model in models:
        table.add_column(model.name, justify="right", overflow="fold", max_width=52 // len(models))
    table.add_row("accuracy", *(percent(m["accuracy"]) for m in metrics), style="bold")
    intervals = [[100 * bound for bound in m["confidence_interval_95"]] for m in metrics]
    table.add_row("95 % interval", *(f"{low:.2f}-{high:.2f}" for low, high in intervals))
    table.add_row("correct", *(f"{m['correct']:,}" for m in metrics))
    table.add_row("loss (cross-entropy)", *(f"{m['loss']:.4f}" for m in metrics), end_section=True)
    for name in CLASS_NAMES:
        table.add_row(f"  {name}", *(percent(m["per_class_accuracy"][name]) for m in metrics))
    speeds = [model.throughput or {} for model in models]
    table.add_row("seconds", *(f"{s['seconds']:.2f}" if s else "" for s in speeds))
    table.add_row("images per second", *(f"{s['images_per_second']:,.0f}" if s else "" for s in speeds))
    folded = [("yes" if s["batch_norm_folded"] else "no") if s else "" for s in speeds]
    table.add_row("BatchNorm folded", *folded)
    return table


def pairs_table(pairs: list[dict]) -> Table:
    """Return the table with one row for each two models, at most 80 columns wide."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("", overflow="fold", max_width=24)
    table.add_column("images with\nsame class", justify="right")
    table.add_column("accuracy,\npoints", justify="right")
    table.add_column("probability,\nat most", justify="right")
    table.add_column("McNemar's\ntest")
    for pair in pairs:
        first, second = pair["models"]
        p = pair["mcnemar_p"]
        table.add_row(
            f"{second} vs {first}",
            f"{pair['same_prediction']:,}",
            f"{100 * pair['accuracy_difference']:+.2f}",
            f"{pair['max_abs_probability_difference']:.1e}",
            f"p = {p:.2f}: chance" if p >= SIGNIFICANCE else f"p = {p:.1e}",
        )
    return table


def confusion_text(model: Predictions) -> str:
    """Return the confusion matrix, one row a true class, 73 columns wide."""
    lines = [f"Confusion matrix of {model.name} (row: true class, column: predicted class)", ""]
    lines.append(" " * 12 + "".join(f"{name[:5]:>6}" for name in CLASS_NAMES))
    for name, row in zip(CLASS_NAMES, model.metrics["confusion_matrix"], strict=True):
        lines.append(f"{name:12}" + "".join(f"{count:6,}" for count in row))
    return "\n".join(lines)


def as_text(tables: list[Table]) -> str:
    """Return tables as plain text, 80 columns wide, an empty line between them."""
    from rich.console import Console

    texts = []
    for table in tables:
        console = Console(
            file=io.StringIO(), width=80, color_system=None, markup=False, emoji=False, highlight=False
        )
        console.print(table)
        texts.append("\n".join(line.rstrip() for line in console.file.getvalue().splitlines()))
    return "\n\n".join(texts)


def write_results(
    options: argparse.Namespace,
    dataset: Dataset,
    checkpoint: Checkpoint,
    keras: Predictions | None,
    ours: Predictions,
    others: list[Predictions],
    notes: Notes,
) -> None:
    """Print the tables; write metrics.txt, metrics.json and with `--report` report.png."""
    models = [*([keras] if keras else []), ours, *others]
    pairs = [compare(first, second) for first, second in itertools.combinations(models, 2)]
    title = f"ResNet8 on the {dataset.name}, {len(dataset.labels):,} images"
    tables = [models_table(models[i : i + COLUMNS]) for i in range(0, len(models), COLUMNS)]
    tables += [pairs_table(pairs)] if pairs else []
    summary = f"{title}\n\n{as_text(tables)}\n"
    print(f"\n{summary}")

    def results(model: Predictions) -> dict:
        return {"checkpoint": str(model.path), **model.metrics, "throughput": model.throughput}

    agreement = compare(keras, ours) if keras else None
    metrics = {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "dataset": {"name": dataset.name, "images": len(dataset.labels), "sha256": dataset.sha256},
        "input": {"mean": checkpoint.mean, "std": checkpoint.std},
        "pytorch": ours.metrics,
        "keras": keras and {"file": str(keras.path), **keras.metrics},
        "agreement": agreement,
        "throughput": ours.throughput,
        "compared": [results(model) for model in others],
        "pairs": pairs,
        "notes": notes.lines,
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    lines = [
        summary,
        *(confusion_text(model) + "\n" for model in models),
        *(f"note: {n}" for n in notes.lines),
    ]
    contents = {
        "metrics.txt": "\n".join(lines).rstrip() + "\n",
        "metrics.json": json.dumps(metrics, indent=2, allow_nan=False) + "\n",
    }
    writers = {
        options.output / name: lambda file, text=text: file.write(text.encode())
        for name, text in contents.items()
    }
    if options.report:
        from models.report import draw_report

        reference = keras or next(iter(others), None)
        writers[options.output / "report.png"] = lambda file: draw_report(
            file, title, dataset, ours, reference
        )
    write_files(writers)
    print(f"wrote {', '.join(map(str, writers))}")


def environment() -> dict:
    """Return what the figures may depend on."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
    }


# --- 5. The command --------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate the checkpoints of the command line, print and write the results, return the exit status."""
    notes = Notes()
    dataset = load_test(options.data_dir, options.data, options.download)
    if dataset.notice:
        notes.add(dataset.notice)
    name, *other_names = short_names([options.checkpoint, *options.compare])
    checkpoint = load_checkpoint(options.checkpoint, dataset, notes)
    # One at a time, so that memory does not grow; before Keras, so that a bad one shows early.
    compared = [
        run(load_checkpoint(path, dataset, notes), other_name, dataset, options, notes)
        for path, other_name in zip(options.compare, other_names, strict=True)
    ]

    keras_file = None if options.no_keras else find_baseline(checkpoint, options.keras, notes)
    if options.max_drop is not None and not keras_file and not compared:
        raise ValueError("--max-drop: there is neither a Keras baseline nor a --compare to measure a drop by")
    keras = None
    if keras_file:
        keras = keras_predictions(keras_file, checkpoint, dataset, options.keras_python, notes)

    # Folding BatchNorm changes the rounding, so it takes a reference to hold it to. Checkpoints that are
    # compared are all run alike: not folded.
    fold = bool(keras) and checkpoint.is_as_converted and not compared and options.dtype == "float32"
    ours = run(checkpoint, name, dataset, options, notes, fold)
    if fold and compare(keras, ours)["max_abs_probability_difference"] > MAX_FOLDED_DIFFERENCE:
        notes.add(
            f"folded, a probability was {MAX_FOLDED_DIFFERENCE:g} or more from Keras's: unfolded instead"
        )
        ours = run(checkpoint, name, dataset, options, notes)
    write_results(options, dataset, checkpoint, keras, ours, compared, notes)

    reference, shortfalls = keras or ours, []
    for model in (ours, *compared):
        accuracy = model.metrics["accuracy"]
        drop = (reference.metrics["correct"] - model.metrics["correct"]) / len(dataset.labels)
        if options.min_accuracy is not None and accuracy < options.min_accuracy:
            shortfalls.append(
                f"{model.name}: accuracy {accuracy:.4f}, --min-accuracy {options.min_accuracy:g}"
            )
        if options.max_drop is not None and drop > options.max_drop:
            shortfalls.append(
                f"{model.name}: accuracy {drop:.4f} below {reference.name}, --max-drop {options.max_drop:g}"
            )
    for shortfall in shortfalls:
        print(f"shortfall: {shortfall}", file=sys.stderr)
    return SHORTFALL if shortfalls else 0


def short_names(paths: list[Path]) -> list[str]:
    """Return the files' names; the whole paths of those whose names are not unique."""
    return [str(path) if [p.name for p in paths].count(path.name) > 1 else path.name for path in paths]


def parse_arguments() -> argparse.Namespace:
    """Return the command line; exits with status 2 when it makes no sense."""

    def count(text: str) -> int:
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    def fraction(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to 1 (0.87 is 87 %)")
        return value

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "checkpoint",
        nargs="?",
        type=Path,
        default=DEFAULT_CHECKPOINT,
        help=f"a .pt file ({DEFAULT_CHECKPOINT})",
    )
    add("--compare", metavar="OTHER.pt", type=Path, nargs="+", default=[], help="evaluate these beside it")
    add("--data-dir", metavar="DIR", type=Path, default=Path("data"), help="where CIFAR-10 is (data)")
    add("--data", choices=("auto", "full", "sample"), default="auto", help="the test set, or 1,000 of it")
    add("--download", action="store_true", help="download the test set into --data-dir if it is not there")
    add("--keras", metavar="KERAS_FILE", type=Path, help="the baseline (the file that CHECKPOINT came from)")
    add("--no-keras", action="store_true", help="no baseline")
    add(
        "--keras-python",
        metavar="PYTHON",
        default=sys.executable,
        help="the Python that has Keras (this one)",
    )
    add("--batch-size", metavar="N", type=count, help="images at a time (CPU: 32, else 1024)")
    add("--workers", metavar="N", type=count, help="threads that run a batch each (CPU: one a core, else 1)")
    add("--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="(float32)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(auto: the fastest)")
    add(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("results"),
        help="for metrics.txt and .json (results)",
    )
    add("--report", action="store_true", help="draw report.png too")
    add("--min-accuracy", metavar="A", type=fraction, help="exit with status 3 below this fraction")
    add(
        "--max-drop",
        metavar="D",
        type=fraction,
        help="exit with status 3 if further below Keras, or CHECKPOINT",
    )
    options = parser.parse_args()
    if options.keras and options.no_keras:
        parser.error("--keras and --no-keras exclude each other")
    if options.max_drop is not None and options.no_keras and not options.compare:
        parser.error("--max-drop needs a Keras baseline or a --compare to measure a drop by")
    return options


def main() -> int:
    """Evaluate; return the exit status."""
    options = parse_arguments()
    try:
        return evaluate(options)
    except WorkerError as error:
        print(error.log, file=sys.stderr, end="")
        message = f"{error}; --no-keras evaluates without the baseline"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        if error.filename == str(DEFAULT_CHECKPOINT):
            message += "; python convert.py makes it"
    except (DataError, ValueError) as error:
        message = str(error)
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
