"""What is printed and written: tables, metrics.txt and metrics.json, the figure; whole or not at all."""

import hashlib
import io
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import evaluate
from data.cifar10 import CLASS_NAMES, Dataset
from models.evaluation import figure, results
from models.evaluation.metrics import Predictions, compare, p_text
from models.evaluation.results import MANY, Evaluation, size_text
from models.scaling import Scaling
from tests.evaluating import (
    command,
    evaluated,
    has_line,
    needs_real_model,
    process,
    random_model,
    refused,
    save,
    scaling,
)


def rows_of(text):
    """The cells of every line: names and numbers."""
    return [line.split() for line in text.splitlines()]


@needs_real_model
def test_output_in_a_pipe_is_plain_text_of_80_columns(converted):
    folder, stdout, metrics = converted
    tables = stdout.split("\n\n", 1)[1]
    written = (folder / "results/metrics.txt").read_text()
    for text in (tables, written):
        lines = [line for line in text.splitlines() if not any(note in line for note in metrics["notes"])]
        assert all(line.isascii() and line.isprintable() for line in lines)
        assert max(map(len, lines)) <= 80
    accuracy = metrics["pytorch"]["accuracy"]
    assert ["model.pt", f"{100 * accuracy:.2f}", "%"] in [row[:3] for row in rows_of(tables)]
    for name, counts in zip(CLASS_NAMES, metrics["pytorch"]["confusion_matrix"], strict=True):
        assert rows_of(written).count([name, *map(str, counts)]) == 2  # Keras's, and the checkpoint's
    assert tables.rpartition("\n\n")[0].strip() in written


