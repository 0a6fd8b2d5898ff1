"""Shared fixtures: Keras files and references, a Keras process, reading without jobs.

Tests run on all cores, in one process per core (pytest-xdist). Files that take seconds to write are written
once for all processes (`written`); tests that share other work run in one of them (`TOGETHER`).
"""

import os
import tempfile

# a developer's copy of CIFAR-10 must not replace the sample
os.environ["KERAS_HOME"] = os.path.join(tempfile.gettempdir(), "keras-home-of-tests")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core per process
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = "1"

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

import convert
from convert import convert_file
from models.common.cli import KerasFileError
from models.common.job import Job
from models.conversion.match import match_graph
from models.conversion.stages import map_tensors
from models.keras.file import read_keras_file
from models.resnet8 import ResNet8
from tests.evaluating import converted, real, sample  # noqa: F401  # fixtures
from tests.keras_files.networks import WRITERS
from tests.keras_files.reading import InProcessReader
from tests.keras_process import RememberingKeras

ROOT = Path(__file__).parents[1]
TOGETHER = {  # beginning of the tests' names -> their group, which runs in one process
    "tests/test_proof.py": "keras",
    "tests/test_convert.py": "keras",
    "tests/test_faults.py": "keras",
    "tests/test_formats.py::test_keras_agrees": "keras",
    "tests/test_back": "back",
    "tests/test_recipes.py": "recipes",
    "tests/test_evaluate.py": "converted",
    "tests/test_training.py": "training",
    "tests/evaluation/test_baseline.py": "converted",
    "tests/evaluation/test_results.py": "converted",
    "tests/evaluation/test_runtimes.py": "converted",
}


class Scheduling(LoadScopeScheduling):
    """Gives each test to a free process, and all tests of a group to the same one."""

    def _split_scope(self, nodeid):
        return next((group for start, group in TOGETHER.items() if nodeid.startswith(start)), nodeid)


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_configure(config):
    config.addinivalue_line("markers", "real_jobs: reads Keras files in jobs, not in this process")


