"""What an evaluation shows on the terminal, and writes: metrics.txt, metrics.json and report.png."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import textwrap
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from data.files import sha256_of, write_files
from models.evaluation.metrics import Predictions, compare

if TYPE_CHECKING:
    from rich.table import Table

    from models.checkpoint import Checkpoint

# rich, torch and matplotlib are imported where they are needed: `evaluate.py --help` needs none.

RESULTS = ("metrics.txt", "metrics.json", "report.png")
SIGNIFICANCE = 0.05  # below this, a difference is more than chance
COLUMNS = 4  # models in one table: more do not fit 80 columns
LABEL = 24  # columns for the names of two models, beside their figures


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that was found."""

    dataset: Dataset
    checkpoint: Checkpoint
    ours: Predictions  # the checkpoint's
    keras: Predictions | None
    compared: list[Predictions]  # the --compare checkpoints'
    notes: list[str]
    guards: list[dict]  # what --min-accuracy and --max-drop asked for, and whether it was met

    @property
    def title(self) -> str:
        """What was evaluated on what, in one line."""
        return f"ResNet8 on the {self.dataset.name}, {len(self.dataset.labels):,} images"

    @property
    def all_predictions(self) -> list[Predictions]:
        """Every model's, in the order of the tables."""
        return [*([self.keras] if self.keras else []), self.ours, *self.compared]

    @cached_property
    def pairs(self) -> list[dict]:
        """How each two models agree: `compare`'s results."""
        return [compare(first, second) for first, second in itertools.combinations(self.all_predictions, 2)]

    @cached_property
    def summary(self) -> str:
        """The title and the tables, as plain text 80 columns wide."""
        everyone = self.all_predictions
        longest = max(len(word) for each in everyone for word in each.name.split())
        columns = max(1, min(COLUMNS, 58 // (longest + 2)))  # so that no name is broken in its middle
        tables = [models_table(everyone[i : i + columns]) for i in range(0, len(everyone), columns)]
        agreement = [pairs_text(self.pairs)] if self.pairs else []
        scalings = [each.scaling.says(each.name) for each in everyone if not each.scaling.is_plain]
        return "\n\n".join([self.title, self.files, as_text(tables), *agreement, *scalings]) + "\n"

    @property
    def files(self) -> str:
        """The file of each model, a line each; how it was computed where that is not float32 on the CPU."""
        lines = []
        for each in self.all_predictions:
            ran = each.throughput and (each.throughput["dtype"], each.throughput["device"])
            detail = f", {ran[0]} on {ran[1]}" if ran and ran != ("float32", "cpu") else ""
            if each.format:
                detail = f", {each.format}"
            lines.append(f"{each.name}: {each.path}{detail}")
        return "\n".join(lines)


def write_results(evaluation: Evaluation, folder: Path, with_figure: bool) -> list[Path]:
    """Write metrics.txt, metrics.json and, if asked, report.png, all or none; return the paths.

    Raises OSError when the folder cannot be written to.
    """
    contents = {
        "metrics.txt": metrics_text(evaluation),
        "metrics.json": json.dumps(metrics_json(evaluation), indent=2, allow_nan=False) + "\n",
    }
    writers = {
        folder / name: lambda file, content=content: file.write(content.encode())
        for name, content in contents.items()
    }
    if with_figure:
        from models.evaluation.figure import draw_report

        writers[folder / "report.png"] = lambda file: draw_report(
            file,
            evaluation.title,
            evaluation.dataset,
            [evaluation.ours, *evaluation.compared],
            evaluation.keras,
        )
    earlier = folder / "report.png"
    is_ours = earlier not in writers and (folder / "metrics.json").is_file()
    write_files(writers)
    if is_ours:  # it belongs to an earlier run, whose figures have just been replaced
        earlier.unlink(missing_ok=True)
    return list(writers)


def metrics_text(evaluation: Evaluation) -> str:
    """Return what metrics.txt holds: the tables, every model's confusion matrix, the guards and the notes."""
    lines = [
        evaluation.summary,
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
        },
        "agreement": evaluation.pairs[0] if keras else None,
        "throughput": ours.throughput,
        "compared": [
            {
                "checkpoint": str(each.path),
                "checkpoint_sha256": sha256_of(each.path),
                "input": asdict(each.scaling),
                **each.metrics,
                "throughput": each.throughput,
            }
            for each in evaluation.compared
        ],
        "pairs": evaluation.pairs,
        "guards": evaluation.guards,
        "notes": evaluation.notes,
        "environment": environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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


def models_table(all_predictions: list[Predictions]) -> Table:
    """Return the table with one column a model, at most 80 columns wide for COLUMNS models."""
    from rich.table import Table

    def percent(fraction: float) -> str:
        return f"{100 * fraction:.2f} %"

    metrics = [each.metrics for each in all_predictions]
    table = Table("", box=None, padding=(0, 2, 0, 0), show_edge=False)
    for each in all_predictions:
        width = 58 // len(all_predictions) - 2
        table.add_column(each.name, justify="right", overflow="fold", max_width=width)
    table.add_row("accuracy", *(percent(m["accuracy"]) for m in metrics), style="bold")
    intervals = [[100 * bound for bound in m["confidence_interval_95"]] for m in metrics]
    table.add_row("95 % interval", *(f"{low:.2f}-{high:.2f}" for low, high in intervals))
    table.add_row("correct", *(f"{m['correct']:,}" for m in metrics))
    table.add_row("loss (cross-entropy)", *(f"{m['loss']:.4f}" for m in metrics), end_section=True)
    for name in CLASS_NAMES:
        table.add_row(f"  {name}", *(percent(m["per_class_accuracy"][name]) for m in metrics))
    speeds = [each.throughput or {} for each in all_predictions]
    table.add_row("seconds", *(f"{s['seconds']:.2f}" if s else "" for s in speeds))
    table.add_row("images per second", *(f"{s['images_per_second']:,.0f}" if s else "" for s in speeds))
    folded = [("yes" if s["batch_norm_folded"] else "no") if s else "" for s in speeds]
    table.add_row("BatchNorm folded", *folded)
    return table


def pairs_text(pairs: list[dict]) -> str:
    """Return the table with one row for each two models, 80 columns wide; longer names have a line alone."""
    labels = [
        textwrap.wrap(
            " vs ".join(reversed(pair["models"])), LABEL, break_long_words=False, break_on_hyphens=False
        )
        for pair in pairs
    ]
    fitting = [len(line) for label in labels for line in label if len(line) <= LABEL]
    width = max(fitting, default=0)
    lines = [
        f"{'':{width}}  images with  accuracy,  probability,  McNemar's",
        f"{'':{width}}   same class     points       at most  test",
    ]
    for pair, label in zip(pairs, labels, strict=True):
        p = pair["mcnemar_p"]
        test = f"p = {p:.2f}: chance" if p >= SIGNIFICANCE else f"p = {p:.1e}" if p > 1e-99 else "p < 1e-99"
        figures = (
            f"  {pair['same_prediction']:11,}  {100 * pair['accuracy_difference']:+9.2f}"
            f"  {pair['max_abs_probability_difference']:12.1e}  {test}"
        )
        *above, last = label if len(label[-1]) <= LABEL else [*label, ""]
        lines += [*above, f"{last:{width}}{figures}"]
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


def confusion_text(predictions: Predictions) -> str:
    """Return the confusion matrix, one row a true class, 73 columns wide."""
    lines = [f"Confusion matrix of {predictions.name} (row: true class, column: predicted class)", ""]
    lines.append(" " * 12 + "".join(f"{name[:5]:>6}" for name in CLASS_NAMES))
    for name, row in zip(CLASS_NAMES, predictions.metrics["confusion_matrix"], strict=True):
        lines.append(f"{name:12}" + "".join(f"{count:6,}" for count in row))
    return "\n".join(lines)
