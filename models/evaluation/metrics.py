"""What one model makes of the images, how good that is, and how two models differ."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data.cifar10 import CLASS_NAMES
from models.scaling import Scaling


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """What one model makes of the images, and how fast."""

    name: str  # in tables: the file's name
    path: Path | None  # of what was run
    log_probabilities: np.ndarray  # (N, classes) float64
    labels: np.ndarray  # (N,) int64: the true classes
    scaling: Scaling  # what the model is fed
    throughput: dict | None = None  # None: Keras, whose speed is not measured here
    format: str = ""  # what the file is, such as "Keras 2.4.0 .h5 whole model"; "" for a state_dict
    sparsity: float | None = None  # the part of the weights that is 0; None where it is not known
    network: dict | None = None  # its size, as `inference.network_size` returns it; None where not known

    def __repr__(self) -> str:
        accuracy, images = self.metrics["accuracy"], len(self.labels)
        return f"Predictions({self.name!r}, accuracy {accuracy:.4f}, {images:,} images)"

    @cached_property
    def classes(self) -> np.ndarray:
        """The predicted classes, (N,) int64."""
        return self.log_probabilities.argmax(axis=1)

    @property
    def is_near_chance(self) -> bool:
        """Whether it is right less than twice as often as a guess."""
        return self.metrics["accuracy"] < 2 / len(CLASS_NAMES)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(N, classes) float64."""
        return np.exp(self.log_probabilities)

    @cached_property
    def metrics(self) -> dict:
        """Accuracy (fractions of 1), loss (mean cross-entropy, in nats), and the confusion matrix.

        Row i, column j of the matrix counts the images of class i that were taken for class j. The accuracy
        of a class without images is None.
        """
        images, classes = self.log_probabilities.shape
        confusion = np.bincount(self.labels * classes + self.classes, minlength=classes**2)
        confusion = confusion.reshape(classes, classes)
        right, of = confusion.diagonal().tolist(), confusion.sum(axis=1).tolist()
        per_class = [some / many if many else None for some, many in zip(right, of, strict=True)]
        correct = int(confusion.trace())
        return {
            "accuracy": correct / images,
            "correct": correct,
            "confidence_interval_95": wilson_interval(correct, images),
            "loss": float(-self.log_probabilities[np.arange(images), self.labels].mean()),
            "per_class_accuracy": dict(zip(CLASS_NAMES, per_class, strict=True)),
            "confusion_matrix": confusion.tolist(),
        }


class Agreement(dict):
    """How two models agree: a plain dict, as JSON keeps it, that prints as a sentence."""

    def __str__(self) -> str:
        first, second = self["models"]
        return (
            f"{second} vs {first}: same class on {self['same_prediction']:,} of {self['images']:,} images, "
            f"accuracy {100 * self['accuracy_difference']:+.2f} points "
            f"(McNemar's p {p_text(self['mcnemar_p'])}), a probability differs by "
            f"{difference_text(self['mean_abs_probability_difference'])} on average, "
            f"{difference_text(self['max_abs_probability_difference'])} at most"
        )


def p_text(p: float) -> str:
    """Return a p-value in at most 6 characters: "0.85", "0.049", "2e-49"; where it is tiny, a bound."""
    if p >= 0.001:
        return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"
    return f"{p:.0e}" if p > 1e-99 else "<1e-99"


def difference_text(difference: float) -> str:
    """Return a difference of a probability in at most 7 characters: "0", "0.031", "3.1e-06"."""
    if difference == 0:
        return "0"
    return f"{difference:.3f}" if difference >= 0.001 else f"{difference:.1e}"


def compare(first: Predictions, second: Predictions) -> Agreement:
    """Return how two models agree, image by image; differences are second minus first.

    Printed it is a sentence. Fractions are of 1; the mean difference is over all images and classes.
    """
    first_right, second_right = (each.classes == each.labels for each in (first, second))
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    differences = np.abs(first.probabilities - second.probabilities)
    found = {
        "models": [first.name, second.name],
        "images": len(first.labels),
        "same_prediction": int((first.classes == second.classes).sum()),
        "max_abs_probability_difference": float(differences.max()),
        "mean_abs_probability_difference": float(differences.mean()),
        "accuracy_difference": (only_second - only_first) / len(first.labels),
        "mcnemar_p": mcnemar_p(only_first, only_second),
    }
    return Agreement(found)


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Return an accuracy's 95 % confidence interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = 1.959963984540054  # the normal distribution's quantile at 97.5 %
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


def check_guards(
    checkpoints: list[Predictions],
    reference: Predictions,
    min_accuracy: float | None,
    max_drop: float | None,
) -> list[dict]:
    """Return for every checkpoint and bound what was asked, what was measured, and whether it is met.

    The drop is measured from `reference`; None is no bound. Accuracies are fractions of 1.
    """
    guards = []
    for each in checkpoints:
        accuracy = each.metrics["accuracy"]
        drop = (reference.metrics["correct"] - each.metrics["correct"]) / len(each.labels)
        if min_accuracy is not None:
            guard = {"guard": "--min-accuracy", "bound": min_accuracy, "measured": accuracy}
            guards.append({"checkpoint": each.name, **guard, "met": accuracy >= min_accuracy})
        if max_drop is not None:
            guard = {"guard": "--max-drop", "bound": max_drop, "measured": drop, "below": reference.name}
            guards.append({"checkpoint": each.name, **guard, "met": drop <= max_drop})
    return guards


def near_chance_notes(
    ours: Predictions, compared: list[Predictions], keras: Predictions | None, is_overridden: bool
) -> list[str]:
    """Return what to say of checkpoints near chance that may be fed the wrong inputs.

    If another model is fed the same and is not near chance, the inputs are not to blame. What the JSON says
    of ours and of the Keras model is the same input, unless --mean or --std took its place.
    """
    fine = [each.scaling for each in (ours, *compared) if not each.is_near_chance]
    if keras and not keras.is_near_chance:
        fine.append(keras.scaling if is_overridden else ours.scaling)
    return [
        f"{each.name} is near chance: most likely the input scaling is wrong. It is fed "
        f"(pixel - mean) / std, pixels 0 to 255, mean {each.scaling.mean}, std {each.scaling.std}. "
        "If it wants other inputs, say so with --mean and --std, or convert it for them; for 0 to 1: "
        "python convert.py KERAS_FILE --mean 0 --std 255"
        for each in (ours, *compared)
        if each.is_near_chance and each.scaling not in fine
    ]


def short_names(paths: list[Path]) -> list[str]:
    """Return the files' names; the whole paths of those whose names are not unique."""
    return [str(path) if [p.name for p in paths].count(path.name) > 1 else path.name for path in paths]
