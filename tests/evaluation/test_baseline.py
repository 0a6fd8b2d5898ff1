"""The Keras baseline: its probabilities are asked for once, kept, and never mistaken for others."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from convert import convert_file
from data.cifar10 import load_test
from models.checkpoint import read_checkpoint
from models.common.terminal import Notes
from models.evaluation import baseline
from models.resnet8 import ResNet8
from tests.evaluating import (
    NOT_A_PYTHON,
    ROOT,
    command,
    evaluated,
    has_line,
    needs_real_model,
    random_model,
    refused,
    save,
    scaling,
)

KEPT = "model.keras-sample.npz"  # it is named where Keras is asked, and where what it holds is not used


def lines_of(name, stdout):
    return [line for line in stdout.splitlines() if name in line]


@needs_real_model
def test_agrees_with_keras(converted):
    folder, stdout, metrics = converted
    assert metrics["agreement"]["same_prediction"] == 1000
    assert metrics["agreement"]["max_abs_probability_difference"] < 1e-5
    assert metrics["keras"]["correct"] == metrics["pytorch"]["correct"] > 800
    assert metrics["keras"]["loss"] == pytest.approx(metrics["pytorch"]["loss"], abs=1e-6)
    assert metrics["keras"]["confusion_matrix"] == metrics["pytorch"]["confusion_matrix"]
    assert metrics["keras"]["file"] == "model.h5"
    form = metrics["keras"]["format"]
    assert has_line(form, "Keras", "3.15.1", ".h5") and has_line(stdout, "model.h5", form)
    assert metrics["keras"]["sha256"] == hashlib.sha256((folder / "model.h5").read_bytes()).hexdigest()
    assert metrics["throughput"]["batch_norm_folded"] is True
    (asked,) = lines_of(KEPT, stdout)
    assert "1,000" in asked
    assert {path.name for path in folder.iterdir()} == {
        *("model.h5", "model.pt", "model.json", "model.keras-sample.npz", "results")
    }


def test_a_keras_file_is_a_stranger_only_if_the_json_names_another(tmp_path):
    (tmp_path / "model.h5").write_bytes(b"a Keras file")
    known = hashlib.sha256(b"a Keras file").hexdigest()
    for source, notes in (({}, 0), ({"sha256": known}, 0), ({"sha256": "0" * 64}, 1)):
        save(random_model(), tmp_path / "model.pt", source=source)
        checkpoint = read_checkpoint(tmp_path / "model.pt")
        assert baseline.find_baseline(checkpoint, tmp_path / "model.h5", found := Notes())
        assert len(found.lines) == notes


@needs_real_model
def test_the_second_run_needs_no_keras(converted, real):
    stdout, metrics = evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert not lines_of(KEPT, stdout)
    assert metrics["keras"] == converted[2]["keras"]
    assert metrics["agreement"] == converted[2]["agreement"]


@needs_real_model
def test_answers_that_an_earlier_version_kept_are_used(real):
    """They do not say the Keras file's format; the checkpoint's JSON does."""
    kept = real / "model.keras-sample.npz"
    with np.load(kept) as answers:
        np.savez(kept, key=answers["key"], probabilities=answers["probabilities"])
    stdout, metrics = evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    form = json.loads((real / "model.json").read_text())["source"]["format"]
    assert "3.15.1" in form and has_line(stdout, "model.h5", form)
    assert metrics["keras"]["format"] == form


@needs_real_model
def test_the_second_run_imports_no_large_library(real):
    code = f"""
