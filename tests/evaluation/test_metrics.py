"""The figures, against independent ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data.cifar10 import CLASS_NAMES
from models import resnet8
from models.evaluation.inference import network_size
from models.evaluation.metrics import (
    Predictions,
    compare,
    mcnemar_p,
    near_chance_notes,
    p_text,
    short_names,
    wilson_interval,
)
from models.scaling import Scaling
from tests.evaluating import evaluated, has_line, random_model, save, scaling


def test_metrics_agree_with_plain_pytorch(tmp_path, sample):
    model = random_model()
    save(model, tmp_path / "model.pt", input=scaling(120.0, 64.0))
    _, metrics = evaluated("model.pt", "--no-keras", cwd=tmp_path)

    labels = torch.from_numpy(sample.labels)
    with torch.inference_mode():
        logits = model((torch.from_numpy(sample.images).float() - 120) / 64).double()
    predicted = logits.argmax(1)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for true, guess in zip(labels, predicted, strict=True):
        confusion[true, guess] += 1
    ours = metrics["pytorch"]
    assert ours["correct"] == int((predicted == labels).sum())
    assert ours["accuracy"] == ours["correct"] / 1000
    assert ours["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert ours["confusion_matrix"] == confusion.tolist()
    per_class = {
        name: (predicted[labels == i] == i).double().mean().item() for i, name in enumerate(CLASS_NAMES)
    }
    assert ours["per_class_accuracy"] == pytest.approx(per_class)
    assert metrics["checkpoint"] == "model.pt"
    assert metrics["dataset"] == {"name": sample.name, "images": 1000, "sha256": sample.sha256}
    assert metrics["keras"] is None and metrics["agreement"] is None
    throughput = metrics["throughput"]
    assert throughput["images_per_second"] == pytest.approx(1000 / throughput["seconds"])
    assert (throughput["dtype"], throughput["batch_norm_folded"]) == ("float32", False)
    assert metrics["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_published_values(correct, images, low, high):
    assert wilson_interval(correct, images) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(images - correct, images)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1), (5, 5, 1), (0, 5, 2 / 32), (1, 5, 14 / 64), (9, 1, 22 / 1024), (8, 2, 112 / 1024)],
)
def test_mcnemar_is_a_sign_test(first, second, p):
    assert mcnemar_p(first, second) == mcnemar_p(second, first) == p


def test_mcnemar_of_many_images_nears_the_normal_distribution():
    first, second = 4900, 5100
    z = (second - first - 1) / (first + second) ** 0.5  # with Edwards's continuity correction
    assert mcnemar_p(first, second) == pytest.approx(torch.erfc(torch.tensor(z / 2**0.5)).item(), rel=1e-3)
    assert mcnemar_p(0, 10_000) == 0.0


def test_compare_counts_image_by_image():
    def model(name, classes):
        logits = torch.from_numpy(5.0 * np.eye(10)[classes])
        log_probabilities = logits.log_softmax(dim=1).numpy()
        return Predictions(name, Path(name), log_probabilities, np.arange(4), [0.0] * 3, [1.0] * 3)

    pair = compare(model("a", [0, 1, 9, 9]), model("b", [0, 9, 2, 3]))
    assert pair["models"] == ["a", "b"]
    assert (pair["same_prediction"], pair["accuracy_difference"]) == (1, 0.25)
    assert pair["mcnemar_p"] == 1.0  # one against two
    peak, rest = np.exp(5) / (np.exp(5) + 9), 1 / (np.exp(5) + 9)
    assert pair["max_abs_probability_difference"] == pytest.approx(peak - rest)
    # three of the four images differ, each in two of its ten probabilities
    assert pair["mean_abs_probability_difference"] == pytest.approx((peak - rest) * 3 * 2 / (4 * 10))


def test_short_names():
    assert short_names([Path("a/x.pt"), Path("b/x.pt"), Path("b/y.pt")]) == ["a/x.pt", "b/x.pt", "y.pt"]


def predictions(name, correct, fed=(0.0, 1.0), images=100):
    """Predictions of which so many are right."""
    labels = np.arange(images) % 10
    classes = np.where(np.arange(images) < correct, labels, (labels + 1) % 10)
    log_probabilities = torch.from_numpy(5.0 * np.eye(10)[classes]).log_softmax(dim=1).numpy()
    mean, std = fed
    return Predictions(name, Path(name), log_probabilities, labels, Scaling([mean] * 3, [std] * 3))


def test_near_chance_blames_the_inputs_only_where_they_may_be_wrong():
    fine, pruned = predictions("fine.pt", 87), predictions("pruned.pt", 15)
    other_inputs = predictions("other.pt", 12, fed=(0.0, 255.0))

    def blamed(ours, compared, keras, is_overridden=False):
        notes = near_chance_notes(ours, compared, keras, is_overridden)
        return [name for note in notes for name in ("fine.pt", "pruned.pt", "other.pt") if name in note]

    assert blamed(pruned, [], None) == ["pruned.pt"]
    assert blamed(pruned, [], predictions("Keras", 87)) == []  # fed the same, and right
    assert blamed(pruned, [], predictions("Keras", 87), is_overridden=True) == []
    assert blamed(pruned, [], predictions("Keras", 11)) == ["pruned.pt"]  # both may be fed the wrong inputs
    assert blamed(fine, [pruned], None) == []
    assert blamed(fine, [other_inputs], None) == ["other.pt"]
    assert blamed(other_inputs, [], predictions("Keras", 87), is_overridden=True) == ["other.pt"]


def test_an_agreement_is_a_dict_that_prints_as_a_sentence():
    pair = compare(predictions("a.pt", 87), predictions("b.pt", 85))
    assert json.loads(json.dumps(pair)) == pair and pair["images"] == 100
    (line,) = str(pair).splitlines()
    assert has_line(line, "a.pt", "b.pt", "98", "100", "-2.00", "0.50", "0.004", "0.936")


def test_predictions_are_short_to_print():
    shown = repr(predictions("a.pt", 87))
    assert len(shown) < 80 and has_line(shown, "Predictions", "'a.pt'", "0.8700", "100")


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (1.0, "1.00"),
        (0.5, "0.50"),
        (0.0496, "0.050"),
        (0.0012, "0.001"),
        (0.00099, "1e-03"),
        (2e-49, "2e-49"),
        (0, "<1e-99"),
    ],
)
def test_a_p_value_is_short(p, text):
    assert p_text(p) == text


def test_a_class_without_images_has_no_accuracy():
    full = predictions("a", 50)
    chosen = np.flatnonzero(full.labels != 3)
    subset = Predictions("a", None, full.log_probabilities[chosen], full.labels[chosen], full.scaling)
    accuracies = subset.metrics["per_class_accuracy"]
    assert accuracies.pop("cat") is None
    assert set(accuracies.values()) == {0.5}
    assert subset.metrics["accuracy"] == 0.5
    assert compare(subset, subset)["same_prediction"] == 90


def test_a_networks_size_is_what_its_docstring_and_pytorch_count():
    trainable, statistics, products = (
        int(word.replace(",", ""))
        for word in resnet8.__doc__.partition("    total")[2].splitlines()[0].replace("+", "").split()
    )
    size = network_size(random_model(), (3, 32, 32))
    assert size == {
        "parameters": trainable + statistics,
        "trainable": trainable,
        "multiply_accumulates": products,
    }
    wide = random_model(width=5, in_channels=1, num_classes=7).double()
    with FlopCounterMode(display=False) as counter:
        wide(torch.zeros(1, 1, 24, 40, dtype=torch.float64))
    size = network_size(wide, (1, 24, 40))
    assert size["multiply_accumulates"] == counter.get_total_flops() / 2
    assert size["parameters"] - size["trainable"] == 2 * (3 * 5 + 2 * 10 + 2 * 20)
