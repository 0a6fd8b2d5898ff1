"""The figure of an evaluation: where a model errs, and where it differs from another."""

from typing import BinaryIO

import matplotlib
import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from models.evaluation.metrics import Predictions

matplotlib.use("Agg")  # draws into a file, on a machine without a screen too
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color/).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # blue, orange, green, purple: four models at the most
MISTAKES = 10  # images in the strip
SMALLEST = 1e-10  # the least difference in a probability on the log axis


def draw_report(
    file: BinaryIO, title: str, dataset: Dataset, checkpoints: list[Predictions], keras: Predictions | None
) -> None:
    """Write a PNG of the first checkpoint, and of how the others and Keras compare.

    Confusion matrix, accuracy per class, differences to Keras (or to the first), most confident mistakes. It
    is 1,000 points of 1/100 inch wide: at 1,000 pixels no text is smaller than 8 points.
    """
    ours, *compared = checkpoints
    shown = [ours, *([keras] if keras else []), *compared][: len(COLORS)]
    with plt.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}):
        figure = plt.figure(figsize=(10, 8.5), layout="constrained")
        figure.suptitle(f"{title}: {ours.name} {100 * ours.metrics['accuracy']:.2f} %", fontsize=12)
        above, below = figure.subfigures(2, 1, height_ratios=(6.5, 1.95))
        panels = above.subplot_mosaic(
            [["confusion", "classes"], ["confusion", "differences"]], width_ratios=(6, 4)
        )
        draw_confusion(panels["confusion"], ours)
        draw_classes(panels["classes"], shown)
        draw_differences(panels["differences"], shown, keras or ours)
        draw_mistakes(below, dataset, ours)
        figure.savefig(file, format="png", dpi=150)
        plt.close(figure)


def draw_confusion(axes: plt.Axes, ours: Predictions) -> None:
    """Draw the confusion matrix with its counts. Colours follow their roots, so that mistakes can be seen."""
    counts = np.array(ours.metrics["confusion_matrix"])
    axes.imshow(np.sqrt(counts), cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        dark = np.sqrt(count) > 0.55 * np.sqrt(counts.max())
        color = "white" if dark else "black"
        axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=color)
    axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    axes.set(title="Confusion matrix (images)", xlabel="predicted class", ylabel="true class")


def draw_classes(axes: plt.Axes, shown: list[Predictions]) -> None:
    """Draw each class's accuracy, the models side by side."""
    height = 0.8 / len(shown)
    for index, (each, color) in enumerate(zip(shown, COLORS, strict=False)):
        percents = 100 * np.array(list(each.metrics["per_class_accuracy"].values()))
        places = np.arange(len(CLASS_NAMES)) + (index - (len(shown) - 1) / 2) * height
        axes.barh(places, percents, height, color=color, label=each.name)
    axes.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    axes.invert_yaxis()
    axes.set(title="Accuracy per class (%)", xlim=(0, 100))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, fontsize=8, frameon=False)
    axes.grid(axis="x", alpha=0.3)


def draw_differences(axes: plt.Axes, shown: list[Predictions], reference: Predictions) -> None:
    """Draw how far each image's probabilities are from the reference's, on a log axis, model by model."""
    if len(shown) == 1:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no Keras baseline to compare with", ha="center", va="center")
        return
    differences = {
        color: np.abs(each.probabilities - reference.probabilities).max(axis=1)
        for each, color in zip(shown, COLORS, strict=False)
        if each is not reference
    }
    largest = max(found.max(initial=SMALLEST) for found in differences.values())
    bins = np.logspace(np.log10(SMALLEST), max(0.5 + np.log10(largest), -5), 50)
    for color, found in differences.items():  # the colours are those of the legend above
        kind = "step" if len(differences) > 1 else "bar"  # several as outlines: none hides another
        axes.hist(found.clip(SMALLEST), bins, color=color, histtype=kind, linewidth=1.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:.0e}")  # the exponents of 10^-7 would be smaller than 8 points
    axes.set(
        title=f"Probabilities: difference to\n{reference.name}",
        xlabel=f"an image's largest (the first bar: {SMALLEST:g} and less)",
        ylabel="images",
    )


def draw_mistakes(figure: plt.Figure, dataset: Dataset, ours: Predictions) -> None:
    """Draw the images that were taken for a wrong class with the highest probability."""
    wrong = np.flatnonzero(ours.classes != dataset.labels)
    confidence = ours.probabilities.max(axis=1)
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")[:MISTAKES]]
    figure.suptitle(
        "Most confident mistakes (predicted class, its probability, true class)", fontsize=10, weight="bold"
    )
    for axes, image in zip(figure.subplots(1, MISTAKES).flat, [*chosen, *[None] * MISTAKES], strict=False):
        axes.set_axis_off()
        if image is not None:
            axes.imshow(dataset.images[image].transpose(1, 2, 0))
            predicted, true = CLASS_NAMES[ours.classes[image]], CLASS_NAMES[dataset.labels[image]]
            axes.set_title(f"{predicted}\n{confidence[image]:.4f}\ntrue: {true}", fontsize=8, weight="normal")
