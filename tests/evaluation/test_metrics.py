"""models/evaluation/metrics.py: metrics and comparisons, against independent results."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.cifar10 import CLASS_NAMES
from evaluate import score
from models.evaluation.metrics import (
    Predictions,
    better_normalization,
    check_guards,
    compare,
    difference_text,
    log_softmax,
    macro_auc,
    mcnemar_p,
    near_chance_notes,
    p_text,
    read_outputs,
    short_names,
    wilson_interval,
)
from models.normalization import Normalization
from tests.evaluating import evaluated, random_model, save, scaling


def predictions(name, correct, std=1.0, images=100):
    """Return predictions of which the first `correct` are right, or those of a mask."""
    labels = np.arange(images) % 10
    right = np.arange(images) < correct if isinstance(correct, int) else correct
    classes = np.where(right, labels, (labels + 1) % 10)
    log_probabilities = torch.from_numpy(5.0 * np.eye(10)[classes]).log_softmax(dim=1).numpy()
    return Predictions(name, Path(name), log_probabilities, labels, Normalization.from_args(3, std=std))


@pytest.mark.filterwarnings("ignore::UserWarning")  # random weights are near chance
def test_metrics_of_the_command_and_of_score_equal_pytorchs(tmp_path, sample):
    model = random_model(width=4)
    save(model, tmp_path / "model.pt", input=scaling(120.0, 64.0))
    _, metrics = evaluated("model.pt", "--no-keras", cwd=tmp_path)
    predictions = score(model, sample, 120.0, 64.0)
    labels = torch.from_numpy(sample.labels)
    with torch.inference_mode():
        logits = model((torch.from_numpy(sample.images).float() - 120) / 64).double()
    predicted, ours = logits.argmax(1), metrics["pytorch"]
    confusion = [[int(((labels == i) & (predicted == j)).sum()) for j in range(10)] for i in range(10)]
    assert ours["confusion_matrix"] == confusion
    assert ours["correct"] == int((predicted == labels).sum()) == 1000 * ours["accuracy"]
    for loss in (ours["loss"], predictions.metrics["loss"]):
        assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    per_class = {name: confusion[i][i] / sum(confusion[i]) for i, name in enumerate(CLASS_NAMES)}
    assert ours["per_class_accuracy"] == pytest.approx(per_class)
    scores = [logits.softmax(1)[:, label] for label in range(10)]
    orders = [score[labels == label, None] - score[labels != label] for label, score in enumerate(scores)]
    areas = [((order > 0) + (order == 0) / 2).double().mean().item() for order in orders]
    for auc in (ours.pop("auc"), predictions.metrics["auc"]):
        assert auc == pytest.approx(sum(areas) / 10, rel=1e-4)  # float32 orders near scores otherwise
    ours.pop("loss")
    assert all(np.array_equal(value, predictions.metrics[name]) for name, value in ours.items())
    throughput = metrics["throughput"]
    assert throughput["images_per_second"] == pytest.approx(1000 / throughput["seconds"])


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


def test_mcnemar_of_many_images_is_near_the_normal_distribution():
    first, second = 4900, 5100
    z = (second - first - 1) / (first + second) ** 0.5  # with Edwards's continuity correction
    assert mcnemar_p(first, second) == pytest.approx(torch.erfc(torch.tensor(z / 2**0.5)).item(), rel=1e-3)
    assert mcnemar_p(0, 10_000) == 0.0


def test_compare_counts_images():
    def model(name, classes):
        log_probabilities = torch.from_numpy(5.0 * np.eye(10)[classes]).log_softmax(dim=1).numpy()
        return Predictions(name, Path(name), log_probabilities, np.arange(4), Normalization.from_args(3))

    pair = compare(model("a", [0, 1, 9, 9]), model("b", [0, 9, 2, 3]))
    assert pair["models"] == ["a", "b"] and pair["images"] == 4
    assert (pair["same_prediction"], pair["accuracy_difference"]) == (1, 0.25)
    assert pair["mcnemar_p"] == 1.0  # one against two
    peak, rest = np.exp(5) / (np.exp(5) + 9), 1 / (np.exp(5) + 9)
    assert pair["max_abs_probability_difference"] == pytest.approx(peak - rest)
    # three of the four images differ, each in two of its ten probabilities
    assert pair["mean_abs_probability_difference"] == pytest.approx((peak - rest) * 3 * 2 / (4 * 10))


def test_models_of_different_images_are_not_compared():
    for others in (predictions("b", 1, images=1), replace(predictions("b", 87), labels=np.arange(100) % 9)):
        with pytest.raises(ValueError, match=r"b and a .*different images"):
            compare(predictions("a", 87), others)


LOGITS = np.random.default_rng(0).normal(size=(10_000, 10)) * 5
PROBABILITIES = np.exp(log_softmax(LOGITS))


@pytest.mark.parametrize("count", [1, 10, 200, 10_000])
def test_probabilities_are_told_from_logits_by_all_outputs(count):
    """By their range, and their sum to 8 bits; 0 counts as half a step in the loss, and 0 elsewhere."""
    logits, expected = LOGITS[:count], PROBABILITIES[:count]
    for outputs in (logits, np.log(expected), 1 / (1 + np.exp(-logits))):  # the last of a sigmoid
        log_probabilities, kind, step = read_outputs(outputs)
        assert (kind, step) == ("logits" if outputs.min() < 0 else "sigmoid", 0)
        np.testing.assert_allclose(log_probabilities, log_softmax(outputs), atol=1e-12)
    for step, given in ((2**-8, 0), (2**-15, 0), (1 / 127, 1 / 127)):  # of int8, of int16, in the file
        outputs = np.floor(expected / step + 0.4) * step  # sums below 1
        log_probabilities, *read = read_outputs(outputs, given)
        assert read == ["probabilities", step]
        np.testing.assert_allclose(np.exp(log_probabilities), outputs.clip(step / 2))
    half, single = expected.astype(np.float16), expected.astype(np.float32)
    for outputs, smallest in ((half, 2**-25), (single, np.finfo(np.float32).tiny)):
        outputs[0, np.argmin(expected[0])] = 0
        log_probabilities, kind, step = read_outputs(outputs)
        assert kind == "probabilities" and log_probabilities.min() == pytest.approx(np.log(smallest))
        model = replace(predictions("a", 0, images=count), log_probabilities=log_probabilities, step=step)
        assert np.array_equal(model.probabilities == 0, outputs == 0)
        np.testing.assert_allclose(model.probabilities, outputs.astype(np.float64))


def test_a_sigmoid_is_noted():
    assert not predictions("fine", 87).notes
    (note,) = replace(predictions("a.onnx", 87), outputs="sigmoid").notes
    assert "a.onnx" in note and "sigmoid" in note


def test_a_comparison_is_a_dict_that_prints_as_a_sentence():
    pair = compare(predictions("a", 87), predictions("b", 85))
    assert json.loads(json.dumps(pair)) == pair
    for text in ("b vs a", "98 of 100", "-2.00 points", "p 0.5"):
        assert text in str(pair)
    assert repr(predictions("a.pt", 87)) == "Predictions('a.pt', accuracy 0.8700, 100 images)"


def test_small_numbers_are_short_to_print():
    values = [10.0**-power * digits for power in range(400) for digits in (1, 0.51, 0.0996)]
    assert max(map(len, map(p_text, values))) <= 7
    assert [p_text(p) for p in (0.5, 0.0496, 2e-49, 0)] == ["0.50", "0.050", "2e-49", "<1e-99"]
    assert [difference_text(d) for d in (0, 0.031, 3.1e-6)] == ["0", "0.031", "3.1e-06"]


def test_guards_hold_at_their_bounds():
    models, reference = [predictions("a", 87), predictions("b", 85)], predictions("Keras", 87)
    guards = check_guards(models, reference, 0.87, 0.02)
    expected = [("a", "--min-accuracy", 0.87, True), ("a", "--max-drop", 0.0, True)]
    expected += [("b", "--min-accuracy", 0.85, False), ("b", "--max-drop", 0.02, True)]
    keys = ("checkpoint", "guard", "measured", "met")
    assert [tuple(guard[key] for key in keys) for guard in guards] == expected
    assert {guard.get("below") for guard in guards} == {None, "Keras"}
    assert check_guards(models, reference, None, None) == []


def test_a_model_near_chance_or_with_a_loss_above_it_is_noted_with_its_normalization():
    """A wrong image costs 5 nats here."""
    models = [
        predictions("fine", 60),
        predictions("loud", 50, std=255.0),
        predictions("wrong", 19, std=255.0),
    ]
    loud, wrong = near_chance_notes(models)
    assert loud.startswith("loud: loss 2.5") and wrong.startswith("wrong: accuracy 19.0 %")
    assert all("255" in note and "--std" in note for note in (loud, wrong))


@pytest.mark.parametrize(
    ("gained", "lost", "is_named"), [(10, 0, False), (12, 0, True), (30, 10, False), (35, 10, True)]
)
def test_another_normalization_is_named_if_it_is_better_beyond_chance(sample, gained, lost, is_named):
    """McNemar's p is 0.002, 0.0005, 0.002 and 0.0002; all other normalizations are worse."""
    image, usual = np.arange(500), Normalization.usual(3)[1:]
    right = [image < 200] * len(usual)
    right[4] = (image >= lost) & (image < 300 + gained)

    def predict(trial):
        for normalization, images in zip(usual, np.split(trial.images, len(usual)), strict=True):
            np.testing.assert_allclose(images[[0, -1]], normalization(sample.images[[0, 499]]), rtol=1e-6)
        return predictions("trial", np.concatenate(right), images=500 * len(usual))

    now = predictions("a.pt", image < 300, images=500)
    better = better_normalization(now, replace(sample, labels=np.tile(now.labels, 2)), predict)
    assert (better is not None) == is_named
    if better:
        assert better[1] == usual[4] and better[0].startswith("a.pt: 60.0 %") and "500" in better[0]
        assert f"{60 + (gained - lost) / 5:.1f} %" in better[0]


def test_a_class_without_images_has_no_accuracy():
    full = predictions("a", 50)
    chosen = np.flatnonzero(full.labels != 3)
    subset = Predictions("a", None, full.log_probabilities[chosen], full.labels[chosen], full.normalization)
    accuracies = subset.metrics["per_class_accuracy"]
    assert accuracies.pop("cat") is None
    assert set(accuracies.values()) == {0.5} and subset.metrics["accuracy"] == 0.5
    assert compare(subset, subset)["same_prediction"] == 90


def test_auc_counts_equal_scores_half_and_leaves_out_classes_without_images():
    scores, labels = np.array([[3, 0, 9], [2, 1, 9], [2, 1, 9], [1, 5, 9.0]]), np.array([0, 0, 1, 1])
    assert macro_auc(scores, labels) == pytest.approx((3.5 / 4 + 3.5 / 4) / 2)
    assert macro_auc(scores, np.zeros(4, int)) is None


def test_short_names():
    assert short_names([Path("a/x.pt"), Path("b/x.pt"), Path("b/y.pt")]) == ["a/x.pt", "b/x.pt", "y.pt"]
