"""The figure of an evaluation: accuracy, differences between models, and one model's mistakes."""

import textwrap
import warnings
from typing import BinaryIO

import matplotlib
import numpy as np

from data.cifar10 import Dataset
from models.evaluation.metrics import Predictions

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

BLUE = "#0072B2"  # of Okabe and Ito's colour-blind safe palette, https://jfly.uni-koeln.de/color/
MISTAKES = (3, 4)  # rows and columns of images
SMALLEST = 1e-16  # left end of the axis of differences: the rounding of a float64 probability
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.parse_math": False,  # names may contain dollar signs
}
SLANTED = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}


def draw_report(
    file: BinaryIO,
    title: str,
    dataset: Dataset,
    models: list[Predictions],
    ours: Predictions,
    captions: list[str],
) -> None:
    """Write a PNG: a row per model, compared with the first one; below, the mistakes of `ours`.

    `captions` are lines at the foot, and the PNG's Description. It is 1,500 pixels wide, and higher with more
    models; scaled to 1,000 pixels, no text is smaller than 8 points.
    """
    lines = [line for caption in captions for line in textwrap.wrap(caption, 150)]
    band, foot = 1.4 + max(1.2, 0.25 * len(models)), 0.2 + 0.14 * len(lines)
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name with letters that the font lacks
        figure = plt.figure(figsize=(10, band + 5.5 + foot), dpi=150, layout="constrained")
        figure.suptitle(title, fontsize=12)
        above, below, last = figure.subfigures(3, 1, height_ratios=(band, 5.1, foot))
        accuracy, classes, differences = above.subplots(1, 3, width_ratios=(2.4, 5, 2.9))
        draw_accuracy(accuracy, models)
        draw_classes(classes, models)
        draw_differences(differences, models)
        left, right = below.subfigures(1, 2, width_ratios=(5.6, 4.4))
        draw_confusion(left.subplots(), ours)
        draw_mistakes(right, dataset, ours)
        last.text(0.01, 0.5, "\n".join(lines), fontsize=8, va="center")
        figure.savefig(file, format="png", metadata={"Description": "\n".join(captions)})
        plt.close(figure)


def draw_accuracy(axes: plt.Axes, models: list[Predictions]) -> None:
    """Draw each model's accuracy with its 95 % interval, the first model at the top."""
    percents = 100 * np.array([each.metrics["accuracy"] for each in models])
    intervals = 100 * np.array([each.metrics["confidence_interval_95"] for each in models])
    errors = np.abs(intervals.T - percents)
    axes.errorbar(percents, range(len(models)), xerr=errors, fmt="o", color=BLUE, markersize=4, capsize=2)
    labels = [f"{each.name}   {percent:.2f} %" for each, percent in zip(models, percents, strict=True)]
    axes.set_yticks(range(len(models)), labels)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("Accuracy (%),\n95 % interval")


def draw_classes(axes: plt.Axes, models: list[Predictions]) -> None:
    """Write the first model's accuracy per class, and the others' differences from it, coloured."""
    rows = [list(each.metrics["per_class_accuracy"].values()) for each in models]
    percents = 100 * np.array(rows, float)  # NaN for a class without images
    differences = percents - percents[0]
    limit = max(5.0, np.nanmax(np.abs(differences), initial=0.0))
    axes.imshow(differences, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), difference in np.ndenumerate(differences):
        text = f"{difference:+.1f}" if row else f"{percents[row, column]:.1f}"
        text = "-" if np.isnan(difference) else text
        color = "white" if abs(difference) > 0.7 * limit else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(percents.shape[1]), models[0].class_names, **SLANTED)
    axes.set_yticks([])
    others = ";\nother rows: difference in points" if len(models) > 1 else ""
    axes.set_title(f"Accuracy per class (%) of {models[0].name}{others}")


def draw_differences(axes: plt.Axes, models: list[Predictions]) -> None:
    """Draw histograms of the images' largest difference in probability from the first model."""
    axes.set_yticks([])
    reference, *others = models
    if not others:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no Keras baseline\nto compare with", ha="center", va="center")
        return
    differences = [np.abs(each.probabilities - reference.probabilities).max(axis=1) for each in others]
    largest = max(each.max(initial=SMALLEST) for each in differences)
    bins = np.logspace(np.log10(SMALLEST), max(0.5 + np.log10(largest), -5), 60)
    height = 0.85 if len(others) > 1 else 1.7  # of a histogram's highest bar, in rows
    for row, each in enumerate(differences, 1):
        images, _ = np.histogram(each.clip(SMALLEST), bins)
        axes.stairs(
            row + 0.5 - height * images / images.max(), bins, baseline=row + 0.5, fill=True, color=BLUE
        )
        axes.axhline(row + 0.5, color="black", linewidth=0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_major_formatter("{x:.0e}")  # exponents as in 10^-7 would be smaller than 8 points
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_title(f"Largest difference\nof a probability from\n{reference.name}")
    axes.set_xlabel(f"images by difference\n({SMALLEST:g}: that or less)")


def draw_confusion(axes: plt.Axes, ours: Predictions) -> None:
    """Draw the confusion matrix. Colours follow the counts' square roots, so that mistakes are visible."""
    counts = np.array(ours.metrics["confusion_matrix"])
    axes.imshow(np.sqrt(counts), cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if np.sqrt(count) > 0.55 * np.sqrt(counts.max()) else "black"
        axes.text(column, row, f"{count:,}" if count else "", ha="center", va="center", color=color)
    axes.set_xticks(range(len(counts)), ours.class_names, **SLANTED)
    axes.set_yticks(range(len(counts)), ours.class_names)
    axes.set_title(f"Confusion matrix of {ours.name} (images)")
    axes.set(xlabel="predicted class", ylabel="true class")


def draw_mistakes(figure: plt.Figure, dataset: Dataset, ours: Predictions) -> None:
    """Draw the wrongly classified images of the highest probability."""
    wrong = np.flatnonzero(ours.classes != dataset.labels)
    confidence = ours.probabilities.max(axis=1)
    title = f"Most confident mistakes of\n{ours.name}\n(predicted class, its probability, true class)"
    figure.suptitle(title, fontsize=10, weight="bold")
    cells = figure.subplots(*MISTAKES).ravel()
    for axes in cells:
        axes.set_axis_off()
    for axes, image in zip(cells, wrong[np.argsort(-confidence[wrong], kind="stable")], strict=False):
        axes.imshow(dataset.images[image].transpose(1, 2, 0))
        predicted, true = (dataset.class_names[each[image]] for each in (ours.classes, dataset.labels))
        axes.set_title(f"{predicted}\n{confidence[image]:.4f}\ntrue: {true}", fontsize=8, weight="normal")
