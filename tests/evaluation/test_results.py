"""Tables, metrics.txt, metrics.json and report.png: values, names, and whose files are replaced."""

import hashlib
import io
import itertools
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import evaluate
from data.cifar10 import Dataset, calibration_indices
from models.evaluation import figure, results
from models.evaluation.metrics import Predictions, compare, difference_text, p_text
from models.evaluation.results import LONGEST_NAME, MANY, Evaluation, calibration_notes
from models.normalization import Normalization
from tests.evaluating import (
    command,
    evaluated,
    needs_real_model,
    random_model,
    refused,
    save,
    scaling,
    with_few_images,
)

NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture
def folder(tmp_path, monkeypatch, sample):
    """A folder with a random `model.pt` and its JSON, to be evaluated on 100 images."""
    with_few_images(monkeypatch, sample)
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    return tmp_path


@pytest.fixture
def make(monkeypatch, sample, tmp_path):
    """Return a function that makes an Evaluation of random predictions, Keras's first if `keras`."""
    few = with_few_images(monkeypatch, sample)

    def evaluation(names, keras=True, dataset=few, **options):
        random, models = np.random.default_rng(0), []
        for index, name in enumerate(names):
            (path := tmp_path / str(index)).write_bytes(bytes(311_600))
            logs = np.log(random.dirichlet(np.ones(10), len(dataset.labels)))
            ran = {"images_per_second": 1234.5, "dtype": "float32", "device": "cpu"}
            models.append(Predictions(name, path, logs, dataset.labels, Normalization.from_args(3), ran))
        baseline = replace(models.pop(0), throughput=None) if keras else None
        hashes = [f"{index:064}" for index in range(len(models))]
        return Evaluation(dataset, models[0], baseline, models[1:], hashes, [], [], **options)

    return evaluation


# Tables


@needs_real_model
def test_output_in_a_pipe_is_plain_text_of_80_columns(converted):
    folder, stdout, _ = converted
    tables = stdout.split("\n\n", 1)[1]
    written = (folder / "results/metrics.txt").read_text()
    for text in (tables, written.split("note:")[0]):
        assert text.isascii() and text.replace("\n", "").isprintable()
        assert max(map(len, text.splitlines())) <= 80
    assert tables.split("\n\nwrote")[0].strip() in written
    assert "Confusion matrix of model.pt" in written


@pytest.mark.parametrize("length", [28, 29])
@pytest.mark.parametrize("models", [1, 50])
def test_each_model_has_a_row_in_tables_of_80_columns(make, models, length):
    """Longer names are cut in the middle, and stay different; the lines below have the whole path."""
    names = [f"{index:0{length}}" for index in range(models)]
    names += ["1".center(length, "-"), "2".center(length, "-")]  # which differ in the middle only
    evaluation = make(["Keras", *names], per_class=False)
    labels = [each.name for each in evaluation.shown]
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= LONGEST_NAME
    if length <= LONGEST_NAME:
        assert labels == ["Keras", *names]
    *tables, below = evaluation.summary().rstrip().split("\n\n")
    for rows in (tables[1], tables[-1]):
        assert [line.split()[0] for line in rows.splitlines()[2:]] == labels
        assert max(map(len, rows.splitlines())) <= 80
    described = zip(labels, evaluation.all_predictions, strict=True)
    assert below.splitlines() == [f"{label}: {each.path}" for label, each in described]


def test_a_row_has_the_models_figures(make):
    evaluation = make(["Keras", "a.pt", "b.pt"])
    (other,) = evaluation.compared
    _, accuracy, _, files, _ = evaluation.summary().split("\n\n")
    pair, metrics = compare(evaluation.keras, other), other.metrics
    low, high = metrics["confidence_interval_95"]
    assert accuracy.splitlines()[-1].split() == [
        "b.pt",
        f"{100 * metrics['accuracy']:.2f}",
        f"{100 * low:.2f}-{100 * high:.2f}",
        str(pair["same_prediction"]),
        p_text(pair["mcnemar_p"]),
        difference_text(pair["max_abs_probability_difference"]),
    ]
    row = [f"{metrics['loss']:.4f}", "312", "1,234", "state_dict"]
    assert files.splitlines()[-1].split() == ["b.pt", *row]
    evaluation = replace(evaluation, dataset=replace(evaluation.dataset, part="perf"))
    *_, files, _ = evaluation.summary().split("\n\n")
    assert files.splitlines()[-1].split() == ["b.pt", f"{metrics['auc']:.4f}", *row]
    assert len(accuracy.splitlines()[2].split()) == 3  # Keras is not compared with itself


