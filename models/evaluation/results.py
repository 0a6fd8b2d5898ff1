"""What an evaluation shows on the terminal, and writes: metrics.txt, metrics.json and report.png."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import textwrap
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from data.files import check_writable, sha256_of, write_files
from models.evaluation.metrics import Agreement, Predictions, compare, difference_text, p_text
from models.files.metadata import json_of

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint

# rich, torch and matplotlib are imported where they are needed: `evaluate.py --help` needs none.

WIDTH = 80  # columns of metrics.txt, and of what goes into a pipe
SIGNIFICANCE = 0.05  # below this, a difference is more than chance
MANY = 20  # models: above, metrics.json has each with the first and with CHECKPOINT, no more each with each
LONGEST_DRAWN = 24  # letters of a name beside a row of report.png
RESULTS = ("metrics.txt", "metrics.json", "report.png")
TITLE = "ResNet8 on the "  # how metrics.txt begins
KEYS = {"checkpoint", "checkpoint_sha256", "dataset", "pytorch", "pairs"}  # of metrics.json, among others
DRAWN_BY = "ResNet8 evaluate.py"  # in report.png, as PNG's "Software"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that was found."""

    dataset: Dataset
    checkpoint: Checkpoint
    ours: Predictions  # the checkpoint's
    keras: Predictions | None
    compared: list[Predictions]  # the other checkpoints'
    notes: list[str]
    guards: list[dict]  # what --min-accuracy and --max-drop asked for, and whether it was met
    per_class: bool = False  # whether to show each class's accuracy for more than one checkpoint too

    @property
    def title(self) -> str:
        """What was evaluated on what, in one line."""
        return f"{TITLE}{self.dataset.name}, {len(self.dataset.labels):,} images"

    @property
    def all_predictions(self) -> list[Predictions]:
        """Every model's, in the order of the tables; the others are compared with the first."""
        return [*([self.keras] if self.keras else []), self.ours, *self.compared]

    @cached_property
    def date(self) -> str:
        """When it was evaluated, in ISO 8601."""
        return datetime.now(timezone.utc).isoformat(timespec="seconds")

    @cached_property
    def pairs(self) -> list[Agreement]:
        """How each two models agree, first the others with the first; of more than MANY not all of them."""
        pairs = itertools.combinations(self.all_predictions, 2)
        if len(self.all_predictions) > MANY:
            pairs = (pair for pair in pairs if pair[0] in (self.keras, self.ours))
        return [compare(first, second) for first, second in pairs]

    def summary(self, width: int = WIDTH) -> str:
        """Return the title and the tables as plain text, at most `width` columns wide, from 80 on."""
        labels, tables = fitting_tables(self, width)
        scalings = [
            each.scaling.says(each.name) for each in self.all_predictions if not each.scaling.is_plain
        ]
        return "\n\n".join([self.title, files_text(self, labels), *tables, *scalings]) + "\n"


def check_results(folder: Path, with_figure: bool, checkpoints: list[Path]) -> None:
    """Raise, before the work, where `write_results` could not write, or would replace what is not ours.

    Ours is what `evaluate.py` wrote, as the file itself shows: a foreign metrics.json may be the JSON of a
    checkpoint called metrics.pt, among others of the `checkpoints` that are evaluated. Raises OSError, which
    names the path, or ValueError with one line.
    """
    paths = [folder / name for name in RESULTS[: 2 + with_figure]]
    check_writable(paths)
    instead = "--output names another folder"
    for path in paths:
        for checkpoint in checkpoints:
            if os.path.realpath(json_of(checkpoint)) == os.path.realpath(path):
                raise ValueError(f"{path} is where the JSON of {checkpoint} is looked for: {instead}")
        if os.path.lexists(path) and not is_ours(path):
            raise ValueError(f"{path} is not of evaluate.py's writing, and would be replaced: {instead}")


