"""evaluate.py from the outside: its options and guards, and checkpoints that are not what they should be."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import pytest
import torch

import evaluate
from models.common import terminal
from models.evaluation import fused
from models.evaluation.metrics import p_text
from models.resnet8 import ResNet8
from tests.evaluating import (
    HAS_FUSED_OPERATORS,
    ROOT,
    SHARED,
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

# --compare, --min-accuracy, --max-drop


@needs_real_model
def test_compare(real):
    model = ResNet8.from_checkpoint(real / "model.pt")
    save(model, real / "same [1].pt", input=scaling(0.0, 1.0))
    with torch.no_grad():
        model.fc.bias[3] += 5
    for name in "abc":
        save(model, real / f"worse_{name}.pt", input=scaling(0.0, 1.0))
    others = ["same [1].pt", "worse_a.pt", "worse_b.pt", "worse_c.pt"]
    stdout, metrics = evaluated("model.pt", "--compare", *others, cwd=real)
    assert [other["checkpoint"] for other in metrics["compared"]] == others
    pairs = {tuple(pair["models"]): pair for pair in metrics["pairs"]}
    assert len(pairs) == 6 * 5 / 2
    same, worse = pairs["model.pt", "same [1].pt"], pairs["model.pt", "worse_a.pt"]
    assert (same["same_prediction"], same["max_abs_probability_difference"]) == (1000, 0)
    assert pairs["Keras", "model.pt"]["max_abs_probability_difference"] < 1e-5
    for each in (metrics, *metrics["compared"]):
        ran = each["throughput"]
        assert ran["batch_norm_folded"] == ran["fused_operators"] == HAS_FUSED_OPERATORS
    lost = metrics["compared"][1]["correct"] - metrics["pytorch"]["correct"]
    assert worse["accuracy_difference"] == lost / 1000 < 0
    assert worse["mcnemar_p"] < 1e-3
    rows = [line for line in stdout.splitlines() if line.startswith(("same [1].pt ", "worse_a.pt "))]
    first, second, *below = map(str.split, rows)
    assert first[-5:-3] == ["1,000", "1.00"]  # same class, p
    assert second[-4] == p_text(pairs["Keras", "worse_a.pt"]["mcnemar_p"])
    assert len(below) == 2  # how far their probabilities are from Keras's
    assert max(map(len, stdout.split("\n\n", 1)[1].splitlines())) <= 80
    done = command("model.pt", "--compare", "worse_a.pt", "--no-keras", "--max-drop", "0.01", cwd=real)
    assert done.returncode == 3
    assert has_line(done.stderr, "worse_a.pt", "--max-drop", "0.01")


@pytest.mark.parametrize("arguments", [["--dtype", "float64"], []])
def test_what_is_compared_is_folded_only_where_that_is_as_exact(tmp_path, monkeypatch, arguments):
    """In float64, or where the fused operators' numbers are others, all is computed as it stands."""
    monkeypatch.setattr(fused, "turn", lambda model, size: model)
    for seed, name in enumerate(("a.pt", "b.pt")):
        save(random_model(seed), tmp_path / name, input=scaling(120.0, 64.0))
    _, metrics = evaluated("a.pt", "b.pt", "--no-keras", *arguments, cwd=tmp_path)
    for each in (metrics, *metrics["compared"]):
        ran = each["throughput"]
        assert (ran["batch_norm_folded"], ran["fused_operators"]) == (False, False)


@needs_real_model
def test_guards(converted, real):
    accuracy = converted[2]["pytorch"]["accuracy"]
    evaluated("model.pt", "--min-accuracy", accuracy, "--max-drop", 0, cwd=real)
    done = process("model.pt", "--min-accuracy", accuracy + 0.001, cwd=real)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert has_line(line, "model.pt", f"{accuracy:.4f}", "--min-accuracy", f"{accuracy + 0.001:g}")
    assert (real / "results/metrics.json").exists()  # it falls short, and says by how much


# Options


