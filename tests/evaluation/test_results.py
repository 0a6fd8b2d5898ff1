"""What is printed and written: tables, metrics.txt and metrics.json, the figure; whole or not at all."""

import pytest

from models.evaluation import figure
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
