"""convert.py, the command, from the outside: what it prints and writes, its options, and what goes wrong."""

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
from contextlib import nullcontext, suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import convert
from data.cifar10 import DataError
from models.common import terminal
from models.common.errors import OutputExistsError
from models.conversion import proof
from models.conversion.proof import count_parameters
from models.files import metadata
from models.resnet8 import ResNet8
from tests.conftest import ROOT
from tests.faults import files_in


def run(*arguments, cwd=ROOT, env=None):
    """Run convert.py and return what came of it; none of its messages may be a traceback."""
    result = subprocess.run(
        [sys.executable, ROOT / "convert.py", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in result.stdout + result.stderr
    return result


@pytest.fixture
def command(reader, monkeypatch, capsys):
    """Return a function that runs the command in this process: (exit status, stdout, lines of stderr)."""
    monkeypatch.setattr(convert, "start_reader", lambda: nullcontext(reader))  # one is there

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        try:
            status = convert.main()
        except SystemExit as error:
            status = error.code
        output = capsys.readouterr()
        return status, output.out, output.err.splitlines()

    return run_main


@pytest.fixture
def model_file(reference_files, tmp_path):
    return shutil.copy(reference_files / "odd.h5", tmp_path / "some.model.h5")


@pytest.fixture
def no_keras(tmp_path):
    """Return an environment where importing Keras or torchvision fails, and a function: what was tried."""
    blocked, tried = tmp_path / "blocked", tmp_path / "tried"
    blocked.mkdir()
    for name in ("tensorflow", "keras", "tf_keras", "torchvision", "matplotlib"):
        code = f"open({str(tried)!r}, 'a').write({name + ' '!r}); raise ImportError('{name} is blocked')"
        (blocked / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(blocked)}, lambda: tried.read_text().split() if tried.exists() else []


@pytest.mark.long
def test_verified_conversion(model_file, tmp_path):
    """The whole command, once: its stages, its two files, and what they say."""
    output = tmp_path / "new folder" / "out.pt"
    (temporary := tmp_path / "temporary").mkdir()
    arguments = ["some.model.h5", "-o", output, "--mean", 120, "--std", 60, 61, 62, 63, "-v"]
    result = run(*arguments, cwd=tmp_path, env={"TMPDIR": str(temporary)})
    assert result.returncode == 0, result.stderr
    assert not list(temporary.iterdir())
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("some.model.h5: ") and "Keras 3" in lines[0]
    stages = [line.split()[0] for line in lines if re.match(r"  \w+ +passed  ", line)]
    assert stages == ["layers", "shapes", "parameters", "numbers"]
    trainable, statistics = count_parameters(ResNet8(7, 4, 4))
    (line,) = [line for line in lines if line.startswith("  parameters ")]
    counts = {f"{count:,}" for count in (trainable, statistics, trainable + statistics)}
    assert counts <= set(re.findall(r"\d[\d,]*\d", line))
    assert str(output) in lines[-1] and str(output.with_suffix(".json")) in lines[-1]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.json", "out.pt"]

    metadata = json.loads(output.with_suffix(".json").read_text())
    assert metadata["architecture"] == {
        "num_classes": 7,
        "width": 4,
        "in_channels": 4,
        "bn_eps": 1e-3,
        "bn_momentum": 0.01,
    }
    source = metadata["source"]
    assert (output.parent / source["file"]).resolve() == model_file.resolve()
    assert source["sha256"] == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert source["format"] in lines[0] and source["keras_version"] in source["format"]
    scaling = {"mean": [120.0] * 4, "std": [60.0, 61.0, 62.0, 63.0]}
    assert source["input"] == scaling
    assert metadata["input"] == {"layout": "NCHW", "shape": [4, 21, 30], "range": [0, 255], **scaling}
    assert metadata["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert metadata["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    verification = metadata["verification"]
    assert verification["keras"] == source["keras_version"]
    assert verification["float64"]["activations"] <= 1e-10
    assert verification["float64"]["probabilities"] <= 1e-12
    assert verification["float32"]["probabilities"] <= 1e-4
    assert f"{verification['float64']['probabilities']:.1e}" in result.stdout

    state = torch.load(output, weights_only=True)
    assert type(state).__name__ in ("dict", "OrderedDict")
    assert {type(value) for value in state.values()} == {torch.Tensor}
    ResNet8(7, 4, 4).load_state_dict(state)
    with h5py.File(model_file) as file:
        kernel = file["model_weights"]["dense_2"]["dense_2"]["kernel"][()]
    assert np.array_equal(state["fc.weight"], kernel.T)
    # the mapping, in 80 columns: a heading a layer, a row a tensor
    assert max(map(len, lines[3:-1])) <= 80
    rows = re.findall(r"^    (\w+) +(\([\d, ]+\)) +(\S.*?) +(\w+) +(\([\d, ]+\))$", result.stdout, re.M)
    assert {row[0] for row in rows} == {
        "kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance",
    }  # fmt: skip
    assert len(rows) == len([key for key in state if "tracked" not in key])
    assert re.search(
        r"^  dense_2 -> fc\n    kernel +\(16, 7\) +\(1, 0\) +weight +\(7, 16\)$", result.stdout, re.M
    )
    headings = re.findall(r"^  \S+ -> (\S+)$", result.stdout, re.M)
    assert headings == list(dict.fromkeys(key.rpartition(".")[0] for key in state))


def test_no_verify_imports_no_keras(model_file, tmp_path, no_keras):
    """Neither the command nor the process that reads the file; the checkpoint lies beside the file."""
    env, tried = no_keras
    result = run(model_file, "--no-verify", env=env)
    assert (result.returncode, result.stderr, tried()) == (0, "", [])
    (line,) = re.findall("^  numbers .*", result.stdout, re.MULTILINE)
    assert "--no-verify" in line and "passed" not in line
    assert json.loads((tmp_path / "some.model.json").read_text())["verification"] is None
    ResNet8.from_checkpoint(tmp_path / "some.model.pt")


def test_without_keras(model_file, tmp_path, no_keras):
    env, tried = no_keras
    result = run(model_file, env=env)
    assert result.returncode == 1
    (message,) = result.stderr.splitlines()
    assert message.startswith(f"error: {model_file}: ") and "keras is blocked" in message
    assert "tensorflow" in message and "--no-verify" in message
    assert tried() == ["keras"]
    assert not (tmp_path / "some.model.pt").exists()


def test_command_loads_neither_hdf5_nor_torchvision(model_file):
    """In this process: reading and comparing are done in others."""
    code = (
        "import sys; sys.argv = ['convert.py', sys.argv[1], '--no-verify']; import convert; convert.main()\n"
        "loaded = {'torchvision', 'tensorflow', 'keras', 'h5py', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, model_file], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def python_that(tmp_path, *, options="", name="python"):
    """Write a Python interpreter that differs from ours."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {options} "$@"\n')
    path.chmod(0o755)
    return path


def test_keras_python_without_numpy(model_file, tmp_path, command):
    """A bare Python has no tensorflow either; no traceback of ours is shown."""
    status, _, errors = command(model_file, "--keras-python", python_that(tmp_path, options="-S"))
    assert status == 1
    assert "Traceback" not in " ".join(errors)
    assert any("Keras" in line and "tensorflow" in line for line in errors)
    assert "--no-verify" in errors[-1]
    assert not (tmp_path / "some.model.pt").exists()


def test_keras_python_is_the_callers_path(model_file, tmp_path, command, monkeypatch):
    """A relative path is relative to where the command is run, not to the repository."""
    python_that(tmp_path, options="-S", name="other-python")
    monkeypatch.chdir(tmp_path)
    status, _, errors = command(model_file, "--keras-python", "bin/other-python")
    assert status == 1 and any("tensorflow" in line for line in errors)


@pytest.mark.parametrize("python", ["/nowhere/python", "no-such-python-in-path", "/"])
def test_keras_python_that_cannot_run(model_file, tmp_path, command, python):
    status, _, errors = command(model_file, "--keras-python", python)
    assert status == 1
    assert len(errors) == 1 and errors[0].startswith("error: ") and python in errors[0]
    assert "--no-verify" in errors[0]
    assert not (tmp_path / "some.model.pt").exists()


@pytest.mark.parametrize("called_from", ["the repository", "elsewhere"])
def test_defaults(reference_files, tmp_path, command, monkeypatch, called_from):
    """They lie beside the script, wherever it is called from."""
    scripts, elsewhere = tmp_path / "the repository", tmp_path / "elsewhere"
    for folder in (scripts / "checkpoints", elsewhere / "checkpoints"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(terminal, "ROOT", scripts)
    monkeypatch.chdir(tmp_path / called_from)
    (elsewhere / "checkpoints" / "resnet8_keras.h5").write_bytes(b"another")
    status, _, errors = command("--no-verify")
    assert status == 1
    assert len(errors) == 1 and "checkpoints/resnet8_keras.h5" in errors[0]
    shutil.copy(reference_files / "resnet8.h5", scripts / "checkpoints" / "resnet8_keras.h5")
    status, out, _ = command("--no-verify")
    assert status == 0
    shown = Path("checkpoints/resnet8.pt")
    assert f" {shown if called_from == 'the repository' else scripts / shown}" in out
    assert [path.name for path in elsewhere.rglob("*") if path.is_file()] == ["resnet8_keras.h5"]
    monkeypatch.chdir(scripts)
    metadata = json.loads(Path("checkpoints/resnet8.json").read_text())
    assert metadata["source"]["file"] == "resnet8_keras.h5"
    assert metadata["input"] == {
        "layout": "NCHW",
        "shape": [3, 32, 32],
        "range": [0, 255],
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
    }
    model = ResNet8()
    model.load_state_dict(torch.load("checkpoints/resnet8.pt", weights_only=True))


def test_output_into_a_folder(model_file, tmp_path, command):
    (tmp_path / "results").mkdir()
    status, _, _ = command(model_file, "--no-verify", "-o", tmp_path / "results")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "some.model.json",
        "some.model.pt",
    ]
    metadata = json.loads((tmp_path / "results" / "some.model.json").read_text())
    assert metadata["source"]["file"] == "../some.model.h5"


def test_trailing_slash_means_a_folder(model_file, tmp_path, command):
    assert command(model_file, "--no-verify", "-o", f"{tmp_path}/new folder/")[0] == 0
    names = sorted(path.name for path in (tmp_path / "new folder").iterdir())
    assert names == ["some.model.json", "some.model.pt"]


# It replaces what it wrote itself, and nothing else


def fine_tune(output):
    state = torch.load(output, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, output)


LOST = {  # what happens to what an earlier conversion wrote -> which file the error names
    "fine-tuned": (fine_tune, "out.pt"),
    "a text file": (lambda output: output.write_text("notes"), "out.pt"),
    "no JSON": (lambda output: output.with_suffix(".json").unlink(), "out.pt"),
    "a JSON list": (lambda output: output.with_suffix(".json").write_text("[1, 2]"), "out.json"),
    "a user's JSON": (lambda output: output.with_suffix(".json").write_text('{"epochs": 3}'), "out.json"),
    "no JSON at all": (lambda output: output.with_suffix(".json").write_bytes(b"\xff{"), "out.json"),
    "a deep JSON": (lambda output: output.with_suffix(".json").write_text("[" * 100_000), "out.json"),
}


@pytest.mark.parametrize("what", LOST)
def test_replaces_nothing_that_it_did_not_write(model_file, reference_files, tmp_path, command, what):
    output = tmp_path / "out.pt"
    assert command(model_file, "--no-verify", "-o", output)[0] == 0
    change, named = LOST[what]
    change(output)
    before = files_in(tmp_path)
    status, out, errors = command(reference_files / "resnet8.h5", "--no-verify", "-o", output)
    assert (status, out, len(errors)) == (1, "", 1)
    assert str(tmp_path / named) in errors[0] and "--force" in errors[0]
    assert files_in(tmp_path) == before
    assert command(reference_files / "resnet8.h5", "--no-verify", "-o", output, "--force")[0] == 0
    assert ResNet8.from_checkpoint(output).fc.out_features == 10


def test_replaces_what_it_wrote_without_a_word(model_file, reference_files, tmp_path, command):
    output = tmp_path / "out.pt"
    for source, classes in ((model_file, 7), (reference_files / "resnet8.h5", 10), (model_file, 7)):
        status, _, errors = command(source, "--no-verify", "-o", output)
        assert (status, errors) == (0, [])
        assert ResNet8.from_checkpoint(output).fc.out_features == classes
    output.rename(tmp_path / "backup.pt")  # its JSON alone is its own too, whatever else lies there
    (tmp_path / "out.txt").write_text("notes")
    assert command(model_file, "--no-verify", "-o", output)[0] == 0


@pytest.mark.parametrize(("first", "second"), [("x.pt", "x.pth"), ("m.v1", "m.v2"), ("x.h5.pt", "x.h5")])
def test_json_of_another_file_is_not_replaced(model_file, tmp_path, command, first, second):
    """`x.pt` and `x.pth` would share x.json, by which the one would be fed as the other."""
    status, _, _ = command(model_file, "--no-verify", "-o", tmp_path / first, "--std", "255")
    assert status == 0
    if second == "x.h5":  # the other way, whose JSON is x.h5.json
        with pytest.raises(OutputExistsError, match=r"(?=.*x\.h5\.json)(?=.*x\.h5\.pt).*-o\b"):
            metadata.check_outputs(tmp_path / second, False, model_file)
        return
    for exists in (False, True):
        if exists:
            shutil.copy(model_file, tmp_path / second)
        before = files_in(tmp_path)
        status, out, errors = command(model_file, "--no-verify", "-o", tmp_path / second)
        assert (status, out, len(errors)) == (1, "", 1)
        json_path = tmp_path / first.replace(".pt", ".json").replace(".v1", ".json")
        for named in (json_path, tmp_path / first, "-o"):
            assert re.search(rf"{re.escape(str(named))}\b", errors[0])
        assert files_in(tmp_path) == before
    assert command(model_file, "--no-verify", "-o", tmp_path / first, "--std", "255")[0] == 0


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_original_is_not_replaced(model_file, tmp_path, command, force):
    """A checkpoint, sent back, would become the file that it was made of."""
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "some.model.pt", tmp_path / "there" / "net.pt"):
        assert command(model_file, "--no-verify", "-o", output)[0] == 0
        before = files_in(tmp_path)
        arguments = ["-o", model_file] if output.name == "net.pt" else []
        status, out, errors = command(output, *arguments, *force, "--keras-python", sys.executable)
        assert (status, out, len(errors)) == (1, "", 1)
        assert str(model_file) in errors[0] and str(output) in errors[0]
        assert re.search(r"-o\b", errors[0]) and "--force" not in errors[0]
        assert files_in(tmp_path) == before


def test_no_pipe_is_opened(model_file, tmp_path, command):
    """As input, as its JSON, and in the place of an output or its JSON, `--force` or not."""
    os.mkfifo(tmp_path / "pipe.h5")
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "jsonless.json")
    torch.save(ResNet8().state_dict(), tmp_path / "jsonless.pt")
    before = sorted(tmp_path.iterdir())
    for arguments in (
        ["pipe.h5", "-o", tmp_path / "out.pt"],
        ["pipe.pt", "-o", tmp_path / "out.h5"],
        ["jsonless.pt", "-o", tmp_path / "out.h5"],
        [model_file, "--force", "-o", tmp_path / "pipe.pt"],
        [model_file, "--force", "-o", tmp_path / "jsonless.pt"],
        [model_file, "--force", "-o", "/dev/null"],
    ):
        status, out, errors = command(tmp_path / arguments[0], *arguments[1:], "--no-verify")
        assert (status, out, len(errors)) == (1, "", 1), arguments
        assert "device" in errors[0], arguments
    assert sorted(tmp_path.iterdir()) == before
    assert Path("/dev/null").is_char_device()


def test_back_replaces_nothing_that_it_did_not_write(model_file, tmp_path, command):
    """The other way, where the JSON is called model.h5.json; Keras is not asked before that is seen."""
    python = python_that(tmp_path, options="-S")
    assert command(model_file, "--no-verify", "-o", tmp_path / "net.pt")[0] == 0
    for name in ("net.h5", "net.h5.json"):
        (tmp_path / name).write_text("a user's")
        before = files_in(tmp_path)
        status, out, errors = command(tmp_path / "net.pt", "--keras-python", python)
        assert (status, out, len(errors)) == (1, "", 1)
        assert re.search(rf"{re.escape(str(tmp_path / name))}(?!\.json)", errors[0])
        assert "--force" in errors[0]
        assert files_in(tmp_path) == before
        (tmp_path / name).unlink()


def test_make_clean_removes_what_make_makes(tmp_path):
    """And no checkpoint of the user's own."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = ["resnet8.pt", "resnet8.json", "resnet8_keras.keras.npz", "resnet8_keras.keras-sample.npz"]
    own = ["mine.pt", "mine.json", "resnet8_ft.pt", "resnet8_keras.h5", "resnet8.pt.old", "answers.npz"]
    (tmp_path / "checkpoints").mkdir()
    for name in made + own:
        (tmp_path / "checkpoints" / name).touch()
    subprocess.run(["make", "-s", "clean"], cwd=tmp_path, check=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(own)


# Where its output goes, and Ctrl-C


@pytest.mark.parametrize("stdout", ["| head -1", "> /dev/full", ">&-"])
def test_work_outlives_the_printing(model_file, tmp_path, stdout):
    """A reader that goes away, a full disk under stdout, and no stdout at all."""
    if "full" in stdout and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    command = f'set -o pipefail; "$0" -u "$1" "$2" --no-verify {stdout}'
    program = ["bash", "-c", command, sys.executable, ROOT / "convert.py", model_file]
    result = subprocess.run(program, capture_output=True, text=True)
    full = "full" in stdout
    assert len(result.stderr.splitlines()) == int(full) and ("stdout" in result.stderr) == full
    assert (result.returncode, len(result.stdout.splitlines())) == (int(full), int("head" in stdout))
    assert (tmp_path / "some.model.json").exists()
    ResNet8.from_checkpoint(tmp_path / "some.model.pt")


def left_behind(mark):
    """Return the processes that have `mark` in their environment, once they have had the time to end."""
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


MOMENTS = {  # when -> (the beginning of the line of stdout that is waited for, seconds after it)
    "while it starts": (None, 0),
    "while torch is imported": ("  layers", 0.2),
    "while Keras reads the file": ("  shapes", 0),
    "while Keras computes": ("  parameters", 0.5),
}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted(model_file, old_outputs, tmp_path, moment):
    """SIGINT, to the command alone as `kill -INT` sends it, and to all of its group, as a terminal does."""
    output, untouched = old_outputs
    (temporary := tmp_path / "temporary").mkdir()
    line, seconds = MOMENTS[moment]
    for to_group in (False, True):
        mark = f"INTERRUPTED={uuid.uuid4()}"
        process = subprocess.Popen(
            [sys.executable, "-u", ROOT / "convert.py", model_file, "-o", output],
            env={**os.environ, "TMPDIR": str(temporary), **dict([mark.split("=")])},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell starts what it runs in the background with SIGINT ignored, and its children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        if line is None:  # until its first worker is there, the options are certainly read
            while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
                time.sleep(0.01)
        while line and not process.stdout.readline().startswith(line):
            assert process.poll() is None
        while "reads" in moment and not list(temporary.iterdir()):  # its own copy of the file
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(seconds)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, len(errors.splitlines())) == (130, 1)
        assert untouched()
        assert left_behind(mark) == [] and list(temporary.iterdir()) == []


def test_several_files_one_failing(reference_files, tmp_path, command):
    bad = tmp_path / "bad.h5"
    bad.write_bytes(b"no Keras file")
    missing = tmp_path / "missing.h5"
    results = tmp_path / "results"
    files = [reference_files / "resnet8.h5", bad, missing, reference_files / "odd.h5"]
    status, out, errors = command(*files, "--no-verify", "-o", results)
    assert status == 1
    assert len(errors) == 2
    assert errors[0].startswith(f"error: {bad}: ") and errors[1].startswith(f"error: {missing}: ")
    summary = out.partition("\n\n")[2]
    outcomes = dict(re.findall(r"^ *(\S+) +(converted|refused) ", summary, re.MULTILINE))
    assert {Path(path).name: outcome for path, outcome in outcomes.items()} == {
        "resnet8.h5": "converted",
        "bad.h5": "refused",
        "missing.h5": "refused",
        "odd.h5": "converted",
    }
    expected = ["odd.json", "odd.pt", "resnet8.json", "resnet8.pt"]
    assert sorted(path.name for path in results.iterdir()) == expected


def test_usage_errors(model_file, tmp_path, command):
    twin = tmp_path / "twin" / "some.model.h5"
    json_source = Path(shutil.copy(model_file, tmp_path / "some.json"))
    for arguments, named in {
        (model_file, twin, "-o", tmp_path): "some.model.pt",
        (model_file, model_file): "some.model.pt",
        (model_file, tmp_path / "some.model.keras"): "some.model.pt",
        (model_file, twin, "-o", tmp_path / "one.pt"): "one.pt",
        (model_file, "-o", model_file): "some.model.h5",
        (model_file, "-o", tmp_path / "twin" / ".." / "some.model.h5"): "some.model.h5",
        (json_source,): "some.pt",
        (model_file, "-o", tmp_path / "some.json"): "some.json",
        (model_file, "--mean", "red"): "--mean",
        (model_file, "--std", "0"): "--std",
        (model_file, "--std", "-1"): "--std",
        (model_file, "--std", "nan"): "--std",
        (model_file, "--mean"): "--mean",
        (model_file, "--epochs", "3"): "--epochs",
    }.items():
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        status, out, errors = command(*arguments, "--no-verify")
        assert (status, out) == (2, ""), arguments
        assert errors[0].startswith("convert.py: error: ") and named in errors[0], arguments
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    assert run("--no-such-option").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--mean", "1", "2"], ["--mean", "2", "4"]),
        (["--std", "1", "2", "3"], ["--std", "3", "4"]),
        (["--mean", "nan"], ["--mean", "nan"]),
        (["--std", "inf"], ["--std", "inf"]),
    ],
)
def test_wrong_scaling(model_file, tmp_path, command, arguments, named):
    status, _, errors = command(model_file, "--no-verify", *arguments)
    assert status == 1
    assert len(errors) == 1 and errors[0].startswith(prefix := f"error: {model_file}: ")
    assert all(name in errors[0].removeprefix(prefix) for name in named)
    assert not (tmp_path / "some.model.pt").exists()


def test_file_that_is_called_as_the_message_begins(keras_files, tmp_path, command, monkeypatch):
    shutil.copy(keras_files / "keras" / "refused" / "relu6.h5", tmp_path / "layer")
    monkeypatch.chdir(tmp_path)
    status, _, errors = command("layer", "--no-verify")
    assert status == 1 and len(errors) == 1
    assert errors[0].startswith("error: layer: ")
    assert all(name in errors[0] for name in ("odd", "ReLU", "max_value", "6"))


def test_file_that_is_none(tmp_path, command):
    for path in (tmp_path / "missing.h5", tmp_path):
        status, _, errors = command(path, "--no-verify", "-o", tmp_path / "out.pt")
        assert (status, len(errors)) == (1, 1) and errors[0].startswith(f"error: {path}: ")


def test_output_that_cannot_be_written(model_file, tmp_path, command):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder" / "some.model.pt").mkdir(parents=True)
    places = {
        tmp_path / "file" / "out.pt": None,
        tmp_path / "file" / "new" / "out.pt": None,
        tmp_path / "folder": tmp_path / "folder" / "some.model.pt",
    }
    for place, output in places.items():
        before = sorted(tmp_path.rglob("*"))
        status, out, errors = command(model_file, "--no-verify", "-o", place)
        assert (status, out) == (1, "")  # nothing has been read yet
        assert len(errors) == 1
        assert errors[0].startswith(f"error: {model_file}: ") and str(output or place) in errors[0]
        assert sorted(tmp_path.rglob("*")) == before


def test_text_of_a_file_is_no_line_of_ours(edited, tmp_path, command):
    """Its Keras version and its layers' dtypes are printed; the version is in the JSON too."""
    fake = "\x1b[2K\r\n  numbers     passed"

    def edit(file):
        file.attrs["keras_version"] = f"3{fake}"
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1]["config"]["dtype"] = fake
        file.attrs["model_config"] = json.dumps(config)

    status, out, _ = command(edited(edit), "--no-verify", "-o", tmp_path / "out.pt")
    assert status == 0
    assert all(line.isprintable() for line in out.split("\n")), out
    assert not re.search("^ *numbers +passed", out, re.MULTILINE)
    assert out.count("?[2K??  numbers     passed") == 2
    source = json.loads((tmp_path / "out.json").read_text())["source"]
    assert source["keras_version"].isprintable() and source["format"].isprintable()


def test_links_in_a_circle(tmp_path, command):
    (tmp_path / "a.h5").symlink_to("b.h5")
    (tmp_path / "b.h5").symlink_to("a.h5")
    status, _, errors = command(tmp_path / "a.h5", "--no-verify")
    assert (status, len(errors)) == (1, 1) and errors[0].startswith(f"error: {tmp_path / 'a.h5'}: ")


def test_output_into_a_locked_folder(command, monkeypatch, locked):
    monkeypatch.chdir(locked)
    status, out, errors = command("odd.h5", "--no-verify")
    assert (status, out, len(errors)) == (1, "", 1)
    assert errors[0].startswith("error: odd.h5: ") and "odd.pt" in errors[0]


def test_folder_in_the_place_of_the_json(model_file, old_outputs, command):
    output, _ = old_outputs
    output.with_suffix(".json").unlink()
    output.with_suffix(".json").mkdir()
    status, out, errors = command(model_file, "--no-verify", "-o", output)
    assert (status, out, len(errors)) == (1, "", 1)
    assert output.read_bytes() == b"old checkpoint"


def test_damaged_sample_is_one_line(model_file, keras, old_outputs, command, monkeypatch):
    output, untouched = old_outputs

    def damaged(*arguments):
        raise DataError("data/cifar10-sample-1000.bin: damaged")

    monkeypatch.setattr(proof, "load_test", damaged)
    monkeypatch.setattr(convert, "KerasProcess", lambda python: keras)
    monkeypatch.setattr(keras, "close", lambda: None)
    status, _, errors = command(model_file, "-o", output)
    assert (status, errors) == (1, [f"error: {model_file}: data/cifar10-sample-1000.bin: damaged"])
    assert untouched()


def test_full_disk_leaves_the_old_files(model_file, old_outputs, command, monkeypatch):
    output, untouched = old_outputs
    write_files = metadata.write_files

    def until_full(writers):
        def full(target):
            target.write(b"{")
            raise OSError(28, "No space left on device")

        write_files({path: full if path.suffix == ".json" else write for path, write in writers.items()})

    monkeypatch.setattr(metadata, "write_files", until_full)
    status, _, errors = command(model_file, "--no-verify", "-o", output)
    assert status == 1
    assert len(errors) == 1 and "No space left on device" in errors[0]
    assert untouched()
