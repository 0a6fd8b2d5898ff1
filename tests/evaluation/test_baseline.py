"""The Keras baseline: computed once, cached, and never mistaken for another model's."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from convert import convert_file
from models.checkpoint import read_checkpoint
from models.common.cli import KerasFileError, Notes
from models.common.job import JobError
from models.evaluation import baseline
from models.evaluation.baseline import find_baseline, keras_baseline, log_softmax, run_keras
from models.normalization import Normalization
from models.resnet8 import ResNet8
from tests.evaluating import (
    NOT_A_PYTHON,
    ROOT,
    evaluated,
    needs_real_model,
    random_model,
    save,
    scaling,
    with_few_images,
)

CONTENT = b"a Keras file"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PIXELS = Normalization.from_args(3)


# --- With Keras ------------------------------------------------------------------------------------------


@needs_real_model
def test_the_baseline_equals_pytorch(converted):
    folder, _, metrics = converted
    keras, pytorch = metrics["keras"], metrics["pytorch"]
    assert metrics["agreement"]["same_prediction"] == 1000
    assert metrics["agreement"]["max_abs_probability_difference"] < 1e-5
    assert keras["correct"] == pytorch["correct"] > 800
    assert keras["loss"] == pytest.approx(pytorch["loss"], abs=1e-6)
    assert keras["confusion_matrix"] == pytorch["confusion_matrix"]
    assert keras["file"] == "model.h5" and keras["format"].startswith("Keras 3")
    assert keras["sha256"] == hashlib.sha256((folder / "model.h5").read_bytes()).hexdigest()
    suffixes = sorted(path.suffix for path in folder.iterdir())
    assert suffixes == ["", ".h5", ".json", ".npz", ".pt"]  # "": results


@needs_real_model
def test_the_second_run_needs_no_keras_and_no_large_library(converted, real):
    _, metrics = evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert (metrics["keras"], metrics["agreement"]) == (converted[2]["keras"], converted[2]["agreement"])
    code = f"""