import runpy, sys
sys.argv = ["evaluate.py", "model.pt", "--data", "sample"]
try:
    runpy.run_path({str(ROOT / "evaluate.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
large = {{"torchvision", "matplotlib", "tensorflow", "keras", "h5py"}} & set(sys.modules)
sys.exit(f"imported: {{large}}" if large else 0)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=real, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x55
    path.write_bytes(content)


def pickled(path):
    np.savez(path, key=np.array({"a": 1}, dtype=object), probabilities=np.zeros((1000, 10), np.float32))


def another_shape(path):
    with np.load(path) as content:
        key = content["key"]
    np.savez(path, key=key, probabilities=np.zeros((999, 10), np.float32))


@needs_real_model
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-2000]),
        lambda path: path.write_bytes(b""),
        lambda path: flip(path, 0.5),
        pickled,
        another_shape,
    ],
    ids=["cut", "empty", "flipped bit", "pickle", "another shape"],
)
def test_damaged_probabilities_are_noticed(real, damage):
    damage(real / "model.keras-sample.npz")
    line = refused("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)  # so it does ask Keras again
    assert NOT_A_PYTHON in line and "--no-keras" in line


@needs_real_model
def test_damaged_probabilities_are_made_again(converted, real):
    flip(real / "model.keras-sample.npz", 0.5)
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert len(lines_of(KEPT, stdout)) == 2  # it is damaged, and asked for again
    assert metrics["keras"] == converted[2]["keras"]
    stdout, _ = evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert not lines_of(KEPT, stdout)


@needs_real_model
@pytest.mark.parametrize("change", ["scaling", "Keras file"])
def test_stale_probabilities_are_noticed(real, change):
    metadata = json.loads((real / "model.json").read_text())
    if change == "scaling":
        metadata["source"]["input"]["mean"] = [1.0, 2.0, 3.0]
    else:  # the same HDF5 content, another file
        with (real / "model.h5").open("ab") as file:
            file.write(bytes(8))
        metadata["source"]["sha256"] = hashlib.sha256((real / "model.h5").read_bytes()).hexdigest()
    (real / "model.json").write_text(json.dumps(metadata))
    done = command("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert done.returncode == 1
    assert len(lines_of(KEPT, done.stdout)) == 2  # it is stale, and asked for again


@needs_real_model
def test_probabilities_that_cannot_be_kept_are_used_all_the_same(real):
    (real / "model.keras-sample.npz").unlink()
    (real / "model.keras-sample.npz").mkdir()
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert len(lines_of(KEPT, stdout)) == 3  # it cannot be read, is asked for, and cannot be written
    assert metrics["agreement"]["same_prediction"] == 1000


@needs_real_model
def test_folds_only_as_long_as_keras_agrees(real):
    """Probabilities that are 2e-5 off pass for Keras's, and are further off than folding may be."""
    with np.load(real / "model.keras-sample.npz") as content:
        key, probabilities = content["key"], content["probabilities"].copy()
    probabilities[0] += np.where(probabilities[0] > 0.5, -2e-5, 2e-5)
    np.savez(real / "model.keras-sample.npz", key=key, probabilities=probabilities)
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert any("1e-05" in note and note in stdout for note in metrics["notes"])
    assert metrics["throughput"]["batch_norm_folded"] is False
    assert metrics["agreement"]["max_abs_probability_difference"] == pytest.approx(2e-5, rel=0.2)


@needs_real_model
def test_baseline_that_is_gone_or_another_is_said(real):
    with (real / "model.h5").open("ab") as file:
        file.write(b"x")
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert has_line(stdout, "model.h5", "model.pt", "--keras")
    assert metrics["keras"] is None
    (real / "model.h5").unlink()
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert has_line(stdout, "model.h5", "model.json", "--keras")
    assert metrics["throughput"]["batch_norm_folded"] is False
    line = refused("model.pt", "--max-drop", "0.01", cwd=real)  # a guard that cannot guard must not pass
    assert "--max-drop" in line


@needs_real_model
def test_fine_tuned_checkpoint_is_told_from_the_converted_one(real):
    model = ResNet8.from_checkpoint(real / "model.pt")
    with torch.no_grad():
        model.fc.bias[3] += 5
    torch.save(model.state_dict(), real / "model.pt")
    stdout, metrics = evaluated(
        "model.pt", "--keras-python", NOT_A_PYTHON, "--max-drop", 0.02, cwd=real, status=3
    )
    assert has_line(stdout, "model.pt", "model.json")
    assert metrics["throughput"]["batch_norm_folded"] is False
    assert metrics["agreement"]["same_prediction"] < 1000
    assert metrics["pytorch"]["correct"] < metrics["keras"]["correct"] - 20


@needs_real_model
def test_a_baseline_that_gives_logits_is_compared_by_its_probabilities(converted, real):
    with h5py.File(real / "model.h5", "r+") as file:
        softmax = file.attrs["model_config"]
        file.attrs["model_config"] = softmax.replace('"softmax"', '"linear"')
        assert file.attrs["model_config"] != softmax
    _, metrics = evaluated("model.pt", "--keras", "model.h5", cwd=real)
    assert metrics["keras"]["loss"] == pytest.approx(converted[2]["keras"]["loss"], rel=1e-6)
    assert metrics["agreement"]["max_abs_probability_difference"] < 1e-5


@needs_real_model
def test_a_baseline_that_is_no_resnet8_is_named(real):
    with h5py.File(real / "model.h5") as file, h5py.File(real / "weights.h5", "w") as weights:
        saved = file["model_weights"]
        kept = [name for name in saved.attrs["layer_names"] if "dense" not in name]
        for name in kept:  # weights alone, one short
            saved.copy(name, weights)
        weights.attrs.update({**saved.attrs, "layer_names": kept})
    line = refused("model.pt", "--keras", "weights.h5", cwd=real)
    assert line.count("weights.h5") == 1


@needs_real_model
def test_answers_belong_to_the_epsilon_too(real):
    """Weights alone do not say it: converted with another --bn-eps, they are another model."""
    metadata = json.loads((real / "model.json").read_text())
    metadata["architecture"]["bn_eps"] = 0.01
    (real / "model.json").write_text(json.dumps(metadata))
    done = command("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert done.returncode == 1
    assert len(lines_of(KEPT, done.stdout)) == 2  # it is stale, and asked for again


@needs_real_model
@pytest.mark.parametrize("part, kept_as", [("", "model.keras.npz"), ("perf", "model.keras-perf.npz")])
def test_answers_for_the_sample_and_for_other_images_lie_side_by_side(real, monkeypatch, part, kept_as):
    """A run on the sample leaves what Keras said of the full set or of the 200, and the other way round."""
    kept = {path: path.read_bytes() for path in real.glob("*.npz")}
    assert [path.name for path in kept] == ["model.keras-sample.npz"]
    sample = load_test(Path("none"), "sample")
    checkpoint = read_checkpoint(real / "model.pt")
    other = replace(sample, sha256="0" * 64, part=part)  # any other images
    answers = np.zeros((1000, 10), np.float32)
    monkeypatch.setattr(baseline, "ask_keras", lambda *_: (answers, ".h5"))
    baseline.keras_predictions("Keras", real / "model.h5", checkpoint, other, NOT_A_PYTHON, Notes())
    assert {path.name for path in real.glob("*.npz")} == {"model.keras-sample.npz", kept_as}
    assert all(path.read_bytes() == content for path, content in kept.items())
    evaluated("model.pt", "--keras-python", NOT_A_PYTHON, cwd=real)


@pytest.mark.parametrize("wrong", ["mean", "std"])
def test_a_scaling_of_the_keras_model_that_does_not_fit_is_refused(tmp_path, wrong):
    fed = {"mean": [0.0] * 3, "std": [1.0] * 3, wrong: [1.0, 2.0]}
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0), source={"input": fed})
    line = refused("model.pt", cwd=tmp_path)
    assert has_line(line, "model.json", f"source.input.{wrong}", "2", "3")


@needs_real_model
def test_answers_are_kept_once_a_keras_file(real, monkeypatch):
    """Every checkpoint that is compared with it uses them, wherever it lies."""
    (real / "runs").mkdir()
    for name in ("a", "b"):
        shutil.copy(real / "model.pt", real / f"runs/{name}.pt")
        metadata = json.loads((real / "model.json").read_text())
        metadata["source"]["file"] = "../model.h5"
        (real / f"runs/{name}.json").write_text(json.dumps(metadata))
        stdout, metrics = evaluated(f"runs/{name}.pt", "--keras-python", NOT_A_PYTHON, cwd=real)
        assert not lines_of(KEPT, stdout) and metrics["agreement"]["same_prediction"] == 1000


@needs_real_model
def test_answers_lie_beside_the_checkpoint_where_the_keras_files_folder_cannot_be_written(
    real, monkeypatch, tmp_path
):
    sample = load_test(Path("none"), "sample")
    write = baseline.write_atomically
    (tmp_path / "own").mkdir()
    for name in ("model.pt", "model.json"):
        shutil.copy(real / name, tmp_path / "own")
    (real / "model.keras-sample.npz").unlink()

    def read_only(path, writer):
        if path.parent == real:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, writer)

    monkeypatch.setattr(baseline, "write_atomically", read_only)
    monkeypatch.setattr(baseline, "ask_keras", lambda *_: (np.zeros((1000, 10), np.float32), ".h5"))
    checkpoint = read_checkpoint(tmp_path / "own/model.pt")
    asked = ("Keras", real / "model.h5", checkpoint, sample, NOT_A_PYTHON)
    baseline.keras_predictions(*asked, notes := Notes())
    assert (tmp_path / "own/model.keras-sample.npz").exists() and len(notes.lines) == 1  # Keras is asked
    monkeypatch.setattr(baseline, "ask_keras", None)
    baseline.keras_predictions(*asked, Notes())