def is_ours(path: Path) -> bool:
    """Return whether `evaluate.py` wrote what is there, as its content shows. Raises OSError."""
    if not path.is_file():
        return False
    if path.suffix == ".json":
        with suppress(ValueError, RecursionError):  # no JSON
            content = json.loads(path.read_bytes())
            return isinstance(content, dict) and content.keys() >= KEYS
        return False
    with path.open("rb") as file:
        start = file.read(1024)
    if path.suffix == ".txt":
        return start.startswith(TITLE.encode())
    return start.startswith(b"\x89PNG") and b"Software\0" + DRAWN_BY.encode() in start


def write_results(evaluation: Evaluation, folder: Path, with_figure: bool) -> list[Path]:
    """Write metrics.txt, metrics.json and, if asked, report.png, all or none; return the paths.

    An earlier report.png stays: it says itself what it shows. Raises OSError when the folder cannot be
    written to.
    """
    contents = {
        "metrics.txt": metrics_text(evaluation),
        "metrics.json": json.dumps(metrics_json(evaluation), indent=2, allow_nan=False) + "\n",
    }
    writers = {
        # a name may hold bytes that are no UTF-8
        folder / name: lambda file, content=content: file.write(content.encode(errors="backslashreplace"))
        for name, content in contents.items()
    }
    if with_figure:
        writers[folder / "report.png"] = lambda file: write_report(file, evaluation)
    write_files(writers)
    return list(writers)


def write_report(file: BinaryIO, evaluation: Evaluation) -> None:
    """Write report.png, which says on itself, and in its metadata, which files it shows, and of what day."""
    from models.evaluation.figure import draw_report

    names = [each.name for each in evaluation.all_predictions]
    is_short = len(set(names)) == len(names) and max(map(len, names)) <= LONGEST_DRAWN
    labels = labels_of(evaluation, short=not is_short)
    models = dict(zip(map(drawable, labels), evaluation.all_predictions, strict=True))
    ours, date = evaluation.checkpoint, evaluation.date
    captions = [f"{label}: {each.path}" for label, each in models.items() if label != each.name]
    day = f"{date[:16].replace('T', ' ')} UTC"
    captions.append(f"{ours.path}, SHA-256 {ours.sha256}, {day}")
    shown = [f"{each.name}: {each.path}, SHA-256 {sha256_of(each.path)}" for each in models.values()]
    description, captions = "\n".join(map(drawable, shown)), [*map(drawable, captions)]
    metadata = {"Software": DRAWN_BY, "Description": description, "Creation Time": date}
    draw_report(file, evaluation.title, evaluation.dataset, models, evaluation.ours, captions, metadata)


