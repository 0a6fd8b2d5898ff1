"""Predictions of one model, their metrics, and comparisons of models."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data.cifar10 import CLASS_NAMES, Dataset
from models.normalization import Normalization

# Usual steps of probabilities: LiteRT's int8 softmax (ai.google.dev/edge/litert/models/quantization_spec) and
# ONNX Runtime's QLinearSoftmax, LiteRT's int16 softmax, and float16's smallest number.
STEPS = (2**-8, 2**-15, 2**-24)
BATCH_EFFECT = "outputs change with the other images of a batch, or from run to run; expected eval mode"
TINY = float(np.finfo(np.float32).tiny)  # float32's smallest normal number
MAX_BATCH_EFFECT = 1e-4  # of the largest output; the same shapes are rounded alike, but on some GPUs
TRIAL_IMAGES = 500  # under each usual normalization, where none is known: 0.6 s
MAX_P = 0.001  # McNemar's, for the best of six


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """Predictions of one model for a data set, and its speed."""

    name: str  # in tables: the file name
    path: Path | None
    log_probabilities: np.ndarray  # (N, classes) float64
    labels: np.ndarray  # (N,) int64: the true classes
    normalization: Normalization  # of the model's input
    throughput: dict | None = None  # None for Keras, whose speed is not measured
    format: str = ""  # such as "Keras 2.4.0 .h5 whole model"; "" for a PyTorch state_dict
    sparsity: float | None = None  # fraction of weights that are 0; None if unknown
    network: dict | None = None  # as returned by `inference.network_size`; None if unknown
    class_names: tuple[str, ...] = CLASS_NAMES
    outputs: str = "logits"  # how the network's outputs were read, as `read_outputs` returns it
    step: float = 0.0  # of "probabilities": in `log_probabilities`, and the loss, 0 is half a step
    is_clipped: bool = False  # whether quantized inputs have few values
    external_data: tuple[Path, ...] = ()  # further files of an ONNX model
    sha256: str | None = None  # of the file followed by its external data; None without any

    @classmethod
    def from_outputs(
        cls,
        name: str,
        path: Path | None,
        outputs: np.ndarray,
        dataset: Dataset,
        normalization: Normalization,
        throughput: dict,
        step: float = 0.0,
        **fields: object,
    ) -> "Predictions":
        """Build from a network's (N, classes) outputs, read by `read_outputs`; `fields` are further ones."""
        log_probabilities, kind, step = read_outputs(outputs, step)
        fields |= {"class_names": dataset.class_names, "outputs": kind, "step": step}
        return cls(name, path, log_probabilities, dataset.labels, normalization, throughput, **fields)

    def __repr__(self) -> str:
        accuracy, images = self.metrics["accuracy"], len(self.labels)
        return f"Predictions({self.name!r}, accuracy {accuracy:.4f}, {images:,} images)"

    @cached_property
    def classes(self) -> np.ndarray:
        """Predicted classes, (N,) int64."""
        return self.log_probabilities.argmax(axis=1)

    @property
    def is_near_chance(self) -> bool:
        """Whether the accuracy is below twice the accuracy of guessing; of few classes, below 60 %."""
        return self.metrics["accuracy"] < min(2 / len(self.class_names), 0.6)

    @property
    def file_bytes(self) -> int:
        """Size of the model's file and its external data."""
        return sum(path.stat().st_size for path in (self.path, *self.external_data))

    @property
    def notes(self) -> list[str]:
        """Notes on inputs and outputs that give wrong numbers."""
        notes = []
        if self.is_clipped:
            reason = f"all pixels are clipped or rounded to a few values ({self.normalization})"
            notes.append(f"{self.name}: in its quantized input {reason}; see --mean and --std")
        if self.outputs == "sigmoid":
            reason = "outputs from 0 to 1 that do not sum to 1, as of a sigmoid"
            notes.append(f"{self.name}: {reason}; loss and probabilities are computed with a softmax")
        return notes

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Probabilities, (N, classes) float64, 0 where the network's are."""
        probabilities = np.exp(self.log_probabilities)
        return np.where(probabilities < 0.75 * self.step, 0, probabilities)

    @cached_property
    def metrics(self) -> dict:
        """Accuracy (fractions of 1), AUC, loss (mean cross-entropy, in nats), and the confusion matrix.

        Row i, column j of the matrix is the number of images of class i that were classified as class j. The
        accuracy of a class without images is None.
        """
        images, classes = self.log_probabilities.shape
        confusion = np.bincount(self.labels.astype(np.int64) * classes + self.classes, minlength=classes**2)
        confusion = confusion.reshape(classes, classes)
        correct, totals = confusion.diagonal().tolist(), confusion.sum(axis=1).tolist()
        per_class = [right / total if total else None for right, total in zip(correct, totals, strict=True)]
        return {
            "accuracy": sum(correct) / images,
            "correct": sum(correct),
            "confidence_interval_95": wilson_interval(sum(correct), images),
            "auc": macro_auc(self.probabilities, self.labels),
            "loss": float(-self.log_probabilities[np.arange(images), self.labels].mean()),
            "per_class_accuracy": dict(zip(self.class_names, per_class, strict=True)),
            "confusion_matrix": confusion.tolist(),
        }