@needs_real_model
def test_report(real):
    evaluated("model.pt", "--report", cwd=real)
    content = (real / "results/report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1000  # pixels wide


def test_report_without_anything_to_compare(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    evaluated("model.pt", "--no-keras", "--report", cwd=tmp_path)
    assert (tmp_path / "results/report.png").stat().st_size > 10_000


def test_results_that_cannot_be_written(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0))
    (tmp_path / "results").write_text("a file")
    assert "results" in refused("model.pt", "--no-keras", cwd=tmp_path)
    assert (tmp_path / "results").read_text() == "a file"


def test_a_crash_while_writing_leaves_the_old_results(tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("crash")

    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0))
    evaluated("model.pt", "--no-keras", cwd=tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    monkeypatch.setattr(figure, "draw_report", crash)
    with pytest.raises(RuntimeError, match="crash"):
        command("model.pt", "--no-keras", "--report", cwd=tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == before


@needs_real_model
def test_files_dtype_and_device_are_named(real):
    stdout, _ = evaluated("model.pt", "--dtype", "bfloat16", cwd=real)
    written = (real / "results/metrics.txt").read_text()
    for text in (stdout, written):
        assert has_line(text, "model.pt: model.pt", "bfloat16", "cpu")
        assert has_line(text, "Keras: model.h5", "3.15.1")
    stdout, _ = evaluated("model.pt", cwd=real)
    assert "\nmodel.pt: model.pt\n" in stdout


def test_compared_checkpoints_have_their_own_figures(tmp_path):
    save(random_model(0), tmp_path / "a.pt", input=scaling(120.0, 64.0))
    other = save(random_model(1), tmp_path / "b.pt", input=scaling(100.0, 32.0))
    _, metrics = evaluated("a.pt", "--compare", "b.pt", "--no-keras", cwd=tmp_path)
    (compared,) = metrics["compared"]
    assert compared["checkpoint_sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()
    assert compared["input"] == {"mean": [100.0] * 3, "std": [32.0] * 3}
    assert compared["correct"] == sum(row[i] for i, row in enumerate(compared["confusion_matrix"]))


def test_what_was_asked_of_accuracy_is_recorded(tmp_path):
    save(random_model(0), tmp_path / "a.pt", input=scaling(120.0, 64.0))
    save(random_model(1), tmp_path / "b.pt", input=scaling(120.0, 64.0))
    arguments = ["a.pt", "--compare", "b.pt", "--no-keras", "--min-accuracy", 0.5, "--max-drop", 1]
    _, metrics = evaluated(*arguments, cwd=tmp_path, status=3)
    found = {(guard["checkpoint"], guard["guard"]): guard for guard in metrics["guards"]}
    accuracy = metrics["pytorch"]["accuracy"]
    assert found["a.pt", "--min-accuracy"] == {
        "checkpoint": "a.pt", "guard": "--min-accuracy", "bound": 0.5, "measured": accuracy, "met": False
    }  # fmt: skip
    assert found["b.pt", "--max-drop"]["measured"] == accuracy - metrics["compared"][0]["accuracy"]
    assert found["b.pt", "--max-drop"]["met"] and found["b.pt", "--max-drop"]["below"] == "a.pt"
    assert len(found) == 4
    text = (tmp_path / "results/metrics.txt").read_text()
    assert has_line(text, "--min-accuracy", "0.5", "a.pt", f"{accuracy:.4f}")
    assert has_line(text, "--max-drop", "1", "b.pt", f"{found['b.pt', '--max-drop']['measured']:.4f}")
    _, metrics = evaluated("a.pt", "--no-keras", cwd=tmp_path)
    assert metrics["guards"] == []


def evaluation_of(dataset, names, keras=True, **options):
    """An evaluation of models of these names that say something random, the first of them Keras."""
    random = np.random.default_rng(0)
    models = [
        Predictions(
            name,
            Path("runs") / name,
            np.log(random.dirichlet(np.ones(10), len(dataset.labels))),
            dataset.labels,
            Scaling.given(3),
            None if keras and index == 0 else {"seconds": 12.3},
            sparsity=None if keras and index == 0 else 0.3,
        )
        for index, name in enumerate(names)
    ]
    baseline = models.pop(0) if keras else None
    return Evaluation(dataset, None, models[0], baseline, models[1:], [], [], **options)


@pytest.mark.parametrize("columns", [80, 100, 140])
@pytest.mark.parametrize("length", [4, 14, 15, 40])
@pytest.mark.parametrize("models", [1, 2, 3, 8, 50])
def test_a_model_has_a_row_in_tables_that_fit(sample, columns, length, models):
    """At 80 columns and more; with its name whole, or else with a letter, which the lines above explain."""
    few = Dataset(sample.name, sample.images[:20], sample.labels[:20], sample.sha256)
    names = [f"{index:0{length}}" for index in range(models)]
    evaluation = evaluation_of(few, ["Keras", *names], per_class=models == 3)
    _, legend, *parts = evaluation.summary(columns).split("\n\n")
    labels = [line.split(": ")[0] for line in legend.splitlines()]
    assert labels[0] == "Keras" and len(labels) == 1 + models
    letters = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *("A" + c for c in "ABCDEFGHIJKLMNOPQRSTUVWX")]
    assert labels[1:] in (names, letters[:models])
    if length <= 11 or columns >= 115 + length:
        assert labels[1:] == names
    assert [line.split(": ")[1] for line in legend.splitlines()[1:]] == [f"runs/{name}" for name in names]
    assert max(len(line) for part in parts for line in part.splitlines()) <= columns
    tables = [part for part in parts if rows_of(part)[-1][0] == labels[-1]]
    rows = [[line.split()[0] for line in table.splitlines()] for table in tables]
    assert rows[0][-1 - models :] == labels
    assert all(found[-models:] == labels[1:] for found in rows)
    assert len(tables) == 1 + (columns < 110) + (models in (1, 3))


def test_a_row_has_the_models_figures(sample, tmp_path):
    path = tmp_path / "b.pt"
    path.write_bytes(bytes(311_600))
    evaluation = evaluation_of(sample, ["Keras", "a.pt", "b.pt"])
    other = replace(evaluation.compared[0], path=path)
    evaluation = replace(evaluation, compared=[other])
    row = rows_of(evaluation.summary(200).split("\n\n")[2])[-1]
    pair, metrics = compare(evaluation.keras, other), other.metrics
    low, high = metrics["confidence_interval_95"]
    assert row == [
        "b.pt",
        f"{100 * metrics['accuracy']:.2f}",
        "%",
        f"{100 * low:.2f}-{100 * high:.2f}",
        str(metrics["correct"]),
        f"{metrics['loss']:.4f}",
        str(pair["same_prediction"]),
        p_text(pair["mcnemar_p"]),
        "312",
        "kB",
        "12.30",
        "30.0",
        "%",
        f"{100 * pair['accuracy_difference']:+.2f}",
        f"{pair['mean_abs_probability_difference']:.3f}",
        f"{pair['max_abs_probability_difference']:.3f}",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, ""),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_960, "10 kB"),
        (311_600, "312 kB"),
        (999_600, "1.0 MB"),
        (12_345_678, "12 MB"),
        (4 * 10**9, "4.0 GB"),
    ],
)
def test_sizes_for_people(size, text):
    assert size_text(size) == text


