"""evaluate.py: options, guards, input normalization, and files that are refused with one line."""

import json
import os
import pickle
import re
import resource
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from models.common import cli
from models.common.files import json_path
from models.evaluation import fused
from models.evaluation.metrics import Predictions
from models.graph import KNOWN_FILES
from models.normalization import Normalization
from models.resnet8 import ResNet8
from tests.evaluating import (
    HAS_FUSED_OPERATORS,
    SHARED,
    command,
    evaluated,
    needs_real_model,
    random_model,
    refused,
    save,
    scaling,
    with_few_images,
)
from tests.runtime_files import logits_of, write_onnx, write_tflite

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}
SCALED = {"mean": [120.0] * 3, "std": [64.0] * 3}
FRACTIONS = {"mean": [0.5] * 3, "std": [0.25, 0.5, 0.25]}


@pytest.fixture
def folder(tmp_path, monkeypatch, sample):
    """A folder with a random `model.pt` and its JSON, to be evaluated on 100 images."""
    with_few_images(monkeypatch, sample)
    architecture = {"bn_eps": 1e-3}
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0), architecture=architecture)
    return tmp_path


# Comparison and guards


@needs_real_model
def test_compare_and_guards(converted, real):
    model = ResNet8.from_checkpoint(real / "model.pt")
    save(model, real / "same [1].pt", input=scaling(0.0, 1.0))
    with torch.no_grad():
        model.fc.bias[3] += 5
    save(model, real / "worse.pt", input=scaling(0.0, 1.0))
    accuracy = converted[2]["pytorch"]["accuracy"]
    guards = ["--min-accuracy", accuracy, "--max-drop", 0]
    _, metrics = evaluated("model.pt", *guards, cwd=real)
    assert [guard["met"] for guard in metrics["guards"]] == [True, True]

    done = command("model.pt", "same [1].pt", "--compare", "worse.pt", *guards, cwd=real)
    metrics = json.loads((real / "results/metrics.json").read_text())  # written all the same
    assert done.returncode == 3
    assert [line.split()[:2] for line in done.stderr.splitlines()] == [["shortfall:", "worse.pt:"]] * 2
    assert [other["checkpoint"] for other in metrics["compared"]] == ["same [1].pt", "worse.pt"]
    pairs = {tuple(pair["models"]): pair for pair in metrics["pairs"]}
    assert len(pairs) == 4 * 3 / 2
    same, worse = pairs["model.pt", "same [1].pt"], pairs["model.pt", "worse.pt"]
    assert (same["same_prediction"], same["max_abs_probability_difference"]) == (1000, 0)
    assert pairs["Keras", "model.pt"]["max_abs_probability_difference"] < 1e-5
    for each in (metrics, *metrics["compared"]):
        assert each["throughput"]["fused_operators"] == HAS_FUSED_OPERATORS
    lost = metrics["compared"][1]["correct"] - metrics["pytorch"]["correct"]
    assert worse["accuracy_difference"] == lost / 1000 < 0
    assert worse["mcnemar_p"] < 1e-3


def test_guards_without_keras_are_recorded(folder):
    """The drop is measured from CHECKPOINT."""
    save(random_model(1), folder / "b.pt")
    bounds = ["--min-accuracy", 0.5, "--max-drop", 1]
    _, metrics = evaluated("model.pt", "b.pt", "--no-keras", *bounds, cwd=folder, status=3)
    accuracy, other = metrics["pytorch"]["accuracy"], metrics["compared"][0]["accuracy"]
    minimum, drop = {"guard": "--min-accuracy", "bound": 0.5}, {"guard": "--max-drop", "bound": 1.0}
    drop["below"] = "model.pt"
    assert metrics["guards"] == [
        {"checkpoint": "model.pt", **minimum, "measured": accuracy, "met": False},
        {"checkpoint": "model.pt", **drop, "measured": 0.0, "met": True},
        {"checkpoint": "b.pt", **minimum, "measured": other, "met": False},
        {"checkpoint": "b.pt", **drop, "measured": pytest.approx(accuracy - other), "met": True},
    ]
    assert (folder / "results/metrics.txt").read_text().count("not met by") == 2