def macro_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the area under the ROC curve of one class against the rest, the mean of all classes.

    It is the fraction of pairs (an image of the class, another) whose scores are in the right order, equal
    ones counted half (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747). MLPerf Tiny's runner
    approximates it with 101 thresholds. Classes without images are left out; None if one class has all.
    """
    areas = []
    for label in np.unique(labels) if len(np.unique(labels)) > 1 else ():
        _, places, counts = np.unique(scores[:, label], return_inverse=True, return_counts=True)
        ranks = (counts.cumsum() - (counts - 1) / 2)[places]  # from 1, the mean of equal scores
        is_class = labels == label
        inside, outside = int(is_class.sum()), int((~is_class).sum())
        areas.append((ranks[is_class].sum() - inside * (inside + 1) / 2) / (inside * outside))
    return float(np.mean(areas)) if areas else None


def check_outputs(source: str | Path, outputs: np.ndarray, dataset: Dataset) -> None:
    """Raise ValueError, which names `source`, unless the outputs are finite, one per image and class."""
    expected = (len(dataset), len(dataset.class_names))
    if outputs.shape != expected:
        raise ValueError(f"{source}: the outputs have shape {outputs.shape}; expected {expected}")
    if not np.isfinite(outputs).all():
        raise ValueError(f"{source}: the outputs are NaN or infinite")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities, (N, classes) float64, of logits of any dtype."""
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def read_outputs(outputs: np.ndarray, step: float = 0.0) -> tuple[np.ndarray, str, float]:
    """Return the log-probabilities of (N, classes) outputs, float64, the kind of outputs, and their step.

    Outputs from 0 to 1 are "probabilities" if the sums of most rows are 1 to 8 bits, else of a "sigmoid",
    which is read like "logits". Probabilities are multiples of `step`, by default the largest of STEPS that
    fits. One of 0 counts as half a step: its logarithm, and with it the loss, would be infinite.
    """
    if outputs.min() < 0 or outputs.max() > 1 + 1e-3:  # float16's rounding
        return log_softmax(outputs), "logits", 0.0
    step = step or next((each for each in STEPS if not (outputs % each).any()), 2 * TINY)
    error = np.median(np.abs(outputs.sum(axis=1, dtype=np.float64) - 1))
    if error > np.clip(outputs.shape[1] * max(step, 2**-8) / 2, 0.01, 0.5):
        return log_softmax(outputs), "sigmoid", 0.0
    return np.log(np.maximum(outputs.astype(np.float64), step / 2)), "probabilities", step


def depends_on_batch(
    images: np.ndarray, outputs: np.ndarray, run: Callable[[np.ndarray], np.ndarray]
) -> bool:
    """Whether the outputs of an image change with the other images of its batch, or from run to run.

    `images` are the (N, C, H, W) uint8 images of a batch, `outputs` theirs, and `run` returns the outputs of
    others: one image stays, the others are inverted. Two images stay in turn, those with the least outputs:
    one of them may have the batch's range, on which dynamic quantization depends.
    """
    largest = np.abs(outputs).reshape(len(outputs), -1).max(axis=1)
    for row in largest.argsort()[:2]:
        others = 255 - images
        others[row] = images[row]
        if np.abs(run(others)[row] - outputs[row]).max() > MAX_BATCH_EFFECT * largest.max():
            return True
    return False


class Comparison(dict):
    """Comparison of two models: a dict, as in the JSON, that prints as a sentence."""

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
    """Format a p-value in at most 6 characters: "0.85", "0.049", "2e-49"; a bound if it is tiny."""
    if p >= 0.001:
        return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"
    return f"{p:.0e}" if p > 1e-99 else "<1e-99"


def difference_text(difference: float) -> str:
    """Format a difference of probabilities in at most 7 characters: "0", "0.031", "3.1e-06"."""
    if difference == 0:
        return "0"
    return f"{difference:.3f}" if difference >= 0.001 else f"{difference:.1e}"


