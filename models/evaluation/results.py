"""Results of an evaluation: the tables on the terminal, metrics.txt, metrics.json and report.png."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.cifar10 import Dataset, calibration_indices
from models.common.cli import format_table, printable
from models.common.files import check_writable, read_regular, sha256_of, write_files
from models.evaluation.metrics import Comparison, Predictions, compare, difference_text, p_text

RESULTS = ("metrics.txt", "metrics.json", "report.png")
KEYS = {"checkpoint", "checkpoint_sha256", "dataset", "pytorch", "pairs"}  # of metrics.json, among others
LONGEST_NAME = 28  # characters, so that the tables fit 80 columns
MANY = 20  # models; of more, each is compared with Keras and CHECKPOINT only: a pair takes 6 ms
HEADINGS = ["model", "accuracy\n%", "95 %\nCI", "same\nclass", "McNemar\np", "largest\ndifference"]
HEADINGS += ["AUC", "loss\nnats", "size\nkB", "images\nper s", "format"]  # in a second table


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that was measured."""

    dataset: Dataset
    ours: Predictions  # CHECKPOINT's
    keras: Predictions | None
    compared: list[Predictions]  # the other files'
    hashes: list[str]  # SHA-256 of CHECKPOINT and the other files, as evaluated
    notes: list[str]
    guards: list[dict]  # as `check_guards` returns them
    per_class: bool = False

    @property
    def title(self) -> str:
        """One line: the network, if all files are known to be a ResNet8, the data set and its size."""
        network = "ResNet8" if all(each.network for each in [self.ours, *self.compared]) else "Accuracy"
        return f"{network} on the {self.dataset.name}, {len(self.dataset.labels):,} images"

    @property
    def all_predictions(self) -> list[Predictions]:
        """All predictions in the order of the tables; the others are compared with the first."""
        return [*([self.keras] if self.keras else []), self.ours, *self.compared]

    @cached_property
    def shown(self) -> list[Predictions]:
        """The same with printable names of at most LONGEST_NAME characters."""
        names = [printable(each.name) for each in self.all_predictions]
        labels = [cut(name, "...") for name in names]
        if len(set(labels)) < len(set(names)):
            labels = [cut(name, f"..{number}..") for number, name in enumerate(names, 1)]
        return [replace(each, name=label) for each, label in zip(self.all_predictions, labels, strict=True)]

    @cached_property
    def pairs(self) -> list[Comparison]:
        """Comparisons of every two models, those with the first model first."""
        pairs = combinations(self.all_predictions, 2)
        if len(self.all_predictions) > MANY:
            pairs = (pair for pair in pairs if pair[0] in (self.keras, self.ours))
        return [compare(*pair) for pair in pairs]

    def summary(self) -> str:
        """Return the title, the tables and a line per model, as plain text."""
        rows = [HEADINGS, *map(row_of, self.shown, [None, *self.pairs])]
        parts = [self.title, format_table([row[:6] for row in rows])]
        if len(self.all_predictions) > 1:
            parts.append(
                f"same class, largest difference (of a probability): compared with {self.shown[0].name}\n"
                "p >= 0.05: the difference in accuracy is not significant (McNemar's exact test)"
            )
        first = 6 if self.dataset.part == "perf" else 7  # with AUC, as MLPerf Tiny's runner
        parts.append(format_table([row[:1] + row[first:] for row in rows]))
        if self.per_class or not self.compared:
            classes = [["accuracy, %", *self.dataset.class_names], *map(class_row, self.shown)]
            parts.append(format_table(classes, gap=1))
        return "\n\n".join([*parts, "\n".join(map(describe, self.shown))]) + "\n"


def calibration_notes(dataset: Dataset, predictions: list[Predictions]) -> list[str]:
    """Return int8 files' accuracy on the test images that MLPerf Tiny does not calibrate with.

    The quantization of an int8 network is most likely fitted to its 500 calibration images.
    """
    notes, int8 = [], [each for each in predictions if "int8" in each.format]
    if int8 and not dataset.part:
        others = np.delete(np.arange(len(dataset)), calibration_indices())
        for each in int8:
            right = int((each.classes == dataset.labels)[others].sum())
            text = f"{percent(right / len(others))} % ({right:,} of {len(others):,})"
            notes.append(f"{each.name}: {text} without MLPerf Tiny's 500 calibration images")
    return notes


def cut(name: str, mark: str) -> str:
    """Return a name with `mark` in its middle if it is longer than LONGEST_NAME."""
    end = LONGEST_NAME - 8 - len(mark)
    return name if len(name) <= LONGEST_NAME else f"{name[:8]}{mark}{name[-end:]}"


def percent(fraction: float | None) -> str:
    """Return a fraction of 1 in %, such as "89.39"; None is "-"."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def row_of(each: Predictions, pair: Comparison | None) -> list[str]:
    """Return a model's cells under HEADINGS; `pair` compares it with the first model, which has none."""
    compared = ["", "", ""]
    if pair:
        difference = difference_text(pair["max_abs_probability_difference"])
        compared = [f"{pair['same_prediction']:,}", p_text(pair["mcnemar_p"]), difference]
    kernels = (each.throughput or {}).get("kernels")
    return [
        each.name,
        percent(each.metrics["accuracy"]),
        "-".join(map(percent, each.metrics["confidence_interval_95"])),
        *compared,
        "-" if each.metrics["auc"] is None else f"{each.metrics['auc']:.4f}",
        f"{each.metrics['loss']:.4f}",
        f"{each.file_bytes / 1000:.0f}",
        f"{each.throughput['images_per_second']:,.0f}" if each.throughput else "",
        f"{each.format.replace('TensorFlow Lite', 'TFLite')}, {kernels}"
        if kernels
        else each.format or "state_dict",
    ]


