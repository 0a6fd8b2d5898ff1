"""What is printed and written: tables, metrics.txt and metrics.json, the figure; whole or not at all."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from models.evaluation import figure
from models.evaluation.metrics import Predictions
from models.evaluation.results import Evaluation
from models.scaling import Scaling
from tests.evaluating import (
    command,
    evaluated,
    needs_real_model,
    random_model,
    refused,
    save,
    scaling,
)


@needs_real_model
def test_output_in_a_pipe_is_plain_text_of_80_columns(converted):
    folder, stdout, _ = converted
    tables = stdout.split("\n\n", 1)[1]
    written = (folder / "results/metrics.txt").read_text()
    for text in (tables, written.split("note:")[0]):
        assert text.isascii() and text.replace("\n", "").isprintable()
        assert max(map(len, text.splitlines())) <= 80
    assert "accuracy" in tables and "95 % interval" in tables
    assert "Confusion matrix of model.pt" in written
    assert tables.split("\n\nwrote")[0].strip() in written


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
        assert "\nmodel.pt: model.pt, bfloat16 on cpu\n" in text
        assert "\nKeras: model.h5, Keras 3.15.1 .h5 whole model\n" in text
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
    lines = (tmp_path / "results/metrics.txt").read_text().splitlines()
    assert f"--min-accuracy 0.5: not met by a.pt ({accuracy:.4f})" in lines
    assert f"--max-drop 1: met by b.pt ({found['b.pt', '--max-drop']['measured']:.4f})" in lines
    _, metrics = evaluated("a.pt", "--no-keras", cwd=tmp_path)
    assert metrics["guards"] == []


@pytest.mark.parametrize("length", [8, 12, 13, 17, 18, 24, 25, 27, 28, 56])
def test_no_name_is_broken_in_its_middle(sample, length):
    """Neither in the tables' headings nor where two models are compared; and all fits 80 columns."""
    scores = np.random.default_rng(0).normal(size=(5, 1000, 10))
    names = [str(index) * length for index in range(5)]
    models = [
        Predictions(name, Path(name), each, sample.labels, Scaling.given(3))
        for name, each in zip(names, scores, strict=True)
    ]
    evaluation = Evaluation(sample, None, models[0], None, models[1:], [], [])
    *tables, agreement = evaluation.summary.split("\n\n")[2:]
    assert max(len(line) for part in (*tables, agreement) for line in part.splitlines()) <= 80
    assert [word for table in tables for word in table.splitlines()[0].split()] == names
    assert all(agreement.split().count(name) == 4 for name in names)


def test_report_draws_up_to_four_models(tmp_path, sample, monkeypatch):
    shown = []
    draw = figure.draw_classes
    monkeypatch.setattr(
        figure, "draw_classes", lambda axes, models: (shown.append(models), draw(axes, models))
    )
    for index in range(5):
        save(random_model(index), tmp_path / f"{index}.pt", input=scaling(120.0, 64.0))
    others = [f"{index}.pt" for index in range(1, 5)]
    evaluated("0.pt", "--no-keras", "--report", "--compare", *others, cwd=tmp_path)
    assert [each.name for each in shown[0]] == ["0.pt", "1.pt", "2.pt", "3.pt"]
    assert (tmp_path / "results/report.png").stat().st_size > 10_000