def test_classes_are_shown_for_one_model_and_when_asked_for(tmp_path):
    for name in ("a.pt", "b.pt"):
        save(random_model(), tmp_path / name, input=scaling(120.0, 64.0))
    stdout, metrics = evaluated("a.pt", "--no-keras", cwd=tmp_path)
    row = ["a.pt", *(f"{100 * of:.2f}" for of in metrics["pytorch"]["per_class_accuracy"].values())]
    assert row in rows_of(stdout)
    stdout, _ = evaluated("a.pt", "--no-keras", "--compare", "b.pt", cwd=tmp_path)
    assert "airplane" not in stdout
    stdout, _ = evaluated("a.pt", "--no-keras", "--compare", "b.pt", "--per-class", cwd=tmp_path)
    assert row in rows_of(stdout)


def test_the_networks_sizes_stand_above_the_tables_once_or_a_model(tmp_path):
    save(random_model(), tmp_path / "a.pt", input=scaling(120.0, 64.0))
    save(random_model(1), tmp_path / "b.pt", input=scaling(120.0, 64.0))
    save(random_model(width=4), tmp_path / "thin.pt", input=scaling(120.0, 64.0))
    said = ("78,666", "12,501,632")
    stdout, metrics = evaluated("a.pt", "--no-keras", "--compare", "b.pt", cwd=tmp_path)
    (part,) = [part for part in stdout.split("\n\n") if said[0] in part]
    assert has_line(part, *said) and len(part.splitlines()) == 1
    known = {"parameters": 78_666, "trainable": 78_186, "multiply_accumulates": 12_501_632}
    assert metrics["network"] == metrics["compared"][0]["network"] == known
    assert metrics["file_bytes"] == (tmp_path / "a.pt").stat().st_size
    stdout, metrics = evaluated("a.pt", "--no-keras", "--compare", "thin.pt", cwd=tmp_path)
    assert has_line(stdout, "a.pt: a.pt", *said)
    thin = metrics["compared"][0]["network"]
    assert has_line(stdout, "thin.pt: thin.pt", f"{thin['parameters']:,}")
    assert thin["parameters"] < 78_666 / 10


def test_pairs_of_many_models_are_bounded(sample):
    """Up to MANY each with each, in the order of the tables; then each with the baseline, and with ours."""
    few = Dataset(sample.name, sample.images[:20], sample.labels[:20], sample.sha256)
    names = ["Keras", *map(str, range(MANY - 1))]
    pairs = [tuple(pair["models"]) for pair in evaluation_of(few, names).pairs]
    assert pairs == list(itertools.combinations(names, 2))
    names.append("one more")
    pairs = [tuple(pair["models"]) for pair in evaluation_of(few, names).pairs]
    assert pairs == [pair for pair in itertools.combinations(names, 2) if pair[0] in ("Keras", "0")]
    pairs = [tuple(pair["models"]) for pair in evaluation_of(few, names, keras=False).pairs]
    assert pairs == [("Keras", other) for other in names[1:]]  # which is the checkpoint's name here