def class_row(each: Predictions) -> list[str]:
    """Return a model's name and accuracy per class in %."""
    return [each.name, *map(percent, each.metrics["per_class_accuracy"].values())]


def describe(each: Predictions) -> str:
    """Return a line: a model's file, size, sparsity, arithmetic and input normalization."""
    details, ran = [str(each.path)], each.throughput
    if each.network:
        size = "{parameters:,} parameters, {multiply_accumulates:,} multiply-accumulates"
        details.append(size.format(**each.network))
    if each.sparsity:
        details.append(f"{100 * each.sparsity:.1f} % of the weights 0")
    if ran and (ran["dtype"], ran["device"]) != ("float32", "cpu"):
        details.append(f"{ran['dtype']} on {ran['device']}")
    if not each.normalization.is_identity:
        details.append(str(each.normalization))
    return printable(f"{each.name}: {', '.join(details)}")


def confusion_text(each: Predictions) -> str:
    """Return the confusion matrix, one row per true class."""
    counts = [[f"{count:,}" for count in row] for row in each.metrics["confusion_matrix"]]
    rows = [[name, *row] for name, row in zip(each.class_names, counts, strict=True)]
    title = f"Confusion matrix of {each.name} (row: true class, column: predicted class)"
    return f"{title}\n\n{format_table([['', *(name[:5] for name in each.class_names)], *rows])}\n"


def check_results(folder: Path) -> None:
    """Refuse, before the work, to replace files that evaluate.py did not write.

    A folder of its own is known by the keys of metrics.json. Raises ValueError, and OSError where the results
    cannot be written.
    """
    content, advice = None, "choose another --output"
    for name in RESULTS:
        check_writable(folder / name)
    present = [folder / name for name in RESULTS if os.path.lexists(folder / name)]
    with suppress(FileNotFoundError, ValueError, RecursionError):  # missing, or not JSON
        content = json.loads(read_regular(folder / "metrics.json"))
    if present and not (isinstance(content, dict) and content.keys() >= KEYS):
        raise ValueError(f"{present[0]} was not written by evaluate.py; {advice}")
    for suffix in (".pt", ".pth", ".safetensors"):
        if (folder / f"metrics{suffix}").exists():
            raise ValueError(f"{folder}: metrics.json would be read as metrics{suffix}'s JSON; {advice}")


def write_results(evaluation: Evaluation, folder: Path, with_figure: bool) -> list[Path]:
    """Write metrics.txt, metrics.json and, if asked, report.png, all or none; return the paths."""
    results = metrics_json(evaluation)
    lines = [evaluation.summary(), *map(confusion_text, evaluation.shown)]
    for guard in evaluation.guards:
        met = f"{'met' if guard['met'] else 'not met'} by {printable(guard['checkpoint'])}"
        lines.append(f"{guard['guard']} {guard['bound']:g}: {met} ({guard['measured']:.4f})")
    lines += [f"note: {note}" for note in evaluation.notes]
    text = "\n".join(lines) + "\n"
    json_text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    writers = {
        folder / "metrics.txt": lambda file: file.write(text.encode()),
        folder / "metrics.json": lambda file: file.write(json_text.encode()),
    }
    if with_figure:
        writers[folder / "report.png"] = lambda file: write_report(file, evaluation, results)
    write_files(writers)
    return list(writers)


def write_report(file: BinaryIO, evaluation: Evaluation, results: dict) -> None:
    """Write report.png, with the files' paths, their SHA-256 and the date at its foot."""
    from models.evaluation.figure import draw_report

    hashes = [*([results["keras"]["sha256"]] if evaluation.keras else []), *evaluation.hashes]
    captions = [
        printable(f"{each.name}: {each.path}, SHA-256 {sha256}")
        for each, sha256 in zip(evaluation.shown, hashes, strict=True)
    ]
    ours = evaluation.shown[evaluation.keras is not None]
    captions.append(results["date"])
    draw_report(file, evaluation.title, evaluation.dataset, evaluation.shown, ours, captions)


def metrics_json(evaluation: Evaluation) -> dict:
    """Return the content of metrics.json."""
    import torch

    dataset, keras, baseline = evaluation.dataset, evaluation.keras, None
    if keras:
        baseline = {"file": str(keras.path), "sha256": sha256_of(keras.path), "format": keras.format}
        baseline |= {"file_bytes": keras.path.stat().st_size, "input": asdict(keras.normalization)}
        baseline |= keras.metrics
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    ours, *compared = map(file_json, [evaluation.ours, *evaluation.compared], evaluation.hashes)
    return {
        **ours,
        "dataset": {"name": dataset.name, "images": len(dataset.labels), "sha256": dataset.sha256},
        "pytorch": evaluation.ours.metrics,
        "keras": baseline,
        "agreement": evaluation.pairs[0] if keras else None,
        "compared": [
            {**file, **each.metrics} for file, each in zip(compared, evaluation.compared, strict=True)
        ],
        "pairs": evaluation.pairs,
        "guards": evaluation.guards,
        "notes": evaluation.notes,
        "environment": {**versions, "platform": platform.platform(), "cpu_cores": os.cpu_count()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def file_json(each: Predictions, sha256: str) -> dict:
    """Return what metrics.json has of an evaluated file beside its metrics; None is unknown."""
    return {
        "checkpoint": str(each.path),
        "checkpoint_sha256": sha256,
        "input": asdict(each.normalization),
        "throughput": each.throughput,
        "format": each.format,
        "file_bytes": each.file_bytes,
        "outputs": each.outputs,
        "sparsity": each.sparsity,
        "network": each.network,
    }