def test_near_chance_names_the_scaling(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 255.0))
    stdout, metrics = evaluated("model.pt", "--no-keras", cwd=tmp_path)
    assert metrics["pytorch"]["accuracy"] < 0.2
    (hint,) = [note for note in metrics["notes"] if "--std" in note]
    assert hint in stdout
    assert "model.pt" in hint and "convert.py" in hint and "255.0" in hint


def test_options_may_stand_before_between_and_after_the_files(tmp_path):
    """As a shell leaves it: `evaluate.py --no-keras runs/*.pt --dtype float64`."""
    for name in "abc":
        save(random_model(), tmp_path / f"{name}.pt", input=scaling(120.0, 64.0))
    for arguments in (
        ["--no-keras", "a.pt", "b.pt", "c.pt"],
        ["a.pt", "--no-keras", "b.pt", "--workers", "1", "c.pt"],
        ["a.pt", "--compare", "c.pt", "--no-keras", "b.pt"],
    ):
        _, metrics = evaluated(*arguments, cwd=tmp_path)
        compared = [each["checkpoint"] for each in metrics["compared"]]
        assert (metrics["checkpoint"], compared) == ("a.pt", ["b.pt", "c.pt"])


def test_checkpoint_without_json(tmp_path):
    save(random_model(), tmp_path / "model.pt")
    stdout, _ = evaluated("model.pt", cwd=tmp_path)
    assert has_line(stdout, "model.json", "model.pt", "--mean", "--std")
    assert has_line(stdout, "model.json", "--keras")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype(tmp_path, dtype):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    arguments = ["--no-keras", "--dtype", dtype, "--batch-size", 50, "--workers", 1, "--device", "cpu"]
    _, metrics = evaluated("model.pt", *arguments, cwd=tmp_path)
    found = {name: metrics["throughput"][name] for name in ("dtype", "batch_size", "workers", "device")}
    assert found == {"dtype": dtype, "batch_size": 50, "workers": 1, "device": "cpu"}


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
    ],
    ids=" ".join,
)
def test_usage_errors(tmp_path, arguments):
    message, help_for_it = refused(*arguments, cwd=tmp_path, status=2).splitlines()
    assert message.startswith("evaluate.py: ") and arguments[0] in message
    assert "evaluate.py --help" in help_for_it


def test_help_and_usage_errors_import_no_large_library():
    """They come before torch: the command line is all that is needed."""
    code = """
import sys
import evaluate
sys.argv = ["evaluate.py", "--workers", "0"]
try:
    evaluate.main()
except SystemExit as end:
    assert end.code == 2
large = {"torch", "rich", "matplotlib", "keras", "h5py"} & set(sys.modules)
sys.exit(f"imported: {large}" if large else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is not a checkpoint as `convert.py` writes it


class Bomb:
    """What leaves a mark on disk when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def traced(model, path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 32, 32)), path)