@needs_real_model
def test_a_checkpoint_of_another_keras_file_is_noted(real):
    """Its difference from Keras is one between models; a file of unknown origin has no such note."""
    metadata = json.loads((real / "model.json").read_text())
    model = ResNet8.from_checkpoint(real / "model.pt")
    described = {name: metadata[name] for name in ("input", "architecture")}
    save(model, real / "tuned.pt", **described)
    _, metrics = evaluated("model.pt", "tuned.pt", cwd=real)
    assert metrics["pairs"][0]["models"][0] == "Keras" and metrics["notes"] == []
    metadata["source"]["sha256"] = "0" * 64
    save(model, real / "other.pt", **described, source=metadata["source"])
    _, metrics = evaluated("model.pt", "other.pt", cwd=real)
    assert metrics["pairs"][0]["models"][0] == "Keras model.h5"
    (note,) = metrics["notes"]
    assert "other.pt" in note and "model.h5" in note


# Options


def test_options_may_stand_between_the_files(folder):
    """For example `evaluate.py --no-keras runs/*.pt --dtype float64`."""
    for name in "abc":
        save(random_model(), folder / f"{name}.pt", input=scaling(120.0, 64.0))
    _, metrics = evaluated("--no-keras", "a.pt", "b.pt", "--workers", 1, "--compare", "c.pt", cwd=folder)
    assert metrics["checkpoint"] == "a.pt"
    assert [each["checkpoint"] for each in metrics["compared"]] == ["b.pt", "c.pt"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype(folder, monkeypatch, dtype):
    """Fused operators are used in float32 only, and only if they are as exact."""
    monkeypatch.setattr(fused, "rotate_180", lambda model, size: model)
    given = {"dtype": dtype, "batch_size": 50, "workers": 1, "device": "cpu"}
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    stdout, metrics = evaluated("model.pt", "--no-keras", *arguments, cwd=folder)
    expected = {**given, "fused_operators": False}
    assert {name: metrics["throughput"][name] for name in expected} == expected
    assert (f"{dtype} on cpu" in stdout) == (dtype != "float32")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--min-accuracy", "87"],
        ["--max-drop", "-0.1"],
        ["--max-drop", "0.1", "--no-keras"],
        ["--batch-size", "0"],
        ["--workers", "two"],
        ["--dtype", "float16"],
        ["--keras", "a.h5", "--no-keras"],
        ["--std", "0"],
        ["--std", "nan"],
        ["/"],
    ],
    ids=" ".join,
)
def test_usage_errors(tmp_path, arguments):
    *_, message = refused(*arguments, cwd=tmp_path, status=2).splitlines()
    assert message.startswith("evaluate.py: error: ") and arguments[0] in message