def drawable(text: str) -> str:
    """Return text with a code for each character that no font has: a name may hold any but "/"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def metrics_text(evaluation: Evaluation) -> str:
    """Return what metrics.txt holds: the tables, every model's confusion matrix, the guards and the notes."""
    lines = [
        evaluation.summary(),
        *(confusion_text(predictions) + "\n" for predictions in evaluation.all_predictions),
        *(
            f"{guard['guard']} {guard['bound']:g}: {'met' if guard['met'] else 'not met'} by "
            f"{guard['checkpoint']} ({guard['measured']:.4f})"
            for guard in evaluation.guards
        ),
        *(f"note: {note}" for note in evaluation.notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def metrics_json(evaluation: Evaluation) -> dict:
    """Return what metrics.json holds."""
    dataset, checkpoint = evaluation.dataset, evaluation.checkpoint
    ours, keras = evaluation.ours, evaluation.keras
    return {
        "checkpoint": str(checkpoint.path),
        "checkpoint_sha256": checkpoint.sha256,
        "dataset": {"name": dataset.name, "images": len(dataset.labels), "sha256": dataset.sha256},
        "input": asdict(ours.scaling),
        "pytorch": ours.metrics,
        "keras": keras
        and {
            "file": str(keras.path),
            "sha256": sha256_of(keras.path),
            "format": keras.format,
            "input": asdict(keras.scaling),
            **keras.metrics,
            "file_bytes": file_bytes(keras.path),
        },
        "agreement": evaluation.pairs[0] if keras else None,
        "throughput": ours.throughput,
        **file_facts(ours),
        "compared": [
            {
                "checkpoint": str(each.path),
                "checkpoint_sha256": sha256_of(each.path),
                "input": asdict(each.scaling),
                **each.metrics,
                "throughput": each.throughput,
                **file_facts(each),
            }
            for each in evaluation.compared
        ],
        "pairs": evaluation.pairs,
        "guards": evaluation.guards,
        "notes": evaluation.notes,
        "environment": environment(),
        "date": evaluation.date,
    }


def file_facts(predictions: Predictions) -> dict:
    """Return what metrics.json says of a checkpoint's file, beside its metrics; null where not known."""
    return {
        "format": predictions.format,
        "file_bytes": file_bytes(predictions.path),
        "sparsity": predictions.sparsity,
        "network": predictions.network,
    }


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


def labels_of(evaluation: Evaluation, short: bool) -> list[str]:
    """Return what the tables call the models: their names, or in `short` Keras, A, B, ..., Z, AA, AB, ..."""
    if not short:
        return [each.name for each in evaluation.all_predictions]

    def letter(index: int) -> str:
        return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)

    checkpoints = [letter(index) for index in range(1 + len(evaluation.compared))]
    return [*(["Keras"] if evaluation.keras else []), *checkpoints]


def files_text(evaluation: Evaluation, labels: list[str]) -> str:
    """Return each model's file, a line each: what it is, how it was computed; and the networks' size.

    What is usual is not said: float32 on the CPU. A size that is everybody's has a line of its own.
    """
    checkpoints = [evaluation.ours, *evaluation.compared]
    sizes = [network_text(each) for each in checkpoints]
    common = sizes[0] if len(set(sizes)) == 1 else ""
    lines = []
    for each, label in zip(evaluation.all_predictions, labels, strict=True):
        ran = each.throughput or {}
        details = [str(each.path), each.format]
        arithmetic = f"{ran.get('dtype', 'float32')} on {ran.get('device', 'cpu')}"
        if arithmetic != "float32 on cpu" and ran["dtype"] not in each.format:
            details.append(arithmetic)
        if not common:
            details.append(network_text(each))
        lines.append(f"{label}: {', '.join(filter(None, details))}")
    return "\n".join([*lines, *([f"\n{common}"] if common else [])])


def network_text(predictions: Predictions) -> str:
    """Return how large a network is: "" where it is not known."""
    size = predictions.network
    if not size:
        return ""
    products = size["multiply_accumulates"]
    return f"{size['parameters']:,} parameters, {products:,} multiply-accumulates an image"


def fitting_tables(evaluation: Evaluation, width: int) -> tuple[list[str], list[str]]:
    """Return what the tables call the models, and the tables, which fit the width.

    A model has one line in a table. Where there is no room for all columns, the further ones are in a table
    below; where the names are still too long, letters take their place.
    """
    common, further = columns(evaluation), further_columns(evaluation)
    classes = class_columns(evaluation) if evaluation.per_class or not evaluation.compared else {}
    for short, is_one in itertools.product((False, True), (True, False)):
        labels = labels_of(evaluation, short)
        parts = [{**common, **further}, {}] if is_one else [common, further]
        tables = [as_text("model", labels, part, width) for part in parts if part]
        in_classes = [as_text("accuracy, %", labels, classes, width)] if classes else []
        if max(len(line) for table in (*tables, *in_classes) for line in table.splitlines()) <= width:
            break
    if len(labels) > 1:
        meaning = (
            "Same class, p (McNemar's test), points gained, and by how much a probability differs on average "
            f"and at most: all against {labels[0]}. At p = {SIGNIFICANCE:g} and above it may be chance."
        )
        tables.append(textwrap.fill(meaning, width, break_long_words=False, break_on_hyphens=False))
    return labels, tables + in_classes


# Columns: the heading, in two lines, and a cell for each model


def columns(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return what every comparison shows."""
    everyone = evaluation.all_predictions
    metrics = [each.metrics for each in everyone]
    intervals = [[100 * bound for bound in m["confidence_interval_95"]] for m in metrics]
    found = {
        "accuracy": [percent(m["accuracy"]) for m in metrics],
        "95 %\ninterval": [f"{low:.2f}-{high:.2f}" for low, high in intervals],
        "correct": [f"{m['correct']:,}" for m in metrics],
        "loss": [f"{m['loss']:.{4 if m['loss'] < 10 else 3}f}" for m in metrics],
    }
    if len(everyone) > 1:
        pairs = evaluation.pairs[: len(everyone) - 1]
        found["same\nclass"] = ["", *(f"{pair['same_prediction']:,}" for pair in pairs)]
        found["McNemar\np"] = ["", *(p_text(pair["mcnemar_p"]) for pair in pairs)]
    found["file\nsize"] = [size_text(file_bytes(each.path)) for each in everyone]
    found["seconds"] = [f"{each.throughput['seconds']:.2f}" if each.throughput else "" for each in everyone]
    return found


def further_columns(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return how sparse the networks are, if one is, and how far the others are from the first."""
    everyone, found = evaluation.all_predictions, {}
    if any(each.sparsity and percent(each.sparsity, 1) != percent(0, 1) for each in everyone):
        found["sparsity"] = ["" if each.sparsity is None else percent(each.sparsity, 1) for each in everyone]
    if pairs := evaluation.pairs[: len(everyone) - 1]:
        mean, most = "mean_abs_probability_difference", "max_abs_probability_difference"
        found["points\ngained"] = ["", *(f"{100 * pair['accuracy_difference']:+.2f}" for pair in pairs)]
        found["probability\ndiffers by"] = ["", *(difference_text(pair[mean]) for pair in pairs)]
        found["at most\nby"] = ["", *(difference_text(pair[most]) for pair in pairs)]
    return found


def class_columns(evaluation: Evaluation) -> dict[str, list[str]]:
    """Return each class's accuracy, in %."""
    accuracies = [each.metrics["per_class_accuracy"] for each in evaluation.all_predictions]
    return {
        name: ["-" if of[name] is None else f"{100 * of[name]:.2f}" for of in accuracies]
        for name in CLASS_NAMES
    }


def percent(fraction: float, digits: int = 2) -> str:
    """Return a fraction for people: "88.53 %"."""
    return f"{100 * fraction:.{digits}f} %"


def file_bytes(path: Path | None) -> int | None:
    """Return a file's size; None where there is none."""
    return path.stat().st_size if path and path.is_file() else None


def size_text(size: int | None) -> str:
    """Return a file's size for people, in at most 6 characters: "312 kB"."""
    if size is None:
        return ""
    power = sum(size >= 999.5 * 1000**power for power in range(3))
    number = size / 1000**power
    return f"{number:.{1 if power and number < 9.95 else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"


def as_text(corner: str, labels: list[str], columns: dict[str, list[str]], width: int) -> str:
    """Return a table as plain text: a line a model that has cells, as wide as it needs to be.

    Between its columns are two spaces, or one where it is wider than `width` otherwise.
    """
    from rich.console import Console
    from rich.table import Table

    # names come from files: `[/x]` in one is no style of rich's, and `:x:` no picture
    plain = {"color_system": None, "markup": False, "emoji": False, "highlight": False}
    console = Console(file=io.StringIO(), width=10_000, **plain)
    table = Table(box=None, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column(corner, vertical="bottom")
    for heading in columns:
        table.add_column(heading, justify="right", vertical="bottom")
    for label, *cells in zip(labels, *columns.values(), strict=True):
        if any(cells):
            table.add_row(label, *cells)
    if console.measure(table).maximum - 2 > width:
        table.padding = (0, 1, 0, 0)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def confusion_text(predictions: Predictions) -> str:
    """Return the confusion matrix, one row a true class, 73 columns wide."""
    lines = [f"Confusion matrix of {predictions.name} (row: true class, column: predicted class)", ""]
    lines.append(" " * 12 + "".join(f"{name[:5]:>6}" for name in CLASS_NAMES))
    for name, row in zip(CLASS_NAMES, predictions.metrics["confusion_matrix"], strict=True):
        lines.append(f"{name:12}" + "".join(f"{count:6,}" for count in row))
    return "\n".join(lines)