def compressed(model, path):
    """A gigabyte of zeros in a megabyte, as torch writes none."""
    save(model, path)
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    largest = max(members, key=lambda name: len(members[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            target.writestr(name, bytes(2**28) if name == largest else content)


def cut(model, path):
    save(model, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(name, tensor):
    return lambda model, path: torch.save({**model.state_dict(), name: tensor}, path)


HOSTILE = {  # what writes a file, and what the line names
    "pickle bomb": (lambda _, path: torch.save({"a": Bomb(path.parent / "MARK")}, path), "system"),
    "old pickle bomb": (
        lambda _, path: torch.save(
            {"a": Bomb(path.parent / "MARK")}, path, _use_new_zipfile_serialization=False
        ),
        "system",
    ),
    "raw pickle bomb": (lambda _, path: path.write_bytes(pickle.dumps(Bomb(path.parent / "MARK"))),),
    "TorchScript": (traced, "TorchScript"),
    "compressed records": (compressed,),
    "whole module": (lambda model, path: torch.save(model, path), "ResNet8"),
    "other model": (lambda _, path: save(torch.nn.Linear(2, 2), path), "fc.weight"),
    "wrapped too deep": (
        lambda model, path: torch.save({"a": {"b": {"c": {"d": model.state_dict()}}}}, path),
    ),
    "list": (lambda _, path: torch.save([1], path), "list"),
    "cut": (cut,),
    "empty": (lambda _, path: path.write_bytes(b""),),
    "text": (lambda _, path: path.write_text("hello\n" * 99),),
    "folder": (lambda _, path: path.mkdir(),),
    "missing": (lambda _, path: None,),
    "extra tensor": (changed("extra", torch.zeros(2)), "extra"),
    "scalar": (changed("conv1.weight", torch.zeros(())),),
    "name that is a number": (changed(1, torch.zeros(2)), "1"),
    "integers": (changed("fc.weight", torch.zeros(10, 64, dtype=torch.int8)), "fc.weight", "int8"),
    "sparse": (changed("fc.weight", torch.zeros(10, 64).to_sparse()), "fc.weight"),
    "a huge shape without values": (
        changed("conv1.weight", torch.zeros(1).expand(10**5, 3, 3, 3)),
        "conv1.weight",
        "2,700,000",
    ),
    "a wide first layer alone": (changed("conv1.weight", torch.zeros(20_000, 3, 3, 3)), "conv1"),
    "NaN": (changed("fc.bias", torch.full((10,), torch.nan)), "fc.bias", "NaN"),
    "one channel": (lambda _, path: save(random_model(in_channels=1), path), "[1,", "[3, 32, 32]"),
    "seven classes": (lambda _, path: save(random_model(num_classes=7), path), "7", "10"),
}


# Runs the command on every file of its own command line, and prints each answer as it comes.
EACH = """
import json, sys, traceback
from pathlib import Path
from tests.evaluating import command

for path in map(Path, sys.argv[1:]):
    try:
        done = command(path.name, cwd=path.parent)
        answer = done.returncode, done.stderr
    except BaseException:
        answer = "raised", traceback.format_exc()
    print(json.dumps([path.stem, *answer]), flush=True)
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Every case's file, what was beside it before, and the command's answer: its status and its stderr.

    One process answers for all. What a file claims must not take the machine's memory, so it has a limit.
    """
    files = {case: tmp_path_factory.mktemp("hostile") / f"{case}.pt" for case in HOSTILE}
    for case, (write, *_) in HOSTILE.items():
        write(random_model(), files[case])
    before = {case: sorted(path.parent.rglob("*")) for case, path in files.items()}
    limit = 8 << 30  # bytes of address space
    done = subprocess.run(
        [sys.executable, "-c", EACH, *map(str, files.values())],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    answers = {case: answer for case, *answer in map(json.loads, done.stdout.splitlines())}
    died = [f"status {done.returncode}", done.stderr]
    return {case: (path, before[case], *answers.get(case, died)) for case, path in files.items()}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_get_one_line(hostile, case):
    path, before, status, line = hostile[case]
    assert status == 1, line
    assert sorted(path.parent.rglob("*")) == before
    assert "Traceback" not in line
    assert len(line.splitlines()) == 1 and line.startswith("error: "), line
    assert path.name in line and has_line(line.replace(path.name, ""), *HOSTILE[case][1:])
    assert not (path.parent / "MARK").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "model.json"),
        ("[1]", "model.json list"),
        ('{"architecture": 3}', "model.json architecture 3"),
        ('{"architecture": {"bn_eps": "small"}}', "architecture.bn_eps small"),
        ('{"input": []}', "input []"),
        ('{"input": {"mean": 0, "std": [1, 1, 1]}}', "input.mean 0"),
        ('{"input": {"mean": [0, 0, NaN], "std": [1, 1, 1]}}', "input.mean"),
        ('{"input": {"mean": [0, 0, 0], "std": [1, 0, 1]}}', "input.std"),
        ('{"input": {"mean": [0], "std": [1, 1, 1]}}', "input.mean 1 3"),
        ('{"input": {"shape": [3, 96, 96]}}', "[3, 96, 96]"),
        ('{"source": {"file": 1, "sha256": "0"}}', "source.file 1"),
        ('{"source": {"input": {"mean": ["a"]}}}', "source.input.mean"),
        ('{"sha256": null}', "sha256 null"),
    ],
)
def test_wrong_json_gets_one_line(tmp_path, text, expected):
    save(random_model(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text(text)
    assert has_line(refused("model.pt", cwd=tmp_path), *expected.split())
    assert not (tmp_path / "results").exists()


def test_other_errors_get_one_line(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(0.0, 1.0))
    assert "nowhere.h5" in refused("model.pt", "--keras", "nowhere.h5", cwd=tmp_path)
    (tmp_path / "noise.h5").write_bytes(b"noise")
    assert "noise.h5" in refused("model.pt", "--keras", "noise.h5", cwd=tmp_path)
    assert "--compare" not in refused("model.pt", "--compare", "other.pt", cwd=tmp_path)
    if not torch.cuda.is_available():
        assert "--device cuda" in refused("model.pt", "--device", "cuda", cwd=tmp_path)


# What a checkpoint is fed


def test_inputs_are_given_or_taken_from_the_checkpoint_and_said(tmp_path):
    """A fine-tuned file under a new name has no JSON: it is fed pixels, what is given, or as CHECKPOINT."""
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    save(random_model(), tmp_path / "tuned.pt")
    save(random_model(), tmp_path / "other.pt", architecture={"bn_eps": 1e-3})
    stdout, metrics = evaluated("model.pt", "other.pt", "--no-keras", cwd=tmp_path)
    assert has_line(stdout, "other.json", "other.pt", "model.pt")
    stdout, metrics = evaluated("model.pt", "--no-keras", "--compare", "tuned.pt", cwd=tmp_path)
    assert metrics["pairs"][0]["max_abs_probability_difference"] == 0
    assert has_line(stdout, "tuned.json", "tuned.pt", "model.pt")
    fed = {"mean": [120.0] * 3, "std": [64.0] * 3}
    assert metrics["input"] == metrics["compared"][0]["input"] == fed
    written = (tmp_path / "results/metrics.txt").read_text()
    for text in (stdout, written):
        for name in ("model.pt", "tuned.pt"):
            said = (name, "120, 120, 120", "64, 64, 64")
            assert any(all(word in part for word in said) for part in text.split("\n\n"))
    right = metrics["pytorch"]

    stdout, metrics = evaluated("tuned.pt", "--no-keras", "--mean", 120, "--std", 64, 64, 64, cwd=tmp_path)
    assert "tuned.json" not in stdout
    assert metrics["input"] == fed and metrics["pytorch"]["loss"] == pytest.approx(right["loss"])
    stdout, metrics = evaluated("tuned.pt", "--no-keras", cwd=tmp_path)
    assert has_line(stdout, "tuned.json", "tuned.pt", "--mean", "--std")
    assert "0, 0, 0" not in stdout and metrics["input"] == {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--std", "0"], 2, "--std 0"),
        (["--mean", "1", "2"], 1, "--mean 2 3"),
        (["--std", "nan"], 2, "--std"),
        (["--mean", "inf"], 1, "--mean"),
    ],
)
def test_inputs_that_make_no_sense(tmp_path, arguments, status, words):
    save(random_model(), tmp_path / "model.pt")
    said = refused("model.pt", "--no-keras", *arguments, cwd=tmp_path, status=status)
    assert has_line(said, *words.split())


@needs_real_model
def test_another_keras_file_is_named_and_no_failed_conversion(real, reader):
    """B.pt beside Keras's A.h5 is another model, and the row and a note say so."""
    metadata = json.loads((real / "model.json").read_text())
    model = ResNet8.from_checkpoint(real / "model.pt")
    metadata["source"]["sha256"] = "0" * 64
    save(model, real / "other.pt", **metadata)
    stdout, metrics = evaluated("model.pt", "--compare", "other.pt", cwd=real)
    assert [pair["models"][0] for pair in metrics["pairs"]][:2] == ["Keras model.h5"] * 2
    (note,) = [note for note in metrics["notes"] if "model.h5" in note]
    assert "other.pt" in note and note in stdout
    save(model, real / "tuned.pt", input=metadata["input"])  # of unknown origin: most likely the same
    stdout, metrics = evaluated("model.pt", "--compare", "tuned.pt", cwd=real)
    assert metrics["pairs"][0]["models"][0] == "Keras"
    assert not any("model.h5" in note for note in metrics["notes"])


# The data, the outputs, the defaults


def command_line(monkeypatch, capsys, cwd, *arguments):
    """Run evaluate.py with just these arguments; return (status, stdout, stderr)."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    status = evaluate.main()
    output = capsys.readouterr()
    return status, output.out, output.err


def test_a_data_dir_that_was_given_must_hold_the_data(tmp_path, monkeypatch, capsys):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    arguments = ["model.pt", "--no-keras", "--data-dir", "mistyped"]
    status, _, error = command_line(monkeypatch, capsys, tmp_path, *arguments)
    assert status == 1 and len(error.splitlines()) == 1
    assert has_line(error, "mistyped", "cifar-10-batches-bin", "cifar-10-batches-py", "--download")
    assert not (tmp_path / "results").exists()
    status, out, _ = command_line(monkeypatch, capsys, tmp_path, *arguments, "--data", "sample")
    assert status == 0 and "1,000" in out


@pytest.mark.parametrize(("part", "images"), [("perf", 200), ("calibration", 500)])
def test_mlperf_tiny_images(tmp_path, monkeypatch, capsys, part, images):
    """They are of the whole test set, and never of the sample."""
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    arguments = ["model.pt", "--no-keras", "--data", part, "--data-dir"]
    status, _, error = command_line(monkeypatch, capsys, tmp_path, *arguments, tmp_path)
    assert status == 1 and len(error.splitlines()) == 1
    assert str(tmp_path) in error and "--download" in error
    if not (SHARED / "cifar-10-batches-bin/test_batch.bin").exists():
        pytest.skip("the full test set is absent")
    status, out, _ = command_line(monkeypatch, capsys, tmp_path, *arguments, SHARED)
    assert status == 0 and has_line(out, f"MLPerf Tiny {part} set", str(images))
    dataset = json.loads((tmp_path / "results/metrics.json").read_text())["dataset"]
    assert (dataset["name"], dataset["images"]) == (f"MLPerf Tiny {part} set", images)


def test_defaults_lie_beside_the_scripts(tmp_path, monkeypatch, capsys):
    """Called from elsewhere, it says where it looks for the checkpoint, and what makes it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(terminal, "ROOT", tmp_path / "repository")
    status, out, error = command_line(monkeypatch, capsys, tmp_path / "elsewhere")
    assert status == 1
    assert str(tmp_path / "repository/data") in out
    assert has_line(error, str(tmp_path / "repository/checkpoints/resnet8.pt"), "convert.py")


def test_what_cannot_be_done_is_said_before_keras_is_asked(tmp_path, monkeypatch, capsys):
    """A folder that cannot be written to, a device that is not there: named as they were given."""
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    (tmp_path / "afile").write_text("no folder")
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda *_, **__: pytest.fail("went on"))
    cases = {("--output", "afile"): "afile"}
    if not torch.cuda.is_available():
        cases["--device", "cuda"] = "--device cuda"
    for arguments, named in cases.items():
        status, _, error = command_line(monkeypatch, capsys, tmp_path, "model.pt", *arguments)
        assert status == 1 and len(error.splitlines()) == 1
        assert named in error and str(tmp_path) not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afile", "model.json", "model.pt"]


@pytest.mark.parametrize("shape", [None, 7, [32, 32, 3], [], "32"])
def test_a_keras_file_with_an_odd_input_shape_is_refused_in_one_line(tmp_path, keras_files, shape):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    path = Path(shutil.copy(keras_files / "keras/full_size.h5", tmp_path / "odd.h5"))
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        first = config["config"]["layers"][0]["config"]
        first["batch_shape" if "batch_shape" in first else "batch_input_shape"] = shape
        file.attrs["model_config"] = json.dumps(config)
    line = refused("model.pt", "--keras", "odd.h5", cwd=tmp_path)
    assert "odd.h5" in line and "shape" in line


def test_a_reader_that_goes_away_ends_the_printing_not_the_work(tmp_path):
    save(random_model(), tmp_path / "model.pt", input=scaling(120.0, 64.0))
    program = f"{sys.executable} {ROOT / 'evaluate.py'} model.pt --no-keras --data sample"
    shell = f"set -o pipefail; {program} | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "results/metrics.json").exists()