import runpy, sys
sys.argv = ["evaluate.py", "model.pt", "--data", "sample"]
try:
    runpy.run_path({str(ROOT / "evaluate.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
large = {{"torchvision", "matplotlib", "tensorflow", "keras", "h5py", "sympy"}} & set(sys.modules)
sys.exit(f"imported: {{large}}" if large else 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=real, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


@pytest.fixture
def one_keras(keras, monkeypatch):
    """Run Keras in the process of all tests."""
    monkeypatch.setattr("models.keras.reference.Keras", lambda python: keras)


@needs_real_model
def test_the_loss_is_of_logits_on_both_sides(real, one_keras, sample, monkeypatch):
    """Where a float32 softmax underflows, the loss of its probabilities would be too low."""
    with_few_images(monkeypatch, sample)

    def sharpen(name, item):
        if getattr(item, "ndim", 0) == 2:  # the last layer's kernel
            item[...] = 50 * item[...]

    with h5py.File(real / "model.h5", "r+") as file:
        file["model_weights"].visititems(sharpen)
    convert_file(real / "model.h5", real / "sharp.pt")
    _, metrics = evaluated("sharp.pt", cwd=real)
    assert metrics["pytorch"]["loss"] > 10
    assert metrics["keras"]["loss"] == pytest.approx(metrics["pytorch"]["loss"], rel=1e-4)


@needs_real_model
def test_a_keras_file_that_returns_logits_is_compared_by_probabilities(real, one_keras, sample, monkeypatch):
    with_few_images(monkeypatch, sample)
    with h5py.File(real / "model.h5", "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"softmax"', '"linear"')
    _, metrics = evaluated("model.pt", "--keras", "model.h5", cwd=real)
    assert metrics["keras"]["loss"] == pytest.approx(metrics["pytorch"]["loss"], rel=1e-5)
    assert metrics["agreement"]["max_abs_probability_difference"] < 1e-5


@needs_real_model
def test_a_keras_file_is_checked_before_keras_starts(real, sample):
    (real / "damaged.h5").write_bytes((real / "model.h5").read_bytes()[:20_000])
    with h5py.File(real / "model.h5") as file, h5py.File(real / "weights.h5", "w") as weights:
        saved = file["model_weights"]
        names = [name for name in saved.attrs["layer_names"] if "dense" not in name]
        for name in names:  # weights alone, without the last layer
            saved.copy(name, weights)
        weights.attrs.update({**saved.attrs, "layer_names": names})
    for name in ("damaged.h5", "weights.h5"):
        with pytest.raises(KerasFileError, match=f"^{real / name}: (?!.*{name})"):
            run_keras(real / name, 1e-3, sample.images, PIXELS, NOT_A_PYTHON)
    with pytest.raises(ValueError, match=r"\(32, 32, 3\)"):
        run_keras(real / "model.h5", 1e-3, sample.images[:, :, :16], PIXELS, NOT_A_PYTHON)
    with pytest.raises(JobError, match=NOT_A_PYTHON):
        run_keras(real / "model.h5", 1e-3, sample.images, PIXELS, NOT_A_PYTHON)


# --- The cache -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A checkpoint and the Keras file that it was converted from, which Keras could not read."""
    (tmp_path / "model.h5").write_bytes(CONTENT)
    source = {"file": "model.h5", "sha256": SHA256, "input": scaling(0.0, 255.0)}
    save(random_model(width=2), tmp_path / "model.pt", input=scaling(0.0, 255.0), source=source)
    return tmp_path


@pytest.fixture
def runs(monkeypatch, sample):
    """The calls of `run_keras`, (std, bn_eps) each; it returns random logits."""
    calls = []

    def run_keras(keras_file, bn_eps, images, normalization, python):
        calls.append((normalization.std, bn_eps))
        return np.random.default_rng(len(calls)).normal(size=(len(images), 10)).astype(np.float32), ".h5"

    monkeypatch.setattr(baseline, "run_keras", run_keras)
    monkeypatch.setattr(baseline, "read_file", lambda *_: SimpleNamespace(layers=()))
    return calls


def baseline_of(checkpoint, dataset, keras_file=None):
    """Return the predictions and the notes."""
    if isinstance(checkpoint, Path):
        checkpoint = read_checkpoint(checkpoint, ResNet8)
    origins, notes = {"model": checkpoint.origin}, Notes()
    return keras_baseline(checkpoint, keras_file, origins, dataset, NOT_A_PYTHON, notes), notes.lines


def test_cached_predictions_are_used_by_every_checkpoint(folder, sample, runs):
    first, notes = baseline_of(folder / "model.pt", sample)
    (cache,) = folder.glob("model.keras-*.npz")
    assert any(cache.name in note for note in notes)
    assert (first.name, first.format, first.log_probabilities.dtype) == ("Keras", ".h5", np.float64)
    logits = np.random.default_rng(1).normal(size=(1000, 10)).astype(np.float32)
    assert np.array_equal(first.log_probabilities, log_softmax(logits))
    source = {"file": "../model.h5", "sha256": SHA256, "input": scaling(0.0, 255.0)}
    (folder / "runs").mkdir()
    save(random_model(1, width=2), folder / "runs/a.pt", source=source)
    for path in ("model.pt", "runs/a.pt"):
        second, notes = baseline_of(folder / path, sample)
        assert np.array_equal(second.log_probabilities, first.log_probabilities) and not notes
        assert (second.format, second.normalization) == (first.format, first.normalization)
    assert runs == [([255.0] * 3, 1e-3)]


def test_another_model_or_other_images_have_another_cache(folder, sample, runs):
    """None of them replaces another's."""
    checkpoint = read_checkpoint(folder / "model.pt", ResNet8)
    metadata = checkpoint.metadata
    for count, (changes, dataset, content) in enumerate(
        [
            ({}, sample, CONTENT),
            ({"architecture": {"bn_eps": 0.01}}, sample, CONTENT),
            ({"source": {**metadata["source"], "input": scaling(1.0, 255.0)}}, sample, CONTENT),
            ({}, replace(sample, sha256="0" * 64), CONTENT),
            ({}, sample, CONTENT + b"!"),
        ],
        1,
    ):
        (folder / "model.h5").write_bytes(content)
        changed = replace(checkpoint, metadata={**metadata, **changes})
        before = {path: path.read_bytes() for path in folder.glob("*.npz")}
        for _ in range(2):
            baseline_of(changed, dataset, folder / "model.h5")
            assert len(runs) == len(list(folder.glob("*.npz"))) == count
        assert all(path.read_bytes() == cache for path, cache in before.items())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


def save_arrays(**changes):
    arrays = {"log_probabilities": np.zeros((1000, 10)), "format": np.array(".h5"), **changes}
    return lambda path: np.savez(path, **arrays)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "flipped bit": flip,
    "shortened text": lambda path: path.write_bytes(path.read_bytes().replace(b"'<U3'", b"'<U2'")),
    "pickle": save_arrays(format=np.array({"a": 1}, dtype=object)),
    "shape": save_arrays(log_probabilities=np.zeros((999, 10))),
    "dtype": save_arrays(log_probabilities=np.zeros((1000, 10), np.float32)),
    "NaN": save_arrays(log_probabilities=np.full((1000, 10), np.nan)),
    "control codes": save_arrays(format=np.array("\x1b[2J")),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_written_again(folder, sample, runs, damage):
    baseline_of(folder / "model.pt", sample)
    cache = next(folder.glob("*.npz"))
    DAMAGE[damage](cache)
    _, notes = baseline_of(folder / "model.pt", sample)
    assert len(runs) == 2 and any("damaged" in note for note in notes)
    if damage != "pipe":  # which is not replaced
        _, notes = baseline_of(folder / "model.pt", sample)
        assert len(runs) == 2 and not notes


def test_a_read_only_folder_has_its_cache_beside_the_checkpoint(folder, sample, runs, monkeypatch):
    write = baseline.write_atomically

    def write_unless_read_only(path, writer):
        if path.parent in read_only:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, writer)

    monkeypatch.setattr(baseline, "write_atomically", write_unless_read_only)
    own = folder / "own"
    own.mkdir()
    for name in ("model.pt", "model.json"):
        shutil.copy(folder / name, own)
    for own_too, expected in ((True, []), (False, [own]), (True, [own])):
        read_only = {folder, own} if own_too else {folder}
        predictions, notes = baseline_of(own / "model.pt", sample, folder / "model.h5")
        assert len(predictions.labels) == 1000 and [path.parent for path in folder.rglob("*.npz")] == expected
        assert any("cannot be written" in note for note in notes) == (not expected)
    assert len(runs) == 2


@pytest.mark.parametrize("logits", [np.zeros((1000, 7)), np.full((1000, 10), np.nan)])
def test_outputs_that_are_not_ten_numbers_are_refused(folder, sample, monkeypatch, logits):
    monkeypatch.setattr(baseline, "run_keras", lambda *_: (logits, ".h5"))
    with pytest.raises(ValueError, match=r"model\.h5: "):
        baseline_of(folder / "model.pt", sample)
    assert not list(folder.glob("*.npz"))


# --- Which file, and its normalization -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.json").unlink(), "model.json"),
        (lambda folder: (folder / "model.h5").unlink(), "model.h5"),
        (lambda folder: (folder / "model.h5").write_bytes(b"another"), "model.h5"),
        (lambda folder: [(folder / "model.h5").unlink(), (folder / "model.h5").mkdir()], "model.h5"),
    ],
)
def test_a_source_that_is_missing_or_changed_costs_the_baseline_only(folder, sample, runs, change, words):
    change(folder)
    predictions, notes = baseline_of(folder / "model.pt", sample)
    assert predictions is None and not runs
    assert len(notes) == 1 and words in notes[0] and "--keras" in notes[0]


def test_a_baseline_of_another_model_is_noted(folder, sample, runs):
    """Not one that the checkpoint was converted to, or whose checkpoint has no JSON."""
    (folder / "back.h5").write_bytes(b"back")
    checkpoint = read_checkpoint(folder / "model.pt", ResNet8)
    metadata = {"source": {"sha256": checkpoint.sha256}, "sha256": hashlib.sha256(b"back").hexdigest()}
    (folder / "back.h5.json").write_text(json.dumps(metadata))
    (folder / "another.h5").write_bytes(b"another")
    for name, count in (("model.h5", 0), ("back.h5", 0), ("another.h5", 1)):
        assert find_baseline(checkpoint, folder / name, notes := Notes()) == folder / name
        assert len(notes.lines) == count
    no_json = read_checkpoint(save(random_model(width=2), folder / "new.pt"), ResNet8)
    assert find_baseline(no_json, folder / "another.h5", notes := Notes()) and not notes.lines
    origins = {"model": SHA256, "same": SHA256, "unknown": None, "other": "0" * 64}
    predictions = keras_baseline(checkpoint, None, origins, sample, NOT_A_PYTHON, notes := Notes())
    assert predictions.name == "Keras model.h5"
    assert sum(note.startswith("other ") for note in notes.lines) == 1
    assert not any(name in note for note in notes.lines for name in ("same ", "unknown "))


def test_the_normalization_is_the_keras_files_own(folder, sample, runs):
    """A Keras file written by convert.py has a JSON; any other has the normalization of the source."""
    metadata = {"input": scaling(0.0, 1.0), "sha256": SHA256}
    (folder / "back.h5").write_bytes(CONTENT)
    (folder / "back.h5.json").write_text(json.dumps(metadata))
    for name, std in (("back.h5", 1.0), ("model.h5", 255.0)):
        predictions, _ = baseline_of(folder / "model.pt", sample, folder / name)
        assert predictions.normalization.std == runs[-1][0] == [std] * 3


OTHER = "0" * 64
NORMALIZATIONS = {
    # case -> std of the .pt and of Keras in the .pt's JSON, and its source; both in the Keras file's JSON;
    # whether that file has a Rescaling layer, None if it is not read; --std; expected std of Keras
    "equal in the JSON": ((255.0, 255.0, SHA256), None, None, 64.0, 64.0),
    "a Keras layer normalizes": ((255.0, 1.0, SHA256), None, None, 64.0, 1.0),
    "without --std": ((255.0, 1.0, SHA256), None, None, None, 1.0),
    "no JSON, a Rescaling": (None, None, True, 64.0, 1.0),
    "no JSON, no Rescaling": (None, None, False, 64.0, 64.0),
    "no JSON, pixels": (None, None, None, 1.0, 1.0),
    "of another file, a Rescaling": ((255.0, 255.0, OTHER), None, True, None, 1.0),
    "of another file, no Rescaling": ((255.0, 1.0, OTHER), None, False, None, 255.0),
    "written back": (None, (255.0, 255.0), None, 64.0, 64.0),
    "written back with a Rescaling": (None, (255.0, 1.0), None, 64.0, 1.0),
    "written back, its .pt unknown": (None, (255.0, 255.0), None, None, 255.0),
}


@pytest.mark.parametrize("case", NORMALIZATIONS)
def test_an_option_overrides_keras_too_unless_a_keras_layer_normalizes(folder, monkeypatch, case):
    """No image is normalized twice."""
    of_pt, of_keras, has_rescaling, std, expected = NORMALIZATIONS[case]
    (folder / "model.json").unlink()
    if of_pt:
        source = {"sha256": of_pt[2], "input": scaling(0.0, of_pt[1])}
        (folder / "model.json").write_text(json.dumps({"input": scaling(0.0, of_pt[0]), "source": source}))
    checkpoint = read_checkpoint(folder / "model.pt", ResNet8)
    if of_keras:
        source = {"sha256": checkpoint.sha256, "input": scaling(0.0, of_keras[0])}
        metadata = {"input": scaling(0.0, of_keras[1]), "source": source, "sha256": SHA256}
        (folder / "model.h5.json").write_text(json.dumps(metadata))
    checkpoint = replace(checkpoint, assumes_normalization=not std)
    checkpoint = checkpoint.with_normalization(None, [std]) if std else checkpoint
    layers = [SimpleNamespace(class_name="Rescaling")] * bool(has_rescaling)
    read = iter([] if has_rescaling is None else [SimpleNamespace(layers=layers)])
    monkeypatch.setattr(baseline, "read_file", lambda *_: next(read))
    normalization = baseline.keras_normalization(checkpoint, folder / "model.h5", SHA256)
    assert normalization == Normalization.from_args(3, std=expected)
    assert not list(read)
