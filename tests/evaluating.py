"""Shared by the tests of evaluations: checkpoints, and runs of evaluate.py on the bundled sample."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
from convert import convert_file
from data.cifar10 import load_test
from models.resnet8 import ResNet8

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
MODELS = (ROOT / "checkpoints/resnet8_keras.h5", SHARED / "keras/pretrainedResnet.h5")
REAL_MODEL = next(filter(Path.exists, MODELS), None)
needs_real_model = pytest.mark.skipif(
    REAL_MODEL is None, reason="no Keras model in checkpoints/ or ../shared"
)
HAS_FUSED_OPERATORS = hasattr(torch.ops.mkldnn, "_convolution_pointwise")
NOT_A_PYTHON = "/nonexistent/python"


def random_model(seed=0, **arguments):
    """Return a ResNet8 with random weights and random BatchNorm statistics, which folding changes."""
    torch.manual_seed(seed)
    model = ResNet8(**arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                torch.nn.init.normal_(tensor)
    return model.eval()


def save(model, path, **metadata):
    """Save a state_dict, and its JSON if it has metadata; return the path."""
    torch.save(model.state_dict(), path)
    if metadata:
        path.with_suffix(".json").write_text(json.dumps(metadata))
    return path


def scaling(mean, std):
    """Return the JSON's `input`: shape and normalization."""
    return {"shape": [3, 32, 32], "mean": [mean] * 3, "std": [std] * 3}


def arguments_of(arguments):
    return ["evaluate.py", *map(str, arguments), "--data", "sample", "--output", "results"]


def command(*arguments, cwd):
    """Run evaluate.py in `cwd` in this process: a process of its own takes seconds to import torch."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", arguments_of(arguments))
        try:
            status = evaluate.main()
        except SystemExit as end:  # raised by argparse
            status = end.code
    return subprocess.CompletedProcess(sys.argv, status, stdout.getvalue(), stderr.getvalue())


def process(*arguments, cwd):
    """Run evaluate.py in `cwd` in a process."""
    script, *arguments = arguments_of(arguments)
    program = [sys.executable, ROOT / script, *arguments]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=300)


def evaluated(*arguments, cwd, status=0, run=command):
    """Run it; return (stdout, metrics.json)."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, json.loads((cwd / "results/metrics.json").read_text())


def refused(*arguments, cwd, status=1, run=command):
    """Run it, which must fail with one line and write nothing; return stderr."""
    before = sorted(cwd.rglob("*"))
    done = run(*arguments, cwd=cwd)
    assert done.returncode == status, (done.stdout, done.stderr)
    assert sorted(cwd.rglob("*")) == before
    assert "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("error: ")
    return done.stderr


def with_few_images(monkeypatch, dataset):
    """Let evaluate.py use the first 100 images of a data set; return them."""
    few = replace(dataset, images=dataset.images[:100], labels=dataset.labels[:100].copy())
    monkeypatch.setattr(evaluate, "load_test", lambda *_: few)
    return few


# Fixtures, imported by tests/conftest.py


@pytest.fixture(scope="session")
def sample():
    return load_test(Path("/nowhere"), "sample")


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The real model, converted, and a first run of evaluate.py on it: (folder, stdout, metrics)."""
    folder = tmp_path_factory.mktemp("converted")
    shutil.copy(REAL_MODEL, folder / "model.h5")
    convert_file(folder / "model.h5", folder / "model.pt")
    return folder, *evaluated("model.pt", cwd=folder, run=process)


@pytest.fixture
def real(converted, tmp_path):
    """A copy of that folder to change, with Keras's cached predictions."""
    folder = tmp_path / "real"
    shutil.copytree(converted[0], folder, ignore=shutil.ignore_patterns("results"))
    return folder
