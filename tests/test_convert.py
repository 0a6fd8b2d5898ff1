"""convert.py, the command: its output and files, its options, and its errors."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from convert import convert_file
from data.cifar10 import DataError
from models.common import cli
from models.conversion import verify
from models.conversion.stages import count_parameters
from models.graph import KNOWN_FILES
from models.resnet8 import ResNet8
from tests.conftest import ROOT, STAGES, files_in, passed_stages
from tests.runtime_files import write_tflite

BLOCKED = ("tensorflow", "keras", "tf_keras", "torchvision", "matplotlib")


@pytest.fixture
def model_file(reference_files, tmp_path):
    return Path(shutil.copy(reference_files / "odd.h5", tmp_path / "some.model.h5"))


@pytest.fixture
def checkpoint(model_file, tmp_path):
    convert_file(model_file, tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def tried(tmp_path_factory, monkeypatch):
    """Make imports of Keras and torchvision fail in all processes; return a function: the imports tried."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in BLOCKED:
        note = f"open({str(folder / 'tried')!r}, 'a').write('{name} ')"
        (folder / f"{name}.py").write_text(f"{note}; raise ImportError('{name} is blocked')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return lambda: (folder / "tried").read_text().split() if (folder / "tried").exists() else []


def assert_refused(result, *words):
    """Check that a command printed one error with these words, and nothing else."""
    status, out, errors = result
    assert (status, out, len(errors)) == (1, "", 1), result
    assert errors[0].startswith("error: ") and all(str(word) in errors[0] for word in words), errors


# A conversion


@pytest.mark.long
def test_verified_conversion(model_file, tmp_path):
    """The whole command as a process: its stages, its two files, the mapping, and nothing left behind."""
    output = tmp_path / "new folder" / "out.pt"
    (temporary := tmp_path / "temporary").mkdir()
    normalization = {"mean": [120.0] * 4, "std": [60.0, 61.0, 62.0, 63.0]}
    options = ["-o", output, "--mean", "120", "--std", "60", "61", "62", "63", "-v"]
    result = subprocess.run(
        [sys.executable, ROOT / "convert.py", model_file.name, *options],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert not list(temporary.iterdir())
    assert passed_stages(result.stdout) == STAGES
    trainable, statistics = count_parameters(ResNet8(7, 4, 4))
    assert f"{trainable:,} trainable + {statistics:,}" in result.stdout

    assert set(files_in(output.parent)) == {"out.json", "out.pt"}
    metadata = json.loads(output.with_suffix(".json").read_text())
    assert list(metadata) == ["architecture", "source", "input", "verification", "versions", "date", "sha256"]
    sizes = {"num_classes": 7, "width": 4, "in_channels": 4}
    assert metadata["architecture"] == {**sizes, "bn_eps": 1e-3, "bn_momentum": 0.01}
    source, results = metadata["source"], metadata["verification"]
    assert source == {
        "file": "../some.model.h5",
        "sha256": hashlib.sha256(model_file.read_bytes()).hexdigest(),
        "format": f"Keras {results['keras']} .h5 whole model",
        "keras_version": results["keras"],
        "assumed": None,
        "input": normalization,
    }
    assert result.stdout.startswith(f"some.model.h5: {source['format']}\n")
    assert metadata["input"] == {"layout": "NCHW", "shape": [4, 21, 30], "range": [0, 255], **normalization}
    assert metadata["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert set(metadata["versions"]) == {"torch", "numpy", "h5py"}
    assert results["float64"]["activations"] <= 1e-10
    assert results["float64"]["probabilities"] <= 1e-12
    assert results["float32"]["probabilities"] <= 1e-4
    assert f"{results['float64']['probabilities']:.1e}" in result.stdout

    state = torch.load(output, weights_only=True)
    assert {type(value) for value in state.values()} == {torch.Tensor}
    ResNet8(7, 4, 4).load_state_dict(state)
    with h5py.File(model_file) as file:
        kernel = file["model_weights"]["dense_2"]["dense_2"]["kernel"][()]
    assert np.array_equal(state["fc.weight"], kernel.T)

    # the mapping, in 80 columns: a heading per layer, a row per tensor
    nodes = re.findall(r"^  \S+ -> (\S+)$", result.stdout, re.M)
    assert nodes == list(dict.fromkeys(key.rpartition(".")[0] for key in state))
    rows = re.findall(r"^    (\w+) +(\(.*?\)) +(\(.*?\)|as is) +(\w+) +(\(.*?\))$", result.stdout, re.M)
    assert len(rows) == len([key for key in state if "tracked" not in key])
    assert rows[-2:] == [
        ("kernel", "(16, 7)", "(1, 0)", "weight", "(7, 16)"),
        ("bias", "(7,)", "as is", "bias", "(7,)"),
    ]
    assert max(len(line) for line in result.stdout.splitlines()[3:-1]) <= 80


def test_no_verify_imports_no_keras(model_file, tmp_path, tried):
    """Nor torchvision, in any process; torch is imported after Keras could start, h5py never."""
    code = (
        "import sys; sys.argv = ['convert.py', sys.argv[1], '--no-verify']; import convert\n"
        "assert 'torch' not in sys.modules; status = convert.main()\n"
        "sys.exit(status or ' '.join({'torchvision', 'tensorflow', 'keras', 'h5py'} & set(sys.modules)) or 0)"
    )
    program = [sys.executable, "-c", code, model_file]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (result.stderr, tried()) == ("", [])
    assert re.search(r"^  outputs +not verified", result.stdout, re.MULTILINE)
    assert json.loads((tmp_path / "some.model.json").read_text())["verification"] is None
    ResNet8.from_checkpoint(tmp_path / "some.model.pt")


def test_defaults(reference_files, tmp_path, command, monkeypatch):
    """The default file is in the repository, wherever the command is run."""
    repository, elsewhere = tmp_path / "the repository", tmp_path / "elsewhere"
    for folder in (repository / "checkpoints", elsewhere / "checkpoints"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(cli, "ROOT", repository)
    monkeypatch.chdir(elsewhere)
    (elsewhere / "checkpoints" / "resnet8_keras.h5").write_bytes(b"another")
    assert_refused(command("--no-verify"), "checkpoints/resnet8_keras.h5", "No such file")
    shutil.copy(reference_files / "resnet8.h5", repository / "checkpoints" / "resnet8_keras.h5")
    assert command("--no-verify")[0] == 0
    assert set(files_in(elsewhere)) == {"checkpoints/resnet8_keras.h5"}
    metadata = json.loads((repository / "checkpoints/resnet8.json").read_text())
    assert metadata["source"]["file"] == "resnet8_keras.h5"
    assert metadata["input"]["shape"] == [3, 32, 32]
    assert (metadata["input"]["mean"], metadata["input"]["std"]) == ([0.0] * 3, [1.0] * 3)
    state = torch.load(repository / "checkpoints/resnet8.pt", weights_only=True)
    ResNet8().load_state_dict(state)


@pytest.mark.parametrize("folder", ["existing", "new folder/"])
def test_output_into_a_folder(model_file, tmp_path, command, folder):
    (tmp_path / "existing").mkdir()
    assert command(model_file, "--no-verify", "-o", f"{tmp_path}/{folder}")[0] == 0
    assert set(files_in(tmp_path / folder)) == {"some.model.json", "some.model.pt"}
    metadata = json.loads((tmp_path / folder / "some.model.json").read_text())
    assert metadata["source"]["file"] == "../some.model.h5"


def test_several_files(reference_files, keras_files, tmp_path, command):
    """In both directions, by content; a failure does not stop the others, and a table follows."""
    sources = tmp_path / "sources"
    sources.mkdir()
    convert_file(reference_files / "odd.h5", sources / "odd.pt")
    shutil.copy(sources / "odd.pt", sources / "checkpoint.h5")
    shutil.copy(keras_files / "keras" / "plain.keras", sources)
    shutil.copy(keras_files / "keras" / "gray.h5", sources / "gray.pt")
    (sources / "bad.pt").write_bytes(b"no checkpoint")
    paths = [
        sources / name
        for name in ("odd.pt", "bad.pt", "plain.keras", "missing.h5", "gray.pt", "checkpoint.h5")
    ]
    status, out, errors = command(*paths, "--no-verify", "-o", tmp_path / "out")
    assert status == 1
    assert [error.split(": ")[1] for error in errors] == [str(paths[1]), str(paths[3])]
    rows = [line.split() for line in out.rpartition("\n\n")[2].splitlines()[1:]]
    results = ["converted", "failed", "converted", "failed", "converted", "converted"]
    assert [row[:2] for row in rows] == [list(row) for row in zip(map(str, paths), results, strict=True)]
    written = {"odd.h5", "odd.h5.json", "checkpoint.h5", "checkpoint.h5.json"}
    written |= {"plain.pt", "plain.json", "gray.pt", "gray.json"}
    assert set(files_in(tmp_path / "out")) == written


def test_files_with_one_output_are_named(model_file, tmp_path, command):
    """And the others are converted; a file that is named twice is converted once."""
    (tmp_path / "twin").mkdir()
    paths = [tmp_path / name for name in ("twin/some.model.h5", "other.h5", "x.tflite")]
    for path in paths[:2]:
        shutil.copy(model_file, path)
    write_tflite(paths[2])
    status, _, errors = command(model_file, *paths, paths[1], "--no-verify", "-o", tmp_path / "out")
    assert (status, len(errors)) == (1, 3) and set(files_in(tmp_path / "out")) == {"other.json", "other.pt"}
    assert all(str(path) in error for error in errors[:2] for path in (model_file, paths[0]))


def test_known_file_of_another_format_is_named(tmp_path, command, monkeypatch):
    path = tmp_path / "x.tflite"
    write_tflite(path)
    monkeypatch.setitem(KNOWN_FILES, hashlib.sha256(path.read_bytes()).hexdigest(), "some model")
    assert_refused(command(path, "-o", tmp_path / "y.h5"), path, "evaluate.py", "some model")


# Usage and input


def test_usage_errors(model_file, checkpoint, tmp_path, command):
    twin = tmp_path / "twin" / "some.model.h5"
    json_source = shutil.copy(model_file, tmp_path / "some.json")
    before = files_in(tmp_path)
    for arguments, words in {
        ("."): "file",
        ("/"): "file",
        (model_file, twin, "-o", tmp_path / "one.pt"): "folder",
        (checkpoint, model_file, "-o", tmp_path / "new.h5"): "folder",
        (model_file, "-o", model_file): "expected .pt",
        (model_file, "-o", tmp_path / "new.h5"): "expected .pt",
        (model_file, "-o", tmp_path / "new.onnx"): "expected .pt",
        (model_file, "-o", tmp_path / "some.json"): "expected .pt",
        (checkpoint, "-o", tmp_path / "new.pt"): ".h5 or .keras",
        (json_source,): "some.json",
        (model_file, "--rescaling"): "--rescaling",
        (checkpoint, model_file, "--rescaling", "-o", tmp_path / "out"): "--rescaling",
        (model_file, "--bn-eps", "0"): "--bn-eps",
        (model_file, "--mean", "red"): "--mean",
        (model_file, "--mean"): "--mean",
        (model_file, "--std", "0"): "--std",
        (model_file, "--std", "-1"): "--std",
        (model_file, "--std", "nan"): "--std",
        (model_file, "--epochs", "3"): "--epochs",
    }.items():
        status, out, errors = command(*arguments, "--no-verify")
        assert (status, out) == (2, ""), arguments
        assert "error: " in errors[-1] and words in errors[-1], (arguments, errors)
        assert files_in(tmp_path) == before


def test_a_normalization_for_pixels_from_0_to_1_is_noted(tmp_path, command):
    for mean, note in (("0.5", "--mean 127.5 --std 63.75"), ("1", "")):
        _, out, _ = command(tmp_path / "x.h5", "--no-verify", "--mean", mean, "--std", "0.25")
        assert ("note:" in out) == bool(note) and note in out


def test_wrong_normalization(model_file, tmp_path, command):
    for option, *values in (["--mean", 1, 2], ["--std", 1, 2, 3], ["--mean", "nan"], ["--std", "inf"]):
        status, _, errors = command(model_file, "--no-verify", option, *values)
        assert (status, len(errors)) == (1, 1)
        assert f"error: {model_file}: {option[2:]}" in errors[0].replace("--", "")
    assert not (tmp_path / "some.model.pt").exists()


def test_paths_that_are_no_files(tmp_path, command):
    (tmp_path / "a.h5").symlink_to("b.h5")
    (tmp_path / "b.h5").symlink_to("a.h5")
    for name in ("missing.h5", "missing.pt", "a.h5", ""):
        output = tmp_path / "new" / ("out.h5" if name.endswith(".pt") else "out.pt")
        assert_refused(command(tmp_path / name, "--no-verify", "-o", output), f"{tmp_path / name}: ")


def test_text_of_a_file_cannot_forge_output(edited, tmp_path, command):
    """Its Keras version and its layers' dtypes are printed; the version is in the JSON too."""
    fake = "\x1b[2K\r\n  outputs     passed"

    def edit(file):
        file.attrs["keras_version"] = f"3{fake}"
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1]["config"]["dtype"] = fake
        file.attrs["model_config"] = json.dumps(config)

    status, out, _ = command(edited(edit), "--no-verify", "-o", tmp_path / "out.pt")
    assert status == 0 and out.count("?[2K??  outputs     passed") == 2
    assert all(line.isprintable() for line in out.split("\n")), out
    assert not re.search("^ *outputs +passed", out, re.MULTILINE)
    source = json.loads((tmp_path / "out.json").read_text())["source"]
    assert source["keras_version"].isprintable() and source["format"].isprintable()


# Keras missing


@pytest.fixture
def either(request, model_file, tmp_path):
    """Return a file to convert in either direction, and advice where Keras is missing."""
    if request.param == "to PyTorch":
        return model_file, "--no-verify"
    convert_file(model_file, tmp_path / "net.pt")
    return tmp_path / "net.pt", "requires Keras"


both_directions = pytest.mark.parametrize("either", ["to PyTorch", "to Keras"], indirect=True)


@both_directions
def test_without_keras(either, tmp_path, command, tried):
    path, advice = either
    before = files_in(tmp_path)
    status, out, errors = command(path, "--keras-python", sys.executable)
    assert (status, len(errors), tried()) == (1, 1, ["keras"]) and "failed" not in out, (out, errors)
    for words in (f"error: {path}: ", "keras is blocked", "tensorflow", advice):
        assert words in errors[0]
    assert files_in(tmp_path) == before


def test_without_keras_in_this_python(model_file, tmp_path, command, monkeypatch):
    """Before anything is read."""
    monkeypatch.setitem(sys.modules, "keras", None)
    monkeypatch.setattr("convert.read_keras_file", None)  # not called
    result = command(model_file, "--keras-python", sys.executable)
    assert_refused(result, "pip install tensorflow", "--no-verify")


@both_directions
def test_keras_python_that_cannot_run(either, tmp_path, command):
    path, advice = either
    before = files_in(tmp_path)
    for python in ("/nowhere/python", "no-such-python-in-path", "/"):
        assert_refused(command(path, "--keras-python", python), python, advice)
    assert files_in(tmp_path) == before


def test_keras_python_without_numpy(model_file, tmp_path, command, monkeypatch):
    """A bare Python has no tensorflow either. A relative path is relative to the current folder."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    status, _, errors = command(model_file, "--keras-python", "bin/python")
    assert (status, len(errors)) == (1, 1)
    assert "numpy" in errors[0] and "tensorflow" in errors[0] and "--no-verify" in errors[0]


# Nothing of the user's is replaced


def fine_tune(output):
    state = torch.load(output, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, output)


LOST = {  # change of an earlier conversion's files -> the file that the error names
    "fine-tuned": (fine_tune, "out.pt"),
    "no JSON": (lambda output: output.with_suffix(".json").unlink(), "out.pt"),
    "a user's JSON": (lambda output: output.with_suffix(".json").write_text('{"epochs": 3}'), "out.json"),
    "an invalid JSON": (lambda output: output.with_suffix(".json").write_bytes(b"\xff{"), "out.json"),
    "a deep JSON": (lambda output: output.with_suffix(".json").write_text("[" * 100_000), "out.json"),
}


@pytest.mark.parametrize("what", LOST)
def test_other_files_are_not_replaced(model_file, reference_files, tmp_path, command, what):
    output = tmp_path / "out.pt"
    assert command(model_file, "--no-verify", "-o", output)[0] == 0
    change, named = LOST[what]
    change(output)
    before = files_in(tmp_path)
    arguments = [reference_files / "resnet8.h5", "--no-verify", "-o", output]
    assert_refused(command(*arguments), tmp_path / named, "-o", "--force")
    assert files_in(tmp_path) == before
    assert command(*arguments, "--force")[0] == 0
    assert ResNet8.from_checkpoint(output).fc.out_features == 10


def test_own_files_are_replaced(model_file, reference_files, tmp_path, command):
    output = tmp_path / "out.pt"
    for source, classes in ((model_file, 7), (reference_files / "resnet8.h5", 10), (model_file, 7)):
        assert command(source, "--no-verify", "-o", output)[::2] == (0, [])
        assert ResNet8.from_checkpoint(output).fc.out_features == classes
    output.rename(tmp_path / "backup.pt")
    assert command(model_file, "--no-verify", "-o", output)[0] == 0


@pytest.mark.parametrize("name", ["net.h5", "net.h5.json"])
def test_other_files_are_not_replaced_by_keras_files(checkpoint, tmp_path, command, name):
    (tmp_path / name).write_text("a user's")
    before = files_in(tmp_path)
    assert_refused(command(checkpoint), tmp_path / name, "--force")
    assert files_in(tmp_path) == before
    for options in (["--force"], []):
        assert command(checkpoint, "--no-verify", *options)[0] == 0


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_source_of_a_checkpoint_is_not_replaced(model_file, tmp_path, command, force):
    (tmp_path / "there").mkdir()
    for output, options in (
        (model_file.with_suffix(".pt"), []),
        (tmp_path / "there/net.pt", ["-o", model_file]),
    ):
        assert command(model_file, "--no-verify", "-o", output)[0] == 0
        before = files_in(tmp_path)
        status, out, errors = command(output, *options, *force)
        assert (status, out, len(errors)) == (1, "", 1)
        assert f"{model_file} " in errors[0] and "-o" in errors[0] and "--force" not in errors[0]
        assert files_in(tmp_path) == before


def test_outputs_that_cannot_be_written(model_file, tmp_path, command):
    """Nothing is read before that is known."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder/some.model.pt").mkdir(parents=True)
    (tmp_path / "json/out.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for output in ("file/out.pt", "file/new/out.pt", "folder/some.model.pt", "json/out.pt"):
        target = tmp_path / (output if "some" not in output else "folder")
        assert_refused(command(model_file, "--no-verify", "-o", target), model_file, tmp_path / output)
        assert sorted(tmp_path.rglob("*")) == before


def test_no_pipe_is_opened(model_file, tmp_path, command):
    """As input or as output, with `--force` or not."""
    for name in ("pipe.h5", "pipe.pt"):
        os.mkfifo(tmp_path / name)
    for arguments in (
        [tmp_path / "pipe.h5", "-o", tmp_path / "out.pt"],
        [tmp_path / "pipe.pt", "-o", tmp_path / "out.h5"],
        [model_file, "--force", "-o", tmp_path / "pipe.pt"],
    ):
        assert_refused(command(*arguments, "--no-verify"), "pipe or a device")
    assert not list(tmp_path.glob("out*"))


def test_damaged_sample(model_file, old_outputs, command, monkeypatch):
    output, untouched = old_outputs

    def damaged(*_, **__):
        raise DataError("data/cifar10-sample-1000.bin: damaged")

    monkeypatch.setattr(verify, "load_test", damaged)
    status, _, errors = command(model_file, "-o", output)
    assert (status, len(errors)) == (1, 1) and "cifar10-sample-1000.bin: damaged" in errors[0]
    assert untouched()


def test_make_clean_removes_only_its_own(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    own = ["mine.pt", "mine.json", "resnet8_ft.pt", "resnet8_keras.h5", "resnet8.pt.old", "answers.npz"]
    (tmp_path / "checkpoints").mkdir()
    for name in ["resnet8.pt", "resnet8.json", *own]:
        (tmp_path / "checkpoints" / name).touch()
    subprocess.run(["make", "-s", "clean"], cwd=tmp_path, check=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(own)


# Ctrl-C


def left_behind(mark):
    """Return the processes that have `mark` in their environment, after some time to end."""
    for _ in range(100):
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has just ended, or is another user's
                if mark.encode() in environment.read_bytes():
                    found.append(environment.parent.name)
        if not found:
            break
        time.sleep(0.1)
    return found


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("line", "kill"), [(None, os.kill), ("  layers", os.killpg), ("  shapes", os.kill)])
def test_interrupted(model_file, old_outputs, tmp_path, line, kill):
    """SIGINT as it starts, or after a line of its output; to it alone, or to its group as a terminal does."""
    output, untouched = old_outputs
    (temporary := tmp_path / "temporary").mkdir()
    mark = f"INTERRUPTED={uuid.uuid4()}"
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "convert.py", model_file, "-o", output],
        env={**os.environ, "TMPDIR": str(temporary), **dict([mark.split("=")])},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background commands with SIGINT ignored, which their children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while line is None and not list(temporary.iterdir()):  # until Keras starts
        time.sleep(0.01)
    while line and not process.stdout.readline().startswith(line):
        assert process.poll() is None
    time.sleep(0.2)
    kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert untouched()
    assert left_behind(mark) == [] and list(temporary.iterdir()) == []