def test_a_class_without_images_is_a_dash(sample, monkeypatch):
    chosen = np.flatnonzero(sample.labels != 3)
    subset = Dataset(sample.name, sample.images[chosen], sample.labels[chosen], sample.sha256)
    evaluation = evaluation_of(subset, ["Keras", "a.pt"])
    assert [row[4] for row in rows_of(evaluation.summary())[-2:]] == ["-", "-"]
    texts, *_ = drawn(evaluation, monkeypatch)
    assert texts.count("-") == 2


def test_near_chance_is_noted_under_the_table(tmp_path):
    save(random_model(), tmp_path / "a.pt", input=scaling(0.0, 255.0))
    stdout, metrics = evaluated("a.pt", "--no-keras", cwd=tmp_path)
    (note,) = metrics["notes"]
    table, _, below = stdout.partition("airplane")
    assert "a.pt" in note and note in below and note not in table
    assert note in (tmp_path / "results/metrics.txt").read_text()


# The figure


def drawn(evaluation, monkeypatch):
    """Draw report.png; return all that stands on it, and the sizes of its letters at 1,000 pixels."""
    found = {}

    def look(figure):
        texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
        assert figure.get_size_inches()[0] == 10
        found["texts"] = [text.get_text() for text in texts]
        found["sizes"] = [text.get_fontsize() for text in texts]

    monkeypatch.setattr(figure.plt, "close", look)
    monkeypatch.setattr(results, "sha256_of", lambda path: "0" * 64)
    ours = SimpleNamespace(path=evaluation.ours.path, sha256="1" * 64)
    results.write_report(content := io.BytesIO(), replace(evaluation, checkpoint=ours))
    return found["texts"], found["sizes"], Image.open(content)


@pytest.mark.parametrize("models, keras", [(1, True), (1, False), (5, False), (50, True)])
def test_report_shows_every_model(sample, monkeypatch, models, keras):
    few = Dataset(sample.name, sample.images[:100], sample.labels[:100], sample.sha256)
    names = [f"model {index}.pt" for index in range(models)]
    evaluation = evaluation_of(few, ["Keras", *names] if keras else names, keras)
    texts, sizes, image = drawn(evaluation, monkeypatch)
    for each in evaluation.all_predictions:
        assert f"{each.name}   {100 * each.metrics['accuracy']:.2f} %" in texts
    assert min(sizes) >= 8
    assert sum("model 0.pt" in text for text in texts) >= 4  # its row, confusion, mistakes and SHA-256
    if len(evaluation.all_predictions) > 1:
        first = evaluation.all_predictions[0].name
        assert sum(first in text for text in texts) >= 3  # its row, and what the others are compared with
    assert image.width == 1500 and has_line("\n".join(texts), "runs/model 0.pt", "1" * 64)


def test_report_explains_letters_and_bears_any_name(sample, monkeypatch):
    few = Dataset(sample.name, sample.images[:100], sample.labels[:100], sample.sha256)
    names = ["a$b_{^$.pt", "_.pt", "bad\udce8.pt", "\u6a21.pt", "long" * 20]
    texts, *_ = drawn(evaluation_of(few, names, keras=False), monkeypatch)
    assert "A: runs/a$b_{^$.pt" in texts[-1] and "bad\\udce8" in texts[-1]
    assert sum("A" in re.findall(r"\w+", text) for text in texts) >= 4  # its row, its titles, what it is