@pytest.mark.parametrize(
    ("arguments", "is_shown"), [([], True), (["b.pt"], False), (["b.pt", "--per-class"], True)]
)
def test_accuracy_per_class(folder, arguments, is_shown):
    save(random_model(1), folder / "b.pt")
    stdout, metrics = evaluated("model.pt", "--no-keras", *arguments, cwd=folder)
    assert ("airplane" in stdout) == is_shown
    if is_shown:
        heading, row = map(str.split, stdout[stdout.index("accuracy, %") :].splitlines()[:2])
        assert heading[2:] == NAMES
        assert row[1:] == [f"{100 * of:.2f}" for of in metrics["pytorch"]["per_class_accuracy"].values()]


def test_a_class_without_images_is_a_dash(make, sample):
    chosen = np.flatnonzero(sample.labels != 3)
    subset = replace(sample, images=sample.images[chosen], labels=sample.labels[chosen])
    rows = make(["Keras", "a.pt"], dataset=subset).summary().partition("accuracy, %")[2].splitlines()[1:3]
    assert [row.split()[4] for row in rows] == ["-", "-"]


def test_pairs_of_many_models_are_bounded(make):
    """Up to MANY models every pair, in the order of the tables; of more, those with Keras and CHECKPOINT."""
    names = ["Keras", *map(str, range(MANY))]
    pairs = list(itertools.combinations(names, 2))
    for count, keras, expected in (
        (MANY, True, [pair for pair in pairs if names[-1] not in pair]),
        (MANY + 1, True, [pair for pair in pairs if pair[0] in ("Keras", "0")]),
        (MANY + 1, False, [pair for pair in pairs if pair[0] == "Keras"]),
    ):
        assert [tuple(pair["models"]) for pair in make(names[:count], keras).pairs] == expected


# metrics.json


@needs_real_model
def test_keys_and_values_of_metrics_json(real):
    thin = save(random_model(width=4), real / "thin.pt", input=scaling(100.0, 32.0))
    stdout, metrics = evaluated("model.pt", "thin.pt", cwd=real)
    file = "checkpoint checkpoint_sha256 input throughput format file_bytes outputs sparsity network"
    file = set(file.split())
    measured = {"accuracy", "correct", "confidence_interval_95", "auc", "loss"}
    measured |= {"per_class_accuracy", "confusion_matrix"}
    whole = "dataset pytorch keras agreement compared pairs guards notes environment date".split()
    assert metrics.keys() == file | set(whole)
    assert metrics["pytorch"].keys() == measured
    assert metrics["keras"].keys() == measured | {"file", "sha256", "format", "input", "file_bytes"}
    assert metrics["agreement"] == metrics["pairs"][0]
    (compared,) = metrics["compared"]
    assert compared.keys() == file | measured
    assert compared["checkpoint_sha256"] == hashlib.sha256(thin.read_bytes()).hexdigest()
    assert compared["file_bytes"] == thin.stat().st_size
    assert compared["input"] == {"mean": [100.0] * 3, "std": [32.0] * 3}
    assert compared["correct"] == sum(row[i] for i, row in enumerate(compared["confusion_matrix"]))
    size = {"parameters": 78_666, "trainable": 78_186, "multiply_accumulates": 12_501_632}
    assert metrics["network"] == size
    assert f"{size['parameters']:,} parameters, {size['multiply_accumulates']:,} " in stdout
    assert f"{compared['network']['parameters']:,} parameters" in stdout


# The figure


def drawn(evaluation, monkeypatch):
    """Draw report.png; return its texts and the image, whose letters are legible at 1,000 pixels."""
    found = []

    def look(figure):
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        assert figure.get_size_inches()[0] == 10
        assert min(text.get_fontsize() for text in texts) >= 8
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= 10
        found.extend(text.get_text() for text in texts)

    monkeypatch.setattr(figure.plt, "close", look)
    answer = {"date": "2025", "keras": {"sha256": "k" * 64}}
    results.write_report(content := io.BytesIO(), evaluation, answer)
    return found, Image.open(content)


ODD = ["a$b_{^$.pt", "_.pt", "[red]x[/red] :smile:", "bad\udce8.pt", "\x1b[2J\n\t.pt", "\u6a21.pt"]
LONG = [f"{index} model with a long name.pt" for index in range(12)]


@pytest.mark.parametrize(
    ("names", "keras"),
    [(["Keras", "a.pt"], True), (["a.pt"], False), (["Keras", "a.pt", "a.pt", *ODD, *LONG], True)],
    ids=["Keras", "alone", "many"],
)
def test_report_shows_every_model(make, monkeypatch, names, keras):
    evaluation = make(names, keras)
    evaluation.dataset.labels[evaluation.dataset.labels == 3] = 4  # no images of class 3
    texts, image = drawn(evaluation, monkeypatch)
    assert texts.count("-") == len(names)
    rows = [f"{each.name}   {100 * each.metrics['accuracy']:.2f} %" for each in evaluation.shown]
    assert [text for text in texts if text in rows] == rows
    ours = evaluation.shown[keras].name
    assert sum(ours in text for text in texts) >= 4  # its row, the confusion matrix, the mistakes, the foot
    assert image.width == 1500
    for each, sha256 in zip([evaluation.ours, *evaluation.compared], evaluation.hashes, strict=True):
        assert f"{each.path}, SHA-256 {sha256}" in image.text["Description"]