def compare(first: Predictions, second: Predictions) -> Comparison:
    """Return the comparison of two models on the same images; differences are second minus first.

    Fractions are of 1; the mean difference is over all images and classes. Raises ValueError if the labels
    differ: then the images do, too.
    """
    if not np.array_equal(first.labels, second.labels):
        raise ValueError(f"{second.name} and {first.name} were evaluated on different images")
    first_right, second_right = (each.classes == each.labels for each in (first, second))
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    differences = np.abs(first.probabilities - second.probabilities)
    return Comparison(
        models=[first.name, second.name],
        images=len(first.labels),
        same_prediction=int((first.classes == second.classes).sum()),
        max_abs_probability_difference=float(differences.max()),
        mean_abs_probability_difference=float(differences.mean()),
        accuracy_difference=(only_second - only_first) / len(first.labels),
        mcnemar_p=mcnemar_p(only_first, only_second),
    )


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """Return an accuracy's 95 % confidence interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = 1.959963984540054  # the normal distribution's quantile at 97.5 %
    accuracy = correct / images
    center = accuracy + z**2 / (2 * images)
    margin = z * math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2))
    low, high = ((center + sign * margin) / (1 + z**2 / images) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947, doi:10.1007/BF02295996).

    `only_first` images are right in the first model only, `only_second` in the second only. If the models are
    equally good, each of these images is a coin toss.
    """
    tosses, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1  # ways to get 0 heads, 1 head, ... in so many tosses, as exact integers
    for heads in range(fewer):
        ways = ways * (tosses - heads) // (heads + 1)
        total += ways
    return min(1.0, 2 * total / 2**tosses)


def check_guards(
    checkpoints: list[Predictions], reference: Predictions, min_accuracy: float | None, max_drop: float | None
) -> list[dict]:
    """Compare every checkpoint with the bounds that are not None.

    Returns each bound, the measured value and whether it is met. The drop is relative to `reference`;
    accuracies are fractions of 1.
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


def near_chance_notes(predictions: list[Predictions]) -> list[str]:
    """Return a note for every model with an accuracy near chance, or a loss above guessing's."""
    notes = []
    for each in predictions:
        loss, guess = each.metrics["loss"], math.log(len(each.class_names))
        problem = f"loss {loss:.2f} is above guessing's {guess:.2f}" if loss > guess else ""
        if each.is_near_chance:
            problem = f"accuracy {100 * each.metrics['accuracy']:.1f} % is near chance"
        if problem:
            advice = f"is the input normalization right ({each.normalization})? see --mean and --std"
            notes.append(f"{each.name}: {problem}; {advice}")
    return notes


def better_normalization(
    predictions: Predictions,
    dataset: Dataset,
    predict: Callable[[Dataset], Predictions],
    images: int = TRIAL_IMAGES,
) -> tuple[str, Normalization] | None:
    """Return both accuracies as text and a usual normalization with the higher one, beyond chance.

    `predict` runs the network on normalized images: the first `images` under each usual normalization.
    """
    usual = Normalization.usual(dataset.images.shape[1])
    usual = [each for each in usual if each != predictions.normalization]
    images = min(images, 2**26 // (len(usual) * dataset.images[0].size))  # 256 MB
    labels = dataset.labels[:images]
    normalized = np.concatenate([each(dataset.images[:images]).astype(np.float32) for each in usual])
    trial = replace(dataset, images=normalized, labels=np.tile(labels, len(usual)))
    try:
        outputs = np.split(predict(trial).log_probabilities, len(usual))
    except Exception:  # a network may refuse other inputs, or its arithmetic overflow
        return None
    now = replace(predictions, labels=labels, log_probabilities=predictions.log_probabilities[:images])
    tried = [
        replace(now, log_probabilities=each, normalization=normalization)
        for each, normalization in zip(outputs, usual, strict=True)
    ]
    best = max(tried, key=lambda each: each.metrics["correct"])
    pair = compare(now, best)
    if best.is_near_chance or pair["accuracy_difference"] <= 0 or pair["mcnemar_p"] > MAX_P:
        return None
    accuracy, better = (f"{100 * each.metrics['accuracy']:.1f} %" for each in (predictions, best))
    text = f"{predictions.name}: {accuracy} with {predictions.normalization}"
    return f"{text}, {better} (first {len(labels)} images) with", best.normalization


def short_names(paths: list[Path]) -> list[str]:
    """Return the file names, or the whole path where a file name is not unique."""
    names = [path.name for path in paths]
    return [str(path) if names.count(path.name) > 1 else path.name for path in paths]