def test_report_drops_no_model_of_the_same_name(sample, monkeypatch):
    few = Dataset(sample.name, sample.images[:100], sample.labels[:100], sample.sha256)
    texts, *_ = drawn(evaluation_of(few, ["a.pt", "a.pt"], keras=False), monkeypatch)
    assert [text[:4] for text in texts if text.endswith(" %")] == ["A   ", "B   "]


# What is replaced


def test_a_report_stays_and_says_what_it_shows(tmp_path):
    """Whose figures it shows it says itself, so that a later run without --report need not delete it."""
    path = save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    evaluated("model.pt", "--no-keras", "--report", cwd=tmp_path)
    report = tmp_path / "results/report.png"
    before, shown = report.read_bytes(), Image.open(report).text
    assert has_line(shown["Description"], "model.pt", hashlib.sha256(path.read_bytes()).hexdigest())
    assert shown["Creation Time"] == json.loads((tmp_path / "results/metrics.json").read_text())["date"]
    save(random_model(1), path, input=scaling(120.0, 64.0))
    evaluated("model.pt", "--no-keras", cwd=tmp_path)
    assert report.read_bytes() == before
    evaluated("model.pt", "--no-keras", "--report", cwd=tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in Image.open(report).text["Description"]


FOREIGN = {
    "metrics.txt": b"metrics of mine",
    "metrics.json": b'{"checkpoint": "mine"}',
    "report.png": b"\x89PNG\r\n\x1a\n of mine",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_not_replaced(tmp_path, name, monkeypatch):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    foreign = tmp_path / "results" / name
    foreign.parent.mkdir()
    foreign.write_bytes(FOREIGN[name])
    monkeypatch.setattr(evaluate, "load_test", lambda *_: pytest.fail("went on"))
    line = refused("model.pt", "--no-keras", "--report", cwd=tmp_path)
    assert f"results/{name}" in line and "--output" in line
    assert foreign.read_bytes() == FOREIGN[name]


def test_a_foreign_picture_does_not_matter_without_report(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    (tmp_path / "results").mkdir()
    (tmp_path / "results/report.png").write_bytes(FOREIGN["report.png"])
    for _ in range(2):
        evaluated("model.pt", "--no-keras", cwd=tmp_path)
    assert (tmp_path / "results/report.png").read_bytes() == FOREIGN["report.png"]


@pytest.mark.parametrize("has_json", [True, False])
def test_the_json_of_a_checkpoint_is_not_replaced(tmp_path, has_json):
    """It would be that of `metrics.pt`, be it there or not: the next run would read it as such."""
    (tmp_path / "results").mkdir()
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    described = {"input": scaling(120.0, 64.0)} if has_json else {}
    save(random_model(), tmp_path / "results/metrics.pt", **described)
    line = refused("results/metrics.pt", "--no-keras", cwd=tmp_path)
    assert "results/metrics.json" in line and "results/metrics.pt" in line
    assert "results/metrics.pt" in refused(
        "model.pt", "--compare", "results/metrics.pt", "--no-keras", cwd=tmp_path
    )


def test_a_name_that_the_encoding_lacks_is_printed_as_its_code(tmp_path, monkeypatch):
    save(random_model(), tmp_path / "mod\xe8le.pt", input=scaling(120.0, 64.0))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    stdout, metrics = evaluated("mod\xe8le.pt", "--no-keras", cwd=tmp_path, run=process)
    assert "mod\\xe8le.pt" in stdout and metrics["checkpoint"] == "mod\xe8le.pt"
    assert "mod\xe8le.pt" in (tmp_path / "results/metrics.txt").read_text(encoding="utf-8")


def test_a_name_that_is_no_text_is_written_as_its_code(tmp_path):
    path = save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    for file in (path, path.with_suffix(".json")):
        os.rename(file, os.fsencode(tmp_path) + b"/bad\xe8" + file.suffix.encode())
    evaluated("bad\udce8.pt", "--no-keras", cwd=tmp_path)
    assert "bad\\udce8.pt" in (tmp_path / "results/metrics.txt").read_text(encoding="utf-8")