@pytest.mark.parametrize(
    ("name", "options", "package"),
    [("x.safetensors", [], "safetensors"), ("model.pt", ["--report"], "matplotlib")],
)
def test_missing_package_is_named_before_the_work(folder, monkeypatch, name, options, package):
    (folder / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(evaluate, "load_test", None)  # not called
    assert f"pip install {package}" in refused(name, *options, "--no-keras", cwd=folder)


@needs_real_model
def test_known_file_is_named(real, monkeypatch):
    monkeypatch.setitem(
        KNOWN_FILES, json.loads((real / "model.json").read_text())["source"]["sha256"], "IC99"
    )
    stdout, _ = evaluated("model.pt", "--no-keras", cwd=real)
    assert "model.pt was converted from IC99" in stdout


# Input normalization


@pytest.mark.parametrize(
    ("arguments", "expected", "note"),
    [
        (["model.pt", "tuned.pt"], SCALED, "no tuned.json: using model.pt"),
        (["model.pt", "other.pt"], SCALED, "other.json: using model.pt"),
        (["tuned.pt"], PLAIN, "no tuned.json"),
        (["tuned.pt", "--mean", 120, "--std", 64, 64, 64], SCALED, None),
        (["model.pt", "--mean", 0], {**SCALED, "mean": [0.0] * 3}, None),
        (["model.pt", "--mean", 0.5, "--std", 0.25, 0.5, 0.25], FRACTIONS, "--mean 127.5 --std 63.75 127.5"),
    ],
)
def test_normalization_is_given_or_from_a_json_or_noted(folder, arguments, expected, note):
    save(random_model(), folder / "tuned.pt")
    save(random_model(), folder / "other.pt", architecture={"bn_eps": 1e-3})
    stdout, metrics = evaluated(*arguments, "--no-keras", cwd=folder)
    assert [each["input"] for each in (metrics, *metrics["compared"])][-1] == expected
    notes = [line for line in metrics["notes"] if "near chance" not in line]
    epsilon = [notes.pop(0)] if "tuned.pt" in arguments else []  # without a JSON
    assert all("epsilon" in line and "tuned.json" in line for line in epsilon)
    assert len(notes) == (note is not None)
    for text in (stdout, (folder / "results/metrics.txt").read_text()):
        assert (note or "") in text and all(f"note: {line}\n" in text for line in notes)
        assert ("mean 120 120 120, std 64 64 64" in text) == (SCALED in (metrics["input"], expected))


def test_near_chance_and_a_modified_file_are_noted(folder, sample, monkeypatch):
    """Of Keras too; and that its normalization is not the option's."""
    path, labels = folder / "other.pt", sample.labels[:100]
    described = {"input": scaling(0.0, 255.0), "architecture": {"bn_eps": 1e-3}}
    save(random_model(), path, **described, sha256="0" * 64)
    keras = Predictions("Keras", path, np.log(np.full((100, 10), 0.1)), labels, Normalization.from_args(3))
    monkeypatch.setattr(evaluate, "keras_baseline", lambda *_: keras)
    stdout, metrics = evaluated("other.pt", "--std", 255, cwd=folder)
    assert metrics["pytorch"]["accuracy"] < 0.2
    modified, alone, *chances = metrics["notes"]
    assert "modified" in modified and "other.pt" in modified
    assert "--std" in alone and "other.pt" in alone and "pixels 0-255" in alone
    for chance, name, scale in zip(chances, ("other.pt", "Keras"), ("255 255 255", "0-255"), strict=True):
        assert all(part in chance for part in (name, "near chance", "--std", scale))
        assert stdout.index(modified) < stdout.index("accuracy") < stdout.index(chance)
        assert chance in (folder / "results/metrics.txt").read_text()


@needs_real_model
def test_a_better_normalization_is_named_as_options_or_as_a_json(real, sample, monkeypatch):
    """With what the notes say, the accuracy is right."""
    with_few_images(monkeypatch, sample)
    model = ResNet8.from_checkpoint(real / "model.pt")
    with torch.no_grad():
        model.conv1.weight *= 255
    save(model, real / "new.pt")
    stdout, metrics = evaluated("new.pt", "--no-keras", cwd=real)
    better = metrics["notes"][-1]
    assert better.startswith("new.pt: ") and "--mean 0 --std 255" in better
    assert stdout.index("ResNet8 on") < stdout.index(better)
    _, metrics = evaluated("model.pt", "new.pt", "--no-keras", cwd=real)
    better = metrics["notes"][-1]
    described, name = re.search(r"(\{.*\}) in (\S+)$", better).groups()
    (real / name).write_text(described)
    _, metrics = evaluated("model.pt", "new.pt", "--no-keras", cwd=real)
    assert not any("%" in note for note in metrics["notes"]) and name == "new.json"
    assert metrics["compared"][0]["correct"] == metrics["pytorch"]["correct"] > 70


def test_a_better_normalization_of_a_file_in_a_runtime_is_named(tmp_path, sample, monkeypatch):
    right = Normalization.usual(3)[-2]
    labels = logits_of(right(sample.images)).argmax(axis=1)
    monkeypatch.setattr(evaluate, "load_test", lambda *_: replace(sample, labels=labels))
    write_onnx(tmp_path / "d.onnx")
    stdout, metrics = evaluated("d.onnx", "--no-keras", cwd=tmp_path)
    assert right.options in metrics["notes"][-1] and "100.0 %" in metrics["notes"][-1]
    assert "ResNet8" not in stdout
    (tmp_path / "d.onnx.json").write_text(json.dumps({"input": asdict(right)}))
    write_tflite(tmp_path / "c.tflite", dtype="int8")
    _, metrics = evaluated("d.onnx", "c.tflite", "--no-keras", cwd=tmp_path)
    assert metrics["input"] == asdict(right) and metrics["compared"][0]["input"] == PLAIN
    assert any("c.tflite" in note and "integer" in note for note in metrics["notes"])


# Files that are not as `convert.py` writes them


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def bomb(path):
    return {"a": Bomb(path.parent / "MARK")}


def compressed(model, path):
    """A gigabyte of zeros in a megabyte; torch writes no such file."""
    save(model, path)
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    largest = max(members, key=lambda name: len(members[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            target.writestr(name, bytes(2**28) if name == largest else content)


HOSTILE = {  # case -> (writer of the file, key word of the message)
    "pickle bomb": (lambda _, path: torch.save(bomb(path), path), "pickled"),
    "raw pickle bomb": (lambda _, path: path.write_bytes(pickle.dumps(bomb(path))), "state_dict"),
    "compressed records": (compressed, "compressed"),
    "pipe": (lambda _, path: os.mkfifo(path), "pipe"),
    "one channel": (lambda _, path: save(random_model(in_channels=1), path), "[1,"),
    "seven classes": (lambda _, path: save(random_model(num_classes=7), path), "7 classes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_are_refused(tmp_path, case):
    """Nothing is run, and no more memory is taken than the file has."""
    write, word = HOSTILE[case]
    write(random_model(), tmp_path / "hostile.pt")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28), hard))
    try:
        line = refused("hostile.pt", cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert "hostile.pt" in line and word in line
    assert not (tmp_path / "MARK").exists()


@pytest.mark.parametrize("name", ["model.pt", "model.onnx"])
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("{", "JSON"),
        ('{"input": {"mean": [0], "std": [1, 1, 1]}}', "mean"),
        ('{"input": {"shape": [3, 96, 96]}}', "[3, 96, 96]"),
        ('{"mean": [0, 0, 0], "std": [255, 255, 255]}', '{"input": {"mean": '),
    ],
)
def test_wrong_json_is_refused(tmp_path, name, text, key):
    save(random_model(), tmp_path / name)
    json_path(tmp_path / name).write_text(text)
    line = refused(name, cwd=tmp_path)
    assert key in line and name.partition(".")[0] in line


# Other errors, most of them before the work


@pytest.mark.parametrize(
    ("arguments", "words", "is_early"),
    [
        (["--keras", "nowhere.h5"], "nowhere.h5: No such file", True),
        (["--keras", "noise.h5"], "noise.h5: ", False),
        (["--compare", "other.pt"], "other.pt: No such file", True),
        (["--no-keras", "--mean", "1", "2"], "mean has 2 values", False),
        (["--no-keras", "--mean", "inf"], "finite", False),
        (["--no-keras", "--device", "cuda"], "--device cuda", True),
        (["--no-keras", "--output", "noise.h5"], "noise.h5: Not a directory", True),
    ],
)
def test_other_errors(folder, monkeypatch, arguments, words, is_early):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("has CUDA")
    (folder / "noise.h5").write_bytes(b"noise")
    monkeypatch.setattr("tests.evaluating.arguments_of", lambda given: ["evaluate.py", *map(str, given)])
    if is_early:
        monkeypatch.setattr(evaluate, "load_checkpoint", lambda *_, **__: pytest.fail("went on"))
    assert words in refused("model.pt", *arguments, cwd=folder)


def test_a_data_dir_without_the_test_set_is_an_error(tmp_path, monkeypatch):
    """The sample does not replace a named folder, except with --data sample."""
    save(random_model(), tmp_path / "model.pt")
    monkeypatch.setattr("tests.evaluating.arguments_of", lambda given: ["evaluate.py", *map(str, given)])
    arguments = ["model.pt", "--no-keras", "--data-dir", "mistyped"]
    for part in ("auto", "full", "perf"):
        line = refused(*arguments, "--data", part, cwd=tmp_path)
        assert "mistyped" in line and "--download" in line
    _, metrics = evaluated(*arguments, "--data", "sample", cwd=tmp_path)
    assert metrics["dataset"]["images"] == 1000


@pytest.mark.skipif(not (SHARED / "cifar-10-batches-bin").exists(), reason="the full test set is absent")
@pytest.mark.parametrize(("part", "images"), [("perf", 200), ("calibration", 500)])
def test_mlperf_tiny_images(tmp_path, monkeypatch, part, images):
    save(random_model(), tmp_path / "model.pt")
    monkeypatch.setattr("tests.evaluating.arguments_of", lambda given: ["evaluate.py", *map(str, given)])
    _, metrics = evaluated("model.pt", "--no-keras", "--data", part, "--data-dir", SHARED, cwd=tmp_path)
    assert metrics["dataset"]["images"] == images and part in metrics["dataset"]["name"]


def test_defaults_are_beside_the_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ROOT", tmp_path / "repository")
    (tmp_path / "elsewhere").mkdir()
    line = refused(cwd=tmp_path / "elsewhere")
    assert str(tmp_path / "repository/checkpoints/resnet8.pt") in line and "python convert.py" in line