def test_any_name_is_harmless(make):
    evaluation = make(["Keras", *ODD], per_class=True)
    text = evaluation.summary()
    text.encode()
    assert "\x1b" not in text
    for name, shown in zip(ODD, evaluation.shown[1:], strict=True):
        assert shown.name.isprintable() and len(shown.name) == len(name)
        assert sum(line.startswith(f"{shown.name} ") for line in text.splitlines()) == 3


# Files


def test_results_are_replaced_completely_or_not_at_all(folder, monkeypatch):
    """A run without --report leaves the earlier figure, which names the files that it shows."""

    def contents():
        return {path.name: path.read_bytes() for path in (folder / "results").iterdir()}

    evaluated("model.pt", "--no-keras", "--report", cwd=folder)
    first = contents()
    report = Image.open(io.BytesIO(first["report.png"]))
    assert hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest() in report.text["Description"]
    save(random_model(1), folder / "model.pt")
    evaluated("model.pt", "--no-keras", cwd=folder)
    second = contents()
    assert second.keys() == first.keys() and second["metrics.txt"] != first["metrics.txt"]
    assert second["report.png"] == first["report.png"]
    monkeypatch.setattr(figure, "draw_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("model.pt", "--no-keras", "--report", cwd=folder)
    assert contents() == second


def holding(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make_it"),
    [
        ("metrics.txt", holding(b"mine")),
        ("metrics.json", holding(b'{"checkpoint": "mine"}')),
        ("metrics.json", holding(b"[" * 10_000)),
        ("report.png", holding(b"\x89PNG\r\n\x1a\n of mine")),
        ("metrics.pt", holding(b"its JSON would be metrics.json")),
        ("metrics.json", os.mkdir),
        ("metrics.json", os.mkfifo),
        ("metrics.json", lambda path: os.symlink("nowhere", path)),
    ],
)
def test_foreign_files_are_not_replaced(folder, name, make_it, monkeypatch):
    foreign = folder / "results" / name
    foreign.parent.mkdir()
    make_it(foreign)
    before = foreign.lstat()
    monkeypatch.setattr(evaluate, "load_test", lambda *_: pytest.fail("went on"))
    line = refused("model.pt", "--no-keras", cwd=folder)
    assert name in line and ("--output" in line or not foreign.is_file())
    assert foreign.lstat() == before


def test_results_of_an_earlier_version_are_replaced_and_other_files_stay(folder):
    keys = {"checkpoint", "checkpoint_sha256", "dataset", "input", "pytorch", "keras", "agreement", "pairs"}
    (folder / "results").mkdir()
    (folder / "results/metrics.json").write_text(json.dumps(dict.fromkeys(keys)))
    (folder / "results/metrics.txt").write_text("ResNet8 on the CIFAR-10 sample, 1,000 images")
    (folder / "results/notes.md").write_text("mine")
    _, metrics = evaluated("model.pt", "--no-keras", cwd=folder)
    assert metrics["checkpoint"] == "model.pt"
    assert (folder / "results/notes.md").read_text() == "mine"


def test_names_that_are_not_utf_8(folder):
    os.rename(folder / "model.pt", os.fsencode(folder) + b"/bad\xe8.pt")
    _, metrics = evaluated("bad\udce8.pt", "--no-keras", cwd=folder)
    assert metrics["checkpoint"] == "bad\udce8.pt"
    assert "bad?.pt" in (folder / "results/metrics.txt").read_text(encoding="utf-8")


def test_int8_files_are_also_scored_without_the_calibration_images(sample):
    """Here all of these are right, and none of the others."""
    labels = np.zeros(10_000, np.int64)
    scores = np.zeros((10_000, 10))
    scores[:, 1] = 1
    scores[calibration_indices(), 0] = 2
    full = Dataset("full", np.zeros((10_000, 1, 1, 1), np.uint8), labels)
    normalization = Normalization.from_args(3)
    models = [
        Predictions(name, None, scores, labels, normalization, format=name)
        for name in ("state_dict", "TensorFlow Lite, int8")
    ]
    (note,) = calibration_notes(full, models)
    assert note.startswith(models[1].name) and all(part in note for part in ("0.00 %", "9,500", "500"))
    assert calibration_notes(sample, models) == []