@pytest.mark.parametrize("content", [b"my own file", None])
def test_a_file_of_others_is_not_replaced(tmp_path, content):
    """`None`: an .npz without our key."""
    path, notes = tmp_path / "model.keras.npz", Notes()
    path.write_bytes(content) if content else np.savez(path, weights=np.zeros(3))
    before = path.read_bytes()
    baseline.keep_answers([path], {"key": np.array("k")}, notes)
    assert path.read_bytes() == before and str(path) in notes.lines[0]
    other = tmp_path / "other.keras.npz"
    baseline.keep_answers([path, other], {"key": np.array("k")}, notes)
    assert path.read_bytes() == before and other.exists() and len(notes.lines) == 1


def scale_kernel(path, index, factor):
    """Multiply the kernel of the first or the last layer that has one."""
    with h5py.File(path, "r+") as file:
        layers = [layer for layer in json.loads(file.attrs["model_config"])["config"]["layers"]]
        names = [e["config"]["name"] for e in layers if e["class_name"] in ("Conv2D", "Dense")]
        group = file["model_weights"][names[index]]
        kernel = next(name for name in group.attrs["weight_names"] if "kernel" in str(name))
        group[kernel][...] = factor * group[kernel][...]


def test_a_keras_file_is_fed_what_its_own_json_says(tmp_path, sample, monkeypatch):
    """With --rescaling its model takes plain pixels, whatever the checkpoint and its source take."""
    unit = scaling(0.0, 255.0)
    save(random_model(), tmp_path / "unit.pt", input=unit, source={"input": unit})
    (tmp_path / "back.h5").write_bytes(b"a Keras file")
    written = {"input": scaling(0.0, 1.0), "sha256": hashlib.sha256(b"a Keras file").hexdigest()}
    (tmp_path / "back.h5.json").write_text(json.dumps(written))
    fed = []

    def ask_keras(keras_file, bn_eps, images, scaling, python):
        fed.append(scaling.std)
        return np.zeros((1000, 10), np.float32), ".h5"

    monkeypatch.setattr(baseline, "ask_keras", ask_keras)
    checkpoint = read_checkpoint(tmp_path / "unit.pt")
    shutil.copy(tmp_path / "back.h5", tmp_path / "other.h5")  # which has no JSON
    for name in ("back.h5", "other.h5"):
        asked = (tmp_path / name, checkpoint, sample, NOT_A_PYTHON, Notes())
        found = baseline.keras_predictions("Keras", *asked)
        assert found.scaling.std == fed[-1]
    assert fed == [[1.0] * 3, [255.0] * 3]