def pytest_collection_modifyitems(items):
    """Start the long tests first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Return a function that returns a folder filled by Python programs.

    The first test process that asks for the folder `name` runs the programs, the others wait. `programs` maps
    a subfolder to a module and its further arguments.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the folder above all processes'

    def write(name, programs):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                run_programs({folder / part: arguments for part, arguments in programs.items()})
                done.touch()
        return folder

    return write


def run_programs(programs):
    """Run `python -m MODULE FOLDER ...` for each folder's (module, further arguments), all at once."""
    command = [sys.executable, "-W", "ignore", "-m"]
    processes = []
    for folder, (module, *arguments) in programs.items():
        folder.mkdir(parents=True, exist_ok=True)
        program = [*command, module, folder, *arguments]
        processes.append(subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, log = process.communicate(timeout=600)
        assert process.returncode == 0, log[-3000:]


@pytest.fixture(scope="session")
def keras_files(written):
    """Return the folder with `keras/` and `tf_keras/`, written by `tests.keras_files.writer`."""
    return written("keras_files", {writer: ("tests.keras_files.writer", writer) for writer in WRITERS})


@pytest.fixture(scope="session")
def expected(keras_files):
    """Return Keras's results by writer: `VARIANT:images` and `VARIANT:outputs`."""
    return {writer: np.load(keras_files / writer / "expected.npz") for writer in WRITERS}


@pytest.fixture(scope="session")
def reference_files(written):
    """Return the folder written by `tests.keras_files.references`: a Keras file for each of MODELS."""
    return written("references", {"": ("tests.keras_files.references",)})


@pytest.fixture(scope="session")
def reference(reference_files):
    """Return Keras's float64 results for `reference_files`."""
    with np.load(reference_files / "reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session", autouse=True)
def read_in_process():
    """Read Keras files in this process, without a job."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.keras.file.Job", InProcessReader)
        yield


@pytest.fixture(autouse=True)
def jobs_if_marked(request, monkeypatch):
    """Read Keras files in jobs, in the tests that are marked `real_jobs`."""
    if request.node.get_closest_marker("real_jobs"):
        monkeypatch.setattr("models.keras.file.Job", Job)


@pytest.fixture(scope="session")
def keras():
    """Return a `Keras` that runs all tasks in one process and remembers their answers."""
    process = RememberingKeras()
    yield process
    process.stop()


@pytest.fixture
def command(keras, monkeypatch, capsys):
    """Return a function that runs convert.py in this process: (exit status, stdout, lines of stderr).

    It compares with the shared `keras`; with `--keras-python` it starts jobs.
    """

    def run(*arguments):
        with monkeypatch.context() as patch:
            if "--keras-python" not in arguments:
                patch.setattr(convert, "Keras", lambda python: keras)
            patch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
            capsys.readouterr()
            try:
                status = convert.main()
            except SystemExit as error:
                status = error.code
        output = capsys.readouterr()
        return status, output.out, output.err.splitlines()

    return run


STAGES = ["layers", "shapes", "parameters", "outputs"]


def passed_stages(out):
    """Return the stages that convert.py printed as passed."""
    return re.findall(r"^  (\w+) +passed ", out, re.MULTILINE)


def files_in(folder):
    """Return the content of all files in a folder and its subfolders, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def refusal(tmp_path):
    """Return a function that tries to convert a file, and returns the message of the KerasFileError.

    It checks that the message is one line and that older outputs are unchanged.
    """
    folder = tmp_path / "outputs"
    folder.mkdir()
    output = folder / "model.pt"
    old = {output: b"old checkpoint", output.with_suffix(".json"): b"old metadata"}

    def refuse(path, **options):
        for name, content in old.items():
            name.write_bytes(content)
        with pytest.raises(KerasFileError) as caught:
            convert_file(Path(path), output, **options)
        assert {name: name.read_bytes() for name in folder.iterdir()} == old
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        return message.removeprefix(f"{path}: ")

    return refuse


@pytest.fixture
def old_outputs(tmp_path):
    """Return the path of an older checkpoint with its JSON, and a function: whether both are unchanged.

    They are as written by `convert.py`, which may replace them.
    """
    path = tmp_path / "out" / "model.pt"
    path.parent.mkdir()
    content = b"old checkpoint"
    metadata = {"architecture": {"bn_eps": 1}, "source": {"file": "old.h5"}}
    metadata = json.dumps({**metadata, "sha256": hashlib.sha256(content).hexdigest()})
    contents = {path: content, path.with_suffix(".json"): metadata.encode()}
    for file, content in contents.items():
        file.write_bytes(content)

    def untouched():
        return {file: file.read_bytes() for file in path.parent.iterdir()} == contents

    return path, untouched


@pytest.fixture
def locked(reference_files):
    """Return a read-only folder with a Keras file, `odd.h5`.

    A test run by root has another user's rights until its end: request this fixture last.
    """
    users, root = os.getresuid(), os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(reference_files / "odd.h5", folder)
        os.chmod(folder, 0o555)
        os.setresuid(*((65534, 65534, 0) if root else users))
        yield Path(folder)
        os.setresuid(*users)
        os.chmod(folder, 0o755)


@pytest.fixture
def network(reference_files, tmp_path):
    """Return a function that converts one of MODELS: (float64 network, rows of the mapping)."""

    def convert_model(name):
        convert_file(reference_files / f"{name}.h5", tmp_path / "model.pt")
        model = ResNet8.from_checkpoint(tmp_path / "model.pt").double()
        file = read_keras_file(reference_files / f"{name}.h5")
        return model, map_tensors(match_graph(file), model)

    return convert_model


@pytest.fixture
def edited(keras_files, tmp_path):
    """Return a function that copies a valid file and changes the copy with `edit(h5py.File)`."""

    def make(edit, name="plain.h5", writer="keras"):
        path = tmp_path / Path(name).name
        path.write_bytes((keras_files / writer / name).read_bytes())
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return make
