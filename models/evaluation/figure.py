"""The figure of an evaluation: how good the models are, where they differ, and where the first one errs."""

import textwrap
import warnings
from typing import BinaryIO

import matplotlib
import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from models.evaluation.metrics import Predictions

matplotlib.use("Agg")  # draws into a file, on a machine without a screen too
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

# One of Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color/).
BLUE = "#0072B2"
MISTAKES = (3, 4)  # rows and columns of images
SMALLEST = 1e-16  # the left end of the axis of differences: the rounding of a float64 probability
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.labelsize": 8,
    "ytick.labelsize": 9,
    "text.parse_math": False,  # a name may hold dollars
}


def draw_report(
    file: BinaryIO,
    title: str,
    dataset: Dataset,
    models: dict[str, Predictions],
    ours: Predictions,
    captions: list[str],
    metadata: dict[str, str],
) -> None:
    """Write a PNG: every model in a row of its own, compared with the first; below, where `ours` errs.

    `models` has the predictions by what the rows are called; `captions` are the lines at the foot, `metadata`
    is kept in the PNG's text. It is 1,000 points of 1/100 inch wide, and higher with more models: at 1,000
    pixels no text is smaller than 8 points.
    """
    captions = [line for caption in captions for line in textwrap.wrap(caption, 150)]
    band, foot = 1.4 + max(1.2, 0.25 * len(models)), 0.1 + 0.16 * len(captions)
    name = next(label for label, each in models.items() if each is ours)
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in letters that the font lacks
        figure = plt.figure(figsize=(10, band + 5.5 + foot), layout="constrained")
        figure.suptitle(title, fontsize=12)
        above, below, last = figure.subfigures(3, 1, height_ratios=(band, 5.1, foot))
        accuracy, classes, differences = above.subplots(1, 3, width_ratios=(2.4, 5, 2.9))
        draw_accuracy(accuracy, models)
        draw_classes(classes, models)
        draw_differences(differences, models)
        left, right = below.subfigures(1, 2, width_ratios=(5.6, 4.4))
        draw_confusion(left.subplots(), name, ours)
        draw_mistakes(right, name, dataset, ours)
        last.text(0.01, 0.5, "\n".join(captions), fontsize=8, va="center")
        figure.savefig(file, format="png", dpi=150, metadata=metadata)
        plt.close(figure)


def draw_accuracy(axes: plt.Axes, models: dict[str, Predictions]) -> None:
    """Draw each model's accuracy with its interval, from the top down."""
    for row, each in enumerate(models.values()):
        accuracy, (low, high) = each.metrics["accuracy"], each.metrics["confidence_interval_95"]
        error = [[100 * (accuracy - low)], [100 * (high - accuracy)]]
        axes.errorbar(100 * accuracy, row, xerr=error, fmt="o", color=BLUE, markersize=4, capsize=2)
    rows = [f"{label}   {100 * each.metrics['accuracy']:.2f} %" for label, each in models.items()]
    axes.set_yticks(range(len(models)), rows)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("Accuracy (%),\n95 % interval")


def draw_classes(axes: plt.Axes, models: dict[str, Predictions]) -> None:
    """Write each class's accuracy: the first model's, and, coloured, how far the others are from it."""
    rows = [list(each.metrics["per_class_accuracy"].values()) for each in models.values()]
    percents = 100 * np.array(rows, float)  # NaN where a class has no images
    differences = percents - percents[0]
    limit = max(5.0, np.nanmax(np.abs(differences), initial=0.0))
    axes.imshow(differences, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), difference in np.ndenumerate(differences):
        text = f"{difference:+.1f}" if row else f"{percents[row, column]:.1f}"
        color = "white" if abs(difference) > 0.7 * limit else "black"
        axes.text(
            column,
            row,
            "-" if np.isnan(difference) else text,
            ha="center",
            va="center",
            fontsize=8,
            color=color,
        )
    axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks([])
    first, *others = models
    title = f"Accuracy per class (%): {first}'s"
    axes.set_title(title + (",\nand by how many points the others differ" if others else ""))


def draw_differences(axes: plt.Axes, models: dict[str, Predictions]) -> None:
    """Draw how far the images' probabilities are from the first model's: histograms, all as high."""
    axes.set_yticks([])
    (first, reference), *others = models.items()
    if not others:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no Keras baseline\nto compare with", ha="center", va="center")
        return
    found = [np.abs(each.probabilities - reference.probabilities).max(axis=1) for _, each in others]
    largest = max(each.max(initial=SMALLEST) for each in found)
    bins = np.logspace(np.log10(SMALLEST), max(0.5 + np.log10(largest), -5), 60)
    highest = 0.85 if len(others) > 1 else 1.7  # of a histogram, in rows
    for row, each in enumerate(found, 1):
        images, _ = np.histogram(each.clip(SMALLEST), bins)
        top = row + 0.5 - highest * images / images.max()
        axes.stairs(top, bins, baseline=row + 0.5, fill=True, color=BLUE)
        axes.axhline(row + 0.5, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_major_formatter("{x:.0e}")  # the exponents of 10^-7 would be smaller than 8 points
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set(
        title=f"How far each image's\nprobabilities are\nfrom {first}'s",
        xlabel=f"the largest of its ten differences\n({SMALLEST:g}: that or less)",
    )


def draw_confusion(axes: plt.Axes, name: str, ours: Predictions) -> None:
    """Draw the confusion matrix with its counts. Colours follow their roots, so that mistakes can be seen."""
    counts = np.array(ours.metrics["confusion_matrix"])
    axes.imshow(np.sqrt(counts), cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        dark = np.sqrt(count) > 0.55 * np.sqrt(counts.max())
        color = "white" if dark else "black"
        axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=color)
    axes.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    axes.set(title=f"Confusion matrix of {name} (images)", xlabel="predicted class", ylabel="true class")


def draw_mistakes(figure: plt.Figure, name: str, dataset: Dataset, ours: Predictions) -> None:
    """Draw the images that were taken for a wrong class with the highest probability."""
    wrong = np.flatnonzero(ours.classes != dataset.labels)
    confidence = ours.probabilities.max(axis=1)
    cells = figure.subplots(*MISTAKES).ravel()
    chosen = wrong[np.argsort(-confidence[wrong], kind="stable")[: len(cells)]]
    title = f"Most confident mistakes of {name}\n(predicted class, its probability, true class)"
    figure.suptitle(title, fontsize=10, weight="bold")
    for axes in cells:
        axes.set_axis_off()
    for axes, image in zip(cells, chosen, strict=False):
        axes.imshow(dataset.images[image].transpose(1, 2, 0))
        predicted, true = CLASS_NAMES[ours.classes[image]], CLASS_NAMES[dataset.labels[image]]
        axes.set_title(f"{predicted}\n{confidence[image]:.4f}\ntrue: {true}", fontsize=8, weight="normal")