@needs_real_model
def test_the_loss_is_of_logits_on_both_sides(real, reader):
    """Where a float32 softmax underflows, probabilities would hide how wrong a model is."""
    scale_kernel(real / "model.h5", -1, 50)
    convert_file(real / "model.h5", real / "sharp.pt", reader)
    _, metrics = evaluated("sharp.pt", cwd=real)
    assert metrics["pytorch"]["loss"] > 10
    assert metrics["keras"]["loss"] == pytest.approx(metrics["pytorch"]["loss"], rel=1e-4)


@needs_real_model
def test_a_source_that_cannot_be_read_costs_the_baseline_alone(real, monkeypatch):
    sha256_of = baseline.sha256_of

    def unreadable(path):
        if path.suffix == ".h5":
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_of(path)

    monkeypatch.setattr(baseline, "sha256_of", unreadable)
    stdout, metrics = evaluated("model.pt", cwd=real)
    assert has_line(stdout, "model.h5", "model.json", "--keras")
    assert metrics["keras"] is None


@needs_real_model
def test_a_keras_file_is_checked_before_keras_starts(real):
    (real / "damaged.h5").write_bytes((real / "model.h5").read_bytes()[:20_000])
    line = refused("model.pt", "--keras", "damaged.h5", "--keras-python", NOT_A_PYTHON, cwd=real)
    assert "damaged.h5" in line and NOT_A_PYTHON not in line
